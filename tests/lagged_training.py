"""Training of tables (`toy_language.py`) on responses of older tables, by the product's objective functions.

A step draws whole groups for each prompt, every response from one of the step's writers, and makes one update with
Adam in fp64; the distance to the optimum is exact. What one response is made of:

    lag L          all tokens by the table of L steps ago
    in_flight      weights switched in mid-response: tokens before a place by the table of two steps ago, those from it
                   on by that of one step ago; the place is drawn from 1 to 5
    mixed          all tokens by the table of 0 to 4 steps ago, drawn for each response
    frozen         all tokens by the first table, for ever

Left out: networks, parallelism, the records of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.objective.log_z_estimate import contrastive_log_z, group_log_z, loo_log_z
from megatron_powerflow.objective.objective import (
    BalanceObjective,
    ImportanceRule,
    Objective,
    PolicyGradientObjective,
)
from megatron_powerflow.objective.policy_gradient import group_advantage, power_reward, surrogate_terms
from megatron_powerflow.objective.sampler_weight import sampler_weight
from megatron_powerflow.objective.trajectory_balance import (
    balance_loss,
    importance_weight,
    initial_log_z,
    partial_residual,
    token_spread,
)
from megatron_powerflow.training.rewards import cluster_reward, majority_reward
from tests.toy_language import (
    EOS,
    LENGTHS,
    MASK,
    MAX_SYMBOLS,
    MAX_TOKENS,
    RESPONSES,
    TIED,
    tied_mean,
    token_log_probs,
    total_variation,
)

LAGS = ("0", "1", "4", "in_flight", "mixed")
OLDEST = 4  # steps, of a mixture
LOG_Z_RATE = 0.5  # the default of optimizer.log_z_lr
ESTIMATES = {"group": group_log_z, "loo": loo_log_z}

History = Sequence[Tensor]  # the tables of every step up to now: [P, 63, 6] token log-probs


def writers(history: History, lag: str) -> Tensor:
    """[W, P, 63, 6]: the log-prob of every token by whoever wrote it, for each of W equally likely ways."""

    def ago(steps: int) -> Tensor:
        return history[max(len(history) - 1 - steps, 0)]

    if lag == "frozen":
        return history[0][None]
    if lag == "mixed":
        return torch.stack([ago(steps) for steps in range(OLDEST + 1)])
    if lag == "in_flight":
        place = torch.arange(MAX_TOKENS)
        return torch.stack([torch.where(place < switch, ago(2), ago(1)) for switch in range(1, MAX_SYMBOLS + 1)])
    return ago(int(lag))[None]


class Batch(NamedTuple):
    """prompt, response: [B] indices; group: [B] int64; writer_log_probs: [B, 6], of each token by whoever wrote it."""

    prompt: Tensor
    response: Tensor
    group: Tensor
    writer_log_probs: Tensor


def draw(ways: Tensor, groups_per_prompt: int, group_size: int, generator: torch.Generator) -> Batch:
    """A batch of whole groups for every prompt. ways: [W, P, 63, 6] of `writers`."""
    num_ways, num_prompts = ways.shape[:2]
    group = torch.arange(num_prompts * groups_per_prompt).repeat_interleave(group_size)
    prompt = group % num_prompts
    way = torch.randint(num_ways, prompt.shape, generator=generator)
    sums = ways.sum(dim=-1).exp().cumsum(dim=-1)[way, prompt]  # [B, 63], up to 1
    places = torch.rand(len(group), 1, generator=generator, dtype=torch.float64)
    response = torch.searchsorted(sums, places * sums[:, -1:]).squeeze(1)
    return Batch(prompt, response, group, ways[way, prompt, response])


@dataclass(frozen=True)
class Setup:
    """What is trained.

    objective: the product's. sampler_cap: truncation of the weight (trainer)/(sampler) of a response; None: no such
    weight. rewards_of_sampler: a power reward is made of the writers' log-probs in place of the policy's.
    """

    objective: Objective
    sampler_cap: float | None = None
    rewards_of_sampler: bool = False


def loss_of(setup: Setup, base: Tensor, current: Tensor, batch: Batch, log_z: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of a batch as `training/loss.py` puts it together, S_old being the writers'; and the mean weight.

    base, current: [P, 63, 6] token log-probs, of which `current` has the gradient. log_z: [P], of a learned head.
    """
    log_probs = current[batch.prompt, batch.response]
    n, old = LENGTHS[batch.response], batch.writer_log_probs.sum(dim=1)
    sampler = torch.ones_like(n)
    if setup.sampler_cap is not None:
        sampler = sampler_weight(log_probs.sum(dim=1), old, n, ratio="seq", cap=setup.sampler_cap).weight
    ref = base[batch.prompt, batch.response]
    if isinstance(setup.objective, BalanceObjective):
        return _balance_loss(setup.objective, log_probs, ref, batch, sampler, log_z)
    assert isinstance(setup.objective, PolicyGradientObjective)
    return _gradient_loss(setup, setup.objective, log_probs, ref, batch, sampler), sampler.mean()


