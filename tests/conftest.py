"""Fixtures: real gloo ranks, the real small model, random small models of every family."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.gloo_workers import GlooWorkers
from tests.hub_server import serving
from tests.tiny_models import make_tiny_model

# One thread in this process and in each that a test starts, whatever the machine has: with another number of threads
# sums have another order, and runs that are compared bit for bit differ.
os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("shared_machine", deadline=None)  # a busy machine is no failure
settings.load_profile("shared_machine")

REPOSITORY = Path(__file__).parent.parent
SMOLLM2 = REPOSITORY / "models" / "SmolLM2-135M-Instruct"
# those that take minutes, the longest first
LONG_FILES = ("test_slurm", "test_run_local", "test_experts", "test_exact_optimum", "test_resume", "test_cpu_gloo")


def pytest_collection_modifyitems(items):
    """Long files first: begun last, one would run on alone while the other process has nothing left to do."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def gloo():
    """`gloo.run(4, function, ...)`: the function on four real gloo ranks."""
    workers = GlooWorkers()
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: fetched by the project's own tool when it is not there."""
    if not (SMOLLM2 / "model.safetensors").is_file():
        tool = REPOSITORY / "tools" / "fetch_example_model.py"
        subprocess.run([sys.executable, str(tool), "--out", str(SMOLLM2)], check=True)
    return SMOLLM2


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model("qwen2", tied=True, ...) -> folder of a random small model, made once per set of arguments."""
    made: dict[tuple, Path] = {}

    def make(family: str, **changes) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return make


@pytest.fixture
def record_property(record_property):
    """pytest's own, for numbers: what one of several test processes sends back is of Python's types."""
    return lambda name, value: record_property(name, float(value))


def run_cli(*arguments: str, num_processes: int = 1, timeout: float = 600, **popen) -> subprocess.CompletedProcess:
    """The real command line, in a process of its own or under torchrun."""
    if num_processes == 1:
        command = [sys.executable, "-m", "megatron_powerflow.cli"]
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [*launcher, str(num_processes), "-m", "megatron_powerflow.cli"]
    text = {"text": True, "errors": "replace"}  # whatever libraries of C++ print
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, timeout=timeout, cwd=REPOSITORY, **text, **popen
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, a cache of its own, and no token: what HF_ENDPOINT, HF_HUB_CACHE and so on would set."""
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
