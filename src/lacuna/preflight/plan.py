"""What runs will take: memory, time, tokens, disk, worked out from a model's config.json and counts of the data.

Nothing here imports torch, but for a trace.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import PretrainConfig, TrainingConfig
from lacuna.cost.advice import FINETUNE, LOOP, USABLE, Names, advise, fits
from lacuna.cost.flops import Speed, assumed_speed, flops_of, measured_speed
from lacuna.cost.known_models import KNOWN_MODELS
from lacuna.cost.memory import CONTEXT, step_memory, trained_parameters
from lacuna.cost.shape import PROJECTIONS, ModelShape, Step, model_shape
from lacuna.cost.step import adapter_of, read_config, shape_of, step_of
from lacuna.machine.detect import Device
from lacuna.preflight.count import Counts, count

STATE_BYTES = 12
"""Of a trained weight in a checkpoint: itself and AdamW's two moments in fp32."""
FULL_ROWS = "tokens and time take every row to be full, and of one document"
RUNTIME = 1.5 * 2**30
"""Host memory of Python with its libraries."""


@dataclass(frozen=True)
class RunPlan:
    """Sizes in bytes, of one process where there are several; None where something is not known, and notes say why."""

    name: str
    trainer: str
    model: str
    device: str
    device_memory: int | None
    processes: int
    parameters: int | None = None
    trained: int | None = None
    memory: dict[str, float] | None = None
    """At the peak of an optimizer step, by what takes it."""
    checkpointing: bool | None = None
    """Whether activations are recomputed, by the config or because of the memory."""
    fits: bool | None = None
    host: float | None = None
    """Memory of the host at its peak: when weights are loaded, or when a checkpoint is copied there to be written."""
    checkpoint: float | None = None
    """One checkpoint on the disk."""
    disk: float | None = None
    """The run folder at its largest: kept checkpoints, one that is being written, and the final model."""
    data: Mapping[str, Any] | None = None
    """See Counts."""
    not_counted: str | None = None
    """Why the data are not."""
    steps: int | None = None
    tokens: float | None = None
    """Trained on, over all epochs."""
    flops: float | None = None
    speed: Speed | None = None
    seconds: float | None = None
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.processes / 3600

    @property
    def peak(self) -> float | None:
        return None if self.memory is None else sum(self.memory.values())


@dataclass(frozen=True)
class Capacity:
    """What a run is planned for. room: bytes that it may take there; None where that is not known."""

    device: Device
    room: int | None


def plan_runs(
    configs: Mapping[str, TrainingConfig], device: Device, room: int | None, report: Callable[[str], None],
    speed: Speed | None = None, trace: bool = False,
) -> list[RunPlan]:  # fmt: skip
    """A plan for each run of our own trainers; data and models that they share are read once.

    room: bytes of the device that a run may take. speed: given by the user.
    """
    counted = count(configs, report)
    model_of, speed_of = cache(read_model), cache(measured_speed)
    plans = []
    for name, config in configs.items():
        base = config.base_model if isinstance(config, FinetuneConfig) else None
        model, said = model_of(config.model_name, config.model_revision, base)
        shape = said or "" if model is None else shape_of(config.model_name, model)
        known = speed or speed_of(config.run_folder, config.model_name, device.name)
        one = plan_run(name, config, shape, counted[name], Capacity(device, room), known)
        if trace and (one.memory is not None or isinstance(shape, str)):
            one = traced(one, config, device, room, counted[name], model if said else None)
        plans.append(replace(one, notes=[*one.notes, said]) if model is not None and said else one)
    return plans


