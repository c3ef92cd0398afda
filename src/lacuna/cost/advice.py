"""Whether a step fits a device, and which settings would make it fit, or fill it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lacuna.cost.memory import step_memory, total
from lacuna.cost.shape import ModelShape, Step
from lacuna.words import GIB

USABLE = 0.92
"""Of a device's memory: the rest is for pieces that are free but too small, and for what the prediction is off."""
ROOMY = 0.6
"""A step that takes less of the usable memory leaves room for larger passes."""


def fits(shape: ModelShape, step: Step, memory: int | None) -> bool:
    """memory: of the device, in bytes; where it is not known, everything fits."""
    return memory is None or total(shape, step) <= USABLE * memory


def needs_checkpointing(shape: ModelShape, step: Step, memory: int | None) -> bool:
    """Whether the step fits only with its activations recomputed, or not at all."""
    return not fits(shape, replace(step, checkpointing=False), memory)


def largest_rows(shape: ModelShape, step: Step, memory: int) -> int:
    """The largest number of rows in a forward pass that fits; 0 where not even one does."""
    if not fits(shape, replace(step, rows=1), memory):
        return 0
    low, high = 1, 2
    while fits(shape, replace(step, rows=high), memory) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(shape, replace(step, rows=middle), memory) else (low, middle)
    return low


@dataclass(frozen=True)
class Names:
    """What a trainer calls its settings."""

    rows: str
    length: str
    checkpointing: str
    gpus: str
    same_batch: str
    """What is to be said of the batch where rows change."""


LOOP = Names(
    "--micro-batch-size", "--sequence-length", "--activation-checkpointing true", "--gpus", "the batch stays as it is"
)
FINETUNE = Names(
    "training.batch_size:", "training.sequence_length:", "training.gradient_checkpointing: true", "gpus:",
    "change gradient_accumulation_steps the other way: the same batch",
)  # fmt: skip


def describe(memory: dict[str, float]) -> str:
    """`about 7.9 GiB (weights 3.9, …)`"""
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items() if size >= 0.05 * GIB)
    return f"about {sum(memory.values()) / GIB:.1f} GiB" + (f" ({parts})" if parts else "")


def changes(shape: ModelShape, step: Step, names: Names) -> Iterator[tuple[str, Step]]:
    """Single settings that take less memory, those that leave the result as it is first."""
    if not step.checkpointing:
        yield names.checkpointing, replace(step, checkpointing=True)
    if step.rows > 1:
        yield f"{names.rows} {step.rows // 2} ({names.same_batch})", replace(step, rows=step.rows // 2)
    if step.adapter is None:
        yield f"{names.gpus} {2 * step.processes}", replace(step, processes=2 * step.processes)
    elif step.adapter.bits is None:
        yield "training.method: qlora", replace(step, adapter=replace(step.adapter, bits=4))
    elif step.adapter.bits == 8:
        yield "training.quantization_bits: 4", replace(step, adapter=replace(step.adapter, bits=4))
    if step.length > 256:
        yield f"{names.length} {step.length // 2}", replace(step, length=step.length // 2)


def savings(shape: ModelShape, step: Step, names: Names) -> str:
    """What a step would take with each of them."""
    less = [(text, total(shape, changed)) for text, changed in changes(shape, step, names)]
    return "; ".join(f"{text}: {size / GIB:.1f} GiB" for text, size in less if size < total(shape, step))


def advise(shape: ModelShape, step: Step, memory: int | None, names: Names, most: int) -> list[str]:
    """What would fit where the step does not, each in a sentence; or how much more would.

    most: rows of an optimizer step, more than which no forward pass can have.
    """
    if memory is None:
        return []
    if fits(shape, step, memory):
        return list(_more(shape, step, memory, names, most))
    found = [f"would fit: {text}" for text, changed in changes(shape, step, names) if fits(shape, changed, memory)]
    return found or [_together(shape, step, memory, names)]


def _more(shape: ModelShape, step: Step, memory: int, names: Names, most: int) -> Iterator[str]:
    if total(shape, step) > ROOMY * USABLE * memory:
        return
    rows = min(largest_rows(shape, step, memory), most)
    if rows >= 2 * step.rows:
        yield f"room is left: {names.rows} up to {rows} would fit ({names.same_batch})"
    if step.checkpointing and fits(shape, replace(step, checkpointing=False), memory):
        off = names.checkpointing.replace("true", "false")
        yield f"room is left: {off} would fit, and saves the recomputation"


def _together(shape: ModelShape, step: Step, memory: int, names: Names) -> str:
    """All that leaves the result as it is, then quantisation, more GPUs or shorter rows until it fits."""
    said: list[str] = []
    if not step.checkpointing:
        said.append(names.checkpointing)
    if step.rows > 1:
        said.append(f"{names.rows} 1 ({names.same_batch})")
    small = replace(step, checkpointing=True, rows=1)
    if step.adapter is not None and step.adapter.bits != 4 and not fits(shape, small, memory):
        small = replace(small, adapter=replace(step.adapter, bits=4))
        said.append("training.method: qlora with 4 bits")
    while step.adapter is None and not fits(shape, small, memory) and small.processes < 4096:
        small = replace(small, processes=2 * small.processes)
    if small.processes > step.processes:
        said.append(f"{names.gpus} {small.processes}")
    while not fits(shape, small, memory) and small.length > 256:
        small = replace(small, length=small.length // 2)
    if small.length < step.length:
        said.append(f"{names.length} {small.length}")
    if fits(shape, small, memory):
        return f"would fit: {', '.join(said)}, together"
    least = describe(step_memory(shape, small))
    return f"nothing would make it fit: with {', '.join(said)} a step still takes {least}"
