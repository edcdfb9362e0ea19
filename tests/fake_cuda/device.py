"""What is a GPU here? A device that has shapes and bytes and computes nothing.

Its tensors are torch's meta tensors, which say of themselves that they are on cuda:0. Shapes, dtypes, strides, views
and the backward pass are torch's own, on any build of torch, with a driver or without one. `FakeGpu` is the one place
that every operation passes:

    device     "cuda" becomes "meta" on the way in; tensors of the host among those of the GPU are refused, as on a GPU
    values     what comes from the host and is small (tokens, masks, lengths) keeps its values beside it, through every
               operation that has nothing else to go by: what the host reads of it, and shapes that depend on it, are
               the true ones
    the rest   has no values. A floating-point number of it that the host reads is 0, and a truth value is true. An
               integer is an error, `NoValue`, for shapes and places hang on integers; but the largest k of n numbers
               are taken to stand at places r, r + 1, ... of row r: experts are chosen evenly
    bytes      of all storages alive, and their peak

Left out: streams (all work is in order), the allocator's rounding and fragmentation, NaN, everything that a kernel may
do wrong. What torch.cuda and torch.Tensor are told to answer is in `patches.py`.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CUDA, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
INTEGER_BYTES, FLOAT_BYTES = 2**24, 2**16  # storages up to these sizes keep values
true_device = torch._C.TensorBase.device.__get__
aten = torch.ops.aten
PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# `target[mask] = number`, and that of its gradient: torch keeps the number on the host and fills by the mask
MASKED_FILLS = {
    aten.index_put_.default: aten.masked_fill_.Tensor,
    aten._index_put_impl_.default: aten.masked_fill_.Tensor,
    aten.index_put.default: aten.masked_fill.Tensor,
}
# operations whose result has a shape that depends on values
SHAPED_BY_VALUES = (
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
)
# operations whose result has values that hang on no other tensor's
FILLS = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
WITHOUT_VALUES = (
    "empty",
    "rand",
    "normal",
    "uniform",
    "bernoulli",
    "exponential",
    "geometric",
    "multinomial",
    "dropout",
)


class NoValue(RuntimeError):
    """The host, or a shape, asks for an integer that nobody computed."""


class DeviceMismatch(RuntimeError):
    """An operation has tensors of the host among those of the GPU, which CUDA refuses."""


class _Truth:
    """While open, tensors of the GPU say that they are meta tensors: for torch's own code."""

    depth = 0

    def __enter__(self) -> None:
        _Truth.depth += 1

    def __exit__(self, *error) -> None:
        _Truth.depth -= 1


def shown_device(tensor: Tensor) -> torch.device:
    """Return the device that a tensor says it is on."""
    device = true_device(tensor)
    return CUDA if device.type == "meta" and not _Truth.depth else device


def on_gpu(value) -> bool:
    """Tell whether this is a tensor of the fake GPU."""
    return isinstance(value, Tensor) and true_device(value).type == "meta"


