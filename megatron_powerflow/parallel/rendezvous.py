"""Where do the processes of a run meet? At rank 0's address, in torch's key-value store.

Left out: who they are (`launch.py`), whether all have come (`meeting.py`), and process groups (`initialize.py`).
"""

from __future__ import annotations

import itertools
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from megatron_powerflow.errors import RankError
from megatron_powerflow.parallel.interfaces import interface_towards
from megatron_powerflow.parallel.launch import (
    Launch,
    address,
    agent_holds_store,
    bind_interface,
    bound_interface,
    restart_count,
    step_nodes,
)

RESOLVING_SECONDS = 60.0  # a pod's name is known some seconds after the pod has started


class _Held(NamedTuple):
    """The store that this process has met the others in. address: where it is."""

    address: tuple[str, str]
    store: Any
    uses: Iterator[int]


_held: list[_Held] = []  # the newest one


def rendezvous(launch: Launch, timeout: timedelta):
    """A key-value store of all processes, with keys of its own for each call. Every process makes the same calls.

    Without an agent of torchrun's the main process holds what is stored, until it ends: were it given up between two
    calls, another process could meet it a last time, and wait there for a main process that waits elsewhere. Raises
    RankError where the store is not found.
    """
    import torch.distributed as dist

    place = main_address(launch)
    if not _held or _held[0].address != place:
        _held[:] = [_Held(place, _store_at(*place, launch, timeout), itertools.count())]
    store, uses = _held[0].store, _held[0].uses
    store.set_timeout(timeout)
    # of torchrun's own store: after --max-restarts it still holds the addresses of ranks that are gone
    return dist.PrefixStore(f"start_{restart_count()}/call_{next(uses)}", store)


def _store_at(host: str, port: str, launch: Launch, timeout: timedelta):
    import torch.distributed as dist

    _wait_for_name(host)
    try:
        holds = launch.rank == 0 and not agent_holds_store()
        # who has not come is for whoever asks to say (`meeting.py`): a wait in here names nobody
        return dist.TCPStore(
            host, int(port), launch.world_size, is_master=holds, timeout=timeout, wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:  # of torch's store: no classes of their own
        raise not_found(launch, error) from None


def main_address(launch: Launch) -> tuple[str, str]:
    """Return host and port of rank 0. MASTER_ADDR and MASTER_PORT win.

    Under srun SLURM is asked for the NodeAddr of the step's first node, because node names need not resolve. Raises
    RankError where it does not answer.
    """
    host, port = address()
    if launch.launcher != "srun":
        return host or "localhost", port or ""
    nodes, own_port = step_nodes()
    return host or _node_address(nodes), port or str(own_port)


def _node_address(nodes: str) -> str:
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()
        node = subprocess.run(["scontrol", "show", "node", names[0]], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise RankError(f"srun without MASTER_ADDR, and scontrol does not answer ({error}); set MASTER_ADDR") from None
    addresses = [word.removeprefix("NodeAddr=") for word in node.split() if word.startswith("NodeAddr=")]
    return (addresses or names)[0]


def _wait_for_name(host: str) -> None:
    deadline = time.monotonic() + RESOLVING_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:  # the latter: a label that is empty or too long
            if time.monotonic() > deadline:
                raise RankError(
                    f"MASTER_ADDR={host} does not resolve on {socket.gethostname()} ({error}); name rank 0's node by "
                    "an address or a name that every node knows"
                ) from None
        time.sleep(1)


def take_interface(launch: Launch) -> None:
    """Bind gloo and NCCL to the interface that leads to rank 0, unless the user named another.

    Where other hosts take part, the loopback interface is not it: many a machine's own name resolves to 127.0.1.1.
    """
    host, _ = main_address(launch)
    interface = interface_towards(host)
    is_this_host = host in ("localhost", "::1") or host.startswith("127.")
    is_astray = launch.spans_hosts and not is_this_host and interface == interface_towards("127.0.0.1")
    if interface is not None and not is_astray:
        bind_interface(interface)


def not_found(launch: Launch, error: Exception) -> RankError:
    """Make the user's error of what torch's store or gloo raised when the processes looked for each other."""
    host, port = main_address(launch)
    said = " ".join(str(error).split())[:300]
    if "EADDRINUSE" in said:
        return RankError(
            f"rank {launch.rank} cannot listen at port {port} of {socket.gethostname()}: the port is taken, by another "
            "run or another program; set MASTER_PORT (of torchrun: --master-port) to a free one below 32768, on every "
            "node the same"
        )
    return RankError(
        f"rank {launch.rank} does not find the other processes at MASTER_ADDR={host}, port {port} ({said}); see that "
        "all of them run, that this node reaches that address, and that "
        f"GLOO_SOCKET_IFNAME={bound_interface()} names the interface that leads there"
    )
