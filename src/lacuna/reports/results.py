"""What a report holds: plain data, the same for terminal, page, CSV and Python. Nothing here imports torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RunResult:
    """One run, finished or not.

    arm: what varies, as `learning_rate=0.001, lora_rank=8`, without the seed. settings: the same by name.
    state: as `lacuna status` says it (finished, failed, interrupted, running, …, "not started"). reason: of a failure.
    metrics: each metric's final value. curves: each metric's (step, value) in the order of the steps.
    budget: what the run has spent and how it was laid out, by name (see `BUDGET`). facts: from its provenance.
    """

    id: str
    arm: str
    settings: Mapping[str, Any]
    seed: int | None
    folder: str | None
    state: str
    reason: str
    metrics: Mapping[str, float]
    curves: Mapping[str, list[tuple[int, float]]]
    budget: Mapping[str, Any]
    facts: Mapping[str, Any]


BUDGET = {
    "steps": "optimizer steps",
    "tokens": "tokens trained on",
    "targets": "supervised tokens",
    "batch_size": "rows in an optimizer step",
    "packing": "packing",
    "epochs": "passes over the data",
    "parameters": "trained parameters",
    "seconds": "seconds",
    "devices": "devices",
    "gpu_hours": "GPU hours",
    "peak_memory_gib": "peak memory, GiB",
}
"""Names of a run's budget, in the order in which they are shown; a name that is not known is absent."""

HOURS = {"gpu_hours": "GPU hours", "cpu_hours": "CPU hours"}
"""Names of a report's totals that say what all runs have cost."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. low, high: its interval; None where one value alone has no uncertainty to show."""

    mean: float
    low: float | None
    high: float | None
    count: int
    deviation: float | None
    """Sample standard deviation; None for one value."""


@dataclass(frozen=True)
class Arm:
    """All runs that differ by their seed only. by_seed: the metric of its finished runs."""

    name: str
    settings: Mapping[str, Any]
    by_seed: Mapping[int | None, float]
    estimate: Estimate | None
    """None where no run of it has the metric."""
    expected: int
    """The runs it should have."""


@dataclass(frozen=True)
class Level:
    """A variable's value: the metric over the combinations that every value of the variable has."""

    value: Any
    estimate: Estimate
    by_seed: Mapping[int | None, float]


@dataclass(frozen=True)
class Effect:
    """What a variable does. left_out: finished runs that have no counterpart at the variable's other values."""

    variable: str
    levels: tuple[Level, ...]
    matched: int
    left_out: int


@dataclass(frozen=True)
class Comparison:
    """Difference of two arms, or of two values of a variable, paired over the seeds that both have.

    difference: of the metric, other minus best, with an interval corrected for the number of comparisons.
    p_value: of the paired t-test, corrected as well; None where there are fewer than two pairs.
    """

    variable: str | None
    """None: of arms."""
    best: str
    other: str
    difference: Estimate
    p_value: float | None
    is_clear: bool
    """Whether the interval lies wholly on one side of zero."""


@dataclass(frozen=True)
class Report:
    """experiment: name, question, hypothesis, variables, controls, derived, seeds … as in the run mapping.

    trainer, base: of the run mapping. metric: its name; how: in words, how a run's final value is taken.
    goal: what is better. winner: the best arm's name where that can be told from all others. verdict: one sentence
    that says so, or why not. notes: what a reader has to know (budget differences, seeds without effect, …).
    """

    experiment: Mapping[str, Any]
    trainer: str
    base: str
    mapping: str
    metric: str
    how: str
    goal: Literal["lowest", "highest"]
    confidence: float
    runs: tuple[RunResult, ...]
    arms: tuple[Arm, ...]
    effects: tuple[Effect, ...]
    comparisons: tuple[Comparison, ...]
    winner: str | None
    verdict: str
    notes: tuple[str, ...]
    totals: Mapping[str, float]
    """Over all runs: gpu_hours or cpu_hours, tokens, runs, finished."""

    def best_first(self) -> list[Arm]:
        """Arms by their means; those without one last."""
        sign = 1 if self.goal == "lowest" else -1
        return sorted(self.arms, key=lambda arm: sign * arm.estimate.mean if arm.estimate is not None else math.inf)
