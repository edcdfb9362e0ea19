"""What do rollouts from a vLLM server cost? Our client against vLLM's own, updates of weights, steps that do not wait.

    python -m benchmarks.serving --vllm-python /envs/vllm/bin/python [client] [sync] [ahead]

    client   tokens per second of one server, asked by our pool and by `vllm bench serve`: equally many prompts, tokens
             and requests at a time; repetitions alternate, and the first of each is not counted
    sync     seconds, bytes and gaps of updates of the server's weights, by each transport, bf16 and fp32
    ahead    seconds of a step with rollout.steps_ahead 0 and 1

The model is SmolLM2-135M-Instruct. Server and trainer have a core each.

Left out: several servers, servers on GPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from megatron_powerflow.journal import read_journal
from megatron_powerflow.records import Prompt, SamplingParams
from megatron_powerflow.serving.answers import MODEL
from megatron_powerflow.serving.pool import Ask, Pool, PoolSettings
from tests.conftest import SMOLLM2
from tests.vllm.servers import Job

NUM_PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS, AT_A_TIME = 64, 64, 64, 32
NEVER = 49151  # the last token of the vocabulary, which ends no response here
PROMPTS = Path(__file__).parents[1] / "examples" / "prompts" / "mixed.jsonl"  # in bf16, nonsense is .3 nats apart
REAL = {"prompts.path": str(PROMPTS), "optimizer.lr": 1e-6}
FEW_RESPONSES = {
    **REAL,
    "rollout.prompts_per_step": 1,
    "rollout.max_prompt_tokens": 160,
    "rollout.max_response_tokens": 32,
}
LONG_RESPONSES = {
    **REAL,
    "rollout.prompts_per_step": 2,
    "rollout.max_prompt_tokens": 96,
    "rollout.max_response_tokens": 96,
}
NO_START = {f"rollout.vllm.{key}": None for key in ("start", "python", "arguments", "port")}


def by_our_pool(job: Job, seed: int) -> float:
    """Answer the prompts by our client; return tokens per second."""
    sampling = SamplingParams(1, RESPONSE_TOKENS, 1.0, frozenset({NEVER}), seed=seed, step=0)
    done, lock, num_tokens = threading.Event(), threading.Lock(), [0, 0]

    def took(answer, _) -> None:
        with lock:
            num_tokens[0] += sum(len(rollout.response_token_ids) for rollout in answer.rollouts)
            num_tokens[1] += 1
            if num_tokens[1] == NUM_PROMPTS:
                done.set()

    pool = Pool(
        lambda: [job.url()],
        PoolSettings(NEVER + 1, AT_A_TIME, 600.0, 60.0),
        bring_up=lambda server: None,
        restart=print,
        say=lambda text: None,
    )
    prompts = [
        Prompt(
            f"{seed}-{slot}",
            slot,
            tuple((seed * 7919 + slot * 104729 + place * 31) % 40000 + 100 for place in range(PROMPT_TOKENS)),
        )
        for slot in range(NUM_PROMPTS)
    ]
    pool.open()
    pool.set_up([job.url()])
    pool.release()
    began = time.perf_counter()
    pool.ask([Ask(slot, prompt, sampling, took) for slot, prompt in enumerate(prompts)])
    while not done.wait(0.5):
        pool.require_sound()
    seconds = time.perf_counter() - began
    pool.close()
    return num_tokens[0] / seconds


def by_vllm(job: Job, seed: int, python: str) -> float:
    """Answer as many prompts by vLLM's own benchmark client; return tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "backend": "openai",
            "base-url": job.url(),
            "endpoint": "/v1/completions",
            "model": str(job.model),
            "served-model-name": MODEL,
            "dataset-name": "random",
            "random-input-len": PROMPT_TOKENS,
            "random-output-len": RESPONSE_TOKENS,
            "num-prompts": NUM_PROMPTS,
            "max-concurrency": AT_A_TIME,
            "seed": seed,
            "temperature": 1.0,
            "logprobs": 1,
            "result-dir": folder,
            "result-filename": "result.json",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        program = (
            "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
            "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
        )
        command = [python, "-c", program, *words, "--ignore-eos", "--save-result", "--disable-tqdm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((Path(folder) / "result.json").read_text())["output_throughput"]


def client(job: Job, python: str, repeats: int) -> None:
    sides: dict[str, list[float]] = {"ours": [], "vLLM's": []}
    for repeat in range(repeats + 1):
        ours, theirs = by_our_pool(job, repeat), by_vllm(job, repeat, python)
        if repeat:
            sides["ours"].append(ours)
            sides["vLLM's"].append(theirs)
        print(f"  ours {ours:.0f}, vLLM's {theirs:.0f} tokens/s", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(*sides.values(), strict=True)]
    print(f"client: ours / vLLM's {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)


def lines_of(job: Job, name: str, number: int = 0, **changes) -> list[dict[str, float]]:
    """Train some steps by the server of a number, and return their metrics."""
    run = job.folder / name
    done = job.train(**NO_START, **{"rollout.vllm.urls": [job.url(number)], "run.output_dir": str(run), **changes})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return read_journal(run / "metrics.jsonl").lines


def sync(job: Job) -> None:
    for number, dtype in enumerate(("fp32", "bf16")):
        job.settings |= {"precision.dtype": dtype, "rollout.vllm.start": 2}
        if number:
            job.serve(number)
        for transport in ("folder", "changes", "stream"):
            changes = {"rollout.vllm.transport": transport, "run.num_steps": 5}
            lines = lines_of(job, f"sync_{dtype}_{transport}", number, **changes, **FEW_RESPONSES)[1:]
            seconds = statistics.median(line["sync_seconds"] for line in lines)
            share = statistics.median(line["sync_share"] for line in lines)
            size = statistics.median(line["sync_bytes"] for line in lines) / 1e6
            gap = max(line["sync_gap_mean"] for line in lines)
            print(
                f"sync {dtype} {transport}: {seconds:.2f} s, {size:.1f} MB ({share:.1%} of all), gap {gap:.1e}",
                flush=True,
            )
    job.settings["precision.dtype"] = "fp32"


def ahead(job: Job) -> None:
    found = {}
    for steps_ahead in (0, 1, 0, 1):
        name = f"ahead_{steps_ahead}_{len(found)}"
        lines = lines_of(job, name, **{"rollout.steps_ahead": steps_ahead, "run.num_steps": 6, **LONG_RESPONSES})
        lines = lines[2:-1]  # nothing is drawn ahead of the end, so its last step is shorter
        found[name] = statistics.median(line["step_seconds"] for line in lines)
        parts = {key: statistics.median(line[f"{key}_seconds"] for line in lines) for key in ("rollout", "update")}
        lag = statistics.median(line.get("lag_mean", 0.0) for line in lines)
        print(f"  steps_ahead {steps_ahead}: {found[name]:.2f} s a step, {parts}, lag {lag:.2f}", flush=True)
    waits, goes_on = (
        statistics.mean(seconds for name, seconds in found.items() if name.startswith(f"ahead_{k}_")) for k in (0, 1)
    )
    print(f"ahead: {waits:.2f} s a step with 0, {goes_on:.2f} with 1: {1 - goes_on / waits:.1%} hidden", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["client", "sync", "ahead", []], default=[])
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    wanted = options.what or ["client", "sync", "ahead"]
    with tempfile.TemporaryDirectory() as folder, Job(Path(folder), SMOLLM2, options.vllm_python) as job:
        job.settings |= {"rollout.max_prompt_tokens": 128, "rollout.max_response_tokens": 64}
        job.serve()
        if "client" in wanted:
            client(job, options.vllm_python, options.repeats)
        if "sync" in wanted:
            sync(job)
        if "ahead" in wanted:
            ahead(job)


if __name__ == "__main__":
    main()
