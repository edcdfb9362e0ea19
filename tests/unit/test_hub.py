"""Models and data by name, from a real HTTP server (`tests/hub_server.py`) through huggingface_hub itself."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from megatron_powerflow import cli
from megatron_powerflow.cli import leaving
from megatron_powerflow.commands.open_model import SCORE_KEYS, open_named
from megatron_powerflow.config_file import parse_config
from megatron_powerflow.converter.commands import locate_models
from megatron_powerflow.converter.convert import ConversionRequest, hf_to_megatron
from megatron_powerflow.converter.ranks import Ranks
from megatron_powerflow.errors import UserError
from megatron_powerflow.hub import fetch
from megatron_powerflow.hub.fetch import locate
from megatron_powerflow.hub.located import Download, LocalPaths, RequestedName
from megatron_powerflow.parallel.launch import ALONE
from megatron_powerflow.training.fetched import fetch_inputs
from megatron_powerflow.training.plan import make_plan

PROMPTS = b'{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n'


def model(text: str, **options) -> Download:
    return locate([RequestedName("model", text, "--model")], ALONE, **options).model(text)


def data(text: str) -> tuple[Path, ...]:
    return locate([RequestedName("dataset", text, "--data")], ALONE).files(text)


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    (violation,) = caught.value.violations
    assert "\n" not in violation
    return violation


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A model's folder with what else repositories hold."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    (folder / "LICENSE").write_text("free")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


def config_of(tmp_path: Path, *overrides: str):
    sections = {
        "model": {"hf_path": "owner/tiny"},
        "precision": {"dtype": "fp32"},
        "prompts": {"path": "hf://owner/questions/train.jsonl"},
        "rollout": {"prompts_per_step": 2, "responses_per_prompt": 2, "max_prompt_tokens": 8, "max_response_tokens": 6},
        "parallel": {"micro_batch_size": 2},
        "run": {"output_dir": str(tmp_path / "run")},
    }
    return parse_config(sections, overrides)


def test_a_model_comes_by_name_as_data_alone(hub, folder):
    commit = hub.add("owner/tiny", folder)
    found = model("owner/tiny")
    assert (found.id, found.revision) == ("owner/tiny", commit)
    assert hub.fetched() == set(found.files) == {path.name for path in Path(found.folder).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= hub.fetched()
    assert not hub.fetched() & {"modeling_evil.py", "pytorch_model.bin", "consolidated.safetensors", "onnx/config.json"}
    assert (Path(found.folder) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_of_a_model_in_parts_the_parts_that_its_index_names_are_fetched(hub):
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors", "z": "../z.safetensors"}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    weights = {f"model-{number}.safetensors": b"weights" for number in (1, 2, 3)}
    hub.add("owner/parts", files | weights)
    assert set(model("owner/parts").files) == {*files, "model-1.safetensors", "model-2.safetensors"}
    assert "model-3.safetensors" not in hub.fetched()


def test_a_revision_is_a_branch_or_a_commit_and_the_newest_by_default(hub):
    first, second = (hub.add("owner/tiny", {"config.json": content}) for content in (b'{"a": 1}', b'{"a": 2}'))
    named = {"owner/tiny": second, "owner/tiny@main": second, f"hf://owner/tiny@{first}": first}
    assert {text: model(text).revision for text in named} == named


def test_a_recorded_commit_counts_though_the_branch_moved_or_the_hub_is_gone(hub, monkeypatch):
    first = hub.add("owner/tiny", {"config.json": b'{"a": 1}', "model.safetensors": b"1"})
    model("owner/tiny")
    hub.add("owner/tiny", {"config.json": b'{"a": 2}', "model.safetensors": b"2"})
    recorded = {"owner/tiny": first}.copy
    assert model("owner/tiny", recorded=recorded).revision == first
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = model("owner/tiny", recorded=recorded)
    assert (found.revision, Path(found.folder, "model.safetensors").read_bytes()) == (first, b"1")


def test_a_node_that_has_not_the_main_processs_cache_fetches_the_same_commit(hub, tmp_path):
    commit = hub.add("owner/tiny", {"config.json": b'{"a": 1}', "model.safetensors": b"1"})
    hub.add("owner/tiny", {"config.json": b'{"a": 2}', "model.safetensors": b"2"})
    files = ("config.json", "model.safetensors")
    told = Download("owner/tiny", commit, "/on/another/node", files)
    there = fetch._on_this_disk(RequestedName("model", "owner/tiny", "--model"), told)
    assert there == replace(told, folder=str(tmp_path / "cache" / "models--owner--tiny" / "snapshots" / commit))
    assert Path(there.folder, "model.safetensors").read_bytes() == b"1"
    hub.asked.clear()
    assert fetch._on_this_disk(RequestedName("model", "owner/tiny", "--model"), there) == there
    assert not hub.asked


def test_what_the_hub_does_not_have_is_said_with_what_to_do(hub):
    hub.add("owner/tiny", {"config.json": b"{}"})
    text = refusal(model, "owner/nothing")
    assert text.startswith(f"--model owner/nothing: it is not on this disk, and {hub.url} shows no model")
    assert "mend the name" in text
    assert "give a local Hugging Face folder" in text
    assert "no branch, tag or commit v7" in refusal(model, "owner/tiny@v7")
    assert "shows no data set owner/tiny" in refusal(data, "hf://owner/tiny/x.jsonl")


def test_without_a_network_the_error_is_quick_and_says_what_was_tried(hub, monkeypatch):
    hub.add("owner/tiny", {"config.json": b"{}"})
    model("owner/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)  # what a client does between tries
    text = refusal(model, "owner/other")
    assert "it is not on this disk, and http://127.0.0.1:9 could not be asked for it (ConnectError" in text
    assert text.endswith(
        "give a local Hugging Face folder, or fill the cache where there is a network: hf download owner/other"
    )
    assert refusal(model, "owner/tiny").endswith("HF_HUB_OFFLINE=1 takes the commit that the cache holds")
    assert "give a local file" in refusal(data, "owner/questions")
    assert not naps


def test_offline_the_cache_is_taken_and_nothing_is_asked(hub, monkeypatch):
    commit = hub.add("owner/tiny", {"config.json": b"{}", "model.safetensors": b"1"})
    hub.add("datasets/owner/questions", {"train.jsonl": PROMPTS})
    model("owner/tiny")
    hub.add("owner/light", {"config.json": b"{}", "model.safetensors": b"1"})
    model("owner/light", weights=False)
    data("hf://owner/questions/train.jsonl")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model("owner/tiny").revision == commit
    assert data("hf://owner/questions/train.jsonl")[0].read_bytes() == PROMPTS
    text = refusal(model, "owner/other")
    assert "HF_HUB_OFFLINE is set" in text
    assert text.endswith("hf download owner/other")
    assert "hf download a/b x.csv --repo-type dataset" in refusal(data, "hf://a/b/x.csv")
    assert "does not hold all of it" in refusal(model, "owner/light")
    assert "name the file, as hf://owner/questions/FILE" in refusal(data, "owner/questions")
    assert not hub.asked


def test_a_download_that_breaks_off_goes_on(hub, folder):
    hub.add("owner/tiny", folder)
    hub.refuses = "model.safetensors"
    assert "the same command goes on with what is missing" in refusal(model, "owner/tiny")
    hub.refuses = None
    hub.asked.clear()
    assert "model.safetensors" in model("owner/tiny").files
    assert hub.fetched() == {"model.safetensors"}


def test_data_is_one_file_a_benchmark_or_the_parts_of_one(hub):
    hub.add("datasets/HuggingFaceH4/MATH-500", {"test.jsonl": b"1", "README.md": b"", "math.py": b"raise SystemExit"})
    parts = {f"data/train-0000{number}-of-00002.parquet": b"p" for number in (0, 1)}
    hub.add("datasets/owner/parts", parts | {"README.md": b""})
    hub.add("datasets/owner/several", {"train.jsonl": b"1", "test.jsonl": b"2"})
    hub.add("datasets/owner/none", {"loader.py": b"raise SystemExit"})
    (by_name,) = data("HuggingFaceH4/MATH-500")
    (by_file,) = data("hf://HuggingFaceH4/MATH-500/test.jsonl")
    assert by_name == by_file
    assert [path.name for path in data("owner/parts")] == [name.removeprefix("data/") for name in parts]
    assert data("hf://owner/several/test.jsonl")[0].read_bytes() == b"2"
    text = refusal(data, "owner/several")
    assert text.endswith("has 2 data files (test.jsonl, train.jsonl); name one, as hf://owner/several/test.jsonl")
    assert "has no file of .jsonl" in refusal(data, "owner/none")
    assert "has no file nothing.csv" in refusal(data, "hf://owner/none/nothing.csv")
    assert not any(name.endswith((".py", ".md")) for name in hub.fetched())
    with pytest.raises(UserError, match="2 files on the hub, and one is read"):
        locate([RequestedName("dataset", "owner/parts", "--data")], ALONE).file("owner/parts")


def test_files_of_one_data_set_are_of_one_commit(hub):
    first = hub.add("datasets/owner/two", {"a.jsonl": b"1", "b.jsonl": b"1"})
    wanted = [RequestedName("dataset", f"hf://owner/two/{name}.jsonl", "prompts.path") for name in "ab"]
    assert locate(wanted, ALONE).revisions == {"datasets/owner/two": first}
    assert hub.asked.count("GET /api/datasets/owner/two") == 1  # the second is of the commit that the first was of


def test_a_path_asks_nobody(hub, folder, tmp_path):
    assert locate([RequestedName("model", str(folder), "--model")], ALONE) == LocalPaths()
    assert not hub.asked
    with pytest.raises(
        UserError, match="no such folder; give a local Hugging Face folder, or OWNER/NAME of one on the"
    ):
        open_named("a/b/c/d", (), SCORE_KEYS, ALONE)


def test_a_run_that_cannot_be_is_refused_before_its_weights_are_fetched(hub, folder, tmp_path):
    hub.add("owner/tiny", folder)
    hub.add("datasets/owner/questions", {"train.jsonl": PROMPTS})
    with pytest.raises(UserError, match=r"parallel.tp=3 does not divide"):
        fetch_inputs(config_of(tmp_path, "parallel.tp=3"), ALONE, world_size=3)
    assert "has no effect here" in refusal(open_named, "owner/tiny", ("run.num_steps=3",), SCORE_KEYS, ALONE)
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_a_plan_reads_what_was_fetched_and_records_the_commits(hub, folder, tmp_path):
    commits = {"owner/tiny": hub.add("owner/tiny", folder)}
    commits["datasets/owner/questions"] = hub.add("datasets/owner/questions", {"train.jsonl": PROMPTS})
    config = config_of(tmp_path)
    plan = make_plan(config, 1, located=fetch_inputs(config, ALONE, world_size=1))
    assert dict(plan.inputs.revisions) == commits
    assert plan.config.model.hf_path == "owner/tiny"
    assert plan.hf_folder.name == commits["owner/tiny"]
    assert len(plan.prompts) == 2
    by_path = config_of(
        tmp_path, f"model.hf_path={folder}", f"prompts.path={plan.located.files(config.prompts.path)[0]}"
    )
    (folder / "consolidated.safetensors").unlink()
    assert make_plan(by_path, 1).inputs.digests == plan.inputs.digests


def test_check_fetches_config_and_tokenizer_only_and_says_so(hub, folder, tmp_path):
    commit = hub.add("owner/tiny", folder)
    hub.add("datasets/owner/questions", {"train.jsonl": PROMPTS})
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config_of(tmp_path).model_dump(exclude_none=True)))
    done = CliRunner().invoke(cli.app, ["check", str(path)])
    assert done.exit_code == 0, done.output
    assert f"hub       owner/tiny at commit {commit}" in done.output
    assert "the weights of owner/tiny stay on the hub: that they fit config.json was not looked at" in done.output
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_check_without_a_network_exits_with_2_and_one_sentence(hub, tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config_of(tmp_path).model_dump(exclude_none=True)))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as caught:
        leaving.exit_codes(lambda: cli.app(["check", str(path)], standalone_mode=False))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: model.hf_path='owner/tiny': it is not on this disk, and http://127.0.0.1:9 could not be"
    )


def test_a_conversion_of_a_name_says_which_commit_it_is_of(hub, folder, tmp_path):
    commit = hub.add("owner/tiny", folder)
    located = locate_models({"--hf": "owner/tiny"}, ALONE)
    request = ConversionRequest(located.folder("owner/tiny"), tmp_path / "megatron", revisions=located.revisions)
    hf_to_megatron(request, Ranks())
    mark = json.loads((tmp_path / "megatron" / "conversion.json").read_text())
    assert mark["revisions"] == {"owner/tiny": commit}
