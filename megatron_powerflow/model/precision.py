"""Which numbers does the model compute with: fp32, bf16 or FP8? And where is Transformer Engine used?

FP8 is Megatron's and Transformer Engine's own: a recipe name is mapped onto TransformerConfig fields, and the
layer spec is Transformer Engine's. The recipes are stateless ones only (tensorwise, which is current scaling, blockwise
and mxfp8): they keep no history, so a resumed run has nothing to lose.

Left out: delayed scaling, which keeps a history, pickled, in the checkpoint.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.config import ParallelSection, PrecisionSection
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.fp8_sizes import recipe_of, weight_violations

if TYPE_CHECKING:
    import torch


class Fp8Recipe(NamedTuple):
    """A way of scaling FP8 numbers, and what it needs.

    megatron_name: its value of megatron.core.enums.Fp8Recipe. transformer_engine: the first version in which
    Megatron-Core uses it (`get_fp8_recipe`). cuda: the first CUDA that torch may be built for; Transformer Engine asks.
    """

    megatron_name: str
    compute_capability: tuple[int, int]
    transformer_engine: tuple[int, int]
    cuda: tuple[int, int]


# precision.fp8_recipe -> the recipe
FP8_RECIPES = {
    "tensorwise": Fp8Recipe("tensorwise", (8, 9), (2, 2), (12, 1)),
    "blockwise": Fp8Recipe("blockwise", (9, 0), (2, 3), (12, 9)),
    "mxfp8": Fp8Recipe("mxfp8", (10, 0), (2, 1), (12, 1)),
}


def params_dtype(precision: PrecisionSection) -> torch.dtype:
    """Return the dtype of parameters, and of activations outside FP8 matrix products."""
    import torch

    return torch.float32 if precision.dtype == "fp32" else torch.bfloat16


def use_transformer_engine(precision: PrecisionSection) -> bool:
    """Tell whether Transformer Engine's layers are used: on CUDA where it is importable, but never for fp32, which is
    compared with HF."""
    import torch

    return torch.cuda.is_available() and transformer_engine_installed() and precision.dtype != "fp32"


def transformer_engine_installed() -> bool:
    """Tell whether Transformer Engine can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def needs_own_layers(architecture: Architecture, cp: int) -> bool:
    """Tell whether the model runs on Megatron's local layers with our attention, on CUDA as well.

    It does where Transformer Engine's layers, as Megatron-Core 0.16 to 0.19 builds them, lack what the model does
    (norms in other places, capped scores, a sliding window over cp > 1 ranks), and for latent attention, which we have
    not made them do.
    """
    elsewhere = architecture.post_norm or not architecture.pre_norm or architecture.qk_norm_over_heads
    windowed = architecture.sliding_window is not None and cp > 1
    capped = architecture.attention_softcap is not None
    return elsewhere or windowed or capped or architecture.mla is not None


def fp8_violations(precision: PrecisionSection) -> list[str]:
    """Say why FP8 cannot run on this machine. The list is empty when it can, or when FP8 is not asked for."""
    if precision.dtype != "fp8":
        return []
    import torch

    if not torch.cuda.is_available():
        return ["precision.dtype=fp8 needs a CUDA GPU (compute capability 8.9 or newer), and there is none; use bf16"]
    if not transformer_engine_installed():
        return [
            "precision.dtype=fp8 needs Transformer Engine, which is not importable; "
            "pip install megatron_powerflow[te], or use the Dockerfile's image, or precision.dtype=bf16"
        ]
    return recipe_violations(
        recipe_of(precision),
        capability=torch.cuda.get_device_capability(),
        transformer_engine=metadata.version("transformer-engine"),
        cuda=torch.version.cuda or "0",
    )


def recipe_violations(recipe: str, *, capability: tuple[int, int], transformer_engine: str, cuda: str) -> list[str]:
    """Say why a machine with these versions cannot run an FP8 recipe; [] when it can.

    capability: of the GPU. transformer_engine, cuda: versions, such as `2.3.0.dev0+5fdd7bb` and `12.9`.
    """
    needs = FP8_RECIPES[recipe]
    rows = [
        ("compute capability", needs.compute_capability, capability, "this GPU has", "choose"),
        (
            "Transformer Engine",
            needs.transformer_engine,
            release(transformer_engine),
            "there is",
            "install it, or choose",
        ),
        ("a torch for CUDA", needs.cuda, release(cuda), "there is one for", "install it, or choose"),
    ]
    return [
        f"precision.fp8_recipe={recipe} needs {what} {needed[0]}.{needed[1]} or newer, {has} {found[0]}.{found[1]}; "
        f"{remedy} another recipe or precision.dtype=bf16"
        for what, needed, found, has, remedy in rows
        if found < needed
    ]


def release(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version, as Megatron-Core compares them: 2.3.0.dev0 is 2.3."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?", version)
    assert numbers is not None, version
    return int(numbers[1]), int(numbers[2] or 0)


def fp8_model_violations(
    precision: PrecisionSection, architecture: Architecture, parallel: ParallelSection
) -> list[str]:
    """Say why FP8 cannot run on this model, split this way, on any machine. Without torch."""
    if precision.dtype != "fp8":
        return []
    cp = parallel.cp
    if not needs_own_layers(architecture, cp):
        return weight_violations(precision, architecture, parallel.tp)
    return [
        f"precision.dtype=fp8: a {architecture.family} model"
        + (f" with sliding_window={architecture.sliding_window} at parallel.cp={cp}" if cp > 1 else "")
        + " does not run on Transformer Engine's layers, and FP8 is theirs; use precision.dtype=bf16"
        + (", or parallel.cp=1" if cp > 1 and not needs_own_layers(architecture, 1) else "")
    ]


def require_fp8_support(precision: PrecisionSection, architecture: Architecture, parallel: ParallelSection) -> None:
    """Raise UserError when FP8 is asked for and this machine, or this model split this way, cannot have it."""
    if violations := fp8_violations(precision) + fp8_model_violations(precision, architecture, parallel):
        raise UserError(violations)


def transformer_config_fields(precision: PrecisionSection) -> dict:
    """Return the fields of Megatron's TransformerConfig that follow from the precision."""
    dtype = params_dtype(precision)
    fields: dict = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": precision.dtype != "fp32"}
    if precision.dtype == "fp8":
        # fp8_param stays off: FP8 parameters cost memory beside bf16 main copies and clash with offloading
        fields |= {"fp8": precision.fp8_format, "fp8_recipe": FP8_RECIPES[recipe_of(precision)].megatron_name}
    return fields
