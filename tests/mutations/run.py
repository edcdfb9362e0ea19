"""Which of the deliberate faults do the unit tests notice? Each is put into a copy of the package, and its guards run.

    python -m tests.mutations.run                                      all of them, minutes on one core
    python -m tests.mutations.run --only training/loss.py --json out   those of one file (or several)

One process imports what the tests need of others' code, once, and forks for each fault, so that a fault costs its own
tests and no imports of torch. Exit code 1: under 95 % were noticed, or the list no longer fits the package; a test that
fails without any fault is an error too, since it would notice everything.

Left out: the list itself (`faults.py`), faults that need several processes to be seen.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.mutations.faults import FAULTS, GUARDS, Fault

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "megatron_powerflow"
LEAST_SHARE = 0.95  # of the faults, to be noticed
TIMEOUT_SECONDS = 300.0  # of one fault: a test that never ends has noticed it
# what the tests import of others, imported once; of ours nothing, for that is what changes
WARM = (
    *("torch", "torch.distributed", "torch.utils._python_dispatch", "numpy", "scipy.special", "hypothesis", "pytest"),
    *(
        "pydantic",
        "omegaconf",
        "yaml",
        "transformers",
        "transformers.models.auto.configuration_auto",
        "safetensors.torch",
    ),
    *("huggingface_hub", "pyarrow", "matplotlib.pyplot", "megatron.core", "megatron.core.models.gpt"),
    *(
        "megatron.core.pipeline_parallel",
        "megatron.core.optimizer",
        "megatron.core.distributed",
        "xdist",
        "rich.console",
    ),
)
ARGUMENTS = (
    *("-x", "-q", "-m", "not slow and not long", "--hypothesis-seed", "0", "-p", "no:cacheprovider"),
    *("-p", "no:unraisableexception", "-p", "no:threadexception"),  # they collect garbage, for seconds
    *("-p", "_hypothesis_pytestplugin", "-p", "pytest_timeout"),  # and no others: one process, no plugins of libraries
)


class Outcome:
    """verdict: killed, timeout, survived, or broken (the tests could not be collected: no fault of this kind).
    seconds: of processor time, which a busy machine does not change."""

    def __init__(self, verdict: str, noticed_by: str = "", seconds: float = 0.0) -> None:
        self.verdict, self.noticed_by, self.seconds = verdict, noticed_by, seconds

    @property
    def noticed(self) -> bool:
        return self.verdict in ("killed", "timeout")


def misfits(faults: Sequence[Fault], package: Path) -> list[str]:
    """Faults whose text is not in its file exactly once, or whose file no test guards."""
    found = []
    for fault in faults:
        times = (package / fault.file).read_text(encoding="utf-8").count(fault.original)
        if times != 1:
            found.append(
                f"{fault.file}: {fault.original!r} is there {times} times, not once; mend tests/mutations/faults.py"
            )
    return found + [
        f"{file}: GUARDS names no test" for file in {fault.file for fault in faults} if not GUARDS.get(file)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="FILE", help="of the package, such as training/loss.py")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every outcome there")
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if not options.only or fault.file in options.only]
    if wrong := misfits(faults, REPOSITORY / PACKAGE):
        print("\n".join(wrong))
        return 1
    outcomes = run(faults, REPOSITORY)
    print(summary(faults, outcomes))
    if options.json:
        options.json.write_text(json.dumps(records(faults, outcomes), indent=1) + "\n", encoding="utf-8")
    return 0 if share(outcomes) >= LEAST_SHARE else 1


def run(faults: Sequence[Fault], repository: Path, say: Callable[[str], None] = print) -> list[Outcome]:
    """The outcome of each fault. Raises RuntimeError where a guard fails without any."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # threads do not survive a fork
    for name in WARM:
        with contextlib.suppress(ImportError):  # an extra of the project that is not installed
            importlib.import_module(name)
    ours = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    assert not ours, f"imported before the fork: {ours}"
    gc.collect()
    gc.freeze()  # what was imported is not looked through again in each fork
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder)
        _copy(repository, copy)
        _check_guards(sorted({guard for fault in faults for guard in GUARDS[fault.file]}), copy, say)
        outcomes = []
        for number, fault in enumerate(faults, start=1):
            outcome = _outcome(fault, copy)
            outcomes.append(outcome)
            by = outcome.noticed_by.removeprefix("tests/unit/")
            say(
                f"{number}/{len(faults)} {outcome.verdict} {outcome.seconds:.1f} s  {fault.file}: {fault.breaks}"
                + (f"  [{by}]" if by else f"\n    {fault.original!r}\n -> {fault.mutated!r}")
            )
    return outcomes


