"""Which runs are seeds of one arm, and what is an arm called?

Runs are seeds of one arm when their configs differ in nothing but run.seed, what a run is called or where it writes,
and how far it goes. An evaluation without a run is an arm too: a policy that was measured and not trained.

Left out: drawing. Labels are text for people and may hold anything; whoever shows them escapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from megatron_powerflow.errors import UserError
from megatron_powerflow.report.reading import visible
from megatron_powerflow.report.runs import Evaluation, EvaluationFile, Run, natural
from megatron_powerflow.report.seeds import Estimate, estimate

# Where and how long a run goes, how it is watched and saved: none of it makes another arm.
SAME_ARM_KEYS = ("run.seed", "run.output_dir", "run.num_steps", "run.name", "run.export", "rollout.save")
SAME_ARM_SECTIONS = ("checkpoint", "metrics")
# What an arm is called by, most telling first, then every other key in the config's order.
FIRST_KEYS = ("objective.preset", "objective.alpha", "objective.log_z", "optimizer.lr", "objective.ratio")
WORDS = {
    "objective.preset": "{}",
    "objective.alpha": "α={}",
    "objective.log_z": "log Z′ {}",
    "rollout.max_response_tokens": "cap={}",
    "rollout.temperature": "T={}",
    "model.hf_path": "{}",
}
MAX_LABEL = 60
FOLDERS_OF_EXPORTS = ("hf_export", "hf", "latest", "checkpoints")


@dataclass(frozen=True, slots=True)
class Arm:
    """An arm is the seeds of one configuration. Example: label "la_tb α=4", three members with seeds 0, 1, 2."""

    label: str
    members: tuple[Run, ...]

    @property
    def trained(self) -> bool:
        """Whether the arm was trained; if not it was only evaluated, and is drawn as a point or a level line."""
        return self.members[0].config is not None

    def config(self, key: str) -> str | None:
        """Return the text of a config key; None where the arm has no such key or was not trained."""
        return (self.members[0].config or {}).get(key)

    def metric(self, name: str) -> list[Mapping[int, float]]:
        """Return step -> value of a metric in metrics.jsonl, for each seed that has it."""
        return [run.metrics[name] for run in self.members if name in run.metrics]

    def evaluated(self, name: str) -> list[dict[int, float]]:
        """Return step -> value of a metric in evaluations.jsonl, for each seed that has it."""
        series = [{e.step: e.values[name] for e in run.evaluations if name in e.values} for run in self.members]
        return [points for points in series if points]

    def measured(self) -> list[EvaluationFile]:
        """Return the evaluation files of the policy itself, one per seed.

        All are on the data of RUN/evaluation where there is one, else on the data that comes first.
        """
        files = [file for run in self.members for file in run.files]
        own = [file for file in files if file.own]
        return self.files_on((own or files)[0].data) if files else []

    def files_on(self, data: str) -> list[EvaluationFile]:
        """Return one evaluation of each seed on `data`: RUN/evaluation, else the last by name, step_10 after step_9."""
        by_seed = [[file for file in run.files if file.data == data] for run in self.members]
        return [max(files, key=lambda file: (file.own, natural(file.where))) for files in by_seed if files]

    def point(self, name: str) -> Estimate | None:
        """Average a value over the files of `measured()`; None where no file has it."""
        return estimate_of([file.overall for file in self.measured()], name)


def estimate_of(evaluations: Sequence[Evaluation], name: str) -> Estimate | None:
    """Average one value over evaluations, one per seed; None where none has it."""
    measured_values = [e.values for e in evaluations if name in e.values]
    return estimate(
        [values[name] for values in measured_values], [values.get(f"{name}_se") for values in measured_values]
    )


def estimate_pass_at(evaluations: Sequence[Evaluation], k: int) -> Estimate | None:
    """Average pass@k over evaluations, one per seed; None where none has that k."""
    measured = [e for e in evaluations if k in e.pass_at]
    return estimate([e.pass_at[k] for e in measured], [e.pass_at_se.get(k) for e in measured])


def group_runs(runs: Sequence[Run]) -> list[Arm]:
    """Group runs into arms, in the order in which their first runs were given.

    Raises UserError when one arm has the same seed twice.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        members = groups.setdefault(_identity(run), [])
        same = [index for index, member in enumerate(members) if _other_data(member, run)]
        if same:
            members[same[0]] = replace(members[same[0]], files=(*members[same[0]].files, *run.files))
        else:
            members.append(run)
    twice = [
        f"{one.shown} and {other.shown}: the same configuration with the same seed {one.seed}; they are one "
        "measurement and not two seeds; give one of them"
        for members in groups.values()
        for index, one in enumerate(members)
        for other in members[index + 1 :]
        if one.seed == other.seed
    ]
    if twice:
        raise UserError(twice)
    by_arm = [tuple(sorted(group, key=lambda run: natural(run.seed))) for group in groups.values()]
    trained = [group for group in by_arm if group[0].config is not None]
    names = dict(zip(map(id, trained), _labels(trained), strict=True))
    labels = [names.get(id(group)) or _label_of_evaluation(group[0].files[0]) for group in by_arm]
    return [Arm(label, group) for label, group in zip(_unique(labels), by_arm, strict=True)]


