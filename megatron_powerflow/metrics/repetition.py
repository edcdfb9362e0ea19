"""How much of a text has been there before? Shares of n-grams, of one response and of a prompt's responses together.

Left out: loops, one turn over and over (`loops.py`); diversity by meaning (`diversity.py`).
"""

from __future__ import annotations

from collections.abc import Sequence


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a response's n-grams that it has had before; 0 when it has fewer than two."""
    grams = ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of a prompt's responses together; 0 when there are none."""
    grams = [gram for response in responses for gram in ngrams(response, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def ngrams(items: Sequence, n: int) -> list[tuple]:
    """All runs of n items, overlapping, in order."""
    return list(zip(*(items[i:] for i in range(n)), strict=False))
