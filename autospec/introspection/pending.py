"""What has arrived since the last step: shares of gradients and rows of factors, by cell of samples.

A cell is a set of samples that belong to exactly the same groups; groups are unions of cells.  Everything adds up
over the uses of a parameter and over micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .factors import Factors, Lookup, Product
from .groups import Assignment
from .spectra import float64, lower_gram, reduced_factor

# Below this many rows, as a fraction of the matrix's smaller side, the factors are kept instead of the share.
FEW_ROWS = 0.75


@dataclass
class Sorting:
    """How the items of one use are sorted by cell.

    Attributes
    ----------
    order : Tensor of int, shape (items kept,), or None
        Items in the order of their cells; None if they stand so already.
    counts : list of int
        Items of each cell that is present.
    keys : list of bytes
        The cells: which groups each belongs to.
    positions : ndarray of int, shape (items kept,)
        For each item, sorted: its place among the items of its sample, which is its position in time, say.
    """

    order: Tensor | None
    counts: list[int]
    keys: list[bytes]
    positions: np.ndarray = field(repr=False)
    _tables: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def without_groups(cls, items: int) -> Sorting:
        """All items belong to the one group of all."""
        return cls(None, [items], [np.ones(1, dtype=bool).tobytes()], np.zeros(items, dtype=np.int64))

    @classmethod
    def by_cell(
        cls, samples: np.ndarray, assignment: Assignment, valid: np.ndarray | None, device: torch.device
    ) -> Sorting:
        """Sort by the cell of each item's sample.

        Parameters
        ----------
        samples : ndarray of int, shape (items,)
            Sample of each item.
        assignment : Assignment
            Cell of each sample.
        valid : ndarray of bool, shape (samples, positions), or None
            Positions that count; it holds where the samples have as many items.
        device : torch.device
            Where the items are.
        """
        positions = _places(samples, len(assignment.cells))
        kept = np.ones(len(samples), dtype=bool)
        if valid is not None and len(positions) and positions.max() + 1 == valid.shape[1]:
            kept = valid[samples, positions]
        cells = assignment.cells[samples]
        order = np.argsort(cells, kind="stable")
        order = order[kept[order]]
        counts = np.bincount(cells[kept], minlength=len(assignment.members))
        present = np.flatnonzero(counts)
        in_order = len(order) == len(samples) and bool((order == np.arange(len(order))).all())
        return cls(
            None if in_order else torch.from_numpy(order).to(device),
            counts[present].tolist(),
            [assignment.members[i].tobytes() for i in present],
            positions[order],
        )

    def sort(self, items: Tensor) -> Tensor:
        """Bring items into the order of their cells."""
        return items if self.order is None else items.index_select(0, self.order)

    def by_position(self, cell: int, device: torch.device) -> Tensor:
        """Table of a cell's items by position: shape (positions, most items), -1 where there are fewer."""
        if (cell, device) not in self._tables:
            start = sum(self.counts[:cell])
            positions = self.positions[start : start + self.counts[cell]]
            count = int(self.positions.max()) + 1
            places = _places(positions, count)
            table = np.full((count, int(places.max()) + 1), -1)
            table[positions, places] = np.arange(len(positions))
            self._tables[cell, device] = torch.from_numpy(table).to(device)
        return self._tables[cell, device]


def _places(labels: np.ndarray, count: int) -> np.ndarray:
    """Place of each entry among those with the same label, counted from 0."""
    order = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=count))])
    places = np.empty(len(labels), dtype=np.int64)
    places[order] = np.arange(len(labels)) - starts[labels[order]]
    return places


class Share:
    """One cell's share of a weight's gradient: its factors while there are few rows, then a matrix.

    Parameters
    ----------
    shape : (int, int)
        Shape of the parameter's matrix.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.count = 0
        self.products: list[Product] = []
        self.lookups: list[Lookup] = []
        self._matrix: Tensor | None = None

    def add(self, factors: Factors) -> None:
        """Add some rows; their tensors may not be modified afterwards."""
        self.count += factors.rows
        if isinstance(factors, Lookup):
            self.lookups.append(factors)
        elif isinstance(factors, Product) and factors.outputs is None and self._matrix is None:
            self.products.append(factors)
            if self.count >= FEW_ROWS * min(self.shape):
                self.form()
        else:
            self.form()
            share = factors.share()
            self._matrix = share if self._matrix is None else self._matrix.add_(share)

    def form(self) -> None:
        """Form the matrix of the products that were kept."""
        for product in self.products:
            if self._matrix is None:
                self._matrix = product.share()
            else:
                self._matrix.addmm_(product.adjoint.T, product.activation)
        self.products = []

    def matrix(self) -> Tensor:
        """The share, shape of the parameter's matrix."""
        self.form()
        total = self._matrix
        for lookup in self.lookups:
            total = lookup.share() if total is None else total + lookup.share()
        if total is None:
            raise RuntimeError("a share without rows has no matrix")
        return total

    @property
    def is_products(self) -> bool:
        """Whether there is nothing but products of few rows."""
        return self._matrix is None and not self.lookups

    @property
    def is_lookups(self) -> bool:
        """Whether there is nothing but lookups."""
        return self._matrix is None and not self.products


