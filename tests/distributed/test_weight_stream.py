"""Weights by a stream: from every layout, bit for bit; a worker that is missing, dies or hangs costs a bounded time.

The workers here are processes without vLLM (`weight_receiver.py`); real servers are in tests/vllm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_powerflow.serving.on_server.powerflow_weight_files import checksum
from tests.distributed.test_export import tensors_of

RECEIVER = Path(__file__).with_name("weight_receiver.py")
ON_SERVER = RECEIVER.parents[2] / "megatron_powerflow" / "serving" / "on_server"
MESSAGE_SECONDS = 5.0
BOUND_SECONDS = 60.0  # of an update that fails; torch would wait for half an hour
ENDING_SECONDS = 20.0  # within which the threads of a closed group have ended


class Receivers:
    """Workers by name, each with a mood and a folder. A context: they end with it."""

    def __init__(self, folder: Path, **moods: str) -> None:
        self.folder, self.moods = folder, moods
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Receivers:
        environment = {**os.environ, "PYTHONPATH": str(ON_SERVER), "OMP_NUM_THREADS": "1"}
        for name, mood in self.moods.items():
            (self.folder / name).mkdir()
            if mood == "missing":
                continue
            command = [sys.executable, str(RECEIVER), str(self.folder / name), mood]
            self._processes.append(subprocess.Popen(command, env=environment))
        for name, mood in self.moods.items():
            while mood != "missing" and not (self.folder / name / "ready.json").exists():
                time.sleep(0.05)
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def send_once(model: str, folder: str, names: list[str], rounds: int = 1, **parallel) -> dict:
    """Send the model of this layout to the workers of these names. Returns what the main rank saw of each."""
    import torch

    from megatron_powerflow.config import ModelSection, ParallelSection, PrecisionSection
    from megatron_powerflow.hf.config import read_architecture
    from megatron_powerflow.hf.families import FAMILIES as families
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.layout import inference_layout
    from megatron_powerflow.serving.server import Refused, Server, Unreachable
    from megatron_powerflow.serving.stream_group import Receiver, StreamGroup
    from megatron_powerflow.serving.weight_sender import WeightSender
    from megatron_powerflow.training.policy import build_policy

    class Standin(Server):
        """A server of one worker, which is asked by files."""

        def __init__(self, name: str, number: int) -> None:
            super().__init__(f"http://127.0.0.1:{1000 + number}")
            self.folder, self.dropped = Path(folder) / name, threading.Event()

        def drop(self) -> None:
            self.dropped.set()

    def ask(server, place, rank) -> None:
        result = server.folder / "result.json"
        result.unlink(missing_ok=True)
        partial = server.folder / "place.partial"
        partial.write_text(json.dumps({**asdict(place), "first_rank": rank}))
        partial.rename(server.folder / "place.json")
        while not result.exists():
            if server.dropped.wait(0.05):
                raise Unreachable(f"{server.url}: dropped")
        found = json.loads(result.read_text())
        if "checksums" not in found:
            raise Refused(f"{server.url}: {found}")

    launch = read_launch()
    architecture, family = read_architecture(model, families)
    layout = inference_layout(ParallelSection(**parallel), architecture, launch.world_size)
    with initialized(layout, launch, seed=0) as groups:
        chunks = build_policy(
            architecture, family, layout, ModelSection(hf_path=model), PrecisionSection(dtype="fp32"), groups
        )
        sender = WeightSender(chunks, architecture, family, groups, frame_bytes=4096)
        servers = [Standin(name, number) for number, name in enumerate(names)]
        left_behind = []
        for _ in range(rounds):
            group = StreamGroup(ask, torch.device("cpu"), seconds=MESSAGE_SECONDS, beat=lambda: None)
            began = time.monotonic()
            if groups.is_main:
                group.open([Receiver(server, 1, "127.0.0.1") for server in servers])
            totals = sender.send(group.put, lambda: None)
            failures = group.finish()
            seconds = time.monotonic() - began
            del group
            left_behind.append(held_after(left_behind))
    return {
        "checksums": totals.checksums,
        "bytes": totals.num_bytes,
        "failures": {
            name: str(failure) if (failure := failures.get(server.url)) else None
            for name, server in zip(names, servers, strict=True)
        },
        "seconds": seconds,
        "left_behind": left_behind,
    }


def held_after(earlier: list[dict[str, int]]) -> dict[str, int]:
    """What this process holds once that is no more than after the second of the earlier rounds, or time is up.

    The first round makes what stays (pools, connections of ranks). The threads of a closed group end a moment later.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        held = {name: len(os.listdir(f"/proc/self/{name}")) for name in ("task", "fd")}
        settled = len(earlier) > 1 and all(held[name] <= earlier[1][name] for name in held)
        if settled or len(earlier) < 2 or time.monotonic() > deadline:
            return held
        time.sleep(0.05)


