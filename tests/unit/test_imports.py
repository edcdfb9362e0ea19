"""Arrows point one way: a module imports only lower floors or its own room; the package itself imports no torch."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_powerflow"
# Every file and folder at the top of the package, by floor: a floor imports lower ones only, and no room its neighbour.
FLOORS = (
    ("former_names", "version"),
    (
        "architecture",
        "children",
        "console",
        "errors",
        "log_probs",
        "objective",
        "records",
        "redaction",
        "signals",
        "time_limit",
        "whole_files",
    ),
    ("config", "journal", "outcome", "random_streams", "reference_store", "targets"),
    ("config_rules", "config_text", "data", "metrics", "parallel", "recipes"),
    ("config_file", "environment", "hf", "model", "preflight", "report"),
    ("checkpoint", "config_help", "hub", "rollout"),
    ("model_card", "serving"),
    ("training",),
    ("commands", "prove", "rehearsal", "run_end", "run_events", "run_folder"),
    ("run_output",),
    ("converter", "evaluation", "train"),
    ("prepare",),
    ("cli",),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FREE_OF_TORCH = (
    "errors",
    "console",
    "config",
    "config_rules",
    "config_file",
    "config_text",
    "records",
    "former_names",
    "redaction",
    "architecture",
    "random_streams",
    "cli",
    "targets",
    "whole_files",
    "journal",
    "parallel.device_sums",
    "parallel.fp8_sizes",
    "parallel.devices",
    "parallel.launch",
    "parallel.layout",
    "parallel.meeting",
    "parallel.owner",
    "parallel.pulse",
    "parallel.rendezvous",
    "parallel.verdict",
    "parallel.watch",
    "preflight.preflight",
    "signals",
    "children",
    "outcome",
    "time_limit",
    "run_end",
    "checkpoint.folder",
    "checkpoint.first_files",
    "run_folder",
    "hf.shapes",
    "hf.size",
    "metrics.step_log",
    "metrics.alarm",
    "metrics.goodput",
    "metrics.realised_alpha",
    "objective.presets",
    "training.plan",
    "training.plan_checks",
    "training.plan_lines",
    "training.fetched",
    "prove.proof",
    "prove.report",
    "prove.forks",
    "hub.fetch",
    "hub.push",
    "metrics.counts",
    "data.bins",
    "data.rollout_arrays",
    "rollout.rollout_files",
    "metrics.diversity",
    "report.plot_style",
    "report.page",
    "report.drawing",
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron_powerflow"):
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("megatron_powerflow")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_floors_or_its_own_room(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports_of(path):
        other = part_of(module)
        if other and other != own:
            assert FLOOR_OF[other] < FLOOR_OF[own], (
                f"{path.name} (floor {FLOOR_OF[own]}) imports {module} (floor {FLOOR_OF[other]})"
            )


def test_no_modules_import_each_other():
    """Within a room, too: a circle is one module in two files."""
    names = {
        path: ".".join(("megatron_powerflow", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in MODULES
    }
    left = {name: imports_of(path) - {name} for path, name in names.items()}
    left = {name: {other for other in others if other in left} for name, others in left.items()}
    while ready := [name for name, others in left.items() if not others]:
        left = {name: others.difference(ready) for name, others in left.items() if name not in ready}
    assert not left


def test_objective_and_log_probs_import_nothing_of_ours():
    for path in (*(PACKAGE / "objective").glob("*.py"), *(PACKAGE / "log_probs").glob("*.py")):
        room = path.parent.name
        others = {module for module in imports_of(path) if not module.startswith(f"megatron_powerflow.{room}.")}
        assert not others, path


def test_only_one_module_patches_anything():
    """`torch.x = ...` and the like, outside cpu_gloo.py."""
    for path in MODULES:
        if path.name == "cpu_gloo.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                text = ast.unparse(target)
                if text.startswith(("torch.backends.", "torch.utils.deterministic.")):  # torch's own settings
                    continue
                if path.name == "powerflow_weight_stream.py" and text.startswith("os.environ"):  # torch's setting, too
                    continue
                assert not text.startswith(("torch.", "megatron.", "dist.", "os.environ")), f"{path}: {text} = ..."


def test_only_three_files_of_a_run_read_the_environment():
    """What runs in a vLLM server is no part of a run."""
    for path in MODULES:
        if path.name not in ("launch.py", "slurm_job.py", "device_sums.py") and path.parent.name != "on_server":
            assert "os.environ" not in path.read_text(encoding="utf-8"), path
            assert "getenv" not in path.read_text(encoding="utf-8"), path


def test_importing_brings_neither_torch_nor_megatron():
    """One process imports one after the other; the first that brings one of them is named."""
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if brought := [other for other in ("torch", "megatron", "transformers") if other in sys.modules]:
        sys.exit(f"{name} imports {', '.join(brought)}")
"""
    names = ["megatron_powerflow", *(f"megatron_powerflow.{name}" for name in FREE_OF_TORCH)]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_file_that_a_docstring_names_is_there():
    """`packing.py` beside it, or `data/packing.py` from the top of the package."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            for name in re.findall(r"`([\w/]+\.(?:py|md))`", ast.get_docstring(node) or ""):
                assert any((folder / name).is_file() for folder in (path.parent, PACKAGE, PACKAGE.parent)), (
                    f"{path.relative_to(PACKAGE)} speaks of {name}"
                )


@functools.cache
def names_of(path: Path) -> set[str]:
    """Everything that a module or a package has at its top, by its text."""
    names = set()
    if path.name == "__init__.py":
        names |= {beside.stem for beside in path.parent.iterdir()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_what_is_imported_is_there():
    """From anywhere, within functions as well, which only a run would show; tests of the GPU among them."""
    root, missing = PACKAGE.parent, []
    files = [path for room in ("tests", "benchmarks", "tools", "examples") for path in (root / room).rglob("*.py")]
    for path in (*MODULES, *files):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] in ("megatron_powerflow", "tests")
            ):
                continue
            home = root.joinpath(*node.module.split("."))
            home = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
            gone = {alias.name for alias in node.names} - names_of(home) if home.is_file() else {"the module"}
            missing += [f"{path.relative_to(root)}:{node.lineno}: {node.module}: {name}" for name in sorted(gone)]
    assert not missing


def test_no_grab_bags():
    names = {path.stem for path in MODULES}
    assert not names & {"utils", "common", "helpers", "misc"}


def test_a_function_is_read_on_one_screen():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path.relative_to(PACKAGE)}: {node.name} has {length} lines"
