"""Which numbers does the model compute with: fp32, bf16 or FP8? And where is Transformer Engine used?

FP8 is Megatron's and Transformer Engine's own: a recipe name is mapped onto TransformerConfig fields, and the
layer spec is Transformer Engine's. The recipes are stateless ones only (tensorwise, which is current scaling, blockwise
and mxfp8): they keep no history, so a resumed run has nothing to lose.

Left out: delayed scaling, which keeps a history, pickled, in the checkpoint.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, NamedTuple

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.config import PrecisionSection
from megatron_powerflow.errors import UserError

if TYPE_CHECKING:
    import torch


class Fp8Recipe(NamedTuple):
    """A way of scaling FP8 numbers: its value of megatron.core.enums.Fp8Recipe, and the compute capability it needs."""

    megatron_name: str
    compute_capability: tuple[int, int]


# precision.fp8_recipe -> the recipe
FP8_RECIPES = {
    "tensorwise": Fp8Recipe("tensorwise", (8, 9)),
    "blockwise": Fp8Recipe("blockwise", (9, 0)),
    "mxfp8": Fp8Recipe("mxfp8", (10, 0)),
}


def _recipe(precision: PrecisionSection) -> str:
    """Return the name of the FP8 recipe, which `config_rules.py` demands where the dtype is fp8."""
    assert precision.fp8_recipe is not None, precision.dtype
    return precision.fp8_recipe


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
    needed = FP8_RECIPES[_recipe(precision)].compute_capability
    capability = torch.cuda.get_device_capability()
    if capability < needed:
        return [
            f"precision.fp8_recipe={precision.fp8_recipe} needs compute capability {needed[0]}.{needed[1]}, "
            f"this GPU has {capability[0]}.{capability[1]}; choose another recipe or precision.dtype=bf16"
        ]
    return []


def fp8_layer_violations(precision: PrecisionSection, architecture: Architecture, cp: int) -> list[str]:
    """Say why FP8 cannot run on this model under cp, on any machine. Without torch."""
    if precision.dtype != "fp8" or not needs_own_layers(architecture, cp):
        return []
    return [
        f"precision.dtype=fp8: a {architecture.family} model"
        + (f" with sliding_window={architecture.sliding_window} at parallel.cp={cp}" if cp > 1 else "")
        + " does not run on Transformer Engine's layers, and FP8 is theirs; use precision.dtype=bf16"
        + (", or parallel.cp=1" if cp > 1 and not needs_own_layers(architecture, 1) else "")
    ]


def require_fp8_support(precision: PrecisionSection, architecture: Architecture, cp: int) -> None:
    """Raise UserError when FP8 is asked for and this machine, or this model under cp, cannot have it."""
    if violations := fp8_violations(precision) + fp8_layer_violations(precision, architecture, cp):
        raise UserError(violations)


def transformer_config_fields(precision: PrecisionSection) -> dict:
    """Return the fields of Megatron's TransformerConfig that follow from the precision."""
    dtype = params_dtype(precision)
    fields: dict = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": precision.dtype != "fp32"}
    if precision.dtype == "fp8":
        # fp8_param stays off: FP8 parameters cost memory beside bf16 main copies and clash with offloading
        fields |= {"fp8": precision.fp8_format, "fp8_recipe": FP8_RECIPES[_recipe(precision)].megatron_name}
    return fields


def token_alignment(precision: PrecisionSection) -> int:
    """Return what the tokens of a forward pass must be a multiple of: 1, or what FP8 matrix products demand."""
    if precision.dtype != "fp8":
        return 1
    return {"mxfp8": 32, "blockwise": 16, "tensorwise": 16}[_recipe(precision)]
