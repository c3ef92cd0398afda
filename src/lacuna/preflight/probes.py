"""Whether what training is built on works, in a child process: `python -m lacuna.preflight.probes NAME…`.

torch, bitsandbytes, flash-attn and the C compiler make a small real run; of the others it is enough that they import.

A library that ends its process, at import or later, ends the child, not the doctor. Nothing here imports torch, or any
of them, before it is probed.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from subprocess import run

from lacuna.installation import install_command, pip_command
from lacuna.machine.detect import GIB, accelerators, nvidia_driver, read_host
from lacuna.preflight.check import Check
from lacuna.preflight.libraries import bitsandbytes, flash_attn

EXTRAS = {
    "torch": "train", "transformers": "train", "accelerate": "train", "datasets": "train", "peft": "finetune",
    "trl": "finetune", "bitsandbytes": "finetune", "wandb": "track", "tensorboard": "track", "huggingface_hub": "train",
}  # fmt: skip
"""Library to the extra of lacuna that installs it."""
CUDA_BUILD = pip_command("install", "--force-reinstall torch --index-url https://pypi.org/simple")
"""On Linux, PyPI's torch is the CUDA build; other indexes may offer the CPU's."""


def torch_build() -> Check:
    """Whether torch works, and uses the GPU that the driver sees."""
    import torch

    if int(torch.arange(4).sum()) != 6:
        raise RuntimeError("0 + 1 + 2 + 3 is not 6")
    driver, cuda = nvidia_driver(), torch.version.cuda
    built = f"{torch.__version__}, built " + (f"for CUDA {cuda}" if cuda else "without CUDA")
    if driver is None or torch.cuda.is_available():
        return Check("torch", "ok", built + (f", driver {driver}" if driver else ""))
    if cuda is None:
        return Check("torch", "warning", f"{built}, but there is an NVIDIA GPU (driver {driver})", CUDA_BUILD)
    try:
        torch.cuda.init()
        reason = "no device is visible: see CUDA_VISIBLE_DEVICES"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    mend = "update the NVIDIA driver, or install a torch for an older CUDA: https://pytorch.org/get-started/locally"
    return Check("torch", "failed", f"{built}, which does not go with driver {driver}: {reason}", mend)


def devices() -> Check:
    """GPUs with their memory, and the CPU."""
    import torch

    host, gpus = read_host(), accelerators()
    parts = [f"{gpu.name} ({(gpu.memory or 0) / GIB:.1f} GiB)" for gpu in gpus] or ["no GPU"]
    if gpus and gpus[0].type == "cuda":
        versions = [torch.cuda.get_device_capability(number) for number in range(len(gpus))]
        parts = [f"{part[:-1]}, compute capability {v[0]}.{v[1]})" for part, v in zip(parts, versions, strict=True)]
    fast = f"bf16 by {', '.join(host.bf16)}" if host.bf16 else "no instructions for bf16"
    return Check("devices", "ok", f"{'; '.join(parts)}; {host.cores} cores, {host.memory / GIB:.1f} GiB, {fast}")


def bf16() -> Check:
    """A product in bf16 that is exact there, on every device."""
    import torch

    gpus = accelerators()
    places = [f"cuda:{n}" for n in range(len(gpus))] if gpus and gpus[0].type == "cuda" else [gpu.type for gpu in gpus]
    for place in places or ["cpu"]:
        left = torch.arange(64 * 64, device=place).reshape(64, 64).remainder(7).bfloat16()
        product = left @ torch.eye(64, device=place, dtype=torch.bfloat16) * 2
        if not torch.equal(product.float().cpu(), left.float().cpu() * 2):
            raise RuntimeError(f"a product in bf16 is wrong on {place}")
    slow = [gpu.name for gpu in gpus if not gpu.has_bf16]
    if slow:
        return Check("bf16", "warning", f"only emulated on {', '.join(slow)}", "precision: fp32")
    return Check("bf16", "ok", f"right on {', '.join(places) or 'cpu'}")


def hub_files() -> list[Check]:
    """Where downloads go and whether there is room, and whether there is a token: never what it is."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_CACHE

    from lacuna.preflight.storage import nearest_folder

    place = nearest_folder(Path(HF_HUB_CACHE))
    free, writable = shutil.disk_usage(place).free / GIB, os.access(place, os.W_OK)
    found = f"{HF_HUB_CACHE}, {free:.0f} GiB free" + ("" if writable else ", not writable")
    cache = Check("hub cache", "ok", found)
    if not writable or free < 20:
        cache = Check("hub cache", "warning", found, "export HF_HOME=/a/folder/with/room (a 7B model takes 15 GiB)")
    if get_token() is None:
        return [cache, Check("hub token", "skipped", "none: gated models cannot be downloaded", "hf auth login")]
    return [cache, Check("hub token", "ok", "there is one")]


