"""Faults that only several processes can have, planted in a proof's processes: each must be found.

`python -m tests.planted_faults FAULT=FOLDER ... CLEAN` makes the proof of the folder CLEAN as
`megatron_powerflow.prove.forks` does, and then, for each fault, the layout's parts in a folder of the same small run,
in forks that have the fault. Nothing of the program knows of it.

Left out: mistakes that one process has as well; `tests/mutations` has those.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_powerflow.prove.proof import Subject


@dataclass(frozen=True)
class Fault:
    """matters: where a layout can have it. plant: puts it into this process, before it forks ranks."""

    matters: Callable[[Subject], bool]
    plant: Callable[[], None]


def _partial_products() -> None:
    """A row-parallel product stays this rank's share of the sum."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import layers

    def own_part(values, group=None, **_):
        return values.chunk(dist.get_world_size(group))[dist.get_rank(group)]

    layers.reduce_from_tensor_model_parallel_region = lambda values, group=None: values
    layers.reduce_scatter_to_sequence_parallel_region = own_part


def _norm_gradients() -> None:
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function has its name
    module._allreduce_non_tensor_model_parallel_grads = lambda *_, **__: None


def _sequence_gradient() -> None:
    """The gradient of the gathered sequence, whole on every rank, is summed over them."""
    from megatron_powerflow.training import forward_step as module

    gather = module.gather_from_sequence_parallel_region
    module.gather_from_sequence_parallel_region = lambda hidden, **given: gather(
        hidden, **given | {"tensor_parallel_output_grad": True}
    )


def _norm_of_shards() -> None:
    from megatron_powerflow.model import build

    build._mark_tensor_parallel = lambda chunk: None


def _own_vocabulary() -> None:
    """The softmax is over this rank's part of the vocabulary."""
    import megatron_powerflow.log_probs.token_log_probs as module

    module._over_ranks = lambda maxima, sums, group: (maxima, sums)


def _order_of_parts() -> None:
    """The parts of a row-parallel matrix are put together in the wrong order, for exports and comparisons alike."""
    from megatron_powerflow.hf.operations import Rows, joined

    Rows.merge = lambda self, shards, shape: (joined(shards[::-1], 1),)


def _sampler_offset() -> None:
    """Every rank's part of the vocabulary begins with token 0, as the sampler counts."""
    from megatron_powerflow.rollout import megatron_engine as module

    sample = module.sample_tokens
    module.sample_tokens = lambda logits, uniform, *, tp_group, first: sample(
        logits, uniform, tp_group=tp_group, first=0
    )


def _no_gradient_sum() -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    Group.start_grad_sync = lambda self, *_, **__: None


def _gradient_mean() -> None:
    """Gradients of replicas are averaged, where the loss has counted the rollouts of all already."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel as Wrapper

    finish = Wrapper.finish_grad_sync

    def mean(self, *args, **kwargs):
        finish(self, *args, **kwargs)
        self.scale_gradients(1 / parallel_state.get_data_parallel_world_size(with_context_parallel=True))

    Wrapper.finish_grad_sync = mean


def _own_denominator() -> None:
    """The loss is divided by this replica's rollouts."""
    from megatron_powerflow.training import update

    update._num_kept = lambda batches, groups: int(sum(int(batch.kept.sum()) for batch in batches))


def _same_share() -> None:
    """Every replica takes the first one's prompts."""
    from megatron_powerflow.training.plan import Plan

    share_of = Plan.share_of
    Plan.share_of = lambda self, prompts, dp_rank: share_of(self, prompts, 0)


def _no_parameter_gather() -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    Group.start_param_sync = lambda self, *_, **__: None


def _pieces_swapped() -> None:
    """Keys stay in the order of the ranks that hold them."""
    import torch

    from megatron_powerflow.data import packing

    packing._key_order = lambda sizes, cp_size: torch.arange(sum(sizes))


