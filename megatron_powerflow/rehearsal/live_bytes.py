"""How many bytes of tensors are alive, what was their peak, and what was sent over which group?

Works on any device, so that the bytes of a rehearsal (`meta`) can be compared with those of a real run (`cpu`).

Left out: what kernels allocate inside themselves, and what an allocator rounds up.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

c10d = torch.ops.c10d
# collectives of several tensors at once, and which argument is their group: torch's own tables leave them out
COALESCED = {
    c10d.reduce_scatter_tensor_coalesced_.default: 2,
    c10d.allgather_into_tensor_coalesced_.default: 2,
    c10d.allreduce_coalesced_.default: 1,
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """The collectives of a phase over one kind of group: how many, and the bytes of their tensors."""

    count: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PhaseBytes:
    """What a phase left alive, the most that was alive in it, and what was sent in it. Bytes.

    before: alive when it began. traffic: by the name of the group.
    """

    name: str
    before: int
    after: int
    peak: int
    traffic: Mapping[str, Traffic]

    @property
    def transient(self) -> int:
        """What the phase needed for a while, beyond what was there before it or is there after it."""
        return self.peak - max(self.before, self.after)


class LiveBytes(TorchDispatchMode):
    """Counts the storages on one type of device while it is active, and the collectives.

    group_names: of process groups, by which the traffic is told apart; the others come under their own names, and
    groups of one rank are left out.
    """

    def __init__(self, device_type: str, group_names: Mapping[str, str]) -> None:
        super().__init__()
        self._device_type, self._group_names = device_type, dict(group_names)
        self._alive: dict[int, tuple[int, weakref.ref]] = {}
        self.now = self._peak = 0
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.phases: list[PhaseBytes] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        if func in COALESCED:
            self._count(ProcessGroup.unbox(args[COALESCED[func]]), args)
        elif func in collective_ops and func not in sync_ops:
            self._count(CollectiveOp.get_process_group(func, args), args)
        return result

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record what happens while open as one phase."""
        before = self._peak = self.now
        self._counts.clear()
        yield
        traffic = {group: Traffic(*counts) for group, counts in self._counts.items()}
        self.phases.append(PhaseBytes(name, before, self.now, self._peak, traffic))

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device_type:
            return
        held: Tensor | torch.UntypedStorage
        if tensor.is_mkldnn:  # oneDNN's own memory: no storage, and one tensor for each
            held, key, num_bytes = tensor, id(tensor), torch.ops.mkldnn._nbytes(tensor)
        else:
            held = tensor.untyped_storage()
            key, num_bytes = held._cdata, held.nbytes()
        if key in self._alive:
            return
        self._alive[key] = num_bytes, weakref.ref(held, lambda _: self._drop(key))
        self.now += num_bytes
        self._peak = max(self._peak, self.now)

    def _drop(self, key: int) -> None:
        num_bytes, _ = self._alive.pop(key)
        self.now -= num_bytes

    def _count(self, group: dist.ProcessGroup, args: tuple) -> None:
        """Count a collective by the larger of its two sides: what goes in, or what comes out."""
        if dist.get_world_size(group) == 1:
            return
        counts = self._counts[self._group_names.get(group.group_name, group.group_name)]
        counts[0] += 1
        counts[1] += max(sum(leaf.nbytes for leaf in tree_iter(side) if isinstance(leaf, Tensor)) for side in args[:2])