def share_grams(groups: Sequence[Sequence[Share]]) -> list[Tensor]:
    """Gram matrices (lower triangles) of the shares of groups.

    Parameters
    ----------
    groups : sequence of sequences of Share
        The cells of each group.

    Returns
    -------
    list of Tensor
        One (s, s) matrix a group, float64.
    """
    results: dict[int, Tensor] = {}
    full, few = [], {}
    for i, cells in enumerate(groups):
        if all(cell.is_lookups for cell in cells):
            results[i] = lower_gram(_looked_up(cells))
        elif all(cell.is_products for cell in cells) and sum(cell.count for cell in cells) < FEW_ROWS * min(
            cells[0].shape
        ):
            pairs = [(p.activation, p.adjoint) for cell in cells for p in cell.products]
            few[i] = tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
        else:
            full.append(i)
    if full:
        for i, gram in zip(full, lower_gram(share_matrices([groups[i] for i in full])), strict=True):
            results[i] = gram
    for count in {len(factors[0]) for factors in few.values()}:
        same = [i for i, factors in few.items() if len(factors[0]) == count]
        stacked = (torch.stack([few[i][side] for i in same]) for side in (0, 1))
        for i, gram in zip(same, lower_gram(reduced_factor(*stacked)), strict=True):
            results[i] = gram
    return [results[i] for i in range(len(groups))]


def _looked_up(cells: Sequence[Share]) -> Tensor:
    """Rows of a table's share that are not zero, shape (rows, width), float64."""
    lookups = [lookup for cell in cells for lookup in cell.lookups]
    index = torch.cat([lookup.activation for lookup in lookups])
    adjoint = torch.cat([float64(lookup.adjoint) for lookup in lookups])
    there, which = torch.unique(index.to(adjoint.device), return_inverse=True)
    return adjoint.new_zeros(len(there), adjoint.shape[1]).index_add_(0, which, adjoint)


def share_matrices(groups: Sequence[Sequence[Share]]) -> Tensor:
    """Matrices of the shares of groups, shape (groups, *shape of the parameter's matrix)."""
    result: Tensor | None = None
    for i, cells in enumerate(groups):
        first, *others = cells
        matrix = first.matrix()
        if result is None:
            result = matrix.new_empty(len(groups), *first.shape)
        if not others:
            result[i] = matrix
            continue
        torch.add(matrix, others[0].matrix(), out=result[i])
        for other in others[1:]:
            result[i] += other.matrix()
    assert result is not None
    return result


class RowStack:
    """Rows of an activation or an adjoint, gathered over the uses of a layer and over micro-batches.

    While there are fewer rows than columns the rows themselves are kept; from then on only their Gram
    matrix, which grows no further.

    Parameters
    ----------
    width : int
        Number of columns.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self.rows: list[Tensor] = []
        self._columns: Tensor | None = None

    def add(self, rows: Tensor, keep: bool = False) -> None:
        """Append rows, shape (count, width), which may not be modified afterwards.

        ``keep`` puts the Gram matrix off until it is asked for, where it may turn out to be known already.
        """
        self.count += len(rows)
        self.rows.append(rows)
        if self.count >= self.width and not keep:
            self.column_gram()

    def column_gram(self) -> Tensor:
        """Gram matrix of the columns (lower triangle), shape (width, width), float64."""
        total = self._columns
        for rows in self.rows:
            wide = float64(rows).mT
            added = lower_gram(wide) if len(rows) >= self.width else wide @ wide.mT
            total = added if total is None else total + added
        if total is None:
            raise RuntimeError("a RowStack without rows has no Gram matrix")
        if self.count >= self.width:  # no group will ask for the rows themselves
            self._columns, self.rows = total, []
        return total

    @staticmethod
    def merged_gram(stacks: Sequence[RowStack]) -> Tensor:
        """Smaller-side Gram matrix (lower triangle), float64, of all rows of several stacks together."""
        width = stacks[0].width
        if sum(stack.count for stack in stacks) < width:
            return lower_gram(torch.cat([rows for stack in stacks for rows in stack.rows]))
        grams = [stack.column_gram() for stack in stacks]
        return grams[0] if len(grams) == 1 else torch.stack(grams).sum(0)


class IndexStack:
    """Rows with a single one each: they are orthogonal or equal, so the singular values are roots of counts.

    Parameters
    ----------
    width : int
        Number of columns.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.counts: Tensor | None = None

    def add(self, index: Tensor) -> None:
        """Append rows that have their one at these columns."""
        counts = torch.bincount(index, minlength=self.width)
        self.counts = counts if self.counts is None else self.counts + counts

    @staticmethod
    def merged_spectrum(stacks: Sequence[IndexStack]) -> Tensor:
        """Singular values of all rows of several stacks together, descending."""
        counts = torch.stack([stack.counts for stack in stacks if stack.counts is not None]).sum(0)
        return float64(counts).sqrt().sort(descending=True).values


