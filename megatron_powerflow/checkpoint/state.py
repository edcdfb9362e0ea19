"""What makes a run resumable? Everything that changes from step to step, and nothing else.

- `Trainable`: the weights and the optimizers' moments, sharded, saved through Megatron's dist_checkpointing;
- `RunProgress`: a few numbers, saved as JSON.

There is no generator state: every random number of a run is a function of (seed, step, ...), and the learning rate
is a function of the step. The reference is not saved either: it is the folder the run starts from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megatron_powerflow.errors import UserError

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

    from megatron_powerflow.model.log_z_head import LogZHead
    from megatron_powerflow.model.policy_model import PolicyModel

FORMAT = 1


@dataclass(frozen=True)
class Trainable:
    """What an update moves on this rank.

    ddp_chunks wrap `chunks` and accumulate their gradients in fp32. head exists on the last stage of a run that learns
    log Z', and is None elsewhere; what it learns is all of its state.
    """

    chunks: list[PolicyModel]
    ddp_chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    head: LogZHead | None

    def zero_grad(self) -> None:
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.head is not None:
            self.head.zero_grad()


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a run is. step: steps done; position: prompts taken from the stream.

    skipped_in_a_row, num_skipped: steps whose numbers were not finite. wandb_run_id: one run, however often resumed.
    """

    step: int
    position: int
    skipped_in_a_row: int
    num_skipped: int
    wandb_run_id: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any], source: str) -> RunProgress:
        """Raises UserError when a field is missing or of another type: a damaged or foreign file."""
        types = {"step": int, "position": int, "skipped_in_a_row": int, "num_skipped": int, "wandb_run_id": str}
        wrong = [name for name, kind in types.items() if type(values.get(name)) is not kind]
        if wrong:
            raise UserError(f"{source}: {', '.join(wrong)} missing or damaged; resume from another checkpoint")
        return RunProgress(**{name: values[name] for name in types})
