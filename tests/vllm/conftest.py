"""These tests have a command and an environment for the servers, bash tests/vllm/run.sh; elsewhere they are skipped.

VLLM_PYTHON names the interpreter of an environment with vLLM.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vllm.servers import Job

PYTHON = os.environ.get("VLLM_PYTHON")


class Elsewhere(pytest.Module):
    """A file of tests where there is no vLLM."""

    def collect(self):
        pytest.skip("needs an environment with vLLM: bash tests/vllm/run.sh", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return None if PYTHON is not None else Elsewhere.from_parent(parent, path=module_path)


# Heads of 64, which vLLM's attention on CPUs takes; three layers, so that pp=2 has unequal stages.
SIZES = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 3, "vocab_size": 320, "rope": None}


@pytest.fixture(scope="session")
def served_model(tiny_model) -> Path:
    """A random llama with tied embeddings, of a shape that vLLM serves."""
    return tiny_model("llama", scale=0.06, **SIZES)


@pytest.fixture
def job(tmp_path, served_model):
    """A run's folder and config, and the servers of it that a test starts; they end with the test."""
    assert PYTHON is not None
    with Job(tmp_path, served_model, PYTHON) as job:
        yield job


@pytest.fixture(scope="module")
def shared_job(tmp_path_factory, served_model):
    """As `job`, for tests that can share a server."""
    assert PYTHON is not None
    with Job(tmp_path_factory.mktemp("job"), served_model, PYTHON) as job:
        yield job
