"""Which model a name stands for. Nothing here imports torch."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from lacuna.errors import ChangedBaseError, ModelError, RunError
from lacuna.runs.final import refuse_damaged_final
from lacuna.runs.folder import read_status
from lacuna.runs.identity import changed_base
from lacuna.runs.status import find_runs
from lacuna.words import did_you_mean

RUNS = Path("runs")


@dataclass(frozen=True)
class FoundModel:
    """What to load. model: a folder or a hub name, the base where there is an adapter, "" of a checkpoint.

    run: the run folder whose config says how a checkpoint or an adapter was trained.
    """

    name: str
    model: str
    revision: str | None = None
    adapter: Path | None = None
    checkpoint: Path | None = None
    run: Path | None = None
    note: str = ""


def find_model(name: str | None, adapter: str | None = None, allow_changed_base: bool = False) -> FoundModel:
    """name: a run folder, its final folder, a checkpoint, an adapter, a folder of a model, or a hub name; None for the
    newest finished run. adapter: goes over it. allow_changed_base: also over one that has changed since it was trained.

    Raises ModelError, RunError.
    """
    chosen = _choose(name, adapter)
    for folder in (Path(chosen.model), chosen.adapter):
        if folder is not None and folder.name == "final":
            refuse_damaged_final(folder.parent)
    if chosen.run is not None and not allow_changed_base and (changed := changed_base(chosen.run)):
        raise ChangedBaseError(chosen.name, changed)
    return chosen


def _choose(name: str | None, adapter: str | None) -> FoundModel:
    if adapter is None:
        return _find(name) if name is not None else _newest_run()
    over = _find(adapter)
    if over.adapter is None:
        raise ModelError(f"--adapter {adapter}: no adapter there (adapter_config.json, in it or in its final folder)")
    if name is None:
        return over
    base = _find(name)
    if base.adapter is not None or base.checkpoint is not None:
        raise ModelError(f"--model {name}: an adapter goes over a whole model; `lacuna merge` makes one of an adapter")
    return FoundModel(f"{base.name} with {over.adapter}", base.model, adapter=over.adapter, note=base.note)


def _find(name: str) -> FoundModel:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        is_path = name.startswith(("/", ".", "~")) or (folder.parent != Path() and folder.parent.is_dir())
        near = [str(path) for path in folder.parent.glob("*")] if is_path else []
        if folder.is_file() or did_you_mean(str(folder), near):
            kind = "a file, not a folder" if folder.is_file() else "no such folder"
            raise ModelError(f"{name}: {kind}{did_you_mean(str(folder), near) * (not folder.is_file())}")
        return FoundModel(name, name)
    if (folder / "adapter_config.json").is_file():
        base, revision = _base_of(folder)
        run = _run_of(folder.parent) if folder.name == "final" else None
        return FoundModel(str(folder), base, revision, adapter=folder, run=run)
    if (folder / "config.json").is_file():
        return FoundModel(str(folder), str(folder))
    if (folder / "state.json").is_file():
        run = _run_of(folder.parent.parent)
        if run is None:
            raise ModelError(f"{folder}: a checkpoint is loaded by its run's config.toml, which is not two levels up")
        return FoundModel(str(folder), "", checkpoint=folder, run=run)
    if (folder / "status.json").is_file():
        return _of_run(folder)
    raise ModelError(
        f"{folder}: no model in it: neither config.json, nor adapter_config.json, nor a run's status.json or a "
        "checkpoint's state.json"
    )


def _of_run(folder: Path) -> FoundModel:
    if (folder / "final").is_dir():
        return replace(_find(str(folder / "final")), name=str(folder))
    checkpoints = sorted(folder.glob("checkpoints/step-*"))
    state = (read_status(folder) or {}).get("state", "damaged")
    if not checkpoints:
        raise RunError(f"{folder}: the run ({state}) has no checkpoint yet")
    note = f"{folder} is not finished ({state}): this is its newest checkpoint"
    return FoundModel(str(checkpoints[-1]), "", checkpoint=checkpoints[-1], run=_run_of(folder), note=note)


def _run_of(folder: Path) -> Path | None:
    return folder if (folder / "config.toml").is_file() else None


def _base_of(adapter: Path) -> tuple[str, str | None]:
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        return str(settings["base_model_name_or_path"]), settings.get("revision")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(f"{adapter / 'adapter_config.json'}: damaged: {error}") from error


def _newest_run() -> FoundModel:
    try:
        found = [run.folder for run in find_runs(RUNS) if run.folder is not None]
    except RunError:
        found = []
    finished = [
        (float(status.get("time", 0)), folder)
        for folder in found
        if (status := read_status(folder) or {}).get("state") == "finished" and (folder / "final").is_dir()
    ]
    if not finished:
        raise RunError(f"no finished run below {RUNS}/ in {Path.cwd()}: name a run, a folder or a hub model by --model")
    return _of_run(max(finished)[1])
