"""Where does an answer's unit begin? The tokens are cut into a value and a unit: 5 cm, $5, 5 %, 5^\\circ, 101_2.

Left out: what a unit is called (`units.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_powerflow.data.expressions import UnreadableError, is_number
from megatron_powerflow.data.units import SCALES, unit_of


def split_unit(tokens: list[str]) -> tuple[list[str], str | None, int]:
    """Returns (the value's tokens, the unit or None, the factor that the words say: 10^6 for 5 million people).

    Raises UnreadableError where words stand behind the value that are no unit.
    """
    if tokens[0] in ('"dollar"', '"euro"', '"pound"') and len(tokens) > 1:
        body, unit, scale = split_unit(tokens[1:])
        return (body, tokens[0].strip('"'), scale) if unit is None else (tokens, None, 1)
    if tokens[-1] in ("%", "\\%"):
        return tokens[:-1], "percent", 1
    for degree in (["^", "\\circ"], ["^", "{", "\\circ", "}"], ["\\circ"]):
        for letter in ([], ["C"], ["F"]):
            ending = [*degree, *letter]
            if (
                len(tokens) > len(ending)
                and tokens[-len(ending) :] == ending
                and _is_one_number(tokens[: -len(ending)])
            ):
                return tokens[: -len(ending)], f"degree {letter[0]}" if letter else "degree", 1
    if len(tokens) > 2 and is_number(tokens[0]) and tokens[1] == "_":
        base = "".join(tokens[2:]).strip('{}"')
        if tokens[0].isdigit() and base.isdigit():
            return tokens[:1], f"base {base}", 1
    start = len(tokens)
    while start and _belongs_to_unit(tokens, start - 1):
        start -= 1
    while start < len(tokens) and tokens[start][0] != '"':
        start += 1
    if start in (0, len(tokens)):
        return tokens, None, 1
    words = "".join(token.strip('"') if token[0] == '"' else token for token in tokens[start:] if token not in "{}")
    scale, words = _split_scale(words)
    unit = unit_of(words.replace("^", " ^ ")) if "^" not in words else _unit_with_power(words)
    if (words and unit is None) or tokens[start - 1] in ("+", "-", "*", "/", "^", "_"):
        raise UnreadableError
    return tokens[:start], unit, scale


def _belongs_to_unit(tokens: Sequence[str], index: int) -> bool:
    token = tokens[index]
    if token[0] == '"':
        return token not in ('"or"', '"and"')
    per_letter = len(token) == 1 and token.isalpha() and index > 1 and tokens[index - 1] == "/"
    if per_letter or token in ("^", "{", "}", "/", "2", "3"):
        return any(other[0] == '"' for other in tokens[max(0, index - 4) : index])
    return False


def _split_scale(words: str) -> tuple[int, str]:
    first, _, rest = words.partition(" ")
    return (SCALES[first], rest) if first in SCALES else (1, words)


def _unit_with_power(words: str) -> str | None:
    match = re.fullmatch(r"([A-Za-z ]+(?:/[A-Za-z]+)?)\^(\d)(?:/([A-Za-z]+))?", words)
    if match is None or (unit := unit_of(match[1])) is None:
        return None
    return f"{unit}^{match[2]}" + (f" per {unit_of(match[3])}" if match[3] else "")


def _is_one_number(tokens: Sequence[str]) -> bool:
    """Whether the tokens are no sum or product: a degree sign behind one would belong to its last part only."""
    return not {"+", "*"} & set(tokens) and not any(token[1:] in ("sin", "cos", "tan") for token in tokens)
