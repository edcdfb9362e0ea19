"""What is this machine, and what is missing on it? For `powerflow env`: lines to paste into an issue.

Left out: what a run needs of it (`training/plan.py` asks when it is planned).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib import metadata

import megatron_powerflow
from megatron_powerflow.parallel.launch import settings_that_count

PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "apex", "transformers", "tokenizers", "safetensors"),
    *("numpy", "scipy", "pydantic", "omegaconf", "wandb", "tensorboard", "matplotlib", "pyarrow", "vllm", "triton"),
)
# what is missing without it
USED_FOR = {
    "transformer-engine": "FP8, and Megatron's fused layers on GPUs",
    "matplotlib": "curves.png and reports",
    "pyarrow": "parquet files",
    "tensorboard": "metrics.tensorboard",
    "vllm": "serving an export",
}


def describe() -> list[str]:
    """Return what is installed and which devices there are, a line each. Imports torch, where it is installed."""
    lines = [
        f"megatron_powerflow {megatron_powerflow.__version__}",
        f"python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPU cores",
    ]
    for name in PACKAGES:
        version = _version(name)
        lines.append(f"{name} {version}" if version else f"{name} not installed" + _why(name))
    lines += _devices()
    lines += [f"{program} {'found' if shutil.which(program) else 'not found'}" for program in ("srun", "nvidia-smi")]
    return lines + [f"{name}={value}" for name, value in settings_that_count().items()]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(version unknown)" if importlib.util.find_spec(name.replace("-", "_")) else None


def _why(name: str) -> str:
    return f" (needed for {USED_FOR[name]})" if name in USED_FOR else ""


def _devices() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return ["no CUDA device: CPU processes over gloo"]
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"CUDA {torch.version.cuda}, device {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, "
        f"compute capability {device.major}.{device.minor}"
        for index, device in enumerate(devices)
    ]
