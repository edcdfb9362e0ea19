"""Which ports of this machine may a test's servers and ranks listen at?

Ports below those that the kernel gives to outgoing connections (32768 and more): one of those may be taken before its
server listens, by another connection, or by a rank that looks for rank 0 there and so meets itself.
"""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress

FIRST, COUNT = 20000, 12000


def free_port() -> int:
    """Return a port that nobody listens at."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at, all different."""
    probes: list[socket.socket] = []
    while len(probes) < count:
        probe = socket.socket()
        with suppress(OSError):
            probe.bind(("127.0.0.1", FIRST + secrets.randbelow(COUNT)))
            probes.append(probe)
            continue
        probe.close()
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
