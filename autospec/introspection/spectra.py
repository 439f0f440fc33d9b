"""The mathematics of spectra: pure functions on tensors.

Singular values are taken from the eigenvalues of a float64 Gram matrix.  For a float32 matrix this is both
faster and more accurate than a float32 singular value decomposition, because the products of two float32
numbers are exact in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Constants c of the noise floor, one per statistic.  `benchmarks/noise_floor.py` measures them: the largest
# deviation of a float32 training step's spectra from those of the same step in float64, in units of
# eps * sigma_1 * sqrt(max(m, n, rows)), doubled and rounded up to one digit.  The training's own rounding is in
# it.  Networks with tanh and sigmoid, up to 300 steps: in a classifier that has learned its samples by heart,
# probability minus one cancels and the deviation grows beyond any constant.
NOISE_CONSTANTS = {"gradient": 20.0, "activation": 0.2, "adjoint": 30.0}


def gram(matrix: Tensor) -> Tensor:
    """Gram matrix on the smaller side, in float64.

    Parameters
    ----------
    matrix : Tensor
        Shape (..., m, n), real.

    Returns
    -------
    Tensor
        Shape (..., s, s) with s = min(m, n), float64.
    """
    wide = matrix.double()
    if wide.shape[-2] > wide.shape[-1]:
        wide = wide.mT
    return wide @ wide.mT


def singular_values(grams: Sequence[Tensor]) -> list[Tensor]:
    """Singular values of the matrices whose Gram matrices are given.

    Parameters
    ----------
    grams : sequence of Tensor
        Each (..., s, s), float64.  Equal sizes are solved in one call.

    Returns
    -------
    list of Tensor
        Each (..., s), float64, descending.  A Gram matrix with a non-finite entry gives NaN, never an
        exception: one diverged layer must not cost the record of the others.
    """
    results: list[Tensor | None] = [None] * len(grams)
    by_size: dict[tuple[int, torch.device], list[int]] = {}
    for position, matrix in enumerate(grams):
        by_size.setdefault((matrix.shape[-1], matrix.device), []).append(position)
    for (size, _), positions in by_size.items():
        stacked = torch.cat([grams[i].reshape(-1, size, size) for i in positions])
        finite = torch.isfinite(stacked).all(-1).all(-1)
        solvable = torch.where(finite[:, None, None], stacked, 0.0)
        values = torch.linalg.eigvalsh(solvable).flip(-1).clamp_min(0).sqrt()
        values = torch.where(finite[:, None], values, math.nan)
        counts = [math.prod(grams[i].shape[:-2]) for i in positions]
        for position, part in zip(positions, values.split(counts), strict=True):
            results[position] = part.reshape(grams[position].shape[:-1])
    return [result for result in results if result is not None]


def group_shares(activation: Tensor, adjoint: Tensor, counts: Sequence[int], out: Tensor | None = None) -> Tensor:
    r"""Group shares of a weight's gradient, :math:`G_c = \Delta_c^\top A_c` (paper, Eq. 1 and 5).

    Parameters
    ----------
    activation : Tensor
        Shape (rows, inputs), rows sorted by group.
    adjoint : Tensor
        Shape (rows, outputs), in the same order: the derivative of the whole batch's loss.
    counts : sequence of int
        Rows of each group; they sum to ``rows``.
    out : Tensor, optional
        Shape (groups, outputs, inputs); the shares are added to it.

    Returns
    -------
    Tensor
        Shape (groups, outputs, inputs).  The groups cost one weight-gradient product in all.
    """
    if out is None:
        out = activation.new_empty(len(counts), adjoint.shape[1], activation.shape[1])
        overwrite = 0
    else:
        overwrite = 1
    for share, a, d in zip(out, activation.split(list(counts)), adjoint.split(list(counts)), strict=True):
        torch.addmm(share, d.T, a, beta=overwrite, out=share)
    return out


def noise_floor(sigma_1: Tensor, shape: tuple[int, int], rows: Tensor, dtype: torch.dtype, statistic: str) -> Tensor:
    r"""Level below which a singular value is rounding.

    :math:`c \, \varepsilon \, \sigma_1 \sqrt{\max(m, n, \mathrm{rows})}`, with c calibrated per statistic.

    Parameters
    ----------
    sigma_1 : Tensor
        Shape (groups,): largest singular value of each group.
    shape : (int, int)
        Shape of the matrix.
    rows : Tensor
        Shape (groups,): rows that each group contributed.
    dtype : torch.dtype
        The type in which the training computes.
    statistic : {"gradient", "activation", "adjoint"}
        Which constant to use.

    Returns
    -------
    Tensor
        Shape (groups,), float64.
    """
    largest = rows.double().clamp_min(max(shape))
    # Singular values from a float64 Gram matrix are no better than this, even where the training computes in float64.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps ** 0.5)
    return NOISE_CONSTANTS[statistic] * eps * sigma_1.double() * largest.sqrt()


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

    def add(self, rows: Tensor) -> None:
        """Append rows, shape (count, width); they may be modified afterwards."""
        self.count += rows.shape[0]
        if self.count < self.width:
            self.rows.append(rows.clone())
            return
        self.rows.append(rows)
        self._columns = self.column_gram()
        self.rows = []

    def column_gram(self) -> Tensor:
        """Gram matrix of the columns, shape (width, width), float64."""
        total = self._columns
        for rows in self.rows:
            wide = rows.double()
            total = wide.mT @ wide if total is None else total.addmm_(wide.mT, wide)
        if total is None:
            raise RuntimeError("a RowStack without rows has no Gram matrix")
        return total

    @staticmethod
    def merged_gram(stacks: Sequence[RowStack]) -> Tensor:
        """Smaller-side Gram matrix, float64, of all rows of several stacks together."""
        width = stacks[0].width
        if sum(stack.count for stack in stacks) >= width:
            grams = [stack.column_gram() for stack in stacks]
            return grams[0] if len(grams) == 1 else torch.stack(grams).sum(0)
        wide = torch.cat([rows for stack in stacks for rows in stack.rows]).double()
        return wide @ wide.mT
