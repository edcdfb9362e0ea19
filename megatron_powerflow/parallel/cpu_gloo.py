"""What lets the real Megatron-Core run on CPU over gloo? A list of shims, each of which changes one thing.

Megatron-Core assumes CUDA in a handful of places: a device literal here, a stream there. Each entry of
`SHIMS` answers one of them and says which upstream symbol it concerns, what happens without it and when
it can go. Nothing else in this project patches anything. `install` refuses to act when CUDA is there,
so a GPU run sees an untouched Megatron-Core.

Left out: choices that are plain configuration (unfused kernels, the local layer spec); those live in
`model/build.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shim:
    """One change to torch or Megatron-Core that a CPU run needs.

    upstream: the symbol that it concerns. symptom: what happens without it. removal: when it can go.
    `tests/distributed/test_cpu_gloo.py` fails once an entry is not needed.
    """

    name: str
    upstream: str
    symptom: str
    removal: str
    install: Callable[[], None]
    needed_below: tuple[int, int] | None = None  # first version of Megatron-Core that does without it; None: not yet


def install(*, leave_out: frozenset[str] = frozenset(), device: str = "cpu") -> None:
    """Make `import megatron.core` usable on this CPU. Call before the first such import.

    leave_out: names of entries to skip; for the test that proves each one necessary. device: where tensors are put that
    Megatron-Core puts on a GPU; `meta` for a rehearsal without numbers. Raises RuntimeError where CUDA is available,
    for there nothing may be patched, and ValueError for a name that no entry has.
    """
    global _device
    if torch.cuda.is_available():
        raise RuntimeError("cpu_gloo.install() was called on a machine with CUDA; it only serves CPU runs")
    unknown = leave_out - {shim.name for shim in SHIMS}
    if unknown:
        raise ValueError(f"no such shim: {sorted(unknown)}; known: {[shim.name for shim in SHIMS]}")
    if getattr(torch, _INSTALLED, False):
        return
    _device = device
    for shim in SHIMS:
        if shim.name not in leave_out:
            shim.install()
    setattr(torch, _INSTALLED, True)


_INSTALLED = "_megatron_powerflow_cpu_gloo"
_device = "cpu"  # of `install`
_FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros", "empty_like", "zeros_like")


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _put(owner: object, name: str, replacement: object) -> None:
    """Set an attribute; every patch is made here.

    The new value may be of another type: a device stands for an index, say.
    """
    setattr(owner, name, replacement)


def _compiler() -> None:
    def as_written(model=None, **_options):
        return model if model is not None else as_written

    _put(torch, "compile", as_written)


def _current_device() -> None:
    _put(torch.cuda, "current_device", lambda: torch.device(_device))


def _cuda_device_literals() -> None:
    # `with torch.device(...)` acts on a set of functions that torch fills at its first use. Filled after this, it would
    # miss the originals, and transformers would load models with rope left uninitialised. So: use it now.
    with torch.device("cpu"):
        torch.empty(0)

    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def wrapped(*args, **kwargs):
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _device
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False  # pinning needs a CUDA driver
            return factory(*args, **kwargs)

        return wrapped

    for name in _FACTORIES:
        _put(torch, name, on_cpu(getattr(torch, name)))


def _tensor_moves() -> None:
    original_to = torch.Tensor.to

    def to(self, *args, **kwargs):
        args = tuple(_device if _is_cuda(arg) else arg for arg in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _device
        return original_to(self, *args, **kwargs)

    _put(torch.Tensor, "to", to)
    _put(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)


def _tensor_type_names() -> None:
    original_type = torch.Tensor.type

    def type_(self, *args, **kwargs):
        answer = original_type(self, *args, **kwargs)
        return f"torch.cuda.{answer.rpartition('.')[2]}" if isinstance(answer, str) else answer

    _put(torch.Tensor, "type", type_)


def _rng_tracker() -> None:
    from megatron.core.tensor_parallel import random

    def get_state(device="cpu", clone=False, graph_safe=False):
        return torch.get_rng_state()

    def set_state(new_state, device=-1, graph_safe=False):
        torch.set_rng_state(new_state)

    _put(random, "_get_cuda_rng_state", get_state)
    _put(random, "_set_cuda_rng_state", set_state)
    _put(torch.cuda, "manual_seed", torch.manual_seed)
    _put(torch.cuda, "get_rng_state", lambda device="cpu": torch.get_rng_state())
    _put(torch.cuda, "set_rng_state", lambda new_state, device="cpu": torch.set_rng_state(new_state))


class _NullStream:
    """A stand-in for a CUDA stream or event, which does nothing: CPU work is in program order anyway."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def record_event(self) -> _NullStream:
        return _NullStream()

    def synchronize(self) -> None:
        pass


def _streams() -> None:
    for name in ("Stream", "Event"):
        _put(torch.cuda, name, _NullStream)
    _put(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("current_stream", "default_stream"):
        _put(torch.cuda, name, lambda device=None: _NullStream())
    _put(torch.Tensor, "record_stream", lambda self, stream: None)


def _synchronize() -> None:
    _put(torch.cuda, "synchronize", lambda device=None: None)


def _all_to_all_splits() -> None:
    import torch.distributed as dist

    original = dist.all_to_all_single

    def listed(sizes):
        return sizes.tolist() if torch.is_tensor(sizes) else sizes

    @functools.wraps(original)
    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, *args, **kwargs):
        return original(output, input, listed(output_split_sizes), listed(input_split_sizes), *args, **kwargs)

    _put(dist, "all_to_all_single", all_to_all_single)


