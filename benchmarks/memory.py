"""The memory formula beside traces of the real step, for random settings of real models' shapes.

Prints the table of RESULTS.md; 200 cases take about ten minutes. Ends with an error where one is outside the bounds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from transformers import AutoConfig

from lacuna.cost.memory import step_memory
from lacuna.cost.shape import PROJECTIONS, Adapter, Step, model_shape
from lacuna.preflight.trace import trace_memory
from lacuna.words import GIB

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from model_configs import MODELS

LOW, HIGH = -0.03, 0.05
"""Of the formula beside the trace."""
TARGETS = (PROJECTIONS, PROJECTIONS[:4], ("q_proj", "v_proj"), PROJECTIONS[4:])
METHODS = ("full fp32", "full bf16", "lora fp32", "lora bf16", "qlora 4", "qlora 8")


def draw(random: np.random.Generator) -> tuple[str, str, Step]:
    """A model's name, a method and a step."""

    def one_of(choices: Sequence[Any]) -> Any:
        return choices[random.integers(len(choices))]

    name, method, length = one_of(list(MODELS)), one_of(METHODS), one_of((512, 1024, 2048, 4096, 8192))
    is_eager = name.startswith("Gemma-2-")
    rows, length = (one_of((1, 2)), min(length, 1024)) if is_eager else (int(random.integers(1, 9)), length)
    bits = int(method[-1]) if method.startswith("qlora") else None
    adapter = Adapter(one_of((8, 16, 32, 64)), one_of(TARGETS), one_of((True, False)), bits, one_of((True, False)))
    step = Step(
        rows=rows, length=length, bf16="fp32" not in method, checkpointing=one_of((True, False)),
        device=one_of(("cuda", "cpu")), accumulates=one_of((True, False)), attention="eager" if is_eager else "sdpa",
        adapter=None if method.startswith("full") else adapter, chunk=one_of((None, 2**27 // 131072, 2**27 // 32768)),
    )  # fmt: skip
    return name, method, step


def compare(name: str, step: Step) -> tuple[float, float]:
    """Bytes that the trace counts, and the formula's share of them less one; without what is no tensor."""
    config = AutoConfig.for_model(**MODELS[name])
    shape = model_shape(config.to_dict())
    assert shape is not None
    sizes = step_memory(shape, step)
    traced = trace_memory(config, step).peak
    return traced, (sum(sizes.values()) - sizes["framework"]) / traced - 1


@click.command()
@click.option("--cases", default=200)
@click.option("--seed", default=0)
def main(cases: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    errors: dict[tuple[str, str], list[float]] = {}
    outside = []
    for _ in range(cases):
        name, method, step = draw(random)
        traced, error = compare(name, step)
        errors.setdefault(("method", method), []).append(error)
        errors.setdefault(("model", name), []).append(error)
        if not LOW < error < HIGH:
            outside.append(f"{error:+.1%} of {traced / GIB:.1f} GiB: {name}, {method}, {step}")
    print("| | cases | lowest | highest | mean of sizes |\n|---|---|---|---|---|")
    for (_, group), found in sorted(errors.items()):
        mean = sum(map(abs, found)) / len(found)
        print(f"| {group} | {len(found)} | {min(found):+.1%} | {max(found):+.1%} | {mean:.1%} |")
    if outside:
        sys.exit("\n".join(outside))


if __name__ == "__main__":
    main()
