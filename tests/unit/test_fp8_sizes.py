"""FP8 under a layout: every part that is multiplied has a size that Transformer Engine takes, or is refused before."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow.architecture import Experts
from megatron_powerflow.config import ParallelSection, PrecisionSection
from megatron_powerflow.config_file import parse_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.model.precision import FP8_RECIPES, fp8_model_violations, recipe_violations
from megatron_powerflow.parallel.fp8_sizes import LAST_DIMENSION, QUANTIZED_ROWS, weight_violations
from megatron_powerflow.parallel.layout import Layout, plan_layout
from tests.unit.test_layout import ARCHITECTURE, MINIMAL

RECIPES = ["tensorwise", "blockwise", "mxfp8"]
# Llama-3.1-70B
LARGE = replace(
    ARCHITECTURE,
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    head_dim=128,
    tied_embeddings=False,
)


def fp8(recipe: str) -> PrecisionSection:
    return PrecisionSection(dtype="fp8", fp8_recipe=recipe)


def layout(tp: int = 1, cp: int = 1, *, sequence_parallel: bool = True) -> Layout:
    return Layout(tp=tp, pp=1, vpp=None, cp=cp, ep=1, dp=1, sequence_parallel=sequence_parallel)


def accepts(rows: int, last: int, recipe: str) -> bool:
    """What Transformer Engine 2.20 does: `assert_dim_for_fp8_exec`, and `MXFP8Quantizer.is_quantizable` for mxfp8."""
    if recipe == "mxfp8":
        return rows % 32 == 0 and last % 32 == 0
    return rows % 8 == 0 and last % 16 == 0


@pytest.mark.parametrize("recipe", RECIPES)
@given(
    tp=st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
    cp=st.integers(1, 4),
    sequence_parallel=st.booleans(),
    num_tokens=st.integers(1, 5000),
    rows=st.integers(1, 5),
)
def test_a_padded_micro_batch_has_rows_that_fp8_takes(recipe, tp, cp, sequence_parallel, num_tokens, rows):
    """Forward: the part that a rank quantizes. Backward: all tokens of a rank, as the last dimension."""
    over = layout(tp, cp, sequence_parallel=sequence_parallel)
    multiple = over.position_multiple(fp8(recipe))
    positions = -(-num_tokens // multiple) * multiple
    assert positions % (2 * cp if cp > 1 else 1) == 0
    tokens = positions // cp * rows
    assert positions % cp == 0
    parts = tp if sequence_parallel else 1
    assert tokens % parts == 0
    assert accepts(tokens // parts, 32, recipe)
    assert accepts(32, tokens, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tp", [1, 2, 3, 8])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_no_more_is_padded_than_fp8_needs(recipe, tp, sequence_parallel):
    """By trying: the least number of tokens that is accepted in both passes."""
    parts = tp if sequence_parallel else 1
    least = next(
        tokens
        for tokens in range(1, 1000)
        if tokens % parts == 0 and accepts(tokens // parts, 32, recipe) and accepts(32, tokens, recipe)
    )
    assert layout(tp, sequence_parallel=sequence_parallel).token_multiple(fp8(recipe)) == least


def test_the_multiples_of_a_70b():
    """Those of tp=8 were 16 and 32 tokens: 2 and 4 rows a rank."""
    assert [layout(8).token_multiple(fp8(recipe)) for recipe in RECIPES] == [64, 64, 256]
    assert [layout(8, sequence_parallel=False).token_multiple(fp8(recipe)) for recipe in RECIPES] == [16, 16, 32]
    assert layout(8).token_multiple(PrecisionSection(dtype="bf16")) == 8
    assert layout(8, 2).position_multiple(fp8("tensorwise")) == 128


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_its_sizes(recipe):
    assert set(LAST_DIMENSION) == set(QUANTIZED_ROWS) == set(FP8_RECIPES) == set(RECIPES)
    assert weight_violations(fp8(recipe), LARGE, 8) == []
    assert weight_violations(PrecisionSection(dtype="bf16"), replace(LARGE, hidden_size=100), 8) == []


@pytest.mark.parametrize(
    ("changes", "tp", "recipe", "words"),
    [
        ({"hidden_size": 8200}, 8, "tensorwise", ["hidden_size=8200 is no multiple of 16", "use precision.dtype=bf16"]),
        (
            {"ffn_hidden_size": 11008},  # Llama-2-7B: 1376 a rank
            8,
            "mxfp8",
            [],
        ),
        (
            {"ffn_hidden_size": 8960},  # Qwen2.5-1.5B: 560 a rank
            16,
            "mxfp8",
            [
                "ffn_hidden_size=8960, over parallel.tp=16 560 a rank, is no multiple of 32",
                "use parallel.tp=8 or precision.fp8_recipe=tensorwise or precision.dtype=bf16",
            ],
        ),
        (
            {"num_attention_heads": 8, "num_query_groups": 8, "head_dim": 8},
            8,
            "blockwise",
            [
                "num_attention_heads * head_dim=64, over parallel.tp=8 8 a rank, is no multiple of 16",
                "(num_attention_heads + 2 * num_query_groups) * head_dim=192, over parallel.tp=8 24 a rank",
                "use parallel.tp=4 or",
            ],
        ),
        (
            {"experts": Experts(8, 2, normalized=True, shared_ffn_hidden_size=72)},
            1,
            "tensorwise",
            ["shared_ffn_hidden_size=72 is no multiple of 16"],
        ),
    ],
)
def test_matrices_that_fp8_cannot_take_are_refused_with_the_numbers(changes, tp, recipe, words):
    architecture = replace(LARGE, **changes)
    violations = weight_violations(fp8(recipe), architecture, tp)
    text = "\n".join(violations)
    assert bool(violations) == bool(words), text
    assert all(word in text for word in words), text
    assert fp8_model_violations(fp8(recipe), architecture, ParallelSection(tp=tp)) == violations


@given(
    hidden=st.integers(1, 40), ffn=st.integers(1, 40), tp=st.sampled_from([1, 2, 4, 8]), recipe=st.sampled_from(RECIPES)
)
def test_what_is_not_refused_is_taken(hidden, ffn, tp, recipe):
    """Each of a layer's four matrices, [out, in] of a rank, in both passes; and the tp that is named is taken too."""
    architecture = replace(LARGE, hidden_size=8 * hidden, ffn_hidden_size=64 * ffn)

    def taken(tp: int) -> bool:
        query, key, ffn_part = architecture.query_width // tp, architecture.key_width // tp, 64 * ffn // tp
        matrices = [
            (query + 2 * key, 8 * hidden),
            (8 * hidden, query),
            (2 * ffn_part, 8 * hidden),
            (8 * hidden, ffn_part),
        ]
        return all(accepts(rows, last, recipe) and accepts(last, rows, recipe) for rows, last in matrices)

    violations = weight_violations(fp8(recipe), architecture, tp)
    assert taken(tp) == (not violations)
    for violation in violations:
        if "use parallel.tp=" in violation:
            assert taken(int(violation.split("use parallel.tp=")[1].split()[0]))


