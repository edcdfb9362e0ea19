"""Two hosts whose own names resolve to nothing, as two network namespaces with a cable between them: the processes find
each other over the interface that leads to MASTER_ADDR, or the error says what to name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="namespaces need root and iproute2"),
]
SCRIPT = """
from datetime import timedelta
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel import initialize, launch, meeting
meeting.MEETING = initialize.MEETING = initialize.TIMEOUT = timedelta(seconds=20)
import torch, torch.distributed as dist
try:
    with initialize.cpu_group(launch.read_launch()):
        total = torch.ones(1)
        dist.all_reduce(total)
        print("sum", total.item())
except UserError as error:
    print(*error.violations)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    names = tuple(f"pf{side}{os.getpid()}" for side in "ab")
    cables = tuple(f"v{side}{os.getpid() % 10**6}" for side in "ab")
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.99.7.{number}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
    except subprocess.CalledProcessError as error:
        for name in made:
            ip("netns", "del", name)
        pytest.skip(f"this kernel lets nobody make namespaces: {error.stderr}")
    yield names
    for name in made:
        ip("netns", "del", name)


def said_on(hosts: tuple[str, str], master: str, **variables: str) -> list[str]:
    started = []
    for rank, name in enumerate(hosts):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": master,
            "MASTER_PORT": "29555",
            "PYTHONPATH": str(REPOSITORY),
        }
        environment.pop("GLOO_SOCKET_IFNAME", None)
        command = ["ip", "netns", "exec", name, "unshare", "-u", "bash", "-c", 'hostname "$0-host" && exec "$@"', name]
        started.append(
            subprocess.Popen(
                [*command, sys.executable, "-c", SCRIPT],
                env=environment | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return [process.communicate(timeout=300)[0] for process in started]


def test_processes_of_hosts_without_names_find_each_other(hosts):
    for said in said_on(hosts, "10.99.7.1"):
        assert "sum 2.0" in said


def test_an_interface_that_is_not_there_is_said(hosts):
    for said in said_on(hosts, "10.99.7.1", GLOO_SOCKET_IFNAME="eth9"):
        assert "GLOO_SOCKET_IFNAME=eth9" in said
        assert "Traceback" not in said
