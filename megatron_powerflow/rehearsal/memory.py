"""What does each kind of rank need, by what it is for, and does it fit?

Left out: counting it (`phases.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_powerflow.rehearsal.live_bytes import PhaseBytes, Traffic

# Of a process that uses NCCL and Transformer Engine: CUDA context, communicators' buffers, cuBLAS and cuDNN workspaces,
# and what the allocator cannot use. An assumption: nothing of it is a tensor of ours.
OVERHEAD_BYTES = 5 * 2**30


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The bytes of one kind of rank. count: how many ranks of the run are of this kind.

    fp8_copies: FP8 weights that Transformer Engine keeps beside the bf16 ones; computed, not counted. loading: of host
    memory, that the slices of one parameter take as they are read.
    """

    name: str
    count: int
    phases: tuple[PhaseBytes, ...]
    gradients: int
    log_prob_kernel: int
    fp8_copies: int = 0
    loading: int = 0

    def phase(self, name: str) -> PhaseBytes:
        """Return a phase by its name."""
        return next(phase for phase in self.phases if phase.name == name)

    def _added(self, name: str) -> int:
        phase = self.phase(name)
        return phase.after - phase.before

    @property
    def parts(self) -> dict[str, int]:
        """What the rank's bytes are for: first what stays, then what a phase adds to it."""
        decoding = {}
        if any(phase.name == "decoding" for phase in self.phases):  # there is none where servers sample
            decoding = {
                "KV cache": self._added("KV cache") or self.phase("decoding").after - self.phase("KV cache").before,
                "prefill": self.phase("prefill").peak - self.phase("prefill").after,
                "decoding": self.phase("decoding").peak - self.phase("decoding").after,
            }
        return {
            "weights": self._added("weights"),
            "reference": self._added("reference"),
            "gradients": self.gradients,
            "optimizer": self._added("gradients, optimizer") - self.gradients,
            **({"fp8 copies": self.fp8_copies} if self.fp8_copies else {}),
            "activations": self.phase("update").peak - self.phase("update").before,
            "log-prob kernel": self.log_prob_kernel,
            **decoding,
            "optimizer step": self.phase("optimizer step").peak - self.phase("optimizer step").before,
        }

    @property
    def resting(self) -> int:
        """The bytes that stay between two steps: what a rank holds while servers on its GPU sample."""
        return self.phase("optimizer step").after + self.fp8_copies

    @property
    def peak(self) -> int:
        """The most bytes of tensors that are alive at a time in a step."""
        return max(phase.peak for phase in self.phases) + self.fp8_copies

    @property
    def peak_phase(self) -> str:
        """The phase in which that is."""
        return max(self.phases, key=lambda phase: phase.peak).name

    @property
    def needed(self) -> int:
        """What the GPU must have: the peak, and what is no tensor."""
        return self.peak + OVERHEAD_BYTES

    def traffic(self, phase: str) -> Mapping[str, Traffic]:
        """Return the collectives of a phase by group."""
        return self.phase(phase).traffic


def largest(ranks: Sequence[RankMemory]) -> RankMemory:
    """Return the kind of rank that needs the most."""
    return max(ranks, key=lambda rank: rank.peak)
