"""How do the tensors of all ranks come to the servers' workers? The main rank passes on what each stage gathers.

    stage 0, tensor-parallel rank 0 = main rank   gathers, packs, broadcasts
    the other ranks that hold gathered tensors    gather, pack, send to the main rank, one after the other
    the rest                                      take part in the gathers

The names are those of the converters (`hf/live_weights.py`). No rank holds more than one gathered tensor and one frame
at a time. Whatever becomes of the servers, every frame comes to the main rank: ranks that gather together stay in step.

Left out: the frames (`on_server/powerflow_weight_stream.py`), the group with the workers (`stream_group.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.live_weights import Chunk, hf_tensors
from megatron_powerflow.hf.shapes import expected_tensors
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.serving.on_server.powerflow_weight_files import checksum
from megatron_powerflow.serving.on_server.powerflow_weight_stream import (
    FRAME_BYTES,
    Frame,
    frames,
    put_frame,
    take_frame,
)
from megatron_powerflow.serving.weight_totals import Totals, gathered


class WeightSender:
    """Sends the weights of a run as they are."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        architecture: Architecture,
        family: Family,
        groups: Groups,
        *,
        frame_bytes: int = FRAME_BYTES,
    ) -> None:
        self._chunks, self._architecture, self._family = chunks, architecture, family
        self._groups, self._frame_bytes = groups, frame_bytes
        self.names = sorted(expected_tensors(architecture, family))

    def send(self, put: Callable[[Frame], None], beat: Callable[[], None]) -> Totals:
        """Send every tensor; return what was sent. Collective over the run.

        put: passes a frame on, and does not raise; called on the main rank alone. beat: shows that this rank lives.
        """
        groups = self._groups
        checksums: dict[str, str] = {}
        senders: list[bool] = [False] * groups.world_size
        dist.all_gather_object(senders, self._holds_tensors, group=groups.control)
        if groups.edp_rank == 0:  # also ranks that are given nothing: the gathers need them
            mine = frames(self._noted(checksums, beat), self._frame_bytes)
            if groups.is_main:
                for frame in mine:
                    put(frame)
            else:
                self._to_main(mine)
        if groups.is_main:
            for rank in range(1, groups.world_size):
                if senders[rank]:
                    self._pass_on(rank, put, beat)
        expected = expected_tensors(self._architecture, self._family)
        totals = gathered(checksums, 0, expected, groups)
        return Totals(totals.checksums, totals.whole_bytes, totals.whole_bytes)

    @property
    def _holds_tensors(self) -> bool:
        return self._groups.edp_rank == 0 and self._groups.tp_rank == 0

    def _noted(self, checksums: dict[str, str], beat: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in hf_tensors(self._chunks, self._architecture, self._family, self._groups):
            checksums[name] = checksum(tensor)
            beat()
            yield name, tensor

    def _to_main(self, mine: Iterator[Frame]) -> None:
        device = self._groups.device

        def put(tensor: Tensor) -> None:
            dist.send(tensor, 0)
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the payload is used again for the next frame

        for frame in mine:  # of a rank that holds no tensors: none
            put_frame(frame, put, device)
        if self._holds_tensors:
            put_frame(None, put, device)

    def _pass_on(self, rank: int, put: Callable[[Frame], None], beat: Callable[[], None]) -> None:
        def take(tensor: Tensor) -> None:
            dist.recv(tensor, rank)

        while (frame := take_frame(take, self._groups.device)) is not None:
            beat()
            put(frame)
