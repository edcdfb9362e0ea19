"""Which activations are computed again: the modules of the default, the user's, and those that are not there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_powerflow.architecture import Architecture, Experts, Mla
from megatron_powerflow.config import ModelSection, PrecisionSection
from megatron_powerflow.config_file import parse_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.model import recompute
from megatron_powerflow.model.recompute import (
    modules_of,
    recompute_fields,
    recompute_lines,
    recompute_violations,
    require_recompute_support,
)
from tests.unit.test_config import MINIMAL
from tests.unit.test_layout import ARCHITECTURE, MIXTURE

CAPPED = replace(ARCHITECTURE, attention_softcap=50.0, post_norm=True)
SHARED = replace(
    MIXTURE, experts=Experts(6, 2, True, first_layer=1, dense_ffn_hidden_size=96, shared_ffn_hidden_size=64)
)
LATENT = replace(SHARED, mla=Mla(None, 32, 16, 8, 16))
POST_NORM = replace(ARCHITECTURE, pre_norm=False, post_norm=True)
BF16, FP32, FP8 = (PrecisionSection(dtype=dtype) for dtype in ("bf16", "fp32", "fp8"))


def section(*modules: str, kind: str = "selective") -> ModelSection:
    return ModelSection(hf_path="m", recompute=kind, recompute_modules=list(modules) or None)


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        (ARCHITECTURE, ["mlp"]),
        (MIXTURE, ["moe"]),
        (SHARED, ["mlp", "moe"]),
        (CAPPED, ["mlp", "core_attn"]),
    ],
)
def test_selective_covers_the_largest_activations_by_default(architecture: Architecture, modules):
    fields = recompute_fields(section(), architecture)
    assert fields == {"recompute_granularity": "selective", "recompute_modules": modules}
    assert recompute_lines(section(), architecture) == [f"recompute {', '.join(modules)}, in the backward pass"]
    assert recompute_violations(section(*modules), BF16, architecture, 1, engine=True) == []


def test_named_modules_stand_for_the_default_and_without_recomputation_there_are_none():
    assert modules_of(section("layernorm"), ARCHITECTURE) == ["layernorm"]
    assert recompute_fields(section(kind="none"), ARCHITECTURE) == {}
    assert recompute_lines(section(kind="none"), ARCHITECTURE) == []
    assert recompute_fields(section(kind="full"), ARCHITECTURE)["recompute_granularity"] == "full"
    assert "all of a layer" in recompute_lines(section(kind="full"), ARCHITECTURE)[0]


@pytest.mark.parametrize(
    ("module", "architecture", "precision", "engine", "words"),
    [
        ("mlp", MIXTURE, BF16, None, "every layer of this llama model has experts"),
        ("moe", ARCHITECTURE, BF16, None, "has no experts"),
        ("moe_act", ARCHITECTURE, BF16, None, "has no experts"),
        ("shared_experts", MIXTURE, BF16, None, "has no shared experts"),
        ("mla_up_proj", MIXTURE, BF16, None, "has no latent attention"),
        ("layernorm", POST_NORM, BF16, None, "has no norms before attention"),
        ("moe_act", MIXTURE, FP32, None, "grouped products"),
        ("moe_act", MIXTURE, FP8, True, "grouped products"),
        ("moe_act", MIXTURE, BF16, False, "grouped products"),
        ("moe_act", LATENT, BF16, True, "grouped products"),  # its layers are our own on every machine
        ("layernorm", ARCHITECTURE, BF16, True, "norms within their matrix products"),
    ],
)
def test_a_module_that_is_not_there_is_refused_with_the_reason(module, architecture, precision, engine, words):
    (line,) = recompute_violations(section("core_attn", module), precision, architecture, 1, engine=engine)
    assert line.startswith(f"model.recompute_modules holds {module}: ")
    assert words in line


@pytest.mark.parametrize(
    ("module", "architecture", "precision", "engine"),
    [
        ("mlp", SHARED, BF16, True),
        ("shared_experts", SHARED, BF16, True),
        ("mla_up_proj", LATENT, BF16, True),
        ("moe_act", MIXTURE, BF16, True),
        ("moe_act", MIXTURE, BF16, None),
        ("layernorm", MIXTURE, BF16, True),
        ("layernorm", ARCHITECTURE, FP32, True),
        ("layernorm", ARCHITECTURE, BF16, None),
        ("layernorm", CAPPED, BF16, True),
    ],
)
def test_its_neighbours_are_accepted(module, architecture, precision, engine):
    assert recompute_violations(section(module), precision, architecture, 1, engine=engine) == []


def test_what_this_machine_lacks_is_refused_before_a_run_begins():
    """There is no Transformer Engine here; `check` may say nothing of that."""
    require_recompute_support(section("moe"), BF16, MIXTURE, 1)
    with pytest.raises(UserError, match="holds moe_act"):
        require_recompute_support(section("moe_act"), BF16, MIXTURE, 1)
    with pytest.raises(UserError, match=r"holds layernorm: .* not importable"):
        require_recompute_support(section("layernorm"), BF16, MIXTURE, 1)


@pytest.mark.parametrize(("version", "refused"), [("2.5.0", True), ("2.6.0", False), ("2.20.2", False)])
def test_norms_in_fp8_need_a_version(monkeypatch, version, refused):
    monkeypatch.setattr(recompute, "use_transformer_engine", lambda precision: True)
    monkeypatch.setattr(recompute, "transformer_engine_installed", lambda: True)
    monkeypatch.setattr(recompute.metadata, "version", lambda name: version)
    if refused:
        with pytest.raises(UserError, match=r"Transformer Engine 2\.6 or newer, there is 2\.5\.0"):
            require_recompute_support(section("layernorm"), FP8, MIXTURE, 1)
    require_recompute_support(section("moe"), FP8, MIXTURE, 1)
    require_recompute_support(section("layernorm"), BF16, MIXTURE, 1)
    if not refused:
        require_recompute_support(section("layernorm"), FP8, MIXTURE, 1)


def test_an_unknown_module_and_modules_without_selective_are_refused():
    with pytest.raises(UserError, match="must be one of 'mlp'"):
        parse_config(MINIMAL, ["model.recompute=selective", "model.recompute_modules=[mpl]"])
    with pytest.raises(UserError, match=r"has no effect because model\.recompute is not selective"):
        parse_config(MINIMAL, ["model.recompute=full", "model.recompute_modules=[mlp]"])
    config = parse_config(MINIMAL, ["model.recompute=selective", "model.recompute_modules=[mlp,core_attn]"])
    assert config.model.recompute_modules == ["mlp", "core_attn"]
