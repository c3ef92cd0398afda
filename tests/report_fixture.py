"""A report made by hand: two variables, three seeds, one run failed, one never started, one combination left out."""

import math
from statistics import fmean, stdev
from typing import Any

from lacuna.reports.results import Arm, Comparison, Effect, Estimate, Level, Report, RunResult

SEEDS = (1, 2, 3)
T_FACTOR = {2: 12.706 / math.sqrt(2), 3: 4.303 / math.sqrt(3)}
"""Half of a 95 % interval in standard deviations."""
FACTS = {
    "python": "3.11.2",
    "packages": {"lacuna": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "git": {"commit": "4f1c2a9d8e7b6a5f", "uncommitted_changes": False},
    "data": {"file": "words.jsonl", "sha256": "9b74c9897bac770ffc029102a200c5de"},
    "hardware": {"device": "NVIDIA H100 80GB HBM3", "devices": 1},
}


def estimate(values: list[float]) -> Estimate:
    if len(values) < 2:
        return Estimate(values[0], None, None, 1, None)
    mean, deviation = fmean(values), stdev(values)
    half = T_FACTOR[len(values)] * deviation
    return Estimate(mean, mean - half, mean + half, len(values), deviation)


def run_result(index: int, rate: float, rank: int, seed: int, steps: int = 400) -> RunResult:
    """The loss falls fastest at 1e-3; run_004 fails half way, run_011 never starts."""
    state = {4: "failed", 11: "not started"}.get(index, "finished")
    length = {"finished": steps, "failed": steps // 2, "not started": 0}[state]
    noise = 0.02 * math.sin(3 * seed + rank + 1e4 * rate)
    floor = 1.9 - 0.22 * math.log10(rate / 1e-5) - 0.02 * math.log2(rank) + noise
    losses = [
        (step, floor + 1.6 * math.exp(-step / (40 + 10 * rank / 8)) + 0.05 * math.sin(step * (seed + 1.7)))
        for step in range(1, length + 1)
    ]
    validation = [(step, loss + 0.06) for step, loss in losses if step % 40 == 0]
    settings = {"learning_rate": rate, "lora_rank": rank}
    tokens = {"tokens": length * 16_384, "steps": length, "batch_size": 16, "packing": True, "epochs": 1}
    spent = {"parameters": 1_441_792 * rank // 8, "seconds": length * 0.81 + seed, "gpu_hours": length * 0.81 / 3600}
    return RunResult(
        id=f"run_{index:03}",
        arm=f"learning_rate={rate}, lora_rank={rank}",
        settings=settings,
        seed=seed,
        folder=f"runs/rank/run_{index:03}" if length else None,
        state=state,
        reason="CUDA out of memory: lower micro_batch_size" if state == "failed" else "",
        metrics={"validation_loss": validation[-1][1], "loss": losses[-1][1]} if state == "finished" else {},
        curves={"loss": losses, "validation_loss": validation} if length else {},
        budget={**tokens, **spent, "peak_memory_gib": 18.2 + rank / 16} if length else {},
        facts={**FACTS, "seed": seed, "time": f"2026-11-21T10:{index:02}:00Z"} if length else {},
    )


def arm_of(runs: list[RunResult]) -> Arm:
    values = {run.seed: run.metrics["validation_loss"] for run in runs if run.state == "finished"}
    found = estimate([*values.values()]) if values else None
    return Arm(runs[0].arm, runs[0].settings, values, found, len(runs))


def effect_of(variable: str, runs: list[RunResult]) -> Effect:
    """Over the combinations of which all runs have finished."""
    levels = []
    for value in dict.fromkeys(run.settings[variable] for run in runs):
        own = [run for run in runs if run.settings[variable] == value and run.state == "finished"]
        by_seed = {
            seed: fmean(run.metrics["validation_loss"] for run in own if run.seed == seed)
            for seed in SEEDS if any(run.seed == seed for run in own)
        }  # fmt: skip
        levels.append(Level(value, estimate([*by_seed.values()]), by_seed))
    return Effect(variable, tuple(levels), matched=len(runs) - 4, left_out=2)


def compared(best: Arm, other: Arm, p_value: float) -> Comparison:
    pairs = [other.by_seed[seed] - best.by_seed[seed] for seed in best.by_seed if seed in other.by_seed]
    difference = estimate(pairs)
    is_clear = difference.low is not None and difference.low > 0
    return Comparison(None, best.name, other.name, difference, p_value if len(pairs) > 1 else None, is_clear)


def sample(**changes: Any) -> Report:
    cells = [(rate, rank) for rate in (1e-5, 1e-4, 1e-3) for rank in (8, 32) if (rate, rank) != (1e-3, 8)]
    runs = [
        run_result(index, rate, rank, seed)
        for index, (rate, rank, seed) in enumerate((*cell, seed) for cell in cells for seed in SEEDS)
    ]
    names = dict.fromkeys(run.arm for run in runs)
    arms = [arm_of([run for run in runs if run.arm == name]) for name in names]
    best, *others = sorted(arms, key=lambda arm: arm.estimate.mean if arm.estimate else math.inf)
    comparisons = [compared(best, other, 0.0004 * 10**index) for index, other in enumerate(reversed(others))]
    given: dict[str, Any] = {
        "experiment": {
            "experiment_name": "lora_rank_study",
            "question": "Does a larger LoRA rank learn the task better, and at which learning rate?",
            "hypothesis": "No: rank 8 is enough for a task this narrow.",
            "researcher": "A. Researcher",
            "tags": ["lora", "words"],
            "base_config_file": "configs/sft_qwen.toml",
            "variables": {"learning_rate": [1e-5, 1e-4, 1e-3], "lora_rank": [8, 32]},
            "seeds": [*SEEDS],
            "exclude": [{"learning_rate": 1e-3, "lora_rank": 8}],
            "derived": {"lora_alpha": "2 * lora_rank"},
            "controls": {"epochs": 1, "dataset": {"source": "json", "data_files": "words.jsonl"}},
        },
        "trainer": "sft",
        "base": "configs/sft_qwen.toml",
        "mapping": "configs/rank/run_mapping.yaml",
        "metric": "validation_loss",
        "how": "of the weights in final/: those of the lowest validation loss",
        "goal": "lowest",
        "confidence": 0.95,
        "runs": tuple(runs),
        "arms": tuple(arms),
        "effects": (effect_of("learning_rate", runs), effect_of("lora_rank", runs)),
        "comparisons": tuple(comparisons),
        "winner": None,
        "verdict": "No winner: learning_rate=0.001, lora_rank=32 and learning_rate=0.0001, lora_rank=32 cannot be told "
        "apart with 2 seeds; about 5 would be needed.",
        "notes": ("The arms train different numbers of parameters: 1,441,792 at rank 8, 5,767,168 at rank 32.",),
        "totals": {"gpu_hours": 1.21, "tokens": 88_473_600, "runs": 15, "finished": 13},
    }
    return Report(**{**given, **changes})
