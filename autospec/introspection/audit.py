"""The watcher proves itself: shares against the gradient that arrived, spectra against float64."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .factors import ROUNDING_OF_WALK
from .pending import Pending
from .rows import RowMap
from .spectra import float64

# The shares' sum and the gradient that arrived are two float32 sums of the same products in another order.
GUARD_TOLERANCE = 8.0
# Rounding of what torch carries back through a matrix exponential or a decomposition of a weight, in those units (measured: 27).
ROUNDING_OF_COMPUTED = 64
# The shares are compared with the gradient at every so many recorded steps: a model may change while it trains.
GUARDED_EVERY = 64
# Rounding of torch's sum over very many rows that cancel, in units of the product of the factors' norms (measured: 0.14, where
# an instance norm undoes the scale of a convolution of one channel), as part of the tolerance.
LONG_SUM = 0.4
# Part of a gradient in rows that `valid` leaves out from which on the mask may be meant for other rows.
LEFT_OUT = 0.01
# Error of a recorded value, in units of the largest, that rounding never is: above what float32 loses where rows cancel, and on
# a GPU what TF32 does, in which torch multiplies if it is told to, and convolves of its own accord.
WRONG, WRONG_ON_GPU = 1e-3, 0.1


class Audit:
    """What the watcher found out about its own exactness.

    Parameters
    ----------
    every : int, optional
        Audit every k-th recorded step; the first alone by default.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._missed = self._warned_wrong = False
        self._found: dict[str, Any] = {
            "steps": [],
            "largest_error": 0.0,
            "largest_guard_deviation": 0.0,
            "guard_tolerance": GUARD_TOLERANCE,
            "outside": {},
            "left_out": {},
            "probe_passes": 0,
            "batch_dims": [],
            "samples_without_label": {},
        }

    def due(self, recorded: int) -> bool:
        """Whether the next record, the one with this number, is audited."""
        return self._missed or (recorded == 0 if self._every is None else recorded % self._every == 0)

    def guard_due(self, recorded: int) -> bool:
        """Whether the shares of the next record, the one with this number, are compared with the gradient that arrived."""
        return recorded % GUARDED_EVERY == 0

    @staticmethod
    def chosen(names: Sequence[str], step: int) -> str:
        """Return the one layer that is compared with float64 at a step; drawn without any global generator."""
        return random.Random(step).choice(list(names))

    def summary(self) -> dict[str, Any]:
        """Everything found so far, as plain lists and numbers."""
        return copy.deepcopy(self._found)

    def restore(self, summary: dict[str, Any]) -> None:
        """Continue from a `summary`."""
        self._found = copy.deepcopy(summary)

    def probed(self, found: RowMap, missing: dict[str, int]) -> None:
        """Note how rows were traced to samples."""
        self._found["probe_passes"] = max(self._found["probe_passes"], found.passes)
        self._found["batch_dims"] = list(found.reading.batch_dims)
        self._found["samples_without_label"] = missing

    def audited(self, step: int, compared: bool) -> None:
        """Note that a step was audited; where the layer to be compared had no gradient, the next step is audited too."""
        self._found["steps"].append(step)
        self._missed = not compared

    def guard(self, name: str, pending: Pending) -> None:
        """Compare the sum of the shares with the gradient that arrived; warn of what came from no row."""
        if pending.arrived is None or pending.unnoted:
            return
        if pending.left_out is not None:
            self._left_out(name, pending.left_out, pending.arrived)
        deviation, fraction = deviation_of_sum(pending, *sum_of_shares(pending))
        if deviation > GUARD_TOLERANCE:
            self._outside(name, fraction, stacklevel=5)
        else:
            self._found["largest_guard_deviation"] = max(self._found["largest_guard_deviation"], deviation)

    def _left_out(self, name: str, left_out: Tensor, rest: Tensor) -> None:
        """Warn of a mask that leaves out what the layer learns from."""
        size = float(torch.linalg.matrix_norm(left_out + rest))
        fraction = float(torch.linalg.matrix_norm(left_out)) / size if size else 0.0
        if not fraction > LEFT_OUT:
            return
        self._note(
            "left_out",
            name,
            fraction,
            f"rows that valid= leaves out hold {_percent(fraction)} of the gradient of '{name}', and the groups' shares do not "
            "contain them: either the loss depends on these positions, or the layer's rows lie in another order than the "
            "columns of valid=, as where a series is turned round; leave the layer out with layers=, or valid= away.",
            stacklevel=6,
        )

    def penalised(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """Note a gradient all of which came through derivatives, in a backward pass of its own."""
        total = gradient if parameter.grad is None else gradient + parameter.grad
        self._outside(name, float(gradient.norm() / total.norm()), stacklevel=4)

    def _outside(self, name: str, fraction: float, stacklevel: int) -> None:
        self._note(
            "outside",
            name,
            fraction,
            f"{_percent(fraction)} of the gradient of '{name}' comes from no sample's row, and the groups' shares do not contain "
            "it: a penalty on weights or on gradients is such a part, and what a hook of the weight's adds to its gradient or takes "
            "from it; but a use of the weight outside its layer should be replaced by a call of the layer, or the weight left out with "
            "layers=.",
            stacklevel=stacklevel + 1,
        )

    def _note(self, what: str, name: str, fraction: float, sentence: str, stacklevel: int) -> None:
        """Keep the largest part of a layer's gradient that is in no share, and warn of the first."""
        if name not in self._found[what]:
            warnings.warn(sentence, stacklevel=stacklevel)
        self._found[what][name] = max(self._found[what].get(name, 0.0), fraction)

    def compare(self, name: str, pending: Pending, recorded: np.ndarray, index: np.ndarray, groups: int) -> None:
        """Compare recorded gradient spectra with singular values of shares formed in float64; warn of what is not rounding.

        Parameters
        ----------
        name : str
            Of the parameter.
        pending : Pending
            Holds the shares in float64.
        recorded : ndarray, shape (groups, singular values)
            What was recorded.
        index : ndarray of int, shape (singular values,)
            Their numbers, from 1.
        groups : int
            Number of groups.
        """
        batch: float | None = None
        for group in range(groups):
            keys = [key for key in pending.exact if np.frombuffer(key, dtype=bool)[group]]
            if not keys:
                continue
            total = torch.stack([pending.exact[key] for key in keys]).sum(0)
            if not torch.isfinite(total).all():
                continue
            exact = torch.linalg.svdvals(total).cpu().numpy()
            batch = float(exact[0]) if batch is None else batch
            scale = exact[0] if exact[0] >= 1e-3 * batch else batch
            usable = index <= len(exact)
            if not scale or not usable.any():
                continue
            error = float(np.abs(recorded[group, usable] - exact[index[usable] - 1]).max() / scale)
            # Where rows cancel altogether, the largest value is itself no more than rounding.
            wrong = error > WRONG and error * scale > GUARD_TOLERANCE * sum_of_shares(pending)[1]
            self._deviates(f"gradients of '{name}'", error, wrong, not total.is_cpu, stacklevel=5)

    def compare_followed(self, what: str, recorded: Tensor, exact: Tensor, on_gpu: bool) -> None:
        """Compare values that the tracked solver followed with those of a decomposition, each (groups, values)."""
        errors = (recorded - exact).abs().amax(1) / exact[:, 0]
        error = float(errors.nan_to_num(0.0).max())
        self._deviates(what, error, True, on_gpu, stacklevel=7)

    def _deviates(self, what: str, error: float, wrong: bool, on_gpu: bool, stacklevel: int) -> None:
        """Keep the largest deviation from float64, and warn, once, of one that is not rounding."""
        self._found["largest_error"] = max(self._found["largest_error"], error)
        if wrong and error > (WRONG_ON_GPU if on_gpu else WRONG) and not self._warned_wrong:
            self._warned_wrong = True
            warnings.warn(
                f"singular values recorded of the {what} are off by {error:.2g} of the largest one, as a comparison with float64 "
                "shows, which is more than rounding: autospec is at fault, so do not rely on this record, and please report it "
                "(said once).",
                stacklevel=stacklevel,
            )


def _percent(fraction: float) -> str:
    """A part in words: 104 %, 2.5 %, 0.069 %."""
    return f"{100 * fraction:.0f} %" if fraction >= 0.1 else f"{100 * fraction:.2g} %"


def deviation_of_sum(pending: Pending, total: Tensor, unit: float) -> tuple[float, float]:
    """How far the sum of shares is from the gradient that arrived, which does not have to be finite.

    Parameters
    ----------
    pending : Pending
        What has arrived.
    total : Tensor
        The sum.
    unit : float
        What its rounding may be, from `rounding_of_sum`.

    Returns
    -------
    float, float
        In units of the rounding, 0 where that is not finite; and as a part of the gradient.
    """
    assert pending.arrived is not None
    outside = torch.linalg.matrix_norm(pending.arrived - total)
    deviation = float(outside) / unit if unit else 0.0
    if deviation > GUARD_TOLERANCE and pending.by_kernel is not None:
        outside = torch.linalg.matrix_norm(pending.arrived - float64(pending.by_kernel))
        deviation = float(outside) / unit
    if not np.isfinite(deviation):
        return 0.0, 0.0
    return deviation, float(outside / torch.linalg.matrix_norm(pending.arrived)) if deviation else 0.0


def cancels(pending: Pending) -> bool:
    """Whether the shares sum to zero, up to rounding; True where none are recorded."""
    if not pending.shares.counts:
        return True
    total, unit = sum_of_shares(pending)
    return float(torch.linalg.matrix_norm(total)) <= GUARD_TOLERANCE * unit


def sum_of_shares(pending: Pending) -> tuple[Tensor, float]:
    """Sum of the groups' shares, and the unit of its rounding."""
    matrices = [float64(pending.shares.matrix([key])) for key in pending.shares.counts]
    total = torch.stack(matrices).sum(0)
    # The gradient is one sum over all rows: with many groups it is larger than each of their shares.
    return total, rounding_of_sum(pending, [*matrices, total])


def rounding_of_sum(pending: Pending, matrices: Sequence[Tensor]) -> float:
    """What the rounding of a gradient may be that is as large as the largest of some matrices."""
    scale = max(float(torch.linalg.matrix_norm(matrix)) for matrix in matrices)
    rounding = torch.finfo(pending.dtype or torch.float32).eps
    unit = rounding * scale * max(sum(pending.rows.values()), *pending.shape) ** 0.5
    unit *= ROUNDING_OF_COMPUTED if pending.computed else 1
    # Near a stationary point rows cancel within each share, too.
    squares = pending.shares.rounding_of_products(list(pending.shares.counts), 0.0)
    walk = float(pending.walk) ** 0.5
    factors = walk * sum(pending.rows.values()) ** 0.5
    return max(
        unit,
        (squares or 0.0) ** 0.5,
        rounding * ROUNDING_OF_WALK * walk,
        rounding * LONG_SUM / GUARD_TOLERANCE * factors,
    )
