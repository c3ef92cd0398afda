"""`--dry-run`: everything that is known before training, and what would stop it."""

from collections.abc import Iterable, Iterator

from lacuna.config.training import PretrainConfig, TrainingConfig
from lacuna.errors import ConfigError
from lacuna.machine.detect import Device, choose_device, read_host
from lacuna.preflight.plan import plan_runs
from lacuna.preflight.show import show
from lacuna.preflight.starts import start_problems
from lacuna.words import gib


def dry_run(config: TrainingConfig, problems: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Lines, and whether each says what would stop the run. problems: that the caller has found.

    Imports the trainer, but loads no weights and writes nothing.
    """
    notes: list[str] = []
    found = [*problems, *start_problems(config, notes)]
    device = _device(config)
    room = read_host().memory if device.type == "cpu" else device.memory
    (one,) = plan_runs({config.run_folder: config}, device, room, notes.append)
    yield from ((line, False) for line in show(one))
    if one.not_counted is not None and not (isinstance(config, PretrainConfig) and config.streaming):
        found.append(one.not_counted)
    if one.fits is False and one.peak is not None and room is not None:
        found.append(f"a step takes {gib(one.peak)}, and {device.name} has {gib(room)}")
    yield from ((note, False) for note in dict.fromkeys(notes))
    yield from ((f"would stop: {problem}", True) for problem in dict.fromkeys(found))


def _device(config: TrainingConfig) -> Device:
    try:
        return choose_device(config.device)
    except ConfigError:
        return choose_device("cpu")
