"""`autospec.watch`: the watcher of `autospec.introspection`, joined with the store of `autospec.trajectories`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autospec.introspection import STATISTICS, Watcher

if TYPE_CHECKING:
    from torch import nn


def watch(
    model: nn.Module,
    groups: Any = None,
    *,
    statistics: Sequence[str] = STATISTICS,
    every: int = 1,
    steps: Iterable[int] | Callable[[int], bool] | None = None,
    layers: Sequence[str] | None = None,
    singular_values: int | Sequence[int] | str | None = None,
    crossed: Sequence[Sequence[str]] = (),
    batch_dim: int | None = None,
    rows: Mapping[str, Any] | None = None,
    unknown: str = "refuse",
    audit: int | None = None,
    attributes: Mapping[str, Any] | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Watcher:
    """Record how a network learns, group by group, while your own loop trains it.

    The training is not changed by one bit: hooks look on, and are gone after the block.

    Parameters
    ----------
    model : nn.Module
        The model that the loop calls.
    groups : array-like, dict of str to array-like, or None
        One label a sample of the batch, or several groupings by name.  Labels become strings; a missing one
        (None, NaN) belongs to no group and counts in ``all``.  With mini-batches give the labels of the whole
        data set here, and call ``watcher.set_groups(labels)`` before each forward pass.
    statistics : sequence of {"gradient", "activation", "adjoint"}
        What to record.
    every : int
        Record every k-th step.
    steps : iterable of int or callable, optional
        The steps to record, or a function of the step's number; replaces ``every``.
    layers : sequence of str, optional
        Parameter names or patterns (``"encoder.*"``); all matrices by default.
    singular_values : int, sequence of int, "all" or None
        How many leading values to keep, or which (from 1).  None keeps min(matrix), the paper's cut;
        ``"all"`` keeps every value of activations and adjoints too.
    crossed : sequence of sequences of str
        Groupings to cross, such as ``[("diagnosis", "sex")]``.
    batch_dim : int, optional
        The dimension of the model's inputs that indexes samples, where it cannot be established.
    rows : dict of str to array-like of int, optional
        For a parameter whose rows cannot be traced: the number of the sample of each row.
    unknown : {"refuse", "skip"}
        What to do with matrix parameters of layers that have no rule.
    audit : int, optional
        Compare with float64 and with the gradient that arrived every k-th recorded step; always at the first.
    attributes : mapping, optional
        Attributes for the root of the tree.
    store : path-like, optional
        ``x.zarr`` grows and can be read meanwhile; ``x.zarr.zip`` is packed on leaving the block.
    resume : bool
        Continue a ``.zarr`` store, after ``watcher.load_state_dict``.

    Returns
    -------
    Watcher
        A context manager with ``step()``, ``set_groups()`` and ``trajectories``.

    Raises
    ------
    WatchError
        If the model or the labels cannot be watched.
    UserError
        If the store exists already.

    Notes
    -----
    Group shares, spectra and the noise floor are those of Baker, Calhoun and Plis (arXiv:2406.11825), Eq. 1,
    2 and 5; ``docs/mathematics.md`` defines them and corrects Eq. 4.

    Examples
    --------
    >>> with autospec.watch(model, groups=labels) as watcher:  # doctest: +SKIP
    ...     for epoch in range(epochs):
    ...         optimizer.zero_grad()
    ...         loss = criterion(model(x), y)
    ...         loss.backward()
    ...         watcher.step()
    ...         optimizer.step()
    >>> watcher.trajectories["layers/0.weight/gradient"]  # doctest: +SKIP
    """
    sink = None
    watcher = Watcher(
        model,
        groups,
        statistics=statistics,
        every=every,
        steps=steps,
        layers=layers,
        singular_values=singular_values,
        crossed=crossed,
        batch_dim=batch_dim,
        rows=rows,
        unknown=unknown,
        audit=audit,
        attributes=attributes,
    )
    if store is not None:
        from autospec.trajectories import TrajectoryStore

        sink = TrajectoryStore(store, resume=resume)
        watcher.write_to(sink)
    return watcher
