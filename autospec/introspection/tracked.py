"""Leading singular values followed from one step of the training to the next.

The spectrum of a wide adjoint changes little from step to step.  A block of vectors that spanned its leading right
singular subspace at the last step nearly does so now, and more nearly if it is moved on as it moved in the step before; one
or two block iterations bring it back, at a few products with the matrix instead of a decomposition.  The residual of the
Rayleigh-Ritz pairs bounds the error of the values, which is quadratic in it (Parlett 1998, "The symmetric eigenvalue
problem", ch. 11); where the bound is too large after a few iterations, the matrix is decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .spectra import float64

# Vectors beyond those that are wanted: the gap to what lies outside the block decides how fast it converges.
MORE = 8
# Largest error that is accepted, in units of the largest value; half of what every recorded spectrum keeps to.
TOLERANCE = 5e-7
ITERATIONS = 6
# An error after two iterations from which on one may do at the next step: an iteration takes three to four digits off.
FAR_BELOW = 1e-9
# Rough costs in seconds, one core: of a product with a block and of a Gram matrix for each product of their sizes, of
# eigenvalues for each cube and each square of the side, and of the many calls of the iterations.
PRODUCT_COST, GRAM_COST, CUBE_COST, SQUARE_COST, CALLS_COST = 5e-11, 3.2e-11, 8e-11, 2.2e-8, 1e-3
PRODUCTS = 4  # in a step, on average


@dataclass
class Block:
    """What is followed from step to step.

    Attributes
    ----------
    directions : Tensor
        Shape (matrices, width, count + MORE); the columns span the leading right singular vectors.
    before : Tensor or None
        The same, a step earlier.
    near : bool
        Whether the values may be accepted after one iteration: at other times its test is spared.
    """

    directions: Tensor
    before: Tensor | None = None
    near: bool = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        before = None if self.before is None else self.before.clone()
        return {"directions": self.directions.clone(), "before": before, "near": self.near}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Continue from `state`."""
        before = state["before"]
        return cls(state["directions"].clone(), None if before is None else before.clone(), state["near"])

    def moved_on(self) -> Tensor:
        """Where the columns' space would be if it moved as it did in the step before: shape of the directions."""
        if self.before is None:
            return self.directions
        inner = float64(self.before.mT @ self.before), float64(self.before.mT @ self.directions)
        factor, failed = torch.linalg.cholesky_ex(inner[0])
        if bool(failed.any()):
            return self.directions
        seen = torch.cholesky_solve(inner[1], factor).to(self.directions.device, self.directions.dtype)
        # What of the last directions is in the space before, once; what is new in them, twice.
        return 2 * self.directions - self.before @ seen


@dataclass
class Found:
    """Leading values of some matrices, and the block for the next step.

    Attributes
    ----------
    values : Tensor
        Shape (matrices, count), float64, descending; NaN where a matrix is not finite.
    block : Block
        For the next step.
    iterations : int
        Block iterations; 0 where the matrices were decomposed.
    """

    values: Tensor
    block: Block
    iterations: int


def worthwhile(sizes: Sequence[int], width: int, count: int) -> list[bool]:
    """Which matrices to follow: those that hold more than is followed, if that is cheaper than decomposing all of them.

    Parameters
    ----------
    sizes : sequence of int
        Rows of each matrix; the largest is thought to hold the rows of the others.
    width : int
        Columns of all of them.
    count : int
        How many values are wanted.
    """
    block = count + MORE
    large = [size for size in sizes if 2 * block <= min(size, width)]
    followed = PRODUCTS * PRODUCT_COST * sum(large) * width * block + CALLS_COST
    # Gram matrices of columns add up over groups; those of rows do not.
    grams = [size**2 * width for size in large if size < width]
    grams.append(width**2 * max((size for size in large if size >= width), default=0))
    sides = [min(size, width) for size in large]
    decomposed = GRAM_COST * sum(grams) + sum(CUBE_COST * side**3 + SQUARE_COST * side**2 for side in sides)
    return [followed < decomposed and size in large for size in sizes]


