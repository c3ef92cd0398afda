"""Which documents share a row. Nothing here imports torch."""

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Best-fit decreasing: give every document the row that it fills best, the longest documents first.

    Documents of one length are interchangeable, so that whole groups move at once: the work grows with the number
    of different lengths and free spaces, not with the number of documents.

    lengths: [documents] tokens in each, 1 to capacity.
    Returns [documents]: the row of each, rows counted from 0.
    Raises ValueError for a length that is not between 1 and capacity.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must be between 1 and {capacity}")
    by_length = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    rows = np.empty(len(lengths), dtype=np.int64)
    rows_with_space: dict[int, list[NDArray[np.int64]]] = {}
    spaces = 0
    next_row = 0
    position = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = spaces >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            copies = min(space // length, count)
            wanted = count // copies
            if fitting:
                group = rows_with_space[space].pop()
                taken, rest = group[:wanted], group[wanted:]
                if len(rest):
                    rows_with_space[space].append(rest)
                if not rows_with_space[space]:
                    spaces &= ~(1 << space)
            else:
                taken = np.arange(next_row, next_row + wanted)
                next_row += wanted
            placed, left = np.repeat(taken, copies), space - copies * length
            rows[by_length[position : position + len(placed)]] = placed
            position += len(placed)
            count -= len(placed)
            if left:
                rows_with_space.setdefault(left, []).append(taken)
                spaces |= 1 << left
    return rows


def count_rows(lengths: NDArray[np.int64], capacity: int) -> int:
    """How many rows pack() fills, without saying which: rows with the same space left are then one number."""
    rows_with_space: dict[int, int] = {}
    spaces = rows = 0
    counts = np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        count = int(counts[length])
        while count:
            fitting = spaces >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            copies = min(space // length, count)
            taken = count // copies
            if fitting:
                taken = min(taken, rows_with_space[space])
                rows_with_space[space] -= taken
                if not rows_with_space[space]:
                    spaces &= ~(1 << space)
            else:
                rows += taken
            count -= taken * copies
            if left := space - copies * length:
                rows_with_space[left] = rows_with_space.get(left, 0) + taken
                spaces |= 1 << left
    return rows
