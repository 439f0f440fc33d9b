"""Framewise displacement from a table of confounds: the same for a participant's own job and for the cohort's tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

DISPLACEMENT = ("framewise_displacement", "FD", "fd")
# How fMRIPrep names the six parameters of rigid motion: three shifts in mm, three turns in radians.
PARAMETERS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
HEAD_RADIUS_MM = 50.0


def framewise_displacement(motion: np.ndarray) -> np.ndarray:
    """Framewise displacement (Power et al. 2012, *NeuroImage* 59, 2142-2154).

    Parameters
    ----------
    motion : ndarray, shape (volumes, 6)
        Three shifts in mm, three turns in radians.

    Returns
    -------
    ndarray, shape (volumes,)
        In mm, on a head of radius 50 mm; NaN for the first volume, which moved from nowhere.
    """
    steps = np.abs(np.diff(motion, axis=0))
    moved = steps[:, :3].sum(axis=1) + HEAD_RADIUS_MM * steps[:, 3:].sum(axis=1)
    return np.concatenate([[np.nan], moved])


def displacement_of(columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str] | None:
    """Framewise displacement in a table of confounds, and where it is from.

    Parameters
    ----------
    columns : mapping of str to ndarray, each of shape (volumes,)
        The table's numbers by column, NaN where one is not known; only `DISPLACEMENT` and `PARAMETERS` are read.

    Returns
    -------
    (ndarray, str) or None
        In mm, NaN where not known, and the column's name; or, where there is no such column, what is computed from
        fMRIPrep's six parameters.  None where there is neither; NIAK's turns are in degrees, and it writes a column.
    """
    for name in DISPLACEMENT:
        if name in columns and not np.isnan(columns[name]).all():
            return columns[name], name
    if not all(name in columns for name in PARAMETERS):
        return None
    found = framewise_displacement(np.stack([columns[name] for name in PARAMETERS], axis=1))
    return None if np.isnan(found).all() else (found, f"computed from {', '.join(PARAMETERS)}")
