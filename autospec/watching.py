"""`autospec.watch`: the watcher of `autospec.introspection`, joined with the store of `autospec.trajectories`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autospec.introspection import SPECTRA, Watcher

if TYPE_CHECKING:
    from torch import nn


def watch(
    model: nn.Module,
    groups: Any = None,
    *,
    statistics: Sequence[str] = SPECTRA,
    every: int = 1,
    steps: Iterable[int] | Callable[[int], bool] | None = None,
    budget: float | None = None,
    layers: Sequence[str] | None = None,
    singular_values: int | Sequence[int] | str | None = None,
    solver: str = "exact",
    per_position: bool | str = False,
    activation: str = "channels",
    angles: int = 5,
    crossed: Sequence[Sequence[str]] = (),
    valid: Any = None,
    batch_dim: int | None = None,
    rows: Mapping[str, Any] | None = None,
    unknown: str = "refuse",
    audit: int | None = None,
    attributes: Mapping[str, Any] | None = None,
    quiet: bool = False,
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
    statistics : sequence of {"gradient", "activation", "adjoint", "contrast", "cosine", "angles"}
        What to record: spectra of the groups, and what compares two groups of one grouping (the spectrum of the
        difference of their shares per sample, the cosine between the shares, the principal angles between their leading
        input directions).  With all three spectra the alignment of the factors is recorded too.
    every : int
        Record every k-th step.
    steps : iterable of int or callable, optional
        The steps to record, or a function of the step's number; replaces ``every``.
    budget : float, optional
        Keep the time for watching below this fraction of the training's: the first steps are timed, then every k-th step
        is recorded, and k is noted in the attribute ``schedule``.
    layers : sequence of str, optional
        Parameter names or patterns (``"encoder.*"``), with ``!`` before it what to leave out; all matrices by default.
    singular_values : int, sequence of int, "all" or None
        How many leading values to keep, or which (from 1).  None keeps min(matrix), the paper's cut;
        ``"all"`` keeps every value of activations and adjoints too.
    solver : {"exact", "tracked"}
        How activations' and adjoints' leading values are found.  ``"tracked"`` follows them from step to step where
        that is cheaper than a decomposition, and decomposes where its error bound exceeds 5e-7 of the largest value.
    per_position : bool or "space"
        Record ``gradient_by_position`` too: the spectra of the shares of each time step or token; with ``"space"`` also of
        each position in a convolution's output.
    activation : {"channels", "unfolded"}
        Rows of a convolution's activation: the channels at each position, or the patches that the kernel sees.
    angles : int
        Dimension of the subspaces between which ``"angles"`` are measured.
    crossed : sequence of sequences of str
        Groupings to cross, such as ``[("diagnosis", "sex")]``.
    valid : array-like of bool, shape (samples, positions), optional
        Positions that count, where sequences are padded; rows of the others are left out in every layer that has one row for
        each position (a convolution's items are whole series).
    batch_dim : int, optional
        The dimension of the model's inputs that indexes samples, where it cannot be established.
    rows : dict of str to array-like of int, optional
        For a parameter whose rows cannot be traced: the number of the sample of each row.  Where it changes from batch to
        batch, `Watcher.set_groups` takes it.
    unknown : {"refuse", "skip"}
        Matrices that are in none of torch's layers, or in one with another forward pass, are watched where the model uses them, and
        refused there by name where they cannot be; "skip" leaves them out.
    audit : int, optional
        Compare with float64 and with the gradient that arrived every k-th recorded step; always at the first.
    attributes : mapping, optional
        Attributes for the root of the tree, beside its own ``layers``, ``audit`` and ``schedule``.
    quiet : bool
        Do not print, on leaving the block, what watching has cost.
    store : path-like, optional
        ``x.zarr`` grows and can be read meanwhile; ``x.zarr.zip`` is packed on leaving the block.
    resume : bool
        Continue a ``.zarr`` store, or a ``.zarr.zip`` that is not finished, after ``watcher.load_state_dict``.

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
        budget=budget,
        layers=layers,
        singular_values=singular_values,
        solver=solver,
        per_position=per_position,
        activation=activation,
        angles=angles,
        crossed=crossed,
        valid=valid,
        batch_dim=batch_dim,
        rows=rows,
        unknown=unknown,
        audit=audit,
        attributes=attributes,
        quiet=quiet,
    )
    if store is not None:
        from autospec.trajectories import TrajectoryStore

        sink = TrajectoryStore(store, resume=resume)
        watcher.write_to(sink)
    return watcher
