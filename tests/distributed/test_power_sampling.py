"""`powerflow generate --decoding power_sampling` samples p_base^alpha: an enumerable model, and every layout.

The model has 781 responses (`tests/enumerable.py`); its seed is one whose p^alpha is far from temperature
1/alpha at every alpha tried, and within reach of 10 moves. Total variation is against the enumeration by transformers
in fp64, beside what as many exact samples would have (the noise of counting) and what temperature 1/alpha has.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.enumerable import EOS, MAX_TOKENS, RESPONSES, log_probs_of, make_enumerable

RANK_OF = {tuple(response): i for i, response in enumerate(RESPONSES)}


def power_sample(
    model: str, prompts: str, out: str, overrides: tuple, num_responses: int, alpha: float, blocks: int, moves: int
) -> None:
    """What `powerflow generate --decoding power_sampling` does, on this rank."""
    from megatron_powerflow.commands.open_model import open_model
    from megatron_powerflow.commands.power_sampling import POWER_SAMPLING_KEYS, power_sample_file
    from megatron_powerflow.console import make_console
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.rollout.power_sampling import PowerSampling

    launch = read_launch()
    opened = open_model(Path(model), overrides, POWER_SAMPLING_KEYS, launch.world_size)
    recipe = PowerSampling(alpha, blocks, moves)
    console = make_console(io.StringIO())
    power_sample_file(opened, Path(prompts), Path(out), num_responses, recipe, launch, console)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def enumerable(tmp_path_factory) -> tuple[Path, Path]:
    """(model folder, prompts file)."""
    return make_enumerable(tmp_path_factory.mktemp("power"), scale=0.2, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alpha", "num_chains"),
    [
        pytest.param(alpha, num_chains, marks=pytest.mark.long)
        for alpha, num_chains in ((0.5, 4000), (2.0, 6000), (4.0, 6000))
    ],
)
def test_samples_follow_the_power_distribution(gloo, enumerable, tmp_path, record_property, alpha, num_chains):
    model, prompts = enumerable
    out = tmp_path / "samples.jsonl"
    settings = (
        "rollout.max_prompt_tokens=8",
        f"rollout.max_response_tokens={MAX_TOKENS}",
        "rollout.max_concurrent_rows=3000",
        "parallel.micro_batch_size=2000",
    )
    gloo.run(1, power_sample, str(model), str(prompts), str(out), settings, num_chains, alpha, 2, 10)
    lines = lines_of(out)
    assert len(lines) == num_chains
    counts = Counter(tuple(line["response_token_ids"]) for line in lines)
    frequencies = np.array([counts[response] for response in RANK_OF]) / num_chains

    base = log_probs_of(model, 1.0)
    power = np.exp(alpha * base - (alpha * base).max())
    target = power / power.sum()
    exact = np.random.default_rng(0).multinomial(num_chains, target, size=20) / num_chains
    noise = 0.5 * np.abs(exact - target).sum(axis=1).mean()
    of_temperature = 0.5 * np.abs(np.exp(log_probs_of(model, 1 / alpha)) - target).sum()
    distance = 0.5 * np.abs(frequencies - target).sum()
    accepted = np.mean([line["num_accepted"] / line["num_moves"] for line in lines])
    record_property("total_variation", distance)
    record_property("total_variation_of_exact_samples", noise)
    record_property("total_variation_of_temperature", of_temperature)
    print(
        f"alpha {alpha}: TV {distance:.4f}; {num_chains} exact samples {noise:.4f}; temperature 1/alpha "
        f"{of_temperature:.3f}; {accepted:.0%} accepted"
    )
    assert of_temperature > 0.2  # there was something to correct
    assert distance <= noise + 0.02
    if alpha > 1:  # below, p^alpha is so flat that the noise alone is more
        assert distance <= 0.05
    for line in lines[:200]:
        assert sum(line["log_probs"]) == pytest.approx(base[RANK_OF[tuple(line["response_token_ids"])]], abs=1e-4)
        assert line["finish_reason"] == ("eos" if line["response_token_ids"][-1] == EOS else "length")


LAYOUTS = {
    "tp2": (2, ("parallel.tp=2",)),
    "dp2": (2, ()),
    "tp2_pp2": (4, ("parallel.tp=2", "parallel.pp=2")),
    "tp2_sequence_parallel": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
}


@pytest.mark.long
def test_samples_do_not_depend_on_the_layout_or_on_who_shares_the_batch(gloo, tiny_model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [5 + i] * (i + 1)}) + "\n" for i in range(3)))
    settings = ("rollout.max_prompt_tokens=8", "rollout.max_response_tokens=9")
    model = str(tiny_model("qwen3"))

    def run(name: str, num_ranks: int, *extra: str) -> list[dict]:
        out = tmp_path / f"{name}.jsonl"
        gloo.run(num_ranks, power_sample, model, str(prompts), str(out), (*settings, *extra), 4, 2.0, 3, 4)
        return lines_of(out)

    alone = run("alone", 1)
    assert [(line["id"], line["response_index"]) for line in alone] == [(str(i), r) for i in range(3) for r in range(4)]
    assert {line["num_moves"] for line in alone} == {12}
    assert 0 < sum(line["num_accepted"] for line in alone) < 12 * 12
    assert len({tuple(line["response_token_ids"]) for line in alone}) > 6
    for name, (num_ranks, extra) in LAYOUTS.items():
        assert_same(run(name, num_ranks, *extra), alone)
    assert_same(run("in_waves", 1, "rollout.max_concurrent_rows=3", "parallel.micro_batch_size=1"), alone)
    others = run("another_seed", 1, "run.seed=1")
    assert [line["response_token_ids"] for line in others] != [line["response_token_ids"] for line in alone]


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.pop("log_probs") == pytest.approx(other["log_probs"], abs=1e-4)
        assert one == {key: value for key, value in other.items() if key != "log_probs"}
