"""A torchtune run, made to leave the same run folder as lacuna's own trainers do. Nothing here imports torch."""

import math
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import ConfigError, RunError
from lacuna.files import write_whole
from lacuna.processes import LOOK_SECONDS, SIGNALS, TAIL_CHUNKS, Asked, run_watched
from lacuna.runs.final import damage_of_final, entries_of, sync
from lacuna.runs.folder import locked, read_status, refuse_foreign_folder, starts_of, write_status
from lacuna.runs.logs import last_words
from lacuna.runs.metrics import MetricsLog
from lacuna.runs.provenance import add_facts, write_provenance
from lacuna.torchtune.facts import log_folder, recipe_of, torchtune_facts
from lacuna.torchtune.log import parse_bars, parse_lines, seed_in

WEIGHT_FILES = (".safetensors", ".bin", ".pt")
KEPT_TEXT = 2**16
"""Characters of the output in which an unfinished line may lie."""


def run_torchtune(
    words: Sequence[str], config: Path, devices: int, output_dir: str | None, problems: Sequence[str] = ()
) -> int:
    """Run torchtune, and write for it what lacuna's trainers write; of several nodes the first does. Its exit code, or
    1 where torchtune did not notice that it has trained nothing, or what is no number.

    words: `tune run RECIPE --config FILE`. devices: of all nodes. problems: that keep the run from starting.
    Raises RunError where the folder is in use, foreign, or holds a run of another config, and ConfigError for problems.
    """
    if output_dir is None or os.environ.get("SLURM_NODEID", "0") != "0":
        if problems:
            raise ConfigError(problems)
        return run_watched(words)[0]
    folder = Path(output_dir)
    refuse_foreign_folder(folder)
    with locked(folder):
        content = config.read_bytes()
        is_finished = (read_status(folder) or {}).get("state") == "finished"
        _refuse_other_config(folder, content, is_finished)
        if is_finished:
            _mend_final(folder)
            print(f"already finished: {folder}")
            return 0
        values, _ = parse_yaml(content.decode(), str(config))
        restarts = max(len(starts_of(folder)), int(os.environ.get("SLURM_RESTART_COUNT", 0)))
        if problems:
            write_status(folder, "failed", 0, None, restarts=restarts, reason=problems[0])
            raise ConfigError(problems)
        write_status(folder, "starting", 0, None, restarts=restarts)
        if not values.get("resume_from_checkpoint"):
            _drop_unfinished(folder, log_folder(values, folder))
        write_whole(folder / "config.yaml", content.decode())
        write_provenance(folder, words, torchtune_facts(values, words, config, devices))
        with ExitStack() as stack:
            record = Record(folder, values, devices, stack)
            write_status(folder, "running", 0, None)
            code, errors = _watch(words, record.take)
        state, reason = _ending(code, errors, record, is_shipped=not recipe_of(words).endswith(".py"))
        why: dict[str, Any] = {"reason": reason} if reason else {}
        if state == "finished":
            write_final(folder)
            why["final"] = entries_of(folder / "final")
        write_status(folder, state, record.step, record.total_steps, **record.shown, **why)
    if state == "failed" and code == 0:
        print(f"error: {reason}", file=sys.stderr)
    return code or int(state == "failed")


def _mend_final(folder: Path) -> None:
    """Raises RunError where the last epoch's files do not make the final folder again as it was."""
    if (damage := damage_of_final(folder)) is None:
        return
    print(f"warning: {folder / 'final'} is damaged ({damage}): it is made again from the last epoch")
    write_final(folder)
    if (still := damage_of_final(folder)) is not None:
        raise RunError(
            f"{folder / 'final'}: damaged: {still}, and so is the last epoch's folder, if it is there: restore them, "
            f"or move {folder} away to train anew"
        )


def _refuse_other_config(folder: Path, content: bytes, is_finished: bool) -> None:
    """Of a run that has trained nothing, nothing is lost."""
    before = folder / "config.yaml"
    has_run = is_finished or (folder / "metrics.jsonl").exists() or any(folder.glob("epoch_*"))
    is_other = before.exists() and before.read_bytes() != content
    if (folder / "config.toml").exists() or (has_run and is_other):
        raise RunError(f"output_dir {folder} holds a run of another config: choose another output_dir, or move it away")


def _drop_unfinished(folder: Path, logs: Path | None) -> None:
    """torchtune begins again: what its last start has logged is none of this one."""
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    shutil.rmtree(folder / "final", ignore_errors=True)
    if logs is not None and folder.resolve() in logs.resolve().parents:
        for file in logs.glob("log_*.txt"):
            file.unlink()


def _ending(code: int, errors: str, record: "Record", is_shipped: bool) -> tuple[str, str]:
    """State and reason. is_shipped: the recipe is torchtune's own, which shows its steps."""
    if code in {128 + number for number in SIGNALS}:
        return "interrupted", last_words(errors) or f"exit code {code}"
    if code:
        return "failed", last_words(errors) or f"exit code {code}"
    if is_shipped and not record.has_trained:
        return "failed", (
            "torchtune trained no step: batch_size × gradient_accumulation_steps × devices is more than its data has"
        )
    if record.broken is not None:
        return "failed", f"step {record.broken}: the loss is not a number; lower optimizer.lr, or look at the data"
    return "finished", ""


