"""The in-process engine: samples from the live weights, equal under every layout, ending where they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny_models import FAMILIES, OTHER_SHAPES

LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2_pp2": (2, 2)}
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [20, 21]]


def generate(
    model: str,
    tp: int,
    pp: int,
    *,
    temperature: float = 1.0,
    responses: int = 3,
    max_rows: int = 256,
    vpp: int | None = None,
    sequence_parallel: bool = False,
    max_tokens: int = 10,
    stop: tuple = (2,),
    prompts=PROMPTS,
    step: int = 0,
    at_pass=None,
    prepare=None,
    fp8_recipe: str | None = None,
    **engine_settings,
):
    """[(slot, response_index, token ids, log-probs, finish reason)] on every rank.

    fp8_recipe: the recipe whose sizes the passes have; the model computes in fp32.
    """
    from megatron_powerflow.config import ModelSection, ParallelSection, PrecisionSection
    from megatron_powerflow.hf.config import read_architecture
    from megatron_powerflow.hf.families import FAMILIES as families
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.layout import inference_layout
    from megatron_powerflow.records import Prompt, SamplingParams
    from megatron_powerflow.rollout.megatron_engine import MegatronEngine
    from megatron_powerflow.training.policy import build_policy

    launch = read_launch()
    architecture, family = read_architecture(model, families)
    parallel = ParallelSection(tp=tp, pp=pp, vpp=vpp, sequence_parallel=sequence_parallel)
    layout = inference_layout(parallel, architecture, launch.world_size)
    precision = PrecisionSection(dtype="fp32")
    sizes = PrecisionSection(dtype="fp8", fp8_recipe=fp8_recipe) if fp8_recipe else precision
    with initialized(layout, launch, seed=0) as groups:
        chunks = build_policy(architecture, family, layout, ModelSection(hf_path=model), precision, groups)
        if prepare is not None:
            prepare(chunks[0])
        if at_pass is not None:
            chunks[0].register_forward_hook(at_pass)
        engine = MegatronEngine(
            chunks,
            groups,
            vocab_size=architecture.vocab_size,
            max_concurrent_rows=max_rows,
            alignment=layout.token_multiple(sizes),
            **engine_settings,
        )
        sampling = SamplingParams(responses, max_tokens, temperature, frozenset(stop), seed=7, step=step)
        given = [(slot, Prompt(str(slot), slot, tuple(tokens))) for slot, tokens in enumerate(prompts)]
        rollouts = engine.generate(given, sampling)
        return [
            (r.slot, r.response_index, r.response_token_ids, np.array(r.rollout_log_probs), r.finish_reason)
            for r in rollouts
        ]


def same_tokens(left, right) -> bool:
    return [item[:3] + item[4:] for item in left] == [item[:3] + item[4:] for item in right]


@pytest.mark.parametrize("shape", ["usual", "other"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_hugging_face(gloo, tiny_model, family, shape):
    """Through the cache, and beyond the sliding windows of the models that have one."""
    from transformers import AutoModelForCausalLM

    folder = str(tiny_model(family, **(OTHER_SHAPES[family] if shape == "other" else {})))
    (ours,) = gloo.run(1, generate, folder, 1, 1, temperature=0.0, responses=1)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for slot, _, tokens, _, _ in ours:
        prompt = torch.tensor([PROMPTS[slot]])
        theirs = network.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert list(tokens) == theirs[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_samples_do_not_depend_on_the_layout(gloo, tiny_model, layout):
    folder = str(tiny_model("qwen3"))
    (alone,) = gloo.run(1, generate, folder, 1, 1)
    tp, pp = LAYOUTS[layout]
    everyone = gloo.run(tp * pp, generate, folder, tp, pp)
    for answer in everyone:  # every rank holds the same rollouts
        assert same_tokens(answer, alone)
        for (*_, ours, _), (*_, theirs, _) in zip(answer, alone, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_samples_do_not_depend_on_sequence_parallelism_or_interleaving(gloo, tiny_model):
    folder = str(tiny_model("llama"))
    (alone,) = gloo.run(1, generate, folder, 1, 1)
    assert same_tokens(gloo.run(2, generate, folder, 2, 1, sequence_parallel=True)[0], alone)
    assert same_tokens(gloo.run(2, generate, folder, 1, 2, vpp=2)[1], alone)


def test_samples_do_not_depend_on_who_shares_the_batch(gloo, tiny_model):
    folder = str(tiny_model("mistral"))
    (together,) = gloo.run(1, generate, folder, 1, 1)
    (in_waves,) = gloo.run(1, generate, folder, 1, 1, max_rows=3)
    assert same_tokens(together, in_waves)


UNEVEN = {  # about a tenth of the tokens stop, so rows are freed at all times
    "prompts": [[5, 6, 7], [9], [11] * 120, [20, 21], [30], [41, 42, 43, 44], [50] * 7],
    "responses": 4,
    "stop": tuple(range(30)),
    "max_tokens": 60,  # with the longest prompt, more than one growth of the cache
}


def generate_and_count(model: str, tp: int, pp: int, **kwargs):
    """`generate`, and the forward passes that it took."""
    passes: list[None] = []
    return generate(model, tp, pp, at_pass=lambda *_: passes.append(None), **kwargs), len(passes)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_freed_rows_go_to_waiting_groups_and_change_no_sample(gloo, tiny_model, tp, pp):
    folder = str(tiny_model("llama", scale=0.02))
    (together,) = gloo.run(1, generate, folder, 1, 1, **UNEVEN)
    for answer, num_passes in gloo.run(tp * pp, generate_and_count, folder, tp, pp, max_rows=8, **UNEVEN):
        assert same_tokens(answer, together)
        for (*_, ours, _), (*_, theirs, _) in zip(answer, together, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        longest = [max(len(item[2]) for item in together if item[0] == slot) for slot in range(7)]
        in_waves = sum(max(longest[start : start + 2]) for start in range(0, 7, 2))  # 8 rows: two groups at a time
        assert pp > 1 or num_passes < in_waves


def test_one_group_at_a_time_draws_the_same(gloo, tiny_model):
    """Room for one group only: its finished rows leave the batch, and rows are made anew for the next."""
    folder = str(tiny_model("qwen3", scale=0.02))
    (together,) = gloo.run(1, generate, folder, 1, 1, **UNEVEN)
    assert same_tokens(gloo.run(1, generate, folder, 1, 1, max_rows=5, **UNEVEN)[0], together)


def generate_and_look_at_shapes(model: str, tp: int, pp: int, **kwargs):
    """`generate`; the shapes of the keys that attention got, and the tokens of each pass."""
    import torch.nn.functional as F

    lengths, tokens, attend = set(), [], F.scaled_dot_product_attention

    def look(query, key, *arguments, **named):
        lengths.add(key.shape[2])
        return attend(query, key, *arguments, **named)

    def prepare(chunk):
        chunk.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[1]))

    F.scaled_dot_product_attention = look
    try:
        return generate(model, tp, pp, prepare=prepare, **kwargs), lengths, tokens
    finally:
        F.scaled_dot_product_attention = attend


@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v3"])
def test_few_lengths_and_the_same_samples(gloo, tiny_model, family):
    """As on CUDA: 180 positions come in steps of 128; one step and the cache's limit, where there were over 30."""
    changes = {"sliding_window": 7} if family == "mistral" else {}
    folder = str(tiny_model(family, scale=0.02, **changes))
    ((token_by_token, all_lengths, _),) = gloo.run(
        1, generate_and_look_at_shapes, folder, 1, 1, length_step=1, **UNEVEN
    )
    ((in_steps, lengths, _),) = gloo.run(1, generate_and_look_at_shapes, folder, 1, 1, length_step=128, **UNEVEN)
    assert len(all_lengths) > 30
    assert lengths == {128, 180}
    assert same_tokens(in_steps, token_by_token)
    for (*_, ours, _), (*_, theirs, _) in zip(in_steps, token_by_token, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_prompts_are_prefilled_a_few_at_a_time_and_draw_the_same(gloo, tiny_model, tp, pp):
    """Passes of at most 10 tokens of prompts, and one of 120 for the prompt that is longer."""
    folder = str(tiny_model("llama", scale=0.02))
    ((at_once, _, passes),) = gloo.run(1, generate_and_look_at_shapes, folder, 1, 1, **UNEVEN)
    assert passes[0] == sum(map(len, UNEVEN["prompts"]))
    for answer, _, tokens in gloo.run(
        tp * pp, generate_and_look_at_shapes, folder, tp, pp, prefill_tokens=10, **UNEVEN
    ):
        assert same_tokens(answer, at_once)
        for (*_, ours, _), (*_, theirs, _) in zip(answer, at_once, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert pp > 1 or tokens[:4] == [4, 120, 7, 7]  # 3 + 1; 120; 2 + 1 + 4; 7


@pytest.mark.parametrize("prefill_tokens", [1, 125])
def test_waiting_groups_are_prefilled_a_few_at_a_time_too(gloo, tiny_model, prefill_tokens):
    folder = str(tiny_model("qwen3", scale=0.02))
    (together,) = gloo.run(1, generate, folder, 1, 1, **UNEVEN)
    (few,) = gloo.run(1, generate, folder, 1, 1, max_rows=8, prefill_tokens=prefill_tokens, **UNEVEN)
    assert same_tokens(few, together)


def test_another_step_draws_other_samples(gloo, tiny_model):
    folder = str(tiny_model("llama"))
    first, second = (gloo.run(1, generate, folder, 1, 1, step=step)[0] for step in (0, 1))
    assert not same_tokens(first, second)


def test_responses_end_at_a_stop_token_or_at_the_limit(gloo, tiny_model):
    folder = str(tiny_model("llama", scale=0.02))  # nearly uniform over 301 tokens: half of them stop
    stop = tuple(range(150))
    (rollouts,) = gloo.run(1, generate, folder, 1, 1, responses=16, stop=stop, max_tokens=4)
    assert len(rollouts) == len(PROMPTS) * 16
    for _, _, tokens, log_probs, reason in rollouts:
        assert len(tokens) == len(log_probs)
        assert not set(tokens[:-1]) & set(stop)
        if reason == "eos":
            assert tokens[-1] in stop
        else:
            assert len(tokens) == 4
            assert tokens[-1] not in stop
    assert {"eos", "length"} == {reason for *_, reason in rollouts}
    assert len({len(tokens) for _, _, tokens, _, _ in rollouts}) > 1  # rows left the batch at different times


def test_samples_follow_the_distribution_they_claim(gloo, tiny_model):
    """First tokens of 2,000 responses to one prompt against exp(log-prob), by total variation."""
    folder = str(tiny_model("llama", scale=0.1))
    (rollouts,) = gloo.run(1, generate, folder, 1, 1, responses=2000, max_rows=2000, max_tokens=1, prompts=[[5]])
    counts: dict[int, int] = {}
    claimed: dict[int, float] = {}
    for _, _, (token,), (log_prob,), _ in rollouts:
        counts[token] = counts.get(token, 0) + 1
        claimed[token] = float(np.exp(log_prob))
    assert sum(claimed.values()) <= 1.0 + 1e-5
    frequent = {token for token, p in claimed.items() if p > 0.01}
    assert frequent
    for token in frequent:
        deviation = abs(counts[token] / 2000 - claimed[token])
        assert deviation < 4 * (claimed[token] / 2000) ** 0.5


def generate_and_look_at_rows(model: str, tp: int, recipe: str, **kwargs):
    """`generate`, and the rows that this rank's first matrix gets in each pass: the part that FP8 quantizes."""
    rows = []

    def prepare(chunk):
        linear = chunk.decoder.layers[0].self_attention.linear_qkv
        linear.register_forward_hook(lambda module, inputs, outputs: rows.append(inputs[0].shape[:-1].numel()))

    return generate(model, tp, 1, prepare=prepare, fp8_recipe=recipe, **kwargs), rows


@pytest.mark.parametrize(("recipe", "rows_of_8"), [("tensorwise", 1), ("mxfp8", 4)])
def test_passes_have_rows_that_fp8_takes_and_draw_the_same(gloo, tiny_model, recipe, rows_of_8):
    """12 rows of responses over tp=2: 16 tokens, 8 a rank, or 64 and 32. Rows that pad are stored nowhere."""
    folder = str(tiny_model("llama"))
    (alone,) = gloo.run(1, generate, folder, 1, 1)
    for answer, rows in gloo.run(2, generate_and_look_at_rows, folder, 2, recipe, sequence_parallel=True):
        assert same_tokens(answer, alone)
        assert set(rows) == {8 * rows_of_8}


def generate_with_flags(model: str) -> list[bool]:
    """What a layer of Transformer Engine's would see at each pass of a rollout: is this the first of these weights?"""
    seen = []

    def look(chunk, *_):
        linear = chunk.decoder.layers[0].self_attention.linear_qkv
        seen.append(linear.is_first_microbatch)
        linear.is_first_microbatch = False

    def prepare(chunk):
        chunk.config.fp8 = "hybrid"  # what Megatron asks before it says anything; its layers were built without
        chunk.decoder.layers[0].self_attention.linear_qkv.is_first_microbatch = False

    generate(model, 1, 1, max_tokens=4, at_pass=look, prepare=prepare)
    return seen


def test_a_rollout_begins_with_new_copies_of_the_weights(gloo, tiny_model):
    """FP8 copies are kept until a pass is said to be the first; only Megatron's schedules say so."""
    (seen,) = gloo.run(1, generate_with_flags, str(tiny_model("llama")))
    assert seen[0]
    assert len(seen) > 1
    assert not any(seen[1:])