class Pending:
    """What has arrived for one parameter since the last step.

    Parameters
    ----------
    shape : (int, int)
        Shape of the parameter's matrix.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.shares: dict[bytes, Share] = {}
        self.stacks: dict[str, dict[int, dict[bytes, RowStack]]] = {"activation": {}, "adjoint": {}}
        self.indices: dict[int, dict[bytes, IndexStack]] = {}
        self.by_position: dict[bytes, Tensor] = {}
        self.rows: dict[bytes, int] = {}
        self.sizes: np.ndarray | None = None
        self.dtype: torch.dtype | None = None
        self.exact: dict[bytes, Tensor] = {}
        self.arrived: Tensor | None = None
        self._widths: dict[str, dict[int, int]] = {"activation": {}, "adjoint": {}}

    def widths(self) -> dict[str, int]:
        """How many singular values the activation and the adjoint can have."""
        return {statistic: sum(forms) for statistic, forms in self._widths.items()}

    def add(self, factors: Factors, sorting: Sorting, shares: bool, statistics: Sequence[str], constant: bool) -> None:
        """Add one use of the parameter in one backward pass.

        Parameters
        ----------
        factors : Factors
            Items sorted by cell.
        sorting : Sorting
            Items of each cell.
        shares : bool
            Whether the groups' shares are needed.
        statistics : sequence of str
            Which of the factors' spectra are recorded.
        constant : bool
            Whether the activation is data that may be the same as in the last step.
        """
        for key, part in zip(sorting.keys, factors.split(sorting.counts), strict=True):
            self.rows[key] = self.rows.get(key, 0) + part.rows
            part = _kept(part, sorting, constant) if isinstance(part, Product) else part
            if shares:
                self.shares.setdefault(key, Share(self.shape)).add(part)
            for statistic in ("activation", "adjoint"):
                if statistic == "activation" and isinstance(part, Lookup):
                    self._widths[statistic][part.size] = part.size
                    if statistic in statistics:
                        stacks = self.indices.setdefault(part.size, {})
                        stacks.setdefault(key, IndexStack(part.size)).add(part.activation)
                    continue
                if statistic not in statistics:
                    continue
                rows = part.activation_rows() if statistic == "activation" else part.adjoint_rows()
                width = rows.shape[1]
                self._widths[statistic][width] = width
                stack = self.stacks[statistic].setdefault(width, {}).setdefault(key, RowStack(width))
                stack.add(rows, keep=constant and statistic == "activation")

    def add_by_position(
        self, factors: Factors, sorting: Sorting, first: int, shares_by_position: Callable[[Factors, Tensor], Tensor]
    ) -> int:
        """Add the shares of each position, beginning at the given one; return the position after the last."""
        last = first
        parts = factors.split(sorting.counts)
        for cell, (key, part) in enumerate(zip(sorting.keys, parts, strict=True)):
            found = shares_by_position(part, sorting.by_position(cell, part.adjoint.device))
            total = self.by_position.get(key, found.new_zeros(0, *self.shape))
            if len(total) < first + len(found):
                total = torch.cat([total, found.new_zeros(first + len(found) - len(total), *self.shape)])
            total[first : first + len(found)] += found
            self.by_position[key] = total
            last = max(last, first + len(found))
        return last

    def add_exact(self, factors: Factors, sorting: Sorting) -> None:
        """Add the same in float64, for the audit."""
        for key, part in zip(sorting.keys, factors.split(sorting.counts), strict=True):
            activation = part.activation if isinstance(part, Lookup) else float64(part.activation)
            exact = part.with_(activation, float64(part.adjoint)).share()
            self.exact[key] = self.exact[key] + exact if key in self.exact else exact


def _kept(part: Product, sorting: Sorting, constant: bool) -> Product:
    """What is kept until the step is closed must not change with the user's tensors."""
    if sorting.order is not None:
        return part
    activation, adjoint = part.activation, part.adjoint
    if constant or len(activation) < max(activation.shape[1], adjoint.shape[1]):
        return part.with_(activation.clone(), adjoint.clone())
    return part


def cells_of_groups(keys: Mapping[bytes, object] | Sequence[bytes], groups: int) -> list[list[bytes]]:
    """Cells of each group."""
    members = {key: np.frombuffer(key, dtype=bool) for key in keys}
    return [[key for key in keys if members[key][group]] for group in range(groups)]
