"""In which order samples come, and in which parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batches:
    """The batches of every update.

    Parameters
    ----------
    samples : int
        Samples to train on.
    batch : int or None
        Samples a batch; None for all of them, in their own order.
    seed : int
        Seed of the order, which is drawn anew in each epoch.
    """

    samples: int
    batch: int | None
    seed: int

    @property
    def in_an_epoch(self) -> int:
        """Updates an epoch."""
        return 1 if self.batch is None else -(-self.samples // self.batch)

    @property
    def largest(self) -> int:
        """Samples of the largest batch."""
        return self.samples if self.batch is None else min(self.batch, self.samples)

    def rows(self, update: int) -> np.ndarray:
        """Numbers of the samples of an update's batch, in their order."""
        if self.batch is None:
            return np.arange(self.samples)
        epoch, place = divmod(update, self.in_an_epoch)
        # Each epoch's order has a seed of its own, so that a training can go on from any update.
        order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        return order[place * self.batch : (place + 1) * self.batch]


def parts(rows: np.ndarray, size: int | None) -> Iterator[np.ndarray]:
    """Split a batch into parts of at most so many samples, in their order; None leaves it whole."""
    size = len(rows) if size is None else size
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
