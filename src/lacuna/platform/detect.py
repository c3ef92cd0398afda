"""Which device a run uses, and how fast that device could be."""

import re
from dataclasses import dataclass

from lacuna.errors import ConfigError

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "A10G": 70e12,
}
"""Dense bf16 tensor-core peaks with fp32 accumulation; the first name that is a word of the device's holds.

# ref: NVIDIA's data sheets of each product, the figures without sparsity
"""


OTHER_PRODUCTS = r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b"
"""Words that make another product, or a part of one, of a name that is known."""


@dataclass(frozen=True)
class Device:
    """type: "cuda", "mps" or "cpu"; memory in bytes, None on a CPU."""

    type: str
    name: str
    memory: int | None = None

    @property
    def peak_bf16_flops(self) -> float | None:
        """Peak FLOP/s in bf16; None where it is not known, so that no MFU is made up."""
        if self.type != "cuda":
            return None
        if re.search(OTHER_PRODUCTS, self.name):
            return None
        return next((peak for name, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{name}\b", self.name)), None)


def choose_device(wanted: str) -> Device:
    """wanted: "auto" takes CUDA, else MPS, else CPU. Raises ConfigError where a wanted device is not there."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(kind for kind, is_there in available.items() if is_there)
    if not available[wanted]:
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise ConfigError(f"device {wanted!r} is not available here (available: {there}); try --device auto")
    if wanted == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Device("cuda", properties.name, properties.total_memory)
    if wanted == "mps":
        return Device("mps", "Apple GPU (MPS)", torch.mps.recommended_max_memory())
    return Device("cpu", "CPU")
