"""A language small enough to be a table: two symbols and EOS, 63 responses of 1 to 6 tokens, any policy over them.

EOS is forced behind the fifth symbol, so its log-prob is 0 there; it counts as a token. A policy is a table of logits,
[31, 3]: a row for each prefix of up to four symbols, a column for each symbol and EOS.

Left out: a network, and every way in which it is not a table, but for `TIED`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

NUM_SYMBOLS, MAX_SYMBOLS = 2, 5
EOS, MAX_TOKENS = NUM_SYMBOLS, MAX_SYMBOLS + 1
BODIES = [body for n in range(MAX_SYMBOLS + 1) for body in itertools.product(range(NUM_SYMBOLS), repeat=n)]
PREFIXES = [body for body in BODIES if len(body) < MAX_SYMBOLS]
RESPONSES = [(*body, EOS) for body in BODIES]
LENGTHS = torch.tensor([len(response) for response in RESPONSES], dtype=torch.float64)
MASK = torch.arange(MAX_TOKENS) < LENGTHS[:, None]
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
# a policy that knows no more of a prefix than its last symbol: rows of a table [3, 3] that give one of [31, 3]
TIED = torch.tensor([prefix[-1] + 1 if prefix else 0 for prefix in PREFIXES])


def _places() -> Tensor:
    """[63, 6]: where each token's log-prob stands in the flattened table; behind its end for those of log-prob 0."""
    nowhere = len(PREFIXES) * (EOS + 1)
    rows = [
        [
            ROW[response[:place]] * (EOS + 1) + token if response[:place] in ROW else nowhere
            for place, token in enumerate(response)
        ]
        for response in RESPONSES
    ]
    return torch.tensor([row + [nowhere] * (MAX_TOKENS - len(row)) for row in rows])


PLACES = _places()


def token_log_probs(logits: Tensor) -> Tensor:
    """[..., 31, 3] logits -> [..., 63, 6] log-probs of every response's tokens, 0 behind its end."""
    table = logits.log_softmax(dim=-1).flatten(start_dim=-2)
    return torch.cat([table, table.new_zeros(*table.shape[:-1], 1)], dim=-1)[..., PLACES]


def random_logits(seed: int, scale: float = 1.0) -> Tensor:
    """[31, 3] fp64 of a random model."""
    return scale * torch.randn(
        len(PREFIXES), EOS + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def tied_mean(logits: Tensor) -> Tensor:
    """[P, 31, 3] -> [P, 3, 3]: the mean of the rows that `TIED` makes one."""
    return torch.stack([logits[:, row == TIED].mean(dim=1) for row in range(int(TIED.max()) + 1)], dim=1)


def logits_of(log_probs: Tensor) -> Tensor:
    """[31, 3] logits, themselves log-probs but for a constant of each row, of a distribution over responses, [63]."""
    starts = {prefix: torch.logsumexp(log_probs[_beginning_with(prefix)], 0) for prefix in BODIES}
    ends = {response[:-1]: log_probs[place] for place, response in enumerate(RESPONSES)}
    rows = [[starts[(*prefix, symbol)] for symbol in range(NUM_SYMBOLS)] + [ends[prefix]] for prefix in PREFIXES]
    return torch.stack([torch.stack(row) for row in rows])


def _beginning_with(prefix: tuple[int, ...]) -> list[int]:
    return [place for place, response in enumerate(RESPONSES) if response[: len(prefix)] == prefix]


def root(energy: Tensor, lengths: Tensor = LENGTHS) -> float:
    """lambda with sum exp(energy - lambda n) = 1; energy: [63]."""
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.logsumexp(energy - middle * lengths, 0) > 0 else (low, middle)
    return middle


def optimum(base: Tensor, alpha: float, *, tilts: bool = True) -> Tensor:
    """[63] log-probs of p_base^alpha exp(-lambda n), or of p_base^alpha / Z where it does not tilt. base: [63]."""
    energy = alpha * base
    return energy - root(energy) * LENGTHS if tilts else energy.log_softmax(0)


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Half of the summed differences of probabilities; of log-probs [..., 63]."""
    return (first.exp() - second.exp()).abs().sum(dim=-1) / 2
