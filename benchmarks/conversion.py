"""How fast, and in how much memory, does a model on disk become a Megatron checkpoint and a Hugging Face folder again?

    cp -> HF to Megatron -> cp -> Megatron to HF -> cp      the same bytes, the same disk, one run

The model is a llama of random bf16 weights, of the shape of Llama-2-7B by default. Each conversion is the command line
of tools/ in a process of its own; its peak memory is that process's largest resident set, mapped files included. Every
step ends with its files synced to the disk, cp's too. Before each, a file of the model's size is written and deleted,
so that each finds memory as warm: on a virtual machine a page's first use costs several times a write to it.

Left out: --verify, which reads everything twice more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

TOOLS = Path(__file__).parents[1] / "tools"
MEMORY_LIMIT = 3 * 2**30
SPEED_LIMIT = 0.5  # of cp's bytes per second
LLAMA_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    """A llama of random bf16 weights, written tensor by tensor."""
    import torch

    from megatron_powerflow.hf.config import read_architecture
    from megatron_powerflow.hf.families import FAMILIES
    from megatron_powerflow.hf.shapes import expected_tensors
    from megatron_powerflow.hf.shard_files import ShardFile, TensorInfo, plan_files, write_index

    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **sizes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    expected = expected_tensors(*read_architecture(folder, FAMILIES))
    files = plan_files([{name: TensorInfo("BF16", shape)} for name, shape in expected.items()], 5 * 10**9)
    largest = max(torch.Size(shape).numel() for shape in expected.values())
    numbers = torch.randn(largest + len(expected), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    start = 0
    for file in files:
        shard = ShardFile(folder / file.name, file.tensors)
        for name, info in file.tensors.items():  # each begins at another of the random numbers
            shard.add(name, numbers[start : start + torch.Size(info.shape).numel()].reshape(info.shape))
            start += 1
        shard.close()
    write_index(
        folder,
        {name: file.name for file in files for name in file.tensors},
        sum(file.num_bytes for file in files),
    )


def warm_memory(path: Path, num_bytes: int) -> None:
    """Have the page cache take as many pages, and give them free again."""
    block = bytes(2**20)
    with path.open("wb") as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def timed(command: Sequence[str], written: Path) -> tuple[float, int]:
    """Seconds until the command has ended and `written` is on the disk; its largest resident set in bytes."""
    started = perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    for path in written.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return perf_counter() - started, usage.ru_maxrss * 1024


def compare(work: Path, sizes: dict[str, int]) -> tuple[str, bool]:
    """The benchmark: its table, and whether both limits hold. Everything it wrote is removed."""
    work.mkdir(parents=True, exist_ok=True)
    model, megatron, back, copy = (work.resolve() / name for name in ("model", "megatron", "back", "copy"))
    try:
        # in a process of its own: a child's largest resident set is at least what its parent had when it was made
        write = (
            f"from pathlib import Path; from benchmarks.conversion import *; write_model(Path({str(model)!r}), {sizes})"
        )
        subprocess.run([sys.executable, "-c", write], check=True, cwd=TOOLS.parent)
        num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        python = [sys.executable]
        rows: list[tuple[str, float, int]] = []

        def measure(name: str, command: Sequence[str], written: Path) -> None:
            warm_memory(work / "filler", num_bytes)
            rows.append((name, *timed(command, written)))

        def measure_copy() -> None:
            measure("cp", ["cp", "-r", str(model), str(copy)], copy)
            shutil.rmtree(copy)

        measure_copy()
        forward = ["convert_hf_to_megatron.py", "--hf", str(model), "--out", str(megatron)]
        measure("HF to Megatron", [*python, str(TOOLS / forward[0]), *forward[1:]], megatron)
        measure_copy()
        backward = ["convert_megatron_to_hf.py", "--checkpoint", str(megatron), "--out", str(back)]
        measure("Megatron to HF", [*python, str(TOOLS / backward[0]), *backward[1:]], back)
        measure_copy()
    finally:
        for folder in (model, megatron, back, copy):
            shutil.rmtree(folder, ignore_errors=True)
    copies = [seconds for name, seconds, _ in rows if name == "cp"]
    mean = sum(copies) / len(copies)
    lines = [f"{num_bytes / 1e9:.2f} GB", f"{'':16}{'s':>8}{'MB/s':>8}{'of cp':>8}{'peak GiB':>10}"]
    for name, seconds, peak in rows:
        lines.append(
            f"{name:16}{seconds:8.1f}{num_bytes / seconds / 1e6:8.0f}{mean / seconds:8.2f}{peak / 2**30:10.2f}"
        )
    conversions = [(seconds, peak) for name, seconds, peak in rows if name != "cp"]
    holds = all(mean / seconds >= SPEED_LIMIT and peak < MEMORY_LIMIT for seconds, peak in conversions)
    lines.append(f"limits: {SPEED_LIMIT} of cp, {MEMORY_LIMIT / 2**30:.0f} GiB: {'hold' if holds else 'DO NOT HOLD'}")
    return "\n".join(lines), holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("conversion_benchmark"), help="needs four times the model")
    parser.add_argument("--layers", type=int, default=LLAMA_7B["num_hidden_layers"])
    arguments = parser.parse_args()
    printed, holds = compare(arguments.work, LLAMA_7B | {"num_hidden_layers": arguments.layers})
    print(printed)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
