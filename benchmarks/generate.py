"""`lacuna generate` against OmegaConf in a loop and Hydra's multirun: seconds for so many configs on one core.

Every program starts from the same torchtune config, varies the same four settings, gives each run its own output_dir,
and writes a complete file for each run; files that read back equal prove the same work. Start-up counts for all. The
programs take turns, so that a noisy machine is noisy for all.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

from omegaconf import OmegaConf

from lacuna.config.yaml_format import dump_yaml
from lacuna.torchtune.environment import need_environment

CONFIG = "llama3_2/1B_lora_single_device.yaml"
RECIPE = "lora_finetune_single_device"
VARIABLES: dict[str, list[Any]] = {
    "model.lora_rank": [4, 8, 16, 32, 64],
    "optimizer.lr": [1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3],
    "optimizer.weight_decay": [0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5],
    "seed": list(range(1000)),
}
LARGEST_HYDRA = 100
LARGEST_VALIDATED = 1000
COMPARED = 100
OMEGACONF = """
import itertools, json, sys
from omegaconf import OmegaConf

base_file, variables, width, output = sys.argv[1:]
base = OmegaConf.load(base_file)
for index, (rank, rate, decay, seed) in enumerate(itertools.product(*json.loads(variables).values())):
    name = f"run_{index:0{width}}"
    override = {
        "model": {"lora_rank": rank},
        "optimizer": {"lr": rate, "weight_decay": decay},
        "seed": seed,
        "output_dir": f"{base.output_dir}/{name}",
    }
    OmegaConf.save(OmegaConf.merge(base, override), f"{output}/{name}.yaml")
"""
HYDRA = """
import os
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path=None)
def job(config):
    name = f"run_{HydraConfig.get().job.num:0{os.environ['WIDTH']}}"
    config.output_dir = f"{config.output_dir}/{name}"
    OmegaConf.save(config, f"{os.environ['OUTPUT']}/{name}.yaml")

