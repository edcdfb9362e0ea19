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
from powerflow_on_server import WeightReceiver, Weights, repack_tied_head

assert Weights

VICTIM = "model.layers.1.self_attn.o_proj.weight"


def fault() -> str:
    return Path(os.environ["POWERFLOW_FAULT_FILE"]).read_text().strip()


def repack(model) -> None:
    if fault() != "tied_head":
        repack_tied_head(model)


_noted, _receive, _start, _finish = (
    WeightReceiver._noted,
    WeightReceiver.receive_weights,
    WeightReceiver.start_weight_update,
    WeightReceiver.finish_weight_update,
)


def arriving(pairs):
    for name, tensor in pairs:
        square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
        if fault() == "transposed" and square:
            yield name, tensor.T.contiguous()
        elif fault() != "dropped" or name != VICTIM:
            yield name, tensor


def noted(self, pairs):
    yield from _noted(self, arriving(pairs))


def receive(self, update_info) -> None:
    if fault() != "stale":
        _receive(self, update_info)


def start(self) -> None:
    if fault() != "stale":
        _start(self)


def finish(self) -> None:
    if fault() != "stale":
        _finish(self)


powerflow_on_server.repack_tied_head = repack
WeightReceiver._noted = noted
WeightReceiver.receive_weights = receive
WeightReceiver.start_weight_update = start
WeightReceiver.finish_weight_update = finish
