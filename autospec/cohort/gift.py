"""GIFT's output: time courses and maps that were already computed, as NIfTI images or .mat files of version 7.3.

Subjects have numbers only, in the order in which GIFT was given them, padded to any width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autospec.cohort.bids import join
from autospec.cohort.files import existing, file_problem, listed, natural_key
from autospec.cohort.phenotypes import read_phenotypes
from autospec.cohort.subjects import CohortSettings, Done, Scan, Subject, is_asked_for
from autospec.errors import UserError

if TYPE_CHECKING:
    import nibabel
    import numpy as np

TIMECOURSES = re.compile(r"(?P<prefix>.*)_sub(?P<subject>\d+)_timecourses_ica_s(?P<session>\d+)_\.nii(\.gz)?")
MAPS = re.compile(r"(?P<prefix>.*)_sub(?P<subject>\d+)_component_ica_s(?P<session>\d+)_\.nii(\.gz)?")
SCALED = re.compile(r"(?P<prefix>.*)_ica_c(?P<subject>\d+)-(?P<session>\d+)\.mat")
UNSCALED = re.compile(r"(?P<prefix>.*)_ica_br(?P<subject>\d+)\.mat")
Key = tuple[int, int]
Value = TypeVar("Value")


def read_gift(folder: str, settings: CohortSettings) -> list[Subject]:
    """Read who was analysed with GIFT.

    Parameters
    ----------
    folder : str
        GIFT's output folder.
    settings : CohortSettings
        Its table of participants (or a ``participants.tsv`` in the folder) has one row a subject, in GIFT's order.

    Returns
    -------
    list of Subject

    Raises
    ------
    UserError
        If there is no table, its rows are not as many as the subjects, a number is missing, or several sessions fit.
    """
    files = _results(folder)
    numbers = sorted({subject for subject, _ in files})
    if not files:
        raise UserError(
            f"{folder} holds no time courses of GIFT (*_sub001_timecourses_ica_s1_.nii, or *_ica_c1-1.mat): "
            "where they are in .zip files, unpack these."
        )
    if numbers != list(range(1, len(numbers) + 1)):
        missing = sorted(set(range(1, numbers[-1] + 1)) - set(numbers))
        raise UserError(
            f"{folder} has results of subject {numbers[-1]}, but none of {listed([str(i) for i in missing])}: "
            "subjects are known by their order only, so all of them are needed."
        )
    path = settings["phenotypes"] or existing(Path(folder) / "participants.tsv")
    if not path:
        raise UserError(
            f"{folder} names its subjects by number only: name a table under phenotypes "
            "that has one row a subject, in the order in which GIFT was given them."
        )
    table = read_phenotypes(path, settings["columns"].get("id"))
    if len(table.rows) != len(numbers):
        raise UserError(
            f"{path} has {len(table.rows)} rows, but {folder} has results of {len(numbers)} subjects: "
            "give one row a subject, in GIFT's order."
        )
    scans, problems = {}, {}
    for number, name in zip(numbers, table.rows, strict=True):
        of_subject = [files[key] for key in sorted(files) if key[0] == number]
        scans[name] = _choose(name, of_subject, settings)
        problems[name] = next(filter(None, (file_problem(scan.timecourses) for scan in scans[name])), "")
    return join(scans, problems, table, Done())


def _results(folder: str) -> dict[Key, Scan]:
    """Results by subject and session: images where there are any, else scaled, else unscaled .mat files."""
    names = sorted(os.listdir(folder), key=natural_key)
    mask = existing(*(Path(folder) / name for name in names if re.fullmatch(r".*Mask\.(nii|img)(\.gz)?", name)))
    maps = _by_key(folder, names, MAPS)
    images = _by_key(folder, names, TIMECOURSES)
    if images:
        return {
            key: Scan(timecourses=path, maps=maps.get(key, ""), session=str(key[1])) for key, path in images.items()
        }
    mats = _by_key(folder, names, SCALED) or _by_key(folder, names, UNSCALED)
    return {key: Scan(timecourses=path, maps=path, mask=mask, session=str(key[1])) for key, path in mats.items()}


def _by_key(folder: str, names: list[str], pattern: re.Pattern[str]) -> dict[Key, str]:
    """Paths of the files with such names, by subject and session; unscaled results do not tell sessions apart."""
    matches = [match for match in map(pattern.fullmatch, names) if match]
    prefixes = sorted({match["prefix"] for match in matches})
    if len(prefixes) > 1:
        raise UserError(
            f"{folder} holds results of several analyses ({listed(prefixes)}): give each a folder of its own."
        )
    found: dict[Key, str] = {}
    for match in matches:
        key = (int(match["subject"]), int(match.groupdict().get("session", 1)))
        if key in found:
            raise UserError(f"{found[key]} and {match.string} are results of the same subject: keep one.")
        found[key] = str(Path(folder) / match.string)
    return found


def _choose(subject: str, scans: list[Scan], settings: CohortSettings) -> tuple[Scan, ...]:
    kept = [scan for scan in scans if is_asked_for(scan.session, settings["session"])]
    if len(kept) > 1 and settings["scans"] == "one":
        names = listed([Path(scan.timecourses).name for scan in kept])
        raise UserError(f"{subject} has several sessions: {names}; choose with session, or set scans to first or all.")
    return tuple(kept[:1] if settings["scans"] == "first" else kept)


def read_timecourses(path: str) -> np.ndarray:
    """Read one subject's time courses.

    Parameters
    ----------
    path : str
        An image (time x network), or a .mat file of version 7.3 or older with ``tc`` or ``compSet.tc``.

    Returns
    -------
    ndarray, shape (time, networks)

    Raises
    ------
    UserError
        If the file cannot be read or holds no such variable.
    """
    import numpy as np

    if path.endswith(".mat"):
        # GIFT writes them either way round; the maps say which side counts the networks.
        time, _ = shape_of(path)
        courses = _read_mat(path)[0]
        return courses if len(courses) == time else courses.T
    courses = np.squeeze(_image(path).get_fdata())
    if courses.ndim != 2:
        raise UserError(f"{path} has the shape {courses.shape}: an image of time courses is time x network.")
    return courses


def read_maps(path: str, mask: str = "") -> nibabel.Nifti1Pair:
    """Read one subject's maps.

    Parameters
    ----------
    path : str
        A 4-D image, or a .mat file with ``ic`` or ``compSet.ic``.
    mask : str
        The image whose voxels the .mat file lists, first axis fastest.

    Returns
    -------
    nibabel image
        x, y, z, network.

    Raises
    ------
    UserError
        If a file cannot be read, or the maps do not fit the mask.
    """
    import nibabel
    import numpy as np

    if not path.endswith(".mat"):
        return _image(path)
    maps = _read_mat(path)[1]
    if maps is None or not mask:
        raise UserError(
            f"{path} needs {'the maps ic' if maps is None else 'the mask image beside it'}: copy GIFT's whole output."
        )
    image = _image(mask)
    inside = np.squeeze(image.get_fdata()) > 0
    if inside.sum() != maps.shape[1]:
        raise UserError(
            f"{path} lists {maps.shape[1]} voxels, but {mask} has {inside.sum()}: they are not of one analysis."
        )
    volumes = np.zeros((inside.size, len(maps)))
    volumes[inside.ravel(order="F")] = maps.T  # MATLAB counts voxels with the first axis fastest
    return nibabel.Nifti1Image(volumes.reshape(*inside.shape, -1, order="F"), image.affine)


def _image(path: str) -> nibabel.Nifti1Pair:
    import nibabel

    from autospec.ica.images import open_image

    if problem := file_problem(path):
        raise UserError(f"{problem}.")
    image = open_image(path)
    assert isinstance(image, nibabel.Nifti1Pair)
    return image


def shape_of(path: str, maps: str = "", mask: str = "") -> tuple[int, int]:
    """Say how many time points and networks a subject's results have, without reading them.

    Parameters
    ----------
    path, maps, mask : str
        As in `read_timecourses` and `read_maps`; empty where there is none.

    Raises
    ------
    UserError
        If a file cannot be opened, lacks a variable, or time courses, maps and mask do not fit each other.
    """
    networks = None
    if path.endswith(".mat"):
        shapes = _of_mat(path, lambda array: tuple(array.shape[::-1]))
        time, found = _courses(path, shapes, len)
        if "ic" in shapes:
            networks, voxels = shapes["ic"][0], shapes["ic"][-1]
            if found != networks and time == networks:
                time, found = found, time
            if mask and voxels != _voxels(mask):
                raise UserError(
                    f"{path} lists {voxels} voxels, but {mask} has {_voxels(mask)}: they are not of one analysis."
                )
    else:
        sides = [side for side in _image(path).shape if side > 1]
        if len(sides) != 2:
            raise UserError(f"{path} has the shape {_image(path).shape}: an image of time courses is time x network.")
        time, found = sides
        if maps:
            shape = _image(maps).shape
            networks = shape[3] if len(shape) == 4 else 1
    if networks is not None and found != networks:
        raise UserError(
            f"{path} has time courses of {found} networks, but {maps if maps not in ('', path) else 'it'} has maps of {networks}: "
            "they are not of one analysis."
        )
    return time, found


@cache
def _voxels(mask: str) -> int:
    """How many voxels a mask has."""
    return int((_image(mask).get_fdata() > 0).sum())


def _courses(path: str, found: dict[str, Value], dimensions: Callable[[Value], int]) -> Value:
    """What was found of the time courses; raises UserError where there are none."""
    if "tc" not in found or dimensions(found["tc"]) != 2:
        raise UserError(f"{path} holds no time courses 'tc' (alone or in 'compSet'): is it a result of GIFT?")
    return found["tc"]


def _read_mat(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Time courses, as they lie in the file, and maps (network x voxel), of a .mat file."""
    import numpy as np

    found = _of_mat(path, lambda array: np.asarray(array).T)
    return _courses(path, found, lambda array: array.ndim), found.get("ic")


def _of_mat(path: str, take: Callable[[Any], Value]) -> dict[str, Value]:
    """What is wanted of time courses ``tc`` and maps ``ic`` of a .mat file, which come with their axes reversed."""
    import h5py
    import numpy as np
    import scipy.io

    if problem := file_problem(path):
        raise UserError(f"{problem}.")
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                place = file["compSet"] if isinstance(file.get("compSet"), h5py.Group) else file
                # HDF5 holds MATLAB's arrays with their axes reversed.
                return {name: take(place[name]) for name in ("tc", "ic") if isinstance(place.get(name), h5py.Dataset)}
        content = scipy.io.loadmat(path, squeeze_me=False)
        struct = content["compSet"][0, 0] if "compSet" in content else content
        names = struct.dtype.names or () if isinstance(struct, np.ndarray | np.void) else struct
        return {name: take(np.asarray(struct[name]).T) for name in ("tc", "ic") if name in names}
    except (OSError, ValueError, NotImplementedError, KeyError):
        raise UserError(f"{path} is no readable .mat file: copy it again.") from None
