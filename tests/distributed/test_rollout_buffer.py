"""A step that trains on the rollouts of earlier steps: which ones, with whose scores, and again after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.megatron_sessions import config_for, opened_session, run_training
from tests.distributed.test_reference_store import (
    PACKED,
    counted_training,
    lines_of,
    numbers_of,
    proof_of,
    write_config,
)

BUFFER = ["rollout.save=true", "rollout.buffer_steps=2", "evaluation.samples=0"]


def trained_in_one_go(model: Path, prompts: Path, out: Path, num_steps: int) -> tuple[list[float], list[float]]:
    """The loss of each rollout of the last of `num_steps` steps that train with a buffer of one; and those of a step
    that is given the rollouts of two steps together, and has them all scored anew."""
    from megatron_powerflow.data.prompts import PromptStream
    from megatron_powerflow.records import ROLLOUT_COLUMNS
    from megatron_powerflow.training.micro_batches import pack_updates
    from megatron_powerflow.training.step import learn, run_step

    settings = ["rollout.save=true", "rollout.buffer_steps=1", "objective.log_z=group", f"run.num_steps={num_steps}"]
    settings += ["optimizer.updates_per_rollout=2", "rollout.responses_per_prompt=4"]
    losses = []
    for way in ("buffer", "together"):
        with opened_session(config_for(model, prompts, out / way, *settings)) as (plan, session):
            stream, before = PromptStream(plan.prompts, seed=0, shuffle=True, position=0), []
            for step in range(num_steps):
                taken = stream.take(plan.config.rollout.prompts_per_step)
                if way == "together" and step == num_steps - 1:
                    break
                result = run_step(plan, session, taken, step)
                before = list(result.rollouts)
            if way == "together":
                from megatron_powerflow.training.step import sampling_of_step
                from megatron_powerflow.training.step_rollouts import step_rollouts

                own = step_rollouts(plan, session, taken, sampling_of_step(plan, num_steps - 1))
                both = [replace(r, slot=2 * r.slot + age) for age, part in enumerate((own, before)) for r in part]
                both.sort(key=lambda rollout: (rollout.slot, rollout.response_index))
                rows = learn(plan, session, pack_updates(both, plan, session, num_steps - 1), num_steps - 1).rows
            else:
                rows = result.trained_rows
            losses.append(rows[:, ROLLOUT_COLUMNS.index("loss_term")].tolist())
    return losses[0], losses[1]


@pytest.mark.slow
def test_the_buffer_trains_on_both_steps_rollouts_with_each_ones_own_scores(gloo, tiny_model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [5 + i, 6, 7]}) + "\n" for i in range(8)))
    ((buffer, together),) = gloo.run(1, trained_in_one_go, tiny_model("llama"), prompts, tmp_path, 2)
    assert len(buffer) == 2 * 4 * 4
    assert buffer == pytest.approx(together, rel=1e-3, abs=1e-5)
    assert sum(loss > 0.01 for loss in buffer) > 20, "losses that tell one response's scores from another's"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, PACKED),
        pytest.param(2, ["parallel.pp=2", "optimizer.updates_per_rollout=2"], marks=pytest.mark.long),
    ],
    ids=["dp2", "pp2"],
)
def test_a_run_with_a_buffer_that_was_stopped_ends_as_if_it_was_not(gloo, tiny_model, tmp_path, ranks, settings):
    config, arguments = write_config(tmp_path, tiny_model("llama")), [*BUFFER, *settings]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    gloo.run(ranks, run_training, config, *arguments, f"run.output_dir={whole}", "run.num_steps=4")
    gloo.run(ranks, run_training, config, *arguments, f"run.output_dir={stopped}", "run.num_steps=2")
    counts = gloo.run(ranks, counted_training, config, *arguments, f"run.output_dir={stopped}", "run.num_steps=4")
    assert proof_of(stopped) == proof_of(whole)
    assert numbers_of(stopped) == numbers_of(whole)
    assert [line["num_rollouts_trained"] for line in lines_of(whole)] == [16, 32, 48, 48]
    assert [line["num_rollouts"] for line in lines_of(whole)] == [16] * 4
    passes = [line["reference_passes"] for line in lines_of(whole)]
    assert sum(counts) / (1 if settings == PACKED else ranks) == sum(passes), "of steps 0 and 1 once more, 2 and 3"
    assert lines_of(stopped)[2]["reference_passes"] == sum(passes[:3])

    alone = tmp_path / "alone"
    gloo.run(
        1,
        run_training,
        config,
        *BUFFER,
        *(each for each in settings if each != "parallel.pp=2"),
        f"run.output_dir={alone}",
        "run.num_steps=4",
    )
    for name in ("loss", "residual_std", "response_length_mean"):
        ours, theirs = ([line[name] for line in lines_of(run)] for run in (whole, alone))
        assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.slow
def test_a_buffer_that_has_lost_its_rollouts_is_refused_before_a_start(gloo, tiny_model, tmp_path):
    from megatron_powerflow.config_file import load_config
    from megatron_powerflow.errors import UserError
    from megatron_powerflow.training.plan import make_plan

    config = write_config(tmp_path, tiny_model("llama"))
    gloo.run(1, run_training, config, *BUFFER)
    (tmp_path / "saved" / "rollouts" / "step_000001.jsonl").unlink()
    with pytest.raises(UserError, match=r"step_000001\.jsonl: not there, and step 2 trains on those rollouts"):
        make_plan(load_config(config, [*BUFFER, "run.num_steps=3"]), 1)
