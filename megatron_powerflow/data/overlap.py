"""Does an evaluation set hold a question of a training set already? That is decided by the overlap of word n-grams.

Two questions are the same when they share half of the shorter one's runs of NGRAM words. A question of fewer words must
be equal, word by word. The comparison leaves out case, punctuation and LaTeX spacing, in which copies differ.

Left out: other languages' translations, paraphrases.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

NGRAM = 8
SHARE = 0.5
_WORD = re.compile(r"\\[A-Za-z]+|[^\W_]+")
_SAME = {"\\dfrac": "\\frac", "\\tfrac": "\\frac"}
_SPACING = frozenset(["\\left", "\\right", "\\quad", "\\qquad", "\\displaystyle", "\\text", "\\mathrm"])


def words_of(text: str) -> tuple[str, ...]:
    """Returns what is compared of a question: its words and numbers, in order."""
    words = (word if word.startswith("\\") else word.lower() for word in _WORD.findall(text))
    return tuple(_SAME.get(word, word) for word in words if word not in _SPACING)


class Overlap:
    """Indexes questions, so that others can be compared with them."""

    def __init__(self, questions: Iterable[tuple[str, str]]) -> None:
        """Builds the index. questions: (name, text)."""
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._short: dict[tuple[str, ...], str] = {}
        for name, text in questions:
            words = words_of(text)
            if len(words) < NGRAM:
                self._short.setdefault(words, name)
                continue
            grams = _grams(words)
            for gram in grams:
                self._holders[gram].append(len(self._names))
            self._names.append(name)
            self._sizes.append(len(grams))

    def overlapping_question(self, text: str) -> str | None:
        """Returns the name of an indexed question that is the same as `text`; None where there is none."""
        words = words_of(text)
        if len(words) < NGRAM:
            return self._short.get(words)
        grams = _grams(words)
        shared = Counter(index for gram in grams for index in self._holders.get(gram, ()))
        for index, count in shared.most_common(1):
            if count >= SHARE * min(len(grams), self._sizes[index]):
                return self._names[index]
        return None


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)}
