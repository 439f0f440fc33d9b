"""How far a training or a test of it is, and where its time goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Lines that say how far a job is, a few seconds apart.

    Parameters
    ----------
    name : str
        The run.
    total : int
        Updates to make, or to test.
    first : int
        The first that is made now.
    """

    def __init__(self, name: str, total: int, first: int = 0) -> None:
        self.name, self.total, self.first = name, total, first
        self.started = self.last = time.monotonic()

    def show(self, done: int, note: str) -> None:
        """Print a line about an update, counted from 0, if the last one is long enough ago."""
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and done + 1 < self.total:
            return
        self.last = now
        left = (now - self.started) / (done + 1 - self.first) * (self.total - done - 1)
        print(
            f"{self.name}: update {done + 1} of {self.total}, {note}, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


class Clock:
    """Seconds spent on each kind of work; what is timed within another kind counts for its own alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Time a block."""
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.add(kind, took - self._inner.pop())
            self._inner[-1] += took

    def add(self, kind: str, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
