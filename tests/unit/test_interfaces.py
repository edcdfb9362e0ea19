"""The interface that leads to a host: asked of the machine's own routes."""

from __future__ import annotations

import socket

import psutil

from megatron_powerflow.parallel.interfaces import interface_towards


def test_the_loopback_address_is_reached_over_the_loopback_interface():
    loopback = {
        name for name, items in psutil.net_if_addrs().items() if any(item.address == "127.0.0.1" for item in items)
    }
    assert {interface_towards("127.0.0.1")} == loopback


def test_each_own_address_is_reached_over_the_interface_that_has_it():
    for name, items in psutil.net_if_addrs().items():
        for item in items:
            if item.family == socket.AF_INET and psutil.net_if_stats()[name].isup:
                assert interface_towards(item.address) == name


def test_a_name_that_does_not_resolve_has_none():
    assert interface_towards("no-such-host.invalid") is None
