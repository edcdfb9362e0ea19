"""benchmarks/log_prob_kernel.py at a tiny size: it runs, and the four implementations give the same numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_four_implementations_agree(dtype):
    sizes = ["--tokens=64", "--vocabulary=1000", "--hidden=32", f"--dtype={dtype}", "--no-scaling"]
    script = REPOSITORY / "benchmarks" / "log_prob_kernel.py"
    done = subprocess.run([sys.executable, str(script), *sizes], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("(a) full logits", "(b) Megatron-Core", "(c) TRL's formula", "ours"):
        assert any(line.startswith(name) for line in done.stdout.splitlines()), done.stdout
    assert "largest difference from (a)" in done.stdout
