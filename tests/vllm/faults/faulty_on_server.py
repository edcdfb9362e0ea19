"""A server that does one thing wrong with the weights that it is sent: the thing that POWERFLOW_FAULT_FILE names.

tied_head    the output layer of tied embeddings keeps its packed copy, as vLLM 0.32 on CPUs does by itself
stale        nothing is loaded, and the server says that it was
dropped      a tensor is not loaded
transposed   a square tensor arrives transposed
"""

from __future__ import annotations

import os
from pathlib import Path

import powerflow_on_server
from powerflow_on_server import FolderTransferEngine, Weights, repack_tied_head

assert Weights

VICTIM = "model.layers.1.self_attn.o_proj.weight"


def fault() -> str:
    return Path(os.environ["POWERFLOW_FAULT_FILE"]).read_text().strip()


def repack(model) -> None:
    if fault() != "tied_head":
        repack_tied_head(model)


_read, _receive, _start, _finish = (
    powerflow_on_server.read,
    FolderTransferEngine.receive_weights,
    FolderTransferEngine.start_weight_update,
    FolderTransferEngine.finish_weight_update,
)


def noted(self, found):
    if fault() == "dropped":
        found = {name: entry for name, entry in found.items() if name != VICTIM}
    yield from _noted(self, found)


def read(entry):
    tensor = _read(entry)
    square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
    return tensor.T.contiguous() if square and fault() == "transposed" else tensor


def receive(self, update_info) -> None:
    if fault() != "stale":
        _receive(self, update_info)


def start(self) -> None:
    if fault() != "stale":
        _start(self)


def finish(self) -> None:
    if fault() != "stale":
        _finish(self)


_noted = FolderTransferEngine._noted
powerflow_on_server.repack_tied_head = repack
powerflow_on_server.read = read
FolderTransferEngine._noted = noted
FolderTransferEngine.receive_weights = receive
FolderTransferEngine.start_weight_update = start
FolderTransferEngine.finish_weight_update = finish
