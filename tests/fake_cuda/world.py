"""What are the other ranks here? Copies of this one, which answer at once.

One process is rank r of n: torch's process groups have all n ranks, with any layout, and no message leaves the process.
What the others would send is what this rank would, at their place:

    sum                n times the value         maximum, minimum    the value
    gather             n copies                  broadcast, receive  no value (device.py), or 0 on the host
    shapes of stages   those of this stage's micro-batches, one after the other, from the stage before as from the next

The few functions that are replaced here, of torch.distributed and of this package's start, are those that look for
other processes. Left out: waiting, order, deadlocks, everything that goes wrong between ranks.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.fake_cuda.device import FakeGpu, on_gpu

# as they were before the first `World.install`
_new_group, _all_reduce = dist.new_group, dist.all_reduce


SENT = ("input_tensors", "inputs", "input_tensor", "input", "tensors")  # what the arguments are called


class World:
    """The n ranks that this process is one of. Called with each collective operation that reaches `FakeGpu`.

    traffic: (operation, ranks of its group) -> bytes that this rank hands over.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.traffic: Counter = Counter()
        self._stage_shapes: list[tuple[int, ...]] = []
        self._received: Counter = Counter()  # sender -> how many of them
        self._reduction = dist.ReduceOp.SUM  # of the all-reduce under way: the operation's own argument cannot be read

    def __call__(self, gpu: FakeGpu, func, args, kwargs):
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        name = func._schema.name.removeprefix("c10d::")
        group = ProcessGroup.unbox(given["process_group"])
        handled = getattr(self, name.strip("_"), None)
        assert handled is not None, f"torch.distributed's {name} has no stand-in in tests/fake_cuda/world.py"
        sent = next((given[argument] for argument in SENT if argument in given), None)  # None: a barrier
        self.traffic[name.strip("_"), group.size()] += sum(t.numel() * t.element_size() for t in _flat(sent))
        handled(gpu, given, group)
        work = FakeWork().boxed()
        return (args[0], work) if len(func._schema.returns) == 2 else work

    def allreduce(self, gpu, given, group) -> None:
        if self._reduction == dist.ReduceOp.SUM:
            for tensor in _flat(given["tensors"]):
                values = gpu.values(tensor) if on_gpu(tensor) else tensor
                if values is not None:
                    values.mul_(group.size())

    allreduce_coalesced = allreduce

    def allgather(self, gpu, given, group) -> None:
        for outputs, source in zip(given["output_tensors"], given["input_tensors"], strict=True):
            for output in outputs:
                _write(gpu, output, source)

    def allgather_base(self, gpu, given, group) -> None:
        output, source = given["output_tensor"], given["input_tensor"]
        assert output.numel() == source.numel() * group.size(), (output.shape, source.shape, group.size())
        _write(gpu, output.view(group.size(), -1), source.reshape(1, -1))

    def allgather_into_tensor_coalesced(self, gpu, given, group) -> None:
        for output, source in zip(given["outputs"], given["inputs"], strict=True):
            assert output.numel() == source.numel() * group.size(), (output.shape, source.shape, group.size())
            _write(gpu, output.view(group.size(), -1), source.reshape(1, -1))

    def reduce_scatter(self, gpu, given, group) -> None:
        for output, sources in zip(given["output_tensors"], given["input_tensors"], strict=True):
            assert output.shape == sources[group.rank()].shape, (output.shape, [part.shape for part in sources])
            _forget(gpu, output)

    def reduce_scatter_base(self, gpu, given, group) -> None:
        output, source = given["output_tensor"], given["input_tensor"]
        assert source.numel() == output.numel() * group.size(), (output.shape, source.shape, group.size())
        _forget(gpu, output)

    def reduce_scatter_tensor_coalesced(self, gpu, given, group) -> None:
        for output, source in zip(given["outputs"], given["inputs"], strict=True):
            assert source.numel() == output.numel() * group.size(), (output.shape, source.shape, group.size())
            _forget(gpu, output)

    def alltoall_base(self, gpu, given, group) -> None:
        _forget(gpu, given["output"])

    def broadcast(self, gpu, given, group) -> None:
        if given["root_rank"] != group.rank():
            for tensor in _flat(given["tensors"]):
                _forget(gpu, tensor)

    def recv(self, gpu, given, group) -> None:
        for tensor in _flat(given["tensors"]):
            _forget(gpu, tensor)
            if on_gpu(tensor) and tensor.dtype == torch.int64 and tensor.numel() == 3:  # Megatron's message of a shape
                _write(gpu, tensor, torch.tensor(self._stage_shapes[self._received[given["src"]]]))
                self._received[given["src"]] += 1

    def send(self, gpu, given, group) -> None:
        pass

    def barrier(self, gpu, given, group) -> None:
        pass

    def expect(self, shapes: list[tuple[int, ...]]) -> None:
        """Say which hidden states the stages send each other in the coming passes, one per micro-batch."""
        self._stage_shapes, self._received = shapes, Counter()

    def install(self) -> None:
        """Replace what looks for other processes, for the rest of this one."""
        from megatron_powerflow.model.stream import extent
        from megatron_powerflow.parallel import initialize
        from megatron_powerflow.training import forward_step

        run = getattr(forward_step._run, "of_the_product", forward_step._run)

        def run_expecting(chunks, batches, at_the_end, **schedule):
            config = getattr(chunks[0], "module", chunks[0]).config
            parts = config.context_parallel_size * (
                config.tensor_model_parallel_size if config.sequence_parallel else 1
            )
            extents = [extent(batch) for batch in batches]
            self.expect([(size.positions // parts, size.rows, config.hidden_size) for size in extents])
            return run(chunks, batches, at_the_end, **schedule)

        def new_group(*args, backend=None, timeout=None, pg_options=None, **kwargs):
            return _new_group(*args, backend="fake", **kwargs)

        @contextlib.contextmanager
        def connected(launch, backend: str) -> Iterator[None]:
            dist.init_process_group("fake", store=FakeStore(), rank=launch.rank, world_size=launch.world_size)
            yield

        def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
            self._reduction = op
            try:
                return _all_reduce(tensor, op, group, async_op)
            finally:
                self._reduction = dist.ReduceOp.SUM

        run_expecting.of_the_product = run
        forward_step._run = run_expecting
        dist.new_group = new_group
        dist.all_reduce = all_reduce
        dist.all_gather_object, dist.gather_object = _all_gather_object, _gather_object
        dist.broadcast_object_list, dist.scatter_object_list = _broadcast_object_list, _scatter_object_list
        initialize._connected = connected
        initialize.refuse_shared = lambda name, groups: None  # the ranks do share this process's GPU


def _all_gather_object(object_list: list, obj, group=None) -> None:
    object_list[:] = [obj] * len(object_list)


def _gather_object(obj, object_gather_list=None, dst=None, group=None, group_dst=None) -> None:
    if object_gather_list is not None:
        object_gather_list[:] = [obj] * len(object_gather_list)


def _broadcast_object_list(object_list, src=None, group=None, device=None, group_src=None) -> None:
    """Each rank has the objects that it would send."""


def _scatter_object_list(
    scatter_object_output_list, scatter_object_input_list=None, src=None, group=None, group_src=None
) -> None:
    assert scatter_object_input_list is not None, "another rank has the objects"
    scatter_object_output_list[0] = scatter_object_input_list[dist.get_rank(group)]


def _flat(tensors) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tensors) if isinstance(leaf, Tensor)]


def _write(gpu: FakeGpu, target: Tensor, source: Tensor) -> None:
    if on_gpu(target):
        gpu.copy(target, source.expand(target.shape))
    elif on_gpu(source):
        raise AssertionError("a collective from the GPU to the host")
    else:
        target.copy_(source)


def _forget(gpu: FakeGpu, target: Tensor) -> None:
    if on_gpu(target):
        gpu.forget(target)
    else:
        target.zero_()
