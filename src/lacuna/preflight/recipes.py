"""What torchtune's runs will take, in the same terms as our own trainers'. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lacuna.config.trees import get
from lacuna.cost.advice import USABLE
from lacuna.cost.flops import Speed, assumed_speed, flops_of
from lacuna.cost.shape import Adapter
from lacuna.experiment.base import Base
from lacuna.machine.detect import Device
from lacuna.preflight.plan import RUNTIME, RunPlan
from lacuna.torchtune.memory import assumptions, checkpoint_sizes, torchtune_memory
from lacuna.torchtune.model import TorchtuneModel, model_of
from lacuna.torchtune.steps import Counts, step_length, torchtune_counts


def plan_recipes(
    recipes: Mapping[str, dict[str, Any]], base: Base, device: Device, given: Speed | None
) -> list[RunPlan]:
    """A plan for each of torchtune's configs; data that they share are read once. given: the speed, by the user."""
    if base.environment is None or base.recipe is None:
        found = "torchtune was not found, and the plan reads its builders: make torchtune, or pass --torchtune PYTHON"
        return [_unknown(name, config, base, device, found) for name, config in recipes.items()]
    models = {name: model_of(config, base.recipe, base.environment) for name, config in recipes.items()}
    counted = torchtune_counts(base.environment, [(config, base.gpus) for config in recipes.values()])
    plans = []
    for (name, config), counts in zip(recipes.items(), counted, strict=True):
        model = models[name]
        if isinstance(model, str):
            plans.append(_unknown(name, config, base, device, model))
        else:
            plans.append(_plan(name, config, base, model, counts, device, given))
    return plans


def _plan(
    name: str, config: dict[str, Any], base: Base, model: TorchtuneModel, counts: Counts | str, device: Device,
    given: Speed | None,
) -> RunPlan:  # fmt: skip
    recipe = str(base.recipe)
    length, origin = step_length(model, config, counts)
    memory = torchtune_memory(model, config, recipe, base.gpus, length)
    sizes = checkpoint_sizes(model, config, recipe)
    notes = [*assumptions(config, base.gpus), f"a row of {length:,} tokens is planned: {origin}"]
    notes += [reason for reason in (memory, sizes) if isinstance(reason, str)]
    checkpointing = config.get("enable_activation_checkpointing") is True
    adapter = None if model.is_full else Adapter(model.rank, model.adapters, bits=4 if model.quantised else None)
    flops, tokens = None, None
    if not isinstance(counts, str):
        tokens = counts.tokens_seen
        share = tokens / counts.tokens if counts.tokens else 0.0
        pairs = tokens * counts.longest // 2
        flops = flops_of(model.shape, adapter).training(tokens, round(share * counts.learned), pairs)
    speed = given or assumed_speed(adapter, checkpointing)
    peak = None if isinstance(memory, str) else sum(memory.values())
    seconds = None
    if flops is not None and device.peak_bf16_flops is not None and speed.mfu is not None:
        seconds = flops / (device.peak_bf16_flops * speed.mfu * base.gpus)
    return RunPlan(
        **_named(name, config, base, device),
        parameters=model.shape.parameters + model.adapter_parameters,
        trained=model.trainable,
        memory=None if isinstance(memory, str) else memory,
        checkpointing=checkpointing,
        fits=None if peak is None or device.memory is None else peak <= USABLE * device.memory,
        host=RUNTIME + 2.0 * model.shape.parameters,
        checkpoint=None if isinstance(sizes, str) else sizes.epoch,
        disk=None if isinstance(sizes, str) else sizes.whole_run,
        data=None if isinstance(counts, str) else asdict(counts),
        not_counted=counts if isinstance(counts, str) else None,
        steps=None if isinstance(counts, str) else counts.steps,
        tokens=tokens,
        flops=flops,
        speed=speed,
        seconds=seconds,
        notes=notes,
    )


def _unknown(name: str, config: dict[str, Any], base: Base, device: Device, why: str) -> RunPlan:
    return RunPlan(**_named(name, config, base, device), notes=[why])


def _named(name: str, config: dict[str, Any], base: Base, device: Device) -> dict[str, Any]:
    return {
        "name": name, "trainer": "torchtune", "model": str(get(config, "model._component_")), "device": device.name,
        "device_memory": device.memory, "processes": base.gpus,
    }  # fmt: skip
