"""Time courses without a template of networks: those of an atlas, or precomputed ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from autospec.errors import UserError
from autospec.ica.images import open_image, read_values, read_volumes, volume_shape
from autospec.ica.preprocessing import read_voxels


def atlas_timecourses(
    bold: str | Path, atlas: str | Path, labels: list[str] | None, kept: np.ndarray, smoothing_fwhm_mm: float
) -> tuple[np.ndarray, list[str]]:
    """Time courses of an atlas's regions, as nilearn's NiftiLabelsMasker and NiftiMapsMasker define them.

    The image is brought onto the atlas's grid a few volumes at a time, so memory does not grow with it; voxels in which
    the subject has no signal are left out.

    Parameters
    ----------
    bold : path-like
        4-D image in MNI space.
    atlas : path-like
        3-D image of whole numbers, a region each (mean over its voxels); or 4-D, a map each (least squares).
    labels : list of str or None
        One a region, in the order of their numbers; None numbers them.
    kept : ndarray of int
        Numbers of the volumes to keep, from 0.
    smoothing_fwhm_mm : float
        Width of a Gaussian at half its height; 0 for none.

    Returns
    -------
    timecourses : ndarray of float64, shape (kept volumes, regions)
    labels : list of str

    Raises
    ------
    UserError
        If an image cannot be used, the labels do not fit the atlas, or a region has no signal in the image.
    """
    values, affine = read_volumes(atlas)
    support: np.ndarray = np.asarray(values.reshape(*values.shape[:3], -1).any(axis=3))
    if not support.any():
        raise UserError(f"the atlas {atlas} is 0 everywhere: give an image with regions.")
    regions = np.unique(values[support]) if values.ndim == 3 else np.arange(1, values.shape[3] + 1)
    if not np.array_equal(np.round(regions), regions):
        raise UserError(f"the atlas {atlas} must hold whole numbers, one for each region: give such an image.")
    if labels is not None and len(labels) != len(regions):
        raise UserError(
            f"the atlas {atlas} has {len(regions)} regions, and there are {len(labels)} labels: give one a region."
        )
    names = labels or [f"region-{k:03d}" for k in range(1, len(regions) + 1)]
    voxels = read_voxels(bold, support, affine, kept, smoothing_fwhm_mm)
    there = values[support][voxels.covered]
    weights = there if values.ndim == 4 else there[:, None] == regions
    lost = [name for name, column in zip(names, weights.T, strict=True) if not column.any()]
    if lost:
        raise UserError(f"the region {lost[0]} of the atlas {atlas} has no signal in {bold}: use another atlas.")
    x = voxels.x[:, voxels.covered].T.astype(np.float64)
    return np.linalg.lstsq(weights.astype(np.float64), x, rcond=None)[0].T, names


def read_timecourses(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """Read precomputed time courses.

    Parameters
    ----------
    path : path-like
        Table with one column a network and their labels in the first row (``.tsv`` or ``.csv``, gzipped or not), or an
        image of volumes x networks as GIFT writes it.

    Returns
    -------
    timecourses : ndarray of float64, shape (volumes, networks)
    labels : list of str

    Raises
    ------
    UserError
        If it cannot be read, or a value is missing.
    """
    name = Path(path).name
    if name.endswith((".nii", ".nii.gz", ".img", ".hdr")):
        image = open_image(path)
        shape = tuple(length for length in volume_shape(image)[:2])
        if int(np.prod(image.shape)) != int(np.prod(shape)):
            raise UserError(f"{path} is an image of the brain, not of volumes x networks: give time courses.")
        values = read_values(image, path).astype(np.float64).reshape(shape)
        labels = [f"network-{k:03d}" for k in range(1, shape[1] + 1)]
    else:
        try:
            table = pd.read_csv(path, sep="," if ".csv" in name else "\t", na_values=["n/a"])
            values, labels = table.to_numpy(dtype=np.float64), [str(column) for column in table.columns]
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the time courses {path} cannot be read ({reason}): give a table of numbers.") from None
    if not np.isfinite(values).all() or not values.size:
        raise UserError(f"the time courses {path} have missing values: give a number for every volume and network.")
    return values, labels
