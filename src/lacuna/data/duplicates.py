"""Documents that stand in the data more than once, equal token for token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    used = [part.pieces.used for part in parts]
    first = first_equal(parts, used)
    origins = [part.documents.origins for part in parts]
    found = []
    for index, (start, end) in enumerate(pairwise(np.cumsum([0, *map(len, used)]).tolist())):
        originals = first[start:end]
        _, here, group = np.unique(originals, return_index=True, return_inverse=True)
        again = np.flatnonzero(here[group] < np.arange(end - start))
        leaked = np.flatnonzero(originals < len(used[0])) if index else again[:0]
        for numbers, source, earlier in ((again, index, here[group]), (leaked, 0, originals)):
            if len(numbers):
                shown = numbers[:SHOWN_PROBLEMS].tolist()
                places = [
                    (origins[index][used[index][number]], origins[source][used[source][earlier[number]]])
                    for number in shown
                ]
                found.append(Copies(parts[index].name, earlier is originals, len(numbers), end - start, places))
    return found


def first_equal(parts: Sequence[Part], used: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """[used documents of all parts] the number of the first one with the same tokens.

    Only documents whose sums are equal are compared.
    """
    sums = np.concatenate([_sums(part)[numbers] for part, numbers in zip(parts, used, strict=True)])
    part_of = np.repeat(np.arange(len(parts)), [len(numbers) for numbers in used])
    documents = np.concatenate(used)
    order = np.argsort(sums, kind="stable")
    same = np.concatenate([[False], sums[order][1:] == sums[order][:-1], [False]])
    first = np.arange(len(sums))
    seen: dict[bytes, int] = {}
    for candidate in np.sort(order[same[1:] | same[:-1]]).tolist():
        whole, document = parts[part_of[candidate]].documents, documents[candidate]
        tokens = whole.tokens[whole.starts[document] : whole.starts[document + 1]]
        first[candidate] = seen.setdefault(hashlib.blake2b(tokens.data, digest_size=16).digest(), candidate)
    return first


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
