"""Do two model folders hold the same model, bit for bit? Any mix of Hugging Face folders and checkpoints.

Both are read as HF tensors, one parameter at a time, so that layout and padding do not matter. The hash is one of
names, dtypes, shapes and bytes: equal models have equal hashes in whatever folder they lie.

Left out: what the model computes (`commands/log_prob_parity.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_powerflow.converter.model_folders import Model
from megatron_powerflow.converter.ranks import Ranks
from megatron_powerflow.hf.torch_dist_names import stored_parameters
from megatron_powerflow.metrics.provenance import provenance
from megatron_powerflow.targets import file_refusals
from megatron_powerflow.whole_files import write_file

if TYPE_CHECKING:
    from torch import Tensor

CARD_NAME = "conversion_card.json"
AS_INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing two models. sha256: of A's tensors; dtype: the most frequent of B's.

    num_exactly_equal counts tensors of one dtype and the same bits; num_equal_as_rounded those that are A's, rounded
    to B's dtype. All others are in `differences`, a sentence each, as are fields of config.json.
    """

    family: str
    sha256: str
    dtype: str
    num_tensors: int
    num_bytes: int
    num_exactly_equal: int
    num_equal_as_rounded: int
    differences: tuple[str, ...]


def compare(a: Model, b: Model, ranks: Ranks, advance: Callable[[int], object] = lambda size: None) -> Comparison:
    """Compare B with A, tensor by tensor. advance: called with the bytes of each tensor that was compared.

    Collective: each rank compares a share of the tensors, and all return the same. Raises UserError where a tensor
    cannot be read.
    """
    if differences := _config_differences(a, b):
        return Comparison(b.family.model_type, "", "", 0, 0, 0, 0, tuple(differences))
    parameters = list(stored_parameters(a.architecture, a.family))
    my_share = ranks.share(parameters, lambda stored: sum(info.num_bytes for info in a.info(stored).values()))
    digests: dict[str, str] = {}
    dtypes: Counter[str] = Counter()
    num_bytes = exact = rounded = 0
    differing: list[str] = []

    def compare_share() -> None:
        nonlocal num_bytes, exact, rounded
        for stored in my_share:
            theirs = b.read(stored)
            for name, tensor in a.read(stored).items():
                other = theirs[name]
                digests[name] = _digest(name, tensor)
                num_bytes += tensor.nbytes
                dtypes[str(other.dtype).removeprefix("torch.")] += 1
                if tensor.dtype == other.dtype and same_bits(tensor, other):
                    exact += 1
                elif tensor.dtype != other.dtype and same_bits(tensor.to(other.dtype), other):
                    rounded += 1
                else:
                    differing.append(_describe(name, tensor, other))
                advance(tensor.nbytes)

    ranks.together(compare_share)
    shares = ranks.gather((digests, dtypes, num_bytes, exact, rounded, differing))
    everything = {name: digest for share in shares for name, digest in share[0].items()}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(everything.items()))
    return Comparison(
        family=a.family.model_type,
        sha256=hashlib.sha256(lines.encode()).hexdigest(),
        dtype=sum((share[1] for share in shares), Counter()).most_common(1)[0][0],
        num_tensors=len(everything),
        num_bytes=sum(share[2] for share in shares),
        num_exactly_equal=sum(share[3] for share in shares),
        num_equal_as_rounded=sum(share[4] for share in shares),
        differences=tuple(text for share in shares for text in share[5]),
    )


def write_card(
    path: Path, comparison: Comparison, *, a: Path, b: Path, command: str, max_log_prob_difference: float | None = None
) -> None:
    """Write the comparison as a JSON file. max_log_prob_difference: in nats, of a token; None: no text was scored."""
    card = {
        "a": str(a.resolve()),
        "b": str(b.resolve()),
        "equal": not comparison.differences,
        **asdict(comparison),
        "max_log_prob_difference": max_log_prob_difference,
        **provenance(command),
    }
    write_file(path, (json.dumps(card, indent=2) + "\n").encode())


def card_refusals(path: Path) -> list[str]:
    """Return why the card may not be written to `path`, such as another file of that name; [] when it may."""

    def is_ours(start: bytes) -> bool:
        try:
            values = json.loads(start)
        except (ValueError, RecursionError):
            return False
        return isinstance(values, dict) and {"a", "b", "equal", "sha256", "differences"} <= values.keys()

    return file_refusals(path, is_ours, label="--card")


def _config_differences(a: Model, b: Model) -> list[str]:
    first, second = asdict(a.architecture), asdict(b.architecture)
    return [
        f"config.json: {name} is {first[name]!r} in {a.path} and {second[name]!r} in {b.path}"
        for name in first
        if first[name] != second[name]
    ]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have the same shape and bits. NaN equals itself, 0.0 does not equal -0.0."""
    integers = AS_INTEGERS[a.itemsize]
    return a.shape == b.shape and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def _digest(name: str, tensor: Tensor) -> str:
    head = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
    digest = hashlib.sha256(head)
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe(name: str, a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"tensor {name} has shape {tuple(a.shape)} and {tuple(b.shape)}"
    gaps = (a.to(b.dtype).float() - b.float()).abs()
    number = int((a.to(b.dtype) != b).sum())
    return f"tensor {name} differs in {number} of {a.numel()} numbers, by up to {gaps.nan_to_num(torch.inf).max():.3g}"