def described(tensor: Tensor) -> str:
    """Return a tensor in words, such as `int64 [4, 7] on cuda`."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} on {'cuda' if on_gpu(tensor) else true_device(tensor)}"


class FakeGpu(TorchDispatchMode):
    """The GPU of this process, while the context is open.

    live_bytes, peak_bytes: of its storages. host_reads: how often the host had to wait for a value or a shape.
    collective: what stands for the other ranks; it is called with this, the operation of c10d and its arguments.
    """

    def __init__(self, collective=None) -> None:
        super().__init__()
        self.collective = collective
        self.live_bytes = self.peak_bytes = self.host_reads = 0
        self._sizes: dict[int, int] = {}  # storage -> bytes
        self._values: dict[int, Tensor] = {}  # storage -> its bytes, on the host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind not in PLAIN_TENSORS for kind in types):
            return NotImplemented  # Transformer Engine's quantized tensors: their parts come by themselves
        with _Truth():
            if func.namespace == "c10d":
                return self.collective(self, func, args, kwargs or {})
            return self._run(func, args, dict(kwargs or {}))

    # ----- one operation -----

    def _run(self, func, args, kwargs):
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # needs a driver
        if func is aten._pin_memory.default:
            return args[0]
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = META
        if func is aten.masked_select.default:
            func, args = aten.index.Tensor, (args[0], [args[1].expand(args[0].shape)])
        if func in MASKED_FILLS and _fills_by_mask(*args):
            mask, value = args[1][0], args[2]  # torch does so itself, and the host does not wait
            mask = mask[(...,) + (None,) * (args[0].dim() - mask.dim())]
            func, args = MASKED_FILLS[func], (args[0], mask, value.reshape(()))
        if func in INDEXING:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if not any(map(on_gpu, tensors)) and kwargs.get("device") != META:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self.to_host(args[0]).item()
        if func is aten.copy_.default:
            return self.copy(*args[:2])
        if func is aten._to_copy.default:
            return self._to_copy(*args, **kwargs)
        if func not in INDEXING and any(not on_gpu(tensor) and tensor.dim() for tensor in tensors):
            raise DeviceMismatch(f"{func} of {', '.join(map(described, tensors))}")
        return self._on_gpu(func, args, kwargs, tensors)

    def _on_gpu(self, func, args, kwargs, tensors):
        known = func in FILLS or all(not on_gpu(tensor) or self.values(tensor) is not None for tensor in tensors)
        known = known and not any(word in func.__name__ for word in WITHOUT_VALUES)
        if func in SHAPED_BY_VALUES:
            if not known:
                raise NoValue(
                    f"the shape of {func} hangs on values, and nobody computed those of "
                    f"{', '.join(map(described, tensors))}"
                )
            self.host_reads += 1
            return tree_map(self._sent, self._on_host(func, args, kwargs))
        flat, spec = tree_flatten((args, kwargs))
        flat = [
            torch.empty_like(x, device=META) if isinstance(x, Tensor) and not on_gpu(x) and x.dim() else x for x in flat
        ]
        meta_args, meta_kwargs = tree_unflatten(flat, spec)
        out = func(*meta_args, **meta_kwargs)
        written = _written(func, args, kwargs)
        made = [tensor for tensor in tree_flatten(out)[0] if on_gpu(tensor)]
        known = known and all(self._may_keep(tensor) for tensor in (*written, *made))
        if known and (written or any(self.values(tensor) is None for tensor in made)):
            truth = [leaf for leaf in tree_flatten(self._on_host(func, args, kwargs))[0] if isinstance(leaf, Tensor)]
            for tensor, values in zip(made, truth, strict=True):
                if self.values(tensor) is None:
                    self._keep(tensor, values)
        elif not known:
            for tensor in written:
                self.forget(tensor)
        for tensor in made:
            self._count(tensor)
        if func is aten.topk.default and not known:
            self._keep(out[1], _spread_evenly(tensors[0].shape[args[2] if len(args) > 2 else -1], out[1]))
        return out

    def _on_host(self, func, args, kwargs):
        """Run an operation on the values; what it writes into is the values of the tensors that it would write into."""
        args, kwargs = tree_map(self._host_side, (args, kwargs))
        if kwargs.get("device") == META:
            kwargs["device"] = CPU
        return func(*args, **kwargs)

    def _host_side(self, leaf):
        if not on_gpu(leaf):
            return leaf
        values = self.values(leaf)
        return (
            torch.empty(leaf.shape, dtype=leaf.dtype, device=CPU) if values is None else values
        )  # only FILLS have none

    def _without_masks(self, indices):
        """Replace each mask among the indices by the places where it is true."""
        found = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                mask = self.values(index) if on_gpu(index) else index
                if mask is None:
                    raise NoValue(f"a mask selects, {described(index)}, that nobody computed")
                self.host_reads += on_gpu(index)
                found += [self._sent(places) for places in mask.nonzero(as_tuple=True)]
            else:
                found.append(index)
        return found

    # ----- between host and GPU -----

    def copy(self, target: Tensor, source: Tensor) -> Tensor:
        """Copy to, from or within the GPU, and the values with it."""
        if not on_gpu(target):
            return target.copy_(self.to_host(source))
        target.copy_(source if on_gpu(source) else torch.empty_like(source, device=META))
        given = self.values(source) if on_gpu(source) else source
        values = self.values(target)
        if given is None:
            self.forget(target)
        elif values is not None:
            values.copy_(given)
        elif target.numel() * target.element_size() == target.untyped_storage().nbytes():
            self._keep(target, given.expand(target.shape))
        return target

    def _to_copy(self, source: Tensor, *, device=None, **kwargs) -> Tensor:
        device = None if device is None else torch.device(device)
        if not on_gpu(source):
            return self._sent(source, **kwargs)
        if device is not None and device.type == "cpu":
            return aten._to_copy.default(self.to_host(source), **kwargs)
        return self._on_gpu(aten._to_copy.default, (source,), kwargs, [source])

    def _sent(self, values: Tensor, **kwargs) -> Tensor:
        """Return host values on the GPU."""
        out = aten._to_copy.default(torch.empty_like(values, device=META), **kwargs)
        self._keep(out, values)
        self._count(out)
        return out

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return what the host reads of a tensor of the GPU."""
        self.host_reads += 1
        values = self.values(tensor)
        if values is not None:
            return values.clone()
        if not (tensor.dtype.is_floating_point or tensor.dtype == torch.bool):
            raise NoValue(f"the host reads {described(tensor)}, which nobody computed")
        known = torch.ones if tensor.dtype == torch.bool else torch.zeros
        return known(tensor.shape, dtype=tensor.dtype, device=CPU)

    # ----- values -----

    def values(self, tensor: Tensor) -> Tensor | None:
        """Return the values of a tensor of the GPU, as a view of the host's copy of its storage; None: it has none."""
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU)
        held = self._values.get(tensor.untyped_storage()._cdata)
        if held is None:
            return None
        return held.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def forget(self, tensor: Tensor) -> None:
        """Say that a tensor of the GPU, and all that share its storage, have no values."""
        self._values.pop(tensor.untyped_storage()._cdata, None)

    def _may_keep(self, tensor: Tensor) -> bool:
        size = tensor.untyped_storage().nbytes()
        bound = FLOAT_BYTES if tensor.dtype.is_floating_point else INTEGER_BYTES
        return size <= bound and size % tensor.element_size() == 0

    def _keep(self, tensor: Tensor, values: Tensor) -> None:
        """Give a tensor of the GPU, which has its storage to itself, these values, if they are small."""
        if self._may_keep(tensor) and tensor.numel():
            storage = tensor.untyped_storage()
            self._values[storage._cdata] = torch.zeros(storage.nbytes(), dtype=torch.uint8, device=CPU)
            self.values(tensor).copy_(values)

    # ----- bytes -----

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live_bytes += self._sizes[key]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)
        self._values.pop(key, None)


def _fills_by_mask(target: Tensor, indices, values: Tensor, accumulate: bool = False, *_) -> bool:
    """Tell whether `target[mask] = number` is asked for."""
    return len(indices) == 1 and indices[0].dtype == torch.bool and values.numel() == 1 and not accumulate


def _spread_evenly(size: int, places: Tensor) -> Tensor:
    """Return which k of `size` numbers are the largest in each row: [..., k], as `places` is."""
    rows = torch.arange(places.numel() // max(places.shape[-1], 1), device=CPU)
    chosen = rows[:, None] + torch.arange(places.shape[-1], device=CPU)
    return (chosen % size).view(places.shape)


def _written(func, args, kwargs) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_flatten(value)[0] if on_gpu(leaf)]
    return found
