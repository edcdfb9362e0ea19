"""Does a question of a training set stand in an evaluation set already? Overlap of word n-grams.

Two questions are the same when they share half of the shorter one's runs of NGRAM words, or, if one is shorter than
that, all of its words in order. What is compared has no case, punctuation or LaTeX spacing: copies differ in these.

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
    """What is compared of a question: its words and numbers, in order."""
    found = (word if word.startswith("\\") else word.lower() for word in _WORD.findall(text))
    return tuple(_SAME.get(word, word) for word in found if word not in _SPACING)


class Overlap:
    """Of questions with a set of others, given once."""

    def __init__(self, questions: Iterable[tuple[str, str]]) -> None:
        """questions: (name, text)."""
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
        """The name of a question that `text` is the same as; None."""
        words = words_of(text)
        if len(words) < NGRAM:
            return self._short.get(words)
        grams = _grams(words)
        shared = Counter(place for gram in grams for place in self._holders.get(gram, ()))
        for place, count in shared.most_common(1):
            if count >= SHARE * min(len(grams), self._sizes[place]):
                return self._names[place]
        return None


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)}
