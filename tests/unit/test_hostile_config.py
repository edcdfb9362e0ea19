"""A config from anywhere: nothing of this machine gets into it, and nothing small in it becomes enormous."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_powerflow.config_file import dump_config, load_config, parse_config
from megatron_powerflow.errors import UserError

START = "model: {hf_path: m}\nprompts: {path: p}\n"


@pytest.fixture
def refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", "hunter2-hunter2")

    def refused(run: str, *overrides: str, start: str = START) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(f"{start}{run}\n")
        with pytest.raises(UserError) as caught:
            load_config(path, overrides)
        assert "hunter2" not in str(caught.value)
        return str(caught.value)

    return refused


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:PLANTED}",
        "${oc.env:PLANTED,x}",
        "${oc.env:${run.name}}",
        "${${metrics.wandb_project}:PLANTED}",
        "${${run.name}.env:PLANTED}",
        "a${ oc.env : PLANTED }b",
        "${oc.decode:'${oc.env:PLANTED}'}",
        "${oc.select:run.name,${oc.env:PLANTED}}",
        r"\\${oc.env:PLANTED}",
        r"\${oc.env:PLANTED}",
        "${.name}${oc.env:PLANTED}",
        "${run[${oc.env:PLANTED}]}",
        "${oc.create:{a: 1}}",
    ],
)
def test_no_resolver_runs_wherever_it_stands(refused, value):
    quoted = "'" + value.replace("'", "''") + "'"
    rest = "metrics: {wandb_project: oc.env}\n"
    assert "calls a resolver" in refused(f"run: {{output_dir: {quoted}, name: oc}}\n{rest}")
    assert "calls a resolver" in refused(f"run: {{output_dir: o, name: oc}}\n{rest}", f"run.output_dir={quoted}")
    nested = f"prompts: {{path: p, template_arguments: {{a: {{b: [1, {quoted}]}}}}}}\nmodel: {{hf_path: m}}\n"
    assert "calls a resolver" in refused(f"run: {{output_dir: o, name: oc}}\n{rest}", start=nested)


def test_what_interpolations_make_together_is_not_resolved_again(tmp_path, monkeypatch):
    """'$' and '{oc.env:PLANTED}' from two keys: the text stands in the config as it is, and a config that holds it is
    refused when it is read again."""
    monkeypatch.setenv("PLANTED", "hunter2-hunter2")
    path = tmp_path / "config.yaml"
    path.write_text(f"{START}run: {{output_dir: o, name: '${{model.hf_path}}{{oc.env:PLANTED}}'}}\n")
    text = dump_config(load_config(path, ["model.hf_path=$"]))
    assert "hunter2" not in text
    path.write_text(text)
    with pytest.raises(UserError, match="calls a resolver"):
        load_config(path)


def test_other_keys_may_be_interpolated_and_chained(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"{START}run: {{output_dir: 'runs/${{run.name}}', name: 's${{run.seed}}', seed: 7}}\n")
    assert load_config(path).run.output_dir == "runs/s7"


def test_anchors_that_stay_small_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {hf_path: &m m}\nprompts: {path: *m}\nrun: {output_dir: *m}\n")
    assert load_config(path).prompts.path == "m"


def bomb_of_aliases(depth: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines)


def reference(number: int) -> str:
    return "${prompts.template_arguments.a" + str(number) + "}"


def bomb_of_interpolations(depth: int) -> str:
    lines = ["a0: xxxxxxxxxxxxxxxxxxxx", *(f"a{i}: '{reference(i - 1) * 9}'" for i in range(1, depth))]
    return "\n".join(f"    {line}" for line in lines)


def bomb_of_lists(depth: int) -> str:
    lists = (", ".join([f"'{reference(i - 1)}'"] * 9) for i in range(1, depth))
    lines = ["a0: [1, 2, 3]", *(f"a{i}: [{items}]" for i, items in enumerate(lists, start=1))]
    return "\n".join(f"    {line}" for line in lines)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (f"{START}{bomb_of_aliases(5)}\n", "its aliases stand for over 20,000 values"),
        (f"{START}{bomb_of_aliases(12)}\n", "its aliases stand for over 20,000 values"),
        (f"{START}a: &a [1, *a]\n", "*a stands within itself"),
        (
            f"model: {{hf_path: m}}\nprompts:\n  path: p\n  template_arguments:\n{bomb_of_interpolations(12)}\n",
            "interpolations stand for over 1,048,576 characters",
        ),
        (
            f"model: {{hf_path: m}}\nprompts:\n  path: p\n  template_arguments:\n{bomb_of_lists(12)}\n",
            "interpolations stand for over 1,048,576 characters",
        ),
        ("model: {hf_path: '${run.name}'}\nprompts: {path: '${run}'}\n", "stands within itself"),
        (f"# {'x' * 2**21}\n{START}", "characters; a config has a few hundred"),
        ("[" * 5000, "50 deep"),
        ("a: [1, 2\n", "not a YAML file that can be read"),
    ],
)
def test_a_small_file_does_not_become_enormous(refused, start, words):
    began = time.process_time()
    assert words in refused("run: {output_dir: o, name: '${model.hf_path}'}", start=start)
    assert time.process_time() - began < 5


def test_values_in_memory_are_looked_at_too():
    with pytest.raises(UserError, match="calls a resolver"):
        parse_config({"model": {"hf_path": "${${a}:b}"}, "prompts": {"path": "p"}, "run": {"output_dir": "o"}})


@pytest.mark.parametrize("number", ["1e39", "1e-300", "1e31", ".inf", "-1", "9" * 400])
def test_numbers_that_fp32_does_not_hold_are_refused(refused, number):
    for key in ("optimizer.eps", "optimizer.clip_grad", "rollout.temperature", "objective.alpha"):
        assert key in refused("run: {output_dir: o}", f"{key}={number}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.eps=1e-25"], "Adam divides by eps alone"),
        (["optimizer.lr=1", "optimizer.weight_decay=1"], "multiplies the weights by 1 - lr * weight_decay"),
    ],
)
def test_an_optimizer_that_must_diverge_is_refused(refused, overrides, words):
    assert words in refused("run: {output_dir: o}", *overrides)


def test_no_config_is_read_from_what_is_no_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo", tmp_path / "zero", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="no such config file"):
            load_config(path)
