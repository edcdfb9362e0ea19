"""Who has a GPU's memory, and when? Communicators first; then torch, which gives back between phases what lies idle.

NCCL makes a communicator at the first message of a group, out of memory that torch has not taken. Most groups speak
first within a step, when weights, gradients and the cache are there already, and some not before the first gradient's
norm; a run that fits by torch's account then fails in NCCL. So each group has a first message before the model is
built (`first_messages`).

torch keeps the memory that a phase has freed, in blocks of that phase's sizes. The next phase asks for other sizes.
`give_back` lets go of what is idle; that segments can grow (`launch.grow_segments`) leaves fewer idle pieces.

Left out: how much memory a run needs. On a CPU `give_back` does nothing, and first messages only show that all answer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_powerflow.parallel.groups import Groups


def first_messages(groups: Groups) -> None:
    """Send a number over every group that a run uses, and along the pipeline. Collective over the run.

    All ranks go through the kinds of groups in the same order, and the groups of a kind have no rank in common.
    """
    for group in used_groups(groups):
        number = torch.ones(1, device=groups.device)
        dist.all_reduce(number, group=group)
        assert int(number) == dist.get_world_size(group), "a sum over the group's ranks"
    if groups.pp_size > 1:
        _round_the_pipeline(groups)


def used_groups(groups: Groups) -> list[dist.ProcessGroup]:
    """Return the groups of this rank, our own and those that Megatron talks over by itself, each once, of two ranks or
    more. All ranks together: Megatron's checkpoints."""
    from megatron.core import parallel_state

    ours = [dist.group.WORLD, groups.tp, groups.cp, groups.dp, groups.tp_dp, groups.pp, groups.ep, groups.edp]
    megatrons = [
        parallel_state.get_data_parallel_group(with_context_parallel=True),  # gradients, the distributed optimizer
        parallel_state.get_model_parallel_group(),  # the gradient's norm
        parallel_state.get_intra_distributed_optimizer_instance_group(),  # the same, of the distributed optimizer
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_tensor_and_model_parallel_group(),  # the tokens of experts
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(),  # the norm of the experts' gradient
        parallel_state.get_embedding_group(check_initialized=False),  # first and last stage, elsewhere None
    ]
    found = {id(group): group for group in [*ours, *megatrons] if group is not None}
    return [group for group in found.values() if dist.get_world_size(group) > 1]


def _round_the_pipeline(groups: Groups) -> None:
    """Send a number to the next stage, and from the last one to the first: pairs of ranks have communicators of their
    own. Even stages send first, for on a GPU two that both send first may wait for each other."""
    number, received = torch.ones(1, device=groups.device), torch.zeros(1, device=groups.device)
    behind, ahead = (dist.get_global_rank(groups.pp, (groups.pp_rank + step) % groups.pp_size) for step in (-1, +1))
    if groups.pp_rank % 2 == 0:
        dist.send(number, ahead, group=groups.pp)
    dist.recv(received, behind, group=groups.pp)
    if groups.pp_rank % 2:
        dist.send(number, ahead, group=groups.pp)
    received.item()  # waits for the answer


def give_back(device: torch.device) -> None:
    """Let torch's allocator give back to the GPU what it holds and nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
