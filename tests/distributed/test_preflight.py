"""Real ranks that stop, hang, die or do not come at the pre-flight: it ends in its time, and names rank and node."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.free_ports import free_port

pytestmark = pytest.mark.slow
# A rank that meets `incident` in its own matrix products, behind the roll call.
PROGRAM = """
import os, signal, sys, time
from megatron_powerflow.preflight import measure

def incident():
    {incident}

before = measure.measure_product
measure.measure_product = lambda device: (incident(), before(device))[1]
from megatron_powerflow.cli import main
main()
"""
INCIDENTS = {
    "none": "pass",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "time.sleep(1000)",
}


class Ranks:
    """Ranks of one pre-flight, each on a node of its own, as SLURM would name them. incidents: what a rank meets."""

    def __init__(self, config: Path, world_size: int, incidents: dict[int, str], *settings: str, port: int = 0) -> None:
        self.out = config.parent / "verdict.json"
        names = ("SLURM_", "OMPI_", "PMI_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        common = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port or free_port()),
            "SLURM_STEP_NODELIST": f"n[0-{world_size - 1}]",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(REPOSITORY),
        }
        arguments = ["preflight", str(config), *settings, "--out", str(self.out), "--slow", "0"]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(incident=INCIDENTS[incidents.get(rank, "none")]), *arguments],
                env=clean | common | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
            )
            for rank in range(world_size)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def ends(self, ranks: list[int]) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of these ranks; fails where one does not end."""
        said = [self.processes[rank].communicate(timeout=200) for rank in ranks]
        return [(self.processes[rank].returncode, *words) for rank, words in zip(ranks, said, strict=True)]

    def verdict(self) -> dict:
        return json.loads(self.out.read_text())


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{hf_path: {tmp_path}}}\nprompts: {{path: none.jsonl}}\nrun: {{output_dir: {tmp_path}/run}}\n"
    )
    return path


def test_ranks_that_are_fit_sum_over_every_group(config):
    with Ranks(config, 4, {}, "parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true") as ranks:
        ends = ranks.ends([0, 1, 2, 3])
        assert [end[0] for end in ends] == [0, 0, 0, 0], ends
        assert "pre-flight: all nodes are fit" in ends[0][1]
        assert [end[1] for end in ends[1:]] == ["", "", ""]
        verdict = ranks.verdict()
    assert (verdict["exit_code"], verdict["nodes"], verdict["lines"]) == (0, [], [])
    kinds = {row["kind"]: (row["num_groups"], row["size"]) for row in verdict["table"]["groups"]}
    assert kinds == {"tp": (2, 2), "pp": (2, 2), "nodes": (4, 2), "all": (1, 4)}
    assert all(0 < row["small_seconds"] < row["large_seconds"] < 10 for row in verdict["table"]["groups"])


@pytest.mark.parametrize(
    ("incident", "said"),
    [
        ("stopped", "rank 2 on n2: not heard of for"),
        ("killed", "rank 2 on n2: not heard of for"),
        ("hangs", "rank 2 on n2: in matrix products of its own for"),
    ],
)
def test_a_rank_that_does_not_get_on_is_named_with_its_node(config, incident, said):
    began = time.monotonic()
    with Ranks(config, 3, {2: incident}, "--seconds", "25") as ranks:
        ends = ranks.ends([0, 1])
        assert [end[0] for end in ends] == [75, 75], ends
        assert ends[0][2].count("pre-flight: ") == 1
        assert f"pre-flight: {said}" in ends[0][2]
        assert "Traceback" not in ends[0][2] + ends[1][2]
        assert ranks.verdict()["nodes"] == ["n2"]
    assert time.monotonic() - began < 120


def test_a_rank_that_does_not_come_is_named_with_its_node(config):
    with Ranks(config, 3, {}, "--seconds", "25") as ranks:
        ranks.processes[1].send_signal(signal.SIGSTOP)
        ends = ranks.ends([0, 2])
        assert [end[0] for end in ends] == [75, 75], ends
        assert "pre-flight: rank 1 on n1 of 3 did not come within 25 s" in ends[0][2]
        assert ranks.verdict()["nodes"] == ["n1"]


@pytest.mark.parametrize("incident", ["stopped", "killed"])
def test_a_main_rank_that_is_gone_is_named_by_the_others(config, incident):
    """It holds the store that they would ask."""
    with Ranks(config, 3, {0: incident}, "--seconds", "60") as ranks:
        ends = ranks.ends([1, 2])
        assert [end[0] for end in ends] == [75, 75], ends
        assert "rank 1 does not reach rank 0 on n0 (no word from its store for 20 s)" in ends[0][2]
        assert ranks.verdict()["nodes"] == ["n0"]


def test_a_port_that_is_taken_is_the_users_mistake(config):
    with closing(socket.socket()) as listener:
        port = free_port()
        listener.bind(("0.0.0.0", port))
        listener.listen()
        with Ranks(config, 2, {}, "--seconds", "10", port=port) as ranks:
            ((code, _, errors),) = ranks.ends([0])
            assert code == 2
            assert f"error: rank 0 cannot listen at port {port}" in errors
            assert ranks.verdict()["exit_code"] == 2


def test_sizes_that_do_not_fit_are_refused_before_anyone_waits(config):
    with Ranks(config, 2, {}, "parallel.pp=3") as ranks:
        ends = ranks.ends([0, 1])
    assert [end[0] for end in ends] == [2, 2]
    assert "error: 2 processes do not hold tp=1 x cp=1 x pp=3 = 3" in ends[0][2]


def megatrons_groups(sizes: dict[str, int]) -> dict[str, list[int]]:
    """The ranks of this rank's groups, as Megatron-Core makes them."""
    import torch.distributed as dist

    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.layout import Layout

    with initialized(Layout(**sizes), read_launch(), seed=0) as groups:
        named = {kind: getattr(groups, kind) for kind in ("tp", "cp", "ep", "dp", "pp")}
        return {kind: dist.get_process_group_ranks(group) for kind, group in named.items()}


@pytest.mark.parametrize(
    "sizes",
    [{"tp": 2, "pp": 2}, {"cp": 2, "dp": 2, "ep": 2}, {"dp": 4, "ep": 2}, {"tp": 2, "dp": 2, "ep": 2}, {"pp": 4}],
)
def test_the_groups_are_megatrons(gloo, sizes):
    from megatron_powerflow.parallel.layout import Layout
    from megatron_powerflow.preflight.rank_groups import rounds

    whole = {"tp": 1, "pp": 1, "vpp": None, "cp": 1, "ep": 1, "dp": 1, "sequence_parallel": False} | sizes
    theirs = gloo.run(4, megatrons_groups, whole)
    ours = rounds(Layout(**whole), ["n0"] * 4)
    for kind in ("tp", "cp", "ep", "dp"):
        expected = {tuple(groups[kind]) for groups in theirs if len(groups[kind]) > 1}
        assert {group for name, groups in ours if name == kind for group in groups} == expected
    neighbours = {pair for groups in theirs for pair in zip(groups["pp"], groups["pp"][1:], strict=False)}
    assert {group for name, groups in ours if name == "pp" for group in groups} == neighbours
