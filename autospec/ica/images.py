"""Reading and writing NIfTI images: whatever a lab may hold is read, or refused in one sentence that names the file."""

from __future__ import annotations

import gzip
import json
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError, SpatialImage

from autospec.errors import UserError
from autospec.storage import written_whole

SAME_AFFINE_MM = 1e-3
VALUES_AT_A_TIME = 8_000_000  # of a 4-D image; 64 MB in double precision
BYTES_AT_A_TIME = 1 << 20
NOT_FETCHED = "the file stands for content that was not fetched"
BRAIN_MM = (30, 1000)  # longest side of an image of a brain of 170 mm: in cm 25 at most, in micrometres beyond 100,000
SAME_PLACE_MM = 1.0
MNI_CODE = 4  # NIfTI's code for coordinates of the MNI template
SCANNER_CODE = 1


def open_image(path: str | Path) -> SpatialImage:
    """Open an image without reading its values.

    Parameters
    ----------
    path : path-like
        NIfTI (or another format that nibabel knows), compressed or not, of either byte order.

    Returns
    -------
    nibabel image
        It keeps its file open, so that reading one block of volumes after the other unpacks the file once.

    Raises
    ------
    UserError
        If the file is missing, empty, a git-annex or Git LFS pointer, or no image.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: {NOT_FETCHED} (a link to nowhere, as git-annex leaves it): run  datalad get {path}")
    if not path.is_file():
        raise UserError(f"there is no image {path}: check the path.")
    with path.open("rb") as file:
        start = file.read(200)
    if not start:
        raise UserError(f"the image {path} is empty: copy it again.")
    if start.startswith(b"/annex/objects") or b".git/annex/objects" in start:
        raise UserError(f"{path}: {NOT_FETCHED} (a git-annex pointer): run  datalad get {path}")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: {NOT_FETCHED} (a Git LFS pointer): run  git lfs pull")
    try:
        image = nib.load(path, keep_file_open=True)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        raise UserError(f"{path} is no image that can be read ({_one_line(error)}): copy or make it again.") from None
    if not isinstance(image, SpatialImage) or image.affine is None or not np.isfinite(image.affine).all():
        raise UserError(f"{path} is no image in a space of millimetres: give a NIfTI image.")
    if abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise UserError(f"the affine of {path} is singular, so its voxels have no size: repair its header.")
    return image


def open_series(path: str | Path) -> SpatialImage:
    """Open a 4-D image; raises UserError if it has another number of dimensions."""
    image = open_image(path)
    shape = volume_shape(image)
    if len(shape) != 4 or shape[3] < 2:
        words = " x ".join(map(str, image.shape))
        raise UserError(f"{path} is {words}, not a series of volumes: give the preprocessed 4-D BOLD image.")
    return image


def volume_shape(image: SpatialImage) -> tuple[int, ...]:
    """Shape of an image without the ones that some programs put behind it: (X, Y, Z) or (X, Y, Z, volumes)."""
    shape = tuple(int(length) for length in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def read_blocks(image: SpatialImage, path: str | Path, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """Read a series block by block, so that memory does not grow with its length.

    Parameters
    ----------
    image : nibabel image
        From `open_series`.
    path : path-like
        Its file, for error messages.
    first : int
        Volumes before this one are not read.

    Yields
    ------
    start : int
        Number of the block's first volume, from 0.
    block : ndarray of float32, shape (X, Y, Z, volumes of the block)

    Raises
    ------
    UserError
        If the file is shorter than its header says, or damaged.
    """
    shape = volume_shape(image)
    at_once = max(1, VALUES_AT_A_TIME // int(np.prod(shape[:3])))
    behind = (0,) * (len(image.shape) - len(shape))
    for start in range(first, shape[3], at_once):
        end = min(start + at_once, shape[3])
        part = (slice(None), slice(None), slice(None), slice(start, end), *behind)
        yield start, _read(image, path, part, to_the_end=end == shape[3])


def read_first_volume(image: SpatialImage, path: str | Path) -> np.ndarray:
    """First volume of a series, float32, shape (X, Y, Z), as it is in the file."""
    part = (slice(None), slice(None), slice(None), *(0,) * (len(image.shape) - 3))
    return _read(image, path, part, to_the_end=False)


def read_values(image: SpatialImage, path: str | Path) -> np.ndarray:
    """All values of an image, float32, of the shape that its header says."""
    return _read(image, path, (slice(None),) * len(image.shape))


def read_volumes(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a whole image.

    Parameters
    ----------
    path : path-like
        A 3-D or 4-D image; dimensions of length one behind the third are dropped.

    Returns
    -------
    values : ndarray of float32, shape (X, Y, Z) or (X, Y, Z, volumes)
        What is not finite becomes 0.
    affine : ndarray, shape (4, 4)
        From voxels to millimetres.
    """
    image = open_image(path)
    shape = volume_shape(image)
    if len(shape) not in (3, 4):
        raise UserError(f"{path} has {len(shape)} dimensions: an image has 3, or 4 with its volumes.")
    values = _read(image, path, (*(slice(None),) * len(shape), *(0,) * (len(image.shape) - len(shape))))
    values[~np.isfinite(values)] = 0
    return values, np.asarray(image.affine, dtype=np.float64)


