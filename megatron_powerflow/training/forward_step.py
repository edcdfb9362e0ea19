"""How does a micro-batch become per-token log-probs? One scorer serves the old policy, the reference and the current.

`run_forward` and `run_forward_backward` are Megatron's schedules with our forward step: the output of a stage is
its hidden states; on the last stage a function of (hidden states, micro-batch) makes what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_powerflow.log_probs.kernel_choice import LogProbKernel
from megatron_powerflow.log_probs.token_log_probs import TokenStatistics
from megatron_powerflow.model.log_z_head import pool_prompt
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.stream import chosen_states, extent, model_tokens, pool_prompts, to_rows
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import MicroBatch


@dataclass(frozen=True)
class Scorer:
    """The settings that a log-prob depends on beside weights and tokens, the same for all three policies.

    vocab_size: without the padding of the output layer. temperature: logits are divided by it. kernel: the arithmetic
    of the log-probs.
    """

    groups: Groups
    vocab_size: int
    temperature: float
    sequence_parallel: bool
    kernel: LogProbKernel = field(default_factory=LogProbKernel)

    def whole_sequence(self, hidden: Tensor) -> Tensor:
        """Gather the hidden states of the whole sequence over tp: [t / cp / tp, r, H] -> [t / cp, r, H].

        Without sequence parallelism they are whole as they come. The gradient is complete on every rank already, so the
        backward pass hands each rank its slice and adds nothing up. Collective over tp.
        """
        if not self.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.groups.tp)

    def log_probs(self, hidden: Tensor, chunk: PolicyModel, batch: MicroBatch) -> Tensor:
        """Return the log-probs of the targets: [b, s] fp32, 0 where loss_mask is False.

        hidden: [t / cp, r, H], whole over tp. chunk: the last one. Collective over tp, and over cp where the batch has
        a stream.
        """
        arguments = self._kernel_arguments(hidden, chunk, batch)
        values = self.kernel.log_probs(**arguments) if len(arguments["hidden"]) else _of_no_tokens(arguments)
        return to_rows(values, batch.responses, batch, self.groups.cp)

    def prompt_pool(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Return the mean of the hidden states over the prompt of each rollout: [b, H] fp32.

        hidden: [t / cp, r, H], whole over tp. Collective over cp where the batch has a stream.
        """
        if batch.stream is None:
            return pool_prompt(hidden, batch.prompt_mask)
        return pool_prompts(hidden, batch, self.groups.cp)

    def statistics(self, hidden: Tensor, chunk: PolicyModel, batch: MicroBatch) -> TokenStatistics:
        """Return the log-probs with the entropy and certainty of the same distributions, each [b, s] fp32.

        They are 0 where loss_mask is False. Arguments and collectives are those of `log_probs`.
        """
        arguments = self._kernel_arguments(hidden, chunk, batch)
        columns = self.kernel.statistics(**arguments) if len(arguments["hidden"]) else [_of_no_tokens(arguments)] * 3
        return TokenStatistics(*(to_rows(values, batch.responses, batch, self.groups.cp) for values in columns))

    def _kernel_arguments(self, hidden: Tensor, chunk: PolicyModel, batch: MicroBatch) -> dict[str, Any]:
        """Return the kernel's arguments for this rank's response tokens: among them hidden [k, H], targets [k]."""
        return {
            "hidden": chosen_states(hidden, batch.responses),
            "output_weight": chunk.output_weight(),
            "targets": batch.targets.flatten()[batch.responses.in_rows],
            "tp_group": self.groups.tp,
            "vocab_size": self.vocab_size,
            "temperature": self.temperature,
            "softcap": chunk.logit_softcap,
        }


def _of_no_tokens(arguments: dict[str, Any]) -> Tensor:
    return empty_log_probs(arguments["hidden"], arguments["output_weight"])


def empty_log_probs(hidden: Tensor, output_weight: Tensor) -> Tensor:
    """Return the log-probs of no tokens, hidden [0, H] -> [0] fp32, with a graph for the backward pass.

    A dummy has no tokens to score, nor has a share that is all prompt. The weight, too, is in the graph, with a
    gradient of zeros: Megatron counts the gradients of a micro-batch to know when to add them up over ranks.
    """
    return hidden.float().sum(dim=1) + output_weight[:0].float().sum()


# (hidden states [t / cp, r, H], whole over tp, last chunk, micro-batch) -> whatever the caller collects
Readout = Callable[[Tensor, PolicyModel, MicroBatch], Any]


@torch.no_grad()
def run_forward(
    chunks: Sequence[PolicyModel], batches: Sequence[MicroBatch], scorer: Scorer, readout: Readout
) -> list[Any]:
    """Run the forward passes of the micro-batches, without gradients, and collect what `readout` gives.

    Returns one readout per micro-batch, in order, on the last stage; an empty list elsewhere. Collective over the
    replica, and over the ranks that share experts with it.
    """

    def at_the_end(hidden: Tensor, *, chunk, batch, non_loss_data: bool):
        assert non_loss_data
        return readout(scorer.whole_sequence(hidden), chunk, batch)

    return _run(chunks, batches, at_the_end, forward_only=True, collect_non_loss_data=True)


def run_forward_backward(
    ddp_chunks: Sequence[DistributedDataParallel], batches: Sequence[MicroBatch], scorer: Scorer, loss_and_rows: Readout
) -> list[Any]:
    """Run the forward and backward passes of the micro-batches, and sum up the gradients.

    loss_and_rows: gives (scalar share of the loss, rows of any kind). The gradients are summed over micro-batches and
    data-parallel ranks, never averaged. Returns the rows of each micro-batch, in order, on the last stage; an empty
    list elsewhere. Collective over the run.
    """

    def at_the_end(hidden: Tensor, *, chunk, batch):
        loss, rows = loss_and_rows(scorer.whole_sequence(hidden), chunk, batch)
        # three values: Megatron then leaves the loss as it is (calculate_per_token_loss); the count is not used
        return loss, torch.ones((), dtype=torch.int, device=loss.device), rows

    return _run(ddp_chunks, batches, at_the_end, forward_only=False, collect_non_loss_data=False)


def _run(
    chunks: Sequence[PolicyModel] | Sequence[DistributedDataParallel],
    batches: Sequence[MicroBatch],
    at_the_end: Callable,
    **schedule,
) -> list[Any]:
    def forward_step(iterator: Iterator[MicroBatch], model: PolicyModel | DistributedDataParallel):
        batch = next(iterator)
        bare: PolicyModel = model if isinstance(model, PolicyModel) else model.module
        with bare.streaming(batch.stream) as packed_seq_params:
            hidden = model(model_tokens(batch), None, None, packed_seq_params=packed_seq_params)
        return hidden, partial(at_the_end, chunk=bare, batch=batch)

    iterators = [iter(batches) for _ in chunks]
    positions, rows = extent(batches[0])
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=positions,  # counts with interleaving only, where all are alike
        micro_batch_size=rows,
        **schedule,
    )
