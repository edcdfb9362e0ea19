"""What is the decoder itself? Megatron's GPTModel, which ends at the final hidden states.

It never builds logits. The last stage hands out hidden states and its output weight, and one kernel
(`log_probs/token_log_probs.py`) turns both into log-probs, for old, reference and current policy alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.model.attention import SdpaCoreAttention
from megatron_powerflow.model.kv_cache import KVCache, LayerCache
from megatron_powerflow.model.rotary import LatentRotaryEmbedding, PositionedRotaryEmbedding
from megatron_powerflow.model.stream import pieces_of, thd_of
from megatron_powerflow.records import Stream


class PolicyModel(GPTModel):
    """A pipeline stage of the model, or a chunk of one. forward: (tokens [b, s], position_ids, None) -> hidden states.

    Hidden states are [s, b, hidden_size] in the compute dtype, [s / tp, b, hidden_size] with sequence
    parallelism; on the last stage the final norm is applied.
    """

    def __init__(self, architecture: Architecture, padded_vocab_size: int, **gpt_arguments) -> None:
        super().__init__(
            vocab_size=padded_vocab_size,
            max_sequence_length=architecture.max_positions,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            **gpt_arguments,
        )
        self.padded_vocab_size = padded_vocab_size
        self.logit_softcap = architecture.logit_softcap  # for whoever makes logits of the output weight
        if self.pre_process and architecture.embedding_scale is not None:
            # Megatron's embedding knows no factor; a class of our own could not be handed to GPTModel
            # Rounded to the embeddings' dtype first, as Gemma was trained and transformers computes it.
            scale = torch.tensor(architecture.embedding_scale, dtype=self.config.params_dtype, device="cpu").item()
            self.embedding.register_forward_hook(lambda module, arguments, embeddings: embeddings * scale)
        latent = architecture.mla
        self.rotary_pos_emb = (LatentRotaryEmbedding if latent else PositionedRotaryEmbedding)(
            architecture.rope,
            latent.rope_head_dim if latent else architecture.head_dim,
            rotary_percent=1.0,
            use_cpu_initialization=self.config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )
        if latent:  # Megatron has one in each layer
            for layer in self.decoder.layers:
                layer.self_attention.rotary_pos_emb = self.rotary_pos_emb

    def _postprocess(self, hidden_states: Tensor, **_) -> Tensor:
        """Return the hidden states as they are.

        Upstream: GPTModel builds logits or the cross-entropy in this method. 0.19 has `output_processor` for the same
        purpose; 0.16 has no hook, so the method is overridden. Remove once 0.16 is not supported.
        """
        return hidden_states

    def output_weight(self) -> Tensor:
        """Return this rank's rows of the output layer, [padded_vocab_size / tp, hidden_size]. Last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @contextlib.contextmanager
    def streaming(self, stream: Stream | None) -> Iterator[PackedSeqParams | None]:
        """Prepare one forward pass over a stream, and yield the packed_seq_params for it.

        While open, our own rotation has the stream's positions. stream: None for rows as they are, which there are
        without context parallelism only, and which yield None.
        """
        if stream is None:
            yield None
        elif isinstance(self.decoder.layers[0].self_attention.core_attention, SdpaCoreAttention):
            self.rotary_pos_emb.positions = stream.positions
            try:
                yield pieces_of(stream, self.pg_collection.cp)
            finally:
                self.rotary_pos_emb.positions = None
        else:
            yield thd_of(stream)

    def set_decoding(self, positions: Tensor | None, cache: KVCache | None) -> None:
        """Attach a KV cache and the positions [t] int64 of the coming tokens; (None, None) detaches."""
        rotary = self.rotary_pos_emb
        if isinstance(rotary, PositionedRotaryEmbedding):
            rotary.decoding = cache is not None
            if cache is not None:
                assert positions is not None
                # the fused kernel, which scoring then has, rounds only the product; the other one cosines and sines
                fused = self.config.apply_rope_fusion
                cache.rotation = rotary.rotation(positions, torch.float32 if fused else cache.dtype)
        else:
            rotary.positions = positions
        for index, layer in enumerate(self.decoder.layers):
            layer.self_attention.core_attention.kv_cache = LayerCache(cache, index) if cache is not None else None
