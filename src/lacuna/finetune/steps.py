"""The samples of an optimizer step as forward passes without padding."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from lacuna.config.finetune import FinetuneConfig
from lacuna.data.collate import MicroBatch, collate
from lacuna.data.loader import Batch, PackedRow, batches
from lacuna.data.packing import pack
from lacuna.data.samples import Sample
from lacuna.train.loop import Prepared


@dataclass(frozen=True)
class Step:
    """One optimizer step's samples, as the forward passes of this process."""

    batch: Batch
    """Of all processes."""
    passes: list[MicroBatch]
    seconds: float
    """What it took to lay them out."""


def lay_out(samples: list[Sample], rows: int, packing: bool) -> list[list[PackedRow]]:
    """Samples → forward passes of at most so many rows, none wider than the longest sample.

    packing: samples share rows; otherwise each has its own, padded to the longest of its pass. The loss of an
    optimizer step is one over its supervised tokens, so that neither changes what is learnt.
    """
    if not packing:
        arranged: list[PackedRow] = [[sample] for sample in samples]
    else:
        lengths = np.array([len(sample.tokens) for sample in samples])
        row_of = pack(lengths, int(lengths.max()))
        arranged = [[samples[index] for index in np.flatnonzero(row_of == row)] for row in range(int(row_of.max()) + 1)]
        arranged.sort(key=lambda row: -sum(len(sample.tokens) for sample in row))
    return [arranged[start : start + rows] for start in range(0, len(arranged), rows)]


@dataclass(frozen=True)
class Layout:
    """How samples become forward passes."""

    rows: int
    packing: bool
    padding: int
    flatten: bool

    def passes(self, samples: list[Sample]) -> list[MicroBatch]:
        laid_out = lay_out(samples, self.rows, self.packing)
        return [collate(rows, self.padding, None, self.flatten) for rows in laid_out]


class Steps(IterableDataset[Step]):
    """The optimizer steps of a run from a position on, and this process' share of each."""

    def __init__(self, config: FinetuneConfig, prepared: Prepared, layout: Layout, position: Any) -> None:
        self.config, self.prepared, self.layout, self.position = config, prepared, layout, position

    def __iter__(self) -> Iterator[Step]:
        rows = self.prepared.train_rows
        assert rows is not None
        config, world = self.config, self.prepared.world
        total = config.whole_epochs * len(rows) if config.whole_epochs is not None else None
        source = batches(rows, config.rows_in_step(world.size), self.config.seed, self.position, total)
        while True:
            started = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            samples = [sample for row in world.share(batch.places) for sample in row]
            passes = self.layout.passes(samples)
            yield Step(batch, passes, time.perf_counter() - started)
