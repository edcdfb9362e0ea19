"""Memory of a GPU: torch's allocator is set up before torch is there, and asked between phases. (No GPU here.)"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_powerflow.parallel import device_memory, launch
from megatron_powerflow.parallel.device_memory import give_back
from megatron_powerflow.parallel.launch import ALLOCATOR, grow_segments
from tests.conftest import REPOSITORY

ORDER = """
import importlib.abc, os, sys
from megatron_powerflow.parallel.initialize import prepare_imports

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print([os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")])

assert "torch" not in sys.modules
sys.meta_path.insert(0, Watch())
prepare_imports()
assert "torch" in sys.modules
"""


def test_torch_is_imported_into_an_environment_that_lets_segments_grow():
    done = subprocess.run([sys.executable, "-c", ORDER], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == str(["expandable_segments:True"] * 2)


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_user_has_set_stays_alone(monkeypatch, name):
    for other in ALLOCATOR:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    grow_segments()
    assert {other: launch.os.environ.get(other) for other in ALLOCATOR} == dict.fromkeys(ALLOCATOR) | {
        name: "max_split_size_mb:512"
    }


def test_only_a_gpu_is_given_memory_back(monkeypatch):
    calls = []
    monkeypatch.setattr(device_memory.torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    give_back(torch.device("cpu"))
    assert calls == []
    give_back(torch.device("cuda", 0))
    assert calls == ["emptied"]
