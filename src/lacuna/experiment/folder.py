"""The folder of generated configs: files of ours are replaced when asked, others never, and all together or none."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import ConfigError, Problem
from lacuna.files import digest, try_lock, write_whole
from lacuna.runs.mapping import MAPPING, SEAL

STAGE = ".generating"
READY = ".generated"
"""A stage that was found right and is being moved in."""
REPORT = "validation_report.txt"
TITLE = "lacuna validation report"
SHOWN_PLACES = 3


@contextmanager
def staged(output: Path, files: Mapping[str, str], force: bool) -> Iterator[Path]:
    """Write the files aside, give that folder to the caller, and move them in if nothing was raised.

    A kill while they are moved is made good by the next call, which goes on where it stopped.
    Raises ConfigError, before anything is written, where a file is in the way: one that was not generated, or was
    changed since, or, without force, one of another experiment.
    """
    contents = {name: text.encode() for name, text in files.items()}
    stage, ready = output / STAGE, output / READY
    with _alone_in(output):
        try:
            with _told(output):
                if ready.exists():
                    _move_in(ready, output)
                _refuse_overwriting(output, contents, force)
                shutil.rmtree(stage, ignore_errors=True)
                stage.mkdir()
                for name, content in contents.items():
                    (stage / name).write_bytes(content)
            yield stage
            with _told(output):
                stage.rename(ready)
                _move_in(ready, output)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Hold the folder, waiting for who has it; it is made, and taken away again if it stays empty."""
    with _told(output):
        if output.exists() and not output.is_dir():
            raise ConfigError(f"{output} is a file: choose another --output")
        is_new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY)
    try:
        if not try_lock(handle):
            print(f"another process generates into {output}: waiting for it", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if is_new and not any(output.iterdir()):
                output.rmdir()
    finally:
        os.close(handle)


@contextmanager
def _told(output: Path) -> Iterator[None]:
    """What the file system refuses, as a message."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from None


def _move_in(ready: Path, output: Path) -> None:
    """The files of a complete stage, the mapping last; before it is there, the old one tells what is left over."""
    if (ready / MAPPING).is_file():
        for name in set(_written_by(output)) - set(_written_by(ready)):
            (output / name).unlink(missing_ok=True)
        for file in sorted(ready.iterdir(), key=lambda file: file.name == MAPPING):
            file.replace(output / file.name)
    ready.rmdir()


def _refuse_overwriting(output: Path, contents: Mapping[str, bytes], force: bool) -> None:
    ours = _written_by(output)
    present = [name for name in dict.fromkeys([*contents, *ours]) if (output / name).exists()]
    found = {name: digest((output / name).read_bytes()) for name in present if (output / name).is_file()}
    changed = [name for name in present if name not in contents or found.get(name) != digest(contents[name])]
    foreign = sorted(name for name in changed if name not in found or found[name] != ours.get(name))
    if foreign:
        raise ConfigError(
            f"{output}: {', '.join(foreign[:5])}{' …' if len(foreign) > 5 else ''} was not generated, or was changed "
            "since: move it away, or choose another --output"
        )
    if changed and not force:
        raise ConfigError(
            f"{output} holds the configs of another experiment, or of another version of this one: pass --force "
            "(force=True) to replace them, or choose another --output"
        )


def _written_by(folder: Path) -> dict[str, str]:
    """The files that a mapping lists, and itself, with their hashes; nothing where someone has changed the mapping."""
    file = folder / MAPPING
    if not file.is_file():
        return {}
    text = file.read_bytes()
    head, _, body = text.partition(b"\n")
    if head != SEAL + digest(body).encode():
        return {}
    values, _ = parse_yaml(body.decode(), str(file))
    return {MAPPING: digest(text), **{run["config"]: run["sha256"] for run in values["runs"]}}


def summarise(problems: Sequence[Problem]) -> list[str]:
    """One line for each problem, with all runs that have it."""
    runs: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        runs.setdefault((problem.path, problem.what, problem.todo), []).append(problem.run)
    return [f"{span_of(ids)}: {path}{' ' * bool(path)}{what}: {todo}" for (path, what, todo), ids in runs.items()]


def warning_lines(problems: Sequence[Problem], trainer: str) -> list[str]:
    """One line for what is not on this machine, by what to do about it, and for each thing that the trainer would
    refuse when it starts."""
    here: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.kind == "here":
            here.setdefault(problem.todo, []).append(problem)
    lines = []
    for todo, found in here.items():
        places = list(dict.fromkeys(f"{problem.path} {problem.what}" for problem in found))
        more = f" and {len(places) - SHOWN_PLACES} more" if len(places) > SHOWN_PLACES else ""
        runs = span_of(list(dict.fromkeys(problem.run for problem in found)))
        lines.append(f"not on this machine, {runs}: {'; '.join(places[:SHOWN_PLACES])}{more}: {todo}")
    refused = summarise([problem for problem in problems if problem.kind == "start"])
    return lines + [f"{trainer} would refuse to start {line}" for line in refused]


def span_of(ids: Sequence[str]) -> str:
    """One run by its id, several by their number, the first and the last."""
    return ids[0] if len(ids) == 1 else f"{len(ids)} runs ({ids[0]} … {ids[-1]})"


def _title(output: Path) -> str:
    return f"{TITLE} of {output.resolve().name}/"


def _table(output: Path, problems: Sequence[Problem]) -> str:
    rows = [f"{one.run}\t{one.path}\t{one.what}\t{one.todo}" for one in problems]
    return "\n".join([_title(output), "", "run\tpath\twhat\twhat to do", *rows]) + "\n"


def _is_foreign(file: Path) -> bool:
    """Whether a file of the report's name is none of lacuna's."""
    return file.exists() and not file.read_text(encoding="utf-8", errors="replace").startswith(TITLE)


def _outer_report(output: Path) -> Path:
    return Path(os.path.relpath(output.resolve().parent / REPORT))


def write_report(output: Path, problems: Sequence[Problem]) -> list[str]:
    """Every problem of every run into a file beside the folder; returns the summary, which names that file."""
    file, lines = _outer_report(output), summarise(problems)
    if _is_foreign(file):
        return [*lines, f"{file} is not a report of lacuna's and stays as it is; this list stands nowhere else"]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, _table(output, problems))
    before = "; what is there is from before" if (output / MAPPING).exists() else ""
    return [*lines, f"{output}: nothing was written{before}; every problem of every run: {file}"]


def remove_report(output: Path) -> None:
    """A report that no longer holds."""
    file = _outer_report(output)
    if file.exists() and file.read_text(encoding="utf-8", errors="replace").partition("\n")[0] == _title(output):
        os.unlink(file)


def put_warnings(output: Path, problems: Sequence[Problem]) -> list[str]:
    """Every warning of every run into a file beside the mapping, in place of the last one; returns what is to be said
    where that cannot be."""
    file = output / REPORT
    if _is_foreign(file):
        return [f"{file} is not a report of lacuna's and stays as it is"] if problems else []
    with _told(output):
        if problems:
            write_whole(file, _table(output, problems))
        else:
            file.unlink(missing_ok=True)
    return []
