"""A real run's folder, damaged in one place or several, and every command that reads it: one case after the other.

Whatever is in the files, a command works or ends with the program's own error; nothing that they name is run, and
nothing waits for ever. The functions run in a process of `gloo_workers.py`, which has torch and Megatron loaded.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from megatron_powerflow.errors import RequeueRequested, UserError

SECONDS = 120  # of one command
MARKER = "ran"  # a file that a planted pickle would make
NOWHERE = "nowhere"  # what planted links name: nothing, and nothing may be made there


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def planted_bytes(marker: Path, r: random.Random) -> bytes:
    """A pickle, or what torch.save makes of one."""
    import torch

    if r.random() < 0.5:
        return pickle.dumps({"a": Planted(marker)})
    file = io.BytesIO()
    torch.save({"a": Planted(marker)}, file)
    return file.getvalue()


def damage(path: Path, r: random.Random, marker: Path) -> str:
    """Do something to a file or folder of a run; says what."""
    if path.is_dir():
        shutil.rmtree(path)
        kind = r.choice(["gone", "a file", "a link to nothing"])
        if kind == "a file":
            path.write_bytes(b"x")
        elif kind == "a link to nothing":
            path.symlink_to(marker.with_name(NOWHERE))
        return f"the folder: {kind}"
    content = path.read_bytes()
    kind = r.choice(
        ["cut", "zeroed", "flipped", "empty", "gone", "folder", "device", "fifo", "link to nothing", "link in a circle"]
        + ["pickle"] * 3
        + ["changed"] * 4
    )
    if kind == "changed":
        path.write_bytes(changed(content, r))
    elif kind == "cut":
        path.write_bytes(content[: r.randrange(len(content) + 1)])
    elif kind == "zeroed":
        path.write_bytes(bytes(len(content)))
    elif kind == "flipped" and content:
        flipped = bytearray(content)
        for _ in range(r.choice([1, 1, 8, 64])):
            flipped[r.randrange(len(flipped))] ^= 1 << r.randrange(8)
        path.write_bytes(bytes(flipped))
    elif kind == "pickle":
        path.write_bytes(planted_bytes(marker, r))
    elif kind in ("empty", "flipped"):
        path.write_bytes(b"")
    else:
        path.unlink()
        {
            "gone": lambda: None,
            "folder": path.mkdir,
            "device": lambda: path.symlink_to("/dev/zero"),
            "fifo": lambda: os.mkfifo(path),
            "link to nothing": lambda: path.symlink_to(marker.with_name(NOWHERE)),
            "link in a circle": lambda: path.symlink_to(path.name),
        }[kind]()
    return kind


def changed(content: bytes, r: random.Random) -> bytes:
    """Values of a document replaced, or bytes cut, doubled and overwritten: as in tests/unit/test_hostile_files.py."""
    from tests.unit.test_hostile_files import changed as with_other_values

    for document in ("json", "lines", "yaml"):
        try:
            return with_other_values(content, r, document=document)
        except Exception:
            continue  # is no such document
    return with_other_values(content, r, document=None)


def sums_again(run: Path) -> None:
    """Lists of digests that fit the damaged files, as whoever planted something would write them."""
    for sums in run.glob("checkpoints/step_*/SHA256SUMS"):
        folder = sums.parent
        if not sums.is_file() or sums.is_symlink():
            continue
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p != sums)
        lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in files]
        sums.write_text("".join(lines))


def commands(config: Path, run: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Name -> a command that reads a run's folder, as the command line calls it."""
    from megatron_powerflow import cli
    from megatron_powerflow.commands.export import export_file
    from megatron_powerflow.commands.open_model import COMMON_KEYS, open_model
    from megatron_powerflow.console import make_console
    from megatron_powerflow.parallel.launch import read_launch

    def export() -> None:
        export_file(open_model(run, (), COMMON_KEYS, 1), out / "export", read_launch(), make_console(io.StringIO()))

    def opened() -> None:
        from megatron_powerflow.commands.open_model import load_chunks
        from megatron_powerflow.parallel.initialize import initialized

        model = open_model(run, (), COMMON_KEYS, 1)
        with initialized(model.layout, read_launch(), seed=0) as groups:
            load_chunks(model, groups)

    overrides = [f"run.output_dir={run}"]
    return {
        "open": opened,  # as score, generate and evaluate do; run: any model's folder
        "check": lambda: cli.check(config, overrides),
        "resume": lambda: load(config, overrides),
        "export": export,
        "curves": lambda: cli.curves([run], out / "curves.png"),
        "report": lambda: cli.report([run], out / "report"),
        "stop": lambda: cli.stop(config, overrides),
    }


def load(config: Path, overrides: list[str]) -> None:
    """`powerflow train` up to its first step: the folder taken, the state loaded, the journals opened."""
    from megatron_powerflow.config_file import load_config
    from megatron_powerflow.console import make_console
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.pulse import Pulse
    from megatron_powerflow.parallel.together import on_main
    from megatron_powerflow.run_events import RunEvents
    from megatron_powerflow.run_folder import run_folder, take_run_folder
    from megatron_powerflow.run_output import RunOutput
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.session import build_session

    plan = make_plan(load_config(config, overrides), 1)
    with run_folder(plan) as owner, initialized(plan.layout, read_launch(), seed=0) as groups:
        on_main(lambda: take_run_folder(plan, owner), groups)
        session = build_session(plan, groups)
        console, events = make_console(io.StringIO()), RunEvents(plan.run_folder)
        with events, RunOutput(plan, session, console, events, Pulse()) as output:
            events.begin()
            output.alarmed()
            output.show_change()


