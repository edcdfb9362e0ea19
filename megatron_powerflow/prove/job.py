"""What do the processes of a proof know of it? A folder with fixed names in it, and a line of numbers.

    FOLDER/job.json                   sizes
    FOLDER/model, prompts.jsonl       what the small run starts from
    FOLDER/alone.yaml, layout.yaml    its config on one process, and under the layout
    FOLDER/rollouts                   drawn by the one process; both train on them
    FOLDER/run_alone, run_layout      run folders: checkpoints, the export
    FOLDER/seen/PART                  what each rank of a part has seen, its last phase, how it failed

Left out: what is seen (`seen.py`), the processes (`forks.py`). No torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from megatron_powerflow.training.staleness import SampledBy

JOB_NAME = "job.json"


class Part(StrEnum):
    """The parts of a proof, in their order; the processes of each are new ones.

    ALONE: one process draws the rollouts and makes all steps. LAYOUT: the layout makes the same steps, saves after
    `SAVED` of them, and exports. RESUMED: the layout goes on from that checkpoint.
    """

    ALONE = "alone"
    LAYOUT = "layout"
    RESUMED = "resumed"


SAVED = 2  # steps before the checkpoint


@dataclass(frozen=True, slots=True)
class Job:
    """folder: absolute. world_size: of the layout. sampled_by: who has drawn the rollouts, as far as the config
    says. patience: seconds without any rank's entering a phase until all are given up."""

    folder: Path
    world_size: int
    sampled_by: SampledBy
    patience: float

    def processes(self, part: Part) -> int:
        """Return the number of processes of a part."""
        return 1 if part is Part.ALONE else self.world_size

    def config_path(self, part: Part) -> Path:
        """Return the config of a part's run."""
        return self.folder / ("alone.yaml" if part is Part.ALONE else "layout.yaml")

    @property
    def rollouts(self) -> Path:
        """The folder of the rollouts that every part trains on."""
        return self.folder / "rollouts"

    def seen(self, part: Part) -> Path:
        """Return the folder of what the ranks of a part have seen."""
        return self.folder / "seen" / part.value

    def write(self) -> None:
        """Write FOLDER/job.json."""
        values = asdict(self) | {"folder": str(self.folder)}
        (self.folder / JOB_NAME).write_text(json.dumps(values), encoding="utf-8")


def read_job(folder: Path) -> Job:
    """Read FOLDER/job.json, which `Job.write` wrote."""
    values = json.loads((folder / JOB_NAME).read_text(encoding="utf-8"))
    return Job(**values | {"folder": Path(values["folder"]), "sampled_by": SampledBy(values["sampled_by"])})
