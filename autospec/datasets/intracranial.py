"""Volumes adjusted for the size of the head: mathematics alone, so that trainings depend on no reader of cohorts."""

from __future__ import annotations

from typing import Literal

import numpy as np

from autospec.errors import UserError

Adjustment = Literal["none", "proportional", "residual"]


def adjust(volumes: np.ndarray, intracranial: np.ndarray, icv: Adjustment, training: np.ndarray) -> np.ndarray:
    """Account for the size of the head.

    Parameters
    ----------
    volumes : ndarray, shape (subjects, regions)
    intracranial : ndarray, shape (subjects,)
    icv : {"none", "proportional", "residual"}
        Nothing; each volume as a share of the head; or each volume less what a straight line predicts from the head.
    training : ndarray of bool, shape (subjects,)
        Subjects to whom the line is fitted.

    Raises
    ------
    UserError
        If there are too few to fit a line.
    """
    if icv == "none":
        return volumes
    if icv == "proportional":
        return volumes / intracranial[:, None]
    if training.sum() < 3 or np.ptp(intracranial[training]) == 0:
        raise UserError("icv is residual, which needs at least three training participants whose heads differ in size.")
    centred = intracranial - intracranial[training].mean()
    fitted = volumes[training] - volumes[training].mean(0)
    slope = centred[training] @ fitted / (centred[training] ** 2).sum()
    return volumes - np.outer(centred, slope)
