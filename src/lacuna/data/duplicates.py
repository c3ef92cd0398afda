"""Documents that stand in the data more than once, equal token for token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lacuna.data.documents import Part
from lacuna.data.formats import SHOWN_PROBLEMS

TOGETHER = 4096
"""Documents whose tokens are summed together."""


@dataclass(frozen=True)
class Copies:
    """Documents of a part that stand elsewhere already."""

    part: str
    is_held_out: bool
    """They are of validation data and stand in the training data; otherwise both are in the same part."""
    count: int
    total: int
    """Documents of the part."""
    places: list[tuple[str, str]]
    """The first of them, each with the place of the document that it repeats."""

    def __str__(self) -> str:
        what = f"{self.part}: {self.count:,} of {self.total:,} documents are"
        first = f"token for token; the first: {self.places[0][0]}, as {self.places[0][1]}"
        if self.is_held_out:
            return f"warning: {what} also in the training data, {first}: their loss says nothing about new data"
        return f"{what} copies of earlier ones, {first}"


def find_copies(training: Part, *held_out: Part) -> list[Copies]:
    """What the parts repeat: each of itself, and those held out of the training data. Documents count whole, if they
    are used at all."""
    parts = [training, *held_out]
    counts = [len(part.pieces.used) for part in parts]
    ends = np.cumsum(counts)[:-1]
    found = []
    for part, originals in zip(parts, np.split(first_equal(parts), ends), strict=True):
        _, firsts, group = np.unique(originals, return_index=True, return_inverse=True)
        earlier = firsts[group]
        repeats = np.flatnonzero(earlier < np.arange(len(earlier)))
        found.append(_copies(part, repeats, part, earlier, is_held_out=False))
        if part is not training:
            leaked = np.flatnonzero(originals < counts[0])
            found.append(_copies(part, leaked, training, originals, is_held_out=True))
    return [copies for copies in found if copies.count]


def _copies(
    part: Part, copied: NDArray[np.int64], source: Part, earlier: NDArray[np.int64], *, is_held_out: bool
) -> Copies:
    """copied: [copies] numbers among the part's used documents. earlier: [used documents] the number of the first equal
    one among the source's."""
    shown = copied[:SHOWN_PROBLEMS]
    places = [(_origin(part, number), _origin(source, earlier[number])) for number in shown.tolist()]
    return Copies(part.name, is_held_out, len(copied), len(part.pieces.used), places)


def _origin(part: Part, number: int) -> str:
    """Where a used document stands."""
    document = int(part.pieces.used[number])
    return part.documents.origins[document]


def first_equal(parts: Sequence[Part]) -> NDArray[np.int64]:
    """[used documents of all parts] the number of the first one with the same tokens.

    Only documents whose sums are equal are compared.
    """
    used = [part.pieces.used for part in parts]
    part_of = np.repeat(np.arange(len(parts)), [len(numbers) for numbers in used])
    documents = np.concatenate(used)
    sums = np.concatenate([_sums(part)[part.pieces.used] for part in parts])
    first = np.arange(len(sums))
    seen: dict[bytes, int] = {}
    for candidate in _not_alone(sums).tolist():
        whole, document = parts[part_of[candidate]].documents, documents[candidate]
        tokens = whole.tokens[whole.starts[document] : whole.starts[document + 1]]
        hash = hashlib.blake2b(tokens.data, digest_size=16).digest()
        first[candidate] = seen.setdefault(hash, candidate)
    return first


def _not_alone(sums: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a sum stands that stands elsewhere too, in order."""
    order = np.argsort(sums, kind="stable")
    as_next = np.zeros(len(sums), dtype=bool)
    as_next[:-1] = sums[order][:-1] == sums[order][1:]
    as_previous = np.roll(as_next, 1)
    return np.sort(order[as_next | as_previous])


def _sums(part: Part) -> NDArray[np.uint64]:
    """[documents] a sum over each one's tokens that seldom is another one's too."""
    documents = part.documents
    sums = [np.empty(0, dtype=np.uint64)]
    for first in range(0, len(documents), TOGETHER):
        starts = documents.starts[first : first + TOGETHER + 1]
        tokens = documents.tokens[starts[0] : starts[-1]].astype(np.uint64)
        tokens *= tokens * (tokens + np.uint64(1))
        sums.append(np.add.reduceat(tokens, starts[:-1] - starts[0]))
    return np.concatenate(sums)
