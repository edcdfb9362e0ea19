"""What must an engine be able to do? Draw responses from the policy's current weights.

One engine exists so far, in-process (`megatron_engine.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_powerflow.records import Prompt, Rollout, SamplingParams

# called with (responses finished, responses asked for) on this data-parallel rank, now and then
ProgressCallback = Callable[[int, int], None]


class Engine(Protocol):
    """An engine, which draws responses from the policy's current weights."""

    def generate(
        self, prompts: Sequence[tuple[int, Prompt]], sampling: SamplingParams, progress: ProgressCallback | None = None
    ) -> list[Rollout]:
        """Draw responses to the (slot, prompt) pairs of this sampler (`Groups.sampler_rank`).

        Returns responses_per_prompt rollouts for each pair, in the order of the pairs, then by response_index; the same
        list on every tensor- and pipeline-parallel rank of the replica. Collective over those ranks, and over the
        replicas that share experts, where one without prompts takes part with an empty list.
        """
        ...
