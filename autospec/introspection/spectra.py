"""The mathematics of spectra: pure functions on tensors.

Singular values are taken from the eigenvalues of a float64 Gram matrix.  For a float32 matrix this is both
faster and more accurate than a float32 singular value decomposition, because the products of two float32
numbers are exact in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .workspace import Workspace

# Constants c of the noise floor, one per statistic.  `benchmarks/noise_floor.py` measures them: the largest
# deviation of a float32 training step's spectra from those of the same step in float64, in units of
# eps * sigma_1 * sqrt(max(m, n, rows)), doubled and rounded up to one digit.  The training's own rounding is in
# it.  Networks with tanh and sigmoid, up to 300 steps: in a classifier that has learned its samples by heart,
# probability minus one cancels and the deviation grows beyond any constant.
NOISE_CONSTANTS = {"gradient": 20.0, "activation": 0.2, "adjoint": 30.0}
# The same in half precision, measured under autocast to bfloat16: there the largest deviations are fewer of its large units.
# Activations, which are rounded once, keep the constant of single precision, the larger one (0.07 was measured).
NOISE_CONSTANTS_OF_HALF = {"gradient": 2.0, "activation": NOISE_CONSTANTS["activation"], "adjoint": 0.8}
# torch computes the lower triangle of a symmetric product in this many block rows, which costs 5/8 of the whole.
BLOCKS = 4
SMALLEST_IN_BLOCKS = 96
# Rows from which on numpy finds eigenvalues faster than torch.
SMALLEST_FOR_NUMPY = 256
# What a Gram matrix is shifted by before its Cholesky decomposition, relative to its trace; and how much smaller than
# its factors a share may be, in the mean over rows, for the shift not to matter.
SHIFT = 1e-16
CANCELLED = 0.3
# Numbers that are converted to float64 at a time: what fits into a core's cache; on a GPU every piece costs several launches.
PIECE, PIECE_ON_A_GPU = 2**17, 2**25
# Kinds of devices that have no float64: Apple's.
WITHOUT_FLOAT64 = {"mps"}


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; what is recorded of another's tensors is computed on the processor."""
    return device.type not in WITHOUT_FLOAT64


_irregular_vectors: dict[torch.dtype, Tensor] = {}


def irregular(count: int, dtype: torch.dtype) -> Tensor:
    """Numbers in (-0.5, 0.5) without regularity, the same every time and drawn from no generator; shape (count,)."""
    vector = _irregular_vectors.get(dtype)
    if vector is None or len(vector) < count:
        vector = torch.arange(count, dtype=torch.float64).mul_(0.6180339887498949).frac_().sub_(0.5).to(dtype)
        _irregular_vectors[dtype] = vector
    return vector[:count]


def float64(matrix: Tensor, workspace: Workspace | None = None) -> Tensor:
    """Convert to float64, or complex128, on the CPU where the device has no such type (Apple's)."""
    matrix = matrix if has_float64(matrix.device) else matrix.cpu()
    if matrix.is_complex():
        return matrix.to(torch.complex128)
    if workspace is None or matrix.dtype == torch.float64:
        return matrix.double()
    return workspace.take(tuple(matrix.shape), torch.float64, matrix.device).copy_(matrix)


def _float64_for_now(matrix: Tensor, workspace: Workspace | None) -> Tensor:
    """The same until the next such call, in memory that stays in the processor's cache."""
    if workspace is None or matrix.dtype == torch.float64:
        return float64(matrix)
    return workspace.scratch("float64", tuple(matrix.shape), torch.float64, matrix.device).copy_(matrix)