def read_mask(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a mask: what is not 0 is inside.  Returns a boolean array (X, Y, Z) and its affine."""
    values, affine = read_volumes(path)
    if values.ndim != 3:
        raise UserError(f"the mask {path} has {values.shape[3]} volumes: give one.")
    if not values.any():
        raise UserError(f"the mask {path} is empty: no voxel is inside.")
    return values != 0, affine


def same_grid(shape: tuple[int, ...], affine: np.ndarray, other: tuple[int, ...], other_affine: np.ndarray) -> bool:
    """Whether two images have the same voxels: equal dimensions alone do not say so."""
    return tuple(shape[:3]) == tuple(other[:3]) and bool(np.allclose(affine, other_affine, rtol=0, atol=SAME_AFFINE_MM))


def to_grid(
    values: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: np.ndarray, interpolation: str
) -> np.ndarray:
    """Bring values onto another grid: turned exactly where that is enough, resampled with nilearn where it is not.

    Parameters
    ----------
    values : ndarray, shape (X, Y, Z) or (X, Y, Z, volumes)
        Finite; outside them is 0.
    affine : ndarray, shape (4, 4)
        Where they are.
    shape : tuple of int
        Dimensions of the other grid.
    target : ndarray, shape (4, 4)
        Its affine.
    interpolation : {"linear", "nearest"}

    Returns
    -------
    ndarray of the values' type, on the other grid
    """
    turn = ornt_transform(io_orientation(affine), io_orientation(target))
    turned = apply_orientation(values, turn)
    turned_affine = affine @ inv_ornt_aff(turn, values.shape[:3])
    if same_grid(turned.shape, turned_affine, shape, target):
        return turned
    from nilearn.image import resample_img

    kind = np.uint8 if values.dtype == bool else np.float32
    with warnings.catch_warnings():
        # An image that holds one value only is no mask; whether it can be used is decided elsewhere.
        warnings.filterwarnings("ignore", message="Resampling binary images with continuous")
        resampled = resample_img(
            nib.Nifti1Image(turned.astype(kind, copy=False), turned_affine),
            target_affine=target,
            target_shape=shape[:3],
            interpolation=interpolation,
            force_resample=True,
            copy_header=True,
        )
    return np.asarray(resampled.dataobj).astype(values.dtype, copy=False)


def repetition_time(image: SpatialImage, path: str | Path, sidecar: dict[str, Any], stated: float | None) -> float:
    """Time between volumes, in seconds.

    Parameters
    ----------
    image : nibabel image
        Its header may say so; 1 of no unit is what programs write that do not know, and counts as silence.
    path : path-like
        Its file, for error messages.
    sidecar : dict
        Content of the image's JSON file; empty if there is none.
    stated : float or None
        What the configuration says.

    Raises
    ------
    UserError
        If none of them says it, or they contradict each other.
    """
    sources = {"the image's header": _header_repetition_time(image)}
    sources["its JSON sidecar"] = _seconds(sidecar.get("RepetitionTime"), path)
    sources["repetition_time"] = stated
    known = {name: value for name, value in sources.items() if value is not None}
    if not known:
        raise UserError(
            f"the repetition time of {path} is neither in its header nor in a JSON sidecar: set repetition_time."
        )
    if max(known.values()) - min(known.values()) > 1e-3:
        says = ", ".join(f"{name} says {value:g} s" for name, value in known.items())
        raise UserError(f"the repetition time of {path} is contradictory ({says}): correct the one that is wrong.")
    value = list(known.values())[-1]
    if not 0.05 <= value <= 20:
        raise UserError(f"the repetition time of {path} is {value:g} s, which no scan has: is its unit wrong?")
    return float(round(value, 6))


def read_json(path: str | Path | None) -> dict[str, Any]:
    """Content of a JSON file that holds an object; an empty one where there is no path."""
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"the JSON file {path} cannot be read: check the path.") from None
    except ValueError:
        raise UserError(f"{path} is no JSON file: repair it or leave it out.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: repair it or leave it out.")
    return content


def check_space_in_name(path: str | Path) -> None:
    """Raise UserError if a file's name says that it is in another space than MNI's."""
    named = re.search(r"_space-([A-Za-z0-9]+)", Path(path).name)
    if named and not named[1].startswith("MNI"):
        raise UserError(
            f"{path} is in the space '{named[1]}', but the template is in MNI space: "
            "give the image in MNI152NLin6Asym or MNI152NLin2009cAsym."
        )


def require_brain_size(image: SpatialImage, path: str | Path) -> None:
    """Raise UserError if an image is far smaller or larger than a brain: its affine is in another unit than millimetres.

    The numbers decide, whatever unit the header names: like other programs, nibabel reads them as millimetres, and there
    are headers that name a wrong one.
    """
    sizes = np.linalg.norm(image.affine[:3, :3], axis=0)
    sides = sizes * (*image.shape, 1, 1)[:3]
    if BRAIN_MM[0] <= sides.max() <= BRAIN_MM[1]:
        return
    unit = image.header.get_xyzt_units()[0] if isinstance(image, nib.Nifti1Image) else "unknown"
    said = "" if unit in ("mm", "unknown") else f", and its header names the unit '{unit}'"
    voxels, whole = (" x ".join(f"{length:.3g}" for length in lengths) for lengths in (sizes, sides))
    raise UserError(
        f"{path} has voxels of {voxels} mm and covers {whole} mm, which is not the size of a human brain{said}: its "
        "affine seems to be in another unit, so write it in millimetres."
    )


def space_warnings(image: SpatialImage, path: str | Path) -> list[str]:
    """What the header says against MNI space without proving it."""
    found = affine_warnings(image, path)
    if isinstance(image, nib.Nifti1Image):
        codes = {int(image.header["sform_code"]), int(image.header["qform_code"])}
        if codes <= {0, SCANNER_CODE} and SCANNER_CODE in codes:
            found.append(f"the header of {Path(path).name} says scanner coordinates, not MNI space")
    return found


def affine_warnings(image: SpatialImage, path: str | Path) -> list[str]:
    """Warn where the two affines of a NIfTI header place the image's corners more than 1 mm apart."""
    if not isinstance(image, nib.Nifti1Image):
        return []
    sform = image.get_sform(coded=True)[0]
    try:
        qform = image.get_qform(coded=True)[0]
    except ValueError:  # its quaternion is no rotation
        qform = np.full((4, 4), np.nan)
    if sform is None or qform is None:
        return []
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*(np.array(image.shape[:3]) - 1), 1]
    if np.linalg.norm(corners @ (sform - qform).T, axis=1).max() <= SAME_PLACE_MM:
        return []
    return [f"the sform and the qform of {Path(path).name} do not agree within {SAME_PLACE_MM:g} mm; the sform is used"]


