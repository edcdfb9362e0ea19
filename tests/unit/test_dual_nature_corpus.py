"""The synthetic world: frequencies, answers, exact probabilities and exact optima agree with each other; its files are
what the package reads."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from examples.dual_nature import corpus, reading, target, vocabulary
from examples.dual_nature.arms import ARMS
from examples.dual_nature.corpus import G1, G2, G3, SETTINGS, Question
from examples.dual_nature.measure import boxed_answer, majority, pass_at
from examples.dual_nature.results import settled_margin
from examples.dual_nature.target import MARKED, PLAIN
from megatron_powerflow.data.answers import extract_answer
from megatron_powerflow.data.prompts import load_prompts
from megatron_powerflow.data.tokenizer import load_tokenizer

NUM_DRAWN = 20_000


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Question, list[int]]]:
    rng = random.Random(0)
    questions = [corpus.draw_question(rng) for _ in range(NUM_DRAWN)]
    return [(question, corpus.draw_response(question, G2, rng)) for question in questions]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary.write_tokenizer(folder)
    return load_tokenizer(folder)


def share(values) -> float:
    return float(np.mean(list(values)))


def test_gold_answers_are_what_a_calculator_says_of_the_written_question():
    for question in corpus.split_questions(500)[0]:
        written = vocabulary.text_of(question.token_ids)
        start, *operands = re.findall(r"[+-]?\d+", written)
        assert written.startswith("<bos> ")
        assert written.endswith(" =")
        assert question.gold == int(np.mod(int(start) + np.sum([int(o) for o in operands]), 97))


def test_train_and_held_out_questions_are_distinct_and_the_split_does_not_move():
    train, held_out = corpus.split_questions(3000)
    assert len(set(train) | set(held_out)) == 4000
    assert corpus.split_questions(10)[1] == held_out
    assert 0.15 < share(question.marked for question in train + held_out) < 0.25
    assert all(q.misread.gold != q.gold for q in train if q.marked)


def test_the_parts_of_a_response_come_as_often_as_the_setting_says(drawn):
    parsed = [reading.parse_response(question, tokens) for question, tokens in drawn]
    assert all(parsed)
    steps = [step for one in parsed if one.steps for step in one.steps]
    assert share(one.steps is None for one in parsed) == pytest.approx(G2.direct, abs=0.01)
    assert share(step.digression for step in steps) == pytest.approx(G2.digression, abs=0.01)
    assert share(step.check is not None for step in steps) == pytest.approx(G2.check, abs=0.01)
    words = Counter(step.synonym for step in steps)
    assert [words[i] / len(steps) for i in range(6)] == pytest.approx(G2.synonyms, abs=0.01)
    misread = [
        min(step.operand for step in one.steps) > 0  # every minus became a plus
        for (q, _), one in zip(drawn, parsed, strict=True)
        if q.marked and one.steps and len(one.steps) == 3
    ]
    assert share(misread) == pytest.approx(G2.misread, abs=0.03)


def test_without_errors_every_worked_answer_is_right_but_for_the_misread_minus():
    setting = replace(G2, direct=0.0, error=0.0, digression_error=0.0, check_error=0.0, filler=0.0)
    rng = random.Random(1)
    for question in corpus.split_questions(300)[0]:
        parsed = reading.parse_response(question, corpus.draw_response(question, setting, rng))
        flipped = question.marked and min(step.operand for step in parsed.steps) > 0
        assert parsed.answer == (question.misread.gold if flipped else question.gold)


@pytest.mark.parametrize("question", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("name", SETTINGS)
def test_probabilities_of_all_responses_sum_to_one(name, question):
    assert target.power_sums(question, SETTINGS[name], 1.0).sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("question", [PLAIN, MARKED], ids=["plain", "marked"])
def test_exact_log_probs_average_to_the_exact_power_sums(question):
    """E_p[p^(a-1)] over samples, by kind of response, is the closed form's sum of p^a of that kind."""
    setting, alpha, rng = replace(G2, filler=0.05), 1.25, random.Random(2)
    sampled = [corpus.draw_response(question, setting, rng) for _ in range(8000)]
    powers = np.array([math.exp((alpha - 1) * reading.log_prob(question, setting, tokens)) for tokens in sampled])
    parsed = [reading.parse_response(question, tokens) for tokens in sampled]
    kinds = np.array([0 if one.steps is None else 2 if one.num_filler else 1 for one in parsed])
    exact = target.power_sums(question, setting, alpha)
    for kind in range(3):
        values = np.where(kinds == kind, powers, 0.0)
        noise = values.std() / math.sqrt(len(values))
        assert values.mean() == pytest.approx(exact[kind].sum(), abs=4 * noise)
    lengths = np.array([len(tokens) for tokens in sampled])
    tilted = powers * lengths
    assert tilted.mean() == pytest.approx(
        (exact.sum(axis=(0, 2)) * target.LENGTHS).sum(), abs=4 * tilted.std() / math.sqrt(len(tilted))
    )


