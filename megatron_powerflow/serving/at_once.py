"""How are several servers asked for the same thing? In a thread each, while the run shows that it lives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from megatron_powerflow.serving.server import Server, ServerError

BEAT_SECONDS = 0.5
Value = TypeVar("Value")


def on_all(
    servers: Sequence[Server], call: Callable[[Server], Value], beat: Callable[[], None]
) -> dict[str, Value | ServerError]:
    """Call something for every server at the same time; return address -> its value, or how the server failed.

    beat: called while it waits. Raises what is no failure of a server, once all are done.
    """
    with ThreadPoolExecutor(max(len(servers), 1)) as executor:
        tries = {server.url: executor.submit(call, server) for server in servers}
        while wait(tries.values(), timeout=BEAT_SECONDS).not_done:
            beat()
    found: dict[str, Value | ServerError] = {}
    for url, future in tries.items():
        error = future.exception()
        if error is not None and not isinstance(error, ServerError):
            raise error
        found[url] = future.result() if error is None else error
    return found
