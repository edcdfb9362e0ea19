"""Which of Megatron's fused and grouped kernels does a model use? Those that compute the same, where they are there.

rotation            one kernel rotates queries and keys of packed sequences. Without it Megatron copies the sequences'
                    lengths to the host, twice a layer, and waits (`_apply_rotary_pos_emb_thd`); Transformer Engine's
                    attention itself waits for nothing, for it is told the longest (`stream.thd_of`). The kernel knows
                    no factor of cosines and sines, and for packed sequences Megatron does not look whether one is
                    asked for: models with one (longrope, most of YaRN) keep the loop.
experts             one grouped product for all experts of a rank, in bf16. In FP8 each expert stays an MLP of its own:
                    Transformer Engine (2.20) saves nothing for recipes without state, and Megatron-Core 0.16's grouped
                    layer fails to split this nothing among its experts when a checkpoint is written (0.19's does not).
weight gradients    a product adds to the fp32 gradient of earlier micro-batches instead of making a bf16 one to be
                    added. Transformer Engine's layers do that by themselves; Megatron's, of which each model has two,
                    refuse to be built without Apex's extension, which NVIDIA's images have.

Left out: gathering parameters while the next forward pass runs (overlap_param_gather). After an update the next to read
them are the sampler, exports, checkpoints and the swap with the reference, which ask for weights and not for a forward
pass of their module, and would read old ones.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.config import PrecisionSection
from megatron_powerflow.model.precision import needs_own_layers, use_transformer_engine


class FusedKernels(NamedTuple):
    """The choices, by Megatron's names for them: fields of its TransformerConfig."""

    apply_rope_fusion: bool
    moe_grouped_gemm: bool
    gradient_accumulation_fusion: bool


def fused_kernels(architecture: Architecture, precision: PrecisionSection, cp: int) -> FusedKernels:
    """Return the choices for a model on this machine."""
    if not use_transformer_engine(precision) or needs_own_layers(architecture, cp):
        return FusedKernels(False, False, False)
    return on_transformer_engine(architecture, precision, has_extension=has_weight_gradient_extension())


def on_transformer_engine(
    architecture: Architecture, precision: PrecisionSection, *, has_extension: bool
) -> FusedKernels:
    """Return the choices for a model on Transformer Engine's layers. has_extension: whether Apex's is there."""
    return FusedKernels(
        apply_rope_fusion=architecture.rope.attention_factor == 1.0,
        moe_grouped_gemm=architecture.experts is not None and precision.dtype == "bf16",
        gradient_accumulation_fusion=has_extension,
    )


def has_weight_gradient_extension() -> bool:
    """Tell whether Apex's extension can be imported, as Megatron-Core asks."""
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return False
    return True
