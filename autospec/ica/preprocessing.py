"""From a subject's preprocessed image to the matrix of volumes by voxels in which networks are sought."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from autospec.cohort.displacement import DISPLACEMENT, PARAMETERS
from autospec.errors import UserError
from autospec.ica.images import (
    check_space_in_name,
    open_series,
    read_blocks,
    read_first_volume,
    require_brain_size,
    same_grid,
    to_grid,
    volume_shape,
)
from autospec.ica.template import mni_brain, mni_brain_volume

EPSILON = float(np.finfo(np.float64).eps)
VOXELS_AT_A_TIME = 8192
LEAST_OVERLAP = 0.5  # of an image's bright voxels with the MNI brain; images in MNI space reach 0.8
# How fMRIPrep, and NIAK, name the six parameters of rigid motion: three shifts in mm, three turns.
MOTION_NAMES = (
    PARAMETERS,
    ("motion_tx", "motion_ty", "motion_tz", "motion_rx", "motion_ry", "motion_rz"),
)
DECIMAL_COMMA = r"\s*[-+]?\d*,\d+([eE][-+]?\d+)?\s*"
STRATEGIES = ("simple", "scrubbing", "compcor", "ica_aroma")


@dataclass(frozen=True)
class Voxels:
    """A subject's volumes within a mask.

    Attributes
    ----------
    x : ndarray of float32, shape (volumes, voxels of the mask)
        Intensities.
    covered : ndarray of bool, shape (voxels of the mask,)
        Where the subject has a signal: finite, and not the same at all times.
    volumes_in_file : int
        Before any was dropped.
    overlap : float
        Dice coefficient of the image's bright voxels with the MNI brain.
    """

    x: np.ndarray
    covered: np.ndarray
    volumes_in_file: int
    overlap: float


# ---------------------------------------------------------------------- mathematics


def preprocess(x: np.ndarray, kind: int) -> np.ndarray:
    """Preprocess volumes as one of GIFT's four types; the mean of each volume is removed last in all of them.

    Parameters
    ----------
    x : ndarray, shape (volumes, voxels)
        Intensities.
    kind : {1, 2, 3, 4}
        1: nothing else, as NeuroMark is run. 2: each voxel's mean over time is removed. 3: each voxel as per cent of
        its mean over time. 4: each voxel's linear trend is removed, and it is divided by its standard deviation.

    Returns
    -------
    ndarray of the type of ``x``, shape (volumes, voxels)
        Computed in float64, block by block of voxels.

    Raises
    ------
    UserError
        If there is no such type, or type 3 meets voxels whose mean is 0.
    """
    if kind not in (1, 2, 3, 4):
        raise UserError(f"there is no preprocessing of type {kind}: it can be 1, 2, 3 or 4.")
    if kind == 4 and len(x) < 3:
        raise UserError(f"a linear trend cannot be removed from {len(x)} volumes: at least 3 are needed.")
    out = np.empty_like(x)
    trend = np.stack([np.ones(len(x)), np.linspace(-1, 1, len(x))], axis=1)
    basis = np.linalg.qr(trend)[0]
    for start in range(0, x.shape[1], VOXELS_AT_A_TIME):
        part = slice(start, start + VOXELS_AT_A_TIME)
        block = x[:, part].astype(np.float64)
        if kind == 2:
            block -= block.mean(axis=0)
        elif kind == 3:
            mean = block.mean(axis=0)
            if (np.abs(mean) <= 1e-6 * block.std(axis=0)).any():
                raise UserError(
                    "preprocessing of type 3 needs intensities, and there are voxels of mean 0: use type 1, 2 or 4."
                )
            block *= 100 / (mean + EPSILON)
        elif kind == 4:
            block -= block.mean(axis=0)  # before the projection, whose rounding grows with what it removes
            block -= basis @ (basis.T @ block)
            block /= block.std(axis=0, ddof=1) + EPSILON
        out[:, part] = block
    out -= out.mean(axis=1, keepdims=True, dtype=np.float64).astype(out.dtype)
    return out


def gift_mask(volume: np.ndarray) -> np.ndarray:
    """GIFT's default mask of one data set: voxels at least as bright as the mean over all voxels.

    Parameters
    ----------
    volume : ndarray, shape (X, Y, Z)
        Its first volume.  What is not finite counts as 0, and 100 is added to all voxels before they are compared.

    Returns
    -------
    ndarray of bool, shape (X, Y, Z)
    """
    raised = np.where(np.isfinite(volume), volume, 0).astype(np.float64) + 100
    return raised >= raised.mean()


def gift_mask_of(paths: Iterable[str | Path]) -> tuple[np.ndarray, np.ndarray]:
    """GIFT's default mask of several data sets: voxels that are in each one's mask.

    Parameters
    ----------
    paths : iterable of path-like
        4-D images on one grid; one is in memory at a time, and of it the first volume only.

    Returns
    -------
    mask : ndarray of bool, shape (X, Y, Z)
    affine : ndarray, shape (4, 4)

    Raises
    ------
    UserError
        If there is no image, their grids differ, or no voxel is left.
    """
    mask, affine, first = None, np.eye(4), ""
    for path in paths:
        image = open_series(path)
        volume = read_first_volume(image, path)
        if mask is None:
            mask, affine, first = gift_mask(volume), np.asarray(image.affine, dtype=np.float64), str(path)
            continue
        if not same_grid(mask.shape, affine, volume.shape, image.affine):
            raise UserError(f"{path} and {first} have different grids: GIFT's mask needs one grid for all subjects.")
        mask &= gift_mask(volume)
    if mask is None:
        raise UserError("GIFT's mask needs at least one image.")
    if not mask.any():
        raise UserError("no voxel is in every subject's mask: look for an image that does not belong to the others.")
    return mask, affine


# ---------------------------------------------------------------------- files


def read_voxels(
    path: str | Path,
    mask: np.ndarray,
    affine: np.ndarray,
    kept: np.ndarray | None,
    smoothing_fwhm_mm: float,
) -> Voxels:
    """Read a subject's image into a matrix, a few volumes at a time.

    Parameters
    ----------
    path : path-like
        4-D image in MNI space, on any grid.
    mask, affine : ndarray of bool (X, Y, Z), ndarray (4, 4)
        Which voxels, on which grid; the image is resampled where its grid differs.
    kept : ndarray of int or None
        Numbers of the volumes to keep, from 0; None keeps all.
    smoothing_fwhm_mm : float
        Width of a Gaussian at half its height, applied on the image's own grid; 0 for none.

    Returns
    -------
    Voxels

    Raises
    ------
    UserError
        If the image is no readable series, not in MNI space, has no signal, or lacks values in some volumes only.
    """
    check_space_in_name(path)
    image = open_series(path)
    require_brain_size(image, path)
    shape = volume_shape(image)
    kept = np.arange(shape[3]) if kept is None else kept
    native = np.asarray(image.affine, dtype=np.float64)
    x = np.empty((len(kept), int(mask.sum())), dtype=np.float32)
    missing = np.zeros(shape[:3], dtype=np.int32)
    row, overlap = 0, None
    for start, whole in read_blocks(image, path, int(kept[0])):
        block = whole[..., kept[(kept >= start) & (kept < start + whole.shape[3])] - start]
        if not block.shape[3]:
            continue
        bad = ~np.isfinite(block)
        if bad.any():
            missing += bad.sum(axis=3, dtype=np.int32)
            block[bad] = 0
        if overlap is None:
            overlap = overlap_with_brain(block, native)
        if smoothing_fwhm_mm:
            from nilearn.image import smooth_img

            block = np.asarray(smooth_img(nib.Nifti1Image(block, native), smoothing_fwhm_mm).dataobj)
        x[row : row + block.shape[3]] = to_grid(block, native, mask.shape, affine, "linear")[mask].T
        row += block.shape[3]
    absent = to_grid((missing == len(kept)).astype(np.float32), native, mask.shape, affine, "nearest")[mask] > 0
    if absent.all():
        raise UserError(f"the image {path} has no finite value in the brain: make it again.")
    partly = to_grid(((missing > 0) & (missing < len(kept))).astype(np.float32), native, mask.shape, affine, "nearest")
    if partly[mask].any():
        raise UserError(
            f"the image {path} has NaN or infinity in some volumes at {int((partly[mask] > 0).sum())} voxels of the "
            "brain: make it again."
        )
    covered = (x.max(axis=0) > x.min(axis=0)) & ~absent
    if not covered.any():
        what = "is zero" if not x.any() else "does not change with time"
        raise UserError(f"the image {path} {what} everywhere in the MNI brain: make it again.")
    if overlap is None or overlap < LEAST_OVERLAP:
        raise UserError(
            f"the bright part of {path} and the MNI brain overlap by {overlap or 0:.2f} of 1 (Dice): it is not in MNI "
            "space. Give the image that was normalised to MNI152NLin6Asym or MNI152NLin2009cAsym."
        )
    return Voxels(x, covered, shape[3], float(overlap))


def overlap_with_brain(block: np.ndarray, affine: np.ndarray) -> float:
    """How well an image's bright voxels agree with the MNI brain.

    Parameters
    ----------
    block : ndarray, shape (X, Y, Z, volumes)
        A few volumes.  Where their means are small against their changes, as after their removal, voxels that change
        count as bright.
    affine : ndarray, shape (4, 4)

    Returns
    -------
    float
        Dice coefficient, 0 to 1.
    """
    mean, spread = block.mean(axis=3, dtype=np.float64), block.std(axis=3)
    varying = spread > 0
    centred = block.shape[3] > 1 and varying.any() and np.median(np.abs(mean[varying]) / spread[varying]) < 3
    bright = varying if centred else gift_mask(mean)
    shared = int((bright & mni_brain(block.shape, affine)).sum())
    whole = mni_brain_volume() / abs(np.linalg.det(affine[:3, :3]))  # in voxels, also where the image does not reach
    return 2 * shared / (int(bright.sum()) + whole)


def read_confounds_table(path: str | Path) -> pd.DataFrame:
    """Read a table of confounds, one row a volume: tab-separated, gzipped or not, with ``n/a`` where a value is missing.

    Raises
    ------
    UserError
        If it cannot be read, or a cell with a decimal comma, or of motion, is no number.
    """
    try:
        table = pd.read_csv(path, sep="\t", na_values=["n/a"])
    except (OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the table of confounds {path} cannot be read ({reason}): check the path.") from None
    for name in table.columns:
        if pd.api.types.is_numeric_dtype(table[name]):
            continue
        cells = table[name].dropna().astype(str)
        wrong = cells[pd.to_numeric(cells, errors="coerce").isna()]
        if name not in (*DISPLACEMENT, *chain(*MOTION_NAMES)):  # a user's own table may have words in others
            wrong = wrong[wrong.str.fullmatch(DECIMAL_COMMA)]
        if len(wrong):
            raise UserError(
                f"the table of confounds {path} has '{wrong.iloc[0]}' in the column {name}, row {wrong.index[0] + 2}, which is "
                "no number: write numbers with a point, and n/a where nothing is known."
            )
    return table


def motion_of(table: pd.DataFrame) -> np.ndarray | None:
    """The six parameters of motion in a table of confounds, shape (volumes, 6), or None if it has none."""
    for names in MOTION_NAMES:
        if set(names) <= set(table.columns):
            return table[list(names)].fillna(0).to_numpy(dtype=np.float64)
    return None


def choose_confounds(
    strategy: str, bold: str | Path, table: pd.DataFrame | None, volumes: int, drop_volumes: int
) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
    """Find the confounds of a strategy, and the volumes that it keeps.

    Parameters
    ----------
    strategy : str
        "none", "motion" (six parameters, from the table), or a name that nilearn's ``load_confounds_strategy`` knows.
    bold : path-like
        fMRIPrep's image; nilearn finds its table of confounds beside it.
    table : DataFrame or None
        From `read_confounds_table`; needed for "motion".
    volumes : int
        How many the image has.
    drop_volumes : int
        How many to leave out at the start.

    Returns
    -------
    confounds : ndarray (kept volumes, confounds) or None
    kept : ndarray of int
        Numbers of the volumes that are kept, from 0.
    names : list of str
        Of the confounds.

    Raises
    ------
    UserError
        If the strategy is unknown, its confounds are not there, or nothing is left.
    """
    if table is not None and len(table) != volumes:
        raise UserError(
            f"{bold} has {volumes} volumes, but its table of confounds has {len(table)} rows: they must be of one run."
        )
    kept = np.arange(min(drop_volumes, volumes), volumes)
    if len(kept) < 2:
        raise UserError(f"{bold} has {volumes} volumes, of which drop_volumes = {drop_volumes} leaves {len(kept)}.")
    if strategy == "none":
        return None, kept, []
    if strategy == "motion":
        motion = None if table is None else motion_of(table)
        if motion is None:
            raise UserError(
                f"confounds: motion needs the six parameters of motion of {bold}: give a table with the columns "
                f"{', '.join(MOTION_NAMES[0])}, or set confounds: none."
            )
        names = next(names for names in MOTION_NAMES if table is not None and set(names) <= set(table.columns))
        return motion[kept], kept, list(names)
    if strategy not in STRATEGIES:
        raise UserError(f"confounds is '{strategy}': it can be none, motion, {', '.join(STRATEGIES)}.")
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    try:
        found, sample = load_confounds_strategy(str(bold), denoise_strategy=strategy)
    except (ValueError, OSError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"nilearn finds no confounds '{strategy}' beside {bold} ({reason}): use another strategy, or none."
        ) from None
    if len(found) != volumes:
        raise UserError(f"{bold} has {volumes} volumes, but its table of confounds has {len(found)} rows.")
    if sample is not None:
        kept = np.intersect1d(kept, np.asarray(sample))
    if len(kept) < 2:
        raise UserError(f"the confounds '{strategy}' keep {len(kept)} volumes of {bold}: use another strategy.")
    return found.to_numpy(dtype=np.float64)[kept], kept, [str(name) for name in found.columns]
