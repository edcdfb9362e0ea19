"""What does an answer say? A text becomes a `ParsedAnswer`: its value and, where it says them, a name and a unit.

    5 cm -> 5, unit centimeter      x = 5 -> 5, name x      \\frac12 -> 1/2      (B) twelve -> choice B

The value of an answer that cannot be read is its own text without spaces, which equals nothing but that text.
ANSWERS.md has the rules, with examples.

Left out: when names and units agree (`answers.py`), choices (`answer_choices.py`), where a unit begins
(`answer_units.py`), formulas (`expressions.py`, `fingerprints.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_powerflow.data.answer_choices import choice_of
from megatron_powerflow.data.answer_tokens import tokenize
from megatron_powerflow.data.answer_units import split_unit
from megatron_powerflow.data.expressions import (
    UnreadableError,
    is_symbol,
    parse_expression,
    symbols_of,
    with_value,
)
from megatron_powerflow.data.fingerprints import direction, fingerprint

OPENS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
CLOSES = frozenset(OPENS.values())
RELATIONS = ("=", "<", ">", "\\leq", "\\geq", "\\neq", "\\in", "\\approx", "\\equiv")
FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
INFINITY = {1: ("infinity", 1), -1: ("infinity", -1)}
MAX_ENTRIES, MAX_LEVELS = 100, 6
EMPTY_SET: Hashable = ("set", frozenset())
LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SEPARATORS = (",", ";", '"or"', '"and"')


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """Holds an answer that has been read.

    value: hashable, equal for equal answers; a Fraction for a rational number. name, unit: None where the answer says
    none.
    """

    value: Hashable
    name: str | None = None
    unit: str | None = None


def read_answer(text: str) -> ParsedAnswer:
    """Reads an answer. Never raises; takes microseconds to some milliseconds, by the text's length."""
    tokens = tokenize(text)
    if not tokens:
        return ParsedAnswer(_as_text(text))
    if (letter := choice_of(text)) is not None:
        return ParsedAnswer(("choice", letter))
    try:
        return _Reader().answer(_without_ends(tokens))
    except UnreadableError:
        return ParsedAnswer(("text", "".join(tokens)))


def _as_text(text: str) -> Hashable:
    return ("text", "".join(text.split()))


def _without_ends(tokens: list[str]) -> list[str]:
    """Takes away the sentence's punctuation, an = in front, and braces around everything."""
    first, last = 0, len(tokens)
    while first < last and tokens[first] in ("=", "\\approx", ":", "\\therefore", "\\Rightarrow", "\\to"):
        first += 1
    while first < last and tokens[last - 1] in (".", ",", ";", ":", "\\\\"):
        last -= 1
    tokens = tokens[first:last]
    while len(tokens) > 2 and tokens[0] == "{" and _end_of_group(tokens, 0) == len(tokens) - 1:
        tokens = tokens[1:-1]
    if len(tokens) > 2 and tokens[0] == "\\{" and tokens[1].startswith("\\begin:") and tokens[-1].startswith("\\end:"):
        return tokens[1:]  # \left\{ \begin{array} ... \right.
    middle = tokens[1:-1]
    outward = tokens[:1] == ["]"] or tokens[-1:] == ["["]
    if (
        outward
        and tokens[0] in ("]", "[", "(")
        and tokens[-1] in ("[", "]", ")")
        and not {*OPENS, *CLOSES} & {*middle} - {"{", "}"}
    ):
        return ["(" if tokens[0] == "]" else tokens[0], *middle, ")" if tokens[-1] == "[" else tokens[-1]]  # ]0, 1[
    return tokens


def _end_of_group(tokens: Sequence[str], start: int) -> int:
    """Returns the index at which the bracket at `start` closes. Intervals mix brackets, so ( and ] are a pair."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += (tokens[index] in OPENS) - (tokens[index] in CLOSES)
        if depth == 0:
            return index
    raise UnreadableError


def split(tokens: Sequence[str], separators: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Splits tokens at the separators that stand outside of brackets and environments.

    Returns (parts, the separators between them). Raises UnreadableError for over MAX_ENTRIES parts and for brackets
    that do not match.
    """
    parts: list[list[str]] = [[]]
    between: list[str] = []
    depth = 0
    for token in tokens:
        depth += (token in OPENS or token.startswith("\\begin:")) - (token in CLOSES or token.startswith("\\end:"))
        if depth == 0 and token in separators:
            parts.append([])
            between.append(token)
            if len(parts) > MAX_ENTRIES:
                raise UnreadableError
        else:
            parts[-1].append(token)
    if depth:
        raise UnreadableError
    return parts, between


