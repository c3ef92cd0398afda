"""What an experiment's run folders hold, each beside the settings that it should have. Nothing here imports torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lacuna.config.files import check, read_layer
from lacuna.config.trainers import CONFIGS
from lacuna.config.training import TrainingConfig
from lacuna.config.trees import get
from lacuna.errors import ConfigError, RunError
from lacuna.files import digest
from lacuna.reports.metric import Curve, final_value
from lacuna.reports.results import RunResult
from lacuna.runs.folder import read_status, starts_of
from lacuna.runs.mapping import MAPPING, GeneratedRun, RunMapping, read_mapping
from lacuna.runs.metrics import read_evaluation, read_metrics
from lacuna.runs.same import difference, recorded
from lacuna.runs.status import RunStatus, table
from lacuna.words import varies

SEED_NAMES = ("seed", "training.seed")
OTHER_SETTINGS = "other settings"
"""State of a run whose folder holds a run of other settings than the mapping's: it counts nowhere."""
NO_DESIGN = (
    f"no {MAPPING} is in it, and only that says which run is which: give the folder of generated configs "
    "(`lacuna generate EXPERIMENT.yaml --output DIR`), or its mapping; `lacuna status` shows any folder of runs"
)


@dataclass(frozen=True)
class Collected:
    """final_weights: what the configs that finished runs were started with say of them."""

    mapping: RunMapping
    runs: list[RunResult]
    final_weights: set[str]


@dataclass(frozen=True)
class Expected:
    """A run as its config says it. own: as our trainers read it; None: torchtune's, which is in values."""

    run: GeneratedRun
    own: TrainingConfig | None
    values: Mapping[str, Any]
    processes: int


def collect(where: str | Path) -> Collected:
    """Every run of a run mapping, or of the folder it is in.

    Raises RunError, ConfigError: no mapping, configs that were changed since, an evaluation.json that cannot be read.
    """
    file = Path(where)
    if file.name != MAPPING and not (file / MAPPING).is_file():
        raise RunError(f"{where}: {NO_DESIGN}" if file.exists() else f"{where}: no such folder, and no {MAPPING}")
    mapping = read_mapping(file)
    results: list[RunResult] = []
    weights: set[str] = set()
    problems: list[str] = []
    every = list(_expected(mapping))
    for expected, status in zip(every, table(mapping.file), strict=True):
        try:
            result, final_weights = _result(expected, status)
        except RunError as error:
            problems += error.problems
            continue
        results.append(result)
        weights |= final_weights
    if problems:
        raise RunError(problems)
    return Collected(mapping, results, weights)


def _expected(mapping: RunMapping) -> Iterator[Expected]:
    trainer = mapping.head["trainer"]
    changed = []
    for index in range(len(mapping.items)):
        run = mapping.run(index)
        if not run.config.is_file() or digest(run.config.read_bytes()) != run.sha256:
            changed.append(run.config.name)
            continue
        values = read_layer(run.config).values
        own = None if trainer == "torchtune" else check(CONFIGS[trainer], values, {})
        processes = own.gpus if own is not None else int(mapping.head.get("gpus", 1))
        yield Expected(run, own, values, processes)
    if changed:
        raise ConfigError(
            f"{mapping.file.parent}: {len(changed)} configs are missing, or were changed since they were generated "
            f"({', '.join(changed[:5])}{' …' if len(changed) > 5 else ''}): generate them again"
        )


def _result(expected: Expected, status: RunStatus) -> tuple[RunResult, set[str]]:
    """A run, and if it has finished, which weights its final folder holds. Raises RunError."""
    result = _unread(expected.run, status)
    folder = Path(status.folder or "")
    written = read_status(folder) if status.folder is not None else None
    if written is None:
        return result, set()
    facts = (starts_of(folder) or [{}])[-1]
    devices = facts.get("devices") or expected.processes
    if (foreign := _foreign(expected, folder, devices, result.state)) is not None:
        return replace(result, state=OTHER_SETTINGS, reason=foreign, facts=facts), set()
    curves = _curves(folder)
    config = _recorded(expected, folder)
    result = replace(
        result,
        curves={name: _finite(curve) for name, curve in curves.items()},
        budget=_budget(expected, config, devices, written, curves, facts),
        facts=facts,
    )
    if result.state != "finished":
        return result, set()
    metrics, lost = _final(folder, written, curves, config)
    weights: set[str] = set() if config is None else {config.final_weights}
    return replace(result, metrics=metrics, reason=lost or status.reason), weights