# pictures take a second each, and read what the others read
WEIGHTS = {"open": 6, "check": 30, "resume": 18, "export": 9, "curves": 1, "report": 1, "stop": 9}


def fuzz(config: Path, good: Path, work: Path, cases: range, wanted: tuple[str, ...] = tuple(WEIGHTS)) -> dict:
    """Try the cases. Returns {"counts": of what came of them, "bad": texts of what must not be, "seconds"}."""
    marker, counts, bad, began = work / MARKER, Counter(), [], time.monotonic()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for case in cases:
        r = random.Random(int.from_bytes(hashlib.sha256(str(case).encode()).digest()[:8]))
        run, out = work / f"run{case}", work / f"out{case}"
        shutil.copytree(good, run)
        out.mkdir()
        done = []
        for _ in range(r.choice([1, 1, 1, 2, 5])):
            places = sorted(p for p in run.rglob("*") if not p.is_symlink() and (p.is_file() or p.is_dir()))
            files = [p for p in places if p.is_file()]
            place = r.choice(files if files and r.random() < 0.95 else places)
            done.append(f"{place.relative_to(run)}: {damage(place, r, marker)}")
        if r.random() < 0.6:
            sums_again(run)
            done.append("sums written again")
        name = r.choices(wanted, [WEIGHTS[name] for name in wanted])[0]
        verdict = tried(commands(config, run, out)[name])
        counts[f"{name}: {verdict.splitlines()[0]}"] += 1
        if marker.exists():
            verdict = f"a planted pickle has run\n{verdict}"
            marker.unlink()
        if (nowhere := marker.with_name(NOWHERE)).exists():
            verdict = f"something was written through a link: {nowhere.read_bytes()[:200]!r}\n{verdict}"
            nowhere.unlink()
        if verdict not in ("works", "refused"):
            bad.append(f"case {case}, {name}, {done}: {verdict}")
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    return {"counts": dict(sorted(counts.items())), "bad": bad, "seconds": time.monotonic() - began}


class _WaitsForEverError(Exception):
    pass


def tried(command: Callable[[], object], seconds: int = SECONDS) -> str:
    """What a command comes to: works, refused, or what it raised."""

    def ring(*_):
        raise _WaitsForEverError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        with redirect_stdout(io.StringIO()):
            command()
        return "works"
    except (UserError, RequeueRequested):
        return "refused"
    except BaseException as error:
        return "".join(traceback.format_exception_only(error)).splitlines()[0] + "\n" + traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def planted_everywhere(config: Path, good: Path, work: Path, wanted: tuple[str, ...]) -> dict:
    """A pickle in the place of each file of a run, of both kinds, with digests that fit. Returns as `fuzz` does."""
    import torch

    marker, bad, counts = work / MARKER, [], Counter()
    file = io.BytesIO()
    torch.save({"a": Planted(marker)}, file)
    for name in sorted(str(p.relative_to(good)) for p in good.rglob("*") if p.is_file()):
        for kind, content in (("pickle", pickle.dumps({"a": Planted(marker)})), ("torch", file.getvalue())):
            run, out = work / "planted", work / "planted_out"
            shutil.copytree(good, run)
            out.mkdir()
            (run / name).write_bytes(content)
            sums_again(run)
            for command in wanted:
                verdict = tried(commands(config, run, out)[command])
                counts[f"{command}: {verdict.splitlines()[0]}"] += 1
                if marker.exists() or verdict not in ("works", "refused"):
                    bad.append(f"{name}, {kind}, {command}: {'IT RAN ' if marker.exists() else ''}{verdict}")
                    marker.unlink(missing_ok=True)
            shutil.rmtree(run)
            shutil.rmtree(out)
    return {"counts": dict(sorted(counts.items())), "bad": bad}


def nothing_to_read_everywhere(config: Path, good: Path, work: Path, wanted: tuple[str, ...], kind: str) -> dict:
    """Nothing that could be read in the place of each file of a run, with the digests as they were and without its own.

    kind: a pipe that nobody writes into, or gone. Returns as `fuzz` does.
    """
    bad, counts = [], Counter()
    names = sorted(str(p.relative_to(good)) for p in good.rglob("*") if p.is_file())
    for name, of_others in itertools.product(names, (False, True)):
        for command in wanted if not of_others or "checkpoints/step_" in name else ():
            run, out = work / "piped", work / "piped_out"
            shutil.copytree(good, run)
            out.mkdir()
            (run / name).unlink()
            if kind == "pipe":
                os.mkfifo(run / name)
            if of_others:
                sums_again(run)
            verdict = tried(commands(config, run, out)[command], seconds=20)
            counts[f"{command}: {verdict.splitlines()[0]}"] += 1
            if verdict not in ("works", "refused"):
                bad.append(f"{name}, {command}, {of_others=}: {verdict}")
            shutil.rmtree(run)
            shutil.rmtree(out)
    return {"counts": dict(sorted(counts.items())), "bad": bad}


def report_of(result: dict) -> str:
    return json.dumps({key: value for key, value in result.items() if key != "bad"}, indent=1)