def test_every_direct_answer_and_every_cut_has_the_probability_that_counting_finds():
    setting = replace(G2, filler=0.5, filler_again=0.95)
    rng = random.Random(3)
    counts = Counter(tuple(corpus.draw_response(MARKED, setting, rng)) for _ in range(NUM_DRAWN))
    common = [tokens for tokens, count in counts.items() if count >= 100]
    assert any(vocabulary.EOS not in tokens for tokens in common)
    assert any(tokens[0] == vocabulary.BOX for tokens in common)
    for tokens in common:
        expected = math.exp(reading.log_prob(MARKED, setting, tokens)) * NUM_DRAWN
        assert counts[tokens] == pytest.approx(expected, abs=4.5 * math.sqrt(expected))


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{ 46 }",  # no end
        "\\boxed{ 46 <eos>",
        "think \\boxed{ 46 } <eos>",  # no steps
        "think then +5 47 then -3 44 now +2 46 \\boxed{ 45 } <eos>",  # not the last result
        "think then +5 47 then -2 44 now +2 46 \\boxed{ 46 } <eos>",  # not this question's operand
        "think then +5 47 aside 1 2 then -3 44 now +2 46 \\boxed{ 46 } <eos>",
        "think " + "hmm " * 20 + "\\boxed{ 46 }",  # cut short of the cap
    ],
)
def test_what_the_grammar_cannot_write_has_no_probability(text):
    tokens = [vocabulary.TOKEN_OF[word] for word in text.split()]
    assert reading.parse_response(MARKED, tokens) is None
    assert reading.log_prob(MARKED, G2, tokens) == -math.inf


def test_the_optimum_at_alpha_one_is_the_corpus_itself(drawn):
    plain, marked = (target.solve_target(question, G2, 1.0) for question in (PLAIN, MARKED))
    assert plain.lam == pytest.approx(0.0, abs=1e-9)
    answers = [(question, boxed_answer(tokens)) for question, tokens in drawn]
    assert share(a == q.gold for q, a in answers if not q.marked) == pytest.approx(plain.accuracy, abs=0.02)
    assert share(a == q.gold for q, a in answers if q.marked) == pytest.approx(marked.accuracy, abs=0.03)
    assert share(a == q.misread.gold for q, a in answers if q.marked) == pytest.approx(marked.misread_share, abs=0.03)
    assert marked.misread_share > 1.5 * marked.accuracy  # the majority is wrong
    entropy = -share(reading.log_prob(q, G2, tokens) for q, tokens in drawn if not q.marked)
    assert entropy == pytest.approx(plain.entropy, abs=0.2)


def test_sharpening_helps_plain_questions_hurts_marked_ones_and_untilted_goes_direct():
    plain, marked = (target.solve_target(question, G3, 4.0) for question in (PLAIN, MARKED))
    assert plain.accuracy > 0.95
    assert marked.misread_share > 0.85
    untilted = target.solve_power(PLAIN, G3, 4.0)
    assert untilted.direct_share > 0.999
    assert untilted.mean_tokens == pytest.approx(4.0, abs=0.01)


def test_the_margin_orders_the_settings_as_the_exact_optimum_does():
    filler = {name: target.solve_target(PLAIN, SETTINGS[name], 4.0).filler_share for name in ("g0", "g1", "g2", "g3")}
    margin = {name: target.trap_margin(SETTINGS[name], 4.0) for name in filler}
    assert filler["g3"] < 0.01 < filler["g1"] < 0.9 < filler["g2"] < filler["g0"]
    assert margin["g3"] < -10 < margin["g1"] < 5 < margin["g2"] < margin["g0"]