def _unread(run: GeneratedRun, status: RunStatus) -> RunResult:
    """What mapping and status say of a run; a seed among its settings is its seed."""
    settings = {name: value for name, value in run.settings.items() if name not in SEED_NAMES}
    seeds = [run.seed, *(run.settings.get(name) for name in SEED_NAMES)]
    return RunResult(
        id=run.id,
        arm=varies(settings) or "all runs",
        settings=settings,
        seed=next((seed for seed in seeds if seed is not None), None),
        folder=status.folder,
        state="not started" if status.state == "not submitted" else status.state,
        reason=status.reason,
        metrics={},
        curves={},
        budget={},
        facts={},
    )


def _recorded(expected: Expected, folder: Path) -> TrainingConfig | None:
    """The config that the run was started with, where it has come to writing it down."""
    if expected.own is None or not (folder / "config.toml").is_file():
        return expected.own
    return recorded(folder, type(expected.own))


def _foreign(expected: Expected, folder: Path, devices: int, state: str) -> str | None:
    """How the settings of the folder's run are others than the mapping's; None where they are the same.

    A run that has not finished may not have come to writing them down.
    """
    file = folder / ("config.yaml" if expected.own is None else "config.toml")
    if not file.is_file():
        return f"the folder has no {file.name}, which would say whose run it is" if state == "finished" else None
    if expected.own is None:
        is_same = digest(file.read_bytes()) == expected.run.sha256
        return None if is_same else f"{file} is not the config that the mapping names"
    try:
        return difference(folder, expected.own, devices, expected.run.settings)
    except ConfigError as error:
        return str(error)


def _curves(folder: Path) -> dict[str, Curve]:
    """Every number of metrics.jsonl, also those that are no finite ones."""
    curves: dict[str, Curve] = {}
    for line in read_metrics(folder):
        for name, value in line.items():
            if (type(value) is float or type(value) is int) and name != "step":
                if name not in curves:
                    curves[name] = []
                curves[name].append((line["step"], value))
    return curves


def _finite(curve: Curve) -> Curve:
    if all(math.isfinite(value) for _, value in curve):
        return curve
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _final(
    folder: Path, status: Mapping[str, Any], curves: dict[str, Curve], config: TrainingConfig | None
) -> tuple[dict[str, float], str]:
    """Each metric's final value, and which of them are no numbers and so left out. Raises RunError.

    Our own trainers log the last step: metrics that end before it are not those of the weights in final/.
    """
    evaluation = read_evaluation(folder)
    if twice := sorted(evaluation.keys() & curves.keys()):
        raise RunError(
            f"{folder / 'evaluation.json'}: {', '.join(twice)}: metrics.jsonl has that name too: choose another"
        )
    last, steps = max((curve[-1][0] for curve in curves.values()), default=0), status.get("step") or 0
    if config is not None and last < steps:
        return evaluation, f"metrics.jsonl ends at step {last} of {steps}: some of it is lost"
    values = {name: final_value(name, curve, config) for name, curve in curves.items()} | evaluation
    lost = [name for name, value in values.items() if not math.isfinite(value)]
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return finite, f"not a number: {', '.join(lost)}" if lost else ""


def _budget(
    expected: Expected, config: TrainingConfig | None, devices: int, status: Mapping[str, Any],
    curves: Mapping[str, Curve], facts: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """By the names of results.BUDGET; what is not known is left out."""
    steps = max([status.get("step") or 0, *(curve[-1][0] for curve in curves.values())])
    targets = curves.get("targets", [])
    known = {
        "steps": steps,
        "tokens": curves["tokens"][-1][1] if "tokens" in curves else None,
        "targets": sum(value for _, value in targets) if len(targets) == steps else None,
        **(_layout(config, devices) if config is not None else _torchtune_layout(expected.values, devices)),
        "parameters": facts.get("trained_parameters"),
        "seconds": status.get("seconds"),
        "devices": devices,
        "peak_memory_gib": max((value for _, value in curves.get("peak_memory_gib", [])), default=None),
    }
    if known["seconds"] is not None and facts.get("device") and not is_cpu(facts):
        known["gpu_hours"] = known["seconds"] * devices / 3600
    return {name: value for name, value in known.items() if value is not None}


def _layout(config: TrainingConfig, devices: int) -> dict[str, Any]:
    return {"batch_size": config.rows_in_step(devices), "packing": config.packing, "epochs": config.whole_epochs}


def _torchtune_layout(values: Mapping[str, Any], devices: int) -> dict[str, Any]:
    rows, accumulated = values.get("batch_size"), values.get("gradient_accumulation_steps") or 1
    batch = rows * accumulated * devices if isinstance(rows, int) and isinstance(accumulated, int) else None
    return {"batch_size": batch, "packing": get(values, "dataset.packed") is True, "epochs": values.get("epochs")}


def is_cpu(facts: Mapping[str, Any]) -> bool:
    return str(facts.get("device", "")).upper().startswith("CPU")
