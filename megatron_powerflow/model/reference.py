"""How is the frozen base model kept? As a second copy on the device, or swapped in from host memory.

Whoever scores uses both the same way: `with reference.weights() as chunks: score(chunks, ...)`. The reference is the
checkpoint that the run starts from; it is never trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from megatron_powerflow.model.policy_model import PolicyModel


class Reference(Protocol):
    """The frozen base model, however it is kept."""

    def weights(self) -> contextlib.AbstractContextManager[list[PolicyModel]]:
        """Give the chunks of this rank, which hold the base model's weights while the context lasts."""
        ...


class ResidentReference:
    """A second set of chunks on the device, which is the fastest way and takes twice the memory of the weights."""

    def __init__(self, chunks: Sequence[PolicyModel]) -> None:
        self._chunks = list(chunks)
        for chunk in self._chunks:
            chunk.eval().requires_grad_(False)

    @contextlib.contextmanager
    def weights(self) -> Iterator[list[PolicyModel]]:
        yield self._chunks


class SwapReference:
    """One set of weights on the device; the base model, and the policy while the base model is in, wait in host memory.

    It takes host memory for twice the rank's parameters. chunks: the policy's, which must hold the base weights when
    this is made.
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
            for parameter, policy, base in zip(self._parameters, self._policy, self._base, strict=True):
                policy.copy_(parameter)
                parameter.copy_(base, non_blocking=True)
        for chunk in self._chunks:
            chunk.eval()
        try:
            yield self._chunks
        finally:
            with torch.no_grad():
                for parameter, policy in zip(self._parameters, self._policy, strict=True):
                    parameter.copy_(policy, non_blocking=True)
            for chunk, was_training in zip(self._chunks, training, strict=True):
                chunk.train(was_training)
            if self._parameters[0].is_cuda:
                torch.cuda.synchronize()  # the host copies must not be overwritten while they are still read


def _host_copy(parameter: torch.Tensor) -> torch.Tensor:
    """Copy a parameter to host memory, pinned where the parameter is on CUDA."""
    copy = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
    return copy.copy_(parameter.detach())
