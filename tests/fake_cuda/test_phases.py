"""A step of the product, from its prompts to the moved weights, on each layout and precision: sampling (prefill and
decode), reference scores, update, optimizer. Prompts of 93 and 49 tokens, responses of 7: 100 and 56 tokens fit none
of the multiples that FP8 and sequence parallelism want."""

from __future__ import annotations

import pytest

from tests.fake_cuda.conftest import GPU
from tests.fake_cuda.runs import RECIPES, Case

QUANTIZED_ROWS = {"tensorwise": 8, "blockwise": 8, "mxfp8": 32}  # of what a rank quantizes


def shapes(run, phase: str, kind: str) -> set[tuple[int, ...]]:
    """Return the shapes of the first operand with which a phase called a kind of kernel."""
    return {call[1] for call in run.calls[phase] if call[0] == kind}


def went_through(run, result) -> None:
    """Every response was written to its end, every phase called kernels, and the optimizer moved the weights."""
    case_rollouts = run.plan.config.rollout
    assert [len(rollout.response_token_ids) for rollout in result.rollouts] == [case_rollouts.max_response_tokens] * (
        case_rollouts.prompts_per_step // run.plan.layout.dp * case_rollouts.responses_per_prompt
    )
    assert [taken.applied for taken in result.optimizer_steps] == [True]
    assert not shapes(run, "rollout", "attention"), "sampling has the cache's attention"
    for phase in ("rollout", "reference", "update"):
        assert shapes(run, phase, "gemm"), phase
    for phase in ("reference", "update"):
        assert shapes(run, phase, "attention"), phase


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("recipe", RECIPES[GPU])
def test_a_step(run_of, recipe, tp, packed):
    with run_of(Case(recipe, tp=tp, packed=packed)) as run:
        went_through(run, run.step())
        heads = 8 // tp
        (attended,) = shapes(run, "update", "attention")
        assert attended[-2:] == (heads, 32)
        assert len(attended) == (3 if packed else 4)  # thd, or sbhd
        rows = [shape[0] for phase in run.calls for shape in shapes(run, phase, "quantize") if len(shape) == 2]
        assert bool(rows) == (recipe != "bf16")
        assert all(count % QUANTIZED_ROWS[recipe] == 0 for count in rows)


@pytest.mark.parametrize("recipe", RECIPES[GPU][1:])
def test_whole_sequences_on_every_rank(run_of, recipe):
    with run_of(Case(recipe, tp=4, sequence_parallel=False)) as run:
        went_through(run, run.step())


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("recipe", RECIPES[GPU][:2])
def test_recomputed_activations(run_of, recipe, recompute):
    with run_of(Case(recipe, tp=2, packed=True, changes=(("model.recompute", recompute),))) as run:
        went_through(run, run.step())


def test_a_reference_that_is_swapped_in(run_of):
    with run_of(Case("tensorwise", tp=2, changes=(("model.reference", "swap"),))) as run:
        went_through(run, run.step())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("stage", [0, 1])
def test_pipeline_stages(run_of, stage, packed):
    with run_of(Case("tensorwise", tp=2, pp=2, rank=2 * stage, packed=packed), num_hidden_layers=2) as run:
        went_through(run, run.step())
        assert run.world.traffic["send", 2]
        assert run.world.traffic["recv", 2]


@pytest.mark.parametrize("stage", [0, 1])
def test_interleaved_stages(run_of, stage):
    with run_of(Case("tensorwise", pp=2, rank=stage, changes=(("parallel.vpp", 2),)), num_hidden_layers=4) as run:
        assert len(run.chunks) == 2
        went_through(run, run.step())


@pytest.mark.parametrize("rank", [0, 3])
def test_moments_spread_over_replicas(run_of, rank):
    with run_of(Case("tensorwise", tp=2, dp=2, rank=rank, changes=(("optimizer.distributed", "true"),))) as run:
        went_through(run, run.step())
        assert run.world.traffic["reduce_scatter_tensor_coalesced", 2]
        assert run.world.traffic["allgather_into_tensor_coalesced", 2]


@pytest.mark.parametrize("recipe", RECIPES[GPU][:2])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families(run_of, family, recipe):
    with run_of(Case(recipe, tp=2, packed=True), family) as run:
        went_through(run, run.step())


@pytest.mark.parametrize("tp", [1, 2])
def test_experts(run_of, tp):
    with run_of(Case("bf16", tp=tp), "qwen3_moe", num_experts=8, moe_intermediate_size=256) as run:
        went_through(run, run.step())


def test_experts_of_other_replicas(run_of):
    case = Case("bf16", dp=2, changes=(("parallel.ep", 2),))
    with run_of(case, "qwen3_moe", num_experts=8, moe_intermediate_size=256) as run:
        went_through(run, run.step())
        assert run.world.traffic["alltoall_base", 2]
