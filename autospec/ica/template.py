"""Templates: the reference maps of networks, where they come from, their names, and the grid they are used on.

A template is any 4-D image with one network a volume, in MNI space.  NeuroMark 1.0 (53 networks, Du et al. 2020,
*NeuroImage: Clinical* 28, 102375) is recognised by its bytes.  It may not be shipped, so there is a stand-in: a Gaussian
blob at each of the 53 peaks that the paper's table lists.  Everything made with it says so.

The table of peaks, ``data/neuromark_1_0_networks.csv``, is rebuilt from that paper.  In two rows the paper contradicts
itself: network 33 is printed as left inferior parietal lobule with the short name "R IPL" and a peak on the right, and
is called right here; network 49, posterior cingulate cortex, has its peak at y = 54.5 in the front, kept as printed.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from autospec.errors import UserError
from autospec.ica.images import affine_warnings, open_image, read_volumes, require_brain_size, to_grid

STAND_IN = "stand-in"
STAND_IN_KIND = "stand-in template"
CUSTOM_KIND = "custom template"
NEUROMARK_KIND = "NeuroMark 1.0"
# The original file: its git blob id in the repository trendscenter/gift, and what another distributor records of it.
NEUROMARK_GIT_BLOB = "ec8b3352267d8f632487bb2e11e5cea0556e5298"
NEUROMARK_BYTES = 18_404_920
NEUROMARK_MD5 = "8d134f7ba22659d29ba75abac0979357"

DOMAINS = {
    "SC": "subcortical",
    "AUD": "auditory",
    "SM": "sensorimotor",
    "VIS": "visual",
    "CC": "cognitive control",
    "DM": "default mode",
    "CB": "cerebellar",
}
BLOB_SIGMA_MM = 8.0
STAND_IN_SHAPE = (53, 63, 52)
STAND_IN_AFFINE = np.array([[3.0, 0, 0, -78], [0, 3, 0, -112], [0, 0, 3, -70], [0, 0, 0, 1]])
LEAST_COVERAGE = 0.1


@dataclass(frozen=True)
class Network:
    """One row of a template: its number from 1, short label, region in words, and domain's short name."""

    number: int
    label: str
    region: str
    domain: str


@dataclass(frozen=True)
class Template:
    """Reference maps on a grid.

    Attributes
    ----------
    maps : ndarray of float32, shape (X, Y, Z, networks)
    affine : ndarray, shape (4, 4)
        From voxels to millimetres of MNI space.
    kind : str
        "NeuroMark 1.0", "custom template" or "stand-in template".
    digest : str
        Of grid, affine and values as they were read, whatever the file's compression.
    networks : tuple of Network
    source : str
        File name, or "stand-in".
    warnings : tuple of str
        What its header leaves in doubt.
    """

    maps: np.ndarray
    affine: np.ndarray
    kind: str
    digest: str
    networks: tuple[Network, ...]
    source: str
    warnings: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        """The networks' labels, all different."""
        return [network.label for network in self.networks]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Dimensions of the grid."""
        x, y, z = self.maps.shape[:3]
        return x, y, z


def load_template(source: str | Path) -> Template:
    """Load a template and say what it is.

    Parameters
    ----------
    source : path-like
        A 4-D image with one network a volume, or "stand-in".

    Raises
    ------
    UserError
        If it cannot be read, is no 4-D image, is not of a brain's size, or one of its volumes is constant.
    """
    if str(source) == STAND_IN:
        return stand_in_template()
    image = open_image(source)
    maps, affine = read_volumes(source)
    if maps.ndim != 4:
        raise UserError(
            f"the template {source} has one volume: give a 4-D image with one network a volume, or '{STAND_IN}'."
        )
    require_brain_size(image, f"the template {source}")
    constant = [k + 1 for k in range(maps.shape[3]) if maps[..., k].min() == maps[..., k].max()]
    if constant:
        raise UserError(f"network {constant[0]} of the template {source} is constant: leave it out or give its map.")
    kind = recognise(source, maps, affine)
    networks = neuromark_networks() if kind != CUSTOM_KIND else numbered_networks(maps.shape[3])
    warnings = tuple(affine_warnings(image, source))
    return Template(maps, affine, kind, template_digest(maps, affine), networks, Path(source).name, warnings)


def recognise(path: str | Path, maps: np.ndarray, affine: np.ndarray) -> str:
    """Say whether a template is NeuroMark 1.0, the stand-in, or another."""
    if is_neuromark(content_identity(path)):
        return NEUROMARK_KIND
    peaks = neuromark_peaks()
    if maps.shape[3] == len(peaks):
        inside = maps.any(axis=3)
        if min(correlate_rows(maps[inside].T, blobs_at(peaks, np.argwhere(inside), affine).T)) > 0.999:
            return STAND_IN_KIND
    return CUSTOM_KIND


def content_identity(path: str | Path) -> dict[str, str | int]:
    """Size, md5 and git blob id of a file's content, unpacked where it is gzipped."""
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise UserError(f"the template {path} is cut short or damaged: copy it again.") from None
    return {"bytes": len(data), "md5": hashlib.md5(data, usedforsecurity=False).hexdigest(), "git_blob": git_blob(data)}