def differing_keys(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys that make an arm and are not the same in all configs, most telling first."""
    keys = list(dict.fromkeys([*FIRST_KEYS, *(key for config in configs for key in config)]))
    return [key for key in keys if not _same_arm(key) and len({config.get(key) for config in configs}) > 1]


def short_name(path: str) -> str:
    """Shorten the path of a model or of data. Example: runs/mine/hf_export -> mine/hf_export."""
    parts = PurePath(path).parts
    long = len(parts) > 1 and (parts[-1] in FOLDERS_OF_EXPORTS or parts[-1].startswith("step_"))
    return "/".join(parts[-2:]) if long else (parts[-1] if parts else path)


def _same_arm(key: str) -> bool:
    return key in SAME_ARM_KEYS or key.split(".")[0] in SAME_ARM_SECTIONS


def _identity(run: Run) -> tuple:
    if run.config is None:
        return ("evaluated", run.files[0].model, run.files[0].temperature, run.files[0].num_responses)
    return ("trained", *sorted((key, value) for key, value in run.config.items() if not _same_arm(key)))


def _other_data(one: Run, other: Run) -> bool:
    """Whether two evaluations, from different folders, are of one policy and seed on different data: one member."""
    disjoint = not {file.data for file in one.files} & {file.data for file in other.files}
    return one.config is None and one.seed == other.seed and disjoint


def _labels(groups: Sequence[tuple[Run, ...]]) -> list[str]:
    """Label trained arms by the name that their runs were given, or by the fewest keys that tell the arms apart."""
    configs = [_config_of(group[0]) for group in groups]
    telling: list[str] = []
    for key in differing_keys(configs):
        if len({_values(c, [*telling, key]) for c in configs}) > len({_values(c, telling) for c in configs}):
            telling.append(key)
    telling = telling or ["objective.preset", "objective.alpha"]
    labels = []
    for group, config in zip(groups, configs, strict=True):
        names = {_config_of(run).get("run.name") for run in group}
        given = names.pop() if len(names) == 1 else None
        labels.append(given or " ".join(_word(key, config[key]) for key in telling if key in config) or group[0].shown)
    return labels


def _config_of(run: Run) -> Mapping[str, str]:
    assert run.config is not None, f"{run.shown} was not trained"
    return run.config


def _values(config: Mapping[str, str], keys: Sequence[str]) -> tuple:
    return tuple(config.get(key) for key in keys)


def _word(key: str, value: str) -> str:
    path = key.endswith(("_path", ".path"))
    return WORDS.get(key, key.split(".")[-1] + "={}").format(short_name(value) if path else value)


def _label_of_evaluation(file: EvaluationFile) -> str:
    name = short_name(file.model)
    return name if file.temperature is None else f"{name} T={file.temperature:g}"


def _unique(labels: Sequence[str]) -> list[str]:
    """Shorten labels, and give a label that is taken already a number."""
    taken: dict[str, None] = {}
    for label in labels:
        short = visible(" ".join(label.split()), 10**4).strip() or "?"
        short = short if len(short) <= MAX_LABEL else short[: MAX_LABEL - 1] + "…"
        candidate, number = short, 2
        while candidate in taken:
            candidate, number = f"{short} ({number})", number + 1
        taken[candidate] = None
    return list(taken)
