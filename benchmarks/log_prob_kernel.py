"""What does a token's log-prob cost, forward and backward, in time and memory? Our kernel against full logits.

    python -m benchmarks.log_prob_kernel                    4,096 tokens x 152,000 vocabulary x 896 hidden, fp32
    python -m benchmarks.log_prob_kernel --dtype bf16       the same in bf16 (products in bf16, log-probs in fp32)
    python -m benchmarks.log_prob_kernel --device cuda      on a GPU, with the Triton arithmetic as one more row

    (a) full logits     logits.float().log_softmax(-1).gather(targets)
    (b) Megatron-Core   vocab_parallel_cross_entropy(logits), as installed
    (c) TRL             selective_log_softmax(logits) by its published formula: fp32 logsumexp row by row; bf16
                        log_softmax row by row, in bf16 (huggingface/trl, trl/trainer/utils.py)
    ours                log_probs/token_log_probs.py

Every number is of a fresh process: log-probs, then the gradients of hidden and weight, --repeats times, least taken.
CPU seconds are the process's own (user + system; with one thread, what an idle machine's clock would show), wall
seconds lie beside them. Memory is the highest resident set less that before the first call, inputs made and libraries
warm, so it holds logits, what autograd keeps, temporaries and both gradients; the gradients alone, which nobody can do
without, are the last column. On CUDA: time by events, memory by the allocator's peak.

Each process also reports its log-probs and its gradients along a random direction; differing answers are an error.

Left out: more than one rank (tests/distributed), the model below the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

NAMES = {
    "full": "(a) full logits",
    "megatron": "(b) Megatron-Core",
    "trl": "(c) TRL's formula",
    "ours": "ours",
    "ours_triton": "ours, Triton",
}
SEQUENCES = 8  # TRL's loop runs over sequences
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # relative; in bf16 the others round logits, log-probs and gradients
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="the same for every row")
    parser.add_argument("--no-scaling", action="store_true", help="leave out the tables over tokens and vocabulary")
    parser.add_argument("--measure", choices=list(NAMES), help=argparse.SUPPRESS)  # this process is one of the rows
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    print(
        f"{options.dtype}, {options.device}, {options.threads} threads, hidden {options.hidden}; forward + backward\n"
    )
    found = compare(options)
    if not options.no_scaling:
        small = max(options.vocabulary // 8, 2), max(options.tokens // 4, SEQUENCES)
        scale("tokens", [(options.tokens * factor // 4, small[0]) for factor in (1, 2, 4, 8)], options)
        scale("vocabulary", [(small[1], options.vocabulary * factor // 8) for factor in (1, 2, 4, 8)], options)
    if not agree(found, options.dtype):
        sys.exit("the implementations differ by more than rounding: none of these numbers means anything")


def compare(options: argparse.Namespace) -> dict[str, dict]:
    """The main table: every implementation at one size."""
    names = [name for name in NAMES if name != "ours_triton" or options.device == "cuda"]
    print(f"{options.tokens:,} tokens x {options.vocabulary:,} vocabulary")
    print(f"{'':20}{'CPU s':>8}{'wall s':>8}{'x (a)':>8}{'extra MiB':>11}{'of (a)':>8}{'gradients MiB':>15}")
    found: dict[str, dict] = {}
    for name in names:
        row = found[name] = in_a_process(name, options.tokens, options.vocabulary, options)
        base = found["full"]
        print(
            f"{NAMES[name]:20}{row['cpu_seconds']:8.2f}{row['wall_seconds']:8.2f}"
            f"{row['cpu_seconds'] / base['cpu_seconds']:8.2f}{row['extra_bytes'] / MIB:11,.0f}"
            f"{base['extra_bytes'] / row['extra_bytes']:>7.1f}x{row['gradient_bytes'] / MIB:15,.0f}",
            flush=True,
        )
    print()
    return found


def scale(what: str, sizes: list[tuple[int, int]], options: argparse.Namespace) -> None:
    """Full logits and ours at growing sizes; `x` is to the row above, `net` leaves out the gradients."""
    print(f"growing {what}")
    print(
        f"{'tokens':>8}{'vocabulary':>12}{'(a) MiB':>10}{'x':>6}{'ours MiB':>10}{'x':>6}{'net MiB':>9}"
        f"{'ours CPU s':>12}{'x':>6}"
    )
    before: tuple[float, ...] | None = None
    for tokens, vocabulary in sizes:
        full, ours = (in_a_process(name, tokens, vocabulary, options) for name in ("full", "ours"))
        now = full["extra_bytes"] / MIB, ours["extra_bytes"] / MIB, ours["cpu_seconds"]
        growth = [""] * 3 if before is None else [f"{new / old:.2f}" for new, old in zip(now, before, strict=True)]
        print(
            f"{tokens:8,}{vocabulary:12,}{now[0]:10,.0f}{growth[0]:>6}{now[1]:10,.0f}{growth[1]:>6}"
            f"{now[1] - ours['gradient_bytes'] / MIB:9,.0f}{now[2]:12.2f}{growth[2]:>6}",
            flush=True,
        )
        before = now
    print()


def agree(found: dict[str, dict], dtype: str) -> bool:
    """Prints how far each answer is from that of (a), relative to the largest of its kind."""
    worst = 0.0
    for kind in ("log_probs", "grad_hidden", "grad_weight"):
        base = found["full"][kind]
        scale = max(abs(value) for value in base)
        for row in found.values():
            difference = max(abs(x - y) for x, y in zip(row[kind], base, strict=True)) / scale
            worst = difference if not difference <= worst else worst  # a NaN stays
    print(f"largest difference from (a), log-probs and gradients, relative: {worst:.1e}")
    return worst <= TOLERANCE[dtype]


def in_a_process(name: str, tokens: int, vocabulary: int, options: argparse.Namespace) -> dict:
    """What `measure` answers in a process of its own."""
    sizes = {"tokens": tokens, "vocabulary": vocabulary, "hidden": options.hidden, "repeats": options.repeats}
    flags = {**sizes, "dtype": options.dtype, "device": options.device, "threads": options.threads, "measure": name}
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    root = Path(__file__).resolve().parent.parent
    threads = str(options.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(
            f"{NAMES[name]} at {tokens:,} tokens x {vocabulary:,}: ended with {done.returncode} (-9: out of memory)"
        )
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict:
    """Time, memory and answers of one implementation, in this process."""
    import torch
    import torch.distributed as dist

    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    from megatron.core import parallel_state

    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    function = implementation(options.measure, options.vocabulary)
    generator = torch.Generator().manual_seed(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(options.device)

    hidden = random(options.tokens, options.hidden).to(dtype).requires_grad_()
    weight = random(options.vocabulary, options.hidden).mul_(options.hidden**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, options.vocabulary, (options.tokens,), generator=generator).to(options.device)
    upstream, direction = random(options.tokens), random(options.hidden)
    warm = [tensor.detach()[:64].clone().requires_grad_() for tensor in (hidden, weight)]
    (warm[0] @ warm[1].t()).log_softmax(-1).sum().backward()  # libraries and autograd's thread are there before
    best = {"cpu_seconds": float("inf"), "wall_seconds": float("inf")}
    watch = _watch_cuda if options.device == "cuda" else _watch_cpu
    extra_bytes = 0

    def both_ways() -> torch.Tensor:
        log_probs = function(hidden, weight, targets)
        log_probs.backward(upstream)
        return log_probs.detach()

    def forget() -> None:
        hidden.grad = weight.grad = None

    for _ in range(options.repeats):
        log_probs, seconds, more_bytes = watch(both_ways, forget)
        best = {key: min(best[key], seconds[key]) for key in best}
        extra_bytes = max(extra_bytes, more_bytes)
    gradients = hidden.grad, weight.grad
    return {
        **best,
        "extra_bytes": extra_bytes,
        "gradient_bytes": sum(gradient.numel() * gradient.element_size() for gradient in gradients),
        "log_probs": log_probs.double().cpu().tolist(),
        "grad_hidden": (gradients[0].float() @ direction).cpu().tolist(),
        "grad_weight": (gradients[1][targets].float() @ direction).cpu().tolist(),
    }


def implementation(name: str, vocab_size: int):
    """(hidden [t, H], weight [V, H], targets [t]) -> [t] log-probs."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    import megatron_powerflow.log_probs.plain as plain
    from megatron_powerflow.log_probs.token_log_probs import token_log_probs

    def full(hidden, weight, targets):
        return (hidden @ weight.t()).float().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)

    def megatron(hidden, weight, targets):
        return -vocab_parallel_cross_entropy((hidden @ weight.t())[:, None], targets[:, None]).squeeze(1)

    def trl(hidden, weight, targets):
        logits = (hidden @ weight.t()).view(SEQUENCES, -1, weight.shape[0])
        places = targets.view(SEQUENCES, -1, 1)
        if logits.dtype == torch.float32:
            normaliser = torch.stack([sequence.logsumexp(dim=-1) for sequence in logits])
            return (logits.gather(2, places).squeeze(2) - normaliser).flatten()
        rows = zip(logits, places, strict=True)
        return torch.cat([row.log_softmax(dim=-1).gather(1, place).squeeze(1) for row, place in rows])

    def ours(hidden, weight, targets, arithmetic=plain):
        sizes = {"vocab_size": vocab_size, "temperature": 1.0}
        return token_log_probs(hidden, weight, targets, tp_group=dist.group.WORLD, arithmetic=arithmetic, **sizes)

    def ours_triton(hidden, weight, targets):
        import megatron_powerflow.log_probs.triton as in_triton

        return ours(hidden, weight, targets, in_triton)

    return {"full": full, "megatron": megatron, "trl": trl, "ours": ours, "ours_triton": ours_triton}[name]


def _watch_cpu(function, forget):
    """(answer, seconds, peak resident bytes above those before). Linux: clear_refs sets the peak back."""
    forget()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    answer = function()
    seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    return answer, seconds, _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _watch_cuda(function, forget):
    """The same by CUDA events and the allocator, after one call that compiles; both seconds are the GPU's."""
    import torch

    function()
    forget()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    answer = function()
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 1000
    extra = torch.cuda.max_memory_allocated() - before
    return answer, {"cpu_seconds": seconds, "wall_seconds": seconds}, extra


if __name__ == "__main__":
    main()