def git_blob(data: bytes) -> str:
    """Name under which git stores a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def is_neuromark(identity: dict[str, str | int]) -> bool:
    """Whether these are the original bytes of NeuroMark 1.0, by either of the two records of them."""
    return identity["git_blob"] == NEUROMARK_GIT_BLOB or (
        identity["bytes"] == NEUROMARK_BYTES and identity["md5"] == NEUROMARK_MD5
    )


def template_digest(maps: np.ndarray, affine: np.ndarray) -> str:
    """SHA-256 of grid, affine and values, so that a packed and an unpacked file are the same template."""
    digest = hashlib.sha256(repr(tuple(int(length) for length in maps.shape)).encode())
    digest.update((np.round(affine, 6) + 0.0).astype("<f8").tobytes())  # + 0.0: there is no negative zero
    digest.update((maps + np.float32(0)).astype("<f4", order="C").data)
    return digest.hexdigest()


def stand_in_template() -> Template:
    """Build the stand-in: 53 Gaussian blobs of 8 mm at the published peaks, within the MNI brain, on a 3 mm grid."""
    brain = mni_brain(STAND_IN_SHAPE, STAND_IN_AFFINE)
    maps = np.zeros((*STAND_IN_SHAPE, len(neuromark_peaks())), dtype=np.float32)
    maps[brain] = blobs_at(neuromark_peaks(), np.argwhere(brain), STAND_IN_AFFINE)
    digest = template_digest(maps, STAND_IN_AFFINE)
    return Template(maps, STAND_IN_AFFINE.copy(), STAND_IN_KIND, digest, neuromark_networks(), STAND_IN)


def blobs_at(peaks: np.ndarray, voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Gaussian blobs of height 1.

    Parameters
    ----------
    peaks : ndarray, shape (networks, 3)
        In millimetres.
    voxels : ndarray of int, shape (voxels, 3)
        Where on a grid.
    affine : ndarray, shape (4, 4)
        Of the grid.

    Returns
    -------
    ndarray of float32, shape (voxels, networks)
    """
    millimetres = voxels @ affine[:3, :3].T + affine[:3, 3]
    maps = np.empty((len(voxels), len(peaks)), dtype=np.float32)
    squares = (millimetres**2).sum(-1)
    for k, peak in enumerate(peaks):
        distances = squares - 2 * millimetres @ peak + peak @ peak
        maps[..., k] = np.exp(distances.astype(np.float32) / np.float32(-2 * BLOB_SIGMA_MM**2))
    return maps


def neuromark_networks() -> tuple[Network, ...]:
    """The 53 networks of NeuroMark 1.0."""
    return tuple(Network(int(row["network"]), row["label"], row["region"], row["domain"]) for row in _table())


def neuromark_peaks() -> np.ndarray:
    """Their peaks in millimetres of MNI space, shape (53, 3)."""
    return np.array([[float(row[axis]) for axis in "xyz"] for row in _table()])


def numbered_networks(count: int) -> tuple[Network, ...]:
    """Networks of which only the number is known."""
    width = max(3, len(str(count)))
    return tuple(Network(k, f"network-{k:0{width}d}", "", "") for k in range(1, count + 1))


