"""The items of a use of a parameter in the order of their cells: sets of samples that belong to exactly the same groups."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import WatchError
from .factors import SHORTEST, Grid
from .groups import Assignment, places
from .workspace import Workspace, to_device

Layout = Literal["runs", "grid"]


@dataclass(frozen=True)
class Items:
    """Whose the items of one use are.

    Attributes
    ----------
    name : str
        Of the parameter.
    samples : ndarray of int, shape (items,)
        Sample of each.
    known : (ndarray of int, shape (items,), int) or None
        Position of each in its sample, and how many positions there are, where the layer says so.
    """

    name: str
    samples: np.ndarray
    known: tuple[np.ndarray, int] | None = None

    @property
    def content(self) -> tuple[Any, ...]:
        """What is the same for items that lie alike."""
        return self.samples.dtype, self.samples.tobytes(), self.known and (self.known[0].tobytes(), self.known[1])


@dataclass
class Sorting:
    """How the items of one use are sorted by cell.

    Attributes
    ----------
    order : Tensor of int, shape (items kept,), or None
        Items in the order of their cells; None if they stay where they are.
    counts : list of int
        Items of each cell that is present, or of each run of items of one cell.
    keys : list of bytes
        The cells: which groups each belongs to; a cell with several runs stands there as often.
    positions : ndarray of int, shape (items kept,)
        For each item, sorted: its place among the items of its sample, which is its position in time, say.
    left_out : Tensor of int, or None
        Items that do not count.
    masked : bool
        Whether the mask of positions that count was applied.
    grid : Grid or None
        Where items lie sample by sample and are left so; then counts are those of cells, whose items are not together.
    """

    order: Tensor | None
    counts: list[int]
    keys: list[bytes]
    positions: np.ndarray = field(repr=False)
    left_out: Tensor | None = None
    masked: bool = False
    grid: Grid | None = None
    _tables: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def without_groups(cls, items: int) -> Sorting:
        """All items belong to the one group of all."""
        return cls(None, [items], [np.ones(1, dtype=bool).tobytes()], np.zeros(items, dtype=np.int64))

    @classmethod
    def by_cell(cls, items: Items, assignment: Assignment, valid: np.ndarray | None, device: torch.device) -> Sorting:
        """Sort by the cell of each item's sample.

        Parameters
        ----------
        items : Items
            The items.
        assignment : Assignment
            Cell of each sample.
        valid : ndarray of bool, shape (samples, positions), or None
            Positions that count; it holds where the samples have as many items.
        device : torch.device
            Where the items are.
        """
        samples = items.samples
        positions, kept, masked = _kept_items(items, assignment, valid)
        cells = assignment.cells[samples]
        order = np.argsort(cells, kind="stable")
        order = order[kept[order]]
        counts = np.bincount(cells[kept], minlength=len(assignment.members))
        present = np.flatnonzero(counts)
        in_order = len(order) == len(samples) and bool((order == np.arange(len(order))).all())
        return cls(
            None if in_order else to_device(torch.from_numpy(order), device),
            counts[present].tolist(),
            [assignment.members[i].tobytes() for i in present],
            positions[order],
            None if kept.all() else to_device(torch.from_numpy(np.flatnonzero(~kept)), device),
            masked,
        )

    @classmethod
    def as_they_lie(
        cls, items: Items, assignment: Assignment, valid: np.ndarray | None, device: torch.device, layout: Layout
    ) -> Sorting | None:
        """Leave the items where they are, if all of them count and their order allows it; parameters as for `by_cell`.

        Parameters
        ----------
        layout : {"runs", "grid"}
            Tell runs of one cell apart; or, where items lie sample by sample, as many of each, say how in a `Grid`.
        """
        samples = items.samples
        positions, kept, masked = _kept_items(items, assignment, valid)
        if not kept.all():
            return None
        if layout == "runs":
            cells = assignment.cells[samples]
            starts = np.flatnonzero(np.diff(cells, prepend=-1))
            counts = np.diff(starts, append=len(cells)).tolist()
            return cls(None, counts, [assignment.members[i].tobytes() for i in cells[starts]], positions, None, masked)
        many = _rows_of_each(samples)
        if many < SHORTEST:
            return None
        present, cell_of = np.unique(assignment.cells[samples[::many]], return_inverse=True)
        return cls(
            None,
            (np.bincount(cell_of) * many).tolist(),
            [assignment.members[i].tobytes() for i in present],
            positions,
            masked=masked,
            grid=Grid(many, to_device(torch.from_numpy(cell_of.reshape(-1)), device)),
        )

    def sort(self, items: Tensor, workspace: Workspace | None = None) -> Tensor:
        """Bring items into the order of their cells."""
        if self.order is None:
            return items
        if workspace is None:
            return items.index_select(0, self.order)
        room = workspace.take((len(self.order), *items.shape[1:]), items.dtype, items.device)
        return torch.index_select(items, 0, self.order, out=room)

    def by_position(self, cell: int, device: torch.device) -> Tensor:
        """Table of a cell's items by position: shape (positions, most items), -1 where there are fewer."""
        if (cell, device) not in self._tables:
            start = sum(self.counts[:cell])
            positions = self.positions[start : start + self.counts[cell]]
            count = int(self.positions.max()) + 1
            row_of = places(positions, count)
            table = np.full((count, int(row_of.max()) + 1), -1)
            table[positions, row_of] = np.arange(len(positions))
            self._tables[cell, device] = to_device(torch.from_numpy(table), device)
        return self._tables[cell, device]


