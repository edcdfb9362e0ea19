"""How fast are this rank's device and its groups? Matrix products, and all-reduces of a small and of a large message.

The fastest of some tries counts: what another program took of the machine for a moment is no fault of it. Over NCCL on
GPUs and over gloo on CPUs, by the same lines. Left out: who is late or missing (`roll_call.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from megatron_powerflow.preflight.rank_groups import LARGE_BYTES, Round
from megatron_powerflow.preflight.reports import Measured

SMALL_TRIES, LARGE_TRIES, PRODUCT_TRIES = 10, 5, 5
CUDA_PRODUCTS, CPU_PRODUCTS = (8192, 16), (384, 64)  # width of the matrices, products


def measure_product(device: torch.device) -> float:
    """Return the seconds of some matrix products: bf16 on a GPU, fp32 with one thread on a CPU."""
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)  # ranks of one node share its cores
    width, count = CUDA_PRODUCTS if on_gpu else CPU_PRODUCTS
    left = torch.ones(width, width, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)

    def multiply() -> None:
        for _ in range(count):
            torch.mm(left, left)

    multiply()
    return _fastest(multiply, device, PRODUCT_TRIES)


def taken_bytes(device: torch.device) -> int | None:
    """Return what is taken of the GPU's memory; None on a CPU. Before this process has taken any."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def measure_groups(
    plan: Sequence[Round], rank: int, device: torch.device, timeout: timedelta, enter: Callable[[str], object]
) -> list[Measured]:
    """Measure each group of this rank, round by round. Collective over torch's default group, which is there.

    timeout: of a collective, after which torch gives up. enter: told, before each round, what is tried.
    """
    found = []
    for kind, groups in plan:
        ranks = next((group for group in groups if rank in group), None)
        if ranks is None:
            continue
        enter(f"all-reduce over {kind} with ranks {', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)}")
        # only its members make a group: those of other groups are elsewhere
        group = dist.new_group([*ranks], timeout=timeout, use_local_synchronization=True)
        small = torch.ones(1, device=device)
        large = torch.ones(LARGE_BYTES // 4, device=device)
        dist.all_reduce(large, group=group)  # connects the ranks
        is_right = bool((large == len(ranks)).all())
        large.zero_()
        found.append(
            Measured(
                kind,
                ranks,
                _fastest(partial(dist.all_reduce, small, group=group), device, SMALL_TRIES),
                _fastest(partial(dist.all_reduce, large, group=group), device, LARGE_TRIES),
                is_right,
            )
        )
    return found


def _fastest(function: Callable[[], object], device: torch.device, tries: int) -> float:
    best = float("inf")
    for _ in range(tries):
        _wait_for(device)
        began = time.perf_counter()
        function()
        _wait_for(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
