"""Is p^alpha what the chain leaves as it is? Its transition matrix on languages small enough to write down.

Symbols 0 and 1, and 2 that ends a response; at most 3 tokens: 7 responses that end and 8 that are cut, next-token
distributions at random. All in fp64.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.rollout.power_sampling import (
    EMPTY,
    ChainState,
    PowerSampling,
    block_limits,
    cut_at,
    cut_position,
    log_acceptance,
    power_sampling,
)
from megatron_powerflow.rollout.sampling import uniforms

STOP, MAX_TOKENS = 2, 3
ALPHAS = (0.5, 2.0, 4.0)


class ToyLanguage:
    """Random logits behind every prefix. log_probs(prefix, temperature) -> [3]."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        prefixes = [p for n in range(MAX_TOKENS) for p in itertools.product((0, 1), repeat=n)]
        self._logits = {prefix: generator.normal(0.0, 1.5, 3) for prefix in prefixes}

    def log_probs(self, prefix: tuple[int, ...], temperature: float) -> np.ndarray:
        logits = self._logits[prefix] / temperature
        return logits - np.log(np.exp(logits).sum())

    def along(self, tokens: tuple[int, ...], temperature: float) -> np.ndarray:
        return np.array([self.log_probs(tokens[:i], temperature)[token] for i, token in enumerate(tokens)])

    def responses(self, alpha: float, limit: int) -> list[ChainState]:
        """X(limit): every response that ends within it, every one that is cut at it."""
        ended = [(*body, STOP) for n in range(limit) for body in itertools.product((0, 1), repeat=n)]
        everything = ended + list(itertools.product((0, 1), repeat=limit))
        return [ChainState(x, self.along(x, 1.0), self.along(x, 1 / alpha), x[-1] == STOP) for x in everything]


def target(responses: list[ChainState], alpha: float) -> np.ndarray:
    power = np.exp([alpha * x.log_probs.sum() for x in responses])
    return power / power.sum()


def transition_matrix(responses: list[ChainState], alpha: float, log_ratio) -> np.ndarray:
    """P[i, j]: chance that one move leads from response i to j, over all cuts, proposals and verdicts."""
    size = len(responses)
    matrix = np.zeros((size, size))
    for i, old in enumerate(responses):
        for cut in range(len(old.token_ids)):
            total = 0.0
            for j, new in enumerate(responses):
                if len(new.token_ids) <= cut or new.token_ids[:cut] != old.token_ids[:cut]:
                    continue
                drawn = math.exp(new.proposal_log_probs[cut:].sum())
                moves = drawn * math.exp(min(log_ratio(old, new, cut, alpha), 0.0))
                matrix[i, j] += moves / len(old.token_ids)
                matrix[i, i] += (drawn - moves) / len(old.token_ids)
                total += drawn
            assert total == pytest.approx(1.0, abs=1e-12)  # the proposals of a cut are a distribution
    return matrix


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_power_distribution_is_stationary_and_in_detailed_balance(alpha, seed, limit):
    responses = ToyLanguage(seed).responses(alpha, limit)
    pi = target(responses, alpha)
    matrix = transition_matrix(responses, alpha, log_acceptance)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    flow = pi[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, atol=1e-12)
    np.testing.assert_allclose(pi @ matrix, pi, atol=1e-12)
    # and nothing else is: one eigenvalue is 1, so every start converges to pi
    assert (np.abs(np.linalg.eigvals(matrix)) > 1 - 1e-9).sum() == 1


@pytest.mark.parametrize("alpha", ALPHAS)
def test_without_the_ratio_of_lengths_another_distribution_is_stationary(alpha):
    """What the factor |x| / |y| is for; the published chain does without it."""

    def uncorrected(old, new, cut, alpha):
        return log_acceptance(old, new, cut, alpha) - math.log(len(old.token_ids)) + math.log(len(new.token_ids))

    responses = ToyLanguage(1).responses(alpha, MAX_TOKENS)
    stationary = np.linalg.matrix_power(transition_matrix(responses, alpha, uncorrected), 2**20)[0]
    assert 0.5 * np.abs(stationary - target(responses, alpha)).sum() > 0.1


