"""Does a run survive SIGKILL at any moment, of any rank, in any layout? Kills it, starts it again, and compares.

    python -m tests.kill_storm.run --kills 200                     over all layouts, some 20 minutes on 2 cores
    python -m tests.kill_storm.run --kills 20 --layouts tp2 --set checkpoint.asynchronous=true --json out.json

Each layout trains once without a kill. Then a run of the same config is killed at random moments, from its first import
to its export, and started again by the same command, until as many ranks were killed as asked for; a run that comes to
its end meanwhile is compared with the first one, and a new one begins. Compared bit by bit: weights, the moments of the
optimizer, the log Z' head, metrics but for times, saved rollouts, samples. Counted: lines lost or doubled, ranks alive
60 seconds after a kill, processes left behind. What `powerflow goodput` says of the runs is compared with a clock and a
count of our own: seconds within 1 % and a fifth of a second a run, in which a process ends after its last line; lost
steps to the step. Exit code 1: any of it was not so.

Left out: how ranks are started (`ranks.py`); kills of a whole node, which are those of all its ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.kill_storm.ranks import Ranks, warm_up

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one_process": (1, ()),
    "tp2": (2, ("parallel.tp=2",)),
    "pp2": (2, ("parallel.pp=2",)),
    "dp2": (2, ("optimizer.distributed=true",)),
    "cp2": (
        2,
        ("parallel.cp=2", "parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=64"),
    ),
}
NUM_STEPS = 6
SURVIVORS_AFTER_SECONDS = 60.0
ENDING_SECONDS = 0.2
UNEQUAL_BY_NATURE = ("_seconds", "tokens_per_second", "peak_memory_bytes")
MOST_STARTS_IN_A_ROW = 60  # without a run that ends: then it makes no progress


@dataclass
class Verdict:
    """What one layout went through."""

    layout: str
    kills: int = 0
    starts: int = 0
    finished: int = 0
    phases: Counter = field(default_factory=Counter)  # of the killed rank: how often
    while_saving: int = 0  # kills while a checkpoint was being written, in whatever phase
    survivors: int = 0  # ranks alive 60 s after a kill
    ended_by_launcher: int = 0  # ranks whose peer was killed before it had come to their meeting
    slowest_end_seconds: float = 0.0  # from a kill to the end of the last rank
    orphans: Counter = field(default_factory=Counter)  # processes left behind: their command lines
    stacks: list[str] = field(default_factory=list)  # of survivors
    seconds: float = 0.0
    wall_seconds: float = 0.0  # of the runs that ended, from their first start to their last end, by our clock
    goodput_seconds: float = 0.0  # the same, as `powerflow goodput` sums it up
    productive_seconds: float = 0.0  # of these
    lost_steps: int = 0  # that were done again, by comparing metrics.jsonl before and after each start
    goodput_lost_steps: int = 0
    differences: list[str] = field(default_factory=list)

    def is_clean(self) -> bool:
        """Tell whether nothing was lost, doubled, changed or left behind, and goodput has told it so."""
        goodput_is_right = (
            abs(self.goodput_seconds - self.wall_seconds) <= 0.01 * self.wall_seconds + ENDING_SECONDS * self.finished
            and self.goodput_lost_steps == self.lost_steps
        )
        return self.finished > 0 and goodput_is_right and not (self.survivors or self.orphans or self.differences)


@dataclass
class Outside:
    """What our own clock and count say of one run, over its starts."""

    began: float | None = None
    ended: float = 0.0
    lost_steps: int = 0
    metrics: list[bytes] = field(default_factory=list)  # whole lines, as the start before left them

    def note(self, run: Path, began: float, ended: float) -> None:
        """Note a start. One that was killed before it could write of itself is none of the run's yet."""
        if self.began is None and (run / "events.jsonl").exists():
            self.began = began
        self.ended = ended
        path = run / "metrics.jsonl"
        *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
        kept = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(lines, self.metrics, strict=False))
        self.lost_steps += len(self.metrics) - len([*kept])
        self.metrics = lines


