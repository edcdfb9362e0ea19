"""What does the writing of responses take on one rank? The cache of all rows, a prefill pass, the last decoding pass.

Left out: the passes between, which need less; several decode batches at once (`rollout/megatron_engine.py`), whose
caches together are the one here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from megatron_powerflow.log_probs.plain import make_logits
from megatron_powerflow.model.decode_weights import decode_weights
from megatron_powerflow.model.kv_cache import KVCache
from megatron_powerflow.model.length_step import CUDA_LENGTH_STEP
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.rehearsal.job import Job
from megatron_powerflow.rollout.decode_batch import PREFILL_TOKENS
from megatron_powerflow.rollout.sampling import sample_tokens


class Decoding:
    """The writing of as many rows as the run decodes at a time on a rank."""

    def __init__(self, job: Job, groups: Groups, chunks: Sequence[PolicyModel]) -> None:
        self.job, self.groups, self.chunks = job, groups, chunks
        rollout, config = job.config.rollout, chunks[0].config
        self.group_size = rollout.responses_per_prompt
        prompts = -(-rollout.prompts_per_step // groups.num_samplers)
        self.num_groups = min(prompts, max(1, rollout.max_concurrent_rows // self.group_size))
        self.alignment = job.layout.token_multiple(job.config.precision)
        self.caches = [
            KVCache(
                num_layers=len(chunk.decoder.layers),
                max_rows=self.num_rows,
                num_groups=max(config.num_query_groups // groups.tp_size, 1),
                head_dims=(
                    config.kv_channels,
                    config.v_head_dim if config.multi_latent_attention else config.kv_channels,
                ),
                limit=job.longest,
                dtype=config.params_dtype,
                device=groups.device,
                length_step=CUDA_LENGTH_STEP if job.on == "cuda" else 1,
                at_once=job.on == "cuda",
            )
            for chunk in chunks
        ]

    @property
    def num_rows(self) -> int:
        """The rows that are decoded at a time."""
        return self.num_groups * self.group_size

    def prefill(self) -> None:
        """Prefill as many of the prompts, all as long as may be, as one pass takes, into the rows of all prompts."""
        length = self.job.config.rollout.max_prompt_tokens
        at_once = max(1, min(self.num_groups, PREFILL_TOKENS // length))
        rows = np.arange(at_once * self.group_size).reshape(at_once, -1)
        for cache in self.caches:
            cache.add_rows(self.num_rows)
        with self._decode_weights():
            hidden = self._pass(
                at_once * length,
                lambda cache, chunk, padding: cache.prefilling(chunk, [length] * at_once, rows, padding),
            )
            self._sample(hidden, at_once, self.group_size)

    def decode(self) -> None:
        """Make the last pass: every row has one token less than it may have."""
        alive = np.ones(self.num_rows, dtype=bool)
        for cache in self.caches:
            cache.lengths = np.full(self.num_rows, self.job.longest - 1, dtype=np.int64)
        with self._decode_weights():
            hidden = self._pass(self.num_rows, lambda cache, chunk, padding: cache.decoding(chunk, alive, padding))
            self._sample(hidden, self.num_rows, 1)

    def _decode_weights(self) -> AbstractContextManager[None]:
        """The weights as they lie while responses are written: on a CPU there are copies."""
        chunks = self.chunks if self.job.on == "cpu" else ()
        return decode_weights(chunks, self.job.config.rollout.max_response_tokens)

    def _pass(self, num_tokens: int, entering) -> Tensor | None:
        padding = -num_tokens % self.alignment
        tokens = torch.zeros(1, num_tokens + padding, dtype=torch.int64, device=self.groups.device)
        config, hidden = self.chunks[0].config, None
        held = tokens.shape[1] // (self.groups.tp_size if config.sequence_parallel else 1)
        for cache, chunk in zip(self.caches, self.chunks, strict=True):
            if not chunk.pre_process:
                shape = (held, 1, config.hidden_size)
                chunk.set_input_tensor(torch.empty(shape, dtype=config.pipeline_dtype, device=self.groups.device))
            with entering(cache, chunk, padding):
                hidden = chunk(tokens, None, None)
        return hidden if self.chunks[-1].post_process else None

    def _sample(self, hidden: Tensor | None, count: int, draws_each: int) -> None:
        if hidden is None:
            return
        if self.chunks[0].config.sequence_parallel:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            hidden = gather_from_sequence_parallel_region(hidden, group=self.groups.tp)
        chunk = self.chunks[-1]
        weight = chunk.output_weight()
        logits = make_logits(hidden[:count, 0], weight, 1.0, chunk.logit_softcap, torch.float32)
        if draws_each > 1:
            logits = logits.repeat_interleave(draws_each, dim=0)
        uniform = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        sample_tokens(logits, uniform, tp_group=self.groups.tp, first=0)
