"""What may be another one when a run goes on, what may not and why, and what may if it is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_powerflow.checkpoint.first_files import CONFIG_MARK, JOURNALS
from megatron_powerflow.config_file import dump_config, parse_config
from megatron_powerflow.config_help import keys
from megatron_powerflow.errors import UserError
from megatron_powerflow.training.resume import Change, find_resume, may_change, why_not
from tests.unit.test_choice import add_checkpoint


@pytest.fixture
def run(tmp_path) -> Path:
    add_checkpoint(tmp_path / "run", 2)
    add_checkpoint(tmp_path / "run", 4)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_000004\n")
    remember(tmp_path / "run")
    return tmp_path / "run"


def config(run: Path, *overrides: str):
    values = {"model": {"hf_path": "m"}, "prompts": {"path": "p"}, "run": {"output_dir": str(run)}}
    return parse_config(values, overrides)


def remember(run: Path, *overrides: str) -> None:
    """What a start does that has come so far."""
    (run / "config.yaml").write_text(CONFIG_MARK + dump_config(config(run, *overrides)))


def test_every_key_may_change_or_has_a_reason():
    for key in keys():
        if key.name != "run.output_dir" and not may_change(key.name):
            assert len(why_not(key.name)) > 20, key.name


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr"),
        ("optimizer.lr_decay=cosine", "optimizer.lr_decay"),
        ("optimizer.warmup_steps=7", "optimizer.warmup_steps"),
        ("optimizer.clip_grad=0.5", "optimizer.clip_grad"),
        ("evaluation.interval=3", "evaluation.interval"),
        ("metrics.tensorboard=true", "metrics.tensorboard"),
        ("checkpoint.keep=3", "checkpoint.keep"),
        ("parallel.tp=2", "parallel.tp"),
    ],
)
def test_what_may_change_is_noted(run, override, key):
    resume = find_resume(config(run, override))
    assert resume.checkpoint == run / "checkpoints" / "step_000004"
    (change,) = [change for change in resume.changed if change.key == key]
    assert (change.before, change.now) == (getattr_of(config(run), key), getattr_of(config(run, override), key))
    remember(run, override)
    assert find_resume(config(run, override)).changed == ()


PADDED = "parallel.micro_batch_size=2"


def test_a_run_that_began_padded_stays_so_where_the_config_leaves_it_open(run):
    """Its config.yaml has the number even where the user's has not: up to 0.2.0 it was a default."""
    remember(run, PADDED)
    resume = find_resume(config(run))
    assert resume.changed == ()
    assert resume.batched_as_before(config(run)) == config(run, PADDED)
    assert "goes on with parallel.micro_batch_size=2" in resume.notices[-1]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([], []),
        ([], [PADDED]),
        ([PADDED], ["parallel.micro_batch_size=8"]),
        ([PADDED], ["parallel.max_tokens_per_micro_batch=9000"]),
        (["parallel.max_tokens_per_micro_batch=9000"], []),
    ],
)
def test_else_the_config_says_how_rollouts_become_micro_batches(run, before, now):
    remember(run, *before)
    resume = find_resume(config(run, *now))
    assert resume.batched_as_before(config(run, *now)) == config(run, *now)
    assert not any("micro_batch_size" in notice for notice in resume.notices)
    assert bool(resume.changed) == (before != now)


def getattr_of(settings, key: str):
    section, name = key.split(".")
    return getattr(getattr(settings, section), name)


def test_what_may_not_is_refused_with_its_path_and_why_and_goes_if_it_is_named(run):
    other = config(run, "optimizer.eps=1e-6", "run.seed=3")
    with pytest.raises(UserError) as caught:
        find_resume(other)
    first, second, advice = caught.value.violations
    assert "its optimizer.eps is 1e-08, not 1e-06: Adam's moments in the checkpoint were gathered with it" in first
    assert "its run.seed is 0, not 3: prompts and responses of the steps to come are drawn from it" in second
    assert "--override-resume KEY" in advice
    with pytest.raises(UserError) as caught:
        find_resume(other, ["run.seed"])
    assert "run.seed" not in str(caught.value)
    resume = find_resume(other, ["run.seed", "optimizer.eps"])
    assert resume.changed == (Change("optimizer.eps", 1e-8, 1e-6), Change("run.seed", 0, 3))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("optimizer.epss", "did you mean optimizer.eps?"),
        ("optimizer", "no such key"),
        ("optimizer.lr", "may change anyway"),
        ("precision.dtype", "have another width"),
    ],
)
def test_an_option_that_would_say_nothing_is_refused(run, key, words):
    with pytest.raises(UserError, match=f"--override-resume {key}: .*") as caught:
        find_resume(config(run), [key])
    assert words in str(caught.value)


def test_going_back_happens_once(run):
    """The same command, started again by a scheduler, goes on with what it has done since."""
    back = config(run, "checkpoint.resume=step_2")
    resume = find_resume(back)
    assert resume.goes_back
    assert resume.checkpoint == run / "checkpoints" / "step_000002"
    remember(run, "checkpoint.resume=step_2")
    (run / "checkpoints" / "latest").write_text("step_000002\n")  # as a start does that goes back
    add_checkpoint(run, 3)
    (run / "checkpoints" / "latest").write_text("step_000003\n")
    again = find_resume(back)
    assert not again.goes_back
    assert again.checkpoint == run / "checkpoints" / "step_000003"


def test_auto_is_an_old_word_for_latest(run):
    assert find_resume(config(run, "checkpoint.resume=auto")).changed == ()
    with pytest.raises(UserError, match=r"holds step_000004 and checkpoint\.resume=never"):
        find_resume(config(run, "checkpoint.resume=never"))
    with pytest.raises(UserError, match="must be latest, never, or the name of a checkpoint"):
        config(run, "checkpoint.resume=newest")


def test_steps_without_a_checkpoint_are_said_to_begin_anew(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    remember(run)
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    (run / "launches.jsonl").write_text("{}\n")
    resume = find_resume(config(run))
    assert resume.checkpoint is None
    assert "starts anew from step 0" in resume.notices[0]


def test_keep_every_goes_with_keep_and_interval(run):
    with pytest.raises(UserError, match=r"checkpoint\.keep_every.* checkpoint\.keep is not given"):
        config(run, "checkpoint.keep_every=100")
    with pytest.raises(UserError, match=r"checkpoint\.keep_every=75 is no multiple of checkpoint\.interval=50"):
        config(run, "checkpoint.keep=1", "checkpoint.keep_every=75")
    assert config(run, "checkpoint.keep=1", "checkpoint.keep_every=100").checkpoint.keep_every == 100


def test_every_journal_that_leads_elsewhere_is_refused_at_once(run, tmp_path):
    """The run would append to a file of somebody else's; `check` says so as `train` does."""
    for name in JOURNALS[:2]:
        (run / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError) as caught:
        find_resume(config(run))
    assert [str(run / name) in line for name, line in zip(JOURNALS[:2], caught.value.violations, strict=True)] == [
        True
    ] * 2
    assert "a link to a file of another name" in caught.value.violations[0]
    assert not (tmp_path / "theirs").exists()
