"""Every file of a run cut, zeroed, with one bit flipped, or gone: what happens, what is said, and what is lost.

    python -m tests.fault_table [--json out.json]      some minutes on one core; a table

A run of four steps is broken off after two; then one file of it is damaged, and the same command is started again.
Either the run goes on to its end, or it is refused in words that name the file; then the file is put back, or what
the words advise is done, and the command is started once more. At the end everything is compared with the run that
nothing befell: metrics but for times, samples, evaluations, rollouts, weights and moments, log Z'. What the damaged
file itself held of steps that are done is all that may be missing.

Left out: full and read-only disks (`tests/distributed/test_disk_faults.py`), kills (`tests/kill_storm`), two damages at
once (`tests/run_folder_fuzz.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_powerflow.errors import UserError

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "cut": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "flipped": lambda content: _flipped(content),
    "gone": lambda _: None,
}
TIMES = ("_seconds", "tokens_per_second", "peak_memory_bytes")
OF_THE_MODEL = "the model has no chat template"
COMPARED = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")


@dataclass(frozen=True)
class Row:
    """One damage. exit_code: of the start behind it; said: what the user reads; lost: of the finished run, by file."""

    file: str
    damage: str
    exit_code: int
    said: str
    mended: bool  # the file had to be put back
    lost: dict[str, str]


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def write_config(folder: Path, model: Path) -> Path:
    """A run that leaves a file of every kind."""
    rows = ({"prompt_token_ids": [5 + i, 6, 7], "answer": "1", "id": str(i)} for i in range(7))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {model}}}
precision: {{dtype: fp32}}
prompts: {{path: {folder / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6, save: true}}
parallel: {{micro_batch_size: 2}}
objective: {{alpha: 2, log_z: mlp}}
optimizer: {{lr: 1e-3}}
checkpoint: {{interval: 1}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 2, prompts: {folder / "prompts.jsonl"}, num_prompts: 2, num_responses: 2, interval: 1}}
run: {{num_steps: 4, output_dir: {folder / "run"}, export: false}}
"""
    )
    return path


def start(config: Path, *overrides: str) -> tuple[int, str]:
    """`powerflow train` on this rank: its exit code, and what the user reads of warnings or of the refusal."""
    from megatron_powerflow.config_file import load_config
    from megatron_powerflow.training.plan import make_plan
    from tests.distributed.megatron_sessions import run_training

    try:
        notices = make_plan(load_config(config, overrides), 1).notices
        printed = run_training(config, *overrides)
    except UserError as error:
        return 2, "; ".join(error.violations)
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    said = [line.removeprefix("notice: ") for line in lines if line.startswith("notice: ") or " is damaged" in line]
    return 0, "; ".join([*(each for each in notices if not each.startswith(OF_THE_MODEL)), *said])


def files_of(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())


def lost(run: Path, unbroken: Path) -> dict[str, str]:
    """What the run lacks of the unbroken one, or has otherwise; file -> how. {}: nothing."""
    found = {}
    for name in COMPARED:
        ours, theirs = (_lines(folder / name) for folder in (run, unbroken))
        if extra := [line for line in ours if line not in theirs]:
            found[name] = f"{len(extra)} other lines"
        elif len(ours) < len(theirs):
            found[name] = f"{len(theirs) - len(ours)} of {len(theirs)} lines"
        elif len(ours) > len(theirs):
            found[name] = f"{len(ours) - len(theirs)} lines doubled"
    last = "checkpoints/step_000004"
    kept = [*(f"rollouts/{path.name}" for path in (unbroken / "rollouts").iterdir()), f"{last}/log_z_head.safetensors"]
    kept += [f"{last}/policy/{path.name}" for path in (unbroken / last / "policy").glob("*.distcp")]
    for name in kept:
        if not (run / name).is_file():
            found[name] = "gone"
        elif (run / name).read_bytes() != (unbroken / name).read_bytes():
            found[name] = "other bytes"
    return found


def _lines(path: Path) -> list[dict]:
    """Whole lines of a journal, without times."""
    lines = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:  # also bytes that are no text
            continue
        lines.append({key: value for key, value in values.items() if not key.endswith(TIMES)})
    return lines


def try_one(config: Path, broken_off: Path, unbroken: Path, file: str, damage: str) -> Row:
    """Damage one file of a copy of the run, start the command again, and compare what comes of it."""
    run = config.parent / "run"
    shutil.copytree(broken_off, run, symlinks=True)
    content = (run / file).read_bytes()
    damaged = DAMAGES[damage](content)
    (run / file).unlink()
    if damaged is not None:
        (run / file).write_bytes(damaged)
    exit_code, said = start(config)
    if exit_code:
        if advice := re.search(r"cp (\S+) (\S+)$", said):  # which is followed to the letter
            shutil.copyfile(advice[1], advice[2])
        else:
            (run / file).write_bytes(content)
        again, why = start(config)
        if again:
            said += f" ; AND WITH THE FILE PUT BACK: {why}"
    row = Row(file, damage, exit_code, said.replace(str(run), "RUN"), bool(exit_code), lost(run, unbroken))
    shutil.rmtree(run)
    return row


def try_all(config: Path, names: Iterable[str] | None = None) -> list[Row]:
    """All files of the run that `config` describes, or those with these names. In a process that has Megatron ready."""
    run, unbroken, broken_off = (config.parent / name for name in ("run", "unbroken", "broken_off"))
    assert start(config) == (0, "")
    run.rename(unbroken)
    assert start(config, "run.num_steps=2") == (0, "")
    run.rename(broken_off)
    wanted = files_of(broken_off) if names is None else list(names)
    return [try_one(config, broken_off, unbroken, name, damage) for name in wanted for damage in DAMAGES]


def faults_of(rows: list[Row]) -> list[str]:
    """What must not be, of a table: anything lost but what the damaged file held; a refusal that does not name it."""
    bad = []
    for row in rows:
        who = f"{row.file}, {row.damage}: {row.said}"
        if row.exit_code and Path(row.file).name not in row.said:
            bad.append(f"refused without the file's name: {who}")
        if "AND WITH THE FILE PUT BACK" in row.said:
            bad.append(f"not mended by the file: {who}")
        if left := row.lost.keys() - {row.file}:
            bad.append(f"lost {left}: {who}")
    return bad


def table(rows: list[Row]) -> str:
    lines = ["| file | damage | exit code | what is said | lost |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.file} | {row.damage} | {row.exit_code} | {row.said or '-'} | "
        f"{'; '.join(f'{name}: {how}' for name, how in row.lost.items()) or 'nothing'} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from megatron_powerflow.parallel.initialize import prepare_imports
    from tests.tiny_models import make_tiny_model

    prepare_imports()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", "llama")
        rows = try_all(write_config(Path(folder), model))
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if bad := faults_of(rows):
        raise SystemExit("\n".join(bad))


if __name__ == "__main__":
    main()