def analysis_grid(
    grid: str | float, template: Template, image: str | Path | None
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Find the grid on which networks are sought.

    Parameters
    ----------
    grid : "template", "data" or float
        The template's own, the image's own, or cubes of that many millimetres over the template's field of view.
    template : Template
    image : path-like or None
        Needed for "data" only.

    Returns
    -------
    shape : tuple of int
    affine : ndarray, shape (4, 4)
    """
    if grid == "template":
        return template.shape, template.affine
    if grid == "data":
        if image is None:
            raise UserError("the grid 'data' needs an image: give one, or choose the grid 'template'.")
        opened = open_image(image)
        x, y, z = opened.shape[:3]
        return (int(x), int(y), int(z)), np.asarray(opened.affine, dtype=np.float64)
    if isinstance(grid, bool) or not isinstance(grid, int | float) or not 1 <= grid <= 20:
        raise UserError(f"grid is {grid!r}: it can be 'template', 'data' or a voxel size of 1 to 20 mm.")
    ends = np.array(np.meshgrid(*[(0, length - 1) for length in template.shape])).reshape(3, -1)
    corners = template.affine[:3, :3] @ ends + template.affine[:3, 3:]
    low, extent = corners.min(axis=1), np.ptp(corners, axis=1)
    x, y, z = (int(length) for length in np.floor(extent / grid + 1e-6) + 1)
    affine = np.diag([float(grid)] * 3 + [1.0])
    affine[:3, 3] = low
    return (x, y, z), affine


def on_grid(template: Template, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Maps of a template on a grid, shape (X, Y, Z, networks).

    Dimensions and affines are compared; where either differs the maps are resampled.
    """
    return to_grid(template.maps, template.affine, shape, affine, "linear")


def mni_brain(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Brain mask of the MNI template that nilearn ships, on a grid: boolean, shape (X, Y, Z)."""
    brain, own = _mni_brain_1mm()
    return to_grid(brain, own, shape, affine, "nearest")


def mni_brain_volume() -> int:
    """Volume of that brain in cubic millimetres."""
    return int(_mni_brain_1mm()[0].sum())


def fixed_mask(template: Template, maps: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxels that are used whoever the subject is: where the template has a value, within the MNI brain.

    Parameters
    ----------
    template : Template
    maps, affine : ndarray (X, Y, Z, networks), ndarray (4, 4)
        Its maps on the grid in use, from `on_grid`.

    Returns
    -------
    ndarray of bool, shape (X, Y, Z)

    Raises
    ------
    UserError
        If a network lies outside; its name is given.
    """
    mask = maps.any(axis=3) & mni_brain(maps.shape, affine)
    where = "the mask (the template's support within the MNI brain)"
    require_networks(template, coverage(template, mask, affine), LEAST_COVERAGE, where)
    return mask


def coverage(template: Template, mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Share of each network that lies in a mask.

    Parameters
    ----------
    template : Template
        On its own grid, so that what an image's field of view cuts off counts as missing.
    mask, affine : ndarray of bool (X, Y, Z), ndarray (4, 4)
        On any grid.

    Returns
    -------
    ndarray, shape (networks,)
        From 0 to 1, of the network's squared values.
    """
    inside = to_grid(mask, affine, template.shape, template.affine, "nearest")
    whole = np.square(template.maps).sum(axis=(0, 1, 2), dtype=np.float64)
    return np.square(template.maps[inside]).sum(axis=0, dtype=np.float64) / whole


def require_networks(template: Template, shares: np.ndarray, least: float, where: str) -> None:
    """Raise UserError that names the networks of which less than the least share lies in a mask.

    Parameters
    ----------
    template : Template
    shares : ndarray, shape (networks,)
        From `coverage`.
    least : float
        From 0 to 1.
    where : str
        The mask, for the message.
    """
    lost = [n.label for n, share in zip(template.networks, shares, strict=True) if share < least]
    if lost:
        raise UserError(
            f"{', '.join(lost[:5])}{' and others' if len(lost) > 5 else ''} of the template {template.source} "
            f"{'lies' if len(lost) == 1 else 'lie'} outside {where}, with more than {100 * (1 - least):.0f} % of the map: leave such networks out, or use another mask."
        )


def correlate_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row of one matrix with the same row of another, in float64."""
    a, b = (rows - rows.mean(axis=1, keepdims=True, dtype=np.float64) for rows in (a, b))
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), size, out=np.zeros_like(size), where=size > 0)


@cache
def _mni_brain_1mm() -> tuple[np.ndarray, np.ndarray]:
    from nilearn.datasets import load_mni152_brain_mask

    brain = load_mni152_brain_mask(resolution=1)
    return np.asarray(brain.dataobj) > 0, brain.affine


@cache
def _table() -> list[dict[str, str]]:
    text = resources.files("autospec.ica").joinpath("data/neuromark_1_0_networks.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
