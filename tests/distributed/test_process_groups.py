"""Process groups: few are made, and each has spoken before a model is there, whoever speaks over it later."""

from __future__ import annotations

import inspect

import pytest

from tests.distributed.megatron_sessions import config_for, opened_session
from tests.distributed.test_training_step import write_prompts

SP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]
# all that talks over a group, but for isend and irecv: Megatron's are batched, ours go over groups.pp
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_to_all_single", "all_gather_object", "gather_object", "broadcast_object_list", "barrier", "send", "recv"),
    *("_all_gather_base", "_reduce_scatter_base", "batch_isend_irecv"),
)
# name: family, processes, settings
LAYOUTS = {
    "tp2_pp2": ("llama", 4, [*SP2, "parallel.pp=2"]),
    "dp4_distributed": ("llama", 4, ["optimizer.distributed=true"]),
    "cp2_dp2": ("llama", 4, ["parallel.cp=2"]),
    "tp2_ep2_distributed": ("mixtral", 4, [*SP2, "parallel.ep=2", "optimizer.distributed=true"]),
    "pp2_vpp2_tied": ("qwen2", 4, ["parallel.pp=2", "parallel.vpp=2"]),
}


def groups_that_speak(config):
    """(groups of more than one rank that spoke in a step or for a save and had not before; number that spoke;
    groups over host memory that this rank made; ranks of its control groups)."""
    import torch.distributed as dist

    from megatron_powerflow.checkpoint import storage
    from megatron_powerflow.parallel.device_memory import used_groups
    from megatron_powerflow.training.step import run_step

    made, spoken = [], {}
    originals = {name: getattr(dist, name) for name in (*COLLECTIVES, "new_group")}

    def watched(name):
        original, signature = originals[name], inspect.signature(originals[name])

        def call(*arguments, **named):
            if name == "batch_isend_irecv":
                spoken.update({id(message.group): message.group for message in arguments[0]})
            else:
                group = signature.bind(*arguments, **named).arguments.get("group") or dist.group.WORLD
                spoken[id(group)] = group
            return original(*arguments, **named)

        return call

    def new_group(*arguments, **named):
        made.append(named.get("backend"))
        return originals["new_group"](*arguments, **named)

    dist.new_group = new_group
    try:
        with opened_session(config) as (plan, session):
            groups = session.groups
            for name in COLLECTIVES:
                setattr(dist, name, watched(name))
            run_step(plan, session, plan.prompts[: config.rollout.prompts_per_step], 0)
            storage.sharded_state(session.trainable, is_loading=False)
            known = {
                id(group) for group in [*used_groups(groups), groups.control, groups.pp_control, groups.ep_control]
            }
            silent = [
                dist.get_process_group_ranks(group)
                for key, group in spoken.items()
                if key not in known and dist.get_world_size(group) > 1
            ]
            controls = [dist.get_process_group_ranks(group) for group in (groups.pp_control, groups.ep_control)]
            return silent, len(spoken), made.count("gloo"), controls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_group_speaks_first_when_a_model_is_there(gloo, tiny_model, tmp_path, layout):
    family, ranks, overrides = LAYOUTS[layout]
    config = config_for(tiny_model(family), write_prompts(tmp_path), tmp_path / "run", *overrides)
    for silent, number, made, (pipeline, experts) in gloo.run(ranks, groups_that_speak, config):
        assert silent == []
        assert number >= 3
        assert made == (3 if len(pipeline) > 1 or len(experts) > 1 else 2)  # one for all ranks of one
        assert len(pipeline) == config.parallel.pp
        assert len(experts) == config.parallel.ep
