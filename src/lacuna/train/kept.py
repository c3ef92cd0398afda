"""The checkpoints of a run on the disk: which are whole, which are the best, which are superfluous. No torch here."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lacuna.errors import RunError
from lacuna.files import sha256_of
from lacuna.runs.metrics import validation_losses

Regular = Callable[[int], bool]


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def regular_saves(save_every: int, total_steps: int) -> Regular:
    """The steps at which a run is saved that no signal stops."""
    return lambda step: step % save_every == 0 or step == total_steps


def superfluous(folder: Path, keep_last: int, keep_best: int, regular: Regular) -> list[str]:
    """Names of checkpoints that are neither among the newest nor among the best."""
    checkpoints = sorted(folder.glob("step-*"))
    kept = {*checkpoints[-keep_last:], *best_first(folder, regular)[:keep_best]}
    return [path.name for path in checkpoints if path not in kept]


def best_first(folder: Path, regular: Regular) -> list[Path]:
    """Checkpoints by validation loss. What a signal saved in between is none of them: without it, it would not exist,
    and the best of a run would depend on when it was stopped."""
    logged = validation_losses(folder.parent)
    found = [(_validation_loss(path, logged), path) for path in folder.glob("step-*") if regular(step_of(path))]
    losses = {path: loss for loss, path in found if loss is not None}
    return sorted(losses, key=lambda path: (losses[path], path.name))


def _validation_loss(checkpoint: Path, logged: Mapping[int, float]) -> float | None:
    """The one that the checkpoint holds; of one that a signal saved before its validation, the one that was logged when
    that was made up for."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        if (loss := json.loads((checkpoint / "state.json").read_bytes())["validation_loss"]) is not None:
            return float(loss)
    return logged.get(step_of(checkpoint))


def best_checkpoint(folder: Path, regular: Regular) -> Path | None:
    """The undamaged checkpoint with the lowest validation loss."""
    return next((path for path in best_first(folder, regular) if damage(path) is None), None)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where all are as the manifest says."""
    try:
        text = (checkpoint / "manifest.json").read_text()
        files = json.loads(text)["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return "manifest.json is missing or damaged"
    if text != manifest_text(files):
        return "manifest.json is missing or damaged"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if sha256_of(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def newest_whole(folder: Path, warn: Callable[[str], None], flag: str = "--output-dir") -> Path | None:
    """The newest undamaged checkpoint; damaged ones are put aside under another name, with a warning each.

    flag: by which the user chooses another run folder. Raises RunError where there are checkpoints but all are damaged.
    """
    candidates: Sequence[Path] = sorted(folder.glob("step-*"), reverse=True)
    put_aside: list[Path] = []
    for candidate in candidates:
        reason = damage(candidate)
        if reason is None:
            for broken in put_aside:
                broken.rename(free_name(broken))
            return candidate
        warn(f"{candidate} is damaged ({reason}); trying the checkpoint before it")
        put_aside.append(candidate)
    if candidates:
        raise RunError(f"{folder}: every checkpoint is damaged: start again with another {flag}")
    return None


def free_name(path: Path) -> Path:
    names = [path.with_name(f"damaged-{path.name}")]
    names += [path.with_name(f"damaged-{path.name}-{number}") for number in range(2, 1000)]
    return next(name for name in names if not name.exists())


def entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def manifest_text(files: dict[str, Any]) -> str:
    """The manifest vouches for itself too: its text follows from the files' entries."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=2) + "\n"
