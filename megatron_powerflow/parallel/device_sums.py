"""How exact, and how repeatable, are the sums that a GPU makes?

Exact: products of fp32 numbers are made in fp32, and partial sums of bf16 products are kept in fp32. NVIDIA's images
turn TF32 on (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), which keeps ten bits of each factor, and torch lets cuBLAS add up parts
of a product in bf16.

Repeatable (`run.deterministic`): the same numbers in the same order give the same sum, bit for bit, at every start. On
a CPU that holds anyway. On a GPU some kernels add up in whatever order their blocks end; torch, Transformer Engine and
NCCL each have a switch of their own. The environment's are read when the libraries start, so they are set here, before.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Switch:
    """A variable of the environment. values: those with which sums are repeatable; the first is ours."""

    name: str
    values: tuple[str, ...]
    why: str


# NCCL: the algorithms that Megatron-LM's --deterministic-mode admits
SWITCHES = (
    Switch("CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8"), "cuBLAS shares its workspace among streams"),
    Switch("NVTE_ALLOW_NONDETERMINISTIC_ALGO", ("0",), "Transformer Engine's attention adds up gradients in any order"),
    Switch(
        "NCCL_ALGO", ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"), "NCCL chooses the order of its sums"
    ),
)


def determinism_violations() -> list[str]:
    """Say which variables of the environment contradict `run.deterministic`."""
    return [
        f"run.deterministic=true, and the environment says {switch.name}={os.environ[switch.name]}, with which "
        f"{switch.why}; unset it, or set it to {' or '.join(switch.values)}"
        for switch in SWITCHES
        if os.environ.get(switch.name, switch.values[0]) not in switch.values
    ]


def set_device_sums(*, deterministic: bool) -> None:
    """Make sums exact, and repeatable where that is asked for. Before the first product on a GPU."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if deterministic:
        for switch in SWITCHES:
            os.environ.setdefault(switch.name, switch.values[0])
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # each buffer once more
