"""What has arrived since the last step: shares of gradients and rows of factors, by cell of samples.

A cell is a set of samples that belong to exactly the same groups; groups are unions of cells.  Everything adds up
over the uses of a parameter and over micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .spectra import float64, lower_gram, reduced_factor

# Below this many rows, as a fraction of the matrix's smaller side, the factors are kept instead of the share.
FEW_ROWS = 0.75


class Share:
    """One cell's share of a weight's gradient, as its two factors while there are few rows, then as a matrix.

    Parameters
    ----------
    shape : (int, int)
        Outputs and inputs.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.count = 0
        self.factors: list[tuple[Tensor, Tensor]] = []
        self._matrix: Tensor | None = None

    def add(self, activation: Tensor, adjoint: Tensor) -> None:
        r"""Add :math:`\Delta^\top A` of some rows (paper, Eq. 1); neither factor may be modified afterwards."""
        self.count += len(activation)
        self.factors.append((activation, adjoint))
        if self.count >= FEW_ROWS * min(self.shape):
            self._matrix = self.matrix()
            self.factors = []

    def matrix(self) -> Tensor:
        """The share, shape (outputs, inputs)."""
        total = self._matrix
        for activation, adjoint in self.factors:
            total = adjoint.T @ activation if total is None else total.addmm_(adjoint.T, activation)
        if total is None:
            raise RuntimeError("a share without rows has no matrix")
        return total

    @property
    def is_matrix(self) -> bool:
        """Whether the matrix has been formed."""
        return self._matrix is not None


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
    full = [i for i, cells in enumerate(groups) if any(cell.is_matrix for cell in cells)]
    few = {}
    for i, cells in enumerate(groups):
        if i in full:
            continue
        if sum(cell.count for cell in cells) < FEW_ROWS * min(cells[0].shape):
            few[i] = tuple(torch.cat(parts) for parts in zip(*(f for cell in cells for f in cell.factors), strict=True))
        else:
            full.append(i)
    if full:
        for i, gram in zip(full, lower_gram(_matrices([groups[i] for i in full])), strict=True):
            results[i] = gram
    for count in {len(factors[0]) for factors in few.values()}:
        same = [i for i, factors in few.items() if len(factors[0]) == count]
        stacked = (torch.stack([few[i][side] for i in same]) for side in (0, 1))
        for i, gram in zip(same, lower_gram(reduced_factor(*stacked)), strict=True):
            results[i] = gram
    return [results[i] for i in range(len(groups))]


def _matrices(groups: Sequence[Sequence[Share]]) -> Tensor:
    """Matrices of the shares of groups, shape (groups, outputs, inputs)."""
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
        self.stacks: dict[str, dict[bytes, RowStack]] = {"activation": {}, "adjoint": {}}
        self.rows: dict[bytes, int] = {}
        self.sizes: np.ndarray | None = None
        self.dtype = torch.float32
        self.exact: dict[bytes, Tensor] = {}
        self.arrived: Tensor | None = None

    def add(
        self,
        activation: Tensor,
        adjoint: Tensor,
        counts: list[int],
        keys: list[bytes],
        shares: bool,
        statistics: Sequence[str],
        constant: bool,
    ) -> None:
        """Add one use of the parameter in one backward pass.

        Parameters
        ----------
        activation, adjoint : Tensor
            Shapes (rows, inputs) and (rows, outputs), rows sorted by cell; they may not be modified afterwards.
        counts : list of int
            Rows of each cell.
        keys : list of bytes
            The cells.
        shares : bool
            Whether the groups' shares are needed.
        statistics : sequence of str
            Which of the factors' spectra are recorded.
        constant : bool
            Whether the activation is data that may be the same as in the last step.
        """
        self.dtype = adjoint.dtype
        parts = zip(keys, activation.split(counts), adjoint.split(counts), strict=True)
        for key, a, d in parts:
            self.rows[key] = self.rows.get(key, 0) + len(a)
            if shares:
                self.shares.setdefault(key, Share(self.shape)).add(a, d)
            if "activation" in statistics:
                self.stacks["activation"].setdefault(key, RowStack(a.shape[1])).add(a, keep=constant)
            if "adjoint" in statistics:
                self.stacks["adjoint"].setdefault(key, RowStack(d.shape[1])).add(d)

    def add_exact(self, activation: Tensor, adjoint: Tensor, counts: list[int], keys: list[bytes]) -> None:
        """Add the same in float64, for the audit."""
        for key, a, d in zip(keys, activation.split(counts), adjoint.split(counts), strict=True):
            exact = float64(d).T @ float64(a)
            self.exact[key] = self.exact[key] + exact if key in self.exact else exact