def _own_tokens() -> None:
    """A response's log-prob, squared in the loss, is that of this rank's tokens alone."""
    from megatron_powerflow.model import stream

    stream.sum_over = lambda values, group: values


def _key_gradients() -> None:
    """The gradient of keys and values is that of this rank's queries alone."""
    import torch
    import torch.distributed as dist

    from megatron_powerflow.parallel import collectives

    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        everyone = torch.empty_like(grad).index_copy_(0, order, grad)
        return everyone.narrow(0, dist.get_rank(ctx.group) * ctx.length, ctx.length), None, None

    collectives._GatherOver.backward = staticmethod(backward)


def _neighbour() -> None:
    """A packed response sees the one before it."""
    from megatron_powerflow.data import packing

    pieces = packing._pieces

    def joined(sizes, cp_rank, cp_size):
        if cp_size == 1:  # whole sequences, which attention takes from the pieces' ends
            sizes = [sum(sizes)]
        return [piece._replace(first_key=0) for piece in pieces(sizes, cp_rank, cp_size)]

    packing._pieces = joined


def _first_stage_rows() -> None:
    """What the last stage has computed is taken from the first."""
    import torch
    import torch.distributed as dist

    from megatron_powerflow.parallel import collectives

    def from_first(values, shape, groups):
        local = values if groups.is_last_stage else torch.zeros(shape, dtype=torch.float64)
        dist.broadcast(local, src=dist.get_global_rank(groups.pp_control, 0), group=groups.pp_control)
        return local

    collectives.from_last_stage = from_first


