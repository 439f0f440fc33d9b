"""Leading singular values followed from one step of the training to the next.

The spectrum of a wide adjoint changes little from step to step.  A block of vectors that spanned its leading right
singular subspace at the last step nearly does so now; one or two block iterations bring it back, at a few products with
the matrix instead of a decomposition.  The residual of the Rayleigh-Ritz pairs bounds the error of the values, which is
quadratic in it (Parlett 1998, "The symmetric eigenvalue problem", ch. 11); where the bound is too large after a few
iterations, the matrix is decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .spectra import float64

# Vectors beyond those that are wanted: the gap to what lies outside the block decides how fast it converges.
MORE = 16
# Largest error that is accepted, in units of the largest value; half of what every recorded spectrum keeps to.
TOLERANCE = 5e-7
ITERATIONS = 6
# Rough costs in seconds, one core: of a product with a block and of a Gram matrix for each product of their sizes, of
# eigenvalues for each cube and each square of the side, and of the many calls of the iterations.
PRODUCT_COST, GRAM_COST, CUBE_COST, SQUARE_COST, CALLS_COST = 5e-11, 4e-11, 8e-11, 2.2e-8, 3e-4
PRODUCTS = 5  # in a step, on average


@dataclass
class Found:
    """Leading values of some matrices, and the blocks for the next step.

    Attributes
    ----------
    values : Tensor
        Shape (matrices, count), float64, descending; NaN where a matrix is not finite.
    blocks : Tensor
        Shape (matrices, width, count + MORE); their columns span the leading right singular vectors.
    iterations : int
        Block iterations with their test; 0 where the matrices were decomposed.
    """

    values: Tensor
    blocks: Tensor
    iterations: int


def worthwhile(rows: int, width: int, count: int) -> bool:
    """Whether following that many values is cheaper than a decomposition, which does more work at a lower speed."""
    side, block = min(rows, width), count + MORE
    followed = PRODUCTS * PRODUCT_COST * rows * width * block + CALLS_COST
    decomposed = GRAM_COST * side * rows * width + CUBE_COST * side**3 + SQUARE_COST * side**2
    return 2 * block <= side and followed < decomposed


def alike(groups: Sequence[int], sizes: Mapping[int, int]) -> list[list[int]]:
    """Groups whose matrices are so alike in size that filling them up with zeros costs less than going one by one."""
    sets: list[list[int]] = []
    for group in sorted(groups, key=lambda group: -sizes[group]):
        if sets and sizes[group] * 2 >= sizes[sets[-1][0]]:
            sets[-1].append(group)
        else:
            sets.append([group])
    return [sorted(each) for each in sets]


def leading_values(matrices: Tensor, count: int, blocks: Tensor | None) -> Found:
    """Leading singular values of matrices.

    Parameters
    ----------
    matrices : Tensor
        Shape (matrices, rows, width).  Rows of zeros do no harm.
    count : int
        How many values.
    blocks : Tensor or None
        `Found.blocks` of the last step.
    """
    if blocks is not None and blocks.shape == (len(matrices), matrices.shape[2], count + MORE):
        # The values have moved away from the block since the last step, so the first iteration needs no test.
        blocks = _directions(matrices.mT @ (matrices @ blocks))
        for iteration in range(1, ITERATIONS + 1):
            found = _iterate(matrices, count, blocks)
            if found is None:
                break
            values, blocks, error = found
            if error <= TOLERANCE:
                return Found(values, blocks, iteration)
    return _decompose(matrices, count)


def _iterate(matrices: Tensor, count: int, blocks: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """One block iteration: values, better blocks, and the largest error relative to each largest value.

    None where a block cannot be made orthonormal or a matrix is not finite.
    """
    wide = float64(blocks)
    factor, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        return None
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    blocks = blocks @ inverse.mT.to(blocks.device, blocks.dtype)
    images = matrices @ blocks
    back = matrices.mT @ images
    wide = float64(images)
    squares, rotation = torch.linalg.eigh(wide.mT @ wide)
    squares, rotation = squares.flip(-1).clamp_min(0), rotation.flip(-1).to(blocks.device, blocks.dtype)
    back = back @ rotation
    residuals = (back - (blocks @ rotation) * squares.to(blocks.device, blocks.dtype).unsqueeze(1)).norm(dim=1)
    wanted, bound = squares[:, :count], residuals[:, :count].to(squares.device, squares.dtype)
    gap = (wanted - squares[:, -1:]).clamp_min(torch.finfo(torch.float64).tiny)
    shift = torch.minimum(bound, bound**2 / gap)  # of the squares
    error = ((wanted + shift).sqrt() - wanted.sqrt()).amax(1) / wanted[:, 0].sqrt()
    # A matrix of zeros gives NaN here, which no bound admits.
    largest = float(error.nan_to_num(nan=math.inf).max())
    return wanted.sqrt(), _directions(back), largest


def _directions(columns: Tensor) -> Tensor:
    """Columns of length 1."""
    return columns / columns.norm(dim=1, keepdim=True).clamp_min(torch.finfo(columns.dtype).tiny)


def _decompose(matrices: Tensor, count: int) -> Found:
    rows = float64(matrices)
    finite = torch.isfinite(rows).all(2).all(1)[:, None, None]
    rows = torch.where(finite, rows, 0.0)
    wide = rows.shape[1] < rows.shape[2]
    squares, vectors = torch.linalg.eigh(rows @ rows.mT if wide else rows.mT @ rows)
    squares, vectors = squares.flip(-1)[:, :count].clamp_min(0), vectors.flip(-1)[:, :, : count + MORE]
    if wide:  # from left to right singular vectors
        vectors = torch.linalg.qr(rows.mT @ vectors).Q
    values = torch.where(finite[:, 0], squares.sqrt(), math.nan)
    return Found(values, vectors.to(matrices.device, matrices.dtype).contiguous(), 0)
