"""On a CUDA GPU, every family in both of its shapes: fp32 log-probs are transformers', bf16 ones lie near them, what
the sampler says is what the scorer says, and an update has the same gradient padded and packed.

Run on an H100 with torch 2.11, Transformer Engine 2.20.2 and Megatron-Core 0.19.2; the limits are a few times what was
seen there, but for mixtures: in bf16 a token may take other experts.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from tests.tiny_models import FAMILIES, MIXTURES, OTHER_SHAPES, make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
MICRO_BATCHES = {"padded": {"micro_batch_size": 4}, "packed": {"max_tokens_per_micro_batch": 64}}


@pytest.fixture
def folder(tmp_path, family, shape):
    changes = {"scale": 0.15} | (OTHER_SHAPES[family] if shape == "other" else {})
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9, 10, 11]}\n')
    return make_tiny_model(tmp_path / "model", family, **changes)


@contextlib.contextmanager
def session_of(folder, dtype: str, micro_batches: dict):
    from megatron_powerflow.config_file import parse_config
    from megatron_powerflow.parallel.initialize import initialized, prepare_imports
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.session import build_session

    prepare_imports()
    lengths = {"max_prompt_tokens": 8, "max_response_tokens": 24, "stop_token_ids": [299]}
    values = {
        "model": {"hf_path": str(folder)},
        "precision": {"dtype": dtype},
        "prompts": {"path": str(folder.parent / "prompts.jsonl")},
        "rollout": {"prompts_per_step": 2, "responses_per_prompt": 4, **lengths},
        "objective": {"alpha": 2.0, "log_z": "group"},
        "optimizer": {"lr": 1e-6},
        "parallel": micro_batches,
        "metrics": {"wandb": "off"},
        "run": {"output_dir": str(folder.parent / "run"), "num_steps": 1},
    }
    plan = make_plan(parse_config(values), world_size=1)
    with initialized(plan.layout, read_launch(), seed=0) as groups:
        yield plan, build_session(plan, groups)


def sample(plan, session):
    from megatron_powerflow.training.step import sampling_of_step

    return session.engine.generate(list(enumerate(plan.prompts)), sampling_of_step(plan, 0))


def scores(rollouts, plan, session) -> torch.Tensor:
    """[tokens] log-probs of all responses by the run's own scorer."""
    from megatron_powerflow.data.packing import AnnotatedRollout, pack
    from megatron_powerflow.training.score import score

    alone = [AnnotatedRollout(replace(rollout, slot=place)) for place, rollout in enumerate(rollouts)]
    packing = {"responses_per_prompt": 1, "drop_truncated": False, "multiple": 1, "uniform": False}
    batches = pack(alone, micro_batch_size=4, device=session.groups.device, **packing)
    found = {}
    for batch, scored in zip(batches, score(session.trainable.chunks, batches, session.scorer), strict=True):
        for row, place in enumerate(batch.group.tolist()):
            found[place] = scored[row][batch.loss_mask[row]].cpu()
    return torch.cat([found[place] for place in sorted(found)])


def sampler_scores(rollouts) -> torch.Tensor:
    return torch.tensor([value for rollout in rollouts for value in rollout.rollout_log_probs])


def transformers_scores(rollouts, folder) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    network = network.to("cuda").eval()
    found = []
    with torch.no_grad():
        for rollout in rollouts:
            response = torch.tensor(rollout.response_token_ids, device="cuda")
            prompt = torch.tensor(rollout.prompt.token_ids, device="cuda")
            logits = network(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, response[:, None]).squeeze(1).cpu())
    return torch.cat(found)


def grad_norm(rollouts, plan, session) -> float:
    from megatron_powerflow.training.micro_batches import pack_updates
    from megatron_powerflow.training.step import learn

    return learn(plan, session, pack_updates(rollouts, plan, session, 0), 0).optimizer_steps[0].grad_norm


@pytest.mark.parametrize("shape", ["usual", "other"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_is_fp32_and_bf16_is_near_it(folder, family):
    norms, scored, gaps, rollouts = {}, {}, {}, None
    for dtype in ("fp32", "bf16"):
        for name, micro_batches in MICRO_BATCHES.items():
            with session_of(folder, dtype, micro_batches) as (plan, session):
                sampled = sample(plan, session)
                rollouts = rollouts or sampled
                scored[dtype] = scores(rollouts, plan, session)
                gaps[dtype] = (scores(sampled, plan, session) - sampler_scores(sampled)).abs()
                norms[dtype, name] = grad_norm(rollouts, plan, session)
    assert (scored["fp32"] - transformers_scores(rollouts, folder)).abs().max() < 5e-5
    assert gaps["fp32"].max() < 5e-5
    mean_limit = 0.2 if family in MIXTURES else 0.1
    assert (scored["bf16"] - scored["fp32"]).abs().mean() < mean_limit
    assert gaps["bf16"].mean() < mean_limit
    for dtype, relative in (("fp32", 1e-3), ("bf16", 0.02)):
        assert norms[dtype, "packed"] == pytest.approx(norms[dtype, "padded"], rel=relative)
    assert norms["bf16", "padded"] == pytest.approx(norms["fp32", "padded"], rel=0.1)
