"""Which of this machine's network interfaces leads to a host?

gloo binds the address that the machine's own name resolves to. On many nodes that name resolves to nothing, or to the
loopback address, and the processes of other nodes do not find this one.
"""

from __future__ import annotations

import socket

import psutil


def interface_towards(host: str) -> str | None:
    """Return the name, such as eth0, of the interface through which this machine reaches a host.

    None where the host's name does not resolve, or no route or interface leads there. Sends nothing to the host.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of datagrams: the route is looked up, and no packet leaves
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] == own for item in addresses):
            return name
    return None
