"""How is a judge asked? One chat completion at a time, from any server that speaks OpenAI's format.

POST {url}/chat/completions at temperature 0, with timeouts and retries. Redirects are refused: they would carry the key
elsewhere.

Left out: the wording of the questions (`rubrics.py`), which questions are asked (`judgements.py`).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from megatron_powerflow.errors import UserError
from megatron_powerflow.redaction import HIDDEN, redacted

MAX_REPLY_BYTES = 4_000_000
MAX_KEY_CHARACTERS = 10_000
FATAL_STATUSES = (401, 403, 404, 405)  # the key, the model or the address is wrong: no question will be answered
PASSING_STATUSES = (408, 409, 429)  # and every 5xx


@dataclass(frozen=True)
class JudgeServer:
    """Says which server answers as the judge, and how patiently it is asked.

    url: the base address, up to and with /v1. timeout_seconds: of one try. pause_seconds: before the second try; every
    further pause is twice the one before. Raises UserError for an address that is not http(s).
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 120.0
    max_tries: int = 4
    pause_seconds: float = 1.0
    num_parallel: int = 8

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1)
        except ValueError:
            usable = False
        if not usable:
            raise UserError(
                f"--judge-url {redacted(self.url)}: must be http(s)://host/v1, the base of an OpenAI-compatible API"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise UserError(
                f"--judge-url {parts.scheme}://{parts.hostname}: an address without user, password, ? and # is needed, "
                "for it stands in messages and in files; the key goes into a file, --judge-key-file"
            )


def make_judge(url: str | None, model: str | None, key_file: Path | None) -> JudgeServer | None:
    """Returns the judge that the command line names; None where it names none.

    Raises UserError where some of the three options are missing that the others need.
    """
    if url is None:
        given = [option for option, value in (("model", model), ("key-file", key_file)) if value is not None]
        if given:
            raise UserError([f"--judge-{option} has no effect without --judge-url; remove it" for option in given])
        return None
    if model is None:
        raise UserError("--judge-url needs --judge-model, the name of the model there")
    return JudgeServer(url, model, read_key(key_file))


def read_key(path: Path | None) -> str | None:
    """Returns the API key in a file, which holds nothing else. Raises UserError for a file without a key."""
    if path is None:
        return None
    try:
        with path.open(encoding="utf-8") as file:
            key = file.read(MAX_KEY_CHARACTERS).strip()  # of an endless file no more
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge-key-file {path}: cannot be read: {type(error).__name__}") from None
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        raise UserError(f"--judge-key-file {path}: must hold a key on a line of its own, and nothing else")
    return key


def ask_all(
    judge: JudgeServer, questions: Sequence[str], advance: Callable[[], None] = lambda: None
) -> list[str | None]:
    """Returns the judge's replies, in order; None for a question that it did not answer.

    The first question is asked alone, so that a judge that cannot be reached is not asked a thousand times. Raises
    UserError where the judge cannot be reached or refuses this client. `advance` is called after each question.
    """
    if not questions:
        return []

    def ask_one(question: str) -> str | None:
        reply, _ = ask(judge, question)
        return reply

    first, trouble = ask(judge, questions[0])
    if first is None and not trouble.startswith("HTTP 4"):
        raise UserError(f"the judge at {judge.url} does not answer: {trouble}; its address is --judge-url")
    advance()
    replies = [first]
    with ThreadPoolExecutor(judge.num_parallel) as pool:
        try:
            for reply in pool.map(ask_one, questions[1:]):
                replies.append(reply)
                advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return replies


def ask(judge: JudgeServer, question: str) -> tuple[str | None, str]:
    """Returns (reply, "") or (None, what went wrong at the last try).

    Raises UserError where the judge refuses this client, whatever the question.
    """
    trouble = ""
    for attempt in range(judge.max_tries):
        if attempt:
            time.sleep(judge.pause_seconds * 2 ** (attempt - 1))
        try:
            return _hidden(_content(_post(judge, question)), judge), ""
        except urllib.error.HTTPError as error:
            trouble = _hidden(f"HTTP {error.code} {error.reason}", judge)
            if error.code in FATAL_STATUSES or 300 <= error.code < 400:
                raise UserError(
                    f"the judge at {judge.url} answers {trouble}; check --judge-url, --judge-model and --judge-key-file"
                ) from None
            if error.code < 500 and error.code not in PASSING_STATUSES:
                break  # another try would not help: the question is too long, or refused
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            trouble = _hidden(f"{type(error).__name__}: {error}", judge)
    return None, trouble


def _hidden(text: str, judge: JudgeServer) -> str:
    """What the judge says, without the key, which a server may echo: it is kept in files and logs."""
    return text if judge.key is None else text.replace(judge.key, HIDDEN)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def _post(judge: JudgeServer, question: str) -> bytes:
    body = {"model": judge.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if judge.key:
        headers["Authorization"] = f"Bearer {judge.key}"
    address = judge.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
    with urllib.request.build_opener(_NoRedirects).open(request, timeout=judge.timeout_seconds) as response:
        return response.read(MAX_REPLY_BYTES)


def _content(body: bytes) -> str:
    """Returns the text of the first choice. Raises ValueError for anything that is not a chat completion."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, RecursionError):
        raise ValueError("not a chat completion") from None
    if not isinstance(content, str):
        raise ValueError("a chat completion without text")
    return content
