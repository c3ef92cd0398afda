"""From what the user typed to plans."""

from collections.abc import Sequence

from lacuna.cost.flops import Speed
from lacuna.errors import ConfigError
from lacuna.machine.detect import Device, choose_device, named_device, read_host
from lacuna.preflight.plan import RunPlan, plan_runs
from lacuna.preflight.read import Runs, read_runs
from lacuna.preflight.recipes import plan_recipes


def make_plans(
    sources: Sequence[str], device_name: str | None, mfu: float | None, trace: bool, torchtune_python: str | None
) -> tuple[str, list[RunPlan], list[str]]:
    """What the sources are called, a plan for each of their runs, and what is to be said of all of them.

    mfu: what the time is worked out with; None takes a measured or a usual one. Raises ConfigError with every problem.
    """
    runs = read_runs(sources, torchtune_python)
    device = named_device(device_name) if device_name is not None else _device_of(runs)
    room = device.memory if device_name is not None or device.type != "cpu" else read_host().memory
    speed = Speed("given", mfu=mfu) if mfu is not None else None
    notes: list[str] = []
    if runs.base is None:
        plans = plan_runs(runs.configs, device, room, notes.append, speed, trace)
    elif trace:
        raise ConfigError("--trace is for our own trainers; torchtune's memory is planned by its formula alone")
    else:
        plans = plan_recipes(runs.recipes, runs.base, device, speed)
    return runs.name, plans, list(dict.fromkeys([*runs.notes, *notes]))


def _device_of(runs: Runs) -> Device:
    """The device of this machine that the configs ask for."""
    wanted = [config.device for config in runs.configs.values()]
    wanted += [values.get("device", "auto") for values in runs.recipes.values()]
    try:
        return choose_device(wanted[0])
    except ConfigError as error:
        raise ConfigError(f"{error}, or plan for another machine, such as --device h100") from error