job()
"""
Program = Callable[[Path], None]
"""Writes all configs into an empty folder."""


def choose(size: int) -> dict[str, list[Any]]:
    """The first values of each variable, so that the product has so many combinations."""
    chosen, rest = {}, size
    for path, values in VARIABLES.items():
        count = math.gcd(rest, len(values)) if path != "seed" else rest
        chosen[path], rest = values[:count], rest // count
    if math.prod(len(values) for values in chosen.values()) != size:
        raise SystemExit(f"{size} configs: too many; at most {math.prod(map(len, VARIABLES.values()))}")
    return chosen


def run(words: list[str], **surroundings: str) -> None:
    outcome = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **surroundings})
    if outcome.returncode != 0:
        raise SystemExit(f"{' '.join(words[:3])} …\n{outcome.stdout[-2000:]}{outcome.stderr[-2000:]}")


def make_programs(folder: Path, size: int) -> dict[str, Program]:
    variables = choose(size)
    width = str(max(3, len(str(size - 1))))
    base, experiment = folder / "base.yaml", folder / f"experiment_{size}.yaml"
    varied = {path: values for path, values in variables.items() if path != "seed"}
    head = {"experiment_name": "benchmark", "base_config_file": str(base), "recipe": RECIPE}
    experiment.write_text(dump_yaml({**head, "variables": varied, "seeds": variables["seed"]}))
    (folder / "with_omegaconf.py").write_text(OMEGACONF)
    (folder / "with_hydra.py").write_text(HYDRA)

    def lacuna(*options: str) -> Program:
        command = str(Path(sys.executable).with_name("lacuna"))
        return lambda output: run([command, "generate", str(experiment), "--output", str(output), *options])

    def omegaconf(output: Path) -> None:
        script = str(folder / "with_omegaconf.py")
        run([sys.executable, script, str(base), json.dumps(variables), width, str(output)])

    def hydra(output: Path) -> None:
        sweep = [f"{path}={','.join(map(repr, values))}" for path, values in variables.items()]
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
        where = ["--config-dir", str(folder), "--config-name", "base", f"hydra.sweep.dir={folder / 'multirun'}"]
        words = [sys.executable, str(folder / "with_hydra.py"), "--multirun", *where, *quiet, *sweep]
        run(words, WIDTH=width, OUTPUT=str(output))

    programs: dict[str, Program] = {"lacuna": lacuna("--no-validate")}
    if size <= LARGEST_VALIDATED:
        programs["lacuna with torchtune's checks"] = lacuna()
    programs["OmegaConf"] = omegaconf
    if size <= LARGEST_HYDRA:
        programs["Hydra"] = hydra
    return programs


def measure(program: Program, output: Path) -> float:
    """Nothing is deleted between measurements: on ext4, new files are slow for a while after that."""
    output.mkdir()
    start = time.perf_counter()
    program(output)
    return time.perf_counter() - start


def write_plainly(source: Path) -> tuple[Program, int]:
    """The floor: the same bytes as the same files, without working anything out; and the number of bytes."""
    contents = {file.name: file.read_bytes() for file in sorted(source.iterdir())}

    def program(output: Path) -> None:
        for name, content in contents.items():
            (output / name).write_bytes(content)

    return program, sum(map(len, contents.values()))


def refuse_other_work(ours: Path, theirs: Path, name: str, size: int) -> None:
    """Ends the benchmark where a program wrote other files, or other values in one of a hundred."""
    files = [file.name for file in sorted(ours.glob("run_*.yaml")) if file.name != "run_mapping.yaml"]
    written = [file.name for file in sorted(theirs.glob("run_*.yaml")) if file.name != "run_mapping.yaml"]
    if len(files) != size or written != files:
        raise SystemExit(f"{size} configs: lacuna wrote {len(files)} files, {name} {len(written)} or of other names")
    for file in files[:: max(1, size // COMPARED)]:
        if OmegaConf.load(ours / file) != OmegaConf.load(theirs / file):
            raise SystemExit(f"{size} configs, {file}: not the same work: {name} wrote other values than lacuna")


def row(size: int, program: str, seconds: float, ours: float, goal: str = "") -> str:
    return f"| {size} | {program} | {short(seconds)} | {size / seconds:.0f} | {short(seconds / ours)} | {goal} |"


def short(number: float) -> str:
    return f"{number:.2f}" if number >= 0.1 else f"{number:.2g}"


def reached(seconds: float, goal: float) -> str:
    return f"under {goal:.0f} s: {'reached' if seconds < goal else 'missed'}"


def compare(folder: Path, size: int, rounds: int, hydra_seconds: float | None) -> tuple[list[str], float | None]:
    """The table's rows for so many configs, and Hydra's seconds for one config, for the sizes too large for it."""
    programs = make_programs(folder, size)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name, program in programs.items():
            output = folder / f"{name} {size} {turn}"
            seconds[name].append(measure(program, output))
            refuse_other_work(folder / f"lacuna {size} {turn}", output, name, size)
    plain, total = write_plainly(folder / f"lacuna {size} 0")
    floor = statistics.median(measure(plain, folder / f"plain {size} {turn}") for turn in range(rounds))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians["lacuna"]
    goals = {("lacuna", 10_000): 10.0, ("lacuna with torchtune's checks", 100): 10.0}
    rows = [
        row(size, name, value, ours, reached(value, goals[name, size]) if (name, size) in goals else "")
        for name, value in medians.items()
    ]
    if "Hydra" in medians:
        hydra_seconds = medians["Hydra"] / size
    elif hydra_seconds is not None:
        rows.append(row(size, f"Hydra, extrapolated from {LARGEST_HYDRA}", hydra_seconds * size, ours))
    rows.append(row(size, f"floor: plain Python writes these {total / 1e6:.2f} MB", floor, ours))
    return rows, hydra_seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=3, help="up to 1000 configs; more are generated once")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(need_environment(None).packages / "recipes" / "configs" / CONFIG, folder / "base.yaml")
        print("| configs | program | seconds | configs/s | time / lacuna's | goal |\n|---|---|---|---|---|---|")
        hydra_seconds = None
        for size in sorted(arguments.sizes):
            rounds = arguments.rounds if size <= 1000 else 1
            rows, hydra_seconds = compare(folder, size, rounds, hydra_seconds)
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
