"""Which choice of a multiple-choice question is an answer? B, (B), \\text{B.}, and the letter before its text.

Left out: a lone letter among words, since only the question could tell it from a variable.
"""

from __future__ import annotations

import re

_SPACES = r"(?:\s|~|\\[,;:! ]|\\q?quad|[$])*"
_IN_FONT = rf"\\(?:text|textbf|mathrm|mathbf|textrm)\{{{_SPACES}"
_LETTER = rf"(?:{_IN_FONT}\(?([A-Z])\)?[.:]?{_SPACES}\}}|\(?([A-Z])\)?)"
_WORD_BEFORE = rf"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer){_SPACES})?"
_LONE = re.compile(rf"{_SPACES}{_WORD_BEFORE}\(?{_SPACES}{_LETTER}{_SPACES}\)?[.:]?{_SPACES}")
_BEFORE_TEXT = re.compile(
    rf"{_SPACES}(?:\\(?:text|textbf|mathrm|mathbf)\{{{_SPACES}(?:\(([A-J])\)|([A-J])[.):])(?:{_SPACES}\}}|(?=\s))"
    r"|(?:\(([A-J])\)|([A-J])[.):])(?:\s|~|\\[,;:! ]|\\q?quad|(?=\\text)))"
    rf"{_SPACES}(?!-\s|[-+*/^=<>|&_,;!]|\\(?:cup|cap|times|cdot|in|leq?|geq?|neq?|pm|text\{{{_SPACES}(?:or|and)\b)(?![a-z]))."
)


def choice_of(text: str) -> str | None:
    """Returns the letter of a choice, alone or before its text; None for anything else.

    Examples that give B: B, (B), \\text{B.}, (B) twelve, B. twelve.
    """
    match = _LONE.fullmatch(text) or _BEFORE_TEXT.match(text)
    return next((letter for letter in match.groups() if letter), None) if match else None
