"""How much does a text repeat itself? Shares of n-grams, of one response and of a prompt's responses together.

Left out: loops, which repeat one turn until the limit (`loops.py`); diversity by meaning (`diversity.py`).
"""

from __future__ import annotations

from collections.abc import Sequence


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Returns the share of a response's n-grams that occur earlier in it; 0 when it has fewer than two."""
    grams = ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(responses: Sequence[Sequence[int]], n: int) -> float:
    """Returns distinct n-grams / all n-grams of a prompt's responses together; 0 when there are none."""
    grams = [gram for response in responses for gram in ngrams(response, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def ngrams(items: Sequence, n: int) -> list[tuple]:
    """Returns all runs of n items, overlapping, in order."""
    return list(zip(*(items[i:] for i in range(n)), strict=False))