@pytest.mark.parametrize("name", ["g0", "g1", "g2", "g3"])
def test_the_margin_is_at_the_lambda_without_the_loop_and_never_positive_at_that_of_the_optimum(name):
    """The loop that fills the limit is one response of p*: at p*'s own lambda its log-mass is a log-probability."""
    setting = SETTINGS[name]
    without = target.loop_free_lambda(PLAIN, setting, 4.0)
    assert without == pytest.approx(-1.450, abs=0.001)  # whatever the loop is
    again, entry = -math.log(setting.filler_again), -math.log((1 - setting.direct) * setting.filler)
    assert target.trap_margin(setting, 4.0) == pytest.approx(40 * (-without - 4 * again) - 4 * entry)
    own = target.solve_target(PLAIN, setting, 4.0).lam
    assert own > without - 0.01  # without its loop, the corpus has the mass of its loop elsewhere: up to 5e-3
    assert 40 * (-own - 4 * again) - 4 * entry < 0


def test_the_settled_margin_takes_lambda_from_the_settling_steps_and_the_loop_from_all_before():
    """A loop at step 3 alone: .1 nats a token, 5 to enter. lambda -1.5 at steps 20 to 59, unknown at one of them."""
    arm = next(arm for arm in ARMS if arm.name == "nothing_g2")
    lines = [{"step": step, "alpha": 4.0, "trap_lambda": -1.5 if step >= 20 else -9.0} for step in range(150)]
    del lines[30]["trap_lambda"]
    assert settled_margin(lines, arm) is None
    lines[3] |= {"trap_loop_nats": 0.1, "trap_entry_nats": 5.0}
    lines[70] |= {"trap_loop_nats": 9.0, "trap_entry_nats": 9.0}
    assert settled_margin(lines, arm) == pytest.approx(40 * (1.5 - 0.4) - 20)
    assert settled_margin(lines[:20], arm) is None


def test_the_package_reads_the_prompts_file(tmp_path, tokenizer):
    questions = corpus.split_questions(50)[0]
    corpus.write_prompts(tmp_path / "prompts.jsonl", questions)
    found = load_prompts(
        tmp_path / "prompts.jsonl",
        tokenizer,
        vocab_size=vocabulary.VOCAB_SIZE,
        max_prompt_tokens=corpus.MAX_PROMPT_TOKENS,
        too_long="error",
    ).prompts
    assert [list(prompt.token_ids) for prompt in found] == [question.token_ids for question in questions]
    assert [prompt.answer for prompt in found] == [str(question.gold) for question in questions]
    assert {prompt.task for prompt in found} == {"plain", "minus"}


def test_the_package_reads_the_answer_of_a_decoded_response(drawn, tokenizer):
    for question, tokens in drawn[:500]:
        answer = reading.parse_response(question, tokens).answer
        text = tokenizer.decode(tokens)
        assert extract_answer(text) == (None if answer is None else str(answer))
        assert boxed_answer(tokens) == answer
        assert tokenizer.encode_plain(text) == [token for token in tokens if token != vocabulary.EOS]


def test_majority_and_pass_at_k_by_hand():
    assert majority([3, None, 5, 5, None, None]) == 5
    assert majority([None]) is None
    assert pass_at(2, 4, 1) == pytest.approx(0.5)  # of the 6 pairs, 3 hold the right one
    assert pass_at(4, 4, 1) == 1.0


@pytest.mark.slow
def test_pretraining_learns_and_leaves_a_folder_that_everyone_reads(tmp_path, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from examples.dual_nature import pretrain
    from megatron_powerflow.hf.config import read_architecture, read_stop_token_ids
    from megatron_powerflow.hf.families import FAMILIES

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**pretrain.ARCHITECTURE))
    recipe = pretrain.Recipe(None, num_steps=60, lr=3e-3, batch_size=32, warmup_steps=10)
    losses = pretrain.pretrain(model, G1, recipe, seed=0, name="test")
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    pretrain.save(model, tmp_path / "base")

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    tokens = torch.tensor([PLAIN.token_ids])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(tokens).logits, model(tokens).logits)
    architecture, family = read_architecture(tmp_path / "base", FAMILIES)
    assert family.model_type == "llama"
    assert architecture.vocab_size == vocabulary.VOCAB_SIZE
    assert load_tokenizer(tmp_path / "base").eos_token_id == vocabulary.EOS
    assert read_stop_token_ids(tmp_path / "base", None, vocabulary.EOS + 1) == frozenset({vocabulary.EOS})
