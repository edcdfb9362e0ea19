"""What came out? Two tables per group, means over seeds with standard errors, beside the exact optima.

    examined: after the last step, 64 responses to each of 100 held-out questions, read by the grammar
    course:   during training: best accuracy, the first step at which `length` rings, first collapse, the trap's margin

Left out: the pictures (`powerflow report`), what it means (README.md).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from examples.dual_nature import vocabulary as v
from examples.dual_nature.arms import Arm, Measured, Plan
from examples.dual_nature.corpus import MAX_RESPONSE_TOKENS, SETTINGS, Question
from examples.dual_nature.measure import Sample, describe
from examples.dual_nature.target import MARKED, PLAIN, Target, solve_power, solve_target, trap_margin
from megatron_powerflow.metrics.trap import trap_margin as loop_margin

# of `measure.describe`: column -> (name, decimals)
EXAMINED = {
    "accuracy": ("accuracy", 3),
    "minus": ("accuracy_marked", 3),
    "majority@64": ("majority@64", 3),
    "minus majority": ("majority@64_marked", 2),
    "pass@64": ("pass@64", 3),
    "tokens": ("mean_tokens", 1),
    "nats": ("entropy", 1),
    "direct": ("direct", 3),
    "loop": ("filler", 3),
    "cut": ("truncated", 3),
    "grammatical": ("grammatical", 3),
    "word nats": ("word_entropy", 2),
    "distinct of 64": ("distinct", 2),
}
# counted by the study and by `powerflow evaluate`: name there, and how far they may be apart. Of gibberish they read
# different things: to the product \\boxed{ +5 } is 5, and a <pad> that was sampled leaves nothing in a text.
TWICE = {
    "accuracy": ("avg", 0.005),
    "truncated": ("truncated_fraction", 1e-9),
    "mean_tokens": ("response_length_mean", 0.5),
}
COLLAPSED = 0.1  # truncated share of a step's responses
SETTLING = (20, 60)  # steps over which the trap's margin is taken: after the start's noise, before any collapse


def write_results(out: Path, group: str, plan: Plan) -> str:
    """OUT/results_GROUP.md and .json; returns the Markdown. plan: that of the group."""
    arms, measured = plan.arms, plan.measured
    examined = {arm.name: [_examined(out / arm.name)] for arm in measured}
    examined |= {
        arm.name: [_examined(out / f"{arm.name}_s{seed}" / "evaluation") for seed in range(arm.num_seeds)]
        for arm in arms
    }
    courses = {arm.name: [_course(out / f"{arm.name}_s{seed}", arm) for seed in range(arm.num_seeds)] for arm in arms}
    (out / f"results_{group}.json").write_text(json.dumps({"examined": examined, "course": courses}, indent=1) + "\n")
    text = "\n".join([f"## {group}", "", *_examined_table(measured, arms, examined), "", *_course_table(arms, courses)])
    (out / f"results_{group}.md").write_text(text + "\n", encoding="utf-8")
    return text


def read_samples(folder: Path) -> list[list[Sample]]:
    """The responses of an evaluation, by question. Their texts are the tokens, special ones left out."""
    with (folder / "responses.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [
        [
            Sample(
                Question.named(name),
                (*map(v.TOKEN_OF.__getitem__, line["text"].split()), *[v.EOS] * (line["finish_reason"] == "eos")),
                line["sequence_log_prob"],
            )
            for line in members
        ]
        for name, members in groupby(lines, key=lambda line: line["id"])
    ]


def _examined(folder: Path) -> dict[str, float]:
    samples = read_samples(folder)
    figures = describe(samples) | {"marked_share": statistics.fmean(group[0].question.marked for group in samples)}
    counted = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["all"]
    for ours, (theirs, tolerance) in TWICE.items():
        if abs(figures[ours] - counted[theirs]) > tolerance:
            raise AssertionError(f"{folder}: {ours} is {figures[ours]} here and {counted[theirs]} in evaluation.json")
    return figures


def _course(folder: Path, arm: Arm) -> dict[str, float | None]:
    """Steps are counted from 1, as in what training prints; None: never."""
    metrics = _lines(folder / "metrics.jsonl")
    evaluations = _lines(folder / "evaluations.jsonl")
    best = max(evaluations, key=lambda line: line["accuracy"])
    return {
        "best": best["accuracy"],
        "best_step": best["step"],
        "last": evaluations[-1]["accuracy"],
        "steps": len(metrics),
        "alarm": _first(metrics, lambda line: line["alarm_length"] > 0),
        "collapse": _first(metrics, lambda line: line["truncated_fraction"] > COLLAPSED),
        "margin": settled_margin(metrics, arm),
    }


def settled_margin(metrics: Sequence[dict], arm: Arm) -> float | None:
    """The median over the settling steps of the margin at each step's alpha and lambda; None without a loop.

    A sharpened policy's responses hardly loop, and what a loop costs the base model does not change: its nats are
    medians over all steps up to then.
    """
    loops = [line for line in metrics[: SETTLING[1]] if "trap_loop_nats" in line]
    tilts = [line for line in metrics[slice(*SETTLING)] if "trap_lambda" in line]
    if not loops or not tilts:
        return None
    nats, entry = (statistics.median(line[name] for line in loops) for name in ("trap_loop_nats", "trap_entry_nats"))
    return statistics.median(
        loop_margin(
            nats,
            entry,
            alpha=line["alpha"],
            tilt=-line["trap_lambda"],
            max_response_tokens=arm.limit,
            tilt_cap=arm.tilt_cap,
        )
        for line in tilts
    )


def _first(lines: Sequence[dict], holds: Callable[[dict], bool]) -> int | None:
    return next((line["step"] + 1 for line in lines if holds(line)), None)


def _examined_table(measured: Sequence[Measured], arms: Sequence[Arm], examined: dict[str, list[dict]]) -> list[str]:
    """Rows of arms, and the exact optima of their bases for as many questions with a minus as were asked."""
    rows = [["arm", "steps", *EXAMINED], ["---"] * (len(EXAMINED) + 2)]
    for arm in [*measured, *arms]:
        found, steps = examined[arm.name], str(arm.num_steps) if isinstance(arm, Arm) else "-"
        cells = [_cell([figures.get(name) for figures in found], decimals) for name, decimals in EXAMINED.values()]
        rows.append([arm.name, steps, *cells])
    share = next(iter(examined.values()))[0]["marked_share"]
    optima = {
        (arm.base, arm.alpha, arm.tilt_cap): None for arm in arms if arm.tilted and arm.limit == MAX_RESPONSE_TOKENS
    }
    for base, alpha, cap in optima:
        setting = SETTINGS[base]
        exact = [solve_target(question, setting, alpha, tilt_cap=cap) for question in (PLAIN, MARKED)]
        capped = "" if cap is None else f", tilt cap {cap}"
        rows.append([f"p* of {base}, alpha {alpha:g}{capped}", "exact", *_exact_cells(*exact, share)])
    for base, alpha in {(arm.base, arm.alpha): None for arm in arms if arm.untilted}:
        exact = [solve_power(question, SETTINGS[base], alpha) for question in (PLAIN, MARKED)]
        rows.append([f"p^{alpha:g} of {base}", "exact", *_exact_cells(*exact, share)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _exact_cells(plain: Target, marked: Target, share: float) -> list[str]:
    """share: of the questions that have a minus."""

    def both(name: str) -> float:
        return (1 - share) * getattr(plain, name) + share * getattr(marked, name)

    exact = {
        "accuracy": both("accuracy"),
        "minus": marked.accuracy,
        "tokens": both("mean_tokens"),
        "nats": both("entropy"),
        "direct": both("direct_share"),
        "loop": both("filler_share"),
    }
    return [f"{exact[column]:.{decimals}f}" if column in exact else "" for column, (_, decimals) in EXAMINED.items()]


def _course_table(arms: Sequence[Arm], courses: dict[str, list[dict]]) -> list[str]:
    columns = ("arm", "best accuracy", "at step", "last", "alarm", f"cut > {COLLAPSED:g}", "margin", "margin, exact")
    rows = [list(columns), ["---"] * len(columns)]
    for arm in arms:
        found = courses[arm.name]
        rows.append(
            [
                f"{arm.name} ({', '.join(dict.fromkeys(str(course['steps']) for course in found))} steps)",
                _cell([course["best"] for course in found], 3),
                _steps(found, "best_step"),
                _cell([course["last"] for course in found], 3),
                _steps(found, "alarm"),
                _steps(found, "collapse"),
                _cell([course["margin"] for course in found], 1),
                _margin(arm),
            ]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def _margin(arm: Arm) -> str:
    if not arm.tilted:
        return "-"
    return f"{trap_margin(SETTINGS[arm.base], arm.alpha, limit=arm.limit, tilt_cap=arm.tilt_cap):+.1f}"


def _cell(values: Sequence[float | None], decimals: int) -> str:
    """Mean and its standard error over seeds; of those that have a value, if not all do."""
    having = [value for value in values if value is not None]
    if not having:
        return "-"
    text = f"{statistics.fmean(having):.{decimals}f}"
    if len(having) > 1:
        text += f" ± {statistics.stdev(having) / len(having) ** 0.5:.{decimals}f}"
    return text if len(having) == len(values) else f"{text} ({len(having)} of {len(values)})"


def _steps(courses: Sequence[dict], name: str) -> str:
    return ", ".join("-" if course[name] is None else str(course[name]) for course in courses)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
