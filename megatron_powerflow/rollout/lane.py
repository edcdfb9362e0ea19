"""What is known of a handful of half-written responses? Tokens so far, who is done, whose cache is whose.

Every rank of a replica holds the same lanes and makes the same decisions from the same tokens; only the sampling
itself is the last stage's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_powerflow.model.kv_cache import KVCache
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import Prompt, Rollout, SamplingParams
from megatron_powerflow.rollout.sampling import uniforms

if TYPE_CHECKING:
    from megatron_powerflow.model.policy_model import PolicyModel

COMPACT_BELOW = 0.75  # finished rows leave the batch once fewer than this share of its rows is alive


class Lane:
    """Whole groups that move through the pipeline together. Row = prompt * responses_per_prompt + response."""

    def __init__(
        self,
        prompts: Sequence[tuple[int, Prompt]],
        sampling: SamplingParams,
        chunks: Sequence[PolicyModel],
        tp_size: int,
        device: torch.device,
    ) -> None:
        self._prompts, self._sampling, self._device = list(prompts), sampling, device
        config = chunks[0].config
        self.caches = [
            KVCache(
                num_layers=len(chunk.decoder.layers),
                num_rows=len(prompts),
                num_groups=config.num_query_groups // tp_size,
                head_dim=config.kv_channels,
                limit=max((len(prompt.token_ids) for _, prompt in prompts), default=0) + sampling.max_response_tokens,
                dtype=config.params_dtype,
                device=device,
            )
            for chunk in chunks
        ]
        num_rows = len(prompts) * sampling.responses_per_prompt
        self._uniforms = self._draw(num_rows) if sampling.temperature > 0 and num_rows else None
        self._tokens = np.zeros((num_rows, sampling.max_response_tokens), dtype=np.int64)
        self._log_probs = np.zeros((num_rows, sampling.max_response_tokens), dtype=np.float32)
        self._lengths = np.zeros(num_rows, dtype=np.int64)
        self._ended = np.zeros(num_rows, dtype=bool)  # by a stop token
        self._rows = np.arange(num_rows)  # rows still in the batch, in the order of the cache
        self._written = 0  # tokens each row in the batch has
        self._incoming: tuple[Tensor, dist.Work | None] | None = None

    def _draw(self, num_rows: int) -> np.ndarray:
        sampling = self._sampling
        return np.stack(
            [
                uniforms(
                    seed=sampling.seed, step=sampling.step, slot=slot, response=r, count=sampling.max_response_tokens
                )
                for slot, _ in self._prompts
                for r in range(sampling.responses_per_prompt)
            ]
        )

    @property
    def prefilling(self) -> bool:
        return self._written == 0

    @property
    def finished(self) -> bool:
        return len(self._rows) == 0

    @property
    def num_finished(self) -> int:
        return int((self._ended | (self._lengths == self._sampling.max_response_tokens)).sum())

    def next_tokens(self) -> tuple[Tensor, list[int] | None]:
        """Tokens of the coming forward pass, flat [t] int64, and each row's prompt length when prefilling."""
        if self.prefilling:
            flat = [token for _, prompt in self._prompts for token in prompt.token_ids]
            return torch.tensor(flat, device=self._device), [len(prompt.token_ids) for _, prompt in self._prompts]
        return torch.from_numpy(self._tokens[self._rows, self._written - 1]).to(self._device), None

    def last_positions(self) -> Tensor:
        """Which of the flat tokens' hidden states predict a new token: each prompt's last, or all."""
        if self.prefilling:
            lengths = torch.tensor([len(prompt.token_ids) for _, prompt in self._prompts])
            return (lengths.cumsum(0) - 1).to(self._device)
        return torch.arange(len(self._rows), device=self._device)

    def uniform(self) -> Tensor | None:
        """[rows] fp64, the numbers that sample the coming token; None for greedy decoding."""
        if self._uniforms is None:
            return None
        return torch.from_numpy(self._uniforms[self._rows, self._written]).to(self._device)

    def exchange(self, sampled: tuple[Tensor, Tensor] | None, groups: Groups) -> None:
        """The last stage tells the others what it drew; whoever comes back to this lane collects it."""
        if sampled is not None:
            message = torch.stack([sampled[0].double(), sampled[1].double()]).cpu()  # the one host round trip
        else:
            message = torch.empty(2, len(self._rows), dtype=torch.float64)
        work = None
        if groups.pp_size > 1:
            source = dist.get_global_rank(groups.pp_control, groups.pp_size - 1)
            work = dist.broadcast(message, src=source, group=groups.pp_control, async_op=True)
        self._incoming = (message, work)

    def take_tokens(self) -> None:
        """Collect the tokens of the previous round, end rows, drop them from the batch now and then."""
        if self._incoming is None:
            return
        message, work = self._incoming
        if work is not None:
            work.wait()
        if self.prefilling:
            for cache in self.caches:
                cache.repeat(self._sampling.responses_per_prompt)
        rows, place = self._rows, self._written
        tokens = message[0].numpy().astype(np.int64)
        alive = ~self._ended[rows]
        self._tokens[rows[alive], place] = tokens[alive]
        self._log_probs[rows[alive], place] = message[1].numpy()[alive]
        self._lengths[rows[alive]] += 1
        self._ended[rows] |= np.isin(tokens, list(self._sampling.stop_token_ids))
        self._written += 1
        self._incoming = None
        self._compact()

    def _compact(self) -> None:
        if self._written == self._sampling.max_response_tokens:
            self._rows = self._rows[:0]
            return
        alive = ~self._ended[self._rows]
        if alive.sum() < COMPACT_BELOW * len(alive):
            keep = torch.from_numpy(np.flatnonzero(alive)).to(self._device)
            for cache in self.caches:
                cache.select(keep)
            self._rows = self._rows[alive]

    def rollouts(self) -> list[Rollout]:
        """One record per response, by prompt, then response. Call when finished."""
        assert self.finished
        group_size = self._sampling.responses_per_prompt
        return [
            Rollout(
                prompt=prompt,
                slot=slot,
                response_index=response,
                response_token_ids=tuple(self._tokens[row, : self._lengths[row]].tolist()),
                rollout_log_probs=tuple(self._log_probs[row, : self._lengths[row]].tolist()),
                finish_reason="eos" if self._ended[row] else "length",
            )
            for place, (slot, prompt) in enumerate(self._prompts)
            for response in range(group_size)
            for row in [place * group_size + response]
        ]