def _kept_items(items: Items, assignment: Assignment, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, bool]:
    """Position of each item in its sample, whether it counts, and whether the mask of positions applies to these items.

    Items that are as many of each sample as the mask has columns are its positions; items that are as many as it marks are
    those that it marks.
    """
    samples, known, count = items.samples, items.known, len(assignment.cells)
    everything = np.ones(len(samples), dtype=bool)
    counts = np.bincount(samples, minlength=count)
    present = counts[counts > 0]
    equal = len(present) > 0 and bool((present == present[0]).all())
    positions, length = known or (places(samples, count), int(present[0]) if equal else 0)
    if valid is None or not len(samples):
        return positions, everything, False
    if length == valid.shape[1]:
        kept = valid[samples, positions]
        if not kept.any():
            raise WatchError("valid= leaves no row at all: mark the positions that count with True.")
        return positions, kept, True
    if bool((counts == valid.sum(1)).all()):
        if known is None and max(present) > 1:
            positions = np.nonzero(valid)[1][np.argsort(np.argsort(samples, kind="stable"), kind="stable")]
        return positions, everything, True
    if known is None and max(present) == valid.shape[1]:
        raise WatchError(
            f"'{items.name}' received between {min(present)} and {max(present)} rows of a sample, neither as many as valid= has "
            "positions nor as many as it marks, so which to leave out is not known: mark in valid= the positions whose rows "
            "reach the layer, or leave the layer out with layers=."
        )
    return positions, everything, False


def _rows_of_each(samples: np.ndarray) -> int:
    """How many rows each sample has, if they lie sample by sample and are as many of each; else 0."""
    many = len(samples) // max(len(np.unique(samples)), 1)
    if not many or len(samples) % many:
        return 0
    by_sample = samples.reshape(-1, many)
    return many if (by_sample == by_sample[:, :1]).all() else 0


def cells_of_groups(keys: Mapping[bytes, object] | Sequence[bytes], groups: int) -> list[list[bytes]]:
    """Cells of each group."""
    members = {key: np.frombuffer(key, dtype=bool) for key in keys}
    return [[key for key in keys if members[key][group]] for group in range(groups)]


@functools.lru_cache(maxsize=64)
def groups_of_cells(keys: tuple[bytes, ...]) -> Tensor:
    """Which cells belong to each group that has any, shape (groups, cells), float64; groups of the same cells once."""
    members = np.stack([np.frombuffer(key, dtype=bool) for key in keys])
    return torch.from_numpy(np.unique(members[:, members.any(0)], axis=1).T.astype(np.float64))