def test_the_room_of_packed_micro_batches_counts_the_padding_of_fp8():
    """tp=8 with mxfp8: 300 tokens take 512, of which each rank has 64."""
    lengths = ["rollout.max_prompt_tokens=100", "rollout.max_response_tokens=200"]
    split = ["parallel.tp=8", "parallel.sequence_parallel=true", "precision.dtype=fp8", "precision.fp8_recipe=mxfp8"]
    with pytest.raises(UserError, match="in multiples of 256; choose 512 or more"):
        plan_layout(parse_config(MINIMAL, [*lengths, *split, "parallel.max_tokens_per_micro_batch=511"]), LARGE, 8)
    config = parse_config(MINIMAL, [*lengths, *split, "parallel.max_tokens_per_micro_batch=512"])
    assert plan_layout(config, LARGE, 8).tp == 8


@pytest.mark.parametrize(
    ("recipe", "capability", "engine", "cuda", "words"),
    [
        ("tensorwise", (9, 0), "2.2.0", "12.4", []),
        ("blockwise", (9, 0), "2.3.0.dev0+5fdd7bb", "12.9", []),
        ("mxfp8", (10, 0), "2.20.2", "13.0", []),
        ("tensorwise", (8, 0), "2.20.2", "13.0", ["compute capability 8.9 or newer, this GPU has 8.0; choose another"]),
        ("blockwise", (9, 0), "2.2.0", "12.9", ["blockwise needs Transformer Engine 2.3 or newer, there is 2.2"]),
        ("blockwise", (9, 0), "2.10.0", "12.8", ["a torch for CUDA 12.9 or newer, there is one for 12.8; install it"]),
        (
            "mxfp8",
            (9, 0),
            "1.13.0",
            "12.1",
            ["compute capability 10.0 or newer, this GPU has 9.0", "Transformer Engine 2.1 or newer, there is 1.13"],
        ),
    ],
)
def test_what_a_recipe_needs_of_the_machine_is_refused_with_the_versions(recipe, capability, engine, cuda, words):
    violations = recipe_violations(recipe, capability=capability, transformer_engine=engine, cuda=cuda)
    assert len(violations) == len(words), violations
    assert all(word in violation for word, violation in zip(words, violations, strict=True)), violations
