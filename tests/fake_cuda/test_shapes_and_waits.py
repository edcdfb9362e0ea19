"""How many shapes does attention see while responses grow, and how often does the host wait for the GPU? cuDNN makes a
plan for each shape; once the host has waited, no kernel is queued."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.nn.functional as F

from tests.fake_cuda.runs import Case


@pytest.fixture
def key_lengths(monkeypatch):
    """The numbers of keys that torch's attention is called with, in order."""
    seen: list[int] = []
    attention = F.scaled_dot_product_attention

    def noting(query, key, *args, **kwargs):
        seen.append(key.shape[-2])
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    return seen


@pytest.mark.parametrize(
    ("step", "expected"),
    [(None, {128, 231}), (1, {37, 81, *range(82, 231)})],
    ids=["steps of 128", "as it was"],
)
def test_decoding_has_a_shape_for_every_128_positions(run_of, key_lengths, step, expected):
    """Without the steps it has one for every token. 231 is the most that a row can come to hold."""
    from megatron_powerflow.training.step import sampling_of_step

    with run_of(Case(prompt_tokens=(81, 37), response_tokens=150)) as run:
        if step is not None:
            run.session.engine._length_step = step
        run.session.engine.generate(run.plan.share_of(run.plan.prompts, 0), sampling_of_step(run.plan, 0))
    assert set(key_lengths) == expected


@pytest.mark.parametrize(("tp", "temperature"), [(1, 1.0), (2, 1.0), (2, 0.0)])
def test_the_host_waits_once_a_token(run_of, tp, temperature):
    from megatron_powerflow.training.step import sampling_of_step

    with run_of(Case("tensorwise", tp=tp, changes=(("rollout.temperature", temperature or 1.0),))) as run:
        sampling = replace(sampling_of_step(run.plan, 0), temperature=temperature)
        before = run.gpu.host_reads
        run.session.engine.generate(run.plan.share_of(run.plan.prompts, 0), sampling)
        assert run.gpu.host_reads - before == sampling.max_response_tokens


def test_in_the_passes_of_an_update_the_host_waits_for_nothing(run_of, monkeypatch):
    """It did: for the shape of `hidden[mask]` and its gradient, 4 times in each micro-batch, and for what the search
    for loops read back."""
    from megatron_powerflow.training import update

    reads: list[int] = []
    passes = update.run_forward_backward

    def counting(*args):
        before = run.gpu.host_reads
        out = passes(*args)
        reads.append(run.gpu.host_reads - before)
        return out

    monkeypatch.setattr(update, "run_forward_backward", counting)
    with run_of(Case("tensorwise", tp=2)) as run:
        run.step()
    assert reads == [0]