def _importance(rule: ImportanceRule, sequence: Tensor, old: Tensor, n: Tensor) -> Tensor:
    settings = {"ratio": rule.ratio, "clip_epsilon": rule.epsilon, "upper_only": rule.upper_only}
    return importance_weight(sequence, old, n, **settings).weight


def _partial(objective: BalanceObjective, sequence: Tensor, ref_sequence: Tensor, n: Tensor) -> Tensor:
    norms = {"policy_norm": objective.form.policy_norm, "reference_norm": objective.form.reference_norm}
    return partial_residual(sequence, ref_sequence, n, torch.zeros_like(n), objective.alpha, **norms)


def _balance_loss(
    objective: BalanceObjective, log_probs: Tensor, ref: Tensor, batch: Batch, sampler: Tensor, log_z: Tensor | None
) -> tuple[Tensor, Tensor]:
    n, mask, sequence = LENGTHS[batch.response], MASK[batch.response], log_probs.sum(dim=1)
    partial, kept = _partial(objective, sequence, ref.sum(dim=1), n), torch.ones_like(n, dtype=torch.bool)
    weight = sampler * _importance(objective.importance, sequence, batch.writer_log_probs.sum(dim=1), n)
    if objective.form.weight == "length":
        weight = weight * n
    if log_z is not None:
        estimate = log_z[batch.prompt]
    elif objective.log_z == "contrastive":
        estimate, factor = contrastive_log_z(partial, batch.group, weight, kept)
        weight = weight * factor
    else:
        estimate = ESTIMATES[objective.log_z](partial, batch.group, weight, kept)
    spread = token_spread(log_probs, ref, mask, objective.alpha) if objective.form.per_token else 0.0
    return balance_loss(partial, estimate, weight, kept, len(n), spread).loss, weight.mean()


def _gradient_loss(
    setup: Setup, objective: PolicyGradientObjective, log_probs: Tensor, ref: Tensor, batch: Batch, sampler: Tensor
) -> Tensor:
    n, kept = LENGTHS[batch.response], torch.ones_like(batch.group, dtype=torch.bool)
    if objective.form.powers:
        scored = batch.writer_log_probs if setup.rewards_of_sampler else log_probs
        norm = "length" if objective.form.per_length else "none"
        assert objective.alpha is not None
        reward = power_reward(scored.sum(dim=1), ref.sum(dim=1), n, torch.zeros_like(n), objective.alpha, norm)
    else:
        reward = REWARDS[objective.form.reward](batch)
    advantage = group_advantage(reward, batch.group, kept, divide_by_std=objective.form.divide_by_std)
    terms = surrogate_terms(
        log_probs,
        batch.writer_log_probs,
        MASK[batch.response],
        advantage,
        n,
        ratio=objective.importance.ratio,
        score_norm=objective.form.score_norm,
        clip_epsilon=objective.importance.epsilon,
    ).terms
    return (sampler * terms).mean()


# The answer of a response is its first symbol; that without a symbol has none. The right one is symbol 1.
ANSWERS = [str(response[0]) if response[0] != EOS else None for response in RESPONSES]
RIGHT = torch.tensor([answer == "1" for answer in ANSWERS])


def _of_answers(reward: Callable[[Sequence[str | None]], list[float]]) -> Callable[[Batch], Tensor]:
    """The product's reward of a group's answers, for every group of a batch."""

    def of_batch(batch: Batch) -> Tensor:
        size = int((batch.group == 0).sum())
        groups = batch.response.reshape(-1, size).tolist()
        rewards = [value for members in groups for value in reward([ANSWERS[response] for response in members])]
        return torch.tensor(rewards, dtype=torch.float64)

    return of_batch


