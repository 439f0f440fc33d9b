"""Leading singular values followed from one step of the training to the next.

The spectrum of a wide adjoint changes little from step to step.  A block of vectors that spanned its leading right
singular subspace at the last step nearly does so now, and more nearly if it is moved on as it moved in the step before; a
product with the matrix and one back give its leading values, instead of a decomposition.  A third product, with the wanted
vectors alone, gives the residual of the Rayleigh-Ritz pairs, which bounds the error of the values and is quadratic in it
(Parlett 1998, "The symmetric eigenvalue problem", ch. 11); where the bound is too large after a few iterations, the matrix is
decomposed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .spectra import float64, leading_eigenpairs, times_own_transpose

# Vectors beyond those that are wanted: the gap to what lies outside the block decides how fast it converges.
MORE = 8
# Largest error that is accepted, in units of the largest value; half of what every recorded spectrum keeps to.
TOLERANCE = 5e-7
ITERATIONS = 6
# An error after two iterations from which on one may do at the next step.
FAR_BELOW = 1e-7
# What the Gram matrix of the images is shifted by before its Cholesky decomposition, relative to its trace.
SHIFT = 1e-14
# Part of an image that must not lie in the space of those before it: what is left of it has lost that many digits.
DEPENDENT = 1e-3
# Part of the difference between the last wanted value and the block's last, squared, that unseen parts may gain in a step.
NEW = 0.5
# Part of what the block does not hold by which that may lag behind where the block's part becomes less in a step.
LAG = 0.05
# What the rounding of products adds to what the block holds, in the mean, relative to that.
ROUNDED = 4e-7
# Steps between looks at what the block does not hold, and products in each.
LOOKS_AROUND, POWERS = 16, 2
# Values below so many roundings of the largest have no direction of their own.
LOST = 100
# Rounding of a product with a vector, in units of eps times the largest value (measured: 1.4).
ROUNDING = 1.5
# Below this largest value products and squares may lose digits to underflow.
SMALLEST = 1e-13
# Rough costs in seconds, one core: of a product with a block and of a Gram matrix for each product of their sizes, of
# eigenvalues for each cube and each square of the side, and of the many calls of the iterations.
PRODUCT_COST, GRAM_COST, CUBE_COST, SQUARE_COST, CALLS_COST = 5e-11, 3.2e-11, 8e-11, 2.2e-8, 1e-3
PRODUCTS = 3  # in a step, on average


@dataclass
class Block:
    """What is followed from step to step.

    Attributes
    ----------
    directions : Tensor
        Shape (matrices, width, count + MORE); the orthonormal columns span the leading right singular vectors.
    seen, unseen : Tensor
        Shape (matrices,), float64; how much of each matrix's squared norm the block holds, and how much it does not.
    before : Tensor or None
        The directions a step earlier.
    iterations : int
        How many are expected at the next step: tests that would fail are spared.
    age : int
        Steps since a decomposition.
    """

    directions: Tensor
    seen: Tensor
    unseen: Tensor
    before: Tensor | None = None
    iterations: int = 2
    age: int = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return _cloned({name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Continue from `state`."""
        return cls(**_cloned(state))

    def moved_on(self) -> Tensor:
        """Where the columns' space would be if it moved as it did in the step before: shape of the directions."""
        if self.before is None:
            return self.directions
        # What of the last directions is in the space before, once; what is new in them, twice.
        return torch.baddbmm(self.directions, self.before, self.before.mT @ self.directions, beta=2, alpha=-1)


def _cloned(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}


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