def write_image(values: np.ndarray, affine: np.ndarray, path: str | Path, step: float | None = None) -> None:
    """Write an image in MNI space; the same values give the same bytes, gzipped or not.

    Parameters
    ----------
    values : ndarray, shape (X, Y, Z) or (X, Y, Z, volumes)
        Stored as float32, masks as bytes.
    affine : ndarray, shape (4, 4)
        From voxels to millimetres.
    path : path-like
        ``.nii`` or ``.nii.gz``.  It appears whole or not at all.
    step : float, optional
        Seconds between volumes, where the fourth dimension is time.
    """
    image = nib.Nifti1Image(values.astype(np.uint8 if values.dtype == bool else np.float32, copy=False), affine)
    image.set_sform(affine, MNI_CODE)
    image.set_qform(affine, MNI_CODE)
    image.header.set_xyzt_units("mm", "sec" if step else "unknown")
    if step:
        image.header.set_zooms((*image.header.get_zooms()[:3], step))
    data = image.to_bytes()
    with written_whole(path) as temporary:
        temporary.write_bytes(gzip.compress(data, 1, mtime=0) if str(path).endswith(".gz") else data)


def _read(image: SpatialImage, path: str | Path, part: tuple[Any, ...], to_the_end: bool = True) -> np.ndarray:
    """Some values, as float32 of this machine's byte order; ``to_the_end`` where they are the last ones of the file."""
    try:
        with np.errstate(over="ignore"):
            values = np.asarray(image.dataobj[part]).astype(np.float32)
        if to_the_end:
            _verify_checksum(image)
        return values
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise UserError(
            f"the image {path} is cut short or damaged ({_one_line(error)}): copy or make it again."
        ) from None


def _verify_checksum(image: SpatialImage) -> None:
    """Read a gzipped file on from its last value, since its checksum, which tells a flipped bit, is behind it."""
    values = image.dataobj
    if isinstance(values, ArrayProxy) and str(values.file_like).endswith((".gz", ".mgz")):
        with values._get_fileobj() as file:  # the one that is open: another would unpack all once more
            while file.read(BYTES_AT_A_TIME):
                pass


def _header_repetition_time(image: SpatialImage) -> float | None:
    zooms = image.header.get_zooms()
    value = float(zooms[3]) if len(zooms) > 3 else 0.0
    unit = image.header.get_xyzt_units()[1] if isinstance(image, nib.Nifti1Image) else "unknown"
    if not np.isfinite(value) or value <= 0 or (unit == "unknown" and value == 1):
        return None
    return value * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1.0)


def _seconds(value: Any, path: str | Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"RepetitionTime in the JSON sidecar of {path} is {value!r}: it must be a number of seconds.")
    return float(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
