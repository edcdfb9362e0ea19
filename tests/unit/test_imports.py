"""Arrows point one way: a module imports only lower levels or its own folder; the package itself imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_powerflow"
LEVELS = {
    "errors": 0,
    "console": 0,
    "config": 0,
    "config_rules": 0,
    "records": 0,
    "targets": 0,
    "random_streams": 0,
    "presets": 0,
    "config_help": 0,
    "parallel": 1,
    "model": 2,
    "objective": 2,
    "data": 2,
    "conversion": 2,
    "metrics": 2,
    "hub": 3,
    "rollout": 3,
    "checkpoint": 3,
    "training": 4,
    "evaluation": 5,
    "run_output": 5,
    "run_folder": 5,
    "train": 5,
    "inference": 5,
    "output_lines": 5,
    "report": 5,
    "prepare": 5,
    "model_card": 5,
    "recipes": 5,
    "environment": 5,
    "decoding": 5,
    "conversion_tools": 5,
    "model_parity": 5,
    "cli": 5,
}
FREE_OF_TORCH = (
    "errors",
    "console",
    "config",
    "config_rules",
    "records",
    "random_streams",
    "cli",
    "targets",
    "parallel.layout",
    "parallel.owner",
    "checkpoint.folder",
    "checkpoint.first_files",
    "run_folder",
    "conversion.shapes",
    "metrics.step_log",
    "metrics.alarm",
    "metrics.realised_alpha",
    "presets",
    "training.plan",
    "training.fetched",
    "hub.fetch",
    "hub.push",
    "metrics.counts",
    "data.bins",
    "rollout.saved",
    "metrics.diversity",
    "metrics.plot_style",
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
def test_a_module_imports_only_lower_levels_or_its_own_folder(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports_of(path):
        other = part_of(module)
        if other and other != own:
            allowed = LEVELS[other] < LEVELS[own] or LEVELS[other] == LEVELS[own] in (0, 5)
            assert allowed, f"{path.name} (level {LEVELS[own]}) imports {module} (level {LEVELS[other]})"


def test_the_objective_imports_nothing_of_ours():
    for path in (PACKAGE / "objective").glob("*.py"):
        others = {module for module in imports_of(path) if not module.startswith("megatron_powerflow.objective.")}
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
                assert not text.startswith(("torch.", "megatron.", "dist.", "os.environ")), f"{path}: {text} = ..."


def test_only_initialize_reads_the_environment():
    for path in MODULES:
        if path.name != "initialize.py":
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


def test_no_grab_bags():
    names = {path.stem for path in MODULES}
    assert not names & {"utils", "common", "helpers", "misc"}
