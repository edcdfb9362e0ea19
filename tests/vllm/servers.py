"""Real vLLM servers for a test, under `powerflow serve`, and the runs that they sample for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_powerflow.journal import read_journal
from megatron_powerflow.serving.announcements import read_announcements
from tests.conftest import REPOSITORY, run_cli
from tests.free_ports import free_port

START_SECONDS = 400.0
CPU_SERVER = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
# Compiling takes minutes. A seeded request whose prompt is prefilled in chunks ends vLLM 0.32 on CPU: its generator has
# no offset to go back to.
ARGUMENTS = ["--enforce-eager", "--no-enable-chunked-prefill"]
FAULTS = Path(__file__).parent / "faults"


class Job:
    """A run and its servers. A context: the servers end with it.

    fault_file: what is written into it is what servers that were started with `faulty=True` do wrong from then on
    (`faults/faulty_on_server.py`).
    """

    def __init__(self, folder: Path, model: Path, python: str) -> None:
        self.folder, self.model, self.python = folder, model, python
        self.run = folder / "run"
        self.fault_file = folder / "fault"
        self.fault_file.write_text("")
        self.prompts = folder / "prompts.jsonl"
        lines = [{"id": f"p{index}", "prompt_token_ids": [5 + index, 7, 9 + 2 * index, 11]} for index in range(24)]
        self.prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.port = free_port()
        self.settings: dict[str, Any] = {}  # dotted keys, of every config
        self._processes: dict[int, subprocess.Popen] = {}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            process.wait(120)

    def config(self, **changes: Any) -> Path:
        """Write the run's config, with changes by dotted keys, and return its path."""
        values: dict[str, Any] = {
            "model": {"hf_path": str(self.model)},
            "precision": {"dtype": "fp32"},
            "prompts": {"path": str(self.prompts)},
            "rollout": {
                "engine": "vllm",
                "prompts_per_step": 4,
                "responses_per_prompt": 4,
                "max_prompt_tokens": 16,
                "max_response_tokens": 24,
                "vllm": {"start": 1, "python": self.python, "arguments": ARGUMENTS, "port": self.port},
            },
            "objective": {"alpha": 2.0},
            "optimizer": {"lr": 1e-3},
            "parallel": {"micro_batch_size": 4},
            "checkpoint": {"interval": 0},
            "metrics": {"wandb": "off", "curves": False},
            "evaluation": {"samples": 0},
            "run": {"output_dir": str(self.run), "num_steps": 3, "export": False},
        }
        for key, value in (self.settings | changes).items():
            *above, name = key.split(".")
            section = values
            for part in above:
                section = section.setdefault(part, {})
            if value is None:
                section.pop(name, None)
            else:
                section[name] = value
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(values))  # JSON is YAML
        return path

    def serve(
        self,
        number: int = 0,
        *,
        model: Path | None = None,
        faulty: bool = False,
        raw_log_probs: bool = False,
        wait: bool = True,
    ) -> None:
        """Start `powerflow serve` for a server of the run, and wait until it answers.

        faulty: with `fault_file`. raw_log_probs: with vLLM's own default, which this program would not start.
        """
        config = self.config().rename(self.folder / f"serve_{number}.yaml")
        command = [sys.executable, "-m", "megatron_powerflow.cli", "serve", str(config)]
        command += ["--number", str(number), "--host", "127.0.0.1"]
        environment = {**os.environ, **CPU_SERVER}
        if model is not None:
            command.append(f"model.hf_path={model}")
        if faulty:
            environment |= {"POWERFLOW_TEST_FAULTS": str(FAULTS), "POWERFLOW_FAULT_FILE": str(self.fault_file)}
        if raw_log_probs:
            environment["POWERFLOW_TEST_RAW"] = "1"
        if faulty or raw_log_probs:
            command = [sys.executable, "-m", "tests.vllm.faulty_serve", *command[3:]]
        log = (self.folder / f"serve_{number}.log").open("wb")
        self._processes[number] = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY
        )
        if wait:
            self.wait_for(number)

    def wait_for(self, number: int, *, other_than: int | None = None) -> int:
        """Wait until a server has announced itself; return the number of its process. other_than: an older one."""
        began = time.monotonic()
        while True:
            found = read_announcements(self.run).get(f"127.0.0.1-{self.port + number}")
            if found is not None and found.pid != other_than:
                return found.pid
            process = self._processes[number]
            assert process.poll() is None, (self.folder / f"serve_{number}.log").read_text()
            assert time.monotonic() - began < START_SECONDS, self.log(number)[-3000:]
            time.sleep(0.5)

    def end(self, number: int) -> None:
        """End a server and what keeps it."""
        process = self._processes.pop(number)
        process.send_signal(signal.SIGTERM)
        process.wait(120)

    def log(self, number: int = 0) -> str:
        """What a server has printed."""
        return (self.run / "servers" / f"127.0.0.1-{self.port + number}.log").read_text(errors="replace")

    def url(self, number: int = 0) -> str:
        return f"http://127.0.0.1:{self.port + number}"

    def train(self, *overrides: str, num_processes: int = 1, timeout: float = 900, **changes: Any):
        """Run `powerflow train` to its end."""
        return run_cli("train", self.config(**changes), *overrides, num_processes=num_processes, timeout=timeout)

    def begin_training(self, **changes: Any) -> subprocess.Popen:
        """Start `powerflow train`, on one process."""
        command = [sys.executable, "-m", "megatron_powerflow.cli", "train", str(self.config(**changes))]
        log = (self.folder / "train.log").open("wb")
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY)

    def trained(self) -> str:
        """What `begin_training` has printed."""
        return (self.folder / "train.log").read_text(errors="replace")

    def metrics(self) -> list[dict[str, float]]:
        return read_journal(self.run / "metrics.jsonl").lines

    def ledger(self) -> str:
        """What `powerflow inspect` says; it must be content."""
        found = run_cli("inspect", self.run)
        assert found.returncode == 0, found.stderr
        return found.stdout
