"""What servers sample is the policy at the run's temperature, also ahead of time and in mid-response."""

from __future__ import annotations

import json

import pytest

from megatron_powerflow.journal import read_journal
from tests.conftest import run_cli
from tests.vllm.test_weight_sync import GAP, NO_START


@pytest.fixture(scope="module")
def served(shared_job):
    shared_job.settings = {"rollout.max_response_tokens": 200}
    shared_job.serve()
    shared_job.settings = {}
    return shared_job


def trained(served, run, **changes) -> list[dict[str, float]]:
    changes = {"rollout.vllm.urls": [served.url()], **NO_START, "run.output_dir": str(run), **changes}
    found = served.train(**changes)
    assert found.returncode == 0, found.stdout + found.stderr
    return read_journal(run / "metrics.jsonl").lines


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_log_probs_are_of_the_distribution_that_was_sampled(served, tmp_path, temperature):
    """Raw log-probs, vLLM's default, would be off by the temperature."""
    lines = trained(served, tmp_path / "run", **{"rollout.temperature": temperature})
    assert all(line["sampler_gap_max"] < GAP for line in lines), lines


def test_a_server_with_raw_log_probs_is_found_at_the_first_batch(job, tmp_path):
    job.serve(raw_log_probs=True)
    found = job.train(**{"rollout.temperature": 0.5})
    text = " ".join((found.stdout + found.stderr).split())
    assert found.returncode == 2, text
    assert "sampler_gap_mean is" in text


def test_responses_of_the_next_step_are_drawn_while_one_trains(served, tmp_path):
    run = tmp_path / "run"
    lines = trained(served, run, **{"rollout.steps_ahead": 1, "run.num_steps": 5, "rollout.save": True})
    assert [line["lag_mean"] for line in lines] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert all(line["mixed_versions"] == 0 for line in lines)
    group = json.loads((run / "rollouts" / "step_000003.jsonl").read_text().splitlines()[1])
    assert all(response["weight_versions"] == [[2, 0, len(response["token_ids"])]] for response in group["responses"])


def test_weights_that_change_in_mid_response_are_kept_apart(served, tmp_path):
    run = tmp_path / "run"
    changes = {"rollout.steps_ahead": 3, "rollout.in_flight_updates": True, "rollout.max_response_tokens": 200}
    changes |= {"rollout.vllm.max_requests": 2, "run.num_steps": 8, "rollout.save": True}
    lines = trained(served, run, **changes)
    assert max(line["mixed_versions"] for line in lines) > 0, lines
    assert max(line["lag_max"] for line in lines) <= 3
    found = [
        response["weight_versions"]
        for path in sorted((run / "rollouts").glob("step_*.jsonl"))
        for line in path.read_text().splitlines()[1:]
        for response in json.loads(line)["responses"]
        if len(response.get("weight_versions", [])) > 1
    ]
    assert found, "the metric counts what the files show"
    assert all(spans[0][0] < spans[1][0] for spans in found), "later tokens are of later weights"


def test_a_server_of_shorter_texts_ends_the_run_at_once(served, tmp_path):
    changes = {"rollout.vllm.urls": [served.url()], **NO_START, "run.output_dir": str(tmp_path / "run")}
    found = served.train(**changes, **{"rollout.max_response_tokens": 240})
    assert found.returncode == 2
    assert "takes texts of up to 216 tokens; this run's prompts and responses have up to 256" in " ".join(
        (found.stdout + found.stderr).split()
    )


@pytest.mark.parametrize("transport", ["folder", "stream"])
def test_generate_through_a_server_writes_what_score_confirms(served, tmp_path, transport):
    answers, scores = tmp_path / "answers.jsonl", tmp_path / "scores.jsonl"
    common = ["--model", served.model, "precision.dtype=fp32"]
    found = run_cli(
        *("generate", "--engine", "vllm", "--prompts", served.prompts, "--out", answers, "--num-responses", "2"),
        *common,
        f"rollout.vllm.urls=[{served.url()}]",
        f"rollout.vllm.transport={transport}",
        "rollout.max_prompt_tokens=16",
        "rollout.max_response_tokens=20",
    )
    assert found.returncode == 0, found.stdout + found.stderr
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 48
    rows = tmp_path / "rows.jsonl"
    prompts = {line["id"]: line for line in map(json.loads, served.prompts.read_text().splitlines())}
    rows.write_text(
        "".join(
            json.dumps({**prompts[line["id"]], "response_token_ids": line["response_token_ids"]}) + "\n"
            for line in lines
        )
    )
    found = run_cli("score", "--data", rows, "--out", scores, *common)
    assert found.returncode == 0, found.stdout + found.stderr
    scored = [json.loads(line)["log_probs"] for line in scores.read_text().splitlines()]
    assert (
        max(
            abs(a - b)
            for line, own in zip(lines, scored, strict=True)
            for a, b in zip(line["log_probs"], own, strict=True)
        )
        < GAP
    )
    assert not (tmp_path / "answers.jsonl.weights").exists()
