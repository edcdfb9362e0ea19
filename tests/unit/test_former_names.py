"""Scripts written for 0.1.0 import modules that have moved: they get what is there now, and a warning that names it."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

from megatron_powerflow.former_names import MOVED_MODULES, MOVED_NAMES, PACKAGE


def test_every_entry_leads_to_something_that_is_there():
    for homes in MOVED_MODULES.values():
        for home in homes:
            assert importlib.util.find_spec(PACKAGE + home), home
    for former, now in MOVED_NAMES.items():
        home, _, name = now.rpartition(".")
        assert hasattr(importlib.import_module(PACKAGE + home), name), former


def test_a_former_module_is_found_only_where_there_is_none_of_that_name():
    for former in MOVED_MODULES:
        module = importlib.import_module(PACKAGE + former)
        assert module.__spec__.loader.__name__ == "FormerModules", former


@pytest.mark.parametrize(
    ("former", "name", "now"),
    [
        ("inference", "open_model", "commands.open_model"),
        ("inference", "SCORE_KEYS", "commands.open_model"),
        ("inference", "read_scored_rows", "commands.score"),
        ("model_parity", "_score", "commands.log_prob_parity"),
        ("config", "parse_config", "config_file"),
        ("parallel.initialize", "read_launch", "parallel.launch"),
        ("config", "load_config", "config_file"),
        ("records", "Architecture", "architecture"),
        ("conversion.hf_config", "read_architecture", "hf.config"),
        ("conversion.families", "FAMILIES", "hf.families"),
        ("training.setup", "alignment", "training.policy"),
        ("objective.log_prob_kernel", "LogProbKernel", "log_probs.kernel_choice"),
    ],
)
def test_a_former_name_is_the_same_object_and_warns(former, name, now):
    module = importlib.import_module(PACKAGE + former)
    with pytest.warns(DeprecationWarning, match=f"{now}.{name} since 0.2.0; the former name goes in 0.3"):
        value = getattr(module, name)
    assert value is getattr(importlib.import_module(PACKAGE + now), name)


def test_a_renamed_class_is_found_by_its_former_name():
    from megatron_powerflow.data import packing

    with pytest.warns(DeprecationWarning, match="AnnotatedRollout"):
        assert packing.Annotated is packing.AnnotatedRollout


def test_a_name_that_never_was_stays_an_error():
    with pytest.raises(ImportError, match="nothing_of_the_kind"):
        exec("from megatron_powerflow.inference import nothing_of_the_kind")
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        importlib.import_module(PACKAGE + "config").nothing_of_the_kind  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(PACKAGE + "never_was")


def test_a_script_of_0_1_0_runs_and_names_its_own_line():
    script = "from megatron_powerflow.config import parse_config\nprint(parse_config.__module__)\n"
    process = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "megatron_powerflow.config_file"
    assert "config.parse_config is megatron_powerflow.config_file.parse_config" in process.stderr
