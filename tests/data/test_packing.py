"""Which documents share a row."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacuna.data.packing import pack


def rows_of(lengths: list[int], capacity: int) -> list[list[int]]:
    """The lengths in each row."""
    row_of = pack(np.array(lengths, dtype=np.int64), capacity).tolist()
    return [
        [length for length, row in zip(lengths, row_of, strict=True) if row == wanted]
        for wanted in range(max(row_of, default=-1) + 1)
    ]


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The rows when each document, longest first, goes where the least space is left."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([], []),
        ([10], [[10]]),
        ([1] * 12, [[1] * 10, [1, 1]]),
        ([3, 8, 2, 7], [[8, 2], [3, 7]]),
        ([6, 5, 5, 4], [[6, 4], [5, 5]]),
        ([9, 7, 3, 1], [[9, 1], [7, 3]]),
        ([4, 4, 4], [[4, 4], [4]]),
        ([7, 3, 3, 3], [[7, 3], [3, 3]]),
        ([6, 2, 2, 10], [[10], [6, 2, 2]]),
        ([6, 5, 4, 3, 2], [[6, 4], [5, 3, 2]]),
        ([6, 6, 2, 2], [[6, 2, 2], [6]]),
    ],
)
def test_each_document_goes_where_it_fills_best(lengths: list[int], rows: list[list[int]]) -> None:
    assert rows_of(lengths, capacity=10) == rows


LENGTHS_AND_CAPACITY = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)


@given(LENGTHS_AND_CAPACITY)
def test_every_document_is_in_one_row_and_no_row_overflows(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rows = rows_of(lengths, capacity)
    assert sorted(length for row in rows for length in row) == sorted(lengths)
    assert all(0 < sum(row) <= capacity for row in rows)


@given(LENGTHS_AND_CAPACITY)
def test_the_rows_are_as_full_as_naive_best_fit_decreasing_makes_them(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    naive = naive_best_fit_decreasing(lengths, capacity)
    assert sorted(map(sum, rows_of(lengths, capacity))) == sorted(map(sum, naive))


@pytest.mark.parametrize("lengths", [[0], [3, -1], [11], [5, 11]])
def test_a_length_that_fits_no_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must be between 1 and 10"):
        pack(np.array(lengths), 10)


def test_a_million_lengths_are_packed_densely_in_under_two_seconds() -> None:
    drawn = np.random.default_rng(0).lognormal(mean=6.2, sigma=1.0, size=1_000_000)
    lengths = np.clip(drawn, 1, 4096).astype(np.int64)
    best = min(_seconds(lengths) for _ in range(2))
    rows = int(pack(lengths, 4096).max()) + 1
    assert best < 2
    assert lengths.sum() / (rows * 4096) >= 0.995


def _seconds(lengths: np.ndarray) -> float:
    start = time.process_time()
    pack(lengths, 4096)
    return time.process_time() - start
