"""Which text does a field of a row hold? Ids, tasks and answers come as texts, as numbers, as NaN, or not at all.

    empty            null, NaN (pandas' missing value, in JSON by json.dumps, in parquet's float columns), "", spaces
    a number         as people write it: 5.0 is 5, 1e-05 is 0.00001, decimals of parquet as they are
    refused          infinity, whole floats of 2^53 and more (what was written is lost), true and false, lists, objects,
                     and the texts nan, <NA>, NaT, null: a missing value that was written as text

Left out: whether the field may be missing (`prompts.py`, `evaluation/readers.py`).
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from megatron_powerflow.errors import UserError

MISSING = frozenset(["nan", "<na>", "nat", "null"])
EXACT_FLOATS = 2**53
MAX_DIGITS = 40  # written out; longer numbers keep their exponent


def text_of(value: Any, name: str) -> str | None:
    """Returns the text of a field, without spaces at its ends; None for an empty one.

    name: of the field, for messages. Raises UserError, without the row's location, for a value that is refused.
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in MISSING:
            raise UserError(f"{name} is the text {text!r}, which says that there is none; leave the field out, or null")
        return text or None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise UserError(f"{name} must be a text or a number, got {value!r:.60}")
    if value != value:
        return None
    if not isinstance(value, int) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value}")
    if isinstance(value, float) and abs(value) >= EXACT_FLOATS:
        raise UserError(f"{name} is the float {value!r}, which may not be the number that was meant; give it as a text")
    return _written_out(value)


def _written_out(value: float | Decimal) -> str:
    if isinstance(value, int):
        return str(value)
    number = Decimal(repr(value)) if isinstance(value, float) else value
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return str(value) if len(text) > MAX_DIGITS else "0" if text == "-0" else text