@functools.lru_cache(1024)
def worthwhile(sizes: tuple[int, ...], width: int, count: int) -> tuple[bool, ...]:
    """Which matrices to follow: those that hold more than is followed, if that is cheaper than decomposing all of them.

    Parameters
    ----------
    sizes : tuple of int
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
    return tuple(followed < decomposed and size in large for size in sizes)


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
        directions, first = last.moved_on(), 1
        if last.age % LOOKS_AROUND == LOOKS_AROUND - 1:
            directions = torch.cat([directions, _looked_around(matrices, last)], dim=2)
        if last.iterations > 1:
            _, back = _products(matrices, directions)
            lengths = back.norm(dim=1, keepdim=True).clamp_min(torch.finfo(back.dtype).tiny)
            directions, first = back / lengths, 2
        for iteration in range(first, ITERATIONS + 1):
            found = _iterate(matrices, count, directions, tested=iteration >= last.iterations - 1)
            if found is None:
                break
            lengths, directions, error = found
            if error <= TOLERANCE:
                lengths, directions = lengths[:, : count + MORE], directions[:, :, : count + MORE].contiguous()
                seen = lengths.square().sum(1)
                unseen = _squared_norms(matrices).to(seen.device) - seen
                if bool(_something_new(lengths, count, seen, unseen, last).any()):
                    break
                expected = 1 if error <= FAR_BELOW and iteration == 2 else iteration
                block = Block(directions, seen, unseen, last.directions, expected, last.age + 1)
                return Found(lengths[:, :count], block, iteration)
    return _decompose(matrices, count)


def _looked_around(matrices: Sequence[Tensor], last: Block) -> Tensor:
    """A direction of what the block does not hold, shape (matrices, width, 1), by the power method from a random one.

    What has grown there slowly is in it, and takes a place in the block as soon as it is larger than the block's last value.
    """
    found = _drawn(last.directions, 1, last.age).expand(len(matrices), -1, -1)
    for _ in range(POWERS):
        found = found - last.directions @ (last.directions.mT @ found)
        _, found = _products(matrices, found / found.norm(dim=1, keepdim=True))
    return found / found.norm(dim=1, keepdim=True)


def _something_new(lengths: Tensor, count: int, seen: Tensor, unseen: Tensor, last: Block) -> Tensor:
    r"""Whether something as large as the wanted values may have appeared where no direction of the block sees it.

    The residual proves each value to be a singular value, not that no larger one was missed.  One that has appeared since the
    last step adds to what the block does not hold, :math:`\lVert M \rVert_F^2 - \sum_j \sigma_j^2`, at least what it exceeds
    the block's last value by.  What was there may change as the rest does.
    """
    change = seen / last.seen
    expected = last.unseen * torch.where(change < 1, (change + LAG).clamp_max(1), change)
    grown = unseen - expected - ROUNDED * seen
    return grown > NEW * (lengths[:, count - 1].square() - lengths[:, -1].square())


def _squared_norms(matrices: Sequence[Tensor]) -> Tensor:
    """Squares of the Frobenius norms, float64, shape (matrices,)."""
    whole, norms = matrices[0], []
    of_rows = torch.linalg.vector_norm(whole, dim=1).double().square()
    for matrix in matrices:
        # Groups are rows of the whole batch, as a rule.
        first, within = divmod(matrix.data_ptr() - whole.data_ptr(), whole.stride(0) * whole.itemsize)
        part = of_rows[first : first + len(matrix)] if first >= 0 and not within else of_rows[:0]
        if len(part) != len(matrix) or matrix.stride() != whole.stride():
            part = torch.linalg.vector_norm(matrix, dim=1).double().square()
        norms.append(part.sum())
    return torch.stack(norms)


def _iterate(
    matrices: Sequence[Tensor], count: int, directions: Tensor, tested: bool
) -> tuple[Tensor, Tensor, float] | None:
    r"""One block iteration: all values, better directions, and, if tested, the largest error relative to each largest value.

    With the images :math:`X = M V` of the directions and :math:`Y = M^\top X`, the pencil :math:`(Y^\top Y, X^\top X)` has the
    squares of the Rayleigh-Ritz values of :math:`M M^\top` in the space of X, which is nearer to the left singular vectors than V
    is to the right ones.  None where a matrix or a product is not finite.
    """
    images, back = _products(matrices, directions)
    inner = _inner_products(images)
    factor, failed = torch.linalg.cholesky_ex(inner)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    if bool((pivots < DEPENDENT**2 * inner.diagonal(dim1=1, dim2=2)).any()):  # the last are rounding of the first
        images, back = _products(matrices, torch.linalg.qr(directions).Q)
        inner = _inner_products(images)
        factor, failed = torch.linalg.cholesky_ex(inner)
    outer = times_own_transpose(float64(back).mT)
    half = torch.linalg.solve_triangular(factor, outer, upper=False)
    if bool(failed.any()) or not bool(torch.isfinite(half).all()):
        return None
    squares, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    rotation = torch.linalg.solve_triangular(factor.mT, vectors.flip(-1), upper=True)
    lengths = squares.flip(-1).clamp_min(0).sqrt()
    values = lengths[:, :count]
    if bool((lengths[:, 0] < SMALLEST).any()):
        return None
    # Where a length is zero this is not finite, and the column is one that gives way.
    directions = _completed(back @ (rotation / lengths.unsqueeze(1)).to(back.device, back.dtype), lengths)
    if not tested:
        return lengths, directions, math.inf
    # The residual of the pairs, sigma u - M v; M' u is sigma v by definition.
    left = (rotation[:, :, :count] * values.unsqueeze(1)).to(back.device, back.dtype)
    lost = torch.stack(
        [
            torch.addmm(turn.mT @ image.mT, block[:, :count].T.contiguous(), matrix.mT, alpha=-1).norm(dim=1)
            for matrix, block, image, turn in zip(matrices, directions, images, left, strict=True)
        ]
    ).to(values.device, values.dtype)
    bound, gap = values * lost, values**2 - lengths[:, -1:] ** 2
    shift = torch.minimum(bound, bound**2 / gap.clamp_min(torch.finfo(torch.float64).tiny))  # of the squares
    error = (values**2 + shift).sqrt() - values + _rounding(rotation[:, :, :count], inner, outer, values, directions)
    return lengths, directions, float((error.amax(1) / values[:, 0]).nan_to_num(nan=math.inf).max())


def _rounding(rotation: Tensor, inner: Tensor, outer: Tensor, values: Tensor, directions: Tensor) -> Tensor:
    r"""What the rounding of products makes of each value, shape of the values.

    :math:`Y = M^\top X` is rounded by :math:`\varepsilon \sigma_1` times the length of each column of X, and the vector of a
    value, :math:`Y a`, by that times the entries of a, which are large where columns of X nearly depend on each other: the rest
    is cancelled, and the residual does not show it.  Across the vector that counts quadratically.  The inner products of X and of
    Y, in float64, are rounded likewise; that counts where the products were formed in float64, too.
    """
    weights, eps = rotation.square(), torch.finfo(torch.float64).eps
    sizes, squares = ((each.diagonal(dim1=1, dim2=2).unsqueeze(1) @ weights).squeeze(1) for each in (inner, outer))
    moved = sizes.sqrt() * (ROUNDING * torch.finfo(directions.dtype).eps * values[:, :1])
    across = moved**2 / (values + (values**2 - moved**2).clamp_min(0).sqrt())
    of_squares = (values**2 + eps * (squares + values**2 * sizes)).sqrt() - values
    return torch.minimum(moved, moved / math.sqrt(directions.shape[1]) + across) + of_squares


def _products(matrices: Sequence[Tensor], directions: Tensor) -> tuple[list[Tensor], Tensor]:
    r"""Images :math:`X = M V`, each (rows, columns), and :math:`M^\top X`, shape of the directions."""
    images, back = [], torch.empty_like(directions)
    for matrix, block, out in zip(matrices, directions, back, strict=True):
        images.append(matrix @ block)
        torch.mm(matrix.mT, images[-1], out=out)
    return images, back


def _inner_products(images: Sequence[Tensor]) -> Tensor:
    """Inner products of the columns of each, a little shifted, in float64."""
    inner = torch.stack([times_own_transpose(float64(image).mT) for image in images])
    diagonal = inner.diagonal(dim1=1, dim2=2)
    diagonal += SHIFT * diagonal.sum(1, keepdim=True)
    return inner


def _completed(directions: Tensor, lengths: Tensor) -> Tensor:
    """Orthonormal directions: those whose values are zero or rounding give way to random ones.

    A direction that the matrix does not reach sees nothing of what may appear elsewhere at a later step.
    """
    lost = lengths <= LOST * torch.finfo(directions.dtype).eps * lengths[:, :1]
    if not bool(lost.any()):
        return directions
    drawn = _drawn(directions, directions.shape[2], 0)
    found = torch.linalg.qr(torch.where(lost.unsqueeze(1).to(directions.device), drawn, directions))
    return found.Q * found.R.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)


def _drawn(like: Tensor, count: int, seed: int) -> Tensor:
    """Random directions of about unit length, shape (width, count), the same for all matrices."""
    generator = torch.Generator().manual_seed(seed)  # of our own: the training's is not touched
    width = like.shape[1]
    return torch.randn(width, count, generator=generator, dtype=like.dtype).div_(math.sqrt(width)).to(like.device)


def _decompose(matrices: Sequence[Tensor], count: int) -> Found:
    lengths, directions, unseen = map(
        torch.stack, zip(*(_leading_of_one(matrix, count) for matrix in matrices), strict=True)
    )
    return Found(lengths[:, :count], Block(directions, lengths.square().sum(1), unseen), 0)


def _leading_of_one(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading values of one matrix, directions, and what of its squared norm these do not hold, by a decomposition."""
    rows = float64(matrix)
    finite = torch.isfinite(rows).all()
    rows = torch.where(finite, rows, 0.0)
    wide = rows.shape[0] < rows.shape[1]
    gram = times_own_transpose(rows if wide else rows.mT)
    squares, vectors = leading_eigenpairs(gram, count + MORE)
    lengths = squares.clamp_min(0).sqrt()
    if wide:  # from left to right singular vectors
        vectors = torch.linalg.qr(rows.mT @ vectors).Q
    vectors = vectors.to(matrix.device, matrix.dtype).contiguous()
    directions = _completed(vectors.unsqueeze(0), lengths.unsqueeze(0))[0]
    return torch.where(finite, lengths, math.nan), directions, gram.trace() - lengths.square().sum()
