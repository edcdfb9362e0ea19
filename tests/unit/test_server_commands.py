"""The command of a run's server: all that changes what is sampled is in it, and nothing can be put beside it twice."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from megatron_powerflow.config import Config
from megatron_powerflow.config_file import parse_config
from megatron_powerflow.serving.checks import server_violations
from megatron_powerflow.serving.command_line import OURS, argument_violations, command_of


def config(*overrides: str) -> Config:
    values = {
        "model": {"hf_path": "m"},
        "prompts": {"path": "p"},
        "rollout": {"engine": "vllm"},
        "run": {"output_dir": "r"},
    }
    return parse_config(values, ["rollout.max_prompt_tokens=10", "rollout.max_response_tokens=20", *overrides])


STARTED = ("rollout.vllm.start=1",)


def test_what_decides_what_is_sampled_is_in_the_command(tmp_path):
    command = command_of(config(*STARTED, "precision.dtype=fp32"), tmp_path, port=8123, gpus="2,3")
    words = list(command.arguments)
    expected = {"--dtype": "float32", "--max-model-len": "30", "--port": "8123", "--generation-config": "vllm"}
    assert {name: words[words.index(name) + 1] for name in expected} == expected
    assert words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert json.loads(words[words.index("--weight-transfer-config") + 1])["backend"] == "powerflow"
    assert "--enable-sleep-mode" not in words
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    said = shlex.split(command.text)
    assert said[-len(words) :] == words, "a shell reads the same words"
    in_bf16 = command_of(config(*STARTED, "precision.dtype=bf16"), tmp_path, port=8123)
    assert "bfloat16" in in_bf16.arguments
    assert "CUDA_VISIBLE_DEVICES" not in in_bf16.environment


def test_whatever_the_command_sets_itself_is_refused_beside_it(tmp_path):
    set_by_us = {word for word in command_of(config(*STARTED), tmp_path, port=1).arguments if word.startswith("--")}
    assert set_by_us <= set(OURS)


@pytest.mark.parametrize(
    "argument",
    ["--dtype", "--dtype=half", "--max_model_len=9", "--max-model=9", "-tp", "--weight-transfer-config.backend=nccl"],
)
def test_an_argument_of_ours_is_refused_however_it_is_spelt(argument):
    (violation,) = argument_violations([argument, "9"])
    assert violation.startswith(f"rollout.vllm.arguments holds {argument.partition('=')[0]}, which this program sets")


def test_other_arguments_are_nobodys_business():
    assert argument_violations(["--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens=99", "-O3"]) == []


def test_all_that_is_wrong_with_the_servers_is_said_at_once():
    urls = "rollout.vllm.urls=[http://a:1,http://a:1/,ftp://b:2]"
    twice, other = server_violations(config(urls))
    assert twice == "rollout.vllm.urls names http://a:1 twice; name it once"
    assert "'ftp://b:2' is no address of a vLLM server" in other


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("no-such-python", "no program of that name"),
        (sys.executable, "has no package vllm"),
        ("/bin/false", "has no package"),
    ],
)
def test_an_environment_without_vllm_is_said_where_servers_start(python, words):
    settings = config(*STARTED, f"rollout.vllm.python={python}")
    assert server_violations(settings) == []
    (violation,) = server_violations(settings, starts_here=True)
    assert words in violation
