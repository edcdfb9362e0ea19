"""How is the frozen base model kept? As a second copy on the device, or swapped in from host memory.

Both are used the same way, by whoever scores: `with reference.weights() as chunks: score(chunks, ...)`.
The reference is the checkpoint the run starts from; nothing here ever trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from megatron_powerflow.model.policy_model import PolicyModel


class Reference(Protocol):
    def weights(self) -> contextlib.AbstractContextManager[list[PolicyModel]]:
        """Chunks that hold the base model's weights while the context lasts."""
        ...


class ResidentReference:
    """A second set of chunks on the device: fastest, twice the weights."""

    def __init__(self, chunks: Sequence[PolicyModel]) -> None:
        self._chunks = list(chunks)
        for chunk in self._chunks:
            chunk.eval().requires_grad_(False)

    @contextlib.contextmanager
    def weights(self) -> Iterator[list[PolicyModel]]:
        yield self._chunks


class SwapReference:
    """One set of weights on the device; the base model and, while it is in, the policy wait in host memory.

    Host memory: twice the rank's parameters. Made from the policy's chunks while they hold the base weights.
    """

    def __init__(self, chunks: Sequence[PolicyModel]) -> None:
        self._chunks = list(chunks)
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._base = [_host_copy(parameter) for parameter in self._parameters]
        self._policy = [_host_copy(parameter) for parameter in self._parameters]

    @contextlib.contextmanager
    def weights(self) -> Iterator[list[PolicyModel]]:
        training = [chunk.training for chunk in self._chunks]
        with torch.no_grad():
            for parameter, held, base in zip(self._parameters, self._policy, self._base, strict=True):
                held.copy_(parameter)
                parameter.copy_(base, non_blocking=True)
        for chunk in self._chunks:
            chunk.eval()
        try:
            yield self._chunks
        finally:
            with torch.no_grad():
                for parameter, held in zip(self._parameters, self._policy, strict=True):
                    parameter.copy_(held, non_blocking=True)
            for chunk, was_training in zip(self._chunks, training, strict=True):
                chunk.train(was_training)
            if self._parameters[0].is_cuda:
                torch.cuda.synchronize()  # the host copies must not be overwritten while they are still read


def _host_copy(parameter: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
    return copy.copy_(parameter.detach())