class _Reader:
    """Reads one answer. level: how many answers deep inside of it the reader is."""

    level = 0

    def answer(self, tokens: list[str]) -> ParsedAnswer:
        self.level += 1
        if self.level > MAX_LEVELS or not tokens:
            raise UnreadableError
        answer = self._answer(tokens)
        self.level -= 1
        return answer

    def _answer(self, tokens: list[str]) -> ParsedAnswer:
        if len(tokens) == 1 and tokens[0][0] == '"':
            words = tokens[0][1:-1].lower()
            if words in ("no solution", "no solutions"):
                return ParsedAnswer(EMPTY_SET)
            return ParsedAnswer(("choice", words.upper()) if tokens[0][1:-1] in LETTERS else ("text", words))
        if len(tokens) == 1 and tokens[0] in LETTERS:
            return ParsedAnswer(("choice", tokens[0]))
        if (system := self.system(tokens)) is not None:
            return system
        parts, between = split(tokens, SEPARATORS)
        if any(between):
            return self.several([part for part in parts if part], set(between))
        parts, between = split(tokens, RELATIONS)
        if between:
            return self.relation(parts, between)
        return self.single(tokens)

    def several(self, parts: list[list[str]], between: set[str]) -> ParsedAnswer:
        """Reads several parts: 2, 3 is a set; x = 2, y = 3 is the pair (2, 3); x < 1 or x > 2 is a union."""
        if len(parts) < 2:
            raise UnreadableError
        answers = [self.answer(part) for part in parts]
        names = [answer.name for answer in answers]
        units = {answer.unit for answer in answers} - {None}
        if len(units) > 1:
            return ParsedAnswer(("set", frozenset(answers)))
        unit = next(iter(units), None)
        bases = {re.sub(r"_\d+$", "", name) for name in names if name}
        if len(bases) > 1:
            named = {answer.name: answer.value for answer in answers if answer.name is not None}
            if len(named) < len(answers):
                return ParsedAnswer(("set", frozenset(answers)))
            return ParsedAnswer(("tuple", *(named[name] for name in sorted(named))), ",".join(sorted(named)), unit)
        name = next(iter(bases), None)
        values = [answer.value for answer in answers]
        if all(map(_is_range, values)):
            return ParsedAnswer(("union" if between == {'"or"'} else "ranges", frozenset(values)), name, unit)
        if len(set(values)) < len(values):
            return ParsedAnswer(("list", frozenset(Counter(values).items())), name, unit)
        return ParsedAnswer(_set(values), name, unit)

    def system(self, tokens: list[str]) -> ParsedAnswer | None:
        """Reads equations one below the other as if they stood in one line. Cases with conditions are not read."""
        kind = tokens[0].removeprefix("\\begin:")
        if kind not in ("array", "cases", "aligned", "align", "gathered", "split") or tokens[-1] != f"\\end:{kind}":
            return None
        if "&" in tokens and kind in ("array", "cases"):
            raise UnreadableError
        rows, _ = split([token for token in tokens[1:-1] if token != "&"], ("\\\\",))
        rows = [_without_ends(row) for row in rows if row]
        return self.answer(rows[0]) if len(rows) == 1 else self.several(rows, {'"and"'})

    def relation(self, parts: list[list[str]], between: list[str]) -> ParsedAnswer:
        if set(between) <= {"=", "\\approx"}:
            return self.equation(parts, between)
        if len(between) == 1 and between[0] in ("\\in", "\\neq"):
            name = name_of(parts[0])
            if name is None:
                raise UnreadableError
            inside = self.answer(parts[1])
            value = inside.value if between[0] == "\\in" else ("all but", frozenset([inside.value]))
            return replace(inside, value=value, name=name)
        if set(between) <= set(FLIPPED):
            return self.inequality(parts, between)
        raise UnreadableError

    def equation(self, parts: list[list[str]], between: list[str]) -> ParsedAnswer:
        """Reads an equation: x = 5 is 5 with the name x; 2 + 3 = 5 is 5; 6 = 5 is false and equals nothing; else both
        sides count."""
        names = []
        while len(parts) > 1 and (name := name_of(parts[0])) and not (len(parts) == 2 and _is_letter(parts[1], name)):
            names.append(name)
            parts, between = parts[1:], between[1:]
        if "\\approx" in between:
            parts = parts[: between.index("\\approx") + 1]  # 10/3 \approx 3.33
        name_text = ",".join(names) or None
        if len(parts) + len(names) == 2 and (solved := _solved_for_y(names, parts)) is not None:
            return solved
        if len(names) == 1 and names[0].startswith("(") and len(parts) == 1:
            return self.assigned_tuple(names[0], parts[0])
        sides = [self.answer(part) for part in parts]
        if len(sides) == 1:
            return replace(sides[0], name=name_text)
        last = sides[-1]
        constants = [side.value for side in sides if not _varies(side.value)]
        if names and constants and not _varies(last.value):
            if len(set(constants)) == 1:
                return replace(last, name=name_text)
        elif len({side.value for side in sides}) == 1 and not any(map(_varies, constants)):
            return replace(last, name=name_text)
        elif len(sides) == 2 and not names and len(constants) < 2:
            tree = ("-", parse_expression(parts[0]), parse_expression(parts[1]))
            return ParsedAnswer(("equation", direction(tree, signed=False)))
        raise UnreadableError  # 6 = 5 and its like

    def assigned_tuple(self, name: str, tokens: list[str]) -> ParsedAnswer:
        """Reads an assigned tuple with its names in order: (y, x) = (3, 2) is (2, 3)."""
        value = self.answer(tokens).value
        names = name[1:-1].split(",")
        entries = _entries(value)
        if entries is None or len(entries) != len(names) or len(set(names)) < len(names):
            raise UnreadableError
        ordered = sorted(zip(names, entries, strict=True), key=lambda pair: pair[0])
        return ParsedAnswer(("tuple", *(entry for _, entry in ordered)), ",".join(sorted(names)))

    def inequality(self, parts: list[list[str]], between: list[str]) -> ParsedAnswer:
        """Reads an inequality: x > 5 is (5, oo), 0 < x <= 1 is (0, 1], each with the name x.

        Any other one is the formula that it compares with 0, up to a positive factor.
        """
        if len(between) == 1 and name_of(parts[1]) and not name_of(parts[0]):
            parts, between = parts[::-1], [FLIPPED[between[0]]]
        if len(between) == 1 and (name := name_of(parts[0])):
            bound, strict = self.bound(parts[1]), between[0] in ("<", ">")
            upward = between[0] in (">", "\\geq")
            low, high = (bound, INFINITY[1]) if upward else (INFINITY[-1], bound)
            return ParsedAnswer(_interval(low, high, strict or not upward, strict or upward), name)
        if len(between) == 2 and (name := name_of(parts[1])):
            if between[0] in (">", "\\geq"):
                parts, between = parts[::-1], [FLIPPED[sign] for sign in reversed(between)]
            if not set(between) <= {"<", "\\leq"}:
                raise UnreadableError
            low, high = self.bound(parts[0]), self.bound(parts[2])
            return ParsedAnswer(_interval(low, high, between[0] == "<", between[1] == "<"), name)
        if len(between) == 1:
            if between[0] in (">", "\\geq"):
                parts, between = parts[::-1], [FLIPPED[between[0]]]
            tree = ("-", parse_expression(parts[0]), parse_expression(parts[1]))
            if not symbols_of(tree):
                raise UnreadableError
            return ParsedAnswer(("inequality", between[0], direction(tree, signed=True)))
        raise UnreadableError

    def bound(self, tokens: list[str]) -> Hashable:
        answer = self.single(tokens)
        if answer.unit is not None:
            raise UnreadableError
        return answer.value

    def single(self, tokens: list[str]) -> ParsedAnswer:
        """Reads an answer without commas and relations, with a unit or without."""
        body, unit, scale = split_unit(tokens) if tokens else ([], None, 1)
        value = self.value(body)
        if scale != 1:
            if not isinstance(value, Fraction):
                raise UnreadableError
            value *= scale
        return ParsedAnswer(value, None, unit)

    def value(self, tokens: list[str]) -> Hashable:
        if not tokens:
            raise UnreadableError
        for read in (self.infinite, self.bracketed, self.union, self.matrix, self.either_sign, self.ratio):
            if (value := read(tokens)) is not None:
                return value
        return fingerprint(parse_expression(tokens))

    def infinite(self, tokens: list[str]) -> Hashable | None:
        if tokens[-1:] == ["\\infty"] and tokens[:-1] in ([], ["+"], ["-"]):
            return INFINITY[-1 if tokens[0] == "-" else 1]
        if tokens == ["\\emptyset"]:
            return EMPTY_SET
        return ("tuple", INFINITY[-1], INFINITY[1]) if tokens == ["\\RR"] else None

    def bracketed(self, tokens: list[str]) -> Hashable | None:
        """Reads sets, tuples and intervals; None for a formula in brackets."""
        first, last = tokens[0], tokens[-1]
        if first not in ("(", "[", "\\{") or last not in CLOSES or _end_of_group(tokens, 0) != len(tokens) - 1:
            return None
        if first == "\\{":
            if last != "\\}":
                return None
            if tokens[1:-1] == []:
                return EMPTY_SET
            if is_symbol(tokens[1]) and tokens[2] in ("|", ":"):  # {x | x > 5}
                return self.answer(tokens[3:-1]).value
            return _set([self.plain(part) for part in split(tokens[1:-1], (",", ";"))[0]])
        parts, _ = split(tokens[1:-1], (",", ";"))
        if len(parts) == 1:
            return None
        entries = [self.plain(part) for part in parts]
        if len(entries) == 2:
            return _interval(entries[0], entries[1], first == "(", last == ")")
        return ("tuple", *entries) if (first, last) in (("(", ")"), ("[", "]")) else None

    def plain(self, tokens: list[str]) -> Hashable:
        """Reads an entry of a set or tuple: its value alone, or the whole answer where it has a unit or name."""
        answer = self.answer(tokens)
        return answer.value if answer.name is None and answer.unit is None else answer

    def union(self, tokens: list[str]) -> Hashable | None:
        parts, between = split(tokens, ("\\cup", "\\setminus"))
        if not between:
            return None
        values = [self.value(part) for part in parts if part]
        if len(values) != len(parts):
            raise UnreadableError
        if between == ["\\setminus"] and parts[0] == ["\\RR"] and parts[1][0] == "\\{":
            holes = values[1]
            return ("all but", holes[1] if isinstance(holes, tuple) and holes[0] == "set" else frozenset([holes]))
        if set(between) != {"\\cup"}:
            raise UnreadableError
        return ("union", frozenset(values))

    def matrix(self, tokens: list[str]) -> Hashable | None:
        kind = tokens[0].removeprefix("\\begin:")
        if kind == tokens[0] or tokens[-1] != f"\\end:{kind}":
            return None
        rows, _ = split(tokens[1:-1], ("\\\\",))
        entries = [split(row, ("&",))[0] for row in rows if row]
        if kind in ("pmatrix", "bmatrix", "matrix"):
            return ("matrix", *(tuple(self.plain(entry) for entry in row) for row in entries))
        raise UnreadableError

    def either_sign(self, tokens: list[str]) -> Hashable | None:
        if "\\pm" not in tokens and "\\mp" not in tokens:
            return None
        upper = {"\\pm": "+", "\\mp": "-"}
        lower = {"\\pm": "-", "\\mp": "+"}
        return _set([self.value([signs.get(token, token) for token in tokens]) for signs in (upper, lower)])

    def ratio(self, tokens: list[str]) -> Hashable | None:
        """Reads a ratio: 3:4 is 6:8 and no number; 10:50 may be a time of day and stays text."""
        parts, between = split(tokens, (":",))
        if not between:
            return None
        clock = len(parts) in (2, 3) and all(len(p) == 1 and re.fullmatch(r"\d\d", p[0]) for p in parts[1:])
        values = [fingerprint(parse_expression(part)) for part in parts]
        numbers = [value for value in values if isinstance(value, Fraction)]
        if clock or len(numbers) < len(values) or numbers[0] == 0:
            raise UnreadableError
        return ("ratio", *(number / numbers[0] for number in numbers))


