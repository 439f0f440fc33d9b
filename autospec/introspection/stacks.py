"""Rows of activations and adjoints, of the uses of a parameter and of micro-batches together, for their spectra."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spectra import column_gram, float64, smaller_gram
from .workspace import Workspace


class RowStack:
    """Rows of an activation or an adjoint, gathered over the uses of a layer and over micro-batches.

    While there are fewer rows than columns the rows themselves are kept; from then on only their Gram
    matrix, which grows no further.

    Parameters
    ----------
    width : int
        Number of columns.
    workspace : Workspace
        Memory for conversions; its memo knows Gram matrices of rows that two parameters share.
    """

    def __init__(self, width: int, workspace: Workspace) -> None:
        self.width, self.workspace = width, workspace
        self.count = 0
        self.rows: list[Tensor] = []
        self._columns: Tensor | None = None

    def add(self, rows: Tensor, keep: bool = False) -> None:
        """Append rows, which may not be modified afterwards.

        Parameters
        ----------
        rows : Tensor
            Shape (count, width), or (items, width, positions) for the channels of an image.
        keep : bool
            Put the Gram matrix off until it is asked for, where it may turn out not to be needed.
        """
        self.count += row_count(rows)
        self.rows.append(rows)
        if self.count >= self.width and not keep:
            self.column_gram()

    def flat_rows(self) -> list[Tensor]:
        """The rows that are kept, each (count, width)."""
        return [rows if rows.ndim == 2 else rows.movedim(1, 2).flatten(0, 1) for rows in self.rows]

    def column_gram(self) -> Tensor:
        """Gram matrix of the columns, shape (width, width), float64."""
        total = self._columns
        for rows in self.rows:
            added = self.workspace.memo(rows, column_gram)
            total = added if total is None else total + added
        if total is None:
            raise RuntimeError("a RowStack without rows has no Gram matrix")
        if self.count >= self.width:  # no group will ask for the rows themselves
            self._columns, self.rows = total, []
        return total

    def set_column_gram(self, gram: Tensor) -> None:
        """Take the Gram matrix of rows that are elsewhere."""
        self._columns, self.rows = gram, []

    @staticmethod
    def merged_gram(stacks: Sequence[RowStack]) -> Tensor:
        """Gram matrix on the smaller side, float64, of all rows of several stacks together."""
        width = stacks[0].width
        if sum(stack.count for stack in stacks) < width and all(stack.rows for stack in stacks):
            parts = [rows for stack in stacks for rows in stack.flat_rows()]
            workspace = stacks[0].workspace
            return workspace.memo(parts[0], smaller_gram) if len(parts) == 1 else smaller_gram(together(parts))
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
        self.count = 0
        self.counts: Tensor | None = None

    def add(self, index: Tensor) -> None:
        """Append rows that have their one at these columns."""
        self.count += len(index)
        counts = index.new_zeros(self.width).index_add_(0, index, torch.ones_like(index))
        self.counts = counts if self.counts is None else self.counts + counts

    @staticmethod
    def merged_spectrum(stacks: Sequence[IndexStack]) -> Tensor:
        """Singular values of all rows of several stacks together, descending."""
        counts = torch.stack([stack.counts for stack in stacks if stack.counts is not None]).sum(0)
        spectrum = float64(counts).sqrt().sort(descending=True).values
        return spectrum[: sum(stack.count for stack in stacks)]


def together(parts: Sequence[Tensor]) -> Tensor:
    """Rows one after the other; without a copy where they lie so, as the cells of one sorted tensor do."""
    first, rows, end = parts[0], 0, parts[0].data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != end or part.dtype != first.dtype:
            return torch.cat(list(parts))
        rows, end = rows + len(part), end + part.nbytes
    if end - first.data_ptr() > first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize:
        return torch.cat(list(parts))  # neighbours by chance
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def row_count(rows: Tensor) -> int:
    """Rows in a tensor of shape (count, width), or (items, width, positions) for the channels of an image."""
    return len(rows) * (rows.shape[2] if rows.ndim == 3 else 1)
