"""Multi-objective ICA with references (MOO-ICAR): one subject's version of given networks.

For every reference map, a weighting of the whitened volumes is sought whose map is both non-Gaussian and like the
reference.  The method is that of Du and Fan (2013, *NeuroImage* 69, 157-197), with the line search that NeuroMark
(Du et al. 2020, *NeuroImage: Clinical* 28, 102375) is run with.  In the notation of the functions below, for whitened
data Y (rank x voxels), a reference r of unit variance, b = Y r' / voxels and a weighting w of length one::

    G(w) = mean over voxels of log cosh(w'Y) - 0.3745672075        distance from a Gaussian, up to its sign
    F(w) = 1/pi atan(c G(w)^2) + 1/2 w'b                           non-Gaussian, and like the reference
    c    = tan(pi/2 w0'b) / G(w0)^2                                gives both terms the same weight at the start

Components do not see each other (no deflation), so all of them are computed in one batch.  The search is
deterministic, and it stops when its steps have become small, not when the gradient vanishes.

One deviation from the program that NeuroMark was made with: eigenvalues of the covariance are kept above 1e-10 of the
largest, there above 2.2e-16 whatever the unit of the data.  After a linear trend has been removed, two eigenvalues of
about 1e-16 straddle that bound, so rounding decides the rank.  Its second pass with a bound of 0.02, which repairs a
whitening that failed, is then never needed.

PyTorch is loaded when the function is called, so importing this module stays cheap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autospec.errors import UserError

if TYPE_CHECKING:
    import torch

GAUSSIAN_CONTRAST = 0.3745672075  # mean of log cosh of a standard Gaussian variable
LEAST_EIGENVALUE = 1e-10  # of the largest
SUFFICIENT_INCREASE = 0.02
SMALL_MOVE = 1e-5  # squared length of a step that ends the search
# The search may halve its step 100 times.  Below this step nothing that can still happen moves w by more than 1e-5:
# an accepted step is a small move and ends the search.  This leaves out three quarters of the loops.
LEAST_STEP = 1e-5
MOST_LOOPS = 100
MOST_LOOPS_CONVERGED = 1000
VOXELS_AT_A_TIME = 4096  # 53 components of that many voxels stay in a processor's cache


@dataclass(frozen=True)
class MooIcar:
    """One subject's networks.

    Attributes
    ----------
    maps : ndarray, shape (networks, voxels)
        Each of mean 0 and variance 1; the sign follows the reference.
    timecourses : ndarray, shape (volumes, networks)
        Projection of the data, less each volume's mean, on the maps.
    accepted_steps : ndarray of int, shape (networks,)
        Weightings visited, the starting one included, as GIFT counts them.
    rank : int
        How many dimensions the whitened data have.
    device : str
        Where it was computed: "cpu" or "cuda".
    """

    maps: np.ndarray
    timecourses: np.ndarray
    accepted_steps: np.ndarray
    rank: int
    device: str


def moo_icar(
    bold: Any, references: Any, dtype: str = "float32", converged: bool = False, device: str | None = None
) -> MooIcar:
    """Find one subject's version of each reference map.

    Parameters
    ----------
    bold : array-like, shape (volumes, voxels)
        Preprocessed data, in any unit.  Each volume's mean over voxels is removed.
    references : array-like, shape (networks, voxels)
        Maps of the networks, in any unit; not thresholded.
    dtype : {"float32", "float64"}
        Precision of what is done with all voxels.  Covariance, its eigenvectors and the whitening are always computed
        in float64: single precision there gives other components.
    converged : bool
        False: NeuroMark's line search, as in GIFT.  True: ascent of the same objective from the same start to where
        its gradient along the sphere vanishes.  The maps can differ much from the former.
    device : str, optional
        "cpu"; "cuda" and its kind; "auto" for CUDA where there is one that has room, else the processor; None is the
        processor.

    Returns
    -------
    MooIcar

    Raises
    ------
    UserError
        If the arrays do not fit each other, hold NaN or infinity, have fewer volumes than networks, or have a volume
        or a reference that is constant.
    """
    if dtype not in ("float32", "float64"):
        raise UserError(f"moo_icar computes in 'float32' or 'float64', not in '{dtype}'.")
    place = device_of(device)
    try:
        return _found(bold, references, dtype, converged, place)
    except RuntimeError:  # a GPU whose memory others hold, or that lets one process in at a time
        if device != "auto" or place.type == "cpu":
            raise
    return _found(bold, references, dtype, converged, device_of("cpu"))


def _found(bold: Any, references: Any, dtype: str, converged: bool, place: torch.device) -> MooIcar:
    """What `moo_icar` returns, computed in one place."""
    import torch

    precision = getattr(torch, dtype)
    data = _checked(bold, "bold", "volume", place)
    maps = _checked(references, "references", "reference", place)
    if data.shape[1] != maps.shape[1]:
        raise UserError(
            f"bold has {data.shape[1]} voxels and references has {maps.shape[1]}: both need the same voxels, "
            "as [volumes, voxels] and [networks, voxels]."
        )
    if len(data) < len(maps):
        raise UserError(f"there are {len(data)} volumes for {len(maps)} networks: at least as many are needed.")
    with torch.inference_mode():
        centred = _centred(data, precision)
        whitened = _whiten(centred)
        if len(whitened) < len(maps):
            raise UserError(
                f"the {len(data)} volumes have only {len(whitened)} independent dimensions for {len(maps)} networks: "
                "use more volumes, or remove less from them beforehand."
            )
        references_unit = _centred(maps, torch.float64)
        references_unit /= references_unit.std(1, keepdim=True)
        agreement = (whitened @ references_unit.to(precision).T).T.double() / data.shape[1]
        objective = _Objective(whitened, agreement)
        weights, accepted = _converge(objective) if converged else _line_search(objective)
        found = weights.to(precision) @ whitened
        timecourses = centred @ found.T / data.shape[1]
        return MooIcar(
            found.cpu().numpy(), timecourses.cpu().numpy(), accepted.cpu().numpy(), len(whitened), place.type
        )


class _Objective:
    """F, one for each network; ``rows`` says which networks the given weightings belong to."""

    def __init__(self, whitened: torch.Tensor, agreement: torch.Tensor):
        """Fix the weight of the two terms.

        Parameters
        ----------
        whitened : Tensor, shape (rank, voxels)
            Y.
        agreement : Tensor, shape (networks, rank)
            b, float64.
        """
        import torch

        self.whitened = whitened
        self.agreement = agreement
        at_once = whitened.shape[1] if whitened.is_cuda else VOXELS_AT_A_TIME
        self.blocks = whitened.split(at_once, dim=1)
        # The reference's least-squares weighting; of white data it is b, up to its length.
        self.start = agreement / agreement.norm(dim=1, keepdim=True)
        self.weight = torch.tan(math.pi / 2 * _dot(self.start, agreement)) / self.contrast(self.start) ** 2

    def contrast(self, weights: torch.Tensor) -> torch.Tensor:
        """G of each weighting: log cosh y = |y| + log(1 + exp(-2 |y|)) - log 2, which cannot overflow."""
        total = weights.new_zeros(len(weights))
        weights = weights.to(self.whitened.dtype)
        for block in self.blocks:
            size = (weights @ block).abs_()
            total += size.sum(1)
            total += size.mul_(-2).exp_().log1p_().sum(1)
        return total / self.whitened.shape[1] - math.log(2) - GAUSSIAN_CONTRAST

    def value(self, weights: torch.Tensor, contrast: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """F of each weighting, whose G is known."""
        return (self.weight[rows] * contrast**2).atan() / math.pi + _dot(weights, self.agreement[rows]) / 2

    def gradient(self, weights: torch.Tensor, contrast: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Gradient of F at each weighting, in all directions, not only along the sphere."""
        total = weights.new_zeros(weights.shape)
        weights = weights.to(self.whitened.dtype)
        for block in self.blocks:
            total += (weights @ block).tanh_() @ block.T
        weight = self.weight[rows]
        outer = weight / (1 + (weight * contrast**2) ** 2) * 2 * contrast / math.pi
        return outer[:, None] * total / self.whitened.shape[1] + self.agreement[rows] / 2


