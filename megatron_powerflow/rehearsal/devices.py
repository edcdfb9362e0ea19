"""What does a GPU have, as far as a rehearsal asks? Memory, rates and links, and which of them are assumptions.

Sources of the peak numbers: NVIDIA's data sheets of H100 SXM, H200 SXM and B200 (dense, without sparsity). Memory is
what a process finds, as `torch.cuda.get_device_properties` gives it. No number here was measured with this package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_powerflow.errors import UserError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU and its links.

    memory: bytes that a process finds. bf16_flops, fp8_flops: peak, a second. memory_rate: bytes a second. link_rate:
    bytes a second in one direction to the GPUs of its node; network_rate: to those of others, one adapter a GPU.
    """

    name: str
    memory: float
    bf16_flops: float
    fp8_flops: float
    memory_rate: float
    link_rate: float
    network_rate: float = 50e9  # 400 Gbit/s

    def flops(self, dtype: str) -> float:
        """Return the peak of matrix products in a precision.dtype; fp32 without TF32."""
        return {"bf16": self.bf16_flops, "fp8": self.fp8_flops, "fp32": 67e12}[dtype]


DEVICES = {
    "h100-80": Device("h100-80", 79.1 * GIB, 989e12, 1979e12, 3.35e12, 450e9),
    "h200-141": Device("h200-141", 139.8 * GIB, 989e12, 1979e12, 4.8e12, 450e9),
    "b200-180": Device("b200-180", 178.3 * GIB, 2250e12, 4500e12, 8.0e12, 900e9),
}
GPUS_PER_NODE = 8


def device_of(text: str) -> Device:
    """Return the device that `--device` names: one of DEVICES, or a number of GiB, which is an H100 with that memory.

    Raises UserError for anything else.
    """
    if text in DEVICES:
        return DEVICES[text]
    try:
        memory = float(text)
    except ValueError:
        memory = 0.0
    if not 1 <= memory <= 10_000:
        raise UserError(
            f"--device={text!r}: name one of {', '.join(DEVICES)}, or the memory of a GPU in GiB, such as 80"
        )
    return replace(DEVICES["h100-80"], name=f"{memory:g} GiB (otherwise as h100-80)", memory=memory * GIB)