class Record:
    """Takes torchtune's output as it comes, and writes status.json and metrics.jsonl.

    Values are taken from where the config's logger writes; of a logger that writes neither to disk nor to standard
    output, the progress bar's losses are taken.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any], devices: int, stack: ExitStack) -> None:
        self.folder, self.devices, self.stack = folder, devices, stack
        self.epochs = epochs if type(epochs := values.get("epochs", 1)) is int else 1
        self.logger = str((values.get("metric_logger") or {}).get("_component_")).rpartition(".")[2]
        self.logs = log_folder(values, folder)
        self.read = {file: file.stat().st_size for file in self._files()}
        self.seed = values.get("seed")
        self.step, self.logged, self.has_trained = 0, 0, False
        self.total_steps: int | None = None
        self.broken: int | None = None
        self.shown: dict[str, float] = {}
        self.output = self.errors = ""
        self.log: MetricsLog | None = None

    def _files(self) -> list[Path]:
        return sorted(self.logs.glob("*.txt")) if self.logs is not None and self.logger == "DiskLogger" else []

    def take(self, output: str, errors: str) -> None:
        """What has been printed since the last call."""
        self.output, self.errors = self.output + output, self.errors + errors
        before = self.step
        for bar in parse_bars(self.errors):
            if self.total_steps is None:
                self.total_steps = bar.steps_per_epoch * self.epochs
                add_facts(self.folder, {"total_steps": self.total_steps})
            self.has_trained |= bar.done > 0
            if bar.step is not None and bar.loss is not None and bar.step > self.step:
                self.step = bar.step
                self._note(bar.step, {"loss": bar.loss}, is_logged=self.logger not in ("DiskLogger", "StdoutLogger"))
        if self.seed is None and (seed := seed_in(self.errors)) is not None:
            self.seed = seed
            add_facts(self.folder, {"seed": seed})
        for text in [self.output[: self.output.rfind("\n") + 1], *map(self._new_lines, self._files())]:
            for step, values in parse_lines(text, self.devices):
                self.step, self.has_trained = max(self.step, step), True
                self._note(step, values, is_logged=True)
        self.output = self.output[self.output.rfind("\n") + 1 :]
        end = max(self.errors.rfind("\r"), self.errors.rfind("\n"))
        self.errors = self.errors[max(end, 0) :][-KEPT_TEXT:]
        if self.step != before:
            write_status(self.folder, "running", self.step, self.total_steps, **self.shown)

    def _new_lines(self, file: Path) -> str:
        """The whole lines since the last call."""
        with file.open("rb") as opened:
            opened.seek(self.read.get(file, 0))
            text = opened.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read[file] = self.read.get(file, 0) + len(whole)
        return whole.decode(errors="replace")

    def _note(self, step: int, values: Mapping[str, float], is_logged: bool) -> None:
        """A step that is taken again, in a run that torchtune resumes, replaces what was logged of it."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if "loss" in values and "loss" not in finite and self.broken is None:
            self.broken = step
        if step == self.step:
            self.shown |= {name: finite[name] for name in ("loss", "tokens_per_second") if name in finite}
        if not is_logged:
            return
        if self.log is None or step <= self.logged:
            self.log = self.stack.enter_context(MetricsLog(self.folder, step - 1))
        self.log.write({"step": step, **finite})
        self.logged = step


def _watch(words: Sequence[str], take: Callable[[str, str], None]) -> tuple[int, str]:
    """Run a command that gets every signal too, and pass its output on; returns its exit code and the last errors.

    It keeps this process' open files: the lease of `lacuna run` holds as long as torchtune trains.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    with Asked() as asked, selectors.DefaultSelector() as selector:
        child = asked.child = subprocess.Popen(words, stdout=pipe, stderr=pipe, env=environment, close_fds=False)
        for number in asked.signals:
            child.send_signal(number)
        try:
            end = _pass_on(child, selector, take)
        except BaseException:
            child.terminate()
            child.wait()
            raise
        return asked.exit_code(child.wait()), end.decode(errors="replace")


def _pass_on(
    child: "subprocess.Popen[bytes]", selector: selectors.BaseSelector, take: Callable[[str, str], None]
) -> bytes:
    """Read what a child prints until it ends; returns the end of its standard error."""
    targets: dict[Any, IO[bytes]] = {child.stdout: sys.stdout.buffer, child.stderr: sys.stderr.buffer}
    for opened in targets:
        selector.register(opened, selectors.EVENT_READ)
    pending, end, taken = dict.fromkeys(targets, b""), b"", time.monotonic()
    while selector.get_map():
        for key, _ in selector.select(LOOK_SECONDS):
            source = key.fileobj
            chunk = os.read(key.fd, 4096)
            if not chunk:
                selector.unregister(source)
            targets[source].write(chunk)
            targets[source].flush()
            pending[source] += chunk
            end = (end + chunk)[-4096 * TAIL_CHUNKS :] if source is child.stderr else end
        if time.monotonic() - taken >= LOOK_SECONDS or not selector.get_map():
            take(*(text.decode(errors="replace") for text in pending.values()))
            pending, taken = dict.fromkeys(targets, b""), time.monotonic()
    return end


def write_final(folder: Path) -> None:
    """`final/`: the last epoch's files, by hard links where the disk has them; whole or not at all.

    Merged weights go without the adapter that torchtune leaves beside them: transformers would apply it a second time.
    """
    epochs = sorted(folder.glob("epoch_*"), key=lambda epoch: int(epoch.name.rpartition("_")[2]))
    if not epochs:
        return
    is_adapter = [file.name.startswith("adapter_") for file in epochs[-1].iterdir() if file.suffix in WEIGHT_FILES]
    left_out = shutil.ignore_patterns("adapter_*") if not all(is_adapter) else None
    partial, final = folder / ".final.partial", folder / "final"
    for leftover in (partial, final):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(epochs[-1], partial, copy_function=_link, ignore=left_out)
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    partial.rename(final)


def _link(source: str, target: str) -> None:
    """Weights take no room twice; whoever edits a small file edits one of the two."""
    if source.endswith(WEIGHT_FILES):
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