def _other_layers() -> None:
    """Half of the layers hold the weights of the other half: stages, or chunks of a stage, changed places."""
    from megatron_powerflow.hf import live_weights as module

    placements = module.placements

    def moved(chunks, family, ep_rank):
        count = chunks[0].config.num_layers
        for placement in placements(chunks, family, ep_rank):
            layer = placement.layer
            yield placement if layer is None else replace(placement, layer=(layer + count // 2) % count)

    module.placements = moved


def _gradient_stops() -> None:
    """A stage between the first and the last sends no gradient on."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    backward = schedules.backward_step

    def stopped(*args, **kwargs):
        gradients = backward(*args, **kwargs)
        if (
            0
            < parallel_state.get_pipeline_model_parallel_rank()
            < parallel_state.get_pipeline_model_parallel_world_size() - 1
        ):
            for gradient in gradients if isinstance(gradients, list) else [gradients]:
                gradient.zero_()
        return gradients

    schedules.backward_step = stopped


def _tied_gradients() -> None:
    """The two copies of a tied embedding have gradients of their own."""
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_word_embedding_grads = lambda *_, **__: None


def _other_experts() -> None:
    from megatron_powerflow.hf import live_weights as module

    placements = module.placements
    module.placements = lambda chunks, family, ep_rank: placements(chunks, family, 1 - ep_rank)


def _expert_replicas() -> None:
    """Gradients of experts are not summed over the replicas of the experts."""
    from megatron.core.distributed import DistributedDataParallel as Wrapper

    def finish(self, *args, **kwargs):
        for group in self.bucket_groups:
            group.finish_grad_sync(*args, **kwargs)

    Wrapper.finish_grad_sync = finish


def _head_counted() -> None:
    """The head's gradient, alike on all ranks of tp and cp, is their sum."""
    from megatron_powerflow.training import optimizer as module

    reduce = module._reduce_head_gradients

    def summed(trainable, groups):
        norm = reduce(trainable, groups)
        for parameter in trainable.head.learned() if trainable.head is not None else ():
            parameter.grad *= groups.tp_size * groups.cp_size
        return norm

    module._reduce_head_gradients = summed


def _moments_lost() -> None:
    """A checkpoint is loaded without Adam's moments, and nobody compares."""
    from megatron_powerflow.checkpoint import storage

    load = storage.load

    def without(checkpoint, trainable, groups):
        progress = load(checkpoint, trainable, groups)
        for part in storage._optimizer_parts(trainable):
            for values in part.optimizer.state.values():
                values["exp_avg"].zero_()
        return progress

    storage.load, storage._compare = without, lambda *_: None


def _replicas(subject: Subject) -> int:
    return subject.small.cp * subject.small.dp


FAULTS: dict[str, Fault] = {
    "tp: a product is not summed": Fault(lambda s: s.small.tp > 1, _partial_products),
    "tp: norm of one rank's shards": Fault(lambda s: s.small.tp > 1, _norm_of_shards),
    "tp: softmax over a part": Fault(lambda s: s.small.tp > 1, _own_vocabulary),
    "tp: parts in the wrong order": Fault(lambda s: s.small.tp > 1, _order_of_parts),
    "tp: sampler counts from 0": Fault(lambda s: s.small.tp > 1, _sampler_offset),
    "sp: norms' gradients not summed": Fault(lambda s: s.small.sequence_parallel, _norm_gradients),
    "sp: sequence's gradient summed": Fault(lambda s: s.small.sequence_parallel, _sequence_gradient),
    "dp: gradients not summed": Fault(lambda s: _replicas(s) > 1, _no_gradient_sum),
    "dp: gradients averaged": Fault(lambda s: _replicas(s) > 1, _gradient_mean),
    "dp: denominator of a replica": Fault(lambda s: s.small.dp > 1, _own_denominator),
    "dp: the same share for all": Fault(lambda s: s.small.dp > 1, _same_share),
    "dp: weights not gathered": Fault(
        lambda s: s.config.optimizer.distributed and _replicas(s) > 1, _no_parameter_gather
    ),
    "cp: pieces swapped": Fault(lambda s: s.small.cp > 1, _pieces_swapped),
    "cp: own tokens only": Fault(lambda s: s.small.cp > 1, _own_tokens),
    "cp: keys' gradients not summed": Fault(lambda s: s.small.cp > 1, _key_gradients),
    "packed: attention to the neighbour": Fault(
        lambda s: s.config.parallel.max_tokens_per_micro_batch is not None, _neighbour
    ),
    "pp: rows of the first stage": Fault(lambda s: s.small.pp > 1, _first_stage_rows),
    "pp: layers of another stage": Fault(lambda s: s.small.pp > 1, _other_layers),
    "pp: gradient stops at a stage between": Fault(lambda s: s.small.pp > 2, _gradient_stops),
    "pp: tied embeddings apart": Fault(
        lambda s: s.small.pp > 1 and s.model.architecture.tied_embeddings, _tied_gradients
    ),
    "ep: experts of another rank": Fault(lambda s: s.small.ep > 1, _other_experts),
    "ep: experts' gradients not summed": Fault(lambda s: 1 < s.small.ep < _replicas(s), _expert_replicas),
    "log Z': gradient counted twice": Fault(
        lambda s: s.config.objective.learns_log_z and s.small.tp * s.small.cp > 1, _head_counted
    ),
    "resume: moments lost": Fault(lambda s: True, _moments_lost),
}


def main(arguments: list[str]) -> int:
    from megatron_powerflow.prove import forks
    from megatron_powerflow.prove.job import Part, read_job

    parent = os.getppid()
    *planted, clean = arguments
    job = read_job(Path(clean))
    forks.import_all(job)
    code = forks.make(job, tuple(Part), parent)
    for item in planted if code == 0 else ():
        fault, _, folder = item.rpartition("=")
        with_fault = read_job(Path(folder))
        shutil.copytree(job.rollouts, with_fault.rollouts)
        shutil.copytree(job.seen(Part.ALONE), with_fault.seen(Part.ALONE))
        print(f"fault: {fault}", flush=True)
        here = os.getpid()
        pid = os.fork()
        if pid == 0:
            FAULTS[fault].plant()
            forks.make(with_fault, (Part.LAYOUT, Part.RESUMED), here)
            os._exit(0)
        os.waitpid(pid, 0)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
