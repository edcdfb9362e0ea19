"""What did training do to the policy? Two lines of evaluations.jsonl, of the same prompts and random numbers, compared.

The comparison is paired by prompt: the standard error of a mean difference is that of the prompts' differences, so that
what a prompt gives to both lines (it is easy, or long) cancels.

Left out: printing (`change_table`), the picture (`report/change_picture.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from megatron_powerflow.metrics.counts import mean, standard_error
from megatron_powerflow.metrics.names import label

# the keys of `by_prompt` that are compared
QUANTITIES = ("ref_log_prob_mean", "policy_entropy", "distinct_2", "response_length_mean")


@dataclass(frozen=True)
class Change:
    """Holds one quantity before and after training.

    before, after: one number per prompt, in the same order; at least two prompts.
    """

    name: str
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Returns the mean over prompts of after - before."""
        difference = mean(self.differences)
        assert difference is not None, "at least two prompts"
        return difference

    @property
    def error(self) -> float:
        """Returns the standard error of `difference`, over prompts."""
        error = standard_error(self.differences)
        assert error is not None, "at least two prompts"
        return error

    @property
    def differences(self) -> list[float]:
        """Returns after - before of each prompt."""
        return [after - before for before, after in zip(self.before, self.after, strict=True)]


@dataclass(frozen=True)
class Changes:
    """Holds every quantity of a run before and after training.

    first, last: the two lines of evaluations.jsonl that are compared.
    """

    first: Mapping[str, Any]
    last: Mapping[str, Any]
    quantities: tuple[Change, ...]


def changes_of(lines: Sequence[Mapping[str, Any]]) -> Changes | None:
    """Compares the first and the last of `lines`, which are those of evaluations.jsonl, oldest first.

    Returns None where there are not two lines about the same prompts (at least two of them), as in a run whose
    evaluation prompts were changed on the way.
    """
    if len(lines) < 2 or not all(_comparable(line) for line in (lines[0], lines[-1])):
        return None
    first, last = lines[0], lines[-1]
    if first["by_prompt"]["id"] != last["by_prompt"]["id"] or last["num_prompts"] < 2:
        return None
    return Changes(
        first,
        last,
        tuple(Change(name, tuple(first["by_prompt"][name]), tuple(last["by_prompt"][name])) for name in QUANTITIES),
    )


def _comparable(line: Mapping[str, Any]) -> bool:
    """Whether the line has a number per prompt for each quantity; lines of older versions have not."""
    by_prompt = line.get("by_prompt")
    return isinstance(by_prompt, Mapping) and all(
        isinstance(by_prompt.get(name), list) and len(by_prompt[name]) == line["num_prompts"]
        for name in ("id", *QUANTITIES)
    )


def change_table(changes: Changes, alpha: float | None) -> Table:
    """Returns the table for the console: before, after and the difference +- its standard error, for each quantity.

    The realised alpha comes with its 95 % interval. alpha: the target's, for the title; None where there is none.
    """
    first, last = changes.first, changes.last
    target_alpha = "" if alpha is None else f", alpha {alpha:g}"
    responses = f"{last['num_prompts']} held-out prompts x {last['num_responses']} responses"
    table = Table(title=f"means of {responses}, same random numbers{target_alpha}", title_justify="left")
    for column in ("", f"step {first['step']}", f"step {last['step']}", "difference"):
        # where there is little room names take two lines; a number cut short says nothing
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    for change in changes.quantities:
        table.add_row(
            label(change.name),
            f"{mean(change.before):.3f}",
            f"{mean(change.after):.3f}",
            f"{change.difference:+.3f} +- {change.error:.3f}",
        )
    if "alpha_realised" in last:
        table.add_row("realised alpha [95 %]", _realised(first), _realised(last), "")
    return table


def _realised(line: Mapping[str, Any]) -> str:
    if "alpha_realised" not in line:
        return ""
    text = f"{line['alpha_realised']:.2f}"
    if "alpha_realised_low" in line and line["step"]:
        text += f" [{line['alpha_realised_low']:.2f}, {line['alpha_realised_high']:.2f}]"
    return text
