"""A run's config as it was, and what has changed around it since. Nothing here imports torch."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacuna.config.files import read_layer
from lacuna.config.trainers import CONFIGS, load_trainer_config, top_keys
from lacuna.config.yaml_format import dump_yaml, parse_yaml
from lacuna.data.hub import stay_offline_if_unreachable
from lacuna.errors import LacunaError, RunError
from lacuna.files import digest
from lacuna.machine.detect import Device
from lacuna.runs.folder import starts_of
from lacuna.runs.provenance import data_facts, given_template, hardware, model_facts, software, tokenizer_facts
from lacuna.torchtune.facts import torchtune_device, torchtune_inputs, torchtune_software

COMPARED = (
    "python", "platform", "device", "cpu", "driver", "tokenizer_sha256", "chat_template_sha256",
    "model_commit", "weights_fingerprint", "parent_run",
)  # fmt: skip

NEEDED = ("trainer", "command", "experiment", "config_files", "device", "tokenizer", "packages", "git", "data_files")


@dataclass(frozen=True)
class Replay:
    """name: of the config; kept: where the run folder has it, or its values. differences: a line each, from the starts
    that made the weights.

    start: the last one in provenance.json.
    """

    config: bytes
    name: str
    kept: Path
    notes: list[str]
    differences: list[str]
    start: Mapping[str, Any]


def replay(run: str | Path) -> Replay:
    """Raises RunError: no run, one without its provenance, or its config was edited since it started."""
    folder = Path(run)
    kept = next((file for name in ("config.toml", "config.yaml") if (file := folder / name).is_file()), None)
    if kept is None:
        raise RunError(f"{run}: not a run folder: there is neither config.toml nor config.yaml in it")
    starts = starts_that_made_it(starts_of(folder)) or [{}]
    start: dict[str, Any] = starts[-1]
    if start.get("config_sha256") is None:
        raise RunError(f"{folder / 'provenance.json'}: holds no hash of the config, so nothing proves it is the run's")
    if missing := [name for name in NEEDED if any(name not in one for one in starts)]:
        raise RunError(f"{folder / 'provenance.json'}: says nothing of {', '.join(missing)}: it cannot be compared")
    content = kept.read_bytes()
    if digest(content) != start["config_sha256"]:
        raise RunError(f"{kept}: was edited since the run started: its SHA-256 is not {start['config_sha256']}")
    config, name, notes = (content, kept.name, []) if kept.suffix == ".yaml" else _as_given(kept, content, start)
    if (from_step := starts[0].get("from_step") or 0) > 0:
        notes = [*notes, f"the first {from_step:,} steps are another run's: it began from {start['resume']}"]
    try:
        differences = _over_starts(starts, _facts_now(kept, start))
    except LacunaError as error:
        differences = [f"the config cannot be used here: {problem}" for problem in error.problems]
    return Replay(config, name, kept, notes, differences, start)


def starts_that_made_it(starts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which steps are in the weights: a later one that went on from before their first step undid them.

    torchtune begins again with every start. Older starts do not tell from where they went on: they all count.
    """
    if starts and starts[-1].get("trainer") == "torchtune":
        return list(starts[-1:])
    made: list[dict[str, Any]] = []
    reached: float = math.inf
    for start in reversed(starts):
        from_step = start.get("from_step")
        if from_step is None or from_step < reached:
            made.insert(0, start)
            reached = reached if from_step is None else from_step
    return made


def _as_given(kept: Path, content: bytes, start: Mapping[str, Any]) -> tuple[bytes, str, list[str]]:
    """The generated config of an experiment's run, from the values in config.toml; else config.toml itself."""
    if start["experiment"] is None or len(start["config_files"]) != 1:
        return content, kept.name, []
    values = read_layer(kept).values
    keys = top_keys(CONFIGS[values["trainer"]])
    in_order = {"trainer": values["trainer"], **{name: values[name] for name in keys if name in values}}
    generated = dump_yaml(in_order).encode()
    (given,) = start["config_files"]
    name = Path(given["path"]).name
    if digest(generated) == given["sha256"]:
        return generated, name, []
    return content, kept.name, [f"the run was started with other settings over {name}: this is all that it was made of"]


def _facts_now(config: Path, start: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts, of this environment. Raises LacunaError where the config is none for this version of lacuna."""
    if start["trainer"] == "torchtune":
        values, _ = parse_yaml(config.read_text(), str(config))
        device = torchtune_device(values)
        around = software() | torchtune_software(os.path.expanduser(start["command"][0]))
        return {**around, **hardware(device, 1, None), **torchtune_inputs(values)}
    loaded = load_trainer_config([str(config)])
    stay_offline_if_unreachable(loaded)
    template = given_template(loaded)
    return {
        **software(),
        **hardware(device_like(start["device"]), 1, None),
        **data_facts(loaded),
        **tokenizer_facts(loaded, os.path.expanduser(start["tokenizer"])),
        **({"chat_template_sha256": template} if template is not None else {}),
        **model_facts(loaded),
    }


def device_like(name: str) -> Device:
    """The device that is here of the kind by this name, without torch."""
    kind = {"CPU": "cpu", "Apple GPU (MPS)": "mps"}.get(name, "cuda")
    return torchtune_device({"device": kind})


def _over_starts(starts: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """A line that is not true of all starts says of which."""
    found: dict[str, list[int]] = {}
    for number, start in enumerate(starts, 1):
        for line in _differences(start, now):
            found.setdefault(line, []).append(number)
    return [line + _of_starts(numbers, len(starts)) for line, numbers in found.items()]


def _of_starts(numbers: Sequence[int], total: int) -> str:
    return "" if len(numbers) == total else f" (start {', '.join(map(str, numbers))} of {total})"


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    lines = [_line(name, then[name], now[name]) for name in COMPARED if name in then and name in now]
    packages = sorted({*then["packages"], *now["packages"]})
    lines += [_line(f"package {name}", then["packages"].get(name), now["packages"].get(name)) for name in packages]
    for place in ("git", "lacuna_git"):
        states = [facts.get(place) or {} for facts in (then, now)]
        lines += [
            _line(f"{place} {name}", *(state.get(name) for state in states)) for name in ("commit", "diff_sha256")
        ]
    files = [{_place(entry): entry for entry in facts["data_files"]} for facts in (then, now)]
    for place in dict.fromkeys([*files[0], *files[1]]):
        entries = [found.get(place, {}) for found in files]
        which = next((name for name in ("sha256", "commit", "bytes") if entries[0].get(name) is not None), "bytes")
        lines.append(_line(f"data {place}", *(entry.get(which) for entry in entries)))
    return [line for line in lines if line is not None]


def _place(entry: Mapping[str, Any]) -> str:
    return str(entry["path"] if "path" in entry else f"{entry['hub']} ({entry['split']})")


def _line(name: str, then: Any, now: Any) -> str | None:
    if then == now:
        return None
    return f"{name}: was {'not there' if then is None else then}, is {'not found here' if now is None else now}"


def repeat_command(start: Mapping[str, Any], config: str, output_dir: str) -> str:
    """Repeats the run of this start, from its config in a file, in a folder of its own."""
    trainer = start["trainer"]
    if trainer == "torchtune":
        words = start["command"][: start["command"].index("--config")]
        return shlex.join([*map(os.path.expanduser, words), "--config", config, f"output_dir={output_dir}"])
    if trainer == "finetune":
        return shlex.join(["finetune", "--config", config, "--set", f"training.output_dir={output_dir}"])
    return shlex.join([trainer, "@", config, "--output-dir", output_dir])
