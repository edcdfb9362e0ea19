"""Sums are exact by default, and repeatable where that is asked for and the environment does not say otherwise."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_powerflow.parallel.device_sums import SWITCHES, determinism_violations
from tests.conftest import REPOSITORY

FLAGS = """
import json, os, sys
import torch
from megatron_powerflow.parallel.device_sums import SWITCHES, set_device_sums
torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 leaves it
torch.backends.cudnn.allow_tf32 = True
set_device_sums(deterministic=sys.argv[1] == "deterministic")
matmul = torch.backends.cuda.matmul
print(json.dumps({
    "tf32": [matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()],
    "halved": [matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction],
    "deterministic": torch.are_deterministic_algorithms_enabled(),
    "environment": [os.environ.get(switch.name) for switch in SWITCHES],
}))
"""


@pytest.mark.parametrize("kind", ["plain", "deterministic"])
def test_sums_are_exact_and_repeatable_where_that_is_asked_for(kind):
    done = subprocess.run(
        [sys.executable, "-c", FLAGS, kind], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    flags = json.loads(done.stdout)
    assert flags["tf32"] == [False, False, "highest"]
    assert flags["halved"] == [False, False]
    assert flags["deterministic"] == (kind == "deterministic")
    expected = [switch.values[0] for switch in SWITCHES] if kind == "deterministic" else [None] * len(SWITCHES)
    assert flags["environment"] == expected


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_an_environment_that_says_otherwise_is_refused_by_name(monkeypatch, switch):
    for other in SWITCHES:
        monkeypatch.delenv(other.name, raising=False)
    assert not determinism_violations()
    for value in switch.values:
        monkeypatch.setenv(switch.name, value)
        assert not determinism_violations()
    monkeypatch.setenv(switch.name, "1")
    (violation,) = determinism_violations()
    assert f"{switch.name}=1" in violation
    assert switch.values[0] in violation
