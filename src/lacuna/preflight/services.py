"""What a run may call: the Hugging Face hub, W&B, SLURM, torchtune's environment."""

import netrc
import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from lacuna.data.hub import ENDPOINT, unreachable
from lacuna.errors import ConfigError
from lacuna.preflight.check import Check
from lacuna.torchtune.environment import HOW_TO_GET_IT, VERSION, find_environment

SECONDS = 20


def hub() -> Check:
    """Whether it answers."""
    place = urlsplit(os.environ.get("HF_ENDPOINT") or ENDPOINT).hostname
    if os.environ.get("HF_HUB_OFFLINE"):
        return Check("hub", "skipped", "HF_HUB_OFFLINE is set: only what was downloaded before", "unset HF_HUB_OFFLINE")
    reason = unreachable()
    if reason is None:
        return Check("hub", "ok", f"{place} answers")
    mend = "where there is network: hf download NAME; behind a proxy: export HTTPS_PROXY=…"
    return Check("hub", "warning", f"{place} does not answer ({reason}): only what was downloaded before", mend)


def wandb_login() -> Check:
    """Whether there is a key, in the environment or in netrc: never what it is."""
    if os.environ.get("WANDB_MODE") == "offline":
        return Check("W&B login", "ok", "WANDB_MODE is offline: runs are logged in their folders")
    if os.environ.get("WANDB_API_KEY"):
        return Check("W&B login", "ok", "WANDB_API_KEY is set")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        if netrc.netrc(str(file)).authenticators(host):
            return Check("W&B login", "ok", f"{file} has {host}")
    except (OSError, netrc.NetrcParseError):
        pass
    return Check("W&B login", "skipped", "none: runs are logged offline, in their folders", "wandb login")


def slurm() -> Check:
    """Its partitions and the states of their nodes."""
    if shutil.which("sinfo") is None:
        return Check("SLURM", "skipped", "not on this machine")
    words = ["sinfo", "--noheader", "--format=%P|%a|%D|%T|%G"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    except subprocess.TimeoutExpired:
        return Check("SLURM", "warning", f"sinfo does not answer in {SECONDS} s", "scontrol ping")
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        return Check("SLURM", "warning", f"sinfo: {said.removeprefix('sinfo: ')}", "scontrol ping")
    rows = [line.strip().split("|") for line in answer.splitlines() if line.count("|") == 4]
    if not rows:
        return Check("SLURM", "warning", "it has no partitions for this user", "sinfo --all")
    partitions = [
        f"{name} {availability}, {nodes} {state}" + ("" if gpus == "(null)" else f" ({gpus})")
        for name, availability, nodes, state, gpus in rows
    ]
    usable = any(row[1] == "up" and row[3].rstrip("*~#!%$@^-") in ("idle", "mixed", "allocated") for row in rows)
    return Check(
        "SLURM", "ok" if usable else "warning", "; ".join(partitions), "" if usable else "sinfo --list-reasons"
    )


def torchtune() -> Check:
    """Normalise a vector by torchtune's own layer, in torchtune's own environment."""
    try:
        environment = find_environment(None)
    except ConfigError as error:
        return Check("torchtune", "warning", error.problems[0], "make torchtune")
    if environment is None:
        found = f"{HOW_TO_GET_IT.partition(': ')[0]}; only its own recipes need it"
        return Check("torchtune", "skipped", found, "make torchtune (in a checkout)")
    code = "import torch, torchtune.modules\nprint(float(torchtune.modules.RMSNorm(4)(torch.ones(1, 4)).sum().round()))"
    tried = subprocess.run([environment.python, "-c", code], capture_output=True, text=True, timeout=3 * SECONDS)
    if tried.stdout.strip() == "4.0":
        return Check("torchtune", "ok", f"{VERSION}: a layer, by {environment.python}")
    said = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
    return Check(
        "torchtune", "failed", f"{VERSION}, by {environment.python}: {said}", "rm -r .venv-torchtune; make torchtune"
    )