def _uneven_shards() -> None:
    import torch.distributed as dist

    original_gather, original_scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(original_gather)
    def all_gather(tensor_list, tensor, group=None, async_op=False):
        sizes = [part.shape[0] if part.dim() else 1 for part in tensor_list]
        if len(set(sizes)) == 1:
            return original_gather(tensor_list, tensor, group, async_op)
        assert not async_op
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        everyone = [torch.empty_like(padded) for _ in sizes]
        original_gather(everyone, padded, group)
        for part, whole in zip(tensor_list, everyone, strict=True):
            part.copy_(whole[: part.shape[0]])
        return None

    @functools.wraps(original_scatter)
    def reduce_scatter(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
        sizes = [part.shape[0] if part.dim() else 1 for part in input_list]
        if len(set(sizes)) == 1:
            return original_scatter(output, input_list, op, group, async_op)
        assert not async_op
        whole = torch.cat(list(input_list))
        dist.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split(sizes)[dist.get_rank(group)])
        return None

    _put(dist, "all_gather", all_gather)
    _put(dist, "reduce_scatter", reduce_scatter)


def _te_general_gemm() -> None:
    from megatron.core.transformer.moe import moe_utils

    _put(moe_utils, "te_general_gemm", None)


def _latent_attention_without_te() -> None:
    from megatron.core.transformer import multi_latent_attention

    _put(multi_latent_attention, "HAVE_TE", False)


SHIMS: tuple[Shim, ...] = (
    Shim(
        "compiler",
        "torch.compile as a decorator of the fused kernels (megatron.core.jit), which a CPU run computes as written",
        "no error: decorating alone loads torch's compiler, 3 of the 8 seconds that each process takes to start",
        "torch.compile loads its compiler when a function is first called",
        _compiler,
    ),
    Shim(
        "current_device",
        "torch.cuda.current_device() as the device of an allocation, throughout megatron.core",
        "RuntimeError: Found no NVIDIA driver, at the first parameter or p2p buffer",
        "megatron.core takes its device from the process group or the parameters",
        _current_device,
    ),
    Shim(
        "cuda_device_literals",
        'device="cuda" and pin_memory=True in schedules, clip_grads, rope_utils',
        "AssertionError: Torch not compiled with CUDA enabled, in the first training step",
        "the literals are gone upstream",
        _cuda_device_literals,
    ),
    Shim(
        "tensor_moves",
        'Tensor.cuda() and Tensor.to("cuda") in the optimizers and dist_checkpointing',
        "AssertionError: Torch not compiled with CUDA enabled, when a checkpoint is saved or loaded",
        "the moves name the parameter's own device upstream",
        _tensor_moves,
    ),
    Shim(
        "tensor_type_names",
        "optimizer.clip_grads and Float16OptimizerWithFloat16Params compare Tensor.type() to torch.cuda.*",
        "AssertionError in clip_grad_by_total_norm_fp32",
        "the comparison is on dtype upstream",
        _tensor_type_names,
    ),
    Shim(
        "rng_tracker",
        "tensor_parallel.random: the CUDA RNG tracker behind model_parallel_cuda_manual_seed",
        "RuntimeError: Found no NVIDIA driver, when the seeds are set",
        "the tracker follows the device of the model",
        _rng_tracker,
    ),
    Shim(
        "streams",
        "torch.cuda.Stream, Event, stream(), current_stream() in the token dispatcher of a mixture of experts; in 0.19 "
        "also in DDP buffers and checkpoint writers",
        "RuntimeError: Found no NVIDIA driver, when MoEAlltoAllTokenDispatcher or DistributedDataParallel is made",
        "streams are only touched for CUDA tensors upstream",
        _streams,
    ),
    Shim(
        "synchronize",
        "torch.cuda.synchronize() in p2p_communication and in dist_checkpointing",
        "AssertionError: Torch not compiled with CUDA enabled, after a batched send/receive",
        "synchronisation is only asked for CUDA tensors upstream",
        _synchronize,
    ),
    Shim(
        "all_to_all_splits",
        "tensor_parallel.mappings._AllToAll hands its split sizes on as the token dispatcher has them: CPU tensors",
        "TypeError of all_to_all_single, which takes lists of int, in the first layer with ep > 1",
        "the dispatcher makes lists of the sizes upstream, as it makes NumPy arrays of those that were on a GPU",
        _all_to_all_splits,
    ),
    Shim(
        "uneven_shards",
        "tensor_parallel.mappings: all_gather and reduce_scatter of unequal shards, as the token dispatcher needs them "
        "with tp > 1 and ep > 1; NCCL can, gloo wants equal ones",
        "RuntimeError: ProcessGroupGloo::allgather: invalid tensor size, in the first layer with experts",
        "gloo takes unequal shards, or the dispatcher pads them",
        _uneven_shards,
    ),
    Shim(
        "te_general_gemm",
        "transformer.moe.moe_utils.te_general_gemm: read where Transformer Engine is absent, defined where it is not",
        "NameError in the router of a mixture of experts",
        "Megatron-Core 0.19, which defines it as None, is the oldest one supported",
        _te_general_gemm,
        needed_below=(0, 19),
    ),
    Shim(
        "latent_attention_without_te",
        "transformer.multi_latent_attention.HAVE_TE: True without Transformer Engine too, whose classes are mocks then",
        "TypeError of isinstance() when a layer with latent attention is built",
        "Megatron-Core 0.19, which asks whether Transformer Engine is there, is the oldest one supported",
        _latent_attention_without_te,
        needed_below=(0, 19),
    ),
)
