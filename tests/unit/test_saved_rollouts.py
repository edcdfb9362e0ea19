"""Saved rollouts: the same when read, whole or not there, refused when they do not fit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow.config_file import parse_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.rollout.rollout_files import (
    ReplayRequirements,
    find_rollouts,
    read_rollouts,
    replay_violations,
    step_file,
    write_rollouts,
)

WANTED = ReplayRequirements(
    num_prompts=2, responses_per_prompt=2, vocab_size=50, temperature=1.0, longest_prompt=4, longest_response=3
)
MINIMAL = {"model": {"hf_path": "m"}, "prompts": {"path": "p"}, "run": {"output_dir": "o"}}


def rollouts_of(log_probs=(-0.5, -1.25), text="a \u2028 b") -> list[Rollout]:
    return [
        Rollout(
            prompt=Prompt(f"p{slot}", 7 * slot, (5, 6 + slot), answer="4", text=text),
            slot=slot,
            response_index=index,
            response_token_ids=(9, 2),
            rollout_log_probs=tuple(log_probs),
            finish_reason="eos" if index else "length",
        )
        for slot in range(2)
        for index in range(2)
    ]


def saved(folder, step=0, **changes):
    path = step_file(folder, step)
    arguments = {"step": step, "vocab_size": 50, "temperature": 1.0} | changes
    write_rollouts(path, rollouts_of(), **arguments)
    return path


@given(values=st.tuples(*[st.floats(-1e4, 0, width=32)] * 2), text=st.text())
def test_what_is_read_is_what_was_written_to_the_last_bit(tmp_path_factory, values, text):
    rollouts = rollouts_of([float(np.float32(value)) for value in values], text)
    path = step_file(tmp_path_factory.mktemp("rollouts"), 3)
    write_rollouts(path, rollouts[::-1], step=3, vocab_size=50, temperature=1.0)
    assert read_rollouts(path, vocab_size=50) == rollouts
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def with_versions(*versions) -> list[Rollout]:
    """The first response of four has these spans."""
    first, *others = rollouts_of()
    return [replace(first, weight_versions=versions), *others]


def test_the_versions_of_weights_are_saved_where_there_are_any(tmp_path):
    """Of the others the file is as it was before there were versions."""
    path = step_file(tmp_path, 3)
    rollouts = with_versions((1, 0, 1), (3, 1, 2))
    write_rollouts(path, rollouts, step=3, vocab_size=50, temperature=1.0)
    assert read_rollouts(path, vocab_size=50) == rollouts
    assert path.read_text().count("weight_versions") == 1
    write_rollouts(path, rollouts_of(), step=3, vocab_size=50, temperature=1.0)
    assert "weight_versions" not in path.read_text()


@pytest.mark.parametrize(
    "versions",
    [
        [(4, 0, 2)],  # of a step to come
        [(-1, 0, 2)],
        [(1, 0, 1)],  # not all tokens
        [(1, 0, 3)],
        [(1, 0, 1), (2, 0, 2)],
        [(1, 1, 2)],
        [(1, 0, 0), (1, 0, 2)],
        [(1, 0)],
        [(1, 0, 2.0)],
        [(True, 0, 2)],
    ],
)
def test_versions_that_are_no_spans_of_the_response_are_refused(tmp_path, versions):
    path = step_file(tmp_path, 3)
    write_rollouts(path, with_versions(*versions), step=3, vocab_size=50, temperature=1.0)
    with pytest.raises(UserError, match="slot 0, response 0: weight_versions are not spans"):
        read_rollouts(path, vocab_size=50)


def test_damage_and_a_foreign_vocabulary_are_refused(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(UserError, match="token 9 is outside the model's vocabulary of 8"):
        read_rollouts(path, vocab_size=8)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="damaged"):
        read_rollouts(path, vocab_size=50)
    path.write_bytes(whole.replace(b"[9, 2]", b"[9, 3]", 1))
    with pytest.raises(UserError, match="damaged"):
        read_rollouts(path, vocab_size=50)
    path.write_text("{}\n")
    with pytest.raises(UserError, match="no rollouts that can be read"):
        read_rollouts(path, vocab_size=50)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:-1], "not the 4 rollouts that its first line says"),
        (lambda lines: [lines[0]] * 2, "not the 4 rollouts"),
        (lambda lines: [lines[0] | {"responses": [{}]}], "not rollouts as this program writes them"),
        (lambda lines: [5], "not rollouts as this program writes them"),
        (lambda lines: replaced(lines, "token_ids", [9, -1]), "token -1 is outside"),
        (lambda lines: replaced(lines, "token_ids", ["9", 2]), "not rollouts as"),
        (lambda lines: replaced(lines, "token_ids", [9]), "slot 0, response 0: must have tokens, and a log-prob"),
        (lambda lines: replaced(lines, "log_probs", [-1.0, 0.5]), "slot 0, response 0: must have tokens"),
    ],
)
def test_a_file_made_up_with_a_right_checksum_is_refused(tmp_path, change, words):
    path = saved(tmp_path)
    head, *lines = path.read_text().strip().split("\n")  # not splitlines: the text has another kind of line end
    body = "".join(json.dumps(line) + "\n" for line in change([json.loads(line) for line in lines]))
    header = json.loads(head) | {"sha256": hashlib.sha256(body.encode()).hexdigest()}
    path.write_text(json.dumps(header) + "\n" + body)
    with pytest.raises(UserError, match=words):
        read_rollouts(path, vocab_size=50)


def replaced(lines: list[dict], key: str, value: list) -> list[dict]:
    lines[0]["responses"][0][key] = value
    return lines


def test_what_fits_is_accepted(tmp_path):
    saved(tmp_path, 0), saved(tmp_path, 1)
    assert replay_violations(tmp_path, range(2), WANTED) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"responses_per_prompt": 4}, "responses_per_prompt is 2, and rollout.responses_per_prompt is 4"),
        ({"num_prompts": 3}, "num_prompts is 2, and rollout.prompts_per_step is 3"),
        ({"vocab_size": 64}, "vocab_size is 50, and the vocabulary of model.hf_path is 64"),
        ({"temperature": 0.5}, "temperature is 1.0, and rollout.temperature is 0.5"),
        ({"longest_response": 1}, "longest_response is 2 tokens, over rollout.max_response_tokens=1"),
        ({"longest_prompt": 1}, "longest_prompt is 2 tokens, over rollout.max_prompt_tokens=1"),
    ],
)
def test_what_does_not_fit_is_refused_once_with_the_reason(tmp_path, change, words):
    import dataclasses

    saved(tmp_path, 0), saved(tmp_path, 1)
    (violation,) = replay_violations(tmp_path, range(2), dataclasses.replace(WANTED, **change))
    assert words in violation


def test_missing_and_renamed_steps_are_named(tmp_path):
    saved(tmp_path, 0)
    (violation,) = replay_violations(tmp_path, range(4), WANTED)
    assert "no rollouts of step 1, 2, 3 (steps 0 to 0 are there" in violation
    step_file(tmp_path, 0).rename(step_file(tmp_path, 1))
    (violation,) = replay_violations(tmp_path, range(1, 2), WANTED)
    assert "holds step 0" in violation


def test_a_runs_folder_stands_for_its_rollouts(tmp_path):
    saved(tmp_path / "run" / "rollouts")
    assert find_rollouts(tmp_path / "run") == find_rollouts(tmp_path / "run" / "rollouts") == tmp_path / "run/rollouts"
    with pytest.raises(UserError, match="no step_"):
        find_rollouts(tmp_path)


@pytest.mark.parametrize("other", ["rollout.save=true", "evaluation.samples=1", "evaluation.prompts=p"])
def test_a_replay_takes_no_key_of_the_engine(other):
    with pytest.raises(UserError, match=r"has no effect because rollout\.replay"):
        parse_config(MINIMAL, ["rollout.replay=r", other])
    assert parse_config(MINIMAL, ["rollout.replay=r"]).evaluation.samples is None
    assert parse_config(MINIMAL).evaluation.samples == 3


def test_the_first_line_says_what_the_file_is(tmp_path):
    header = json.loads(saved(tmp_path, 12).read_text().splitlines()[0])
    assert header.pop("sha256")
    assert header == {
        "format": 1,
        "step": 12,
        "num_prompts": 2,
        "responses_per_prompt": 2,
        "vocab_size": 50,
        "temperature": 1.0,
        "longest_prompt": 2,
        "longest_response": 2,
    }