def storm(layout: str, kills: int, folder: Path, settings: Sequence[str], seed: int) -> Verdict:
    """Kill runs of a layout `kills` times. folder: an empty one, which holds the logs of what went wrong afterwards."""
    start = time.monotonic()
    num_ranks, of_layout = LAYOUTS[layout]
    draw = random.Random(f"{seed} {layout}")
    config = write_inputs(folder)
    verdict = Verdict(layout)
    whole = folder / "whole"
    arguments = ["train", str(config), *of_layout, *settings]
    ranks = Ranks([*arguments, f"run.output_dir={whole}"], num_ranks, folder / "whole.log")
    left = ranks.wait(300)
    unbroken_seconds = time.monotonic() - ranks.started
    if left or set(ranks.exit_codes.values()) != {0}:
        ranks.end()
        raise RuntimeError(
            f"{layout}: the run without kills did not end well: {(folder / 'whole.log').read_text()[-2000:]}"
        )
    number = in_a_row = 0
    outside = Outside()
    while True:
        run, log = folder / f"run_{number}", folder / f"run_{number}.log"
        is_last = verdict.kills >= kills
        had_come = True
        verdict.starts += 1
        ranks = Ranks([*arguments, f"run.output_dir={run}"], num_ranks, log)
        if not is_last:
            had_come = _kill_one(ranks, draw, unbroken_seconds, run, verdict)
        if not had_come:
            verdict.ended_by_launcher += ranks.end_as_a_launcher()
        codes = _wait_for_the_end(ranks, verdict, 300 if is_last else SURVIVORS_AFTER_SECONDS)
        outside.note(run, ranks.started, ranks.ended)
        in_a_row += 1
        if set(codes) == {0}:
            verdict.finished, in_a_row = verdict.finished + 1, 0
            found = differences(whole, run)
            _compare_goodput(run, outside, verdict)
            outside = Outside()
            verdict.differences += [f"{run.name}: {text}" for text in found]
            if not found:
                shutil.rmtree(run)
            number += 1
            if is_last:
                break
        elif is_last or in_a_row > MOST_STARTS_IN_A_ROW:
            tail = log.read_text(errors="replace")[-2000:]
            verdict.differences.append(f"{run.name}: does not come to its end; exit codes {codes}; {tail}")
            break
    verdict.seconds = time.monotonic() - start
    return verdict


def _compare_goodput(run: Path, outside: Outside, verdict: Verdict) -> None:
    """Add what `powerflow goodput` says of a run that has ended, and what we know of it."""
    from megatron_powerflow.report.goodput_table import goodput_json, read_all

    told = goodput_json(read_all({run: False}, [])[run])
    assert outside.began is not None
    verdict.wall_seconds += outside.ended - outside.began
    verdict.goodput_seconds += told["wall_seconds"]
    verdict.productive_seconds += told["seconds"]["productive"]
    verdict.lost_steps += outside.lost_steps
    verdict.goodput_lost_steps += told["num_steps_lost"]


def _kill_one(ranks: Ranks, draw: random.Random, unbroken_seconds: float, run: Path, verdict: Verdict) -> bool:
    """Kill a random rank at a random moment, unless the run ends before. Returns whether all ranks had met: a rank that
    nobody knows is nobody's to miss, but the launcher's that has started it."""
    moment = draw.uniform(0.0, unbroken_seconds * 1.05)
    rank = draw.randrange(len(ranks.pids))
    while (left := moment - (time.monotonic() - ranks.started)) > 0 and ranks.alive():
        time.sleep(min(left, 0.05))
    phase, had_met, saving = ranks.phase(rank), ranks.have_met(but=rank), is_saving(run, ranks.started_at)
    killed = ranks.kill(rank)
    if killed:
        verdict.kills += 1
        verdict.phases[phase if had_met else "starting"] += 1
        verdict.while_saving += saving
    return had_met or not killed


def _wait_for_the_end(ranks: Ranks, verdict: Verdict, seconds: float) -> list[int]:
    """Wait until all ranks have ended by themselves; count those that have not, and what they left. Returns their
    exit codes, by rank."""
    begun = time.monotonic()
    survivors = ranks.wait(seconds)
    verdict.survivors += len(survivors)
    if survivors:
        verdict.stacks.append(ranks.stacks())
    verdict.slowest_end_seconds = max(verdict.slowest_end_seconds, time.monotonic() - begun)
    until = time.monotonic() + 5
    while (orphans := ranks.orphans()) and time.monotonic() < until:
        time.sleep(0.05)
    verdict.orphans.update(command[:100] for command in orphans.values())
    ranks.end()
    return [ranks.exit_codes[rank] for rank in sorted(ranks.exit_codes)]


def is_saving(run: Path, since: float) -> bool:
    """Tell whether a checkpoint is being written. since: when this start began, since 1970."""
    with contextlib.suppress(FileNotFoundError):  # it has just got its name
        return any(path.stat().st_mtime >= since for path in run.glob("checkpoints/*.partial"))
    return True


def differences(whole: Path, run: Path) -> list[str]:
    """Return in what a run that was killed differs from one that was not."""
    found = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = _lines(run / name), _lines(whole / name)
        if [line.get("step") for line in ours] != [line.get("step") for line in theirs]:
            found.append(
                f"{name}: steps {[line.get('step') for line in ours]}, not {[line.get('step') for line in theirs]}"
            )
        found += [
            f"{name}: step {ours_.get('step')} differs"
            for ours_, theirs_ in zip(ours, theirs, strict=False)
            if ours_ != theirs_
        ]
    for pattern in (
        "rollouts/*",
        "hf_export/*.safetensors",
        "checkpoints/latest",
        "checkpoints/step_*/log_z_head.safetensors",
    ):
        ours_files = {path.relative_to(run): path.read_bytes() for path in sorted(run.glob(pattern)) if path.is_file()}
        theirs_files = {
            path.relative_to(whole): path.read_bytes() for path in sorted(whole.glob(pattern)) if path.is_file()
        }
        if ours_files.keys() != theirs_files.keys():
            found.append(f"{pattern}: {sorted(map(str, ours_files.keys() ^ theirs_files.keys()))} on one side only")
        found += [
            f"{path}: differs" for path, content in ours_files.items() if theirs_files.get(path, content) != content
        ]
    return found + _state_differences(whole, run)


