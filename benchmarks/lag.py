"""Where does training end on responses that older weights have written, at what cost, and what does it bear?

    python -m benchmarks.lag [--only optimum rivals others cost bounds tied] [--steps 800] [--seeds 3] [--alphas 2 4]

Tables over the 63 responses of `tests/toy_language.py`, two prompts at once, trained by the product's objective
functions on sampled responses (`tests/lagged_training.py` says what the lags are): 64 responses a step in groups of 8,
Adam at .07, which falls to 0 as a cosine. Distances are exact: the total variation of policy and optimum, the larger of
the two prompts'.

    optimum   la_tb for every log Z' and weight: the end, the worst of all seeds, and the steps to .05 and .01 (to stay)
    rivals    the same for rl_traj and rl_token, by rewards of the policy's log-probs, as ours are, and of the sampler's
    others    objectives without one such optimum: how far they end from where they end without lag
    cost      the gradient's variance against lag 0, from one table in mid-training; the share of effective responses
    bounds    the largest rate that still converges near the optimum, of the exact expected gradient, times its
              largest curvature: 2 where the lag has no say
    tied      a policy that cannot reach the optimum: how far from where it ends on its own responses

`frozen` is a sampler that never moves.

Left out: the seconds that lag saves; networks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_powerflow.objective.log_z_estimate import group_log_z
from megatron_powerflow.objective.objective import BalanceObjective, ImportanceRule, PolicyGradientObjective
from megatron_powerflow.objective.policy_gradient import power_reward
from megatron_powerflow.objective.presets import PRESETS
from megatron_powerflow.objective.trajectory_balance import balance_loss, partial_residual
from tests.lagged_training import LAGS, RIGHT, Course, Setup, Training, draw, loss_of, train, writers
from tests.toy_language import LENGTHS, logits_of, optimum, random_logits, token_log_probs, total_variation

PROMPTS = torch.stack([random_logits(3), random_logits(1)])  # [P, 31, 3], their bases
PROMPT_LOG_PROBS = token_log_probs(PROMPTS)
CLIP, CAP, NO_CAP = 0.2, 2.0, 1e9
WEIGHTS = {"none": ("none", None), "w": ("seq", None), "sampler": ("none", CAP)}  # objective.ratio, sampler's cap
RIVAL_WEIGHTS = {"none": ("none", None), "ratio=seq": ("seq", None), "sampler": ("none", CAP)}
SECTIONS = ("optimum", "rivals", "others", "cost", "bounds", "tied")


def rule_of(ratio: str) -> ImportanceRule:
    return ImportanceRule(ratio, CLIP if ratio != "none" else 0.0)


def balance(alpha: float, log_z: str, weight: tuple[str, float | None], preset: str = "la_tb") -> Setup:
    ratio, cap = weight
    return Setup(BalanceObjective(PRESETS[preset], alpha, log_z, rule_of(ratio)), cap)


def gradient(
    preset: str, alpha: float | None, weight: tuple[str, float | None], *, rewards_of_sampler: bool = False
) -> Setup:
    ratio, cap = weight
    return Setup(PolicyGradientObjective(PRESETS[preset], alpha, rule_of(ratio)), cap, rewards_of_sampler)


def targets_of(alpha: float, *, tilts: bool = True) -> Tensor:
    """[P, 63] log-probs."""
    return torch.stack([optimum(base, alpha, tilts=tilts) for base in PROMPT_LOG_PROBS.sum(dim=-1)])


def course_of(setup: Setup, targets: Tensor, lag: str, seeds: int, training: Training) -> Course:
    """Every seed is two more prompts with tables of their own, trained in the same steps."""
    return train(setup, PROMPTS.repeat(seeds, 1, 1), targets.repeat(seeds, 1), lag, training)


def ends_of(setup: Setup, targets: Tensor, lag: str, seeds: int, training: Training) -> Tensor:
    """[seeds, P, 63] log-probs."""
    return course_of(setup, targets, lag, seeds, training).end.unflatten(0, (seeds, len(PROMPTS)))


def cell(setup: Setup, targets: Tensor, lag: str, steps: int, seeds: int, lr: float = Training.lr) -> str:
    """The worst end over the seeds, and the steps from which on all are within .05 and .01; a dash: not all are."""
    course = course_of(setup, targets, lag, seeds, Training(steps=steps, lr=lr))
    within = [course.first_within(bound) for bound in (0.05, 0.01)]
    said = ["-" if step is None else str(step) for step in within]
    return f"{course.distances[-1]:.4f} {said[0]} {said[1]}"


def print_row(cells: Sequence[object]) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def print_head(names: Sequence[str]) -> None:
    print()
    print_row(names)
    print("|" + "---|" * len(names))


def print_optimum(alphas: Sequence[float], steps: int, seeds: int) -> None:
    print_head(["alpha", "log Z'", "weight", *LAGS])
    for alpha in alphas:
        targets = targets_of(alpha)
        for log_z in ("mlp", "group", "loo", "contrastive"):
            for name, weight in WEIGHTS.items():
                setup = balance(alpha, log_z, weight)
                cells = [cell(setup, targets, lag, steps, seeds) for lag in LAGS]
                print_row([alpha, log_z, name, *cells])


def print_rivals(alphas: Sequence[float], steps: int, seeds: int, lags: Sequence[str], lr: float) -> None:
    print_head(["alpha", "preset", "rewards of", "weight", *lags])
    for alpha in alphas:
        for preset in ("la_tb", "rl_traj", "rl_token"):
            targets = targets_of(alpha, tilts=preset != "rl_traj")
            for whose in ("policy", "sampler") if preset != "la_tb" else ("",):
                for name, weight in RIVAL_WEIGHTS.items():
                    setup = gradient(preset, alpha, weight, rewards_of_sampler=whose == "sampler") if whose else None
                    setup = setup or balance(alpha, "group", weight)
                    cells = [cell(setup, targets, lag, steps, seeds, lr) for lag in lags]
                    print_row([alpha, preset, whose, name, *cells])


def print_others(steps: int, seeds: int) -> None:
    lags = ("1", "4", "16", "frozen")
    print_head(["preset", "weight", "between seeds, lag 0", *(f"lag {lag} from lag 0" for lag in lags)])
    for preset in ("tb_token_step", "grpo", "empo", "ttrl"):
        for name, weight in {"none": ("none", None), "sampler": ("none", CAP)}.items():
            print_row([preset, name, *_from_lag_0(preset, weight, lags, steps, seeds)])


def _from_lag_0(
    preset: str, weight: tuple[str, float | None], lags: Sequence[str], steps: int, seeds: int
) -> list[str]:
    """Distances of ends, means over seeds: between seeds without lag, then of each lag from none; and for rewards of
    text the mean probability of answering "1" for each of the two prompts."""
    setup = balance(2.0, "group", weight, preset) if preset == "tb_token_step" else gradient(preset, None, weight)
    ends = {lag: ends_of(setup, targets_of(2.0), lag, seeds, Training(steps=steps)) for lag in ("0", *lags)}

    def apart(first: Tensor, second: Tensor) -> str:
        distance = total_variation(first, second).max(dim=1).values.mean()
        shares = first[:, :, RIGHT].exp().sum(dim=2).mean(dim=0).tolist()
        return f"{distance:.3f}" + ("" if preset == "tb_token_step" else f" ({shares[0]:.3f}, {shares[1]:.3f})")

    return [apart(ends["0"], ends["0"].roll(1, dims=0)), *(apart(ends[lag], ends["0"]) for lag in lags)]


def print_cost(alphas: Sequence[float], batches: int, step: int = 20) -> None:
    """At the table that la_tb has after some steps without lag."""
    lags = (*LAGS, "16", "frozen")
    print_head(["alpha", "log Z'", "weight", *lags])
    for alpha in alphas:
        course = course_of(balance(alpha, "group", WEIGHTS["none"]), targets_of(alpha), "0", 1, Training())
        history = course.history[: step + 1]
        table = torch.stack([logits_of(each) for each in history[-1].sum(dim=-1)])
        for log_z in ("scalar", "group", "loo", "contrastive"):
            for name, weight in (WEIGHTS | {"sampler, no cap": ("none", NO_CAP)}).items():
                setup = balance(alpha, log_z, weight)
                found = [_variance(setup, table, writers(history, lag), batches) for lag in lags]
                print_row([alpha, log_z, name, *(f"{variance / found[0]:.2f}" for variance in found)])
        effective = [_effective_share(table, writers(history, lag)) for lag in lags]
        print_row([alpha, "", "effective share", *(f"{share:.2f}" for share in effective)])


def _variance(setup: Setup, table: Tensor, ways: Tensor, batches: int) -> float:
    """Of the gradient of a batch: the sum of the variances of its numbers, over the squared length of its mean.

    A learned log Z' is the number at which the mean weighted residual is 0. The squared length is without bias.
    """
    generator, logits = torch.Generator().manual_seed(0), table.clone().requires_grad_()
    log_z = None
    if setup.objective.learns_log_z:
        log_z = _calibrated(setup, table, ways)
    found = []
    for _ in range(batches):
        batch = draw(ways, 4, 8, generator)
        loss, _ = loss_of(setup, PROMPT_LOG_PROBS, token_log_probs(logits), batch, log_z)
        found.append(torch.autograd.grad(loss, logits)[0].flatten())
    gradients = torch.stack(found)
    noise = gradients.var(dim=0).sum()
    return float(noise / (gradients.mean(dim=0).square().sum() - noise / batches))


def _calibrated(setup: Setup, table: Tensor, ways: Tensor) -> Tensor:
    """[P]: minus the mean of the residual without log Z' over many responses, weighted as the loss is."""
    log_z = torch.zeros(len(table), dtype=torch.float64, requires_grad=True)
    batch = draw(ways, 512, 8, torch.Generator().manual_seed(1))
    current = token_log_probs(table)
    slopes = []
    for value in (0.0, 1.0):  # the gradient by log Z' is linear in it
        loss, _ = loss_of(setup, PROMPT_LOG_PROBS, current, batch, log_z + value)
        slopes.append(torch.autograd.grad(loss, log_z)[0])
    return slopes[0] / (slopes[0] - slopes[1])


