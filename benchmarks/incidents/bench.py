"""What do all incidents share? A local SLURM of three nodes, a small run over two of them, and one that nothing befell.

A run of a random small model: 2 stages, one rank on each of two nodes, fp32, gloo, a checkpoint after each step.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.incidents.job import Job

NUM_STEPS = 24
HANG_SECONDS = 20
PREFLIGHT_SECONDS = 40
# A partition whose jobs put those of the others back into the queue, with a word before; nodes that are silent for half
# a minute are lost.
SLURM_SETTINGS = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=low Nodes=n1,n2,n3 PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n1,n2,n3 PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
SlurmdTimeout=30
InactiveLimit=0
"""


@dataclass(frozen=True)
class Verdict:
    """One incident. saw: lines of the job's log; exit_code: of the job; steps_lost: that were done and done again.

    differs: from the run that nothing befell, () for bit-equal; None where there is no run to compare. promised: is all
    of it what the documentation says?
    """

    incident: str
    happened: str
    saw: tuple[str, ...]
    state: str
    exit_code: int
    restarts: int
    excluded: str
    steps_lost: int | None
    differs: tuple[str, ...] | None
    seconds: float
    promised: bool

    def line(self) -> str:
        """A line of a Markdown table."""
        kept_out = "" if self.excluded in ("", "(null)") else f", without {self.excluded}"
        queue = f"{self.restarts} x requeued{kept_out}" if self.restarts else "not requeued"
        end = {None: "no run", (): "bit-equal"}.get(self.differs, f"differs: {'; '.join(self.differs or ())[:80]}")
        lost = "" if self.steps_lost is None else self.steps_lost
        saw = "; ".join(self.saw).replace("|", "/")
        verdict = "as promised" if self.promised else "NOT AS PROMISED"
        cells = (self.incident, self.happened, saw, queue, f"{self.state}, {self.exit_code}", lost, end)
        return f"| {' | '.join(map(str, cells))} | {self.seconds:.0f} | {verdict} |"

    def to_json(self) -> dict:
        return asdict(self)


HEAD = (
    "| incident | what happened | what the user reads | queue | end, exit code | steps lost | against an undisturbed "
    "run | s | verdict |\n|---|---|---|---|---|---|---|---|---|"
)


class Bench:
    """The cluster and the undisturbed run. folder: of everything that is written."""

    def __init__(self, cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        cluster.environment["OMP_NUM_THREADS"] = "1"  # ranks share this machine's cores
        self.config = write_config(folder)
        self.whole: dict[int, Path] = {}  # undisturbed runs, by their number of steps

    def submit(
        self, name: str, *options: str, settings: tuple[str, ...] = (), run: Path | None = None, script="run_70b.sh"
    ) -> Job:
        """Submit the run with the real script. options: of sbatch, and those of the script behind "--"."""
        where = self.folder / name
        run = run or where / "run"
        of_sbatch, of_script = list(options), ["--preflight", str(PREFLIGHT_SECONDS)]
        if "--" in of_sbatch:
            place = of_sbatch.index("--")
            of_sbatch, of_script = of_sbatch[:place], [*of_script, *of_sbatch[place + 1 :]]
        arguments = [*of_script, "--recipe", str(self.config), f"run.output_dir={run}", *settings]
        nodes = ["--nodes=2"] if script == "run_70b.sh" else []
        return Job(self.cluster, where, run, script, arguments, *nodes, *of_sbatch)

    def undisturbed(self, num_steps: int = NUM_STEPS) -> Path:
        """Return the run that others of so many steps are compared with; it is made once. Raises RuntimeError."""
        if num_steps not in self.whole:
            job = self.submit(f"whole_{num_steps}", settings=(f"run.num_steps={num_steps}",))
            if (state := job.finish()) != "COMPLETED":
                raise RuntimeError(f"the undisturbed run is {state}:\n{job.said}")
            self.whole[num_steps] = job.run
        return self.whole[num_steps]

    def steps_in(self, seconds: float) -> int:
        """Return how many steps take so long at least on this machine, by the quickest of the undisturbed run."""
        lines = (self.undisturbed() / "metrics.jsonl").read_text().splitlines()
        return math.ceil(seconds / min(json.loads(line)["step_seconds"] for line in lines))

    def verdict(
        self,
        incident: str,
        happened: str,
        job: Job,
        state: str,
        *patterns: str,
        exit_code: int = 0,
        restarts: bool | None = True,
        most_lost: int = 2,
        excluded: str = "(null)",
        num_steps: int | None = NUM_STEPS,
    ) -> Verdict:
        """Hold what became of a job against what is promised: words in its log, exit code, queue, steps, state.

        restarts: whether it goes back into the queue; None: either. num_steps: of the undisturbed run to compare with;
        None where there is none.
        """
        from tests.kill_storm.run import differences

        saw = tuple(filter(None, (job.line(pattern) for pattern in patterns)))
        differs = None
        if num_steps and state == "COMPLETED":
            differs = tuple(differences(self.undisturbed(num_steps), job.run))
        code = int(job.field("ExitCode").partition(":")[0])
        lost, count, kept_out = lost_steps(job.run), int(job.field("Restarts")), job.field("ExcNodeList")
        promised = (
            len(saw) == len(patterns)
            and (code, kept_out) == (exit_code, excluded)
            and (state == "COMPLETED") == (exit_code == 0)
            and restarts in (None, count > 0)
            and (lost or 0) <= most_lost
            and (num_steps is None or differs == ())
        )
        shown = tuple(re.sub(r"/\S*/", ".../", text)[:200] for text in saw)
        return Verdict(incident, happened, shown, state, code, count, kept_out, lost, differs, job.seconds, promised)


def lost_steps(run: Path) -> int | None:
    """As `powerflow goodput` counts them; None without a run."""
    from megatron_powerflow.report.goodput_table import goodput_json, read_all

    if not (run / "events.jsonl").exists():
        return None
    return goodput_json(read_all({run: False}, [])[run])["num_steps_lost"]


def write_config(folder: Path) -> Path:
    """The run's config, its prompts and its model."""
    from tests.tiny_models import make_tiny_model

    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [5 + i, 6, 7]}) + "\n" for i in range(7)))
    (folder / "model").mkdir()
    config = folder / "config.yaml"
    config.write_text(
        f"""
model: {{hf_path: {make_tiny_model(folder / "model", "llama")}}}
precision: {{dtype: fp32}}
prompts: {{path: {prompts}}}
objective: {{alpha: 2, log_z: mlp}}
optimizer: {{lr: 1e-3}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 12}}
parallel: {{pp: 2, micro_batch_size: 2}}
checkpoint: {{interval: 1, keep: 2}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 1}}
run: {{num_steps: {NUM_STEPS}, output_dir: unused, hang_seconds: {HANG_SECONDS}}}
"""
    )
    return config
