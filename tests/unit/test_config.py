"""Configs: unknown keys, wrong types and keys without effect are errors that name key, value and choices."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow.config import Config
from megatron_powerflow.config_file import config_keys, dump_config, load_config, parse_config
from megatron_powerflow.config_rules import CONDITIONAL
from megatron_powerflow.errors import UserError
from megatron_powerflow.objective.presets import PRESETS, PresetName

MINIMAL = {"model": {"hf_path": "m"}, "prompts": {"path": "p"}, "run": {"output_dir": "o"}}


def violations(*overrides: str, values: dict = MINIMAL) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        parse_config(values, overrides)
    return caught.value.violations


def test_the_names_that_users_rely_on_exist():
    promised = {
        "model": ["hf_path", "reference"],
        "parallel": ["tp", "pp", "vpp", "cp", "ep", "sequence_parallel"],
        "precision": ["dtype"],
        "prompts": ["path"],
        "rollout": [
            "engine",
            "prompts_per_step",
            "responses_per_prompt",
            "max_prompt_tokens",
            "max_response_tokens",
            "temperature",
        ],
        "objective": ["preset", "alpha", "psi", "log_z", "ratio", "clip_epsilon", "truncated"],
        "optimizer": ["lr", "log_z_lr", "clip_grad", "weight_decay", "updates_per_rollout"],
        "checkpoint": ["interval", "resume"],
        "evaluation": [],
        "metrics": [],
        "alarm": [],
        "run": ["num_steps", "seed", "output_dir"],
    }
    assert list(Config.model_fields) == list(promised)
    assert {f"{section}.{key}" for section, keys in promised.items() for key in keys} <= set(config_keys())


def test_the_type_of_a_presets_name_has_the_names_of_the_presets():
    assert get_args(PresetName) == tuple(PRESETS)
    (said,) = violations("objective.preset=la")
    *others, last = map(repr, PRESETS)
    assert said == f"objective.preset='la': must be one of {', '.join(others)} or {last}"


def test_every_violation_is_reported_at_once():
    found = violations("objective.alpha=-1", "optimizer.lr=abc", "rollout.top_p=0.9", "parallel.tp=0")
    assert len(found) == 4
    assert any("objective.alpha=-1" in line for line in found)


def test_an_unknown_key_names_the_likely_one_and_all_choices():
    (line,) = violations("objective.alhpa=2")
    assert "objective.alhpa=2" in line
    assert "did you mean alpha" in line
    assert "psi" in line


def test_an_unknown_section_is_an_error():
    (line,) = violations("objectives.alpha=2")
    assert "did you mean objective" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("precision.dtype=fp16", ["precision.dtype='fp16'", "fp32", "bf16", "fp8"]),
        ("parallel.tp=1.5", ["parallel.tp=1.5", "integer"]),
        ("parallel.tp=two", ["parallel.tp='two'"]),
        ("rollout.temperature=0", ["rollout.temperature=0", "greater than 0"]),
        ("rollout.top_k=50", ["rollout.top_k=50", "truncated sampling"]),
        ("objective.alpha=0", ["objective.alpha=0", "greater than 0"]),
        ("objective.alpha=.inf", ["objective.alpha=inf"]),
        ("objective.psi=0.5", ["objective.psi=0.5"]),
        ("run.num_steps=0", ["run.num_steps=0"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("optimizer.betas=[0.9,1.0]", ["optimizer.betas"]),
        ("rollout.prompts_per_step=yes", ["rollout.prompts_per_step=True"]),
    ],
)
def test_wrong_values_say_what_was_got_and_what_holds(override, words):
    (line,) = violations(override)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["objective.clip_epsilon=0.1"], "objective.ratio=none"),
        (["optimizer.log_z_lr=0.1"], "objective.log_z is not learned"),
        (["objective.log_z_detach=false", "objective.log_z=scalar"], "objective.log_z is not mlp"),
        (["precision.fp8_recipe=blockwise"], "precision.dtype is not fp8"),
        (["parallel.vpp=2"], "parallel.pp=1"),
        (["parallel.sequence_parallel=true"], "parallel.tp=1"),
        (["optimizer.min_lr=1e-7"], "optimizer.lr_decay=constant"),
        (["objective.psi_exempt_tasks=[creative]"], "objective.psi=0"),
    ],
)
def test_a_key_without_effect_is_an_error(overrides, reason):
    (line,) = violations(*overrides)
    assert "has no effect" in line
    assert reason in line


SERVED = ["rollout.engine=vllm", "rollout.vllm.urls=[http://a:1]"]
STARTED = ["rollout.engine=vllm", "rollout.vllm.start=1"]
# Where one of the two is given the other is not: the case begins with the other one alone.
EITHER = {"rollout.vllm.urls": STARTED[:1], "rollout.vllm.start": SERVED[:1]}
# key: (settings where it applies, its default there, a value that is welcome there, settings where it does not apply,
# the reason). No settings in the fourth place: it applies everywhere.
CASES = {
    "objective.alpha": ([], 4.0, 2.0, ["objective.preset=grpo"], "knows no alpha"),
    "objective.alpha_warmup_steps": ([], 0, 3, ["objective.preset=one_shot_em"], "knows no alpha"),
    "objective.psi": ([], 0.0, -0.5, ["objective.preset=grpo"], "knows no energy"),
    "objective.psi_exempt_tasks": (["objective.psi=-0.5"], ["creative"], ["poem"], ["objective.psi=0"], "psi=0"),
    "objective.log_z": ([], "group", "loo", ["objective.preset=rl_token"], "has no log Z'"),
    "objective.log_z_detach": (["objective.log_z=mlp"], True, False, ["objective.log_z=scalar"], "is not mlp"),
    "objective.tilt_cap": ([], None, 9, ["objective.preset=tb_token_step"], "no tilt on length"),
    "objective.task_reward": ([], "none", "gold", ["objective.preset=grpo"], "no energy to add to"),
    "objective.reward_scale": (["objective.task_reward=gold"], 1.0, 2.0, [], "objective.task_reward=none"),
    "objective.reward_advantage": (["objective.task_reward=gold"], False, True, [], "objective.task_reward=none"),
    "objective.kl_coefficient": (["objective.preset=grpo"], 0.0, 0.1, [], "p_base in its target"),
    "objective.ratio": ([], "none", "seq", None, ""),
    "objective.clip": (["objective.ratio=seq"], "two_sided", "upper", [], "objective.ratio=none"),
    "objective.clip_epsilon": (["objective.ratio=seq"], 0.2, 0.3, [], "objective.ratio=none"),
    "objective.sampler_ratio_cap": (["objective.sampler_ratio=seq"], 2.0, 1.0, [], "objective.sampler_ratio=none"),
    "optimizer.log_z_lr": (["objective.log_z=scalar"], 0.5, 0.1, ["objective.log_z=loo"], "log_z is not learned"),
    "optimizer.min_lr": (["optimizer.lr_decay=linear"], 0.0, 1e-7, [], "optimizer.lr_decay=constant"),
    "model.recompute_modules": (["model.recompute=selective"], None, ["mlp"], [], "model.recompute is not selective"),
    "precision.fp8_recipe": (["precision.dtype=fp8"], "tensorwise", "mxfp8", [], "precision.dtype is not fp8"),
    "precision.fp8_format": (["precision.dtype=fp8"], "hybrid", "e4m3", [], "precision.dtype is not fp8"),
    "parallel.micro_batch_size": ([], None, 2, ["parallel.max_tokens_per_micro_batch=9999"], "packs instead"),
    "parallel.vpp": (["parallel.pp=2"], None, 2, [], "parallel.pp=1"),
    "checkpoint.keep_every": (["checkpoint.keep=2"], None, 100, [], "checkpoint.keep is not given"),
    "evaluation.samples": ([], 3, 0, ["rollout.replay=x"], "trains without an engine"),
    "evaluation.sample_tokens": ([], 512, 9, ["rollout.replay=x"], "trains without an engine"),
    "evaluation.prompts": ([], None, "p", ["rollout.replay=x"], "trains without an engine"),
    "evaluation.num_prompts": (["evaluation.prompts=p"], None, 5, [], "evaluation.prompts is not given"),
    "evaluation.num_responses": (["evaluation.prompts=p"], 4, 1, [], "evaluation.prompts is not given"),
    "rollout.vllm.urls": (STARTED, None, ["http://a:1"], [], "rollout.engine is not vllm"),
    "rollout.vllm.start": (SERVED, None, 2, [], "rollout.engine is not vllm"),
    "rollout.vllm.transport": (SERVED, "folder", "changes", [], "rollout.engine is not vllm"),
    "rollout.vllm.weights": (SERVED, None, "w", [], "rollout.engine is not vllm"),
    "rollout.vllm.max_requests": (SERVED, 16, 3, [], "rollout.engine is not vllm"),
    "rollout.vllm.answer_seconds": (SERVED, 1800.0, 5.0, [], "rollout.engine is not vllm"),
    "rollout.vllm.wait_seconds": (SERVED, 900.0, 5.0, [], "rollout.engine is not vllm"),
    "rollout.vllm.sleeps": (STARTED, False, True, SERVED, "no server is started"),
    "rollout.vllm.tp": (STARTED, 1, 2, SERVED, "no server is started"),
    "rollout.vllm.dtype": (STARTED, "bfloat16", "float32", SERVED, "no server is started"),
    "rollout.vllm.memory": (STARTED, 0.9, 0.5, SERVED, "no server is started"),
    "rollout.vllm.port": (STARTED, 8200, 9000, SERVED, "no server is started"),
    "rollout.vllm.python": (STARTED, None, "p", SERVED, "no server is started"),
    "rollout.vllm.arguments": (STARTED, None, ["--x"], SERVED, "no server is started"),
    "run.stop_at_alpha": ([], None, 2.0, ["objective.preset=tb_token_target"], "is no power of the base model"),
    "metrics.wandb_project": ([], "megatron_powerflow", "x", ["metrics.wandb=off"], "metrics.wandb=off"),
}


def value_of(config: Config, key: str):
    value = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.engine=vllm"], "neither is given"),
        ([*SERVED, "rollout.vllm.start=2"], "both are given"),
        (["rollout.steps_ahead=1"], "rollout.steps_ahead has no effect because rollout.engine is not vllm"),
        (["rollout.engine=vllm", "rollout.replay=x"], "rollout.engine=vllm has no effect because rollout.replay"),
        ([*SERVED, "rollout.in_flight_updates=true"], "because rollout.steps_ahead=0"),
        ([*STARTED, "rollout.vllm.sleeps=true", "rollout.steps_ahead=1"], "answers nothing"),
        ([*STARTED, "rollout.vllm.sleeps=true", "rollout.vllm.transport=stream"], "takes each GPU once"),
        ([*SERVED, "rollout.vllm.dtpye=x"], "unknown key; did you mean dtype? known: urls, start"),
        ([*SERVED, "rollout.vllm.max_requests=0"], "rollout.vllm.max_requests=0: must be greater than or equal to 1"),
        (["rollout.vllm=3"], "rollout.vllm=3"),
        (["rollout.vllm.urls=http://a:1", "rollout.engine=vllm"], "rollout.vllm.urls='http://a:1'"),
    ],
)
def test_what_contradicts_itself_about_servers_is_said_in_one_line(overrides, words):
    assert any(words in line for line in violations(*overrides)), violations(*overrides)


def test_every_conditional_key_has_its_case():
    assert list(CASES) == [key for key, *_ in CONDITIONAL]


@pytest.mark.parametrize("key", CASES)
def test_a_conditional_key_has_its_default_where_it_applies_and_is_refused_elsewhere(key):
    where, default, welcome, elsewhere, reason = CASES[key]
    assert value_of(parse_config(MINIMAL, where), key) == default
    assert value_of(parse_config(MINIMAL, [*EITHER.get(key, where), f"{key}={welcome}"]), key) == welcome
    if elsewhere is None:
        return
    assert value_of(parse_config(MINIMAL, elsewhere), key) is None
    (line,) = violations(*elsewhere, f"{key}={welcome}")
    assert line.startswith(f"{key}=")
    assert "has no effect because" in line
    assert reason in line


@pytest.mark.parametrize(
    ("preset", "defaults"),
    [
        ("flow_rl", {"alpha": 1.0, "task_reward": "gold", "reward_scale": 15.0, "reward_advantage": True}),
        ("la_tb", {"alpha": 4.0, "task_reward": "none", "reward_scale": None, "kl_coefficient": None}),
        ("rl_token", {"alpha": 4.0, "psi": 0.0, "log_z": None, "tilt_cap": None, "kl_coefficient": None}),
        ("intuitor", {"alpha": None, "psi": None, "kl_coefficient": 0.0, "ratio": "none"}),
    ],
)
def test_the_defaults_of_a_preset(preset, defaults):
    objective = parse_config(MINIMAL, [f"objective.preset={preset}"]).objective
    assert {name: getattr(objective, name) for name in defaults} == defaults


@pytest.mark.parametrize(
    "overrides",
    [["objective.preset=grpo", "objective.psi=0"], ["objective.log_z=scalar", "objective.log_z_detach=false"]],
)
def test_0_and_false_are_values_too_and_refused_where_they_have_no_effect(overrides):
    (line,) = violations(*overrides)
    assert "has no effect" in line


def test_0_and_false_stay_where_they_are_given():
    assert (
        parse_config(MINIMAL, ["objective.log_z=mlp", "objective.log_z_detach=false"]).objective.log_z_detach is False
    )
    assert parse_config(MINIMAL, ["objective.log_z=mlp", "optimizer.log_z_lr=0"]).optimizer.log_z_lr == 0
    assert parse_config(MINIMAL, ["evaluation.samples=0"]).evaluation.samples == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.updates_per_rollout=3"], "does not divide rollout.prompts_per_step=32"),
        (["run.stop_on_alarm=[nothing_kept]", "alarm.nothing_kept_steps=5"], "max_skipped_steps=5 fails the run first"),
        (["optimizer.lr_decay=linear", "optimizer.min_lr=1e-5"], "min_lr=1e-05 is above optimizer.lr=1e-06"),
        (["objective.ratio=token"], "a residual belongs to a whole response"),
        (["objective.preset=one_shot_em", "objective.ratio=seq"], "it has no reward to weigh"),
        (["objective.sampler_ratio=token"], "objective.sampler_ratio=token with objective.preset=la_tb: a residual"),
        (["objective.preset=tb_token_step", "objective.sampler_ratio=token"], "belongs to a whole response"),
        (["objective.preset=one_shot_em", "objective.sampler_ratio=seq_mean"], "objective.sampler_ratio=seq_mean with"),
        (
            ["objective.preset=grpo", "objective.ratio=seq", "objective.sampler_ratio=token"],
            "a surrogate of whole responses has no terms of tokens",
        ),
        (["objective.preset=grpo", "rollout.responses_per_prompt=1"], "needs at least 2 responses"),
        (["optimizer.betas=[0.9,1.0]"], "each must be in [0, 1)"),
        (["rollout.replay=x", "rollout.save=true"], "rollout.save=true has no effect"),
        (["rollout.buffer_steps=1"], "rollout.save=false"),
        (["rollout.buffer_steps=1", "rollout.replay=x"], "a replay takes each step's rollouts alone"),
        (["rollout.buffer_steps=1", "rollout.save=true", "objective.preset=grpo"], "older ones would bias it"),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides, words):
    (line,) = violations(*overrides)
    assert words in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.updates_per_rollout=8"],
        ["run.stop_on_alarm=[nothing_kept]", "alarm.nothing_kept_steps=4"],
        ["run.stop_on_alarm=[loss]", "alarm.nothing_kept_steps=9"],
        ["optimizer.lr_decay=linear", "optimizer.min_lr=1e-6"],
        ["objective.ratio=seq_mean"],
        ["objective.preset=grpo", "objective.ratio=token"],
        ["objective.preset=grpo", "objective.sampler_ratio=token"],
        ["objective.preset=grpo", "objective.ratio=token", "objective.sampler_ratio=token"],
        ["objective.preset=grpo", "objective.ratio=token", "objective.sampler_ratio=seq"],
        ["objective.preset=grpo", "objective.ratio=seq", "objective.sampler_ratio=seq_mean"],
        ["objective.sampler_ratio=seq_mean", "objective.sampler_ratio_cap=1"],
        ["objective.preset=one_shot_em", "rollout.responses_per_prompt=1"],
        ["optimizer.betas=[0.0,0.999]"],
    ],
)
def test_their_neighbours_are_accepted(overrides):
    parse_config(MINIMAL, overrides)


@pytest.mark.parametrize("cap", ["0.9", "0", "-2", ".inf", ".nan", "1e31"])
def test_a_cap_below_1_or_without_end_is_refused(cap):
    (line,) = violations("objective.sampler_ratio=seq", f"objective.sampler_ratio_cap={cap}")
    assert "objective.sampler_ratio_cap" in line


def test_one_response_per_prompt_is_refused_for_group_estimates():
    for log_z in ("group", "loo", "contrastive"):
        (line,) = violations("rollout.responses_per_prompt=1", f"objective.log_z={log_z}")
        assert "at least 2" in line


def test_the_default_log_z_is_the_groups_where_there_is_a_group():
    assert parse_config(MINIMAL).objective.log_z == "group"
    assert parse_config(MINIMAL).optimizer.log_z_lr is None
    assert parse_config(MINIMAL, ["rollout.responses_per_prompt=2"]).objective.log_z == "group"
    alone = parse_config(MINIMAL, ["rollout.responses_per_prompt=1"])
    assert (alone.objective.log_z, alone.optimizer.log_z_lr) == ("mlp", 0.5)


def test_the_rate_that_an_earlier_version_had_is_refused():
    (line,) = violations("objective.log_z=mlp", "optimizer.log_z_lr=1e-3")
    assert "share of the mean residual" in line
    assert "0.5 is the default" in line
    for value in (0, 0.01, 0.99):
        parse_config(MINIMAL, ["objective.log_z=mlp", f"optimizer.log_z_lr={value}"])
    assert "less than 1" in violations("objective.log_z=mlp", "optimizer.log_z_lr=1")[0]


def test_conditional_defaults_appear_where_they_act():
    config = parse_config(MINIMAL, ["objective.ratio=seq", "objective.psi=-0.5", "objective.log_z=scalar"])
    assert config.objective.clip_epsilon == 0.2
    assert config.objective.psi_exempt_tasks == ["creative"]
    assert config.optimizer.log_z_lr == 0.5
    assert parse_config(MINIMAL).objective.clip_epsilon is None


@pytest.mark.parametrize(
    ("overrides", "ratio"),
    [
        ([], "none"),
        (["optimizer.updates_per_rollout=2"], "seq"),
        (["rollout.replay=x"], "seq"),
        (["rollout.replay=x", "objective.sampler_ratio=seq"], "none"),  # S_old is S, and v does the rest
        (["rollout.replay=x", "objective.sampler_ratio=seq", "optimizer.updates_per_rollout=2"], "seq"),
        (["rollout.replay=x", "objective.preset=grpo"], "token"),
        (["optimizer.updates_per_rollout=2", "objective.preset=rl_token"], "token"),
        (["optimizer.updates_per_rollout=2", "objective.preset=one_shot_em"], "none"),
        (["optimizer.updates_per_rollout=2", "objective.ratio=none"], "none"),
    ],
)
def test_the_importance_weight_is_not_left_out_unless_asked_for(overrides, ratio):
    objective = parse_config(MINIMAL, overrides).objective
    assert objective.ratio == ratio
    assert (objective.clip_epsilon is None) == (ratio == "none")


@given(
    st.fixed_dictionaries(
        {
            "objective.log_z": st.sampled_from(["mlp", "scalar", "group", "loo", "contrastive"]),
            "objective.ratio": st.sampled_from(["none", "seq", "seq_mean"]),
            "objective.alpha": st.floats(0.01, 100),
            "optimizer.lr_decay": st.sampled_from(["constant", "linear", "cosine"]),
            "precision.dtype": st.sampled_from(["fp32", "bf16", "fp8"]),
            "metrics.wandb": st.sampled_from(["off", "auto"]),
            "parallel.pp": st.integers(1, 8),
        }
    )
)
def test_a_written_config_reads_back_equal(settings):
    config = parse_config(MINIMAL, [f"{key}={value}" for key, value in settings.items()])
    import yaml

    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_every_conditional_key_exists():
    assert {key for key, *_ in CONDITIONAL} <= set(config_keys())


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    for text in ("- a\n- b\n", "a: [1\n", "\x00\x01", "a: 1\na: 2\n"):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(UserError):
            load_config(path)


def test_nothing_of_a_config_runs_or_reads_the_environment(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "config.yaml"
    path.write_text(f"model: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(UserError):
        load_config(path)
    assert not marker.exists()
    path.write_text("model: {hf_path: '${oc.env:HOME}'}\nprompts: {path: p}\nrun: {output_dir: o}\n")
    with pytest.raises(UserError, match="resolver"):
        load_config(path)
    path.write_text("model: {hf_path: m}\nprompts: {path: ['${oc.env:HOME}']}\nrun: {output_dir: o}\n")
    with pytest.raises(UserError, match="resolver"):
        load_config(path)


def test_an_override_overrides():
    values = {**MINIMAL, "objective": {"alpha": 2.0}}
    assert parse_config(values, ["objective.alpha=3"]).objective.alpha == 3
    assert parse_config(values).objective.alpha == 2


def test_a_key_may_refer_to_another():
    values = {**MINIMAL, "run": {"output_dir": "runs/${run.seed}", "seed": 7}}
    assert parse_config(values).run.output_dir == "runs/7"


@pytest.mark.parametrize("override", ["objective", "alpha=2", "=2", "objective.alpha", "a b.c=1"])
def test_malformed_overrides_are_named(override):
    (line,) = violations(override)
    assert override in line
    assert "section.key=value" in line


def test_words_that_yaml_reads_as_booleans_mean_what_they_say():
    assert parse_config(MINIMAL, ["metrics.wandb=off"]).metrics.wandb == "off"
    assert parse_config(MINIMAL, ["checkpoint.resume=true"]).checkpoint.resume == "latest"
    assert parse_config(MINIMAL, ["checkpoint.resume=false"]).checkpoint.resume == "never"


def test_what_contradicts_itself_is_said_with_what_has_the_wrong_type():
    values = {
        "model": {"hf_path": "m"},
        "prompts": {},
        "run": {"output_dir": "r", "num_steps": "many"},
        "objective": {"preset": "grpo", "alpha": 2.0},
        "parallel": {"tp": 0},
    }
    with pytest.raises(UserError) as caught:
        parse_config(values)
    text = str(caught.value)
    for part in ("prompts.path: missing", "run.num_steps='many'", "parallel.tp=0", "objective.alpha=2.0 has no effect"):
        assert part in text
    assert len(caught.value.violations) == 4


def test_what_only_a_wrong_value_would_contradict_is_not_said():
    values = {"model": {"hf_path": "m"}, "prompts": {"path": "p"}, "run": {"output_dir": "r"}}
    with pytest.raises(UserError) as caught:
        parse_config(values | {"objective": {"task_reward": "goldd", "reward_scale": 2.0}})
    (text,) = caught.value.violations
    assert text == "objective.task_reward='goldd': must be one of 'none', 'gold', 'majority' or 'boxed'"
