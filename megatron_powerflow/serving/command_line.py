"""With which command does a vLLM server serve a run? `powerflow vllm-args CONFIG` prints it, `powerflow serve` runs it.

Everything that would change what is sampled is set: the dtype (vLLM turns fp32 into bf16 by default), log-probs of the
distribution that was sampled, no sampling defaults out of the model's folder, the longest text.

Left out: starting it (`supervisor.py`). Imports no torch.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_powerflow.config import Config
from megatron_powerflow.serving.answers import MODEL

PATHS = (str(Path(__file__).parent / "on_server"),)  # that a server's Python looks into beside its own
WORKER = "powerflow_on_server.Weights"
LOG_PROBS = "processed_logprobs"  # of the distribution that is sampled, at any temperature
SERVER = "vllm.entrypoints.openai.api_server"  # the command `vllm` is broken in builds for CPUs
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes that change weights
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
# Arguments that `command_of` gives; a second value for one of them would decide in silence.
OURS = (
    "--model",
    "--served-model-name",
    "--host",
    "--port",
    "--max-model-len",
    "--dtype",
    "--tensor-parallel-size",
    "--gpu-memory-utilization",
    "--logprobs-mode",
    "--generation-config",
    "--enable-scale-out",
    "--worker-extension-cls",
    "--weight-transfer-config",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--enable-sleep-mode",
    "--no-enable-sleep-mode",
    "--skip-tokenizer-init",
    "--config",
    "-tp",
)


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """A server's command. environment: variables beside those that are there."""

    arguments: tuple[str, ...]
    environment: dict[str, str]

    @property
    def text(self) -> str:
        """The command as a shell takes it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.arguments)])


def command_of(
    config: Config, model_folder: Path, *, port: int, host: str = "0.0.0.0", gpus: str | None = None
) -> ServerCommand:
    """Return the command of a server for a run.

    model_folder: config and tokenizer are read there, and weights, which the run's own replace before anything is
    sampled. gpus: the machine's that are its own, as CUDA_VISIBLE_DEVICES has them; None: whatever it finds.
    """
    rollout, servers = config.rollout, config.rollout.vllm
    dtype = servers.dtype or ("float32" if config.precision.dtype == "fp32" else "bfloat16")
    arguments = [
        servers.python or sys.executable,
        *("-m", SERVER),
        *("--model", str(model_folder)),
        *("--served-model-name", MODEL),
        *("--host", host, "--port", str(port)),
        *("--dtype", dtype),
        *("--max-model-len", str(rollout.max_prompt_tokens + rollout.max_response_tokens)),
        *("--tensor-parallel-size", str(servers.tp or 1)),
        *("--gpu-memory-utilization", f"{servers.memory or 0.9:g}"),
        *("--logprobs-mode", LOG_PROBS),
        *("--generation-config", "vllm"),
        "--enable-scale-out",
        "--enable-prefix-caching",
        *("--worker-extension-cls", WORKER),
        *("--weight-transfer-config", json.dumps({"backend": "powerflow"})),
        *(["--enable-sleep-mode"] if servers.sleeps else []),
        *(servers.arguments or ()),
    ]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(PATHS), "POWERFLOW_PORT": str(port)}
    return ServerCommand(tuple(arguments), environment | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus is not None else {}))


def argument_violations(arguments: Sequence[str]) -> list[str]:
    """Return what is wrong with rollout.vllm.arguments, a sentence each."""
    return [
        f"rollout.vllm.arguments holds {name}, which this program sets itself, as the run needs it; remove it"
        for name in dict.fromkeys(text.partition("=")[0] for text in arguments)
        if _is_ours(name)
    ]


def _is_ours(name: str) -> bool:
    """Whether vLLM takes it for one of OURS: underscores count as hyphens, a part as the whole, --a.b as a piece of
    --a."""
    plain = name.partition(".")[0].replace("_", "-")
    return plain in OURS or (len(plain) > len("--") and any(ours.startswith(plain) for ours in OURS))
