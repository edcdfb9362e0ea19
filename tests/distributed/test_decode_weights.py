"""Weights laid out for decoding: the same samples, from the weights of the moment, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14]]
FEW = 10  # response tokens: too few for a copy
# Nats, in fp32, between log-probs by a copy and by the parameter itself: 4e-6 on one processor and 1.7e-5 on another,
# which sums in another order. A stale copy is .04 to 2.9 away at the first token.
ROUNDING = 1e-4


def around_an_update(model: str, tp: int, pp: int) -> dict:
    """Tokens and log-probs of each response before and after an update, from copies ("many" tokens) and from the
    parameters themselves ("few"), and what was observed of the parameters."""
    from megatron_powerflow.config import ModelSection, ParallelSection, PrecisionSection
    from megatron_powerflow.hf.config import read_architecture
    from megatron_powerflow.hf.families import FAMILIES
    from megatron_powerflow.model.decode_weights import DecodeWeight
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.layout import inference_layout
    from megatron_powerflow.records import Prompt, SamplingParams
    from megatron_powerflow.rollout.megatron_engine import MegatronEngine
    from megatron_powerflow.training.policy import build_policy

    launch = read_launch()
    architecture, family = read_architecture(model, FAMILIES)
    layout = inference_layout(ParallelSection(tp=tp, pp=pp), architecture, launch.world_size)
    few = SamplingParams(3, FEW, 1.0, frozenset((2,)), seed=7, step=0)
    given = [(slot, Prompt(str(slot), slot, tuple(tokens))) for slot, tokens in enumerate(PROMPTS)]
    with initialized(layout, launch, seed=0) as groups:
        precision = PrecisionSection(dtype="fp32")
        chunks = build_policy(architecture, family, layout, ModelSection(hf_path=model), precision, groups)
        sizes = {"vocab_size": architecture.vocab_size, "max_concurrent_rows": 64, "alignment": 1}
        engine = MegatronEngine(chunks, groups, **sizes)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]

        def places() -> list[tuple]:
            return [(parameter.data_ptr(), parameter.stride()) for parameter in parameters]

        def written(max_tokens: int) -> list[tuple]:
            rollouts = engine.generate(given, replace(few, max_response_tokens=max_tokens))
            return [(r.response_token_ids, np.array(r.rollout_log_probs)) for r in rollouts]

        def stop(*_) -> None:
            held = [weight for chunk in chunks for weight in chunk.parameters()]
            seen["stand-ins"].append(sum(type(weight) is DecodeWeight for weight in held))
            raise KeyboardInterrupt

        before, seen = places(), {"stand-ins": []}
        for max_tokens in (FEW, 3 * FEW):
            with pytest.raises(KeyboardInterrupt):
                engine.generate(given, replace(few, max_response_tokens=max_tokens), stop)
        answers = {"few before": written(FEW), "many before": written(3 * FEW)}
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.7)
        answers |= {"few after": written(FEW), "many after": written(3 * FEW)}
        held = [weight for chunk in chunks for weight in chunk.parameters()]
        back = all(there is here for there, here in zip(held, parameters, strict=True))
        return {**answers, **seen, "in place": back and places() == before}


@pytest.mark.parametrize(
    ("family", "changes", "tp", "pp"),
    [("llama", {"tied": True}, 1, 1), ("qwen2", {"tied": False}, 2, 1), ("qwen3_moe", {}, 1, 2)],
)
def test_copies_change_no_sample_follow_an_update_and_are_gone_afterwards(gloo, tiny_model, family, changes, tp, pp):
    for found in gloo.run(tp * pp, around_an_update, str(tiny_model(family, **changes)), tp, pp):
        for when in ("before", "after"):
            for (few, few_log_probs), (many, many_log_probs) in zip(
                found[f"few {when}"], found[f"many {when}"], strict=True
            ):
                assert many[: len(few)] == few
                np.testing.assert_allclose(many_log_probs[: len(few)], few_log_probs, rtol=0, atol=ROUNDING)
        assert [tokens for tokens, _ in found["many before"]] != [tokens for tokens, _ in found["many after"]]
        few_stand_ins, many_stand_ins = found["stand-ins"]
        assert few_stand_ins == 0
        assert many_stand_ins > 0
        assert found["in place"]  # after errors and after answers


def values_and_line_of(num_out: int, num_in: int) -> tuple[bool, tuple[int, int]]:
    """Whether the copy equals the weight, and its strides: in a process of its own, since it imports Megatron."""
    from megatron_powerflow.model.decode_weights import transposed_in_memory

    weight = torch.randn(num_out, num_in)
    copy = transposed_in_memory(weight)
    return torch.equal(copy, weight), copy.stride()


@pytest.mark.parametrize(("num_out", "stride"), [(3072, 3088), (960, 976), (1008, 1008), (301, 304), (5, 16)])
def test_columns_are_an_odd_number_of_cache_lines(gloo, num_out, stride):
    assert gloo.run(1, values_and_line_of, num_out, 7) == [(True, (1, stride))]


def products(dtype: torch.dtype, packed: bool) -> dict[str, float]:
    """Largest relative error of products by a `DecodeWeight` whose own numbers are overwritten once it has its copy, by
    how the product is asked for; and whether an embedding sees the numbers."""
    import torch.nn.functional as F

    from megatron_powerflow.log_probs.plain import make_logits
    from megatron_powerflow.model.decode_weights import decode_weight

    torch.manual_seed(0)
    numbers = torch.randn(301, 40, dtype=dtype)
    weight, bias = numbers.double(), torch.randn(301, dtype=dtype)
    stand_in = decode_weight(numbers, packed=packed)
    numbers.zero_()
    errors = {}

    def note(name: str, product: torch.Tensor, rows: torch.Tensor, added: torch.Tensor | float = 0.0) -> None:
        expected = rows.double() @ weight.t() + added
        assert product.shape == expected.shape
        assert type(product) is torch.Tensor
        if len(rows):
            errors[name] = ((product.double() - expected).abs().max() / expected.abs().max()).item()

    for count in (0, 1, 7, 64, 200):
        rows = torch.randn(count, 40, dtype=dtype)
        note(f"{count} rows", torch.matmul(rows, stand_in.t()), rows)
    rows = torch.randn(40, 5, 3, dtype=dtype).permute(2, 1, 0)
    note("three axes, other strides", rows @ stand_in.t(), rows)
    note("linear", F.linear(rows, stand_in), rows)
    note("linear with a bias", F.linear(rows, stand_in, bias), rows, bias.double())
    note("logits", make_logits(rows[:, 0], stand_in, 1.0, None, torch.float32), rows[:, 0])
    assert F.embedding(torch.tensor([3]), stand_in).abs().max() == 0
    return errors


@pytest.mark.parametrize(("dtype", "packed"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_every_product_is_made_from_the_copy_and_nothing_else_is(gloo, dtype, packed):
    if dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no products in bf16")
    (errors,) = gloo.run(1, products, getattr(torch, dtype), packed)
    assert len(errors) == 8
    assert max(errors.values()) < {"float32": 1e-6, "bfloat16": 2**-8}[dtype], errors