def run(gloo, model, folder, receivers: dict[str, str], **parallel) -> dict:
    size = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("ep", 1) * parallel.pop("dp", 1)
    with ExitStack() as stack:
        stack.enter_context(Receivers(folder, **receivers))
        found = gloo.run(size, send_once, str(model), str(folder), list(receivers), **parallel)
        assert all(one["checksums"] == found[0]["checksums"] for one in found), "every rank knows the checksums"
        assert found[0]["checksums"] == {name: checksum(value) for name, value in tensors_of(model).items()}
        return found[0]


def received(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "result.json").read_text())


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "pp": 2}, {"dp": 2, "pp": 2}], ids=str)
def test_every_worker_receives_the_policy_bit_for_bit(gloo, tiny_model, tmp_path, parallel):
    found = run(gloo, tiny_model("qwen2"), tmp_path, {"a": "", "b": ""}, **parallel)
    assert found["failures"] == {"a": None, "b": None}
    assert received(tmp_path, "a")["checksums"] == received(tmp_path, "b")["checksums"] == found["checksums"]
    assert found["bytes"] == sum(value.nbytes for value in tensors_of(tiny_model("qwen2")).values())


def test_experts_on_several_ranks_are_sent_by_each_of_them(gloo, tiny_model, tmp_path):
    found = run(gloo, tiny_model("qwen3_moe"), tmp_path, {"a": ""}, ep=2, pp=2)
    assert found["failures"] == {"a": None}
    assert received(tmp_path, "a")["checksums"] == found["checksums"]


def test_without_a_worker_the_checksums_are_made(gloo, tiny_model, tmp_path):
    assert run(gloo, tiny_model("llama"), tmp_path, {}, pp=2)["failures"] == {}


def test_a_worker_that_does_not_come_is_left_out_and_the_other_gets_all(gloo, tiny_model, tmp_path):
    found = run(gloo, tiny_model("llama"), tmp_path, {"gone": "missing", "a": ""}, tp=2, pp=2)
    assert found["failures"]["a"] is None
    assert "its workers did not come to 127.0.0.1" in found["failures"]["gone"]
    assert received(tmp_path, "a")["checksums"] == found["checksums"]
    assert found["seconds"] < BOUND_SECONDS


@pytest.mark.parametrize("mood", ["die", "hang"])
def test_a_worker_that_is_lost_in_mid_stream_is_reported_for_all_in_bounded_time(gloo, tiny_model, tmp_path, mood):
    """For all: none of them has every tensor. The ranks that gather go on to the end."""
    found = run(gloo, tiny_model("llama"), tmp_path, {"lost": mood, "a": ""}, tp=2, pp=2)
    assert all("the weights broke off on their way" in found["failures"][name] for name in ("lost", "a")), found
    assert all("powerflow vllm-args" in found["failures"][name] for name in ("lost", "a"))
    assert found["seconds"] < BOUND_SECONDS


def test_a_group_for_each_update_leaves_nothing_behind(gloo, tiny_model, tmp_path):
    """No thread and no file descriptor: a round that left one would leave four more from the third to the last."""
    found = run(gloo, tiny_model("llama"), tmp_path, {"a": ""}, rounds=6)
    assert found["failures"] == {"a": None}
    _, second, *_, last = found["left_behind"]
    assert all(last[name] <= second[name] for name in second), found["left_behind"]
