"""How do tensors travel from the trainer to the servers' workers, to the byte? As frames, over a process group.

    frame    [2] int64: bytes of the header, bytes of the payload
             header: JSON, a list of [name, dtype, shape]
             payload: the tensors' bytes, each from a multiple of 16 on
    end      [2] int64: 0, 0

Rank 0 of the group is the trainer's main rank, the others are workers. A group is made for one update. Its ranks find
each other by a TCPStore of the main rank: each says that it is there, and all wait for the main rank's word, so that
one that is missing costs the others nothing. On GPUs the group is NCCL's, elsewhere gloo's, which notices at once when
a rank ends; one that hangs is noticed by the time that a message may take.

Both sides read this file: the trainer as a part of the package, the server by its own name beside
`powerflow_on_server.py`. It imports torch, and nothing of `megatron_powerflow`.

vLLM 0.32 has a transport over NCCL of its own (vllm.distributed.weight_transfer.nccl_engine). Not used: its trainer's
end imports vLLM, its communicator is NCCL's alone and waits for ever, and `init` blocks until every worker is there.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIGNMENT = 16  # of a tensor within a payload
FRAME_BYTES = 2**28  # of a payload; a larger tensor is one of its own
END = 0
JOINED, WORD = "joined/{rank}", "word"  # keys of the store
GO, STOP = "go", "stop"
# What becomes of a NCCL group whose peer is gone. torch reads it as a group is made; otherwise it ends the process.
ON_NCCL_ERROR, ONLY_CLEAN_UP = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"


class Stopped(RuntimeError):
    """The trainer gave an update up before any tensor of it was sent: the layers are what they were."""


@dataclass(frozen=True)
class Place:
    """Where the ranks of a group meet. seconds: that a message may take, and the others may be waited for."""

    address: str
    port: int
    num_ranks: int
    seconds: float


@dataclass(frozen=True)
class Frame:
    """Some tensors. header: JSON. payload: [n] uint8."""

    header: bytes
    payload: Tensor


def frames(pairs: Iterable[tuple[str, Tensor]], frame_bytes: int = FRAME_BYTES) -> Iterator[Frame]:
    """Pack tensors into frames. Raises ValueError for a dtype that does not travel.

    pairs: name and tensor, all on one device. Each is copied as it comes, so that one of them and one payload are held
    at a time. A frame must be sent before the next one is asked for: its payload is used again.
    """
    buffer: Tensor | None = None
    entries: list[tuple[str, str, list[int]]] = []
    filled = 0
    for name, tensor in pairs:
        entry = (name, _name_of(name, tensor.dtype), list(tensor.shape))
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        size = data.numel()
        if entries and filled + size > frame_bytes:
            assert buffer is not None
            yield Frame(json.dumps(entries).encode(), buffer[:filled])
            entries, filled = [], 0
        if size > frame_bytes:
            yield Frame(json.dumps([entry]).encode(), data)
            continue
        if buffer is None:
            buffer = torch.empty(_padded(frame_bytes), dtype=torch.uint8, device=data.device)
        buffer[filled : filled + size] = data
        entries.append(entry)
        filled += _padded(size)
    if entries:
        assert buffer is not None
        yield Frame(json.dumps(entries).encode(), buffer[:filled])


def tensors_of(frame: Frame) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a frame, which are views of its payload. Raises ValueError where it is no frame."""
    try:
        listed = json.loads(frame.header)
        entries = [(str(name), DTYPES[dtype], tuple(map(int, shape))) for name, dtype, shape in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the header of a frame is not one: {type(error).__name__}: {error}") from None
    first, total = 0, frame.payload.numel()
    for name, dtype, shape in entries:
        size = torch.Size(shape).numel() * dtype.itemsize
        if first + size > total:
            raise ValueError(f"{name} ends at byte {first + size} of a payload of {total}")
        yield name, frame.payload[first : first + size].view(dtype).reshape(shape)
        first += _padded(size)


def put_frame(frame: Frame | None, put: Callable[[Tensor], None], device: torch.device) -> None:
    """Send a frame, or None for the end, by `put`, which takes a tensor on `device`."""
    if frame is None:
        put(torch.tensor([END, 0], device=device))
        return
    put(torch.tensor([len(frame.header), frame.payload.numel()], device=device))
    put(torch.frombuffer(bytearray(frame.header), dtype=torch.uint8).to(device))
    if frame.payload.numel():
        put(frame.payload.to(device))


def take_frame(take: Callable[[Tensor], None], device: torch.device) -> Frame | None:
    """Receive a frame by `take`, which fills a tensor on `device`; None at the end.

    Its memory is its own: a server's layers keep tensors of it until they have all of theirs.
    """
    sizes = torch.empty(2, dtype=torch.int64, device=device)
    take(sizes)
    header_bytes, payload_bytes = sizes.tolist()
    if header_bytes == END:
        return None
    header = torch.empty(header_bytes, dtype=torch.uint8, device=device)
    take(header)
    payload = torch.empty(payload_bytes, dtype=torch.uint8, device=device)
    if payload_bytes:
        take(payload)
    return Frame(header.cpu().numpy().tobytes(), payload)


class Group:
    """A process group of one update. Its messages go from rank 0 to all."""

    def __init__(self, group: Any, store: dist.Store, seconds: float) -> None:
        self._group: Any = group  # of gloo or NCCL, whose methods torch's stubs leave out; None once closed
        self._store, self._seconds = store, timedelta(seconds=seconds)  # the store lives as long as the group

    def broadcast(self, tensor: Tensor) -> None:
        """Send a tensor of rank 0, or fill one elsewhere. Raises RuntimeError where a rank is gone or hangs."""
        assert self._group is not None
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        # with a time NCCL's wait blocks until the message is through, too
        self._group.broadcast([tensor], options).wait(self._seconds)

    def close(self) -> None:
        """End the group: whoever waits in it for this rank fails at once."""
        group, self._group = self._group, None
        if group is not None and not isinstance(group, dist.ProcessGroupGloo):
            group.abort()  # gloo's ends as nothing refers to it any more


def join(store: dist.Store, place: Place, rank: int, device: torch.device) -> Group:
    """Make this rank's end of a group, once the main rank has said so. Raises RuntimeError where none comes to be.

    store: of `place`. device: where the tensors are; decides between NCCL and gloo.
    """
    own = dist.PrefixStore("group", store)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        # Two waits: ours, then torch's own watch, which must not come first: it would only end what we report.
        options._timeout = timedelta(seconds=2 * place.seconds)
        with _environment(ON_NCCL_ERROR, ONLY_CLEAN_UP):
            return Group(dist.ProcessGroupNCCL(own, rank, place.num_ranks, options), store, place.seconds)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(place.address))]
    options._timeout = timedelta(seconds=place.seconds)
    return Group(dist.ProcessGroupGloo(own, rank, place.num_ranks, options), store, place.seconds)


