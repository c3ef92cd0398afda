"""Which devices are here, or go by a name, and how fast they could be."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lacuna.errors import ConfigError
from lacuna.words import did_you_mean

GIB = 2**30

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

NAMED = {
    "b200": ("NVIDIA B200", 178.3),
    "h200": ("NVIDIA H200", 139.7),
    "h100": ("NVIDIA H100 80GB HBM3", 79.1),
    "h100-pcie": ("NVIDIA H100 PCIe", 79.1),
    "h100-nvl": ("NVIDIA H100 NVL", 93.0),
    "a100": ("NVIDIA A100-SXM4-80GB", 79.1),
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", 39.3),
    "l40s": ("NVIDIA L40S", 44.3),
    "l4": ("NVIDIA L4", 22.0),
    "a10g": ("NVIDIA A10G", 21.9),
    "4090": ("NVIDIA GeForce RTX 4090", 23.6),
    "3090": ("NVIDIA GeForce RTX 3090", 23.6),
    "v100-32gb": ("Tesla V100-SXM2-32GB", 31.7),
}
"""CUDA's name of a device, and the GiB that torch finds on it: less than what it is sold by, for the driver keeps some.

# ref: "has a total capacity of …" in torch's messages, such as https://github.com/vllm-project/vllm/issues/27508 (H100)
"""
WITHOUT_BF16 = r"\b(V100|P100|T4)\b"
"""Devices of before Ampere (compute capability 8.0), which have no bf16: there it is emulated, slower than fp32."""


@dataclass(frozen=True)
class Device:
    """type: "cuda", "mps" or "cpu"; memory in bytes, None on a CPU."""

    type: str
    name: str
    memory: int | None = None

    @property
    def has_bf16(self) -> bool:
        """Whether to compute in bf16 there is of any use; a CPU always can, fast or not."""
        return self.type != "cuda" or re.search(WITHOUT_BF16, self.name) is None

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


def named_device(name: str) -> Device:
    """A device that need not be here: one of NAMED, `cpu`, or a Mac such as `m4-32gb`. Raises ConfigError.

    Of a Mac's memory Metal recommends two thirds for the GPU, from 36 GB on three quarters.
    # ref: recommendedMaxWorkingSetSize, 21845 MiB of 32 GB: https://github.com/ollama/ollama/issues/434;
    # 49152 MiB of 64 GB: https://github.com/ggml-org/llama.cpp/issues/1870
    """
    wanted = name.lower()
    if wanted in NAMED:
        product, gib = NAMED[wanted]
        return Device("cuda", product, int(gib * GIB))
    if mac := re.fullmatch(r"(m[1-9])-([1-9]\d{0,3})gb", wanted):
        size = int(mac[2]) * GIB
        return Device(
            "mps", f"Apple {mac[1].upper()}, {mac[2]} GB", size * 2 // 3 if size < 36 * GIB else size * 3 // 4
        )
    if wanted == "cpu":
        return Device("cpu", "CPU")
    known = [*NAMED, "m4-32gb", "cpu"]
    raise ConfigError(
        f"no device is known as {name!r}{did_you_mean(wanted, known)}; there are {', '.join(NAMED)}, "
        "a Mac by its chip and memory (m4-32gb), and cpu"
    )


@dataclass(frozen=True)
class Host:
    """cores and memory (bytes): what this process may use. bf16: the CPU's instructions for it. driver: NVIDIA's."""

    system: str
    cores: int
    memory: int
    bf16: list[str]
    driver: str | None


def read_host(root: Path = Path("/")) -> Host:
    """Of this machine; without torch. root: where proc and sys are."""
    quota, limit = cgroup_limits(root)
    free_to_run = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    known = {"amx_bf16", "avx512_bf16", "bf16"}
    return Host(
        f"{platform.system()} {platform.machine()}",
        min(free_to_run, max(1, int(quota))) if quota is not None else free_to_run,
        min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *([limit] if limit is not None else [])]),
        sorted(known.intersection(flags[0].split())) if flags else [],
        nvidia_driver(),
    )


def cgroup_limits(root: Path) -> tuple[float | None, int | None]:
    """Cores and bytes that the container, or the job, allows; None where it does not limit them.

    # ref: https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html
    """
    cores: list[float] = []
    memory: list[int] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        place = root / "sys/fs/cgroup" / controllers
        for part in (Path(path), *Path(path).parents):
            folder = place / str(part).lstrip("/")
            quota = _text(folder / "cpu.max").split()
            quota = quota or [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            if all(word.isdigit() for word in quota):
                cores.append(int(quota[0]) / int(quota[1]))
            sizes = [_text(folder / name).strip() for name in ("memory.max", "memory.limit_in_bytes")]
            memory += [int(size) for size in sizes if size.isdigit()]
    return min(cores, default=None), min(memory, default=None)


def nvidia_driver() -> str | None:
    """Its version; None where there is no NVIDIA GPU, or no driver for it."""
    return next(iter(nvidia_smi("driver_version")), None)


def nvidia_smi(query: str) -> list[str]:
    """What the driver answers for each GPU, values parted by commas, without units; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.splitlines() if line.strip()]


def accelerators() -> list[Device]:
    """Every CUDA device, or the GPU of a Mac. Imports torch."""
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return [Device("cuda", properties.name, properties.total_memory) for properties in found]
    return [choose_device("mps")] if torch.backends.mps.is_available() else []


def _text(file: Path) -> str:
    """Of a file of the kernel's; nothing where it is not there."""
    try:
        return file.read_text()
    except OSError:
        return ""


def check_gpus(gpus: int, device: str) -> None:
    """Raise ConfigError where this machine has fewer GPUs than are asked for."""
    import torch

    found = choose_device(device).type
    if device == "auto" and found != "cuda":
        raise ConfigError(f"gpus = {gpus}: no CUDA device is here; for {gpus} processes on the CPU say --device cpu")
    if found == "mps":
        raise ConfigError(f"gpus = {gpus}: there is one GPU here; for {gpus} processes on the CPU say --device cpu")
    if found == "cuda" and gpus > torch.cuda.device_count():
        raise ConfigError(f"gpus = {gpus}: there are {torch.cuda.device_count()} CUDA devices here")
