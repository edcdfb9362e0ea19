"""How are micro-batches scored when no number says which tokens are response tokens? By counts.

Left out: everything else of scoring, which is the run's own (`training/forward_step.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_powerflow.log_probs.kernel_choice import LogProbKernel
from megatron_powerflow.log_probs.token_log_probs import MAX_LOGITS, token_log_probs
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.records import MicroBatch
from megatron_powerflow.training.forward_step import Scorer


class PlainKernel(LogProbKernel):
    """The plain arithmetic, with so many logits at a time as it has on the device that is rehearsed for.

    Triton's holds fewer bytes: its tiles stay in registers.
    """

    def __init__(self, max_logits: int) -> None:
        super().__init__(lambda hidden: None)
        self._max_logits = max_logits

    def log_probs(self, hidden: Tensor, output_weight: Tensor, targets: Tensor, **arguments) -> Tensor:
        return token_log_probs(hidden, output_weight, targets, max_logits=self._max_logits, **arguments)


@dataclass(frozen=True)
class CountingScorer(Scorer):
    """A scorer for micro-batches of rollouts of one length.

    num_prompt_tokens, num_response_tokens: of a rollout.
    """

    kernel: LogProbKernel = field(default_factory=lambda: PlainKernel(MAX_LOGITS))
    num_prompt_tokens: int = 1
    num_response_tokens: int = 1

    def prompt_pool(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        tokens = self._some(hidden, batch, self.num_prompt_tokens).float()
        rows = torch.zeros(len(batch.tokens), tokens.shape[1], device=hidden.device)
        return rows.index_add(0, self._indices(len(tokens), hidden), tokens) / 1.0

    def _kernel_arguments(self, hidden: Tensor, chunk: PolicyModel, batch: MicroBatch) -> tuple[dict[str, Any], Tensor]:
        chosen = self._some(hidden, batch, self.num_response_tokens)
        indices = self._indices(len(chosen), hidden)
        arguments = {
            "hidden": chosen,
            "output_weight": chunk.output_weight(),
            "targets": batch.targets.flatten()[indices],
            "tp_group": self.groups.tp,
            "vocab_size": self.vocab_size,
            "temperature": self.temperature,
            "softcap": chunk.logit_softcap,
        }
        return arguments, indices

    def _some(self, hidden: Tensor, batch: MicroBatch, per_rollout: int) -> Tensor:
        """Select so many hidden states of each rollout, of those that this context-parallel rank has: [k, H]."""
        indices = self._indices(len(batch.tokens) * per_rollout // self.groups.cp_size, hidden)
        return hidden.transpose(0, 1)[indices, indices]

    def _indices(self, count: int, hidden: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=hidden.device)
