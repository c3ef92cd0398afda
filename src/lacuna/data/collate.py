"""Packed rows → the arrays of a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lacuna.data.loader import PackedRow


@dataclass(frozen=True)
class MicroBatch:
    """What the model gets, and what was counted on the way."""

    input_ids: NDArray[np.int64]
    """[rows, length]"""
    position_ids: NDArray[np.int64]
    """[rows, length] positions in each document; padding counts as a document of its own."""
    predicting: NDArray[np.int64]
    """[targets] flat indices of the tokens whose next token is supervised."""
    targets: NDArray[np.int64]
    """[targets] those next tokens."""
    tokens: int
    """Real tokens, without padding."""
    attention_pairs: int
    """Query-key pairs that causal attention within documents needs."""


def collate(rows: Sequence[PackedRow], padding_token: int, length: int | None, flatten: bool) -> MicroBatch:
    """Put rows side by side, padded at their ends to `length`, or to the longest where that is None.

    flatten: one long row instead, padded to as much. No target crosses from a document into the next.
    """
    if flatten:
        length = length and length * len(rows)
        rows = [[sample for row in rows for sample in row]]
    width = length or max(sum(len(sample.tokens) for sample in row) for row in rows)
    input_ids = np.full((len(rows), width), padding_token, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    supervised = np.zeros((len(rows), width), dtype=np.bool_)
    tokens = attention_pairs = 0
    for index, row in enumerate(rows):
        end = 0
        for sample in row:
            start, end = end, end + len(sample.tokens)
            input_ids[index, start:end] = sample.tokens
            position_ids[index, start:end] = np.arange(end - start)
            supervised[index, start + 1 : end] = sample.supervised[1:]
            attention_pairs += (end - start) * (end - start + 1) // 2
        position_ids[index, end:] = np.arange(width - end)
        tokens += end
    predicted = np.flatnonzero(supervised)
    return MicroBatch(input_ids, position_ids, predicted - 1, input_ids.reshape(-1)[predicted], tokens, attention_pairs)
