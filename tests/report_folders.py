"""Run folders as training leaves them, without training: curves that rise, collapse and repeat themselves.

The shapes are those of a small experiment (accuracy, length against step of four objectives); the noise is seeded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

EVALUATION_STEPS = tuple(range(0, 276, 25))
# objective -> (accuracy, length) at the evaluation steps
SHAPES = {
    "la_tb": (
        (0.41, 0.84, 0.93, 0.96, 0.96, 0.97, 0.972, 0.978, 0.96, 0.59, 0.09, 0.01),
        (12.6, 15.6, 15.9, 15.5, 15.4, 15.3, 15.1, 15.3, 15.3, 24.3, 37.4, 39.5),
    ),
    "rl_token": (
        (0.41, 0.87, 0.95, 0.96, 0.85, 0.22, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01),
        (12.6, 15.7, 16.0, 15.9, 18.2, 33.6, 39.3, 39.4, 39.4, 39.4, 39.4, 39.4),
    ),
    "tb_traj": (
        (0.41, 0.215, 0.144, 0.14, 0.14, 0.14, 0.14, 0.14, 0.14, 0.14, 0.14, 0.14),
        (12.6, 4.8, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0),
    ),
    "tb_token": (
        (0.41, 0.86, 0.92, 0.943, 0.94, 0.939, 0.94, 0.938, 0.94, 0.941, 0.94, 0.94),
        (12.6, 16.2, 16.9, 17.2, 17.2, 17.2, 17.1, 17.2, 17.2, 17.2, 17.2, 17.2),
    ),
}
KS = (1, 2, 4, 8, 16)
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "megatron-core": "0.16.1", "transformers": "5.23.0"}
HOSTILE = "<script>alert(1)</script><img src=http://192.0.2.1/x onerror=alert(2)>\"'&{{ 7*7 }}"


def make_run(
    folder: Path,
    *,
    seed: int,
    preset: str = "la_tb",
    alpha: float = 4.0,
    log_z: str = "group",
    shape: str | None = None,
    name: str | None = None,
    trap: bool = False,
    evaluated: bool = True,
    last: int = 275,
    hf_path: str = "/models/toy-base",
) -> Path:
    """A run folder: config.yaml, metrics.jsonl, evaluations.jsonl, samples.jsonl, evaluation/evaluation.json."""
    folder.mkdir(parents=True)
    accuracy, length = SHAPES[shape or preset]
    noise = np.random.default_rng([seed, *map(ord, f"{preset}{alpha}{log_z}")])
    config = {
        "model": {"hf_path": hf_path},
        "prompts": {"path": "prompts.jsonl"},
        "rollout": {"prompts_per_step": 16, "responses_per_prompt": 16, "max_response_tokens": 40},
        "objective": {"preset": preset, "alpha": alpha, "log_z": log_z},
        "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]},
        "metrics": {"curves": bool(seed % 2)},
        "run": {"output_dir": str(folder), "num_steps": last, "seed": seed} | ({"name": name} if name else {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    steps = [step for step in EVALUATION_STEPS if step <= last]
    _write_lines(
        folder / "metrics.jsonl", [_metrics(step, accuracy, length, log_z, trap, alpha, noise) for step in range(last)]
    )
    if evaluated:
        lines = [_evaluation(step, accuracy[place], length[place], noise) for place, step in enumerate(steps)]
        _write_lines(folder / "evaluations.jsonl", lines)
    samples = [_sample(step, prompt) for step in (0, last) for prompt in range(3)]
    _write_lines(folder / "samples.jsonl", samples)
    launch = {"first_step": 0, "world_size": 1, "command": f"powerflow train {preset}.yaml run.seed={seed}"}
    _write_lines(folder / "launches.jsonl", [launch | {"versions": VERSIONS, "git_commit": None}])
    return folder


def make_evaluation(
    folder: Path,
    *,
    accuracy: float,
    temperature: float = 1.0,
    seed: int = 0,
    model: str = "/models/toy-base",
    data: str = "held_out.jsonl",
    tasks: Sequence[str] = ("sums",),
    diversity: Mapping[str, float] | None = None,
    quality: float | None = None,
    length: float = 15.0,
    slope: float = 0.5,
) -> Path:
    """A folder with one evaluation.json."""
    folder.mkdir(parents=True)

    def scores(value: float) -> dict:
        rates = {k: 1 - (1 - value) * k ** (-slope) for k in KS}
        return {
            "num_questions": 48,
            "num_responses": 16,
            "avg": value,
            "avg_se": (value * (1 - value) / 48) ** 0.5,
            "pass_at": {str(k): rate for k, rate in rates.items()},
            "pass_at_se": {str(k): (rate * (1 - rate) / 48) ** 0.5 for k, rate in rates.items()},
            "maj": min(1.0, value + 0.05),
            "response_length_mean": length,
            "truncated_fraction": 0.002,
            "boxed_rate": 0.97,
        }

    content = {
        "model": model,
        "data": data,
        "num_responses": 16,
        "temperature": temperature,
        "seed": seed,
        "tasks": {task: scores(max(0.01, accuracy - 0.1 * place)) for place, task in enumerate(tasks)},
        "all": scores(accuracy),
        "diversity": dict(diversity or {"distinct_1": 0.3, "distinct_2": 0.4, "self_bleu": 0.5}),
        "command": f"powerflow evaluate --model {model} --data {data} --temperature {temperature}",
        "versions": VERSIONS,
    }
    if quality is not None:
        content["judge"] = {"quality": {"mean": quality, "se": 0.02, "num_judged": 90, "num_unparsed": 1}}
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def _metrics(step: int, accuracy, length, log_z: str, trap: bool, alpha: float, noise: np.random.Generator) -> dict:
    tokens = float(np.interp(step, EVALUATION_STEPS, length)) * (1 + 0.03 * noise.standard_normal())
    settled = float(np.exp(-step / 40))
    spread = 0.12 + 0.9 * settled
    middle = 0.02 * noise.standard_normal()
    group = -1.57 - 1.3 * settled + 0.03 * noise.standard_normal()
    head = group if log_z == "group" else group + 0.4 * np.exp(-step / 12) + 0.02 * noise.standard_normal()
    quantiles = dict(zip(("p05", "p25", "p50", "p75", "p95"), (-1.6, -0.6, 0.0, 0.6, 1.7), strict=True))
    line = {
        "step": step,
        "loss": spread**2 * (1 + 0.1 * noise.standard_normal()),
        "residual_mean": head - group + (0 if log_z == "group" else middle),
        "residual_std": spread,
        **{f"residual_{name}": middle + spread * place for name, place in quantiles.items()},
        "weighted_residual_mean": head - group + middle,
        "log_z_mean": head,
        "group_log_z_mean": group,
        **_power(alpha, settled, noise),
        "response_length_mean": tokens,
        "response_length_p95": min(40.0, 1.5 * tokens),
        "truncated_fraction": max(0.0, (tokens - 15) / 26),
        "policy_entropy": 0.12 + 0.8 * settled + 0.01 * noise.standard_normal(),
        "accuracy": float(np.clip(np.interp(step, EVALUATION_STEPS, accuracy) + 0.05 * noise.standard_normal(), 0, 1)),
        "kl_per_response": 4.0 * (1 - settled),
        "grad_norm": float(np.exp(0.4 * noise.standard_normal() + 2 * settled)),
        "tokens_per_second": 21000 + 900 * noise.standard_normal(),
        "boxed_rate": 0.9,
    }
    if trap:
        margin = -18 + 0.14 * step + noise.standard_normal()
        line |= {"trap_margin": margin, "trap_lambda": group, "trap_loop_nats": 0.11, "trap_entry_nats": 5.3 - settled}
        line["alarm"] = float(margin > 4)
    return line


def _power(alpha: float, settled: float, noise: np.random.Generator) -> dict:
    """On the way from 1 to alpha, which it does not quite reach."""
    realised = 1 + 0.7 * (alpha - 1) * (1 - settled) + 0.05 * noise.standard_normal()
    return {
        "alpha": alpha,
        "alpha_realised": realised,
        "alpha_realised_low": realised - 0.1,
        "alpha_realised_high": realised + 0.12,
        "alpha_realised_r2": 1 - 0.1 * (1 - settled),
        "lambda_realised": -1.5 * (1 - settled),
    }


def _evaluation(step: int, accuracy: float, length: float, noise: np.random.Generator) -> dict:
    value = float(np.clip(accuracy + 0.012 * noise.standard_normal(), 0, 1))
    rates = {str(k): 1 - (1 - value) * k**-0.6 for k in KS}
    diversity = float(np.interp(step, (0, 50, 275), (0.62, 0.4, 0.25))) + 0.01 * noise.standard_normal()
    return {
        "step": step,
        "accuracy": value,
        "accuracy_se": 0.01,
        "response_length_mean": length * (1 + 0.02 * noise.standard_normal()),
        "truncated_fraction": float(np.clip((length - 15) / 26, 0, 1)),
        "boxed_rate": 0.95,
        "pass_at": rates,
        "maj": min(1.0, value + 0.04),
        "distinct_2": diversity,
        "distinct_3": min(1.0, diversity * 1.3),
        "policy_entropy": 0.9 - 0.7 * min(1.0, step / 100),
    }


def _sample(step: int, prompt: int) -> dict:
    after = step > 0
    text = "S W0 3 7 W0 4 1 W0 2 3 A 3" if after else "A 5" if prompt % 2 else "S W2 3 7 D 1 4 8 W5 4 0 C 1 W0 2 3 A 3"
    return {
        "step": step,
        "id": f"line-{prompt}",
        "prompt": f"BOS 4 3 4 {prompt} =",
        "question": f"4 + 3 + 4 + {prompt} mod 10?",
        "response": text,
        "answer": str((11 + prompt) % 10),
        "finish_reason": "eos",
        "num_response_tokens": len(text.split()),
    }


def spoil(folder: Path) -> None:
    """Every file of a run folder damaged in every way at hand; some of each stays readable."""
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    metrics[3:3] = [
        '{"step": 3, "loss": NaN, "grad_norm": Infinity, "log_z_mean": "1", "residual_mean": true}',
        '{"step": 4, "loss": 1e999, "grad_norm": ' + "9" * 400 + ', "tokens_per_second": 1e308}',
        '{"step": "five"}',
        '{"step": -1, "loss": 1}',
        '{"loss": 1}',
        "[" * 100_000,
        "null",
        json.dumps({"step": 6, HOSTILE: 1.0, HOSTILE + "2": None}),
        "1" * 5000,
    ]
    (folder / "metrics.jsonl").write_text("\n".join(metrics) + '\n{"step": 275, "lo')
    evaluations = (folder / "evaluations.jsonl").read_text()
    extra = {"step": 276, "accuracy": 0.5, "pass_at": {"-1": 1, "x": 1, "9" * 30: 1, "2": "no", "4": 0.5}}
    extra |= {"response_length_mean": [1], "judge": HOSTILE}
    (folder / "evaluations.jsonl").write_bytes(evaluations.encode() + json.dumps(extra).encode() + b"\n\xff\xfe\n")
    lone, odd = "\\ud800", "\u202e\u2028\x85\x00"
    sample = {"step": 0, "id": "h", "question": HOSTILE, "response": HOSTILE + odd, "answer": HOSTILE}
    sample = json.dumps(sample, ensure_ascii=False)  # as samples.jsonl is written
    huge = json.dumps({"step": 1, "id": "h", "response": "y" * 3_000_000}, ensure_ascii=False)
    bad = ['{"step": {}, "response": 1}', '{"step": 0, "id": "l", "response": "' + lone + '"}', '{"resp']
    (folder / "samples.jsonl").write_text("\n".join([sample, huge, *bad]), encoding="utf-8", errors="surrogatepass")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["run"]["name"] = "_" + HOSTILE + r"$\frac{1}$"
    config["model"]["hf_path"] = HOSTILE
    config["extra"] = {HOSTILE: [[1, [2]], 3], "when": "2026-13-99"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
