"""What do torch.cuda, and tensors, answer where the GPU is the fake one? Every stand-in for torch, with its reason.

    torch.cuda     there are GPUs, of the kind that is asked for; streams and events do nothing
    Tensor         a tensor of the fake GPU says that it is on cuda:0, and goes there and back
    factories      C++ that looks for a CUDA device before any operation reaches `FakeGpu`
    modules        a parameter that moves to the GPU keeps what is written on it, as on CUDA

Nothing of Megatron-Core, Transformer Engine or this package is replaced here: see `world.py` and `kernels.py`.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from uuid import UUID

import torch
from torch import Tensor

from tests.fake_cuda.device import CPU, CUDA, META, on_gpu, shown_device

GIB = 2**30
TrueDevice = torch.device


@dataclass(frozen=True)
class Kind:
    """A kind of GPU."""

    name: str
    capability: tuple[int, int]
    gib: int
    multiprocessors: int = 132
    cuda: str = "13.0"


KINDS = {
    "h100": Kind("NVIDIA H100 80GB HBM3", (9, 0), 80),
    "b200": Kind("NVIDIA B200", (10, 0), 180, multiprocessors=148),
}


class NoStream:
    """A stream or an event that does nothing: all work is in order."""

    device = CUDA
    cuda_stream = 0
    priority = 0

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def record(self, stream=None) -> None:
        pass

    def record_event(self, event=None):
        return NoStream()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


def install(kind: Kind) -> None:
    """Make torch answer as on a machine with 8 GPUs of a kind, for the rest of this process."""
    _answers_of_cuda(kind)
    _tensors()
    _factories()
    _modules()


def _answers_of_cuda(kind: Kind) -> None:
    cuda = torch.cuda
    properties = SimpleNamespace(
        name=kind.name,
        major=kind.capability[0],
        minor=kind.capability[1],
        total_memory=kind.gib * GIB,
        multi_processor_count=kind.multiprocessors,
        uuid=UUID(int=0),
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block_optin=232448,
        L2_cache_size=50 * 2**20,
    )
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: kind.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: kind.capability,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (kind.gib * GIB, kind.gib * GIB),
        "current_stream": NoStream,
        "default_stream": NoStream,
        "Stream": NoStream,
        "Event": NoStream,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name in ("max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved"):
        answers[name] = lambda device=None: 0
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats", "_lazy_init"):
        answers[name] = lambda *args, **kwargs: None
    for name, answer in answers.items():
        for module in (cuda, cuda.random, cuda.memory):  # the latter two have imported some of the names
            if hasattr(module, name):
                setattr(module, name, answer)
    cuda.default_generators = tuple(
        torch.Generator() for _ in range(8)
    )  # their states are real: RNG trackers fork them
    torch.version.cuda = kind.cuda


def _tensors() -> None:
    to, type_ = Tensor.to, Tensor.type

    def moved(self, *args, **kwargs):
        args = tuple(_below(argument) for argument in args)
        if "device" in kwargs:
            kwargs["device"] = _below(kwargs["device"])
        return to(self, *args, **kwargs)

    def type_name(self, *args, **kwargs):
        answer = type_(self, *args, **kwargs)
        return f"torch.cuda.{_TYPES[self.dtype]}" if on_gpu(self) and not args and not kwargs else answer

    Tensor.device = property(shown_device)
    Tensor.is_cuda = property(lambda self: shown_device(self).type == "cuda")
    Tensor.is_meta = property(lambda self: shown_device(self).type == "meta")
    Tensor.get_device = lambda self: 0 if on_gpu(self) else -1
    Tensor.to = moved
    Tensor.cuda = lambda self, *args, **kwargs: moved(self, CUDA)
    Tensor.cpu = lambda self, *args, **kwargs: moved(self, CPU)
    Tensor.type = type_name
    Tensor.record_stream = lambda self, stream: None


_TYPES = {
    torch.float32: "FloatTensor",
    torch.float16: "HalfTensor",
    torch.bfloat16: "BFloat16Tensor",
    torch.float64: "DoubleTensor",
    torch.int64: "LongTensor",
    torch.int32: "IntTensor",
    torch.bool: "BoolTensor",
    torch.uint8: "ByteTensor",
}


def _below(value):
    """Return the meta device for a CUDA device however it is written, and anything else as it is."""
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return META
    if (isinstance(value, TrueDevice) and value.type == "cuda") or type(value) is int:
        return META
    return value


def _factories() -> None:
    """A number as a device, torch.device(0), asks C++ which accelerator that is. torch.tensor and its kin ask it for a
    guard of the device, and would make a meta tensor without the values."""
    torch.device = _Device
    for owner, names in ((torch, _FACTORIES), (Tensor, _OWN_FACTORIES)):
        for name in names:
            setattr(owner, name, _with_named_device(getattr(owner, name)))
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _host_first(getattr(torch, name)))
    Tensor.new_tensor = lambda self, data, dtype=None, device=None, **kwargs: torch.tensor(
        data, dtype=dtype or self.dtype, device=self.device if device is None else device, **kwargs
    )
    wrapper = Tensor._make_wrapper_subclass
    Tensor._make_wrapper_subclass = staticmethod(
        lambda cls, *args, device=None, **kwargs: wrapper(cls, *args, device=_below(device), **kwargs)
    )


class _Devices(type):
    def __call__(cls, *args, **kwargs):
        return CUDA if len(args) == 1 and type(args[0]) is int else TrueDevice(*args, **kwargs)

    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, TrueDevice)


class _Device(metaclass=_Devices):
    """torch.device, for which a number is a GPU's."""


_FACTORIES = (
    *("empty", "zeros", "ones", "full", "arange", "linspace", "eye", "empty_strided", "rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
)
_OWN_FACTORIES = ("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")


def _with_named_device(factory):
    @functools.wraps(factory)
    def made(*args, **kwargs):
        if type(kwargs.get("device")) is int:
            kwargs["device"] = CUDA
        return factory(*args, **kwargs)

    return made


def _host_first(factory):
    @functools.wraps(factory)
    def made(data, *args, device=None, requires_grad=False, **kwargs):
        kwargs.pop("pin_memory", None)  # needs a driver
        if on_gpu(data):
            return data if device is None else data.to(device)
        if device is None or _below(device) is not META:
            return factory(data, *args, device=device, requires_grad=requires_grad, **kwargs)
        return factory(data, *args, **kwargs).to(CUDA).requires_grad_(requires_grad)

    return made


def _modules() -> None:
    """`param.data = ...` cannot make a meta tensor of one on the host, so torch makes a new parameter there."""
    apply = torch.nn.Module._apply

    def keeping_marks(self, function, recurse=True):
        marks = {name: parameter.__dict__ for name, parameter in self._parameters.items() if parameter is not None}
        apply(self, function, recurse)
        for name, of_parameter in marks.items():
            self._parameters[name].__dict__.update(of_parameter)
        return self

    torch.nn.Module._apply = keeping_marks
