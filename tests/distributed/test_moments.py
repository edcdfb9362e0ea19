"""The moments of a distributed optimizer, written by each rank alone: Megatron's own format reads them, and the other
way round, whatever the layout. Both are compared element by element with what Megatron gathers from all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_powerflow.config_file import load_config
from tests.distributed.megatron_sessions import config_for, opened_session, run_training
from tests.distributed.test_resume import comparable
from tests.distributed.test_training_step import write_prompts

SP2 = ("parallel.tp=2", "parallel.sequence_parallel=true")
# name: family, processes, settings
LAYOUTS = {
    "dp2": ("llama", 2, ()),
    "bf16_dp2": ("qwen3", 2, ("precision.dtype=bf16",)),
    "tp2_dp2": ("qwen2", 4, SP2),
    "pp2_dp2_tied": ("qwen2", 4, ("parallel.pp=2",)),
    "tp2_ep2": ("mixtral", 4, (*SP2, "parallel.ep=2")),
}


def exchanged(config, folder: Path):
    """What this rank saw: elements that it wrote; sizes of the tensors that it knows, by name; number of tensors
    compared, and the names of those that differ, of Megatron's reading of ours and of our reading of Megatron's.
    Collective."""
    import math

    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_powerflow.checkpoint import storage
    from megatron_powerflow.checkpoint.moments import load_moments
    from megatron_powerflow.checkpoint.pickle_audit import audit_checkpoint
    from megatron_powerflow.checkpoint.shards import ShardWriter, finalize
    from megatron_powerflow.training.step import run_step

    with opened_session(config) as (plan, session):
        trainable, groups = session.trainable, session.groups
        run_step(plan, session, plan.prompts[: config.rollout.prompts_per_step], 0)
        metadata = storage.METADATA | {
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)
        }

        def by_megatron(*, is_loading: bool):
            models = storage._models(trainable)
            return models, trainable.optimizer.sharded_state_dict(
                dict(models), is_loading=is_loading, metadata=metadata
            )

        def save(state, moments, name: str) -> Path:
            if groups.is_main:
                (folder / name).mkdir()
            torch.distributed.barrier(group=groups.control)
            writer, request = ShardWriter(asynchronous=False).begin(state, moments, folder / name, storage.METADATA)
            writer.write()
            torch.distributed.barrier(group=groups.control)
            finalize(writer, request)
            torch.distributed.barrier(group=groups.control)
            return folder / name

        moments = storage.moments_of(trainable, to_save=True)
        ours = save(storage.sharded_state(trainable, is_loading=False), moments, "ours")

        models, gathered = by_megatron(is_loading=False)
        wanted = {key: value.data.clone() for part in states(gathered) for key, value in moments_by_key(part).items()}
        _, to_load = by_megatron(is_loading=True)
        loaded = dist_checkpointing.load({"optimizer": to_load}, str(ours))["optimizer"]
        read = {
            key: value
            for part, template in zip(states(loaded), states(by_megatron(is_loading=False)[1]), strict=True)
            for key, value in tensors_by_key(part, template).items()
        }
        wrong = [key for key, value in wanted.items() if not torch.equal(read[key].view(value.shape), value)]

        theirs = save({**models, "optimizer": gathered}, {}, "theirs")
        held = storage.moments_of(trainable, to_save=False)
        before = {name: {at: part.clone() for at, part in each.parts.items()} for name, each in held.items()}
        with_main = config.precision.dtype != "fp32"
        for name, each in held.items():
            for part in each.parts.values() if with_main or ".param." not in name else ():
                part.fill_(-7.0)
        load_moments(theirs, audit_checkpoint(theirs), held, with_main=with_main)
        other = [
            name
            for name, each in held.items()
            for at, part in each.parts.items()
            if not torch.equal(part, before[name][at])
        ]
        written = sum(part.numel() for each in moments.values() for part in each.parts.values())
        sizes = {name: math.prod(each.shape) for name, each in held.items()}
        return written, sizes, len(wanted), wrong, other


def states(optimizer) -> list[dict]:
    """The states of Megatron's one or two optimizers."""
    return [optimizer] if "param_state" in optimizer else [optimizer[number] for number in sorted(optimizer)]


