"""Where the metrics of a step go: metrics.jsonl, and a tracker if there is one."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lacuna.config.training import TrainingConfig
from lacuna.runs.metrics import Mark, MetricsLog
from lacuna.train.checkpoint import TrainingState
from lacuna.train.distributed import World
from lacuna.train.trackers import Log, open_tracker


@dataclass(frozen=True)
class Records:
    """What takes the metrics of a step; both None in all processes but the first."""

    log: MetricsLog | None
    track: Log | None

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.log is not None and self.track is not None:
            self.log.write({"step": step, **values})
            self.track(step, values)

    def mark(self) -> Mark | None:
        return None if self.log is None else self.log.mark()


def open_records(
    stack: ExitStack, config: TrainingConfig, folder: Path, resume_from: Path | None, state: TrainingState,
    console: Console, world: World,
) -> Records:  # fmt: skip
    """state: of the checkpoint that the run goes on from, else of step 0."""
    if not world.is_first:
        return Records(None, None)
    log = open_log(folder, resume_from, state, console)
    track = open_tracker(config, folder, state.step, config.written())
    return Records(stack.enter_context(log), stack.enter_context(track))


def open_log(folder: Path, resume_from: Path | None, state: TrainingState, console: Console) -> MetricsLog:
    """metrics.jsonl as it was at the checkpoint that the run goes on from; in another folder it begins anew."""
    is_own = resume_from is not None and resume_from.resolve().parent.parent == folder.resolve()
    mark = state.metrics if is_own else None
    return MetricsLog(folder, state.step if resume_from is not None else -1, mark, console.print)
