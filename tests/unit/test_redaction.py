"""Keys and passwords are hidden by value, by name and by place; what is none is left as it is."""

from __future__ import annotations

import pytest

from megatron_powerflow.parallel.launch import command_line
from megatron_powerflow.redaction import holds_secret, redacted


@pytest.mark.parametrize(
    "text",
    [
        "powerflow train c.yaml run.name=hunter2hunter2",
        "metrics.api_key='hunter2hunter2': unknown key; known: wandb",
        "metrics.wandb_api_key=hunter2hunter2 run.seed=1",
        "WANDB_API_KEY=hunter2hunter2 powerflow",
        "--judge-url https://me:hunter2hunter2@host/v1 --out x",
        "https://hunter2hunter2@host/v1",
        "https://host/v1?token=hunter2hunter2&a=b",
        'HF_TOKEN="hunter2hunter2"',
        "Authorization: Bearer hunter2hunter2",
        "password: hunter2hunter2",
    ],
)
def test_a_secret_is_hidden(text):
    hidden = redacted(text, ["hunter2hunter2"] if "run.name" in text else [])
    assert "hunter2" not in hidden
    assert "[secret]" in hidden


@pytest.mark.parametrize(
    "text",
    [
        "powerflow train c.yaml rollout.max_response_tokens=64 rollout.stop_token_ids=[1,2] objective.alpha=2",
        "--judge-key-file /home/me/key --model m@main hf://OWNER/NAME/FILE",
        "error: objective.alhpa=2: unknown key; did you mean alpha? known: preset, alpha",
        "https://huggingface.co/a/b@c",
        "mail me@example.com: 5 tokens: 7",
    ],
)
def test_what_is_no_secret_is_left_as_it_is(text):
    assert redacted(text, ["", "a", "short"]) == text


def test_a_typed_command_has_no_value_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-key-1")
    monkeypatch.setenv("MY_TOKEN", "planted-token-2")
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id_rsa")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "harmless-value")
    text = command_line("powerflow", "x=planted-key-1", "a planted-token-2", "harmless-value", "/home/me/.ssh/id_rsa")
    assert text == "powerflow x=[secret] 'a [secret]' harmless-value /home/me/.ssh/id_rsa"


def test_a_longer_secret_goes_before_one_that_it_holds():
    assert redacted("abcdefgh-12345678", ["abcdefgh", "abcdefgh-12345678"]) == "[secret]"


def test_what_holds_a_secret():
    assert holds_secret("x planted-key-1 y", ["planted-key-1"])
    assert holds_secret("https://a:b@c/d", [])
    assert not holds_secret("hf://a/b@c", ["short", ""])