REWARDS: dict[str, Callable[[Batch], Tensor]] = {
    "gold": lambda batch: RIGHT[batch.response].double(),
    "cluster": _of_answers(cluster_reward),
    "majority": _of_answers(majority_reward),
}


class LearnedLogZ:
    """The product's head for prompts whose states are drawn; in fp32, as there."""

    def __init__(self, num_prompts: int, kind: str) -> None:
        self.states = torch.randn(num_prompts, 16, generator=torch.Generator().manual_seed(0))
        self.head = LogZHead(16, kind=kind, detach=True, seed=0)
        self.head.rate = LOG_Z_RATE

    def start(self, setup: Setup, base: Tensor, current: Tensor, batch: Batch) -> None:
        objective = setup.objective
        assert isinstance(objective, BalanceObjective)
        n, kept = LENGTHS[batch.response], torch.ones_like(batch.group, dtype=torch.bool)
        sequence, ref = (each[batch.prompt, batch.response].sum(dim=1) for each in (current.detach(), base))
        weight = n if objective.form.weight == "length" else torch.ones_like(n)
        self.head.calibrate(initial_log_z(_partial(objective, sequence, ref, n), weight, kept))
        if self.head.kind == "mlp":
            self.head.centre(self.states[batch.prompt], lambda values: values.double().mean(dim=0))

    def __call__(self) -> Tensor:
        self.head.zero_grad()
        return self.head(self.states).double()


@dataclass(frozen=True)
class Training:
    """lr: Adam's; it falls to 0 over the steps as a cosine. tied: prefixes share rows of the table (`TIED`), so the
    optimum is out of reach; the start is then the mean of the base's rows."""

    steps: int = 800
    lr: float = 0.07
    groups_per_prompt: int = 4
    group_size: int = 8
    seed: int = 0
    tied: bool = False


class Course(NamedTuple):
    """Before each step and after the last: distances, the largest total variation over the prompts, and history,
    [P, 63, 6] token log-probs; and [P] of a learned log Z' at the end."""

    distances: list[float]
    history: list[Tensor]
    log_z: Tensor | None

    @property
    def end(self) -> Tensor:
        """[P, 63] log-probs of the responses."""
        return self.history[-1].sum(dim=-1)

    def first_within(self, bound: float) -> int | None:
        """The step from which on the distance stays within a bound; None: it does not."""
        outside = [step for step, distance in enumerate(self.distances) if not distance <= bound]
        if not outside:
            return 0
        return outside[-1] + 1 if outside[-1] + 1 < len(self.distances) else None


def train(setup: Setup, base_logits: Tensor, targets: Tensor, lag: str, training: Training) -> Course:
    """Train tables from the base. base_logits: [P, 31, 3]; targets: [P, 63] log-probs."""
    generator = torch.Generator().manual_seed(training.seed)
    base = token_log_probs(base_logits)
    logits = (tied_mean(base_logits) if training.tied else base_logits.clone()).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=training.lr, betas=(0.9, 0.95))
    learned = None
    if isinstance(setup.objective, BalanceObjective) and setup.objective.learns_log_z:
        learned = LearnedLogZ(len(base), setup.objective.log_z)
    history: list[Tensor] = []
    for step in range(training.steps):
        current = token_log_probs(logits[:, TIED] if training.tied else logits)
        history.append(current.detach())
        batch = draw(writers(history, lag), training.groups_per_prompt, training.group_size, generator)
        if learned is not None and step == 0:
            learned.start(setup, base, current, batch)
        loss, mean_weight = loss_of(setup, base, current, batch, learned() if learned else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = training.lr * 0.5 * (1.0 + math.cos(math.pi * step / training.steps))
        optimizer.step()
        if learned is not None:
            learned.head.step(float(mean_weight))
    history.append(token_log_probs((logits[:, TIED] if training.tied else logits).detach()))
    log_z = None if learned is None else learned().detach()
    distances = [float(total_variation(each.sum(dim=-1), targets).max()) for each in history]
    return Course(distances, history, log_z)
