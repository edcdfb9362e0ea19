"""What does a decode batch keep of half-written responses? Their tokens, which are finished, and their cache.

A group takes its rows as soon as there is room for all of it, and shares one prefill; a pass prefills only so many
tokens, and the groups beyond them wait for the next one. Rows whose responses are finished wait for the next group.
Once no group waits, finished rows leave the batch. The random numbers of a row are a function of purpose, seed, step,
slot and response alone, so neither the order nor the neighbours matter.

Every rank of a replica holds the same batches and makes the same decisions from the same tokens; only the last stage
samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import islice
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

PREFILL_TOKENS = 16384  # of a prefill pass: hidden states of all its tokens are in memory at a time
COMPACT_BELOW = 0.75  # finished rows leave the batch once fewer than this share of its rows is alive
ROW_ARRAYS = ("_alive", "_lengths", "_tokens", "_log_probs", "_uniforms")


class DecodeBatch:
    """The rows that go through the pipeline together; each row is one response, and one row of the KV cache.

    waiting: (slot, prompt) of the groups that have no rows yet, shared with the other batches, which take from it in
    the same order on every rank. max_groups: the most groups whose rows the batch may hold. max_prompt_tokens: the
    length of the longest prompt of any group to come. chunks: those of this rank, for each of which the batch has a KV
    cache. length_step: see `KVCache`. prefill_tokens: the most tokens of prompts in a pass; a longer prompt has one for
    itself.
    """

    def __init__(
        self,
        waiting: deque[tuple[int, Prompt]],
        max_groups: int,
        max_prompt_tokens: int,
        sampling: SamplingParams,
        chunks: Sequence[PolicyModel],
        tp_size: int,
        device: torch.device,
        *,
        length_step: int,
        prefill_tokens: int,
    ) -> None:
        self._waiting, self._sampling, self._device = waiting, sampling, device
        self._prefill_tokens = prefill_tokens
        self._max_rows = max_groups * sampling.responses_per_prompt
        self._stop_token_ids = list(sampling.stop_token_ids)
        config = chunks[0].config
        self.caches = [
            KVCache(
                num_layers=len(chunk.decoder.layers),
                max_rows=self._max_rows,
                num_groups=max(config.num_query_groups // tp_size, 1),  # with fewer than ranks, several have the same
                head_dims=(
                    config.kv_channels,
                    config.v_head_dim if config.multi_latent_attention else config.kv_channels,
                ),
                limit=max_prompt_tokens + sampling.max_response_tokens,
                dtype=config.params_dtype,
                device=device,
                length_step=length_step,
            )
            for chunk in chunks
        ]
        self.rollouts: list[Rollout] = []  # finished ones, in the order they finished
        # of each row in the batch:
        self._names: list[tuple[int, Prompt, int]] = []  # slot, prompt, response
        self._alive = np.zeros(0, dtype=bool)
        self._lengths = np.zeros(0, dtype=np.int64)  # response tokens so far
        self._tokens = np.zeros((0, sampling.max_response_tokens), dtype=np.int64)
        self._log_probs = np.zeros((0, sampling.max_response_tokens), dtype=np.float32)
        self._uniforms = np.zeros((0, sampling.max_response_tokens if sampling.temperature > 0 else 0))
        self._admitted: np.ndarray | None = None  # [groups, responses]: rows whose prompts the coming pass prefills
        self._incoming: tuple[Tensor, dist.Work | None] | None = None
        self._admit()

    @property
    def finished(self) -> bool:
        """Whether every response in the batch is finished."""
        return not self._alive.any()

    def coming_tokens(self) -> np.ndarray:
        """Return the tokens of the coming forward pass: those of the admitted prompts, or each row's last token.

        They are [t] int64, flat; a finished row gives the token 0.
        """
        if self._admitted is not None:
            return np.concatenate([prompt.token_ids for prompt in self._prompts_of(self._admitted)])
        return np.where(self._alive, self._tokens[np.arange(len(self._names)), self._lengths - 1], 0)

    def entering(self, chunk_index: int, chunk: PolicyModel, padding: int) -> AbstractContextManager[None]:
        """Return the context in which the chunk at `chunk_index` makes the coming pass.

        padding: the number of tokens behind the flat ones, which are stored nowhere.
        """
        if self._admitted is None:
            return self.caches[chunk_index].decoding(chunk, self._alive, padding)
        lengths = [len(prompt.token_ids) for prompt in self._prompts_of(self._admitted)]
        return self.caches[chunk_index].prefilling(chunk, lengths, self._admitted, padding)

    def predicting(self, hidden: Tensor) -> Tensor:
        """Select the hidden states that new tokens are drawn from: [t, 1, H] of the coming pass -> [n, H].

        They are those of each prompt's last token while prompts are prefilled, and else those of all rows, without the
        padding. Each of the n stands for `draws_each` rows.
        """
        if self._admitted is None:
            return hidden[: len(self._names), 0]
        lengths = [len(prompt.token_ids) for prompt in self._prompts_of(self._admitted)]
        return hidden[torch.from_numpy(np.cumsum(lengths) - 1).to(hidden.device), 0]

    @property
    def draws_each(self) -> int:
        """The number of rows that draw a token from each hidden state of `predicting`."""
        return 1 if self._admitted is None else self._sampling.responses_per_prompt

    def uniform(self) -> Tensor | None:
        """Return the uniform numbers that sample the coming token: [drawing rows] fp64; None for greedy decoding."""
        if self._sampling.temperature == 0:
            return None
        rows = self._drawing()
        drawn = self._uniforms[rows, np.where(self._alive, self._lengths, 0)[rows]]
        return torch.from_numpy(drawn).to(self._device)

    def exchange(self, sampled: tuple[Tensor, Tensor] | None, groups: Groups) -> None:
        """Send the sampled tokens from the last stage to the others, where `take_tokens` waits for them.

        sampled: (tokens [rows], log-probs [rows]) on the last stage; None elsewhere. Collective over the pipeline's
        ranks; does not wait for them.
        """
        if sampled is not None:
            message = torch.stack([sampled[0].double(), sampled[1].double()]).cpu()  # the one host round trip
        else:
            message = torch.empty(2, len(self._drawing()), dtype=torch.float64)
        work = None
        if groups.pp_size > 1:
            source = dist.get_global_rank(groups.pp_control, groups.pp_size - 1)
            work = dist.broadcast(message, src=source, group=groups.pp_control, async_op=True)
        self._incoming = (message, work)

    def take_tokens(self) -> None:
        """Take the tokens of the previous round, end rows, and give freed rows to waiting groups or drop them.

        Does nothing before the first `exchange`.
        """
        if self._incoming is None:
            return
        message, work = self._incoming
        if work is not None:
            work.wait()
        drawing = self._drawing()
        tokens, log_probs = message[0].numpy().astype(np.int64), message[1].numpy()
        alive = self._alive[drawing]
        rows, tokens = drawing[alive], tokens[alive]
        places = self._lengths[rows]
        self._tokens[rows, places], self._log_probs[rows, places] = tokens, log_probs[alive]
        self._lengths[rows] = places + 1
        stopped = np.isin(tokens, self._stop_token_ids)
        ended = stopped | (places + 1 == self._sampling.max_response_tokens)
        self.rollouts += [self._rollout(row, stop) for row, stop in zip(rows[ended], stopped[ended], strict=True)]
        self._alive[rows[ended]] = False
        self._admitted = self._incoming = None
        self._admit()
        if ended.any():
            self._compact()

    def _drawing(self) -> np.ndarray:
        """Return the rows that the coming pass draws a token for."""
        return np.arange(len(self._names)) if self._admitted is None else self._admitted.ravel()

    def _prompts_of(self, admitted: np.ndarray) -> list[Prompt]:
        return [self._names[row][1] for row in admitted[:, 0]]

    def _admit(self) -> None:
        """Give rows to as many waiting groups as one prefill has room for: freed rows first, then new ones."""
        group_size = self._sampling.responses_per_prompt
        num_groups = min(len(self._waiting), (self._max_rows - int(self._alive.sum())) // group_size)
        lengths = [len(prompt.token_ids) for _, prompt in islice(self._waiting, num_groups)]
        num_groups = min(num_groups, max(1, int((np.cumsum(lengths) <= self._prefill_tokens).sum())))
        if num_groups == 0:
            return
        self._add_rows(num_groups * group_size - int((~self._alive).sum()))
        self._admitted = np.flatnonzero(~self._alive)[: num_groups * group_size].reshape(num_groups, group_size)
        for rows in self._admitted:
            slot, prompt = self._waiting.popleft()
            for response, row in enumerate(rows):
                self._names[row] = (slot, prompt, response)
                self._uniforms[row] = uniforms(
                    seed=self._sampling.seed,
                    step=self._sampling.step,
                    slot=slot,
                    response=response,
                    count=self._uniforms.shape[1],
                    purpose=self._sampling.purpose,
                )
        self._alive[self._admitted], self._lengths[self._admitted] = True, 0

    def _add_rows(self, count: int) -> None:
        if count <= 0:
            return
        for cache in self.caches:
            cache.add_rows(count)
        self._names += [(0, Prompt("", 0, ()), 0)] * count
        for name in ROW_ARRAYS:
            array = getattr(self, name)
            setattr(self, name, np.pad(array, [(0, count)] + [(0, 0)] * (array.ndim - 1)))

    def _compact(self) -> None:
        """Drop the finished rows where there are many, unless all are finished or a prefill has been laid out."""
        num_alive = int(self._alive.sum())
        if self._admitted is not None or num_alive == 0 or num_alive >= COMPACT_BELOW * len(self._alive):
            return
        keep = np.flatnonzero(self._alive)
        for cache in self.caches:
            cache.select(keep)
        self._names = [self._names[row] for row in keep]
        for name in ROW_ARRAYS:
            setattr(self, name, getattr(self, name)[keep])

    def _rollout(self, row: int, stopped: bool) -> Rollout:
        slot, prompt, response = self._names[row]
        length = self._lengths[row]
        return Rollout(
            prompt=prompt,
            slot=slot,
            response_index=response,
            response_token_ids=tuple(self._tokens[row, :length].tolist()),
            rollout_log_probs=tuple(self._log_probs[row, :length].tolist()),
            finish_reason="eos" if stopped else "length",
        )
