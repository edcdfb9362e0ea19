"""Who moves the weights? Megatron's DDP and optimizer for the policy; the log Z' head takes steps of its own.

On GPUs with several replicas gradients are added up over them while the backward pass of the last micro-batch goes on,
bucket by bucket as these are complete. They are sums of sums: the loss carries 1 / rollouts of the global batch, and
nothing is scaled before or after, so the order does not matter beyond rounding. Only the last micro-batch of an update
may send them, which Megatron's schedules see to by `no_sync_func`; and each must reach every parameter, or a bucket is
never complete: a dummy does (`forward_step.empty_log_probs`).

Left out: gathering parameters during the next forward pass (`model/fused_kernels.py` says why).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_powerflow.checkpoint.state import Trainable
from megatron_powerflow.config import Config, OptimizerSection
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.precision import params_dtype
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.training.learning_rate import learning_rates


def build_trainable(chunks: Sequence[PolicyModel], head: LogZHead | None, config: Config, groups: Groups) -> Trainable:
    """Put DDP around the chunks, make their optimizer, and return both with the head.

    It takes the parameters as they are: load weights first.
    """
    section = config.optimizer
    transformer = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=section.distributed,
        overlap_grad_reduce=overlaps_sums(groups),
    )
    ddp_chunks = [
        DistributedDataParallel(transformer, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if ddp_config.overlap_grad_reduce:
        waits = [chunk.no_sync for chunk in ddp_chunks]
        transformer.no_sync_func = waits if len(waits) > 1 else waits[0]
    # the loss is a sum already divided by the rollouts of the global batch: gradients are added, never scaled
    transformer.finalize_model_grads_func = lambda model, num_tokens, **kw: finalize_model_grads(model, None, **kw)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            min_lr=section.min_lr or 0.0,
            weight_decay=section.weight_decay,
            adam_beta1=section.betas[0],
            adam_beta2=section.betas[1],
            adam_eps=section.eps,
            clip_grad=section.clip_grad,
            bf16=params_dtype(config.precision) is torch.bfloat16,
            params_dtype=params_dtype(config.precision),
            use_distributed_optimizer=section.distributed,
        ),
        ddp_chunks,
        use_gloo_process_groups=False,
    )
    return Trainable(list(chunks), ddp_chunks, optimizer, head)


def overlaps_sums(groups: Groups) -> bool:
    """Tell whether gradients are added up over replicas during the backward pass: on GPUs, where there are replicas.

    On CPUs a sum takes the cores that the backward pass computes on.
    """
    return groups.device.type == "cuda" and groups.dp_size * groups.cp_size > 1


def set_learning_rates(trainable: Trainable, section: OptimizerSection, step: int, num_steps: int) -> float:
    """Give the policy's optimizer and the head their rates for a step; return the policy's.

    step: counted from 0.
    """
    lr, log_z_lr = learning_rates(section, step, num_steps)
    for group in trainable.optimizer.param_groups:
        group["lr"] = lr
    if trainable.head is not None:
        assert log_z_lr is not None, "config_rules.py fills it in where log Z' is learned"
        trainable.head.rate = log_z_lr
    return lr


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """The outcome of one update of the weights.

    grad_norm: of the policy, before clipping, global. applied: False when something was not finite.
    """

    grad_norm: float
    applied: bool


def step_optimizers(
    trainable: Trainable, *, clip_grad: float, mean_weight: float, loss_is_finite: bool, groups: Groups
) -> OptimizerStep:
    """Apply the gradients, unless the loss or a gradient is not finite: then nothing moves, on any rank.

    clip_grad bounds the norm of the policy's gradient. The head's is not clipped: its norm grows with the width, and
    its step is a share of the residuals already. mean_weight: the mean of the loss's weight w m over the update's kept
    rollouts, global. loss_is_finite: the same on every rank. Collective over the run.
    """
    optimizer = trainable.optimizer
    overflow = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    head_norm = _reduce_head_gradients(trainable, groups)
    applied = not overflow and loss_is_finite and math.isfinite(grad_norm) and math.isfinite(head_norm)
    if applied:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            parameters = part.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, clip_grad, grad_norm)
        optimizer.step_with_ready_grads()
        if trainable.head is not None:
            trainable.head.step(mean_weight)
    return OptimizerStep(grad_norm, applied)


def _reduce_head_gradients(trainable: Trainable, groups: Groups) -> float:
    """Sum the head's gradients over dp, average them over tp and cp, and return their norm.

    Ranks of tp and cp computed the same. The norm is the same on every rank of a pipeline, 0 without a head, so that
    all ranks judge alike.
    """
    square = torch.zeros(1, dtype=torch.float64)
    if trainable.head is not None:
        for parameter in trainable.head.learned():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=groups.tp_dp)
            parameter.grad /= groups.tp_size * groups.cp_size
            square += parameter.grad.double().square().sum().cpu()
    dist.broadcast(square, src=dist.get_global_rank(groups.pp_control, groups.pp_size - 1), group=groups.pp_control)
    return float(square.sqrt())
