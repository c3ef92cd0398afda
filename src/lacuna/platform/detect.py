"""Which device a run uses, and how fast that device could be."""

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
"""Dense bf16 tensor-core peaks with fp32 accumulation; the first name that is part of the device's holds.

# ref: NVIDIA's data sheets of each product, the figures without sparsity
"""


@dataclass(frozen=True)
class Device:
    """type: "cuda", "mps" or "cpu"; memory in bytes, None where it is shared with the system."""

    type: str
    name: str
    memory: int | None = None

    @property
    def peak_bf16_flops(self) -> float | None:
        """Peak FLOP/s in bf16; None where it is not known, so that no MFU is made up."""
        if self.type != "cuda":
            return None
        return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name.lower() in self.name.lower()), None)


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
    return Device(wanted, {"mps": "Apple GPU (MPS)", "cpu": "CPU"}[wanted])