def name_of(tokens: Sequence[str]) -> str | None:
    """Returns what an answer calls its value: x, x_1, f(x), AB, \\angle ABC, area; (x, y). None for a formula."""
    if not tokens or len(tokens) > 12:
        return None
    text = "".join(token.strip('"').lower() if token[0] == '"' else token for token in tokens)
    if len(tokens) == 1 and tokens[0][0] == '"':
        return text
    if re.fullmatch(r"\((?:[A-Za-z](?:_\d)?'?,)+[A-Za-z](?:_\d)?'?\)", text):
        return text
    symbol = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\{\w+\}|\w))?'*"
    if is_symbol(tokens[0]) and tokens[0] not in ("e", "i") and re.fullmatch(symbol, text):
        return re.sub(r"_\{(\w+)\}", r"_\1", text)
    function = rf"[A-Za-z](?:_(?:\{{\w+\}}|\w))?(?:\^\{{-1\}})?'*\((?:{symbol}|\d+)(?:,(?:{symbol}|\d+))*\)"
    if re.fullmatch(function, text):
        return text
    return (
        text if re.fullmatch(r"\|?(?:\\angle|\\triangle|\\overline\{)?[A-Z]{2,}'?\}?\|?|\\angle[A-Z]", text) else None
    )


def _is_letter(tokens: Sequence[str], name: str) -> bool:
    """Whether an equation's right side is a lone letter too: A = B answers nothing, f(x) = x does."""
    return len(name) <= 2 and len(tokens) == 1 and is_symbol(tokens[0]) and tokens[0] not in ("e", "i")