def moments_by_key(state) -> dict:
    return {
        (number, name, sharded.key): sharded
        for number, parts in state["param_state"].items()
        for name, sharded in parts.items()
    }


def tensors_by_key(state, template) -> dict:
    return {
        (number, name, sharded.key): state["param_state"][number][name]
        for number, parts in template["param_state"].items()
        for name, sharded in parts.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_reads_what_each_rank_wrote_alone_and_the_other_way_round(gloo, tiny_model, tmp_path, layout):
    family, ranks, overrides = LAYOUTS[layout]
    settings = ("optimizer.distributed=true", *overrides)
    config = config_for(tiny_model(family), write_prompts(tmp_path), tmp_path / "run", *settings)
    seen = gloo.run(ranks, exchanged, config, tmp_path)
    sizes = {}
    for _, known, compared, wrong, other in seen:
        assert compared > 10
        assert (wrong, other) == ([], [])
        sizes |= known
    assert len(sizes) > 10
    assert sum(written for written, *_ in seen) == sum(sizes.values()), "each element is written once"


def config_file(model: Path, folder: Path, dtype: str = "fp32") -> Path:
    write_prompts(folder)
    config = folder / "config.yaml"
    config.write_text(
        f"""
model: {{hf_path: {model}}}
precision: {{dtype: {dtype}}}
prompts: {{path: {folder / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 16, max_response_tokens: 8}}
objective: {{alpha: 2, log_z: mlp}}
optimizer: {{lr: 1e-3, lr_decay: constant}}
checkpoint: {{interval: 1}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 4, export: false}}
"""
    )
    return config


def rates_of(config: Path, *overrides: str) -> set[tuple[float, float]]:
    """(greatest, least) of a session that goes on."""
    with opened_session(load_config(config, overrides)) as (plan, session):
        assert plan.resume_from is not None
        return {(group["max_lr"], group["min_lr"]) for group in session.trainable.optimizer.param_groups}


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_a_run_goes_on_at_other_rates(gloo, tiny_model, tmp_path, distributed):
    """Megatron-Core 0.19 tells by the rates which group of parameters is which, and found none."""
    config = config_file(tiny_model("llama"), tmp_path)
    same = (f"run.output_dir={tmp_path / 'run'}", f"optimizer.distributed={distributed}")
    gloo.run(2, run_training, config, *same, "run.num_steps=1")
    other = ("optimizer.lr=5e-4", "optimizer.lr_decay=cosine", "optimizer.min_lr=1e-5")
    assert gloo.run(2, rates_of, config, *same, *other) == [{(5e-4, 1e-5)}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("switched", ["off", "on"])
def test_a_run_goes_on_with_or_without_a_distributed_optimizer(gloo, tiny_model, tmp_path, switched, dtype):
    """`optimizer.distributed` may change when a run is continued: what is on the disk has other names then."""
    config = config_file(tiny_model("llama"), tmp_path, dtype)
    before, after = ("true", "false") if switched == "off" else ("false", "true")
    unbroken, moved = (f"run.output_dir={tmp_path / name}" for name in ("unbroken", "moved"))
    gloo.run(2, run_training, config, unbroken, f"optimizer.distributed={before}")
    gloo.run(2, run_training, config, moved, f"optimizer.distributed={before}", "run.num_steps=2")
    gloo.run(2, run_training, config, moved, f"optimizer.distributed={after}")
    ours, theirs = (comparable(tmp_path / name) for name in ("moved", "unbroken"))
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4 if dtype == "fp32" else 1e-2)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3 if dtype == "fp32" else 5e-2)