def times_own_transpose(matrix: Tensor) -> Tensor:
    """Product of matrices with their own transposes, shape (..., m, m) for (..., m, n).

    numpy recognises such a product and computes one triangle of it, in half to two thirds of torch's time.
    """
    if matrix.is_cpu and numpy_has_one_thread():
        array = matrix.numpy()
        with np.errstate(all="ignore"):  # what is not finite stays so, and is told of once
            return torch.from_numpy(np.matmul(array, array.swapaxes(-1, -2)))
    size = matrix.shape[-2]
    if size < SMALLEST_IN_BLOCKS or not matrix.is_cpu:
        return matrix @ matrix.mT
    result = matrix.new_empty(*matrix.shape[:-1], size)
    block = -(-size // BLOCKS)
    for start in range(0, size, block):
        stop = min(start + block, size)
        part = matrix[..., start:stop, :] @ matrix[..., :stop, :].mT
        result[..., start:stop, :stop] = part
        result[..., :start, start:stop] = part[..., :start].mT
    return result


@functools.cache
def numpy_has_one_thread() -> bool:
    """Whether numpy's linear algebra has one thread, and scipy's, which may be a library of its own.

    With more, threads that wait for work by spinning make small products dearer than torch's, which shares its threads with
    the training.
    """
    import scipy.linalg  # noqa: F401, what is not loaded is not counted
    from threadpoolctl import threadpool_info

    return all(pool["num_threads"] == 1 for pool in threadpool_info() if pool["user_api"] == "blas")


def smaller_gram(matrix: Tensor, workspace: Workspace | None = None) -> Tensor:
    """Gram matrix on the smaller side, in float64.

    Parameters
    ----------
    matrix : Tensor
        Shape (..., m, n), real.
    workspace : Workspace, optional
        Memory for the conversion.

    Returns
    -------
    Tensor
        Shape (..., s, s) with s = min(m, n), float64.
    """
    wide = _float64_for_now(matrix, workspace)
    return times_own_transpose(wide.mT if wide.shape[-2] > wide.shape[-1] else wide)


def column_gram(rows: Tensor, workspace: Workspace) -> Tensor:
    """Gram matrix of the columns of many rows, in float64.

    Parameters
    ----------
    rows : Tensor
        Shape (rows, width), or (items, width, positions) for an image's channels, whose rows are items x positions.
    workspace : Workspace
        Memory for the conversion, which goes piece by piece.

    Returns
    -------
    Tensor
        Shape (width, width), float64.
    """
    image = rows.ndim == 3
    width = rows.shape[1]
    positions = rows.shape[2] if image else 1
    count = max(1, (PIECE if rows.is_cpu else PIECE_ON_A_GPU) // (width * positions))
    if len(rows) <= count and not image:
        return times_own_transpose(float64(rows).mT)
    total: Tensor | None = None
    room = workspace.scratch("float64", (min(count, len(rows)) * positions * width,), torch.float64, rows.device)
    for piece in rows.split(count):
        wide = room[: piece.numel()]
        if image:
            wide = wide.view(width, len(piece), positions)
            wide.copy_(piece.permute(1, 0, 2))
            wide = wide.flatten(1)
        else:
            wide = wide.view(len(piece), width).copy_(piece).mT
        product = times_own_transpose(wide)
        total = product if total is None else total.add_(product)
    assert total is not None  # there is one piece at least
    return total


def row_factor(rows: Tensor, workspace: Workspace) -> Tensor:
    """Cholesky factor of the rows' Gram matrix, shifted by a little more than its rounding; NaN where there is none."""
    gram = workspace.memo(rows, smaller_gram).clone()
    gram.diagonal().add_(SHIFT * gram.trace())
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.where(failed == 0, factor, math.nan)


def gram_of_few(activation: Tensor, adjoint: Tensor, workspace: Workspace, constant: bool) -> Tensor:
    r"""Gram matrix with the squared singular values of a share of few rows as eigenvalues.

    The share :math:`\Delta^\top A` of N rows has the same singular values, but for zeros, as the N-square
    :math:`L^\top \Delta \Delta^\top L` has eigenvalues' roots, with :math:`A A^\top = L L^\top`.

    Parameters
    ----------
    activation : Tensor
        Shape (N, inputs).
    adjoint : Tensor
        Shape (N, outputs).
    workspace : Workspace
        Knows the factors' Gram matrices where their own spectra are wanted too.
    constant : bool
        Whether the activation is the same as in the last step.

    Returns
    -------
    Tensor
        Shape (N, N), float64; by a QR decomposition, which costs twice as much, where the factors nearly cancel, since the
        error here is relative to the product of their norms.
    """
    if not activation.is_cpu:  # the choice below would wait for the device
        return smaller_gram(reduced_factor(activation, adjoint))
    factor = workspace.memo(activation, row_factor, lasting=constant)
    result = factor.mT @ (workspace.memo(adjoint, smaller_gram) @ factor)
    largest = factor.square().sum() * workspace.memo(adjoint, smaller_gram).trace()
    if bool(result.trace() > CANCELLED**2 * largest / len(activation)):
        return result
    return smaller_gram(reduced_factor(activation, adjoint))


def gram_by_rows(adjoint: Tensor, activation: Tensor, workspace: Workspace) -> Tensor:
    r"""Gram matrix on the outputs' side of a share whose activation is the same at every step.

    With the rows' Gram matrix :math:`K = A A^\top` known, :math:`G G^\top = \Delta^\top K \Delta` needs no product with A.

    Parameters
    ----------
    adjoint : Tensor
        Shape (N, outputs).
    activation : Tensor
        Shape (N, inputs), fewer rows than inputs.
    workspace : Workspace
        Knows K from the last step.

    Returns
    -------
    Tensor
        Shape (outputs, outputs), float64; symmetric.
    """
    of_rows = workspace.memo(activation, smaller_gram, lasting=True)
    wide = _float64_for_now(adjoint, workspace)
    return wide.mT @ (of_rows @ wide)


def reduced_factor(activation: Tensor, adjoint: Tensor) -> Tensor:
    r"""Small matrix with the singular values of a share of few rows.

    With fewer rows N than the matrix has rows or columns, the share :math:`\Delta^\top A` has rank at most N.  A QR
    decomposition of the narrower factor's transpose, say :math:`\Delta^\top = Q R`, leaves :math:`R A`, with N rows and
    the same singular values.

    Parameters
    ----------
    activation : Tensor
        Shape (..., N, inputs).
    adjoint : Tensor
        Shape (..., N, outputs).

    Returns
    -------
    Tensor
        Shape (..., N, max(inputs, outputs)), float64.
    """
    narrow, wide = map(float64, sorted((activation, adjoint), key=lambda factor: factor.shape[-1]))
    if not narrow.is_cpu:  # a GPU's decomposition spreads NaN, and ends
        return torch.linalg.qr(narrow.mT, mode="r").R @ wide
    finite = torch.isfinite(narrow).flatten(-2).all(-1)[..., None, None]
    solvable = torch.where(finite, narrow, 0.0)  # LAPACK may not return from NaN
    reduced = torch.linalg.qr(solvable.mT, mode="r").R @ wide
    return torch.where(finite, reduced, math.nan)


def singular_values(grams: Sequence[Tensor]) -> list[Tensor]:
    """Singular values of the matrices whose Gram matrices are given.

    Parameters
    ----------
    grams : sequence of Tensor
        Each (..., s, s), float64; the lower triangle is read.  Equal sizes are solved in one call.

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
        parts = [grams[i].reshape(-1, size, size) for i in positions]
        stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
        # An entry that is not finite makes the square on the diagonal not finite.
        finite = torch.isfinite(stacked.diagonal(dim1=-2, dim2=-1)).all(-1)
        if finite.all():
            values = eigenvalues(stacked)
        else:
            solvable = torch.where(finite[:, None, None], stacked, 0.0)
            values = torch.where(finite[:, None], eigenvalues(solvable), math.nan)
        values = values.flip(-1).clamp_min(0).sqrt()
        counts = [len(part) for part in parts]
        for position, part in zip(positions, values.split(counts), strict=True):
            results[position] = part.reshape(grams[position].shape[:-1])
    return [result for result in results if result is not None]


def eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices, ascending; the lower triangle is read.

    For large ones on the CPU numpy's LAPACK is faster than torch's (512 rows: 12 ms against 17 to 25).
    """
    if matrices.shape[-1] < SMALLEST_FOR_NUMPY or matrices.device.type != "cpu" or not numpy_has_one_thread():
        return torch.linalg.eigvalsh(matrices)
    return torch.from_numpy(np.linalg.eigvalsh(matrices.numpy()))


def leading_eigenpairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues of a symmetric matrix, descending, and their eigenvectors.

    Where it is large and on the CPU scipy is asked for these alone (512 rows, 16 of them: 16 ms against 50).

    Parameters
    ----------
    matrix : Tensor
        Shape (m, m), float64, finite.
    count : int
        How many, at most m.

    Returns
    -------
    Tensor, Tensor
        Shapes (count,) and (m, count).
    """
    size = len(matrix)
    if size < SMALLEST_FOR_NUMPY or matrix.device.type != "cpu" or not numpy_has_one_thread():
        values, vectors = torch.linalg.eigh(matrix)
    else:
        from scipy.linalg import eigh

        wanted = size - count, size - 1
        values, vectors = map(torch.from_numpy, eigh(matrix.numpy(), subset_by_index=wanted, check_finite=False))
    return values.flip(-1)[:count], vectors.flip(-1)[:, :count]


def leading_directions(matrix: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Leading right singular vectors: the directions of the layer's input along which a share is largest.

    Parameters
    ----------
    matrix : Tensor
        Shape (m, n), float64.
    count : int
        How many, at most min(m, n).
    dtype : torch.dtype
        The type in which the training computes, whose rounding has directions of its own.

    Returns
    -------
    Tensor
        Shape (n, count), orthonormal; NaN where the matrix is not finite or its rank is lower.
    """
    if not torch.isfinite(matrix).all():
        return matrix.new_full((matrix.shape[1], count), math.nan)
    _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if not values[count - 1] > values[0] * eps:
        return matrix.new_full((matrix.shape[1], count), math.nan)
    return right[:count].mT


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between two subspaces, ascending, in radians (Bjorck and Golub 1973).

    Parameters
    ----------
    first, second : Tensor
        Shape (n, count), orthonormal columns.

    Returns
    -------
    Tensor
        Shape (count,).  Small angles come from the sine, which the cosine would lose to rounding.
    """
    if torch.isnan(first).any() or torch.isnan(second).any():
        return first.new_full((first.shape[1],), math.nan)
    product = first.mT @ second
    cosines = torch.linalg.svdvals(product).clamp(max=1)
    sines = torch.linalg.svdvals(second - first @ product).flip(0).clamp(max=1)
    return torch.where(cosines**2 < 0.5, torch.arccos(cosines), torch.arcsin(sines))


def noise_floor(
    sigma_1: np.ndarray, shape: tuple[int, int], rows: np.ndarray, dtype: torch.dtype, statistic: str
) -> np.ndarray:
    r"""Level below which a singular value is rounding.

    :math:`c \, \varepsilon \, \sigma_1 \sqrt{\max(m, n, \mathrm{rows})}`, with c calibrated for each statistic, and for half precision apart.

    Parameters
    ----------
    sigma_1 : ndarray, shape (groups,)
        Largest singular value of each group.
    shape : (int, int)
        Shape of the matrix.
    rows : ndarray, shape (groups,)
        Rows that each group contributed.
    dtype : torch.dtype
        The type in which the training computes.
    statistic : {"gradient", "activation", "adjoint"}
        Which constant to use.

    Returns
    -------
    ndarray, shape (groups,)
    """
    # Singular values from a float64 Gram matrix are no better than this, even where the training computes in float64.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps ** 0.5)
    constants = NOISE_CONSTANTS_OF_HALF if torch.finfo(dtype).bits == 16 else NOISE_CONSTANTS
    return constants[statistic] * eps * sigma_1 * np.sqrt(np.maximum(rows, max(shape)))
