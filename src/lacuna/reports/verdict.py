"""Whether a best arm can be named, and the sentence that says so. Nothing here imports torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lacuna.reports.metric import Goal, is_loss
from lacuna.reports.results import Arm, Comparison, RunResult
from lacuna.reports.statistics import CONFIDENCE, MOST_SEEDS, seeds_matter, seeds_needed

NAMED = 3
"""Arms or runs that a sentence names; of more it says how many."""
MORE_SEEDS = "seeds: [1, 2, 3]"


@dataclass(frozen=True)
class Verdict:
    """winner: the best arm's name, where it is apart from every other one."""

    winner: str | None
    sentence: str


def some(names: Sequence[str], joined: str = "; ") -> str:
    """The first few of them, and how many more there are."""
    rest = len(names) - NAMED
    return joined.join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def judge(
    arms: Sequence[Arm], comparisons: Sequence[Comparison], runs: Sequence[RunResult], metric: str, goal: Goal
) -> Verdict:
    """A winner is named where every arm has two seeds, and every comparison of the best one with another is clear.

    Then the named arm is not the best one with a chance of at most 2.5 %: the truly best arm would have to lose its own
    comparison with the named one, at a level of 2.5 % / (k - 1), and there are k - 1 arms to lose to.
    """
    there = [arm for arm in arms if arm.estimate is not None]
    if (without := _without_values(arms, there, runs, metric)) is not None:
        return Verdict(None, without)
    if max(arm.expected for arm in arms) == 1:
        return Verdict(None, f"one seed: no winner can be named; add `{MORE_SEEDS}` to the experiment")
    few = [arm.name for arm in arms if len(arm.by_seed) < 2]
    names = [comparison.other for comparison in comparisons if not _is_better(comparison, goal)]
    if few:
        apart = ""
        if 1 < len(there) < len(arms) and not names:
            apart = f"; of the others, {comparisons[0].best} is the best, clearly better than each"
        return Verdict(None, f"no winner: {some(few)}: fewer than two finished seeds{apart}")
    if not any(seeds_matter(list(arm.by_seed.values())) for arm in arms):
        why = "the seeds made no difference, " if is_loss(metric) else ""
        same = f"every arm has the same {metric} with each of its seeds"
        return Verdict(None, f"no winner: {why}{same}; so no uncertainty is known")
    best = comparisons[0].best
    if not names:
        mean = next(arm.estimate.mean for arm in arms if arm.name == best and arm.estimate is not None)
        others = "the other arm" if len(comparisons) == 1 else f"each of the {len(comparisons)} other arms"
        pairs = sorted({comparison.difference.count for comparison in comparisons})
        return Verdict(
            best,
            f"{best} has the {goal} {metric}: {mean:.4g} on average, clearly better than {others} over "
            f"{counted(pairs[0], 'seed')} ({CONFIDENCE:.0%} confidence over all comparisons)",
        )
    unclear = [comparison for comparison in comparisons if comparison.other in names]
    return Verdict(None, f"no winner: {best} and {some(names)} {_reason(unclear, len(comparisons))}")


def _without_values(arms: Sequence[Arm], there: Sequence[Arm], runs: Sequence[RunResult], metric: str) -> str | None:
    """Why nothing can be compared at all."""
    states = Counter(run.state for run in runs)
    if not states["finished"]:
        return f"no results: no run has finished ({', '.join(f'{n} {state}' for state, n in states.items())})"
    if not there:
        return f"no results: no finished run has {metric}"
    if len(arms) == 1 and there[0].estimate is not None:
        mean = there[0].estimate
        interval = f" ({CONFIDENCE:.0%} interval {mean.low:.4g} to {mean.high:.4g})" if mean.low is not None else ""
        return f"one arm, nothing to compare: {metric} {mean.mean:.4g}{interval} over {counted(mean.count, 'seed')}"
    return None


def _is_better(comparison: Comparison, goal: Goal) -> bool:
    """Whether the best one is clearly better over the seeds of both; over all of its own it is by its choice."""
    return comparison.is_clear and (comparison.difference.mean > 0) == (goal == "lowest")


def _reason(unclear: Sequence[Comparison], comparisons: int) -> str:
    pairs = min(comparison.difference.count for comparison in unclear)
    if pairs < 2:
        return f"have {counted(pairs, 'seed')} in common, and differences are paired over seeds"
    text = f"cannot be told apart with {counted(pairs, 'seed')}"
    needed = [seeds_needed(comparison.difference, comparisons) for comparison in unclear]
    if all(comparison.difference.deviation for comparison in unclear):
        most = max((number or MOST_SEEDS + 1) for number in needed)
        many = f"more than {MOST_SEEDS}" if most > MOST_SEEDS else f"about {most}"
        text += f"; {many} seeds might do it, an estimate from these few"
    return text
