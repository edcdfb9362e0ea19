"""Links, devices, FIFOs and bombs in the place of files: refused by name, never copied, never waited for."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_powerflow.commands.open_model import SCORE_KEYS, open_model
from megatron_powerflow.config_file import load_config
from megatron_powerflow.data.chat_template import ConversationSettings
from megatron_powerflow.data.rows import read_file
from megatron_powerflow.data.tokenizer import load_tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.ordinary_files import require_ordinary_files
from megatron_powerflow.targets import file_refusals
from megatron_powerflow.training.plan import make_plan
from tests.conftest import REPOSITORY


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


@pytest.fixture
def config(model, tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5"}\n')
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{hf_path: {model}}}\nprompts: {{path: {tmp_path / 'prompts.jsonl'}}}\n"
        "rollout: {prompts_per_step: 1, responses_per_prompt: 4, max_prompt_tokens: 9, max_response_tokens: 9}\n"
        f"run: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    return path


def refusal(config: Path, *overrides: str) -> str:
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        make_plan(load_config(config, overrides), 1)
    assert time.process_time() - began < 30
    return "\n".join(caught.value.violations)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "LICENSE", "chat_template.jinja", "tokenizer.model"])
def test_a_link_that_leads_out_of_a_model_is_refused_before_it_is_copied(config, model, tmp_path, name):
    secret = tmp_path / "shadow"
    secret.write_bytes((model / name).read_bytes() if (model / name).exists() else b"root:hunter2")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    assert f"{model / name}: a link that leads out of the folder" in refusal(config)
    with pytest.raises(UserError, match="a link that leads out"):
        open_model(model, (), SCORE_KEYS, 1)


def test_a_linked_folder_in_a_model_counts_as_a_link(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("x")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"additional_chat_templates/a.jinja: a link"):
        require_ordinary_files(model)


def test_links_of_the_hubs_cache_within_the_folder_and_of_weights_are_followed(config, model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    assert make_plan(load_config(config, [f"model.hf_path={snapshot}"]), 1)
    (model / "config.json").rename(model / "its_config.json")
    (model / "config.json").symlink_to("its_config.json")
    (model / "model.safetensors").rename(tmp_path / "weights")
    (model / "model.safetensors").symlink_to(tmp_path / "weights")
    assert make_plan(load_config(config), 1)
    (tmp_path / "linked").symlink_to(model)  # the folder itself
    assert make_plan(load_config(config, [f"model.hf_path={tmp_path / 'linked'}"]), 1)


def test_a_blob_that_is_a_link_itself_is_refused(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "x", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "b").symlink_to("/etc/hostname")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/b")
    with pytest.raises(UserError, match="a link that leads out"):
        require_ordinary_files(snapshot)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "generation_config.json", "README.md", "model.safetensors"]
)
def test_a_fifo_or_a_device_in_a_model_is_named_and_not_waited_for(config, model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert f"{model / name}: is a FIFO" in refusal(config)
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    assert f"{model / name}: is a device" in refusal(config)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.hf_path", "no such folder"),
        ("prompts.path", "no ordinary file"),
        ("prompts.chat_template", "no ordinary one"),
        ("evaluation.prompts", "no ordinary file"),
        ("run.output_dir", "is a file; name a folder"),
        ("rollout.replay", "no step_"),
    ],
)
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/full"])
def test_a_key_that_names_a_device_or_a_fifo_is_refused_at_once(config, tmp_path, key, words, kind):
    path = Path(kind)
    if kind == "fifo":
        os.mkfifo(path := tmp_path / "fifo")
    assert words in refusal(config, f"{key}={path}")


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/full", "/dev/null"])
def test_an_out_that_is_a_device_or_a_fifo_is_refused(tmp_path, kind):
    path = Path(kind)
    if kind == "fifo":
        os.mkfifo(path := tmp_path / "fifo")
    (refused,) = file_refusals(path, lambda start: True)
    assert "no ordinary file" in refused


TEMPLATES = {
    "a product": ("{{ 'a' * 10**10 }}", "asks for over 1 GiB of memory"),
    "a list": ("{{ ([1] * 10**10) | length }}", "asks for over 1 GiB of memory"),
    "a format": ("{{ '%9999999999d' % 1 }}", "the chat template"),
    "a doubling": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "the chat template (asks for over 1 GiB|has not written)",
    ),
    "a power": ("{{ 10 ** (10 ** 8) }}", "the chat template"),
    "a loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "has not written this conversation in 1 s",
    ),
    "a range": ("{% for i in range(10**9) %}x{% endfor %}", "the chat template refuses"),
    "a long text": ("{{ 'a' * (10**7 + 1) }}", "writes 10,000,001 characters"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_endless_or_enormous_template_is_refused(model, name, monkeypatch):
    template, words = TEMPLATES[name]
    if name in ("a doubling", "a loop", "a power"):  # which take as long as they are let
        monkeypatch.setattr("megatron_powerflow.data.chat_template.RENDER_SECONDS", 1.0)
    tokenizer = load_tokenizer(model, ConversationSettings(template))
    before, began = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    with pytest.raises(UserError, match=words):
        tokenizer.encode_chat([{"role": "user", "content": "w5"}])
    assert time.process_time() - began < 20
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert load_tokenizer(model, ConversationSettings("w5 w6")).encode_chat([{"role": "user", "content": "x"}]) == [
        5,
        6,
    ]


READ = """
import resource, sys
from pathlib import Path
from megatron_powerflow.data.rows import read_file
from megatron_powerflow.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    rows = sum(1 for _ in read_file(Path(sys.argv[1]), []))
except UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_a_parquet_file_of_a_kilobyte_does_not_take_gigabytes(tmp_path, as_dictionary):
    """A thousand rows of one value of 1.8 MB, which a dictionary holds once: 1.8 GB when unpacked. Arrow itself
    may keep the dictionary, and leave the unpacking to whoever asks for the rows."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "bomb.parquet"
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, "int32"), ["a" * 1_800_000])
    table = pyarrow.table({"prompt": column})
    parquet.write_table(table, path, compression="zstd", store_schema=as_dictionary)
    assert path.stat().st_size < 5000
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, cwd=REPOSITORY)
    assert "unpacks to over 256 MiB" in done.stdout, done.stderr
    assert int(done.stdout.split()[-1]) < 1500  # MiB more; 3,600 where nothing counts


def test_a_parquet_file_of_one_enormous_value_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_powerflow.data.rows.FEW_BYTES", 2**20)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a" * 30_000_000]}), path, compression="zstd")
    with pytest.raises(UserError, match="unpacks to over"):
        list(read_file(path, []))


def test_a_gz_file_that_unpacks_to_much_more_is_refused_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_powerflow.data.rows.FEW_BYTES", 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"a" * 30_000_000 + b'"}\n'))
    with pytest.raises(UserError, match="unpacks to over"):
        list(read_file(path, []))


def test_repeated_rows_are_no_bomb(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "same.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["w5 " * 700] * 20_000}), path)
    assert sum(1 for _ in read_file(path, [])) == 20_000


def test_deep_json_and_huge_numbers_are_refused_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "w5"}\n' + "[" * 100_000 + "\n" + '{"prompt": ' + "9" * 5000 + "}\n" + json.dumps({"a": 1})
    )
    violations: list[str] = []
    assert len(list(read_file(path, violations))) == 2
    assert [text.split(": ")[0] for text in violations] == [f"{path}:2", f"{path}:3"]
