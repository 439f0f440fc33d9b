"""Which steps are recorded: a schedule is a function from the step's number to yes or no."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral

from .errors import WatchError

Schedule = Callable[[int], bool]


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
    listed = frozenset(int(step) for step in steps)
    if not listed or min(listed) < 0:
        raise WatchError("steps= needs at least one step, none of them negative; the first step is 0.")
    return lambda step: step in listed
