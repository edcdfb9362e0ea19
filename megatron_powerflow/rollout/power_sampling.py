"""How is p_base^alpha sampled without training? Metropolis-Hastings over whole responses, in blocks of growing length.

"Reasoning with Sampling" (arXiv 2510.14901). The proposal cuts a response somewhere and writes its end anew at
temperature 1/alpha; p is the model at temperature 1, Q at temperature 1/alpha.

**The chain.** X(L) holds the responses that end in a stop token within L tokens, and every sequence of L tokens without
one: a response cut at the limit is an element of its own, whose probability is the product of its L tokens', in p and
in Q alike, so a continuation may be drawn longer and cut. The target is pi(x) = p(x)^alpha / Z on X(L). A move from x:

    m uniform on 0 .. |x| - 1;  y = x[:m] + (end drawn from Q given x[:m], to a stop token or to L tokens)
    accept y with min(1, r),  r = p(y)^alpha / p(x)^alpha * Q(x[m:] | x[:m]) / Q(y[m:] | y[:m]) * |x| / |y|

The last factor is the chance of the same cut on the way back, 1/|y|, over that of the way there, 1/|x|; y has more than
m tokens, so the way back exists. For every m apart, pi(x) 1/|x| Q(y[m:]) min(1, r) is symmetric in x and y, hence so is
the sum over m: pi is stationary, exactly, whatever the lengths. A cut at 0 reaches all of X(L), so it is the only one.

**Blocks.** L grows in `num_blocks` steps; what is not ended is continued by Q, then moved `num_moves` times. Only the
moves of the last block, on X(max_tokens), decide what the chain converges to; earlier ones are a better start than Q.

**How soon.** Exact is where it converges to, not how fast: what p^alpha favours and Q hardly ever draws (at alpha > 1 a
short response that is likely as a whole, behind a token that is not the likeliest) is found late, and the share of
accepted moves does not show it. On random enumerable models, 40 moves at alpha = 4 left a total variation between 0 and
0.9.

**Where the published code differs** (aakaran/reasoning-with-sampling, commit 6107354): it leaves |x| / |y| out; it
draws no end longer than the current response, so lengths only fall within a block; of a current response longer than
the new one it weighs only as many tokens as the new one has; and it stops after the block in which a response ended,
whose distribution is that of a shorter limit. None of these matters while every response has L tokens; each moves the
stationary distribution where lengths vary.

Left out: who draws and who scores (two callables: rollout may not import training), caching of kept prefixes (each
proposal prefills prompt and prefix again), limits of single rows in the engine (rows are sorted, drawn long, and cut).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.rollout.sampling import uniforms

# ((chain number, prompt and kept tokens) pairs, max tokens, step) -> one rollout each, its slot the chain number, drawn
# at temperature 1/alpha with the numbers of that step; on every rank of a replica alike
Propose = Callable[[Sequence[tuple[int, Prompt]], int, int], Sequence[Rollout]]
# rollouts -> [n] fp64 log-probs of the response tokens of each, at temperature 1; on every rank of a replica alike
Score = Callable[[Sequence[Rollout]], Sequence[np.ndarray]]

# proposals are drawn as response 0 of a chain; the numbers that cut and accept belong to a response that is never drawn
DECISIONS = 1


@dataclass(frozen=True, slots=True)
class PowerSampling:
    """The settings of power sampling.

    alpha > 0: the power. num_blocks >= 1: the number of growing limits on the length. num_moves >= 0: the number of
    Metropolis-Hastings moves under each limit.
    """

    alpha: float
    num_blocks: int
    num_moves: int


@dataclass(frozen=True, slots=True)
class ChainState:
    """A response in a chain, with its log-probs under the model and under the proposal.

    log_probs: [n] fp64 at temperature 1. proposal_log_probs: [n] fp64 at temperature 1/alpha. ended: whether its last
    token is a stop token.
    """

    token_ids: tuple[int, ...]
    log_probs: np.ndarray
    proposal_log_probs: np.ndarray
    ended: bool

    def spliced(self, cut: int, end: ChainState) -> ChainState:
        """Return the first `cut` tokens of this response, with `end` behind them."""
        return ChainState(
            self.token_ids[:cut] + end.token_ids,
            np.concatenate([self.log_probs[:cut], end.log_probs]),
            np.concatenate([self.proposal_log_probs[:cut], end.proposal_log_probs]),
            end.ended,
        )


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain after its last move, with the number of its moves that were accepted."""

    number: int
    prompt: Prompt
    state: ChainState
    num_accepted: int


EMPTY = ChainState((), np.zeros(0), np.zeros(0), ended=False)


