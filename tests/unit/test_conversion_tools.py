"""Both directions of conversion, on disk: bit-equal for every family, in files of any size; what is wrong is named;
a conversion that was killed leaves nothing that passes for a model."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_powerflow.checkpoint.folder import find_checkpoint
from megatron_powerflow.console import make_console
from megatron_powerflow.converter.commands import parse_size, verify
from megatron_powerflow.converter.compare import compare
from megatron_powerflow.converter.convert import ConversionRequest, hf_to_megatron, megatron_to_hf
from megatron_powerflow.converter.inspect import describe, inspect
from megatron_powerflow.converter.model_folders import open_model_folder
from megatron_powerflow.converter.ranks import Ranks
from megatron_powerflow.converter.torch_dist import TorchDistFolder
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.files import INDEX_NAME, SafetensorsFolder
from megatron_powerflow.parallel.launch import Launch
from tests.tiny_models import FAMILIES

ALONE = Ranks()
REPOSITORY = Path(__file__).parents[2]


def to_megatron(source: Path, out: Path, **settings) -> Path:
    hf_to_megatron(ConversionRequest(source, out, **settings), ALONE)
    return out


def to_hf(source: Path, out: Path, **settings) -> Path:
    megatron_to_hf(ConversionRequest(source, out, **settings), ALONE)
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def converted(tiny_model, tmp_path_factory) -> Path:
    return to_megatron(tiny_model("qwen3_moe"), tmp_path_factory.mktemp("converted") / "megatron")


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_to_megatron_to_hf_is_bit_equal(tiny_model, tmp_path, family):
    """Read by safetensors' own reader; config, tokenizer and generation config byte by byte."""
    model = tiny_model(family)
    back = to_hf(to_megatron(model, tmp_path / "megatron"), tmp_path / "back", max_shard_bytes=50_000)
    before, after = tensors_of(model), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (model / name).read_bytes()
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 4
    index = json.loads((back / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    assert all(name in load_file(back / file) for name, file in index["weight_map"].items())
    assert not list(tmp_path.glob("*.partial"))


def test_transformers_reads_what_comes_back(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    back = to_hf(to_megatron(tiny_model("mixtral"), tmp_path / "megatron"), tmp_path / "back", dtype="bf16")
    model = AutoModelForCausalLM.from_pretrained(back)
    assert model.dtype == torch.bfloat16
    tokens = torch.tensor([[5, 6, 7]])
    original = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), dtype=torch.bfloat16)
    assert torch.equal(model(tokens).logits, original(tokens).logits)


def test_what_stays_in_fp32_does_so_in_both_directions(tiny_model, tmp_path):
    """DeepSeek's numbers for the choice of experts, in a model of bf16, which config.json says it is."""
    model, name = tiny_model("deepseek_v3"), "model.layers.1.mlp.gate.e_score_correction_bias"
    megatron = to_megatron(model, tmp_path / "megatron", dtype="bf16")
    back = to_hf(megatron, tmp_path / "back", dtype="bf16", verify=True)
    before, after = tensors_of(model), tensors_of(back)
    assert after[name].dtype == torch.float32
    assert torch.equal(after[name], before[name])
    assert {tensor.dtype for key, tensor in after.items() if "correction_bias" not in key} == {torch.bfloat16}
    for folder in (back, megatron / "hf"):
        config = json.loads((folder / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_a_converted_checkpoint_of_any_split_comes_back(converted, tiny_model, tmp_path):
    """torch's own writer makes one chunk of all layers and experts of a kind."""
    from torch.distributed import checkpoint

    source = TorchDistFolder(converted / "release")
    cut = tmp_path / "cut"
    shutil.copytree(converted, cut)
    for path in (*(cut / "release").glob("*.distcp"), cut / "release" / ".metadata"):
        path.unlink()
    state = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in source.tensors().items()}
    checkpoint.load(state, checkpoint_id=converted / "release")
    checkpoint.save(state, checkpoint_id=cut / "release")  # every global tensor one chunk
    found = compare(open_model_folder(tiny_model("qwen3_moe"), ALONE), open_model_folder(cut, ALONE), ALONE)
    assert found.num_exactly_equal == found.num_tensors == len(tensors_of(tiny_model("qwen3_moe")))


def test_ranks_share_everything_once():
    items = list(range(1, 30))
    shares = [Ranks(rank, 3).share(items, lambda item: item) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(sum, shares)) - min(map(sum, shares)) <= 3


def drop(tensors):
    del tensors["model.norm.weight"]


def add(tensors):
    tensors["model.layers.0.self_attn.extra.weight"] = torch.zeros(2)


def narrow(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


def quantize(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 48, dtype=torch.int8)


def everything_at_once(tensors):
    drop(tensors)
    add(tensors)
    narrow(tensors)


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (drop, ["tensor model.norm.weight is missing"]),
        (add, ["tensor model.layers.0.self_attn.extra.weight is not part"]),
        (narrow, ["tensor lm_head.weight has shape (300, 48), config.json implies (301, 48)"]),
        (quantize, ["tensor model.layers.1.mlp.up_proj.weight is I8"]),
        (everything_at_once, ["model.norm.weight is missing", "extra.weight is not part", "lm_head.weight has shape"]),
    ],
)
def test_tampered_tensors_are_named(tiny_model, tmp_path, tamper, expected):
    model = shutil.copytree(tiny_model("qwen3"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tamper(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as raised:
        to_megatron(model, tmp_path / "out")
    assert len(raised.value.violations) == len(expected)
    for text in expected:
        assert any(text in violation for violation in raised.value.violations)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "'dynamic'"),
        ({"vocab_size": 10**12}, "config.json implies (1000000000000, 48)"),
        ({"hidden_size": 10**13}, "weights; no model has over 1e+14"),
        ({"vocab_size": 10**13}, "weights; no model has over 1e+14"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000; no model has over 10000"),
        ({"num_hidden_layers": 9999, "layer_types": None}, "num_hidden_layers=9999, but there are only"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is missing or not a whole number above 0"),
        ({"hidden_size": True}, "hidden_size is missing or not a whole number above 0"),
    ],
)
def test_a_hostile_config_is_an_error(tiny_model, converted, tmp_path, changes, expected):
    """The same in a Hugging Face folder and in a checkpoint's `hf/`."""
    model = shutil.copytree(tiny_model("qwen3"), tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(UserError) as raised:
        to_megatron(model, tmp_path / "out")
    assert expected in str(raised.value)
    checkpoint = shutil.copytree(converted, tmp_path / "checkpoint")
    raw = json.loads((checkpoint / "hf" / "config.json").read_text())
    (checkpoint / "hf" / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(UserError):
        to_hf(checkpoint, tmp_path / "back")


def sharded(tiny_model, tmp_path) -> Path:
    return to_hf(to_megatron(tiny_model("llama"), tmp_path / "mg"), tmp_path / "sharded", max_shard_bytes=50_000)


def test_a_tensor_in_two_shards_and_a_truncated_shard_are_named(tiny_model, tmp_path):
    model = sharded(tiny_model, tmp_path)
    first, second, *_ = sorted(model.glob("*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)
    with pytest.raises(UserError, match=f"tensor {name} is in .* as well"):
        to_megatron(model, tmp_path / "out")
    first.write_bytes(first.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{first.name}: truncated or damaged"):
        SafetensorsFolder(model)


def test_links_that_leave_the_folder_are_refused_but_for_the_hub_cache(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "models--x" / "snapshots" / "abc")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for name, target in (("model.safetensors", blobs / "123"), ("tokenizer.json", tmp_path / "elsewhere")):
        (model / name).rename(target)
        (model / name).symlink_to(target)
    with pytest.raises(UserError) as raised:
        to_megatron(model, tmp_path / "out")
    (violation,) = raised.value.violations
    assert "tokenizer.json: a link that leads out of the folder" in violation


def test_out_must_be_a_new_place(tiny_model, converted, tmp_path):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    with pytest.raises(UserError, match="lies in the other"):
        to_megatron(model, model / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no conversion wrote it"):
            to_megatron(model, tmp_path / "full", overwrite=overwrite)
    out = to_megatron(model, tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        to_megatron(tiny_model("qwen2"), out)
    to_megatron(tiny_model("qwen2"), out, overwrite=True)
    assert inspect(out)["config"]["model_type"] == "qwen2"
    assert not list(tmp_path.glob("out.*"))
    with pytest.raises(UserError, match="a Megatron checkpoint already"):
        to_megatron(converted, tmp_path / "other")
    with pytest.raises(UserError, match="a Hugging Face folder already"):
        to_hf(model, tmp_path / "other")


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["common.pt", ".metadata"])
def test_a_checkpoint_that_would_run_code_is_refused_unrun(converted, tmp_path, name):
    checkpoint, marker = shutil.copytree(converted, tmp_path / "checkpoint"), tmp_path / "ran"
    if name == "common.pt":
        torch.save({"iteration": Hostile(marker)}, checkpoint / "release" / name)
    else:
        (checkpoint / "release" / name).write_bytes(pickle.dumps(Hostile(marker)))
    for use in (lambda: to_hf(checkpoint, tmp_path / "out"), lambda: inspect(checkpoint)):
        with pytest.raises(UserError, match="refused"):
            use()
    assert not marker.exists()


def test_a_truncated_checkpoint_file_and_a_wrong_tensor_are_named(converted, tmp_path):
    checkpoint = shutil.copytree(converted, tmp_path / "checkpoint")
    raw = json.loads((checkpoint / "hf" / "config.json").read_text())
    (checkpoint / "hf" / "config.json").write_text(json.dumps(raw | {"moe_intermediate_size": 25, "vocab_size": 400}))
    with pytest.raises(UserError) as raised:
        to_hf(checkpoint, tmp_path / "out")
    for text in ("linear_fc1.weight has shape (4, 6, 48, 48), config.json implies (4, 6, 50, 48)", "has 384 rows"):
        assert text in str(raised.value)
    (file,) = (checkpoint / "release").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1000])
    (checkpoint / "hf" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"__0_0.distcp: truncated"):
        to_hf(checkpoint, tmp_path / "out")


def run_verify(a: Path, b: Path, card: Path):
    return verify(a, b, None, card, Launch("alone", 0, 1, 0, 1), make_console(io.StringIO()), "a command")


def test_a_flipped_bit_is_caught_and_named(tiny_model, tmp_path):
    model = tiny_model("llama")
    other = shutil.copytree(model, tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"tensor model\.[a-z_.0-9]+ differs in 1 of"):
        run_verify(model, to_megatron(other, tmp_path / "megatron"), tmp_path / "card.json")
    card = json.loads((tmp_path / "card.json").read_text())
    assert not card["equal"]
    assert card["num_exactly_equal"] == card["num_tensors"] - 1


def test_another_computation_is_a_difference(tiny_model, tmp_path):
    """The same tensors, and a config.json that was rewritten on the way."""
    model = tiny_model("llama")
    other = shutil.copytree(model, tmp_path / "other")
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match=r"norm_epsilon is 1e-06 in .* and 1e-05"):
        run_verify(model, other, tmp_path / "card.json")


def test_the_card_says_what_was_compared(tiny_model, tmp_path):
    model = tiny_model("qwen2")
    tensors = tensors_of(model)
    found = run_verify(model, to_megatron(model, tmp_path / "megatron"), tmp_path / "card.json")
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["equal"]
    assert card["family"] == "qwen2"
    assert card["num_exactly_equal"] == card["num_tensors"] == len(tensors)
    assert card["num_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert card["dtype"] == "float32"
    assert card["command"] == "a command"
    assert {"torch", "megatron-core", "transformers"} <= card["versions"].keys()
    rounded = to_hf(tmp_path / "megatron", tmp_path / "rounded", dtype="bf16", verify=True)
    again = json.loads((rounded / "conversion_card.json").read_text())
    assert (again["num_exactly_equal"], again["num_equal_as_rounded"]) == (0, len(tensors))
    assert again["sha256"] == found.sha256  # of the same tensors, whatever folder they lie in


def test_inspect_lists_every_tensor(tiny_model, converted):
    found = inspect(tiny_model("qwen3_moe"))
    tensors = tensors_of(tiny_model("qwen3_moe"))
    assert found["tensors"].keys() == tensors.keys()
    assert all(tuple(found["tensors"][name]["shape"]) == tuple(tensors[name].shape) for name in tensors)
    stored = inspect(converted)
    assert stored["kind"] == "converted checkpoint"
    assert stored["tensors"]["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == {
        "shape": [4, 6, 48, 24],
        "dtype": "float32",
        "num_bytes": 4 * 6 * 48 * 24 * 4,
    }
    assert "decoder.layers.mlp.experts.experts.linear_fc2.weight" in describe(stored)


PAUSED = """
import sys, time
from pathlib import Path
from megatron_powerflow.converter.convert import ConversionRequest, hf_to_megatron, megatron_to_hf
from megatron_powerflow.converter.ranks import Ranks
total = 0
def advance(size):
    global total
    total += size
    if total > 150_000:
        print("paused", flush=True)
        time.sleep(600)
if __name__ == "__main__":
    function = {"hf_to_megatron": hf_to_megatron, "megatron_to_hf": megatron_to_hf}[sys.argv[1]]
    function(ConversionRequest(Path(sys.argv[2]), Path(sys.argv[3]), max_shard_bytes=50_000), Ranks(), advance)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_conversion_that_was_stopped_leaves_nothing_that_looks_whole(tiny_model, tmp_path, how):
    """Both directions, each a real process stopped in the middle of its files; the same command then does its work."""
    model = tiny_model("llama")
    megatron = to_megatron(model, tmp_path / "megatron")
    outs = {"hf_to_megatron": (model, tmp_path / "out1"), "megatron_to_hf": (megatron, tmp_path / "out2")}
    (tmp_path / "paused.py").write_text(PAUSED)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(tmp_path / "paused.py")]
    processes = [
        subprocess.Popen(
            [*command, name, str(source), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job of `&` and its children ignore it
        )
        for name, (source, out) in outs.items()
    ]
    for process in processes:
        assert process.stdout.readline() == b"paused\n"
        process.send_signal(how)
        assert process.wait(60) != 0
        process.stdout.close()
    for _, out in outs.values():
        assert not out.exists()
        partial = out.with_name(out.name + ".partial")
        assert partial.exists() == (how is signal.SIGKILL)
        if partial.exists():
            assert find_checkpoint(partial) is None
            assert not (partial / "config.json").exists()
            with pytest.raises(UserError):
                open_model_folder(partial, ALONE)
    to_megatron(*outs["hf_to_megatron"], verify=True)
    to_hf(*outs["megatron_to_hf"], verify=True)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("text", ["", "5", "GB", "0GB", "-1GB", "5 apples"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)


def test_sizes_are_those_of_transformers():
    assert [parse_size(text) for text in ("5GB", "500MB", "1.5kb", "7B")] == [5 * 10**9, 5 * 10**8, 1500, 7]


@pytest.mark.parametrize(
    "name", ["convert_hf_to_megatron", "convert_megatron_to_hf", "verify_conversion", "inspect_checkpoint"]
)
def test_every_tool_shows_an_example(name):
    import importlib.util

    import typer

    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert f"tools/{name}.py" in result.output


@pytest.mark.slow
def test_the_commands_exit_with_2_and_say_why(tmp_path):
    tool = [sys.executable, str(REPOSITORY / "tools" / "inspect_checkpoint.py"), str(tmp_path / "nothing")]
    done = subprocess.run(tool, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
