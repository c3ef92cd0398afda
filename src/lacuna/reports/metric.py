"""What a metric is called, what is better, and which one value of a run counts. Nothing here imports torch."""

import math
from collections.abc import Collection, Iterable, Sequence
from statistics import fmean
from typing import Literal, get_args

from lacuna.config.training import TrainingConfig
from lacuna.errors import ConfigError
from lacuna.words import did_you_mean

Goal = Literal["lowest", "highest"]
Curve = list[tuple[int, float]]

LOWEST = ("loss", "perplexity", "error")
HIGHEST = ("accuracy", "f1", "bleu", "rouge", "score", "exact_match", "tokens_per_second", "mfu")
VALIDATION, TRAINING = "validation_loss", "loss"
OTHER_NAMES = {"eval_loss": VALIDATION}
LOSS_SHARE = 10
"""The training loss of a run is the mean over the last tenth of its logged steps: that of one step is noise."""


def is_loss(metric: str) -> bool:
    """Whether it is per token of the data that it is measured on, and no count."""
    return metric.endswith(("loss", "perplexity"))


def choose_metric(asked: str | None, final: Collection[str], logged: Collection[str]) -> str:
    """The metric to compare by. final: what finished runs have; logged: what any run has.

    Raises ConfigError for a name that no run has, and where none is asked for and there is no loss.
    """
    known = sorted({*final, *logged})
    if asked is None:
        losses = [name for names in (final, logged) for name in (VALIDATION, TRAINING) if name in names]
        if known and not losses:
            raise ConfigError(f"no run has {VALIDATION} or {TRAINING}: choose a --metric: {', '.join(known)}")
        return (losses or [VALIDATION])[0]
    name = asked if asked in known else OTHER_NAMES.get(asked, asked)
    if known and name not in known:
        raise ConfigError(f"--metric {asked}: no run has it{did_you_mean(asked, known)}; there are {', '.join(known)}")
    return name


def choose_goal(metric: str, asked: Goal | None) -> Goal:
    """What is better. Raises ConfigError where neither the user nor the name says it."""
    if asked not in (None, *get_args(Goal)):
        raise ConfigError(f"--goal {asked}: it is lowest or highest")
    if asked is not None:
        return asked
    if metric.endswith(LOWEST):
        return "lowest"
    if metric.endswith(HIGHEST):
        return "highest"
    raise ConfigError(f"--metric {metric}: its name does not say what is better: add --goal lowest or --goal highest")


def final_value(metric: str, curve: Curve, config: TrainingConfig | None) -> float:
    """The one value of a finished run, perhaps not a number. config: in the names of our own loop; None: torchtune's.

    Of a validation metric it is that of the weights in final/.
    """
    values = [value for _, value in curve]
    if metric == TRAINING:
        return fmean(values[-math.ceil(len(values) / LOSS_SHARE) :])
    if metric == VALIDATION and config is not None and config.final_weights == "best":
        return _lowest_saved(curve, config)
    return values[-1]


def _lowest_saved(curve: Curve, config: TrainingConfig) -> float:
    """Only a regular checkpoint can be the best one: the lowest loss at another step belongs to no weights."""
    last = curve[-1][0]
    saved = [value for step, value in curve if step and (step % config.save_every == 0 or step == last)]
    return min(saved[-config.keep_last :] if config.keep_best == 0 else saved, default=math.nan)


def in_words(metric: str, weights: Iterable[str], is_logged: bool) -> str:
    """How a run's final value is taken. weights: what final_weights says in the configs."""
    if not is_logged:
        return "as each run's evaluation.json has it"
    if metric == TRAINING:
        return "mean of the training loss over the last tenth of a run's logged steps"
    if metric != VALIDATION:
        return "the last value that a run has logged"
    of: Sequence[str] = sorted(set(weights)) or ["last"]
    words = {"best": "the best checkpoint, by this very loss, which flatters it a little", "last": "the last step"}
    return f"of the weights in final/: those of {' or '.join(words[which] for which in of)}"
