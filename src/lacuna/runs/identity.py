"""What a run is made of beside its settings, file by file, so that a change of it is known and named. No torch here.

A checkpoint keeps it in its state, provenance.json the files behind it.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from lacuna.files import sha256_of, write_whole
from lacuna.runs.folder import starts_of

FIRST_PREPARATION = "1"
"""Of the data, before checkpoints told by which version they were prepared."""
Identity = dict[str, dict[str, str]]
"""Part of the run → the files or values that it consists of → the hash of each."""
KEPT_HASHES = 1000
REMEMBERED_BYTES = 2**20
"""Smaller files are read faster than their hash is looked up."""
SETTLED_SECONDS = 2.0
"""A file that was written so short a time ago may be written again within the resolution of its time."""


def identity_of(facts: Mapping[str, Any], validation: str | None) -> Identity:
    """facts: of provenance.json. validation: fingerprint of the rows that are held out; None without."""
    parts: Identity = {"data preparation": {"version": facts["data_preparation"]}}
    for part, files in (("base model", "model_files"), ("tokenizer", "tokenizer_files")):
        entries = facts.get(files) or []
        parts[part] = {Path(entry["path"]).name: entry["sha256"] for entry in entries}
    if facts.get("model_commit") is not None:
        parts["base model"] = {"commit": facts["model_commit"]}
    if facts.get("chat_template_sha256") is not None:
        parts["chat template"] = {"text": facts["chat_template_sha256"]}
    if validation is not None:
        parts["validation data"] = {"rows": validation}
    streamed = [entry for entry in facts.get("data_files") or [] if "path" in entry and entry["sha256"] is None]
    if streamed:
        parts["streamed data"] = {entry["path"]: f"{entry['bytes']} bytes of {entry['modified']}" for entry in streamed}
    return {part: values for part, values in parts.items() if values}


def preparation_of(folder: Path, resume: str) -> str | None:
    """The version of data preparation that a run was begun with; None where it begins now.

    resume: auto, never or a checkpoint, as it holds for this start.
    """
    if resume == "never":
        return None
    for checkpoint in sorted(folder.glob("checkpoints/step-*")) if resume == "auto" else [Path(resume)]:
        with suppress(OSError, ValueError, AttributeError):
            identity = json.loads((checkpoint / "state.json").read_bytes()).get("identity", {})
            return str(identity.get("data preparation", {}).get("version", FIRST_PREPARATION))
    return None


def first_day_of(folder: Path, resume: str) -> date | None:
    """The day of a run's first start, which its chat template goes on to write; None where it begins now.

    resume: auto, never or a checkpoint, as it holds for this start.
    """
    if resume == "never":
        return None
    run = folder if resume == "auto" else Path(resume).parent.parent
    first = (starts_of(run) or [{}])[0]
    day = first.get("template_date") or str(first.get("time", ""))[:10]
    with suppress(ValueError):
        return date.fromisoformat(day)
    return None


def differences(before: Identity, now: Identity) -> list[str]:
    """A line for each part that both know and that is another one, with what differs in it.

    A checkpoint of a version before these were kept knows none of them.
    """
    if not before:
        return []
    lines = []
    for part in dict.fromkeys([*before, *now]):
        then, found = before.get(part, {}), now.get(part, {})
        names = [name for name in dict.fromkeys([*then, *found]) if then.get(name) != found.get(name)]
        if names:
            lines.append(f"{part}: {', '.join(map(_how(then, found), names))}")
    return lines


def _how(then: Mapping[str, str], now: Mapping[str, str]) -> Any:
    def describe(name: str) -> str:
        if name not in then:
            return f"{name} was not there"
        return f"{name} has changed" if name in now else f"{name} is not there any more"

    return describe


def file_entry(file: Path, name: str, hashed: bool = True) -> dict[str, Any]:
    """name: of the file in provenance.json. modified: its time in nanoseconds. sha256: null where it is not hashed."""
    sha256 = cached_sha256(file) if hashed else None
    found = file.stat()
    return {"path": name, "bytes": found.st_size, "modified": found.st_mtime_ns, "sha256": sha256}


CHANGED = "made of something else than is there now: "
"""How the reason of a finished run begins whose files have changed since; their names follow."""


INPUTS = ("data_files", "model_files", "tokenizer_files")


def changed_base(run: Path) -> list[str]:
    """The files of the base model that hold something else now than when the adapter of a run folder was trained."""
    start = (starts_of(run) or [{}])[-1]
    return changed_inputs(start, kinds=("model_files",)) if start.get("trainer") == "finetune" else []


def changed_inputs(facts: Mapping[str, Any], directory: Path = Path(), kinds: Iterable[str] = INPUTS) -> list[str]:
    """Names of the files that a start of a run was made from, and that hold something else now.

    directory: from which relative paths are. kinds: of files. Files that are as long and as old as they were are not
    read; files that are not there any more are none that has changed.
    """
    changed = []
    for kind in kinds:
        for entry in facts.get(kind) or []:
            if "path" in entry and _has_changed(entry, directory):
                changed.append(entry["path"])
    return list(dict.fromkeys(changed))


def _has_changed(entry: Mapping[str, Any], directory: Path) -> bool:
    file = directory / Path(entry["path"]).expanduser()
    try:
        found = file.stat()
    except OSError:
        return False
    if found.st_size != entry["bytes"]:
        return True
    if found.st_mtime_ns == entry.get("modified"):
        return False
    if entry.get("sha256") is None:
        return entry.get("modified") is not None
    return bool(cached_sha256(file) != entry["sha256"])


def cached_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes; one that is as long and as old as when it was last read here is not read again."""
    place, found = str(file.resolve()), file.stat()
    if found.st_size < REMEMBERED_BYTES:
        return sha256_of(file)
    known = _read_cache().get(place)
    if known is not None and known[:2] == [found.st_size, found.st_mtime_ns]:
        return str(known[2])
    digest = sha256_of(file)
    if time.time() - found.st_mtime > SETTLED_SECONDS:
        _remember(place, [found.st_size, found.st_mtime_ns, digest])
    return digest


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lacuna" / "hashes.json"


def _read_cache() -> dict[str, list[Any]]:
    with suppress(OSError):
        found = _cache_file().stat()
        return _parse_cache(_cache_file(), found.st_ino, found.st_mtime_ns)
    return {}


@lru_cache(maxsize=1)
def _parse_cache(file: Path, inode: int, modified: int) -> dict[str, list[Any]]:
    """Once for each state of the file: a thousand runs ask it one after another."""
    with suppress(OSError, ValueError):
        values = json.loads(file.read_bytes())
        if isinstance(values, dict):
            return values
    return {}


def _remember(place: str, entry: Sequence[Any]) -> None:
    """The newest of them; where nothing can be written, nothing is remembered."""
    others: Iterable[tuple[str, Any]] = ((name, kept) for name, kept in _read_cache().items() if name != place)
    newest = [*others, (place, list(entry))][-KEPT_HASHES:]
    with suppress(OSError):
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_cache_file(), json.dumps(dict(newest)) + "\n")
