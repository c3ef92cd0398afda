"""What a named device is, and what a machine, or a container on it, allows."""

import re
from pathlib import Path

import pytest

from lacuna.errors import ConfigError
from lacuna.machine.detect import GIB, NAMED, cgroup_limits, named_device, read_host


def test_a_named_device_has_its_memory_and_peak() -> None:
    h100 = named_device("H100")
    assert (h100.type, h100.peak_bf16_flops) == ("cuda", 989.4e12)
    assert 79 < (h100.memory or 0) / GIB < 80
    assert named_device("h100-pcie").peak_bf16_flops == 756e12
    assert named_device("h100-nvl").peak_bf16_flops == 835e12
    for name in set(NAMED) - {"v100-32gb"}:
        device = named_device(name)
        assert device.has_bf16, name
        assert device.peak_bf16_flops, name
        sold = re.search(r"(\d+)GB", device.name)
        assert sold is None or (device.memory or 0) <= int(sold[1]) * GIB


def test_a_v100_has_no_bf16_and_so_no_peak_in_it() -> None:
    v100 = named_device("v100-32gb")
    assert not v100.has_bf16
    assert v100.peak_bf16_flops is None


@pytest.mark.parametrize(
    ("name", "chip", "mebibytes"),
    [
        ("m1-16gb", "Apple M1, 16 GB", 10922),
        ("m4-32gb", "Apple M4, 32 GB", 21845),
        ("M3-64GB", "Apple M3, 64 GB", 49152),
    ],
)
def test_a_mac_gives_a_part_of_its_memory_to_the_gpu(name: str, chip: str, mebibytes: int) -> None:
    """The numbers are Metal's own recommendedMaxWorkingSetSize on such Macs."""
    mac = named_device(name)
    assert (mac.type, mac.name, mac.memory // 2**20) == ("mps", chip, mebibytes)  # type: ignore[operator]
    assert mac.peak_bf16_flops is None


def test_the_cpu_is_a_name_too() -> None:
    assert named_device("cpu").type == "cpu"
    assert named_device("cpu").has_bf16


@pytest.mark.parametrize(("name", "hint"), [("h10", "'h100'"), ("m4-32", "'m4-32gb'"), ("4080", "'4090'")])
def test_an_unknown_name_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"no device is known as '{name}'; did you mean {hint}.*h100-nvl.*cpu"):
        named_device(name)


def kernel_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_containers_limits_are_the_smallest_of_its_cgroups(tmp_path: Path) -> None:
    second = {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/job/memory.max": str(8 * GIB),
        "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
    }
    assert cgroup_limits(kernel_files(tmp_path / "second", second)) == (4.0, 8 * GIB)
    first = {
        "proc/self/cgroup": "3:cpu,cpuacct:/job\n2:memory:/job\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(GIB),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    assert cgroup_limits(kernel_files(tmp_path / "first", first)) == (0.5, GIB)
    assert cgroup_limits(tmp_path / "nothing") == (None, None)


def test_the_host_says_what_this_process_may_use(tmp_path: Path) -> None:
    small = {
        "proc/self/cgroup": "0::/\n",
        "proc/cpuinfo": "processor : 0\nflags\t\t: fpu amx_bf16 avx512_bf16 amx_tile\n",
        "sys/fs/cgroup/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/memory.max": str(GIB),
    }
    host = read_host(kernel_files(tmp_path, small))
    assert (host.cores, host.memory, host.bf16) == (1, GIB, ["amx_bf16", "avx512_bf16"])
    here = read_host()
    assert here.cores >= 1
    assert here.memory > GIB
