"""Which documents are held out for validation: a pure function of the data and a seed."""

import numpy as np
from numpy.typing import NDArray

from lacuna.config.training import TrainingConfig
from lacuna.data.documents import Part
from lacuna.data.duplicates import first_equal
from lacuna.errors import DataError

PREPARATION = "2"
"""Raised where the same data and settings give other rows than the version of lacuna before.

1: documents were held out one by one, by the run's seed. 2: distinct documents, by split_seed.
"""


def row_order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """[rows] the order of an epoch, a pure function of its arguments."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def divide(part: Part, config: TrainingConfig, preparation: str = PREPARATION) -> tuple[Part, Part]:
    """Draw distinct documents for validation, each with its copies and all of their pieces.

    Every document has a number of its own, and the lowest are drawn: what else is left out for its length, or tokenised
    in another way, hardly changes which. Raises DataError where too few are left.
    """
    used, total = part.pieces.used, len(part.documents)
    if preparation == "1":  # each document by itself, and by the run's seed
        originals, numbers = np.arange(len(used)), np.empty(total, dtype=np.int64)
        numbers[used[row_order(config.seed, 0, len(used))]] = originals
    else:
        originals, numbers = first_equal([part]), np.argsort(row_order(config.split_seed, 0, total))
    distinct = np.unique(originals)
    share = config.validation_share or 0.0
    count = max(round(share * len(distinct)), 1)
    if count >= len(distinct):
        raise DataError(
            f"{part.name}: {len(distinct)} distinct documents are too few to keep {share:.0%} of them for validation: "
            f"give {config.flag('validation_dataset')}, or no validation"
        )
    drawn_originals = distinct[np.argsort(numbers[used[distinct]])[:count]]
    held_out = np.zeros(total, dtype=np.bool_)
    held_out[used[np.isin(originals, drawn_originals)]] = True
    drawn = held_out[part.pieces.documents]
    return (
        Part(part.documents, part.pieces.where(~drawn), part.name),
        Part(part.documents, part.pieces.where(drawn), "validation share"),
    )
