"""Every recipe passes `check` for a model of its own size, as it stands, and can be copied anywhere."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_powerflow.config_file import load_config
from megatron_powerflow.data.rows import read_file
from megatron_powerflow.errors import UserError
from megatron_powerflow.recipes import HERE, copy, names
from megatron_powerflow.training import resources
from megatron_powerflow.training.plan import make_plan
from megatron_powerflow.training.plan_lines import describe
from tests.sparse_models import make_sparse_model

Usage = namedtuple("Usage", "total used free")
MODELS = {  # recipe -> the model of its size, and its processes
    "creative": ("Qwen2.5-1.5B", 8),
    "llama31_70b": ("Llama-3.1-70B", 64),
    "llama31_70b_instruct": ("Llama-3.1-70B", 64),
    "qwen25_math_1.5b": ("Qwen2.5-Math-1.5B", 8),
    "qwen25_math_7b": ("Qwen2.5-Math-7B", 8),
    "reasoning_base": ("Qwen2.5-1.5B", 8),
    "reasoning_instruct": ("Llama-3.2-3B", 8),
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_sparse_model(tmp_path_factory.mktemp("sparse") / name, name)
        return made[name]

    return make


def test_every_recipe_is_tried():
    assert set(names()) == set(MODELS)


@pytest.mark.parametrize("recipe", MODELS)
def test_a_recipe_passes_as_it_stands(recipe, model_of, tmp_path, monkeypatch):
    model, world_size = MODELS[recipe]
    # the checkpoints of a 70B take more than this machine has, which is what `check` says here without this
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(10**14, 0, 10**14))
    settings = [f"model.hf_path={model_of(model)}", f"run.output_dir={tmp_path / 'run'}"]
    config = load_config(HERE / f"{recipe}.yaml", settings)
    plan = make_plan(config, world_size, weights=False)
    assert plan.evaluation_prompts
    assert not {prompt.text for prompt in plan.prompts} & {prompt.text for prompt in plan.evaluation_prompts}
    assert config.checkpoint.keep is not None
    assert "epochs of the prompts" in describe(plan)
    assert not (tmp_path / "run").exists()  # nothing is written by looking


def test_checkpoints_that_do_not_fit_are_refused_by_their_size(model_of, tmp_path):
    settings = [f"model.hf_path={model_of('Llama-3.1-70B')}", f"run.output_dir={tmp_path / 'run'}"]
    config = load_config(HERE / "llama31_70b.yaml", settings)
    free = shutil.disk_usage(tmp_path).free
    needed = resources.needed_bytes(config, 70_553_706_496, 3)
    assert needed == 70_553_706_496 * (3 * 14 + 2)  # two kept, one being written, and the export
    if free > needed:
        pytest.skip("this disk holds three checkpoints of a 70B")
    with pytest.raises(UserError, match=r"3 checkpoint\(s\) and the export take 2,891\.2 GiB"):
        make_plan(config, 64, weights=False)


@pytest.mark.parametrize("recipe", MODELS)
def test_a_copied_recipe_finds_its_prompts_from_anywhere(recipe, tmp_path, monkeypatch):
    copy(recipe, tmp_path / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("mine.yaml"))
    assert all(Path(path).is_file() for path in [*config.prompts.paths, config.evaluation.prompts])
    with pytest.raises(UserError, match="exists"):
        copy(recipe, tmp_path / "mine.yaml")


@pytest.mark.parametrize("kind", ["reasoning", "creative"])
def test_shipped_prompts_are_of_one_kind_and_enough(kind):
    sets = {}
    for name in (kind, f"{kind}_held_out"):
        violations: list[str] = []
        rows = [row for _, row in read_file(HERE / f"{name}.jsonl", violations)]
        assert not violations
        assert {row["task"] for row in rows} == {kind}
        assert all(("answer" in row) == (kind == "reasoning") for row in rows)
        sets[name] = {str(row.get("question") or row.get("prompt") or row.get("messages")) for row in rows}
        assert len(sets[name]) == len(rows)
    assert len(sets[kind]) >= 300
    assert not sets[kind] & sets[f"{kind}_held_out"]


def test_an_unknown_recipe_is_named_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match="no such recipe; there are creative, llama31_70b"):
        copy("resoning", tmp_path / "x.yaml")