def read_model(model: str, revision: str | None, base: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """A config.json, and what is to be said of it: where it cannot be had, that of a model that lacuna knows by its
    name, or by the name of its base; where it knows none, None and why."""
    config = read_config(model, revision)
    if not isinstance(config, str):
        return config, None
    name = next((name for name in (model, base) if name in KNOWN_MODELS), None)
    if name is None:
        return None, config
    whose = "it" if name == model else name
    return KNOWN_MODELS[name], f"{config}; planned with the shape that lacuna knows of {whose}"


def longest_of(config: TrainingConfig, counts: Counts | str) -> int | None:
    """Tokens of the longest sample where no row of a forward pass is longer, and it is known."""
    return None if isinstance(counts, str) or config.packs_rows else counts.longest


def traced(
    one: RunPlan,
    config: TrainingConfig,
    device: Device,
    room: int | None,
    counts: Counts | str,
    known: Mapping[str, Any] | None,
) -> RunPlan:
    """The plan with its memory counted in the real step. known: a config.json instead of the model's. Imports torch."""
    from transformers import AutoConfig

    from lacuna.preflight.trace import trace_memory
    from lacuna.train.loading import load_model_config

    model_config = AutoConfig.for_model(**known) if known is not None else load_model_config(config)
    shape = model_shape(model_config.to_dict())
    step = step_of(config, shape, device, longest_of(config, counts))
    trace = trace_memory(model_config, step)
    memory = {"traced step": trace.peak, "framework": float(CONTEXT[device.type])}
    is_enough = None if room is None else sum(memory.values()) <= USABLE * room
    return replace(one, memory=memory, fits=is_enough, checkpointing=step.checkpointing)


def plan_run(
    name: str,
    config: TrainingConfig,
    shape: ModelShape | str,
    counts: Counts | str,
    capacity: Capacity,
    known: Speed | None,
) -> RunPlan:
    """known: the speed that the user gave or that runs on the same device have reached; None takes a usual one."""
    device = capacity.device
    facts: dict[str, Any] = {"data": None, "steps": config.steps, **_tokens(config, counts)}
    if not isinstance(counts, str):
        facts |= {"data": vars(counts), "steps": counts.steps}
    named: dict[str, Any] = {
        "name": name, "trainer": config.model_dump()["trainer"], "model": config.model_name, "device": device.name,
        "device_memory": capacity.room, "processes": config.gpus, "data": facts["data"], "steps": facts["steps"],
        "tokens": facts["tokens"], "not_counted": counts if isinstance(counts, str) else None,
    }  # fmt: skip
    if isinstance(shape, str):
        return RunPlan(**named, notes=[shape])
    adapter = adapter_of(config)
    if adapter is not None and (missing := set(adapter.targets) - set(PROJECTIONS)):
        return RunPlan(**named, notes=[f"target_modules: {config.model_name} has no {', '.join(sorted(missing))}"])
    step = step_of(config, shape, device, longest_of(config, counts))
    trained = trained_parameters(shape, step.adapter)
    memory = step_memory(shape, step)
    flops = None
    if facts["tokens"] is not None:
        flops = flops_of(shape, step.adapter).training(facts["tokens"], facts["targets"], facts["pairs"])
    speed = known or assumed_speed(step.adapter, step.checkpointing)
    checkpoint = float(STATE_BYTES * trained)
    kept = config.keep_last + 1
    if adapter is None or config.has_validation:
        kept += config.keep_best
    if facts["steps"] is not None:
        kept = min(kept, math.ceil(facts["steps"] / config.save_every))
    final = 4.0 * trained if step.adapter else float(step.width * trained)
    names: Names = FINETUNE if isinstance(config, FinetuneConfig) else LOOP
    return RunPlan(
        **named,
        parameters=shape.parameters + (trained if step.adapter else 0),
        trained=trained,
        memory=memory,
        checkpointing=step.checkpointing,
        fits=None if capacity.room is None else fits(shape, step, capacity.room),
        host=RUNTIME + max(_loading(shape, step), checkpoint / config.gpus),
        checkpoint=checkpoint,
        disk=kept * checkpoint + final,
        flops=flops,
        speed=speed,
        seconds=_seconds(speed, flops, facts["tokens"], device, config.gpus),
        notes=[FULL_ROWS] if isinstance(counts, str) and facts["tokens"] is not None else [],
        advice=advise(shape, step, capacity.room, names, math.ceil(config.rows_in_step() / config.gpus)),
    )


def _tokens(config: TrainingConfig, counts: Counts | str) -> dict[str, Any]:
    """Over all epochs. Where the data are not counted, rows are taken to be full and one document each."""
    if not isinstance(counts, str):
        every = {"tokens": counts.tokens, "targets": counts.targets, "pairs": counts.attention_pairs}
        return {name: int(value * counts.epochs) for name, value in every.items()}
    if config.steps is None or not (config.packs_rows or isinstance(config, PretrainConfig)):
        return {"tokens": None, "targets": None, "pairs": None}
    rows = config.steps * config.rows_in_step()
    length = config.sequence_length
    return {"tokens": rows * length, "targets": rows * length, "pairs": rows * length * (length + 1) // 2}


def _loading(shape: ModelShape, step: Step) -> float:
    """Bytes of the weights on the host before they are on the device."""
    width = step.width if step.adapter else 4
    whole = float(width * shape.parameters)
    return whole / step.processes if step.adapter is None else whole


def _seconds(speed: Speed, flops: float | None, tokens: float | None, device: Device, gpus: int) -> float | None:
    if speed.tokens_per_second is not None and tokens is not None:
        return tokens / speed.tokens_per_second
    if speed.mfu is None or flops is None or device.peak_bf16_flops is None:
        return None
    return flops / (device.peak_bf16_flops * speed.mfu * gpus)
