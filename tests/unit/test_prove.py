"""What a proof runs in place of the user's job, and what it makes of what was seen; no process is started."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_powerflow.config_file import parse_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.launch import cpu_environment
from megatron_powerflow.parallel.layout import Layout, plan_layout
from megatron_powerflow.prove import report
from megatron_powerflow.prove.compare import Line, compare
from megatron_powerflow.prove.forks import Failure
from megatron_powerflow.prove.proof import Proof, Subject, prepare, subject_of
from megatron_powerflow.prove.read_seen import SeenPart
from megatron_powerflow.prove.small_config import STEPS, alone_config, small_config
from megatron_powerflow.prove.small_layout import job_size, small_layout
from megatron_powerflow.records import ROLLOUT_COLUMNS
from tests.published_configs import PUBLISHED

SP = "parallel.sequence_parallel=true"
PACKED = ("parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=4096")
LAYOUTS = {
    "dp2": (2, ()),
    "tp2 sp": (2, ("parallel.tp=2", SP)),
    "pp2 dp2": (4, ("parallel.pp=2", "optimizer.distributed=true")),
    "cp2 packed": (4, (*PACKED, "parallel.cp=2")),
    "ep2 dp4": (4, ("parallel.ep=2",)),
}


def a_config(model: Path | str, *overrides: str):
    values = {"model": {"hf_path": str(model)}, "prompts": {"path": "none.jsonl"}, "run": {"output_dir": "run"}}
    return parse_config(values, overrides)


def a_subject(folder: Path, model: str, world_size: int | None, *overrides: str, full: bool = False) -> Subject:
    where = folder / "user"
    where.mkdir(exist_ok=True)
    (where / "config.json").write_text(json.dumps(PUBLISHED[model]))
    return subject_of(a_config(where, *overrides), world_size, full=full)


def switches(architecture) -> dict:
    """Everything of an architecture that is no size."""
    experts, mla, rope = architecture.experts, architecture.mla, architecture.rope
    return {
        "rope": replace(rope, factors=()),
        "grouped": architecture.num_attention_heads > architecture.num_query_groups,
        "square": architecture.hidden_size == architecture.query_width,
        "window": architecture.sliding_window is not None,
        "window in": {True} if architecture.windowed_layers is None else set(architecture.windowed_layers),
        "experts": experts and (experts.normalized, experts.score, experts.choice_bias, experts.num_groups > 1),
        "shared": experts and (experts.first_layer > 0, experts.shared_ffn_hidden_size is None, experts.scaling),
        "latent": mla and mla.q_lora_rank is None,
        **{
            name: getattr(architecture, name)
            for name in (
                *("family", "norm_epsilon", "tied_embeddings", "qkv_bias", "qk_norm", "qk_norm_over_heads", "pre_norm"),
                *("post_norm", "zero_centered_norms", "activation", "attention_softcap", "logit_softcap"),
            )
        },
    }


def can_be_split(fields: dict, layout: str) -> bool:
    has_experts = any("expert" in name for name in fields)
    return (has_experts or not layout.startswith("ep")) and (
        fields["num_hidden_layers"] % 2 == 0 or "pp2" not in layout
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "layout"),
    [(model, layout) for model, fields in PUBLISHED.items() for layout in LAYOUTS if can_be_split(fields, layout)],
)
def test_the_small_model_has_the_switches_of_the_published_one(tmp_path, model, layout):
    world_size, overrides = LAYOUTS[layout]
    subject = a_subject(tmp_path, model, world_size, *overrides)
    (tmp_path / "proof").mkdir()
    small = prepare(subject, tmp_path / "proof")
    assert switches(small) == switches(subject.model.architecture)
    assert small.hidden_size <= 256
    assert small.num_layers <= 8
    plan_layout(small_config(subject.config, subject.small, tmp_path), small, subject.small.world_size)
    plan_layout(alone_config(subject.config, subject.small, tmp_path), small, 1)


def a_layout(**sizes) -> Layout:
    given = {"tp": 1, "pp": 1, "vpp": None, "cp": 1, "ep": 1, "dp": 1, "sequence_parallel": False} | sizes
    return Layout(**given)


@pytest.mark.parametrize(
    ("sizes", "small"),
    [
        ({"tp": 8, "pp": 4, "dp": 2}, {"tp": 2, "pp": 3, "dp": 2}),
        ({"pp": 4, "vpp": 5, "dp": 16}, {"pp": 3, "vpp": 2, "dp": 2}),
        ({"pp": 2, "vpp": 5, "dp": 16}, {"pp": 2, "vpp": 2, "dp": 2}),
        ({"cp": 8, "dp": 1}, {"cp": 2, "dp": 1}),
        ({"ep": 8, "dp": 8}, {"ep": 2, "dp": 2}),
        # experts that have replicas keep them
        ({"ep": 8, "dp": 64}, {"ep": 2, "dp": 4}),
        ({"ep": 2, "cp": 2, "dp": 2}, {"ep": 2, "cp": 2, "dp": 2}),
        ({"ep": 2, "cp": 8}, {"ep": 2, "cp": 4}),
    ],
)
def test_each_size_becomes_two_at_most_but_for_stages_and_replicas_of_experts(sizes, small):
    assert small_layout(a_layout(**sizes)) == a_layout(**small)


def test_ranks_that_share_a_query_group_still_do(tmp_path):
    subject = a_subject(tmp_path, "Qwen/Qwen2.5-Math-1.5B", 4, "parallel.tp=4")  # 2 groups
    (tmp_path / "proof").mkdir()
    small = prepare(subject, tmp_path / "proof")
    assert (subject.small.tp, small.num_query_groups) == (2, 1)


def test_every_layer_kind_of_a_window_is_kept(tmp_path):
    """Listed layer by layer, one in six without the window; and from max_window_layers on."""
    (tmp_path / "user").mkdir()
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    qwen = {"use_sliding_window": True, "sliding_window": 4096}
    for number, more in enumerate(({"layer_types": kinds * 6}, {"max_window_layers": 20})):
        fields = PUBLISHED["Qwen/Qwen3-8B"] | qwen | more
        (tmp_path / "user" / "config.json").write_text(json.dumps(fields))
        subject = subject_of(a_config(tmp_path / "user"), 2, full=False)
        (tmp_path / f"proof_{number}").mkdir()
        assert set(prepare(subject, tmp_path / f"proof_{number}").windowed_layers) == {True, False}


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        ((), 2),
        (("parallel.tp=4", "parallel.pp=2"), 16),
        (("parallel.ep=8",), 8),
        (("parallel.ep=4", "parallel.cp=2"), 4),
        (("rollout.prompts_per_step=3",), 1),
    ],
)
def test_a_job_of_unknown_size_has_two_replicas(overrides, processes):
    assert job_size(a_config("none", *overrides)) == processes


def test_what_is_too_large_or_impossible_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"at most 32 .* leave --full away \(12 processes"):
        a_subject(tmp_path, "meta-llama/Llama-3.1-70B", 64, "parallel.tp=8", "parallel.pp=4", full=True)
    assert (
        a_subject(tmp_path, "meta-llama/Llama-3.1-70B", 32, "parallel.tp=8", "parallel.pp=4", full=True).small.tp == 8
    )
    with pytest.raises(UserError, match="does not divide num_attention_heads=64"):
        a_subject(tmp_path, "meta-llama/Llama-3.1-70B", 6, "parallel.tp=3")


def test_the_small_run_is_split_and_trained_as_the_users(tmp_path):
    config = a_config(
        "none",
        *PACKED,
        *("parallel.tp=2", SP, "parallel.cp=2", "model.recompute=full", "model.reference=swap"),
        *("optimizer.distributed=true", "optimizer.updates_per_rollout=4", "optimizer.betas=[0.8,0.9]"),
        *("objective.alpha=0.5", "objective.log_z=mlp", "objective.psi=-0.5", "precision.dtype=fp8"),
    )
    small = a_layout(tp=2, cp=2, dp=2, sequence_parallel=True)
    run, alone = small_config(config, small, tmp_path), alone_config(config, small, tmp_path)
    assert run.parallel.max_tokens_per_micro_batch == 64  # two texts of the longest
    assert run.parallel.micro_batch_size is None
    assert run.parallel.sequence_parallel
    assert (run.model.recompute, run.model.reference, run.optimizer.distributed) == ("full", "swap", True)
    assert (alone.model.recompute, alone.model.reference, alone.optimizer.distributed) == ("none", "resident", False)
    assert alone.parallel.micro_batch_size == 2
    assert run.objective == alone.objective
    assert (run.objective.alpha, run.objective.log_z, run.objective.psi) == (0.5, "mlp", -0.5)
    assert run.optimizer.betas == [0.8, 0.9]
    assert run.optimizer.updates_per_rollout == 2
    assert run.precision.dtype == alone.precision.dtype == "fp32"


def test_at_alpha_1_the_loss_would_begin_at_0(tmp_path):
    small = a_layout(dp=2)
    assert small_config(a_config("none", "objective.alpha=1"), small, tmp_path).objective.alpha == 2
    warming = a_config("none", "objective.alpha_warmup_steps=100")
    assert small_config(warming, small, tmp_path).objective.alpha_warmup_steps == 0
    rewarded = a_config("none", "objective.preset=flow_rl")
    assert small_config(rewarded, small, tmp_path).objective.alpha == 1


def seen(step: int = 0) -> dict[str, np.ndarray]:
    """What a run of four rollouts and two tensors has seen, from a step on."""
    draw = np.random.default_rng(0)
    tensors = {
        "log_probs/0": draw.normal(size=5).astype(np.float32),
        "log_probs/1": draw.normal(size=2).astype(np.float32),
        "drawn/0": np.array([4, 5, 2]),
        "drawn_gap/0": np.array([1e-6]),
        "gradient/a": draw.normal(size=(3, 4)).astype(np.float32),
        "gradient/b": draw.normal(size=3).astype(np.float32),
    }
    tensors = {} if step else tensors
    for number in range(STEPS):
        rows = draw.normal(size=(4, len(ROLLOUT_COLUMNS)))
        rows[:, ROLLOUT_COLUMNS.index("kept")] = 1.0
        rows[:, ROLLOUT_COLUMNS.index("advantage")] = math.nan
        kept = {f"rows/{number}": rows, f"gradient_norms/{number}": np.array([2.0])}
        kept |= {f"weights/{number}/{name}": draw.normal(size=3).astype(np.float32) for name in "ab"}
        tensors |= kept if number >= step else {}
    return tensors


BEFORE = {name: np.ones(3, np.float32) for name in "ab"}


def lines(layout=None, resumed=None, export=None, digests=None) -> dict[str, Line]:
    layout = seen() if layout is None else layout
    export = {name: layout[f"weights/{STEPS - 1}/{name}"] for name in "ab"} if export is None else export
    found = compare(
        SeenPart(seen(), {}),
        SeenPart(layout, {"a": ["x", "x"]} if digests is None else digests),
        SeenPart(seen(step=2) if resumed is None else resumed, {}),
        BEFORE,
        export,
    )
    return {line.name: line for line in found}


def names_that_differ(found: dict[str, Line]) -> list[str]:
    return [name for name, line in found.items() if not line.holds]


def test_equal_runs_hold_on_every_line():
    assert not names_that_differ(lines())


CHANGED = {
    "log_probs/0": "log-probs of responses",
    "log_probs/1": "log-probs of responses",
    "drawn/0": "responses that it draws",
    "drawn_gap/0": "sampler against scorer",
    "rows/1": "loss",
    "gradient/b": "gradients, 2 tensors",
    "gradient_norms/2": "gradient norm",
    "weights/0/a": "change of the weights",
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("wrong", ["larger", "nan", "missing"])
def test_what_differs_is_named(name, wrong):
    layout = seen()
    if wrong == "missing" and name.split("/")[0] in ("rows", "gradient_norms", "drawn_gap"):
        del layout[name]
        if name != "drawn_gap/0":
            with pytest.raises(KeyError):  # the main rank writes them whatever happens
                lines(layout)
            return
    elif wrong == "missing":
        del layout[name]
    elif wrong == "nan" and layout[name].dtype.kind == "f":
        layout[name].flat[0] = math.nan
        if name == "rows/1":
            layout[name][:] = math.nan
    else:
        layout[name] = layout[name] * 2 + 1
    export = {key: seen()[f"weights/{STEPS - 1}/{key}"] for key in "ab"}
    assert CHANGED[name] in names_that_differ(lines(layout, export=export))


def test_rounding_is_no_difference_and_ten_times_the_bound_is():
    layout = seen()
    layout["gradient/a"] = layout["gradient/a"] * np.float32(1 + 1e-6)
    assert not names_that_differ(lines(layout))
    layout["gradient/a"] = layout["gradient/a"] * np.float32(1 + 1e-2)
    assert names_that_differ(lines(layout)) == ["gradients, 2 tensors"]


def test_a_small_gradient_counts_as_much_as_a_large_one():
    """Down to a thousandth of the largest; what is smaller still is compared with that."""
    for share, factor, differs in ((1e-2, 1.001, True), (1e-8, 1.5, False)):
        alone, layout = seen(), seen()
        alone["gradient/b"] = alone["gradient/b"] * np.float32(share)
        layout["gradient/b"] = alone["gradient/b"] * np.float32(factor)
        export = {name: layout[f"weights/{STEPS - 1}/{name}"] for name in "ab"}
        parts = (SeenPart(alone, {}), SeenPart(layout, {}), SeenPart(seen(step=2), {}))
        found = {line.name: line for line in compare(*parts, BEFORE, export)}
        assert names_that_differ(found) == ["gradients, 2 tensors"] * differs
        assert found["gradients, 2 tensors"].where == "b"


def test_a_number_that_one_of_them_lacks_differs():
    layout = seen()
    layout["rows/2"][1, ROLLOUT_COLUMNS.index("residual")] = math.nan
    found = lines(layout)
    assert names_that_differ(found) == ["residuals, weights, log Z'", "resumed after step 2"]
    assert found["residuals, weights, log Z'"].where == "residual of step 3"


def test_other_rollouts_than_those_of_one_process_differ():
    assert names_that_differ(lines(seen() | {"drawn/0 of rank_001": np.array([1])})) == ["responses that it draws"]
    layout = seen()
    layout["rows/0"] = layout["rows/0"][:3]
    assert "residuals, weights, log Z'" in names_that_differ(lines(layout))


def test_the_other_lines_are_there_where_the_resumed_part_failed():
    export = {name: seen()[f"weights/2/{name}"] for name in "ab"}
    found = [line.name for line in compare(SeenPart(seen(), {}), SeenPart(seen(), {}), None, BEFORE, export)]
    assert found == [name for name in lines() if name != "resumed after step 2"]


def test_copies_resumes_and_exports_are_equal_to_the_last_bit():
    assert names_that_differ(lines(digests={"a": ["x", "y"], "b": ["x"]})) == ["copies of the weights"]
    resumed = seen(step=2)
    resumed["weights/2/b"] = np.nextafter(resumed["weights/2/b"], np.float32(9))
    assert names_that_differ(lines(resumed=resumed)) == ["resumed after step 2"]
    export = {name: seen()[f"weights/2/{name}"] for name in "ab"}
    assert names_that_differ(lines(export={"a": export["a"]})) == ["export"]
    assert names_that_differ(lines(export=export | {"c": export["a"]})) == ["export"]


def test_a_run_in_which_nothing_moves_proves_nothing():
    still = seen()
    for name in still:
        if name.startswith("gradient/"):
            still[name] = np.zeros_like(still[name])
        if name.startswith("weights/"):
            still[name] = BEFORE["a"].copy()
    part = SeenPart(still, {})
    after = {name: value for name, value in still.items() if name.split("/")[-1] == "2" or "/2/" in name}
    found = compare(part, part, SeenPart(after, {}), BEFORE, dict(BEFORE))
    assert {"gradients, 2 tensors", "change of the weights"} <= {line.name for line in found if not line.holds}


def a_proof(*lines: Line, failure: Failure | None = None, tmp_path: Path) -> Proof:
    subject = a_subject(tmp_path, "Qwen/Qwen3-8B", 2)
    return Proof(subject.layout, subject.small, subject.model.architecture, ("tp 8 as 2",), lines, failure, 3.0)


def test_the_verdict_is_said_and_written(tmp_path):
    good, bad = Line("loss", "relative", 1e-9, 1e-5, "step 1"), Line("export", "tensors", math.inf, 0.0, "a")
    holds = a_proof(good, tmp_path=tmp_path)
    assert holds.holds
    assert "proved in 3 s" in report.closing(holds)
    differs = a_proof(good, bad, tmp_path=tmp_path)
    assert not differs.holds
    assert "1 of 2 lines differ; do not submit" in report.closing(differs)
    written = json.loads(json.dumps(report.to_json(differs), allow_nan=False))
    assert [(line["name"], line["largest"], line["holds"]) for line in written["lines"]] == [
        ("loss", 1e-9, True),
        ("export", None, False),
    ]
    failed = a_proof(failure=Failure("layout", 1, "saves", ("OSError: disk",)), tmp_path=tmp_path)
    assert not failed.holds
    assert "rank 1 of the part 'layout', as it saves:\n          OSError: disk" in report.closing(failed)


def test_only_a_file_of_its_own_is_written_over(tmp_path):
    path = tmp_path / "proof.json"
    assert report.json_refusals(path) == []
    path.write_text(json.dumps(report.to_json(a_proof(tmp_path=tmp_path))))
    assert report.json_refusals(path) == []
    path.write_text("{}")
    assert "did not write it" in report.json_refusals(path)[0]


def test_the_processes_see_neither_gpus_nor_a_launcher(monkeypatch):
    left = {"RANK": "3", "MASTER_ADDR": "n1", "GLOO_SOCKET_IFNAME": "ib0", "TORCHELASTIC_RUN_ID": "1"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("HF_HOME", "/cache")
    environment = cpu_environment()
    assert not left.keys() & environment.keys()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["HF_HOME"] == "/cache"