def _effective_share(table: Tensor, ways: Tensor) -> float:
    """1 / E[r^2] of the ratio r = (trainer)/(sampler) of a response, the smaller of the prompts."""
    policy, sampler = token_log_probs(table).sum(dim=-1), ways.sum(dim=-1)
    return float(1.0 / (2.0 * policy - sampler).exp().sum(dim=-1).mean(dim=0).max())


Gradient = Callable[[Tensor, Tensor], Tensor]  # ([31, 3] logits, [63] log-probs of the sampler) -> [31, 3]


def expected_gradient(kind: str, alpha: float, base: Tensor) -> Gradient:
    """The mean over all responses in place of a batch, groups without end. kind: la_tb, or rl_traj of whose rewards."""
    zero, one_group = torch.zeros_like(LENGTHS), torch.zeros(len(LENGTHS), dtype=torch.int64)
    every = torch.ones_like(one_group, dtype=torch.bool)

    def of(logits: Tensor, sampler: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        sequence, chance = token_log_probs(logits).sum(dim=-1), sampler.exp()
        if kind == "la_tb":
            partial = partial_residual(sequence, base, LENGTHS, zero, alpha)
            loss = balance_loss(partial, group_log_z(partial, one_group, chance, every), chance, every, 1.0).loss
        else:
            scored = sampler if kind.endswith("sampler") else sequence
            reward = power_reward(scored, base, LENGTHS, zero, alpha, "none")
            loss = -(chance * (reward - (chance * reward).sum()) * sequence).sum()
        return torch.autograd.grad(loss, logits)[0]

    return of


def largest_rate(gradient_of: Gradient, start: Tensor, best: Tensor, lag: int, guess: float) -> float:
    """By bisection from 0 to twice the guess: 500 steps from near the optimum must end nearer to it."""
    low, high = 0.0, 2.0 * guess
    begun = float(total_variation(token_log_probs(start).sum(dim=-1), best))
    for _ in range(10):
        rate, history = (low + high) / 2, [start]
        for _ in range(500):
            sampler = token_log_probs(history[max(len(history) - 1 - lag, 0)]).sum(dim=-1)
            history.append(history[-1] - rate * gradient_of(history[-1], sampler))
        ended = float(total_variation(token_log_probs(history[-1]).sum(dim=-1), best))
        low, high = (rate, high) if ended < begun else (low, rate)
    return low


def print_bounds(alphas: Sequence[float]) -> None:
    lags = (0, 1, 4, 16)
    print_head(["alpha", "objective", *(f"lag {lag}" for lag in lags)])
    base = PROMPT_LOG_PROBS[0].sum(dim=-1)
    for alpha in alphas:
        for kind in ("la_tb", "rl_traj, rewards of the policy", "rl_traj, rewards of the sampler"):
            best = optimum(base, alpha, tilts=kind == "la_tb")
            table, gradient_of = logits_of(best).log_softmax(dim=-1), expected_gradient(kind, alpha, base)
            curvature = largest_curvature(gradient_of, table, best, moves_sampler=kind.endswith("sampler"))
            start = table + 1e-4 * random_logits(9)
            rates = [largest_rate(gradient_of, start, best, lag, 2.0 / curvature) * curvature for lag in lags]
            print_row([alpha, kind, *(f"{rate:.2f}" for rate in rates)])
    print_row(["", "2 sin(pi / (4 lag + 2))", *(f"{2 * math.sin(math.pi / (4 * lag + 2)):.2f}" for lag in lags)])


def largest_curvature(gradient_of: Gradient, table: Tensor, best: Tensor, *, moves_sampler: bool) -> float:
    """The largest eigenvalue of the gradient's derivative at the optimum, by differences."""

    def at(shift: Tensor) -> Tensor:
        moved = table + shift.reshape(table.shape)
        return gradient_of(moved, token_log_probs(moved).sum(dim=-1) if moves_sampler else best).flatten()

    steps = 1e-6 * torch.eye(table.numel(), dtype=torch.float64)
    return float(torch.linalg.eigvals(torch.stack([at(e) - at(-e) for e in steps]) / 2e-6).real.max())


def print_tied(alphas: Sequence[float], steps: int, seeds: int) -> None:
    """Mean distances from the mean end without lag; that of its own seeds is the first."""
    lags, training = ("0", "1", "4", "16", "frozen"), Training(steps=steps, groups_per_prompt=32, tied=True)
    print_head(["alpha", "weight", "optimum from lag 0", *lags])
    for alpha in alphas:
        targets, own = targets_of(alpha), None
        for name, weight in (WEIGHTS | {"sampler, no cap": ("none", NO_CAP)}).items():
            ends = [ends_of(balance(alpha, "loo", weight), targets, lag, seeds, training) for lag in lags]
            own = ends[0].exp().mean(dim=0).log() if own is None else own
            apart = [total_variation(end, own).max(dim=1).values.mean() for end in ends]
            print_row([alpha, name, f"{total_variation(targets, own).max():.3f}", *(f"{value:.3f}" for value in apart)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alphas", type=float, nargs="+", default=(0.5, 2.0, 4.0))
    parser.add_argument("--lags", nargs="+", default=("0", "1", "4", "16", "frozen"), help="of the rivals")
    parser.add_argument("--lr", type=float, default=Training.lr, help="of the rivals")
    parser.add_argument("--batches", type=int, default=400, help="that a variance is taken of")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "optimum" in args.only:
        print_optimum(args.alphas, args.steps, args.seeds)
    if "rivals" in args.only:
        print_rivals(args.alphas, args.steps, args.seeds, args.lags, args.lr)
    if "others" in args.only:
        print_others(args.steps, args.seeds)
    if "cost" in args.only:
        print_cost(args.alphas, args.batches)
    if "bounds" in args.only:
        print_bounds(args.alphas)
    if "tied" in args.only:
        print_tied(args.alphas, args.steps, args.seeds)


if __name__ == "__main__":
    main()
