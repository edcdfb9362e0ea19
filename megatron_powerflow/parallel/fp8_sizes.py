"""Which sizes can FP8 matrix products take, under a layout? Tokens are padded to them, and weights are refused.

Transformer Engine (`assert_dim_for_fp8_exec`) wants the rows of every input and weight in multiples of 8 and their last
dimension in multiples of 16. mxfp8 scales blocks of 32 numbers along both. Two more things follow:

    backward    a product over all tokens of a rank, and one over a weight's rows, read these as their last dimension,
                so 16 holds for them too (Megatron-Core's `get_fp8_align_size` says the same)
    sequence    an input is quantized where it is cut: each of tp ranks has 1 / tp of the tokens, and the rule of
    parallelism rows holds for that part. At tp=8, 112 tokens are 14 rows a rank, which are refused; 128 are 16

Products in FP8 are those of a layer's four matrices: queries, keys and values; attention's output; the MLP's two. The
embedding and the output layer stay in bf16 (`log_probs/token_log_probs.py` multiplies by the latter), so the vocabulary
may have any size. Arithmetic only: no torch.

Left out: the tokens of each expert, which Megatron pads by itself.
"""

from __future__ import annotations

import math

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.config import PrecisionSection

# precision.fp8_recipe -> what a last dimension must be a multiple of
LAST_DIMENSION = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
# precision.fp8_recipe -> what the rows that one rank quantizes must be a multiple of
QUANTIZED_ROWS = {"tensorwise": 8, "blockwise": 8, "mxfp8": 32}


def recipe_of(precision: PrecisionSection) -> str:
    """Return the name of the FP8 recipe, which `config_rules.py` demands where the dtype is fp8."""
    assert precision.fp8_recipe is not None, precision.dtype
    return precision.fp8_recipe


def token_multiple(precision: PrecisionSection, *, tp: int, sequence_parallel: bool) -> int:
    """Return the number of which the tokens of a rank's forward pass must be a multiple.

    They are those of all tp ranks together, of which sequence parallelism gives each 1 / tp.
    """
    parts = tp if sequence_parallel else 1
    if precision.dtype != "fp8":
        return parts
    recipe = recipe_of(precision)
    return math.lcm(LAST_DIMENSION[recipe], parts * QUANTIZED_ROWS[recipe])


def weight_violations(precision: PrecisionSection, architecture: Architecture, tp: int) -> list[str]:
    """Return why FP8 cannot multiply by this model's matrices, cut over tp ranks; [] when it can, or is not asked for.

    A size that tp does not divide is left to `layout.py`, which refuses it.
    """
    if precision.dtype != "fp8":
        return []
    recipe = recipe_of(precision)
    if not (unfit := _unfit(architecture, tp, recipe)):
        return []
    fewer = [parts for parts in range(tp - 1, 0, -1) if tp % parts == 0 and not _unfit(architecture, parts, recipe)]
    remedies = [f"parallel.tp={fewer[0]}"] if fewer else []
    if recipe == "mxfp8" and not _unfit(architecture, tp, "tensorwise"):
        remedies.append("precision.fp8_recipe=tensorwise")
    return [
        f"precision.fp8_recipe={recipe}: {name} is no multiple of {LAST_DIMENSION[recipe]}, which FP8 matrix products "
        f"need; use {' or '.join([*remedies, 'precision.dtype=bf16'])}"
        for name in unfit
    ]


def _unfit(architecture: Architecture, tp: int, recipe: str) -> list[str]:
    """Return the sizes of a rank's matrices that this recipe does not take, such as `hidden_size=100`."""
    unfit = []
    for name, (size, parts) in _matrix_sizes(architecture, tp).items():
        if size % parts == 0 and size // parts % LAST_DIMENSION[recipe]:
            unfit.append(f"{name}={size}" + (f", over parallel.tp={tp} {size // tp} a rank," if parts > 1 else ""))
    return unfit


def _matrix_sizes(architecture: Architecture, tp: int) -> dict[str, tuple[int, int]]:
    """Return name -> (size, parts it is cut into) of the dimensions of all matrices that are multiplied in FP8."""
    sizes = {
        "hidden_size": (architecture.hidden_size, 1),
        "num_attention_heads * head_dim": (architecture.query_width, tp),
        "(num_attention_heads + 2 * num_query_groups) * head_dim": (
            architecture.query_width + 2 * architecture.key_width,
            tp,
        ),
        "ffn_hidden_size": (architecture.ffn_hidden_size, tp),
    }
    if architecture.experts and architecture.experts.shared_ffn_hidden_size is not None:
        sizes["shared_ffn_hidden_size"] = (architecture.experts.shared_ffn_hidden_size, tp)
    return sizes
