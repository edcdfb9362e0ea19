"""What may stand in a file or a log of what a user typed or a server said? Everything but keys and passwords.

A secret is known by its value (an environment variable's, a judge's key), by its name (API_KEY=..., token='...'), or by
its place (https://user:password@host).

Left out: where the values come from (`parallel/launch.py`, `evaluation/judge.py`). Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

HIDDEN = "[secret]"
SHORTEST = 8  # characters of a value that counts as a secret: shorter ones stand in any text by chance
SECRET_NAME = re.compile(r"(?:^|[_.-])(?:api_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_BY_NAME = re.compile(
    r"((?<![A-Za-z])(?:api[_-]?key|key|token|secret|password|passwd|credentials?)['\"]?(?:=|:\s*))"
    r"('[^']+'|\"[^\"]+\"|[^\s'\"&,;)}]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bBearer\s+)[\w.~+/=-]{8,}")
_IN_URL = re.compile(r"(\b[A-Za-z][\w+.-]*://)[^/\s@'\"]+@")


def redacted(text: str, secrets: Sequence[str] = ()) -> str:
    """Return the text with every secret replaced by HIDDEN. secrets: values that are known to be some."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    return _BEARER.sub(rf"\1{HIDDEN}", _BY_NAME.sub(rf"\1{HIDDEN}", _IN_URL.sub(rf"\1{HIDDEN}@", text)))


def holds_secret(text: str, secrets: Sequence[str]) -> bool:
    """Whether a text holds one of the values, or an address with a password."""
    return any(len(secret) >= SHORTEST and secret in text for secret in secrets) or bool(_IN_URL.search(text))
