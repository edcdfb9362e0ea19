"""Every prompt is answered once, whatever breaks off in between: groups in hand, and the ledger of who answered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Prompt, Rollout, SamplingParams
from megatron_powerflow.serving.answers import Answer
from megatron_powerflow.serving.ledger import Ledger, ledger_report
from megatron_powerflow.training.resume import Change, Resume
from megatron_powerflow.training.served_rollouts import is_new_course

PROMPTS = [(slot, Prompt(f"q{slot}", slot, (1, 2, slot))) for slot in range(3)]


def sampling(step: int, **changes) -> SamplingParams:
    return replace(SamplingParams(2, 4, 1.0, frozenset({9}), seed=1, step=step), **changes)


def group(slot: int, prompt: Prompt) -> list[Rollout]:
    return [Rollout(prompt, slot, index, (3, 9), (-0.25, -1.5), "eos", ((0, 0, 2),)) for index in range(2)]


def take(ledger: Ledger, slot: int, step: int, server: str = "http://a:1") -> None:
    rollouts = group(slot, PROMPTS[slot][1])
    ledger.take(Answer(slot, tuple(rollouts), ()), rollouts, sampling(step), server)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    ledger = Ledger(tmp_path, 0, vocab_size=10, lag=9)
    ledger.begin(0, num_samplers=1)
    return ledger


def test_what_was_answered_is_found_again_and_not_asked_again(ledger, tmp_path):
    take(ledger, 0, 5)
    take(ledger, 2, 5)
    again = Ledger(tmp_path, 0, vocab_size=10, lag=9)  # the run was killed, and goes on at step 5
    again.begin(5, num_samplers=1)
    found = again.found(PROMPTS, sampling(5))
    assert found == {0: tuple(group(0, PROMPTS[0][1])), 2: tuple(group(2, PROMPTS[2][1]))}
    take(again, 1, 5)
    for step in range(5):
        for slot in range(3):
            take(again, slot, step)
    assert ledger_report(tmp_path, num_steps=6, prompts_per_step=3)[0].startswith("ledger: 18 prompts of 6 steps")


def test_another_number_of_samplers_finds_it_too(ledger, tmp_path):
    take(ledger, 1, 0)
    other = Ledger(tmp_path, 7, vocab_size=10, lag=9)
    assert other.found(PROMPTS[1:], sampling(0)).keys() == {1}


@pytest.mark.parametrize(
    "changed", [{"seed": 2}, {"temperature": 0.5}, {"max_response_tokens": 5}, {"stop_token_ids": frozenset({8})}]
)
def test_what_was_asked_otherwise_is_asked_anew(ledger, changed):
    take(ledger, 0, 0)
    assert not ledger.found(PROMPTS, sampling(0, **changed))
    assert ledger.found(PROMPTS, sampling(0)).keys() == {0}


def test_what_is_by_older_weights_than_this_start_takes_is_asked_anew(ledger, tmp_path):
    """rollout.steps_ahead was lowered in between: the groups of step 5 are by the weights of step 0."""
    take(ledger, 0, 5)
    assert ledger.found(PROMPTS, sampling(5)).keys() == {0}
    assert not Ledger(tmp_path, 0, vocab_size=10, lag=4).found(PROMPTS, sampling(5))


def test_mixed_responses_are_asked_anew_where_no_weights_may_change_in_one(ledger, tmp_path):
    prompt = PROMPTS[0][1]
    rollouts = [replace(rollout, weight_versions=((4, 0, 1), (5, 1, 2))) for rollout in group(0, prompt)]
    ledger.take(Answer(0, tuple(rollouts), ()), rollouts, sampling(5), "http://a:1")
    assert not ledger.found(PROMPTS, sampling(5))
    assert Ledger(tmp_path, 0, vocab_size=10, lag=9, mixed=True).found(PROMPTS, sampling(5)).keys() == {0}


def test_fewer_samplers_take_back_what_the_others_noted(tmp_path):
    for sampler in range(2):
        ledger = Ledger(tmp_path, sampler, vocab_size=10, lag=9)
        ledger.begin(0, num_samplers=2)
        take(ledger, sampler, 0)
        take(ledger, sampler, 1)
    one = Ledger(tmp_path, 0, vocab_size=10, lag=9)  # goes on at step 1
    one.begin(1, num_samplers=1)
    assert one.found(PROMPTS[:2], sampling(1)).keys() == {0, 1}
    assert ledger_report(tmp_path, num_steps=2, prompts_per_step=2)[0].startswith("ledger: 4 prompts of 2 steps")


def test_steps_that_no_server_sampled_are_named_and_no_fault(ledger, tmp_path):
    for slot in range(3):
        take(ledger, slot, 2)
    said = ledger_report(tmp_path, num_steps=3, prompts_per_step=3)
    assert said[:2] == ["ledger: 3 prompts of 1 steps, each answered once; 12 tokens", SILENT]


SILENT = "        2 steps have no line: not by servers"


def test_another_prompt_in_the_same_slot_is_asked(ledger):
    take(ledger, 0, 0)
    assert not ledger.found([(0, Prompt("other", 4, (1, 2, 4)))], sampling(0))


def test_a_torn_or_hostile_line_is_asked_again(ledger, tmp_path):
    take(ledger, 0, 0)
    take(ledger, 1, 0)
    path = next((tmp_path / "in_hand").glob("step_000000.*"))
    first, second = path.read_text().splitlines()
    path.write_text(first[:-30] + "\n" + second.replace("[3, 9]", "[3, 99]") + "\n" + "[]\n{}\nnull\n")
    assert not ledger.found(PROMPTS, sampling(0)), "torn, and a token outside the vocabulary"


def test_groups_go_when_a_checkpoint_holds_their_step_and_other_files_stay(ledger, tmp_path):
    for step in (3, 4):
        take(ledger, 0, step)
    (tmp_path / "in_hand" / "step_000003.notes.jsonl").write_text("a user's")
    ledger.forget(4)
    left = sorted(path.name for path in (tmp_path / "in_hand").iterdir())
    assert left == ["step_000003.notes.jsonl", "step_000004.sampler_00000.jsonl"]


def test_a_prompt_that_was_answered_twice_or_never_is_named(ledger, tmp_path):
    take(ledger, 0, 0)
    take(ledger, 0, 0)
    take(ledger, 2, 0)
    with pytest.raises(UserError) as error:
        ledger_report(tmp_path, num_steps=1, prompts_per_step=3)
    assert "1 prompts were answered twice: step 0 slot 0" in str(error.value)
    assert "1 prompts were never answered: step 0 slot 1" in str(error.value)


def test_what_an_abandoned_course_had_in_hand_of_later_steps_is_not_the_new_ones(ledger, tmp_path):
    """The run goes back to step 4 with another rate: 5 is by weights that the new course does not make."""
    for step in (4, 5):
        take(ledger, 0, step)
    second = Ledger(tmp_path, 1, vocab_size=10, lag=9)
    second.begin(4, num_samplers=2, is_new_course=True)
    assert second.found(PROMPTS, sampling(5)).keys() == {0}, "the first sampler removes them, for all"
    again = Ledger(tmp_path, 0, vocab_size=10, lag=9)
    again.begin(4, num_samplers=2, is_new_course=True)
    assert again.found(PROMPTS, sampling(4)).keys() == {0}
    assert not again.found(PROMPTS, sampling(5))


@pytest.mark.parametrize(
    ("keys", "goes_back", "is_new"),
    [
        ([], False, False),
        ([], True, True),
        (["optimizer.lr"], False, True),
        (["objective.alpha", "run.num_steps"], False, True),
        (["run.num_steps", "rollout.vllm.urls", "metrics.wandb"], False, False),
    ],
)
def test_a_start_is_a_new_course_where_its_weights_will_be_others(keys, goes_back, is_new):
    changed = tuple(Change(key, 1, 2) for key in keys)
    assert is_new_course(Resume(changed=changed, goes_back=goes_back)) == is_new