class ToySampler:
    """The two callables of `power_sampling` on a toy language, drawing as the engine does; counts what it is asked."""

    def __init__(self, language: ToyLanguage, alpha: float, seed: int) -> None:
        self.language, self.alpha, self.seed = language, alpha, seed
        self.streams: list[tuple[int, int]] = []
        self.largest_call = 0

    def propose(self, prompts, max_tokens: int, step: int) -> list[Rollout]:
        self.largest_call = max(self.largest_call, len(prompts))
        found = []
        for number, prompt in prompts:
            self.streams.append((step, number))
            prefix, drawn, log_probs = prompt.token_ids[1:], (), []
            for u in uniforms(seed=self.seed, step=step, slot=number, response=0, count=max_tokens):
                # an engine whose limit is another row's draws on: behind the toy's last token, anything
                known = len(prefix + drawn) < MAX_TOKENS
                row = self.language.log_probs(prefix + drawn, 1 / self.alpha) if known else np.log([0.5, 0.5, 1e-300])
                token = int(np.searchsorted(np.exp(row).cumsum(), u, side="right").clip(max=2))
                drawn, log_probs = (*drawn, token), [*log_probs, row[token]]
                if token == STOP:
                    break
            reason = "eos" if drawn[-1] == STOP else "length"
            found.append(Rollout(prompt, number, 0, drawn, tuple(log_probs), reason))
        return found[::-1]  # in whatever order

    def score(self, rollouts) -> list[np.ndarray]:
        answers = []
        for rollout in rollouts:
            prefix = rollout.prompt.token_ids[1:]
            answers.append(self.language.along(prefix + rollout.response_token_ids, 1.0)[len(prefix) :])
        return answers


