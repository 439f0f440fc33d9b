"""Which steps are recorded: a schedule is a function from the step's number to yes or no."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from .arguments import as_array
from .errors import WatchError

Schedule = Callable[[int], bool]

# Steps of the calibration: the first (with the row map) and two more are recorded, three between them are not.
CALIBRATION = (True, False, False, False, True, True)


def make_schedule(every: int = 1, steps: Iterable[int] | Schedule | None = None) -> Schedule:
    """Build a schedule.

    Parameters
    ----------
    every : int
        Record steps 0, every, 2 * every, ...
    steps : iterable of int or callable, optional
        The steps to record, or a function of the step's number; it replaces ``every``.

    Returns
    -------
    callable
        ``schedule(step) -> bool``.

    Raises
    ------
    WatchError
        If ``every`` is not a whole number of at least 1, is given beside ``steps``, or a step is negative.
    """
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise WatchError(f"every={every!r} is not a whole number of at least 1.")
    if steps is None:
        return lambda step: step % every == 0
    if every != 1:
        raise WatchError("give either every= or steps=, not both.")
    if callable(steps):
        chosen = steps
        return lambda step: bool(chosen(step))
    numbers = _whole_numbers(steps)
    if not numbers:
        shown = " ".join(f"{steps!r:.60}".split())
        raise WatchError(
            f"steps={shown}: give the numbers of the steps to record, at least one, whole and not negative (of a mask "
            "numpy.flatnonzero(mask)), or a function of the step's number."
        )
    return lambda step: step in numbers


def _whole_numbers(given: Any) -> frozenset[int]:
    """Whole numbers from 0 on, of a list or an array; none where there is anything else among them."""
    try:
        array = as_array(given if hasattr(given, "__array__") else list(given))
    except (TypeError, ValueError):
        return frozenset()
    if array.ndim != 1 or array.dtype.kind not in "iuf" or not ((array >= 0) & (array % 1 == 0)).all():
        return frozenset()
    return frozenset(array.astype(np.int64).tolist())


class Budget:
    """A schedule that keeps the time spent on watching below a fraction of the training's.

    The first steps are timed, some recorded and some not; then ``every`` is chosen once, frozen and noted.

    Parameters
    ----------
    fraction : float
        Overhead allowed, such as 0.1.
    every, steps
        As given to `autospec.watch`, which a budget excludes.
    agree : callable, optional
        Makes one number of those that several processes have chosen.

    Raises
    ------
    WatchError
        If the fraction is not positive, or ``every`` or ``steps`` is given too.
    """

    def __init__(
        self,
        fraction: float,
        every: int,
        steps: Iterable[int] | Schedule | None,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        if every != 1 or steps is not None:
            raise WatchError("budget= chooses the steps: do not give every= or steps= as well.")
        given: Any = fraction
        number = float(given) if isinstance(given, Real) and not isinstance(given, bool) else math.nan
        if not number > 0:
            raise WatchError(f"budget={fraction!r} is not a positive fraction of the training's time, such as 0.1.")
        self.fraction = number
        self._agree = agree
        self.every: int | None = None
        self._first = 0  # step with which the calibration begins
        self._last: float | None = None
        self._times: dict[bool, list[float]] = {True: [], False: []}

    def __call__(self, step: int) -> bool:
        """Whether a step is recorded."""
        if step - self._first < len(CALIBRATION):
            return CALIBRATION[step - self._first]
        return self.every is not None and step % self.every == 0

    def took(self, step: int, now: float, recorded: bool) -> None:
        """Note the time at the end of a step; after the calibration, choose."""
        if self.every is not None:
            return
        if self._last is not None and step - self._first > 1:  # the first steps warm caches up
            self._times[recorded].append(now - self._last)
        self._last = now
        if step - self._first >= len(CALIBRATION) - 1 and all(self._times.values()):
            # A bound is to be kept: the most that a recorded step has cost, over what is usual without.
            plain = statistics.median(self._times[False])
            extra = max(max(self._times[True]) - plain, 0.0)
            every = max(1, math.ceil(extra / (self.fraction * plain))) if plain > 0 else 1
            self.every = every if self._agree is None else self._agree(every)

    def summary(self) -> dict[str, Any]:
        """What was chosen, for the attributes of the trajectories."""
        recorded = [self._first + step for step, chosen in enumerate(CALIBRATION) if chosen]
        return {"budget": self.fraction, "calibration_steps": recorded, "every": self.every}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"every": self.every, "first": self._first}

    def restore(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Continue with a step from `state`; where none or an unfinished calibration is known, calibrate from that step on."""
        self.every = None if state is None else state["every"]
        self._first = step if state is None or self.every is None else state.get("first", 0)
        self._last, self._times = None, {True: [], False: []}
