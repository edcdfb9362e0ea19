"""Which texts are names on the hub; no server."""

from __future__ import annotations

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.hub.names import BENCHMARK_FILES, HubName, parse_hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen2.5-1.5B", HubName("model", "Qwen/Qwen2.5-1.5B")),
        ("a/b@main", HubName("model", "a/b", "main")),
        ("a/b@refs/pr/3", HubName("model", "a/b", "refs/pr/3")),
        (f"hf://a/b@{COMMIT}", HubName("model", "a/b", COMMIT)),
    ],
)
def test_a_model_is_owner_and_name(text, expected):
    assert parse_hub_name(text, "model") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", HubName("dataset", "a/b")),
        ("hf://a/b", HubName("dataset", "a/b")),
        ("hf://a/b/c/d.jsonl", HubName("dataset", "a/b", None, "c/d.jsonl")),
        ("hf://datasets/a/b@v1.0/d.jsonl", HubName("dataset", "a/b", "v1.0", "d.jsonl")),
        *((name, HubName("dataset", name)) for name in BENCHMARK_FILES),
    ],
)
def test_data_is_a_data_set_or_a_file_of_one(text, expected):
    assert parse_hub_name(text, "dataset") == expected


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize(
    "text",
    [
        *("../x", "./x", "~/x", "/a/b", "a", "a/b/c/d", "a b/c", "a/b c", "a/.b", "a/b.", "a--b/c", "a/b..c", "a/b@"),
        *("a/b\n", "a/b.git", "a/b@-x", "a/b@..", "é/b", "a/" + "b" * 95, ""),
    ],
)
def test_hostile_and_malformed_names_are_paths(text, kind):
    assert parse_hub_name(text, kind) is None


@pytest.mark.parametrize(
    "behind", ["", "a", "../x", "a/b/../../etc/passwd", "a//b", "a b/c", "a/b@/x", "a/b/\x00", "/a/b"]
)
def test_malformed_names_that_are_said_to_be_the_hubs_are_refused(behind):
    with pytest.raises(UserError, match=r"not a name of the hub; data on the hub is hf://OWNER/NAME"):
        parse_hub_name(f"hf://{behind}", "dataset")
    with pytest.raises(UserError, match=r"not a name of the hub; a model on the hub is hf://OWNER/NAME"):
        parse_hub_name(f"hf://{behind}", "model")


def test_what_is_on_this_disk_is_a_path(tmp_path, monkeypatch):
    """A folder OWNER too: models/mine, mistyped, is not a stranger's model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert parse_hub_name("models/mine", "model") is None
    assert parse_hub_name("hf://models/mine", "model") == HubName("model", "models/mine")
    assert parse_hub_name("prompts/train.jsonl", "dataset") is None  # a file that is not there, and not the hub's
    assert parse_hub_name("prompts/train.jsonl.gz", "dataset") is None
