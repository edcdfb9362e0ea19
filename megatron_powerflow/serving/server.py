"""How is one vLLM server spoken to? Over HTTP, with JSON, and with an answer to what each failure means.

    Unreachable   nothing came: the server is gone, hangs, or the network is; another one may be asked
    Refused       it answered with an error; asking again does not help
    Garbage       what came is no answer to what was asked

Redirects are not followed. Left out: which server is asked (`pool.py`), what an answer holds (`answers.py`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

from megatron_powerflow.errors import UserError

MAX_REPLY_BYTES = 2**30
SHOWN_CHARACTERS = 300
JSON = {"Content-Type": "application/json"}


class ServerError(Exception):
    """A server did not do what it was asked. Its text says what happened."""


class Unreachable(ServerError):
    """No answer came."""


class Refused(ServerError):
    """The server answered that it will not, or cannot."""


class Garbage(ServerError):
    """What came is no answer."""


def require_url(url: str) -> str:
    """Return the base address of a server. Raises UserError for one that is not http://host:port."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme == "http" and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        usable = False
    if not usable or "@" in url or parts.path.strip("/") or parts.query or parts.fragment:
        raise UserError(
            f"rollout.vllm.urls: {url!r} is no address of a vLLM server; http://host:port is needed, without user, "
            "path and ?; the server's control routes have no password, so it belongs into a private network"
        )
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"http://{host}:{parts.port}"


class Server:
    """A vLLM server at an address. Every method may be called from several threads.

    url: http://host:port. key: sent as a bearer token, where the server asks for one.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = require_url(url)
        parts = urlsplit(self.url)
        self._address = (parts.hostname or "", parts.port or 0)
        self._headers = JSON | ({"Authorization": f"Bearer {key}"} if key else {})
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    @property
    def host(self) -> str:
        """The name or address of its machine."""
        return self._address[0]

    def post(self, path: str, body: dict[str, Any] | None = None, *, seconds: float) -> Any:
        """Ask, and return the JSON of the answer; None where it is empty. seconds: without a byte, before it is given
        up. Raises ServerError."""
        return self._ask("POST", path, json.dumps(body or {}).encode(), seconds)

    def get(self, path: str, *, seconds: float) -> Any:
        """As `post`, without a body."""
        return self._ask("GET", path, None, seconds)

    def _ask(self, method: str, path: str, body: bytes | None, seconds: float) -> Any:
        connection = http.client.HTTPConnection(*self._address, timeout=seconds)
        with self._lock:
            self._open.add(connection)
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            content = response.read(MAX_REPLY_BYTES + 1)
        except TimeoutError:
            raise Unreachable(f"{self.url}{path}: no answer within {seconds:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            # ValueError: a connection that `drop` closed while it was read
            raise Unreachable(f"{self.url}{path}: {type(error).__name__}: {error}".rstrip(": ")) from None
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        return self._parsed(path, response.status, content)

    def _parsed(self, path: str, status: int, content: bytes) -> Any:
        if len(content) > MAX_REPLY_BYTES:
            raise Garbage(f"{self.url}{path}: an answer of more than {MAX_REPLY_BYTES:,} bytes")
        if status != 200:
            text = content[:SHOWN_CHARACTERS].decode("utf-8", errors="replace").strip()
            raise Refused(f"{self.url}{path}: HTTP {status}: {text}")
        if not content:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Garbage(f"{self.url}{path}: the answer is not JSON: {content[:40]!r}") from None

    def drop(self) -> None:
        """End every question that is open: whoever waits for it gets `Unreachable`."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def is_healthy(self, *, seconds: float = 10.0) -> bool:
        """Whether the server answers, and says that its engine lives."""
        try:
            self.get("/health", seconds=seconds)
        except ServerError:
            return False
        return True

    def weight_version(self, *, seconds: float = 60.0) -> str:
        """Return the version of the weights that the server says it has. Raises ServerError."""
        reply = self.get("/weight_info", seconds=seconds)
        version = reply.get("weight_version") if isinstance(reply, dict) else None
        if not isinstance(version, str):
            raise Garbage(f"{self.url}/weight_info: no weight_version in {str(reply)[:SHOWN_CHARACTERS]}")
        return version

    def call(self, method: str, *arguments: str, seconds: float) -> list[Any]:
        """Call a method of every worker of the server, and return what each gives. Raises ServerError."""
        body = {"method": method, "args": list(arguments)}
        reply = self.post("/collective_rpc", body, seconds=seconds)
        results = reply.get("results") if isinstance(reply, dict) else [] if reply is None else None
        if not isinstance(results, list):
            raise Garbage(f"{self.url}/collective_rpc: no results in {str(reply)[:SHOWN_CHARACTERS]}")
        return results