def share(outcomes: Sequence[Outcome]) -> float:
    return sum(outcome.noticed for outcome in outcomes) / len(outcomes)


def summary(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> str:
    """By file: noticed of all; then who was not noticed, then the share."""
    lines = []
    for file in dict.fromkeys(fault.file for fault in faults):
        own = [outcome for fault, outcome in zip(faults, outcomes, strict=True) if fault.file == file]
        lines.append(f"{sum(outcome.noticed for outcome in own):4} of {len(own):3}  {file}")
    for fault, outcome in zip(faults, outcomes, strict=True):
        if not outcome.noticed:
            lines.append(f"{outcome.verdict}: {fault.file}: {fault.original!r} -> {fault.mutated!r} ({fault.breaks})")
    seconds = sum(outcome.seconds for outcome in outcomes)
    noticed = sum(outcome.noticed for outcome in outcomes)
    return "\n".join([*lines, f"{noticed} of {len(outcomes)} noticed, {share(outcomes):.1%}, {seconds:.0f} s"])


def records(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> list[dict]:
    return [
        {name: getattr(fault, name) for name in Fault.__slots__} | vars(outcome)
        for fault, outcome in zip(faults, outcomes, strict=True)
    ]


def _copy(repository: Path, copy: Path) -> None:
    """What tests need of the repository; the model, if there is one, by a link."""
    for name in (PACKAGE, "tests"):
        shutil.copytree(repository / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "pyproject.toml", copy)
    (copy / "models").symlink_to(repository / "models")
    compileall.compile_dir(copy / PACKAGE, quiet=2)


def _check_guards(guards: Sequence[str], copy: Path, say: Callable[[str], None]) -> None:
    for guard in guards:
        outcome = _forked([guard], copy, write_bytecode=True)
        say(f"without a fault {outcome.verdict} {outcome.seconds:.1f} s  {guard}")
        if outcome.verdict != "survived":
            raise RuntimeError(f"{guard} fails without any fault: {outcome.noticed_by}")


def _outcome(fault: Fault, copy: Path) -> Outcome:
    path = copy / PACKAGE / fault.file
    text = path.read_text(encoding="utf-8")
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):  # else a change within a second goes unseen
        compiled.unlink()
    path.write_text(text.replace(fault.original, fault.mutated), encoding="utf-8")
    try:
        return _forked(GUARDS[fault.file], copy, write_bytecode=False)
    finally:
        path.write_text(text, encoding="utf-8")


def _forked(guards: Sequence[str], copy: Path, *, write_bytecode: bool) -> Outcome:
    """The guards' tests in a process of their own, up to the first that fails."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            os.close(ours)
            sys.dont_write_bytecode = not write_bytecode
            code = _test(guards, copy, theirs)
        except BaseException:
            os.write(theirs, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(theirs)
    said, ended = _read_all(ours, TIMEOUT_SECONDS)
    os.close(ours)
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    verdict = {0: "survived", 1: "killed"}.get(code, "broken") if ended else "timeout"
    noticed_by = said or ("" if verdict == "survived" else f"exit code {code}")
    return Outcome(verdict, noticed_by, usage.ru_utime + usage.ru_stime)


def _read_all(pipe: int, seconds: float) -> tuple[str, bool]:
    """(what was written into it; whether its writer has closed it in time)."""
    said, deadline = b"", time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            part = os.read(pipe, 65536)
            if not part:
                return said.decode(errors="replace"), True
            said += part
    return said.decode(errors="replace"), False


class _FirstFailure:
    """A pytest plugin: the name of the first test that failed."""

    name = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = f"{report.nodeid}: {report.longreprtext.strip().splitlines()[-1]}"


def _test(guards: Sequence[str], copy: Path, pipe: int) -> int:
    """In the fork: pytest on the copy's own tests and package."""
    import pytest
    import torch

    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (copy, REPOSITORY))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    package = importlib.import_module(PACKAGE)
    assert Path(package.__file__ or "").is_relative_to(copy), f"{package.__file__} is not the copy"
    first = _FirstFailure()
    code = pytest.main([*ARGUMENTS, *(f"tests/unit/test_{guard}.py" for guard in guards)], plugins=[first])
    os.write(pipe, first.name.encode())
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
