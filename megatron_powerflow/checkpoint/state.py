"""What makes a run resumable? Everything that changes from step to step, and nothing else.

- `Trainable`: the weights and the optimizers' moments, sharded, saved through Megatron's dist_checkpointing;
- `RunProgress`: a few numbers, saved as JSON;
- `Proof`: what was saved, in three sums, to compare what is loaded with.

There is no generator state: every random number of a run is a function of (seed, step, ...), and the learning rate
is a function of the step. The reference is not saved either: it is the folder the run starts from.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_powerflow.checkpoint.folder import PROGRESS_NAME
from megatron_powerflow.errors import UserError
from megatron_powerflow.whole_files import ordinary

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

    from megatron_powerflow.model.log_z_head import LogZHead
    from megatron_powerflow.model.policy_model import PolicyModel

FORMAT = 2  # 1 had no proof


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


@dataclass(frozen=True, slots=True)
class Proof:
    """What a checkpoint's tensors are, whatever layout wrote or loads them: see `contents.py`.

    weights, masters, moments: 16 hexadecimal digits each; masters is empty where the optimizer moves the weights
    themselves. optimizer_step: of Adam. is_finite: every weight was.
    """

    weights: str
    masters: str
    moments: str
    optimizer_step: int
    is_finite: bool


def progress_text(progress: RunProgress, proof: Proof) -> str:
    """Return what progress.json says."""
    values = {"format": FORMAT, **progress.to_json(), "proof": asdict(proof)}
    return json.dumps(values, indent=2) + "\n"


def read_progress(checkpoint: Path) -> RunProgress:
    """progress.json of a checkpoint. Raises UserError when it is missing, damaged or of an unknown format."""
    return RunProgress.from_json(_read(checkpoint), str(checkpoint / PROGRESS_NAME))


def read_proof(checkpoint: Path) -> Proof | None:
    """The proof in progress.json; None in a checkpoint of format 1. Raises UserError when it is damaged."""
    values = _read(checkpoint)
    if values["format"] == 1:
        return None
    proof = values.get("proof")
    types = {"weights": str, "masters": str, "moments": str, "optimizer_step": int, "is_finite": bool}
    if not isinstance(proof, dict) or any(type(proof.get(name)) is not kind for name, kind in types.items()):
        raise UserError(f"{checkpoint / PROGRESS_NAME}: its proof is damaged; resume from another checkpoint")
    return Proof(**{name: proof[name] for name in types})


def _read(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / PROGRESS_NAME
    try:
        values = json.loads(ordinary(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is {checkpoint} a checkpoint of this program?") from None
    if not isinstance(values, dict) or type(values.get("format")) is not int or not 1 <= values["format"] <= FORMAT:
        raise UserError(f"{path}: not a progress file of format 1 to {FORMAT}")
    return values
