"""What becomes of a run that is sent a signal? Real signals to real runs: exit codes, what is saved, how long it took.

    python -m benchmarks.endings [--launcher alone|torchrun|slurm] [--phase generating] [--signal TERM]

Each run pauses for some seconds in a phase of its second step (`paused_run.py`) and gets the signal then, once or
twice; its first step is saved. A line of a Markdown table for each. torchrun: two processes, the signal goes to
torchrun; slurm: a real SLURM of two nodes on this machine, the signal goes to the job's step.

Left out: what a rank's failure does (tests/distributed/test_failing_ranks.py).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PHASES = ("loading", "generating", "updating", "saving", "writing")
SIGNALS = ("TERM", "USR1", "INT")
LAUNCHERS = ("alone", "torchrun", "slurm")
TIMEOUT_SECONDS = 900.0
BETWEEN_SECONDS = 2.5  # of two signals
HEAD = (
    "| launcher | phase | signal | exit code | outcome | its code | checkpoint | s |\n|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Case:
    """One run. times: how often the signal is sent."""

    launcher: str
    phase: str
    signal: str
    times: int

    @property
    def name(self) -> str:
        return f"SIG{self.signal}" + (" twice" if self.times == 2 else "")


def write_config(folder: Path) -> Path:
    """A run of a random small model that would go on for ever."""
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
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
checkpoint: {{interval: 1, keep: 2}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 100000, output_dir: unused}}
"""
    )
    return config


class Started:
    """A run under one of the launchers. send: gives it the signal; wait: its exit code."""

    def __init__(self, case: Case, config: Path, folder: Path, cluster) -> None:
        self.mark, self.log = folder / "mark", folder / "log"
        program = [sys.executable, "-m"]
        if case.launcher == "torchrun":
            program += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            program += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m"]
        program += ["benchmarks.paused_run", case.phase, str(self.mark), "train", str(config)]
        program += [f"run.output_dir={folder / 'run'}", *([] if case.launcher == "alone" else ["parallel.tp=2"])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "600"
        self.send: Callable[[], object]
        if case.launcher == "slurm":
            environment |= cluster.environment
            program = ["srun", "--nodes=2", "--ntasks-per-node=1", f"--job-name=case{folder.name}", *program]
            self.send = lambda: cluster.run("scancel", f"--signal={case.signal}", f"--name=case{folder.name}")
        else:
            self.send = lambda: os.kill(self.process.pid, getattr(signal, f"SIG{case.signal}"))
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                program,
                cwd=REPOSITORY,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def wait_for_the_pause(self) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.mark.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(self.log.read_text(errors="replace"))
            time.sleep(0.05)

    def close(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def line_of(case: Case, config: Path, folder: Path, cluster) -> str:
    """Run one case; return its line of the table."""
    from megatron_powerflow.outcome import read_outcome

    started = Started(case, config, folder, cluster)
    try:
        started.wait_for_the_pause()
        time.sleep(0.5)  # every rank is there
        began = time.monotonic()
        for number in range(case.times):
            if number:
                time.sleep(BETWEEN_SECONDS)
            started.send()
        code = started.process.wait(timeout=TIMEOUT_SECONDS)
        seconds = time.monotonic() - began
    finally:
        started.close()
    latest, outcome = folder / "run" / "checkpoints" / "latest", read_outcome(folder / "run")
    saved = latest.read_text().strip() if latest.exists() else "none"
    told = f"{outcome.outcome} | {outcome.exit_code}" if outcome else "none | "
    return f"| {case.launcher} | {case.phase} | {case.name} | {code} | {told} | {saved} | {seconds:.0f} |"


@contextlib.contextmanager
def cluster_for(launchers: list[str], folder: Path) -> Iterator:
    if "slurm" not in launchers:
        yield None
        return
    from tests.distributed.slurm_cluster import SlurmCluster, why_not

    if reason := why_not():
        raise SystemExit(f"--launcher slurm: {reason}")
    with SlurmCluster(folder / "slurm") as cluster:
        yield cluster


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, known in (("launcher", LAUNCHERS), ("phase", PHASES), ("signal", SIGNALS)):
        parser.add_argument(f"--{name}", choices=known, action="append")
    parser.add_argument("--times", type=int, choices=(1, 2), action="append")
    asked = parser.parse_args()
    launchers = asked.launcher or list(LAUNCHERS)
    cases = itertools.product(launchers, asked.phase or PHASES, asked.signal or SIGNALS, asked.times or (1, 2))
    with tempfile.TemporaryDirectory() as name, cluster_for(launchers, Path(name)) as cluster:
        config = write_config(Path(name))
        print(HEAD, flush=True)
        for number, values in enumerate(cases):
            folder = Path(name) / str(number)
            folder.mkdir()
            print(line_of(Case(*values), config, folder, cluster), flush=True)


if __name__ == "__main__":
    main()
