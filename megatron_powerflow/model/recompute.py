"""Which activations are computed again in the backward pass? None, a layer's all, or those of some of its modules.

    model.recompute=selective             by default the modules with the largest activations for the time they take
    model.recompute_modules=[mlp, ...]    these, by Megatron's names:

        mlp               the MLP of layers that have one
        moe               a mixture: router, exchange of tokens and experts; the tokens travel once more
        shared_experts    of a mixture, the MLP that every token goes through
        moe_act           of a mixture, the experts' activation function alone; part of their grouped products
        layernorm         the norms before attention and MLP, where they are modules of their own
        core_attn         attention without its matrices; little is saved where its kernel keeps no scores
        mla_up_proj       queries, keys and values made of the latents

Megatron's own default, core_attn, saves next to nothing here: neither torch's nor Transformer Engine's kernels keep
scores, except where those are capped (`attention.py`).

Left out: recomputation itself, which is Megatron's.
"""

from __future__ import annotations

from importlib import metadata

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.config import ModelSection, PrecisionSection
from megatron_powerflow.errors import UserError
from megatron_powerflow.model.precision import (
    needs_own_layers,
    release,
    transformer_engine_installed,
    use_transformer_engine,
)

FP8_LAYERNORM = (2, 6)  # the first version of Transformer Engine; Megatron-Core's config asks


def recompute_fields(model: ModelSection, architecture: Architecture) -> dict[str, str | int | list[str]]:
    """Return Megatron's fields of recomputation."""
    if model.recompute == "none":
        return {}
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": modules_of(model, architecture)}


def modules_of(model: ModelSection, architecture: Architecture) -> list[str]:
    """Return the modules that selective recomputation covers: the user's, or those of the default."""
    if model.recompute_modules is not None:
        return list(model.recompute_modules)
    mixture = architecture.experts
    chosen = {
        "mlp": mixture is None or mixture.first_layer > 0,
        "moe": mixture is not None,
        "core_attn": architecture.attention_softcap is not None,
    }
    return [name for name, is_chosen in chosen.items() if is_chosen]


def recompute_violations(
    model: ModelSection,
    precision: PrecisionSection,
    architecture: Architecture,
    cp: int,
    *,
    engine: bool | None = None,
    installed: bool | None = None,
) -> list[str]:
    """Say which of model.recompute_modules are not there to be recomputed; [] when all are.

    engine: whether the layers are Transformer Engine's; installed: whether it can be imported. None where that is not
    known yet, as before a run has its GPUs.
    """
    if precision.dtype == "fp32" or needs_own_layers(architecture, cp):
        engine = False
    return [
        f"model.recompute_modules holds {name}: {why}; take it out"
        for name in model.recompute_modules or ()
        if (why := _why_not(name, precision, architecture, engine, installed)) is not None
    ]


def require_recompute_support(
    model: ModelSection, precision: PrecisionSection, architecture: Architecture, cp: int
) -> None:
    """Raise UserError where a module that is to be recomputed is not there on this machine."""
    engine, installed = use_transformer_engine(precision), transformer_engine_installed()
    violations = recompute_violations(model, precision, architecture, cp, engine=engine, installed=installed)
    if engine and precision.dtype == "fp8" and "layernorm" in (model.recompute_modules or ()):
        version = metadata.version("transformer-engine")
        if release(version) < FP8_LAYERNORM:
            violations.append(
                "model.recompute_modules holds layernorm: with precision.dtype=fp8 that needs Transformer Engine 2.6 "
                f"or newer, there is {version}; take it out"
            )
    if violations:
        raise UserError(violations)


def recompute_lines(model: ModelSection, architecture: Architecture) -> list[str]:
    """Return the line of `powerflow check` on recomputation; none without it."""
    if model.recompute == "none":
        return []
    what = "all of a layer" if model.recompute == "full" else ", ".join(modules_of(model, architecture))
    return [f"recompute {what}, in the backward pass"]


def _why_not(
    name: str, precision: PrecisionSection, architecture: Architecture, engine: bool | None, installed: bool | None
) -> str | None:
    """Say why a module is not there; None where it is, or may be."""
    mixture, family = architecture.experts, architecture.family
    if name == "mlp" and mixture is not None and mixture.first_layer == 0:
        return f"every layer of this {family} model has experts in the place of its MLP"
    if name in ("moe", "shared_experts", "moe_act") and mixture is None:
        return f"{family} has no experts"
    if name == "shared_experts" and mixture is not None and mixture.shared_ffn_hidden_size is None:
        return f"{family} has no shared experts"
    if name == "mla_up_proj" and architecture.mla is None:
        return f"{family} has no latent attention"
    if name == "moe_act" and (engine is False or precision.dtype != "bf16"):
        return "it is a part of the experts' grouped products, which are Transformer Engine's, in bf16"
    if name == "layernorm":
        if not architecture.pre_norm:
            return f"{family} has no norms before attention and MLP"
        if engine and mixture is None:
            return "Transformer Engine's layers have norms within their matrix products, and recompute them anyway"
        if installed is False:
            return "Megatron-Core asks Transformer Engine whether that is FP8, and it is not importable"
    return None
