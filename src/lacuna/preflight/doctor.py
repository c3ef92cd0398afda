"""Everything that training needs of a machine, tried.

What could end a process is tried in child processes, two at a time; what asks a disk or a network, meanwhile, here.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lacuna.config.files import read_layer
from lacuna.config.trainers import is_torchtune, load_trainer_config
from lacuna.errors import Problem
from lacuna.experiment.folder import summarise
from lacuna.preflight import services
from lacuna.preflight.check import Check, Examination, without_secrets
from lacuna.preflight.probes import reinstall
from lacuna.preflight.ready import problems_of, refusals, torchtune_problems
from lacuna.preflight.starts import CONFIG, needed_checks
from lacuna.preflight.storage import output_folder
from lacuna.runs.mapping import MAPPING, read_mapping

PROBES = (
    ["torch", "devices", "bf16", "transformers", "accelerate", "peft", "trl"],
    ["C compiler", "bitsandbytes", "flash-attn", "tensorboard", "datasets", "wandb", "huggingface_hub"],
)
"""What each of two processes tries; in this order a later one finds imported already what an earlier one needed."""
EVERYONE_NEEDS = {"Python", "torch"}
SECONDS = 120


def examine(files: Sequence[str]) -> Examination:
    """Check the machine; with files, also whether the run of this config could start on it.

    files: configs of one run, the later over the earlier; one of torchtune's; or a folder of generated configs, or its
    run_mapping.yaml. Raises ConfigError.
    """
    if len(files) == 1 and (Path(files[0]).is_dir() or Path(files[0]).name == MAPPING):
        mapping = read_mapping(files[0])
        return _examine_problems(problems_of(mapping, range(len(mapping.items)), None), mapping.head["trainer"])
    if len(files) == 1 and is_torchtune(read_layer(files[0])):
        return _examine_problems(torchtune_problems(Path(files[0])), "torchtune")
    config = load_trainer_config(files) if files else None
    needed = needed_checks(config) if config is not None else EVERYONE_NEEDS
    folder = Path(config.run_folder) if config is not None else Path.cwd()
    return _examine_machine(files if config is not None else [], folder, needed, [])


def _examine_problems(problems: Sequence[Problem], trainer: str) -> Examination:
    """The machine, and what was found of runs without starting their trainer. torchtune has a torch of its own."""
    stopping = refusals(problems)
    checks = [Check(CONFIG, "failed", problem, needed=True) for problem in stopping]
    unsure = [problem for problem in problems if not problem.stops_a_start]
    checks += [Check(CONFIG, "warning", problem) for problem in summarise(unsure)]
    checks += [] if stopping else [Check(CONFIG, "ok", "settings, files and data are there")]
    needed = {"Python", "torchtune"} if trainer == "torchtune" else EVERYONE_NEEDS
    return _examine_machine([], Path.cwd(), needed, checks)


def _examine_machine(
    files: Sequence[str], folder: Path, needed: Collection[str], known: Sequence[Check]
) -> Examination:
    """files: whose run is tried too. folder: whose disk is tried; it is needed where a run would write there."""
    hub = services.hub()
    offline = {"HF_HUB_OFFLINE": "1"} if hub.state != "ok" else {}
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run_probes, [*PROBES[0], *([CONFIG] if files else [])], files, offline)
        second = threads.submit(run_probes, PROBES[1], files, offline)
        others = [threads.submit(one) for one in (services.wandb_login, services.slurm, services.torchtune)]
        written = output_folder(folder, needed="output folder" in needed)
    python = Check("Python", "ok", f"{sys.version.split()[0]}, {sys.executable}")
    found = [python, *first.result(), *second.result(), written, hub, *(one.result() for one in others), *known]
    found.sort(key=lambda check: check.name == CONFIG)
    checks = [judged(check, needed) for check in found]
    return Examination(not any(check.needed and check.state == "failed" for check in checks), checks)


def judged(check: Check, needed: Collection[str]) -> Check:
    """With what is needed marked, and failed where it was only not there; without secrets."""
    state = "failed" if check.name in needed and check.state == "skipped" else check.state
    is_needed = check.needed or check.name in needed
    return replace(check, state=state, found=without_secrets(check.found), needed=is_needed)


def run_probes(names: Sequence[str], files: Sequence[str], more: Mapping[str, str]) -> list[Check]:
    """Try them in a child process. Where that ends, what it was at has failed, and another one goes on with the rest.

    more: environment variables for it.
    """
    found: list[Check] = []
    rest = list(names)
    while rest:
        answers, end = _child(rest, files, more)
        found += [check for answer in answers for check in answer]
        stopped_by_itself = any(check.state == "failed" for check in answers[-1]) if answers else False
        if len(answers) < len(rest) and not stopped_by_itself:
            name = rest[len(answers)]
            found.append(Check(name, "failed", end, reinstall(name, end)))
            rest = rest[1:]
        rest = rest[len(answers) :]
    return found


def _child(names: Sequence[str], files: Sequence[str], more: Mapping[str, str]) -> tuple[list[list[Check]], str]:
    """The answers for the first of the names, and how the child ended."""
    words = [sys.executable, "-X", "faulthandler", "-m", "lacuna.preflight.probes", ",".join(names), *files]
    settings = {"WANDB_MODE": "offline", "TRANSFORMERS_VERBOSITY": "error", **more}
    child = subprocess.Popen(
        words, env={**os.environ, **settings}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        output, said = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        output, said = child.communicate()
        return _answers(output), f"no answer in {SECONDS} s"
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["nothing was said"]
    if child.returncode < 0:
        place = next((line for line in lines if line.startswith("File ")), lines[-1])
        return _answers(output), f"killed by {signal.Signals(-child.returncode).name}: {place}"
    return _answers(output), f"ended with exit code {child.returncode}: {lines[-1]}"


def _answers(output: str) -> list[list[Check]]:
    return [[Check(**check) for check in json.loads(line)] for line in output.splitlines()]
