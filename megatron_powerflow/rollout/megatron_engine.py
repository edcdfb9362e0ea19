"""How does the live policy write responses? KV-cached decoding in the training processes themselves.

Prompts of a wave are prefilled once each and their rows repeated for every response. Each pipeline stage runs
its part of a token and hands the hidden states on; the last stage samples and tells the other stages the tokens.
With pp > 1 a wave is split into lanes that follow each other through the stages, so that none waits idle:

    stage 0   lane 0 t0 | lane 1 t0 | lane 0 t1 | lane 1 t1 | ...
    stage 1             | lane 0 t0 | lane 1 t0 | lane 0 t1 | ...

Left out: refilling rows that finished, CUDA graphs, engines in other processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import Prompt, Rollout, SamplingParams
from megatron_powerflow.rollout.engine import Progress
from megatron_powerflow.rollout.in_step import anyone, largest
from megatron_powerflow.rollout.lane import Lane
from megatron_powerflow.rollout.sampling import sample_tokens

if TYPE_CHECKING:
    from megatron_powerflow.model.policy_model import PolicyModel


class MegatronEngine:
    """Engine over the policy's own chunks: no copy of the weights, nothing to synchronise.

    max_concurrent_rows: responses decoded at a time on a data-parallel rank (bounds the KV cache).
    alignment: tokens of a forward pass are padded to a multiple of this (tp with sequence parallelism, FP8).
    """

    def __init__(
        self,
        chunks: Sequence[PolicyModel],
        groups: Groups,
        *,
        vocab_size: int,
        max_concurrent_rows: int,
        alignment: int,
    ) -> None:
        self._chunks, self._groups, self._vocab_size = list(chunks), groups, vocab_size
        self._max_rows, self._alignment = max_concurrent_rows, alignment
        self._config = chunks[0].config
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[tuple[int, Prompt]], sampling: SamplingParams, progress: Progress | None = None
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        training = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        rollouts: list[Rollout] = []
        per_wave = max(1, self._max_rows // sampling.responses_per_prompt)
        total = len(prompts) * sampling.responses_per_prompt
        num_waves = largest(-(-len(prompts) // per_wave), self._groups)
        for start in range(0, num_waves * per_wave, per_wave):
            wave = prompts[start : start + per_wave]
            for lane in self._run(self._lanes(wave, sampling), sampling, len(rollouts), total, progress):
                rollouts += lane.rollouts()
        for chunk, was_training in zip(self._chunks, training, strict=True):
            chunk.train(was_training)
        return rollouts

    def _lanes(self, wave: Sequence[tuple[int, Prompt]], sampling: SamplingParams) -> list[Lane]:
        """Up to pp lanes of whole groups, as even as they come, in the order of the prompts."""
        num_lanes = largest(min(self._groups.pp_size, len(wave)), self._groups)
        bounds = [len(wave) * i // num_lanes for i in range(num_lanes + 1)]
        return [
            Lane(wave[bounds[i] : bounds[i + 1]], sampling, self._chunks, self._groups.tp_size, self._groups.device)
            for i in range(num_lanes)
        ]

    def _run(self, lanes: list[Lane], sampling: SamplingParams, done: int, total: int, progress) -> list[Lane]:
        """Decode the lanes to their ends, one token of one lane after the other."""
        waiting = deque(lanes)
        while waiting:
            lane = waiting.popleft()
            lane.take_tokens()  # of the previous round, from the last stage
            if not anyone(not lane.finished, self._groups):
                if progress is not None:
                    progress(done + sum(lane.num_finished for lane in lanes), total)
                continue
            if lane.finished:
                self._idle_pass()
            else:
                hidden = self._forward(lane)
                lane.exchange(self._sample(lane, hidden, sampling), self._groups)
            waiting.append(lane)
            if progress is not None and lane is lanes[0]:
                progress(done + sum(lane.num_finished for lane in lanes), total)
        while self._sends:
            self._sends.popleft()[0].wait()
        return lanes

    def _forward(self, lane: Lane) -> Tensor | None:
        """One pass of the lane's coming tokens through this rank's chunks; hidden states on the last stage."""
        tokens, prompt_lengths = lane.next_tokens()
        padding = -len(tokens) % self._alignment
        if padding:  # repeats of the last token: computed, stored nowhere, ignored
            tokens = torch.cat([tokens, tokens[-1:].expand(padding)])
        hidden = None
        for place, chunk in enumerate(self._chunks):
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive(len(tokens)))
            with lane.caches[place].entering(chunk, prompt_lengths, padding):
                hidden = chunk(tokens[None], None, None)
            if not chunk.post_process:
                self._send(hidden)
                hidden = None
        return hidden

    def _idle_pass(self) -> None:
        """A pass of padding alone, for the ranks that share experts with this one: see `in_step.py`."""
        tokens = torch.zeros(1, self._alignment, dtype=torch.int64, device=self._groups.device)
        for chunk in self._chunks:
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive(self._alignment))
            hidden = chunk(tokens, None, None)
            if not chunk.post_process:
                self._send(hidden)

    def _sample(self, lane: Lane, hidden: Tensor | None, sampling: SamplingParams) -> tuple[Tensor, Tensor] | None:
        """(tokens [rows] int64, log-probs [rows] fp32) of the lane on the last stage; None on the others."""
        if hidden is None:
            return None
        if self._config.sequence_parallel:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            hidden = gather_from_sequence_parallel_region(hidden, group=self._groups.tp)
        weight = self._chunks[-1].output_weight()
        first = self._groups.tp_rank * weight.shape[0]
        logits = (hidden[lane.last_positions(), 0] @ weight.t()).float()
        if sampling.temperature > 0:
            logits = logits / sampling.temperature
        if first + weight.shape[0] > self._vocab_size:
            logits[:, max(self._vocab_size - first, 0) :] = -torch.inf
        if lane.prefilling:
            logits = logits.repeat_interleave(sampling.responses_per_prompt, dim=0)
        return sample_tokens(logits, lane.uniform(), tp_group=self._groups.tp, first=first)

    def _neighbour(self, step: int) -> int:
        return dist.get_global_rank(self._groups.pp, (self._groups.pp_rank + step) % self._groups.pp_size)

    def _send(self, hidden: Tensor) -> None:
        hidden = hidden.contiguous()
        self._sends.append((dist.isend(hidden, self._neighbour(+1), group=self._groups.pp), hidden))
        while len(self._sends) > 2 * self._groups.pp_size:  # keeps the buffers of finished sends from piling up
            self._sends.popleft()[0].wait()

    def _receive(self, num_tokens: int) -> Tensor:
        if self._config.sequence_parallel:
            num_tokens //= self._groups.tp_size
        shape = (num_tokens, 1, self._config.hidden_size)
        hidden = torch.empty(shape, dtype=self._config.pipeline_dtype, device=self._groups.device)
        dist.recv(hidden, self._neighbour(-1), group=self._groups.pp)
        return hidden