def _line_search(objective: _Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Climb with NeuroMark's line search: the step starts at 1, is halved where F grows too little, never grows.

    Returns
    -------
    weights : Tensor, shape (networks, rank)
        The last weighting that was tried, also where it was rejected.
    accepted : Tensor, shape (networks,)
        How many weightings were visited, the first included.
    """
    import torch

    rows = torch.arange(len(objective.start), device=objective.start.device)
    weights, result = objective.start.clone(), objective.start.clone()
    contrast = objective.contrast(weights)
    value, gradient = objective.value(weights, contrast, rows), objective.gradient(weights, contrast, rows)
    accepted, step = torch.ones_like(rows), torch.ones_like(value)
    for _ in range(MOST_LOOPS):
        slope = gradient.norm(dim=1)
        trial = _unit(weights + (step / slope)[:, None] * gradient)
        trial_contrast = objective.contrast(trial)
        trial_value = objective.value(trial, trial_contrast, rows)
        result[rows] = trial
        rejected = trial_value - value < SUFFICIENT_INCREASE * step * slope
        small = ((weights - trial) ** 2).sum(1) < SMALL_MOVE
        step = torch.where(rejected, step / 2, step)
        move = ~rejected & ~small
        if move.any():
            weights[move], value[move] = trial[move], trial_value[move]
            gradient[move] = objective.gradient(trial[move], trial_contrast[move], rows[move])
            accepted[rows[move]] += 1
        going = ~(~rejected & small) & (step >= LEAST_STEP)
        rows, weights, value, gradient, step = (each[going] for each in (rows, weights, value, gradient, step))
        if not len(rows):
            break
    return result, accepted


def _converge(objective: _Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Climb to a stationary point on the sphere, by conjugate gradients (Polak and Ribiere) with backtracking.

    Returns
    -------
    weights : Tensor, shape (networks, rank)
        Where the gradient along the sphere is below 1e-6 (1e-4 in single precision), or no step climbs any more.
    accepted : Tensor, shape (networks,)
        How many weightings were visited, the first included.
    """
    import torch

    precision = objective.whitened.dtype
    tolerance = 1e-6 if precision == torch.float64 else 1e-4
    rounding = torch.finfo(precision).eps / 10  # F of many voxels is more precise than one number
    rows = torch.arange(len(objective.start), device=objective.start.device)
    weights, result = objective.start.clone(), objective.start.clone()
    contrast = objective.contrast(weights)
    value = objective.value(weights, contrast, rows)
    slope = _along_sphere(objective.gradient(weights, contrast, rows), weights)
    direction, accepted, step = slope.clone(), torch.ones_like(rows), torch.ones_like(value)
    for _ in range(MOST_LOOPS_CONVERGED):
        climbs = _dot(slope, direction) > 0
        direction = torch.where(climbs[:, None], direction, slope)
        trial = _unit(weights + step[:, None] * direction)
        trial_contrast = objective.contrast(trial)
        trial_value = objective.value(trial, trial_contrast, rows)
        move = trial_value - value >= 0.1 * step * _dot(slope, direction) - rounding
        if move.any():
            here = trial[move]
            new = _along_sphere(objective.gradient(here, trial_contrast[move], rows[move]), here)
            old = slope[move]
            turn = (_dot(new, new - _along_sphere(old, here)) / _dot(old, old)).clamp(min=0)
            direction[move] = new + turn[:, None] * _along_sphere(direction[move], here)
            weights[move], value[move], slope[move] = here, trial_value[move], new
            accepted[rows[move]] += 1
        step = torch.where(move, 1.7 * step, step / 2)
        result[rows] = weights
        going = (slope.norm(dim=1) >= tolerance) & (step >= 1e-8)
        rows, weights, value, slope, direction, step = (
            each[going] for each in (rows, weights, value, slope, direction, step)
        )
        if not len(rows):
            break
    return result, accepted


def _whiten(centred: torch.Tensor) -> torch.Tensor:
    """Linear combinations of the volumes that are uncorrelated over voxels, each of variance 1.

    Parameters
    ----------
    centred : Tensor, shape (volumes, voxels)
        Each volume of mean 0.

    Returns
    -------
    Tensor, shape (rank, voxels)
        In the precision of ``centred``; everything on the way is float64.
    """
    import torch

    volumes, voxels = centred.shape
    covariance = torch.zeros(volumes, volumes, dtype=torch.float64, device=centred.device)
    for block in centred.split(VOXELS_AT_A_TIME, dim=1):
        precise = block.double()
        covariance += precise @ precise.T
    values, vectors = torch.linalg.eigh(covariance / voxels)
    kept = values > LEAST_EIGENVALUE * values[-1]
    whitener = (vectors[:, kept] / values[kept].sqrt()).T
    whitened = centred.new_empty(len(whitener), voxels)
    for block, target in zip(
        centred.split(VOXELS_AT_A_TIME, dim=1), whitened.split(VOXELS_AT_A_TIME, dim=1), strict=True
    ):
        target.copy_(whitener @ block.double())
    if len(whitened) < volumes:  # GIFT divides by n - 1 instead of n in this case only
        whitened *= math.sqrt((voxels - 1) / voxels)
    return whitened


def _centred(rows: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Rows less their means, which are computed in float64."""
    import torch

    means = rows.mean(1, keepdim=True, dtype=torch.float64)
    return rows.to(precision) - means.to(precision)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(1)


def _along_sphere(vectors: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Vectors without their part that points away from the sphere at the given points."""
    return vectors - _dot(vectors, at)[:, None] * at


def device_of(device: str | None) -> torch.device:
    """Where to compute: "cpu" (also for None), "cuda", or what "auto" finds; raises UserError if it is not there."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device or "cpu")
    except RuntimeError:
        raise UserError(
            f"there is no device '{device}': moo_icar runs on 'cpu' or 'cuda', or 'auto' chooses."
        ) from None
    if place.type not in ("cpu", "cuda"):
        raise UserError(f"moo_icar needs float64, so it runs on 'cpu' or 'cuda', not on '{device}'.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: let moo_icar run on 'cpu'.")
    return place


def _checked(array: Any, name: str, row: str, place: torch.device) -> torch.Tensor:
    """A tensor of at least single precision; raises UserError if its values cannot be used."""
    import torch

    # A copy where NumPy's order of bytes, or a negative stride, is one that torch does not know.
    if not isinstance(array, torch.Tensor):
        array = np.asarray(array)
        if array.dtype.kind not in "fiub":
            raise UserError(f"{name} must hold real numbers, not {array.dtype}.")
        kind = array.dtype.newbyteorder("=") if array.dtype.kind == "f" and array.dtype.itemsize >= 4 else np.float32
        array = torch.from_numpy(np.require(array, dtype=kind, requirements=["C", "W"]))
    tensor: torch.Tensor = array.detach().to(place)
    if tensor.is_complex():
        raise UserError(f"{name} must hold real numbers, not {tensor.dtype}.")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise UserError(f"{name} must be a matrix with one {row} a row, not of shape {tuple(tensor.shape)}.")
    least, most = tensor.aminmax(dim=1)
    bad = torch.nonzero(~torch.isfinite(least + most)).flatten().tolist()
    if bad:
        raise UserError(f"{name} has NaN or infinity in {row} {bad[0] + 1}: only finite numbers can be used.")
    constant = torch.nonzero(least == most).flatten().tolist()
    if constant:
        raise UserError(f"{row} {constant[0] + 1} is constant over all voxels: leave it out of {name}.")
    return tensor