def run_chains(sampler: ToySampler, recipe: PowerSampling, numbers, rows_per_call: int = 64):
    return power_sampling(
        [(number, Prompt(str(number), number, (9,))) for number in numbers],
        recipe,
        max_tokens=MAX_TOKENS,
        seed=sampler.seed,
        rows_per_call=rows_per_call,
        propose=sampler.propose,
        score=sampler.score,
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_chains_end_where_the_transition_matrices_say(alpha):
    """The whole recipe, 3 blocks of 2 moves, against the exact distribution of its end: blocks, limits and all."""
    language, recipe = ToyLanguage(1), PowerSampling(alpha, num_blocks=3, num_moves=2)
    expected = {(): 1.0}
    for limit in block_limits(MAX_TOKENS, recipe.num_blocks):
        responses = language.responses(alpha, limit)
        start = np.zeros(len(responses))
        for i, x in enumerate(responses):  # every response of this limit begins with one of the last, or is one
            for earlier, weight in expected.items():
                cut = len(earlier)
                if x.token_ids[:cut] == earlier and (earlier[-1:] != (STOP,) or x.token_ids == earlier):
                    start[i] += weight * math.exp(x.proposal_log_probs[cut:].sum())
        matrix = transition_matrix(responses, alpha, log_acceptance)
        end = start @ np.linalg.matrix_power(matrix, recipe.num_moves)
        expected = {x.token_ids: weight for x, weight in zip(responses, end, strict=True)}
    num_chains = 1500
    counts = dict.fromkeys(expected, 0)
    for chain in run_chains(ToySampler(language, alpha, seed=3), recipe, range(num_chains)):
        counts[chain.state.token_ids] += 1
        np.testing.assert_allclose(chain.state.log_probs, language.along(chain.state.token_ids, 1.0), atol=1e-12)
        proposal = language.along(chain.state.token_ids, 1 / alpha)
        np.testing.assert_allclose(chain.state.proposal_log_probs, proposal, atol=1e-12)
        assert chain.state.ended == (chain.state.token_ids[-1] == STOP)
    p = np.array(list(expected.values()))
    deviation = (np.array(list(counts.values())) / num_chains - p) / np.sqrt(p * (1 - p) / num_chains)
    assert np.abs(deviation).max() < 4.5
    assert p.sum() == pytest.approx(1.0)


def test_a_chain_depends_on_its_seed_and_number_alone():
    recipe, language = PowerSampling(2.0, num_blocks=2, num_moves=3), ToyLanguage(2)
    together = run_chains(ToySampler(language, 2.0, seed=5), recipe, range(40))
    sampler = ToySampler(language, 2.0, seed=5)
    apart = run_chains(sampler, recipe, reversed(range(40)), rows_per_call=7)
    assert sampler.largest_call == 7
    assert [chain.number for chain in apart] == list(reversed(range(40)))
    for one, other in zip(together, reversed(apart), strict=True):
        assert (one.state.token_ids, one.num_accepted) == (other.state.token_ids, other.num_accepted)
    others = run_chains(ToySampler(language, 2.0, seed=6), recipe, range(40))
    assert [c.state.token_ids for c in together] != [c.state.token_ids for c in others]


def test_every_proposal_has_numbers_of_its_own():
    sampler = ToySampler(ToyLanguage(2), 2.0, seed=5)
    run_chains(sampler, PowerSampling(2.0, num_blocks=3, num_moves=4), range(9))
    assert len(set(sampler.streams)) == len(sampler.streams)


def test_at_alpha_1_the_lengths_alone_decide():
    """There p = Q, and the ratio is |x| / |y|."""
    responses = ToyLanguage(0).responses(1.0, MAX_TOKENS)
    for old, new in itertools.product(responses, responses):
        assert log_acceptance(old, new, 0, 1.0) == pytest.approx(math.log(len(old.token_ids) / len(new.token_ids)))


def test_limits_grow_by_at_least_a_token_to_the_last():
    assert block_limits(3072, 16) == list(range(192, 3073, 192))
    assert block_limits(10, 4) == [2, 5, 7, 10]
    assert block_limits(3, 3) == [1, 2, 3]
    with pytest.raises(UserError, match="4 blocks of 3 response tokens"):
        block_limits(3, 4)


def test_cuts_are_uniform_over_the_tokens():
    uniform = (np.arange(1000) + 0.5) / 1000
    assert np.bincount([cut_position(u, 4) for u in uniform]).tolist() == [250] * 4
    assert cut_position(np.nextafter(1.0, 0.0), 10**6) == 10**6 - 1


def test_a_response_cut_at_the_limit_keeps_its_own_probability():
    rollout = Rollout(Prompt("a", 0, (9,)), 0, 0, (0, 1, STOP), (-0.5, -1.0, -2.0), "eos")
    assert cut_at(rollout, 3) == rollout
    cut = replace(rollout, response_token_ids=(0, 1), rollout_log_probs=(-0.5, -1.0), finish_reason="length")
    assert cut_at(rollout, 2) == cut


def test_splicing_keeps_the_beginning_and_takes_the_new_end():
    old = ChainState((0, 1, 0), np.array([-1.0, -2.0, -3.0]), np.array([-4.0, -5.0, -6.0]), ended=False)
    end = ChainState((1, STOP), np.array([-0.1, -0.2]), np.array([-0.3, -0.4]), ended=True)
    new = old.spliced(1, end)
    assert new.token_ids == (0, 1, STOP)
    assert new.log_probs.tolist() == [-1.0, -0.1, -0.2]
    assert new.proposal_log_probs.tolist() == [-4.0, -0.3, -0.4]
    assert new.ended
    assert EMPTY.spliced(0, end).token_ids == end.token_ids
    # by hand: alpha 2, cut 1: 2 * (-0.3 + 5) + (-11 + 0.7) + log(3 / 3)
    assert log_acceptance(old, new, 1, 2.0) == pytest.approx(2 * 4.7 - 10.3)
    shorter = old.spliced(0, end)
    assert log_acceptance(old, shorter, 0, 2.0) == pytest.approx(2 * (6 - 0.3) - 15 + 0.7 + math.log(3 / 2))
