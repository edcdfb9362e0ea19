"""The benchmarks that run an engine, at tiny size: both sides write the same number of tokens, the whole step has the
loss and gradient norm of its plain counterpart. The speeds are not looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import conversion, rollout, short_responses, step

TEXTS = ("w5 w6 w7 w8", "w9", "w10 w11 w12")


def test_the_step_equals_the_plain_one(gloo, tiny_model):
    """`compare` refuses to time steps whose first loss and gradient norm differ."""
    sizes = {"texts": TEXTS, "num_responses": 4, "num_tokens": 5, "micro_batch_size": 3, "repetitions": 1}
    ((printed, ratio),) = gloo.run(1, step.compare, tiny_model("llama"), **sizes)
    assert "first step on the same rollouts: loss" in printed
    assert ratio > 0


def plain_gradient_is_wrong(model, **sizes):
    """`compare` with a plain step of another alpha."""
    from benchmarks import plain_step

    class Wrong(plain_step.PlainStep):
        def __init__(self, model, *, alpha, **settings):
            super().__init__(model, alpha=alpha + 0.01, **settings)

    right, plain_step.PlainStep = plain_step.PlainStep, Wrong
    try:
        step.compare(model, **sizes)
    except AssertionError as error:
        return str(error)
    finally:
        plain_step.PlainStep = right


def test_a_step_that_differs_is_refused(gloo, tiny_model):
    sizes = {"texts": TEXTS[:2], "num_responses": 2, "num_tokens": 5, "micro_batch_size": 4, "repetitions": 0}
    assert "first step's loss" in gloo.run(1, plain_gradient_is_wrong, tiny_model("llama"), **sizes)[0]


def test_both_sides_write_the_same_number_of_tokens(gloo, tiny_model):
    sizes = {"texts": TEXTS, "num_responses": 2, "num_tokens": 5, "repetitions": 1}
    (printed,) = gloo.run(1, rollout.compare, tiny_model("llama"), **sizes)
    assert "HF generate" in printed


def test_the_hosts_work_is_the_same_before_and_after():
    """Four real processes; a micro-batch with other bits is refused before anything is printed."""
    sizes = ["--rollouts", "128", "--replicas", "4", "--tokens", "30"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.host_scale", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    received = {line.split()[3]: float(line.split()[-1]) for line in done.stdout.splitlines()[1:]}
    assert received["share"] == 0 < received["after"] < received["before"]


@pytest.mark.slow
def test_the_conversion_benchmark_converts_both_ways(tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    printed, _ = conversion.compare(tmp_path / "work", sizes | {"num_key_value_heads": 4, "vocab_size": 300})
    assert printed.count("cp") >= 3
    assert "HF to Megatron" in printed
    assert not list((tmp_path / "work").iterdir())


def test_short_responses_have_one_loss_padded_and_packed(gloo):
    (found,) = gloo.run(1, short_responses.measure, 32, 4, 1)
    (padded_passes, _, padded_loss), (passes, _, loss) = found["padded"], found["default"]
    assert (padded_passes, passes) == (8, 1)
    assert loss == pytest.approx(padded_loss, rel=1e-5)
