"""Does a response hold its answer in a box, and which box counts?

A box is `\\boxed`, `\\fbox` or `\\framebox` and its argument, read as TeX reads it: spaces may stand between, `\\{` is
a character and no brace. Where TeX would box one character of something longer, the longer thing is taken: `\\boxed 12`
is 12, `\\boxed\\frac12` is one half. A box that never closes or holds nothing is no box. `%` is a character: in answers
it is the percent sign that was meant. A doubled backslash is read as one: `\\\\boxed{5}` was escaped twice.

Left out: what the text in a box means (`answer_reading.py`), thoughts (`answers.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

BOXES = ("boxed", "fbox", "framebox")
TAKES_ARGUMENTS = {"frac": 2, "dfrac": 2, "tfrac": 2, "cfrac": 2, "binom": 2, "sqrt": 1, "overline": 1} | dict.fromkeys(
    ("text", "textbf", "textit", "textrm", "mathrm", "mathbf", "mathbb", "mathcal", "mathit", "mathsf", "mbox"), 1
)
OPENS_MORE = {"left", "right", "begin", "end", "big", "Big", "bigl", "bigr", "item", "par", "quad", "qquad", *BOXES}

_TOKEN = re.compile(r"\\{1,2}(?:" + "|".join(BOXES) + r")(?![A-Za-z])|\\[A-Za-z]+|\\.|[{}]", re.DOTALL)
_SPACE = re.compile(r"[ \t]*\n?[ \t]*")
_OPTION = re.compile(r"\[[^\[\]{}\n]{0,40}\]")
_BARE = re.compile(r"[-+]?(?:\d+(?:[.,]\d+)*|\.\d+)|[A-Za-z](?![A-Za-z])")
_SINGLE = re.compile(r"\\[A-Za-z]+|\\?[^\s{}\\]")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_EMPTY = re.compile(r"(?:\s|[${}~]|\\[,;:! ()\[\]]|\\(?:text|mathrm|textbf|quad|qquad)(?![A-Za-z]))*")


def last_boxed(text: str) -> str | None:
    """Returns the content of the last box that closes and is not empty, without spaces at its ends; None without one.

    Of nested boxes the inner one counts. Time and memory are linear in the text.
    """
    return next(_from_the_last(text), None)


def all_boxed(text: str) -> list[str]:
    """Returns the content of each box that closes and is not empty, in order."""
    return [*_from_the_last(text)][::-1]


def _from_the_last(text: str) -> Iterator[str]:
    boxes: list[int] = []  # the positions at which a box's name ends
    open_groups: list[int] = []
    closes: dict[int, int] = {}  # position of a group's { -> position of its }
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            open_groups.append(token.start())
        elif token[0] == "}":
            if open_groups:
                closes[open_groups.pop()] = token.start()
        elif token[0].lstrip("\\") in BOXES:
            boxes.append(token.end())
    for position in reversed(boxes):
        begin = _after_options(text, position)
        if text.startswith("{", begin):
            begin, end = begin + 1, closes.get(begin)
        else:
            end = _end_of_bare(text, begin, closes)
        if end is not None and not _is_empty(text, begin, end):
            yield text[begin:end].strip()


def _is_empty(text: str, begin: int, end: int) -> bool:
    return _EMPTY.fullmatch(text, begin, end) is not None


def _after_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    assert space is not None, "the pattern matches the empty text, too"
    return space.end()


def _after_options(text: str, position: int) -> int:
    """Returns the position behind spaces and the [width][alignment] that \\framebox may have."""
    for _ in range(2):
        position = _after_space(text, position)
        option = _OPTION.match(text, position)
        if option is None or not text.startswith(("{", "["), _after_space(text, option.end())):
            return position
        position = option.end()
    return _after_space(text, position)


def _end_of_bare(text: str, begin: int, closes: Mapping[int, int]) -> int | None:
    """Returns the end of an argument without braces: a number, a lone letter, or a command with its arguments."""
    if bare := _BARE.match(text, begin):
        return bare.end()
    command = _COMMAND.match(text, begin)
    if command is None or command[1] in OPENS_MORE:
        return None
    position = command.end()
    if command[1] == "sqrt" and (root := _OPTION.match(text, position)):
        position = root.end()
    for _ in range(TAKES_ARGUMENTS.get(command[1], 0)):
        position = _after_space(text, position)
        if text.startswith("{", position):
            if position not in closes:
                return None
            position = closes[position] + 1
        elif single := _SINGLE.match(text, position):
            position = single.end()
        else:
            return None
    return position