def leading_values(matrices: Sequence[Tensor], count: int, last: Block | None) -> Found:
    """Leading singular values of matrices of one width.

    Parameters
    ----------
    matrices : sequence of Tensor
        Each (rows, width), with at least count + MORE rows and columns.
    count : int
        How many values.
    last : Block or None
        `Found.block` of the last step.
    """
    if last is not None and last.directions.shape == (len(matrices), matrices[0].shape[1], count + MORE):
        directions = last.moved_on()
        if not last.near:
            directions = _directions(_back(matrices, [m @ each for m, each in zip(matrices, directions, strict=True)]))
        for iteration in range(1 if last.near else 2, ITERATIONS + 1):
            found = _iterate(matrices, count, directions)
            if found is None:
                break
            values, directions, error = found
            if error <= TOLERANCE:
                return Found(
                    values, Block(directions, last.directions, iteration == 1 or error <= FAR_BELOW), iteration
                )
    return _decompose(matrices, count)


def _back(matrices: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """Products of the transposed matrices with images, shape (matrices, width, columns)."""
    room = images[0].new_empty(len(matrices), matrices[0].shape[1], images[0].shape[1])
    for matrix, image, out in zip(matrices, images, room, strict=True):
        torch.mm(matrix.mT, image, out=out)
    return room


def _iterate(matrices: Sequence[Tensor], count: int, directions: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """One block iteration: values, better directions, and the largest error relative to each largest value.

    None where a block cannot be made orthonormal or a matrix is not finite.
    """
    wide = float64(directions)
    factor, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        return None
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    blocks = directions @ inverse.mT.to(directions.device, directions.dtype)
    images = [matrix @ block for matrix, block in zip(matrices, blocks, strict=True)]
    back = _back(matrices, images)
    squares, rotation = torch.linalg.eigh(torch.stack([wide.mT @ wide for wide in map(float64, images)]))
    squares, rotation = squares.flip(-1).clamp_min(0), rotation.flip(-1).to(blocks.device, blocks.dtype)
    back = back @ rotation
    wanted, gap = squares[:, :count], squares[:, :count] - squares[:, -1:]
    ritz = (blocks @ rotation[:, :, :count]) * wanted.to(blocks.device, blocks.dtype).unsqueeze(1)
    bound = (back[:, :, :count] - ritz).norm(dim=1).to(wanted.device, wanted.dtype)
    gap = gap.clamp_min(torch.finfo(torch.float64).tiny)
    shift = torch.minimum(bound, bound**2 / gap)  # of the squares
    error = ((wanted + shift).sqrt() - wanted.sqrt()).amax(1) / wanted[:, 0].sqrt()
    # A matrix of zeros gives NaN here, which no bound admits.
    largest = float(error.nan_to_num(nan=math.inf).max())
    return wanted.sqrt(), _directions(back), largest


def _directions(columns: Tensor) -> Tensor:
    """Columns of length 1."""
    return columns / columns.norm(dim=1, keepdim=True).clamp_min(torch.finfo(columns.dtype).tiny)


def _decompose(matrices: Sequence[Tensor], count: int) -> Found:
    values, directions = zip(*(_leading_of_one(matrix, count) for matrix in matrices), strict=True)
    return Found(torch.stack(values), Block(torch.stack(directions)), 0)


def _leading_of_one(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading values of one matrix, and directions, by a decomposition."""
    rows = float64(matrix)
    finite = torch.isfinite(rows).all()
    rows = torch.where(finite, rows, 0.0)
    wide = rows.shape[0] < rows.shape[1]
    squares, vectors = torch.linalg.eigh(rows @ rows.mT if wide else rows.mT @ rows)
    squares, vectors = squares.flip(-1)[:count].clamp_min(0), vectors.flip(-1)[:, : count + MORE]
    if wide:  # from left to right singular vectors
        vectors = torch.linalg.qr(rows.mT @ vectors).Q
    return torch.where(finite, squares.sqrt(), math.nan), vectors.to(matrix.device, matrix.dtype).contiguous()