def _lines(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(UNEQUAL_BY_NATURE)} for line in lines]


def _state_differences(whole: Path, run: Path) -> list[str]:
    """Compare every tensor of the last checkpoint: weights, fp32 main weights, the optimizer's moments."""
    ours, theirs = _state(run), _state(whole)
    found = [f"checkpoint: {name} on one side only" for name in sorted(ours.keys() ^ theirs.keys())]
    return found + [
        f"checkpoint: {name} differs"
        for name in sorted(ours.keys() & theirs.keys())
        if not ours[name].equal(theirs[name])
    ]


def _state(run: Path) -> dict:
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    name = (run / "checkpoints" / "latest").read_text().strip()
    state: dict = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(run / "checkpoints" / name / "policy"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    flat: dict = {}

    def flatten(prefix: str, value) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                flatten(f"{prefix}.{key}", item)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    flatten("", state)
    assert flat, run
    return flat


def write_inputs(folder: Path) -> Path:
    """Write a random small model, prompts and a config into `folder`. Returns the config."""
    from tests.tiny_models import make_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_model(folder / "model", "llama")
    prompts = [json.dumps({"prompt_token_ids": [5 + i, 6, 7]}) + "\n" for i in range(7)]
    (folder / "prompts.jsonl").write_text("".join(prompts))
    config = folder / "config.yaml"
    config.write_text(
        f"""
model: {{hf_path: {folder / "model"}}}
precision: {{dtype: fp32}}
prompts: {{path: {folder / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 4, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6, save: true}}
parallel: {{micro_batch_size: 2}}
objective: {{alpha: 2, log_z: mlp}}
optimizer: {{lr: 1e-3, lr_decay: cosine, warmup_steps: 2}}
checkpoint: {{interval: 1, keep: 2}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 2, interval: 2}}
run: {{num_steps: {NUM_STEPS}}}
"""
    )
    return config


def table(verdicts: Sequence[Verdict]) -> str:
    """Write the verdicts as lines for people."""
    names = ("layout", "kills", "starts", "ended", "survivors", "orphans", "slowest end", "seconds", "killed while")
    lines = ["{:12} {:>5} {:>6} {:>5} {:>9} {:>7} {:>11} {:>7}  {}".format(*names)]
    for v in verdicts:
        phases = ", ".join(f"{name} {count}" for name, count in v.phases.most_common())
        phases += f"; {v.while_saving} of them while a checkpoint was being written"
        lines.append(
            f"{v.layout:12} {v.kills:5} {v.starts:6} {v.finished:5} {v.survivors:9} {v.orphans.total():7} "
            f"{v.slowest_end_seconds:9.1f} s {v.seconds:7.0f}  {phases}"
        )
        lines.append(
            f"    goodput: {v.goodput_seconds:.1f} s of {v.wall_seconds:.1f} s by our clock, productive "
            f"{v.productive_seconds:.1f} s; {v.goodput_lost_steps} steps lost, {v.lost_steps} by our count"
        )
        if v.ended_by_launcher:
            lines.append(f"    {v.ended_by_launcher} ranks ended as by a launcher: the killed one had not met them")
        lines += [f"    {count} left of {command}" for command, count in v.orphans.items()]
        lines += [f"    a survivor's stack: {stack}" for stack in v.stacks]
        lines += [f"    {text}" for text in v.differences]
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of all layouts together")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the config, section.key=value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the verdicts, for a program")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs; by default they go")
    asked = parser.parse_args()
    warm_up()
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="kill_storm_") as scratch:
        for number, layout in enumerate(asked.layouts):
            kills = asked.kills // len(asked.layouts) + (number < asked.kills % len(asked.layouts))
            verdicts.append(storm(layout, kills, (asked.keep or Path(scratch)) / layout, asked.set, asked.seed))
            print(table(verdicts[-1:]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([vars(verdict) for verdict in verdicts], indent=2))
    clean = all(verdict.is_clean() for verdict in verdicts)
    total = sum(verdict.kills for verdict in verdicts)
    print(f"{total} kills: " + ("every run ended bit-equal, nothing was left" if clean else "NOT clean"))
    sys.exit(not clean)


if __name__ == "__main__":
    main()