def join_as_worker(place: Place, rank: int, device: torch.device) -> Group:
    """Say that this worker is there, wait for the main rank's word, and join.

    Raises Stopped where the word is that this update is none, RuntimeError where no word comes.
    """
    seconds = timedelta(seconds=2 * place.seconds)  # longer than the main rank waits for workers that do not come
    store = dist.TCPStore(place.address, place.port, None, False, timeout=seconds, wait_for_workers=False)
    store.set(JOINED.format(rank=rank), "")
    if store.get(WORD).decode() != GO:
        raise Stopped("another server was missing, or the trainer gave the update up; it may try again")
    return join(store, place, rank, device)


def receive(group: Group, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an update as they come. Raises RuntimeError, ValueError where it breaks off."""
    while (frame := take_frame(group.broadcast, device)) is not None:
        yield from tensors_of(frame)


def own_address(other: str) -> str:
    """Return the address under which a host reaches this machine. Sends nothing. Raises OSError without a route."""
    family, _, _, _, address = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # of datagrams: the route is looked up, and no packet leaves
        return probe.getsockname()[0]


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _name_of(name: str, dtype: torch.dtype) -> str:
    text = str(dtype).removeprefix("torch.")
    if text not in DTYPES:
        raise ValueError(f"{name} is {text}; only {', '.join(DTYPES)} travel")
    return text


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for what is called within: torch has no argument for it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
