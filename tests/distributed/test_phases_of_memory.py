"""Behind each phase of a step memory that lies idle is given back, before the next one asks for other sizes."""

from __future__ import annotations

import contextlib

from tests.distributed.megatron_sessions import config_for, opened_session
from tests.distributed.test_training_step import write_prompts


def phases_and_gifts(config):
    """What a step did, in order: phases as they begin, and "given back"."""
    from megatron_powerflow.training import step

    found = []

    @contextlib.contextmanager
    def phase(name):
        found.append(name)
        yield
        found.append("")

    give_back = step.give_back
    step.give_back = lambda device: found.append("given back")
    try:
        with opened_session(config) as (plan, session):
            step.run_step(plan, session, plan.prompts[: config.rollout.prompts_per_step], 1, phase=phase)
    finally:
        step.give_back = give_back
    return found


def test_memory_is_given_back_behind_each_phase(gloo, tiny_model, tmp_path):
    config = config_for(tiny_model("llama"), write_prompts(tmp_path), tmp_path / "run")
    (found,) = gloo.run(1, phases_and_gifts, config)
    assert found == [
        *("rollout", "given back", ""),
        *("reference", "given back", ""),
        *("update", "given back", ""),
    ]