def _varies(value: Hashable) -> bool:
    return isinstance(value, tuple) and value[0] == "formula"


def _is_range(value: Hashable) -> bool:
    return isinstance(value, tuple) and (
        value[0] == "interval" or (value[0] == "tuple" and any(end in INFINITY.values() for end in value[1:]))
    )


def _interval(low: Hashable, high: Hashable, open_below: bool, open_above: bool) -> Hashable:
    """Returns the value of an interval. Open intervals are written as pairs are, so that (0, 1) is a pair, too."""
    if open_below and open_above:
        return ("tuple", low, high)
    return ("interval", low, high, open_below, open_above)


def _entries(value: Hashable) -> tuple | None:
    return value[1:] if isinstance(value, tuple) and value[0] == "tuple" else None


def _solved_for_y(names: Sequence[str], parts: Sequence[Sequence[str]]) -> ParsedAnswer | None:
    """Solves an equation that is linear in y: 2x - y + 1 = 0 and x = (y - 1) / 2 are y = 2x + 1; None for others."""
    if names not in ([], ["x"]):
        return None
    try:
        sides = [parse_expression(part) for part in ([names, *parts] if names else parts)]
    except UnreadableError:
        return None
    tree = ("-", *sides)
    if symbols_of(tree) != {"x", "y"}:
        return None
    at_y = [with_value(tree, "y", Fraction(y)) for y in range(3)]
    slopes = [fingerprint(("-", at_y[1], at_y[0])), fingerprint(("-", at_y[2], at_y[1]))]
    if slopes[0] != slopes[1] or slopes[0] == 0 or _varies(slopes[0]):
        return None
    return ParsedAnswer(fingerprint(("/", at_y[0], ("-", at_y[0], at_y[1]))), "y")


def _set(values: Sequence[Hashable]) -> Hashable:
    """Returns the values without their order; a set of one entry is that entry."""
    distinct = frozenset(values)
    return next(iter(distinct)) if len(distinct) == 1 else ("set", distinct)