def compiler() -> Check:
    """Build what torch.compile and Triton build: C against Python's headers."""
    program = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    mend = "apt-get install gcc python3-dev (a Mac: xcode-select --install), or compile = false"
    if program is None:
        return Check("C compiler", "skipped", "none: torch.compile is off", mend)
    with tempfile.TemporaryDirectory() as folder:
        words = [program, "-shared", "-fPIC", "-x", "c", "-", "-o", f"{folder}/a.so"]
        words.append(f"-I{sysconfig.get_paths()['include']}")
        words += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        built = run(words, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60)
    if built.returncode == 0:
        return Check("C compiler", "ok", f"{program} builds against Python's headers")
    said = next((line for line in built.stderr.splitlines() if "error" in line), "it refused")
    return Check("C compiler", "failed", f"{program}: {said.strip()}", mend)


OF_TORCH: dict[str, Callable[[], Check]] = {"torch": torch_build, "devices": devices, "bf16": bf16}


def probe(name: str, files: list[str]) -> list[Check]:
    """Try one thing. What does not work is a check that failed, with what was said and how to mend it."""
    module = "torch" if name in OF_TORCH else name.replace("-", "_")
    try:
        if name == "config":
            from lacuna.preflight.starts import check_start

            return check_start(files)
        if name == "C compiler":
            return [compiler()]
        if importlib.util.find_spec(module) is None:
            return [Check(name, "skipped", "not installed", install(module))]
        if name == "huggingface_hub":
            return hub_files()
        return [OF_TORCH[name]() if name in OF_TORCH else _library(name)]
    except BaseException as error:
        said = str(error).strip().splitlines()
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        found = f"{_version(name)}{type(error).__name__}{': ' + said[0] if said else ''}"
        return [Check(name, "failed", found, reinstall(name, place))]


def reinstall(name: str, place: str) -> str:
    """What mends a library; or another one, where it broke in the files of that one. place: a path, or a line with it.

    torch is never blamed: what others ask of it may well be wrong.
    """
    broken = next((one for one in EXTRAS if f"/{one}/" in place and one != "torch"), name)
    return f"{pip_command('uninstall', broken)} && {install(broken)}" if broken in EXTRAS else ""


def install(name: str) -> str:
    """The command that installs a library."""
    if name in ("flash-attn", "flash_attn"):
        return pip_command("install", "flash-attn --no-build-isolation (only for CUDA)")
    return install_command(EXTRAS[name])


RUNS: dict[str, Callable[[], Check | str]] = {"bitsandbytes": bitsandbytes, "flash-attn": flash_attn}


def _library(name: str) -> Check:
    """Run, or import it, and compare its version with what lacuna wants."""
    result = RUNS[name]() if name in RUNS else _imported(name)
    if isinstance(result, Check):
        return result
    if unmet := _unmet(name):
        return Check(name, "warning", f"{_version(name)}{result}, but lacuna wants {unmet}", install(name))
    return Check(name, "ok", f"{_version(name)}{result}")


def _imported(name: str) -> str:
    importlib.import_module(name)
    return "imports"


def _version(name: str) -> str:
    """`0.21.2: `, or nothing where no version is known."""
    try:
        return f"{importlib.metadata.version(name)}: "
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unmet(name: str) -> str:
    """lacuna's own requirement where the version that is here does not meet it, else nothing."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("lacuna") or []]
        here = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    extra = {"extra": EXTRAS.get(name, "")}
    ours = [one for one in wanted if one.name == name and one.marker is not None and one.marker.evaluate(extra)]
    return next((str(one.specifier) for one in ours if not one.specifier.contains(here, prereleases=True)), "")


def main(names: list[str], files: list[str]) -> None:
    """Print a line of JSON for each thing that was tried, up to the first that failed: what follows wants a process
    without its remains. Libraries print to standard error instead.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in names:
        checks = probe(name, files)
        print(json.dumps([asdict(check) for check in checks]), file=answers, flush=True)
        if any(check.state == "failed" for check in checks):
            break
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
