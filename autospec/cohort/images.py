"""Headers of images: what can be known of them without reading their voxels."""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autospec.cohort.files import file_problem, read_json
from autospec.errors import UserError
from autospec.ica.images import (
    check_space_in_name,
    open_series,
    repetition_time,
    same_grid,
    space_warnings,
    volume_shape,
)

# Corners, in mm, of a box in the middle of the MNI brain that every image of a whole brain covers.
MIDDLE_OF_THE_BRAIN = np.array([[-55.0, -85.0, -25.0], [55.0, 50.0, 60.0]])


@dataclass(frozen=True)
class Header:
    """What the header of a 4-D image says."""

    path: str
    shape: tuple[int, int, int]
    volumes: int
    voxel_mm: tuple[float, float, float]
    affine: np.ndarray
    simulated: bool
    warnings: list[str]

    @property
    def grid(self) -> str:
        """Shape, voxel size and where the first voxel lies, in words; a turned image may share them."""
        edges = " x ".join(f"{size:g}" for size in self.voxel_mm)
        origin = ", ".join(f"{value:g}" for value in self.affine[:3, 3])
        return f"{' x '.join(map(str, self.shape))} voxels of {edges} mm from ({origin}) mm"


def read_header(path: str) -> Header:
    """Read the header of a functional image.

    Parameters
    ----------
    path : str
        A 4-D NIfTI image, gzipped or not.

    Returns
    -------
    Header

    Raises
    ------
    UserError
        If the image is missing, a pointer, cut short, or not 4-D.
    """
    image = _opened(path)
    x, y, z, volumes = volume_shape(image)
    sizes = [round(float(size), 4) for size in image.header.get_zooms()[:3]]
    described = np.asarray(image.header["descrip"]).tobytes() if "descrip" in image.header else b""
    return Header(
        path=path,
        shape=(x, y, z),
        volumes=volumes,
        voxel_mm=(sizes[0], sizes[1], sizes[2]),
        affine=np.asarray(image.affine),
        simulated=b"simulated" in described.lower(),
        warnings=space_warnings(image, path),
    )


def grids_of(headers: Iterable[Header]) -> dict[str, int]:
    """Images on each grid, in words."""
    first_of_each: list[Header] = []
    counts: Counter[str] = Counter()
    for header in headers:
        for first in first_of_each:
            if same_grid(first.shape, first.affine, header.shape, header.affine):
                break
        else:
            first = header
            first_of_each.append(header)
        counts[first.grid] += 1
    return dict(counts)


def time_between_volumes(path: str, sidecar: str, stated: float | None) -> float:
    """Repetition time of an image.

    Parameters
    ----------
    path, sidecar : str
        The image, and the JSON file beside it or an empty string.
    stated : float or None
        What the configuration says, or the layout is known to have, in seconds.

    Raises
    ------
    UserError
        If nothing says it, or they contradict each other.
    """
    return repetition_time(_opened(path), path, read_json(sidecar) if sidecar else {}, stated)


def _opened(path: str) -> Any:
    if problem := file_problem(path):
        raise UserError(f"{problem}.")
    image = open_series(path)
    _require_whole(path, image)
    return image


def _require_whole(path: str, image: Any) -> None:
    """Compare the file's size with what the header promises; unpack it only where that leaves a doubt."""
    promised = int(np.prod(image.shape)) * image.get_data_dtype().itemsize + int(getattr(image.dataobj, "offset", 0))
    if path.endswith(".nii"):
        whole = os.stat(path).st_size >= promised
    elif path.endswith(".nii.gz"):
        with Path(path).open("rb") as file:
            file.seek(-4, os.SEEK_END)
            size = int.from_bytes(file.read(4), "little")
        # A gzipped file ends with the size of its content, modulo 2^32; one of several parts with the last part's.
        whole = size == promised % 2**32 or _unpacked_size(path) >= promised
    else:
        return
    if not whole:
        raise UserError(f"{path} is cut short: its header promises {promised} bytes; copy or make it again.")


def _unpacked_size(path: str) -> int:
    """Bytes in a gzipped file; 0 if it cannot be read to its end."""
    total = 0
    try:
        with gzip.open(path) as file:
            while block := file.read(1 << 24):
                total += len(block)
    except (OSError, EOFError, zlib.error):
        return 0
    return total


def require_mni(header: Header) -> None:
    """Refuse an image that cannot lie in MNI space.

    One in MNI space covers the middle of the brain, in millimetres from the origin.  One in a scanner's space can pass
    by chance; its own job, which reads the voxels, finds it.

    Raises
    ------
    UserError
        If its name says another space, or it does not cover the middle of the brain.
    """
    check_space_in_name(header.path)
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in header.shape])).reshape(3, -1)
    world = (header.affine[:3, :3] @ corners).T + header.affine[:3, 3]
    if (world.min(0) > MIDDLE_OF_THE_BRAIN[0]).any() or (world.max(0) < MIDDLE_OF_THE_BRAIN[1]).any():
        low, high = (", ".join(f"{value:.0f}" for value in corner) for corner in (world.min(0), world.max(0)))
        raise UserError(
            f"{header.path} covers ({low}) to ({high}) mm, so it is not in MNI space: give preprocessed images."
        )