def block_limits(max_tokens: int, num_blocks: int) -> list[int]:
    """Return the most tokens that a response may have in each block: growing, the last one max_tokens.

    Raises UserError where there are more blocks than tokens.
    """
    if num_blocks > max_tokens:
        raise UserError(f"{num_blocks} blocks of {max_tokens} response tokens: a block needs a token; use fewer blocks")
    return [max_tokens * (block + 1) // num_blocks for block in range(num_blocks)]


def cut_position(uniform: float, num_tokens: int) -> int:
    """Return a position uniform on 0 .. num_tokens - 1, from a number uniform in [0, 1)."""
    return min(int(uniform * num_tokens), num_tokens - 1)


def log_acceptance(old: ChainState, new: ChainState, cut: int, alpha: float) -> float:
    """Return log r, the logarithm of the acceptance ratio in the file's docstring.

    cut: the number of first tokens that are the same in both, so that theirs cancel.
    """
    target = alpha * (new.log_probs[cut:].sum() - old.log_probs[cut:].sum())
    proposal = old.proposal_log_probs[cut:].sum() - new.proposal_log_probs[cut:].sum()
    return float(target + proposal + math.log(len(old.token_ids)) - math.log(len(new.token_ids)))


def power_sampling(
    chains: Sequence[tuple[int, Prompt]],
    recipe: PowerSampling,
    *,
    max_tokens: int,
    seed: int,
    rows_per_call: int,
    propose: Propose,
    score: Score,
) -> list[Chain]:
    """Run one chain to its end for each (number, prompt) pair; return the chains in the order of the pairs.

    The numbers are unique. What a chain does is a function of (seed, its number, its prompt) alone: proposals and
    decisions of each round of moves have a step of their own. rows_per_call: continuations asked for at a time. Raises
    UserError where recipe.num_blocks is over max_tokens. Collective where `propose` and `score` are.
    """
    states, accepted = [EMPTY] * len(chains), [0] * len(chains)
    ends = _Ends(chains, rows_per_call, propose, score)
    for block, limit in enumerate(block_limits(max_tokens, recipe.num_blocks)):
        step = block * (recipe.num_moves + 1)
        cuts = {row: len(state.token_ids) for row, state in enumerate(states) if not state.ended}
        for row, end in ends.draw(states, cuts, limit, step).items():
            states[row] = states[row].spliced(cuts[row], end)
        for move in range(1, recipe.num_moves + 1):
            decisions = [uniforms(seed=seed, step=step + move, slot=n, response=DECISIONS, count=2) for n, _ in chains]
            cuts = {row: cut_position(u, len(states[row].token_ids)) for row, (u, _) in enumerate(decisions)}
            for row, end in ends.draw(states, cuts, limit, step + move).items():
                new = states[row].spliced(cuts[row], end)
                log_ratio = log_acceptance(states[row], new, cuts[row], recipe.alpha)
                if decisions[row][1] < math.exp(min(log_ratio, 0.0)):
                    states[row] = new
                    accepted[row] += 1
    return [Chain(*chains[row], states[row], accepted[row]) for row in range(len(chains))]


class _Ends:
    """What draws and scores the ends of many responses at once."""

    def __init__(
        self, chains: Sequence[tuple[int, Prompt]], rows_per_call: int, propose: Propose, score: Score
    ) -> None:
        self._chains, self._rows_per_call, self._propose, self._score = chains, rows_per_call, propose, score

    def draw(self, states: Sequence[ChainState], cuts: dict[int, int], limit: int, step: int) -> dict[int, ChainState]:
        """Draw and score a new end of each row of `cuts`, behind the row's first cuts[row] tokens.

        An end goes to a stop token, or to `limit` tokens of the response in all.
        """
        rollouts: dict[int, Rollout] = {}
        # the engine has one limit for all it draws: rows with about as much to go are drawn together, the rest is cut
        rows = sorted(cuts, key=lambda row: (cuts[row], row))
        for start in range(0, len(rows), self._rows_per_call):
            together = rows[start : start + self._rows_per_call]
            row_of = {self._chains[row][0]: row for row in together}
            prompts = [(number, self._prefix(row, states[row], cuts[row])) for number, row in row_of.items()]
            for rollout in self._propose(prompts, limit - cuts[together[0]], step):
                row = row_of[rollout.slot]
                rollouts[row] = cut_at(rollout, limit - cuts[row])
        scored = self._score([rollouts[row] for row in rows]) if rows else []
        return {
            row: ChainState(
                rollouts[row].response_token_ids,
                np.asarray(log_probs, dtype=np.float64),
                np.asarray(rollouts[row].rollout_log_probs, dtype=np.float64),
                ended=rollouts[row].finish_reason == "eos",
            )
            for row, log_probs in zip(rows, scored, strict=True)
        }

    def _prefix(self, row: int, state: ChainState, cut: int) -> Prompt:
        prompt = self._chains[row][1]
        return replace(prompt, token_ids=prompt.token_ids + state.token_ids[:cut])


def cut_at(rollout: Rollout, num_tokens: int) -> Rollout:
    """Return the rollout that a limit of num_tokens would have given: the same numbers sampled the same tokens."""
    if len(rollout.response_token_ids) <= num_tokens:
        return rollout
    return replace(
        rollout,
        response_token_ids=rollout.response_token_ids[:num_tokens],
        rollout_log_probs=rollout.rollout_log_probs[:num_tokens],
        finish_reason="length",
    )
