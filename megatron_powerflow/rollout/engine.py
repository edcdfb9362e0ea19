"""What must an engine be able to do? Draw responses from the policy's current weights.

Two exist: in-process, with the live weights (`megatron_engine.py`), and over vLLM servers (`serving/engine.py`).
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

    def begin(self, prompts: Sequence[tuple[int, Prompt]], sampling: SamplingParams) -> None:
        """Draw responses that `generate` is asked for later, in the background, by the weights as they are now.

        Nothing, for an engine that cannot: `generate` draws them then. Collective, as `generate` is.
        """
        ...

    def new_weights(self, step: int) -> None:
        """Note that the policy's weights are now those after `step` steps."""
        ...

    def rest(self) -> None:
        """Give back what it holds of the trainer's devices, until the next `generate`. Collective."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last step, by name; they count on the main rank."""
        ...

    def show_life(self, beat: Callable[[], None], stop_asked: Callable[[], bool]) -> None:
        """Call `beat` now and then while it works, where no pass through the model shows that. stop_asked: whether the
        run was asked to stop, so that waiting for somebody else has no sense any more."""
        ...

    def close(self) -> None:
        """End what it does in the background."""
        ...
