"""Which devices runs that go on at the same time get: without torch."""

from collections.abc import Mapping, Sequence

from lacuna.errors import ConfigError
from lacuna.machine.detect import nvidia_smi


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """CUDA's devices, as CUDA_VISIBLE_DEVICES names them; none where there is no NVIDIA driver."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        named = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in named if name not in ("", "-1")]
    return nvidia_smi("index")


def shares(
    jobs: int, gpus: int, wants: str, devices: Sequence[str], cores: int, environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """The variables of each of so many runs at a time: devices of their own, or on the CPU their part of the cores.

    gpus: the processes of a run. wants: `device` of their configs. One run at a time gets all there is.
    Raises ConfigError where there are not so many devices.
    """
    if jobs == 1 and not (wants == "cuda" and 0 < len(devices) < gpus):
        return [{}]
    if wants == "cuda" or (wants == "auto" and devices):
        if jobs * gpus > len(devices):
            raise ConfigError(
                f"--jobs {jobs}: runs of {gpus} device{'s' * (gpus != 1)} each need {jobs * gpus} in all, and "
                f"{len(devices) or 'none'} can be seen here: lower --jobs, or set CUDA_VISIBLE_DEVICES"
            )
        parts = [devices[job * gpus : (job + 1) * gpus] for job in range(jobs)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]
    if "OMP_NUM_THREADS" in environment:
        return [{}] * jobs
    return [{"OMP_NUM_THREADS": str(max(1, cores // (jobs * gpus)))}] * jobs
