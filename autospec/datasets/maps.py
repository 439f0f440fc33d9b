"""Maps of networks, aggregated by their maximum, as a labelled data set: [sample, voxel_x, voxel_y, voxel_z].

A sample is ``map[x, y, z]``, the maximum over networks of the z-scored maps: signed, since the sign of a map follows its
reference; 0 outside of the mask.  Where larger voxels are asked for, the maximum is taken first and then averaged over
each new voxel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, TypedDict

import numpy as np

from autospec.datasets.labelled import write_samples
from autospec.datasets.participants import files_of, read_half, read_origin
from autospec.errors import UserError
from autospec.ica.images import open_image, read_mask, read_volumes, same_grid, volume_shape

# A new voxel belongs to the brain where at least half of it does.
LEAST_SHARE = 0.5
# Not x, y and z: a variable of a store that has the name of a dimension is its index.
DIMENSIONS = ("voxel_x", "voxel_y", "voxel_z")


class MapsSettings(TypedDict):
    """What the stage reads from the configuration."""

    name: str
    aggregate: Literal["max", "absmax"]
    """The signed maximum over networks, or the maximum of the absolute values."""
    standardise: bool
    """Whether to z-score each map within the mask first; maps of autospec's own are z-scored already."""
    voxel_mm: float | None
    """Edge of the data set's voxels; None keeps the maps' own."""


def build_maps(
    settings: MapsSettings, participants: str, files: Mapping[str, str], masks: Mapping[str, str], output: str
) -> str:
    """Build a data set of aggregated maps and write it, one sample at a time.

    Parameters
    ----------
    settings : MapsSettings
    participants : str
        The cohort's ``participants.tsv``.
    files : mapping of str to str
        4-D image of maps, one network a volume, by participant's id.
    masks : mapping of str to str
        Mask of the maps by participant's id; whoever has none has one where any map differs from 0.
    output : str
        The ``.zarr.zip`` file to write.

    Returns
    -------
    str
        One line that says what was built.

    Raises
    ------
    UserError
        If somebody's image is missing, has other networks, or lies on another grid.
    """
    half = read_half(participants, "functional")
    paths = files_of(half, files, "maps")
    origin = read_origin(paths, half)
    shape, affine, networks = _common_grid(paths)
    weights, new_affine = None, affine
    if settings["voxel_mm"] is not None:
        weights, new_affine = coarser_grid(shape, affine, settings["voxel_mm"])
    size = shape if weights is None else (len(weights[0]), len(weights[1]), len(weights[2]))
    voxel = [round(float(edge), 4) for edge in np.linalg.norm(new_affine[:3, :3], axis=0)]
    write_samples(
        _samples(settings, half.ids, paths, masks, weights),
        shape=size,
        dims=DIMENSIONS,
        ids=half.ids,
        target=half.target,
        groupings=half.groupings,
        attributes={
            "kind": "maps",
            "source": participants,
            "cohort_digest": half.cohort_digest,
            "aggregate": settings["aggregate"],
            "standardised": settings["standardise"],
            "networks": networks,
            "voxel_mm": voxel,
            "downsampled": weights is not None,
            "affine": [float(value) for value in new_affine.ravel()],
            **origin.attributes,
        },
        coordinates=_millimetres(size, new_affine),
        path=output,
        subjects=half.subjects,
        covariates=half.covariates,
    )
    grid = f"{' x '.join(map(str, size))} voxels of {' x '.join(f'{edge:g}' for edge in voxel)} mm"
    return f"{settings['name']}: {half.counted}, {grid}, {settings['aggregate']} of {networks} networks"


def z_scores(maps: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Give each map (x, y, z, network) mean 0 and standard deviation 1 within the mask; a constant one becomes 0."""
    inside = maps[mask].astype(np.float64)
    inside -= inside.mean(0)
    spread = inside.std(0)
    scaled = np.zeros(maps.shape)
    scaled[mask] = inside / np.where(spread > 0, spread, 1.0)
    return scaled


def strongest(maps: np.ndarray, mask: np.ndarray, aggregate: Literal["max", "absmax"]) -> np.ndarray:
    """Maximum over networks, signed or of absolute values; 0 outside of the mask.

    Parameters
    ----------
    maps : ndarray, shape (x, y, z, networks)
    mask : ndarray of bool, shape (x, y, z)
    aggregate : {"max", "absmax"}

    Returns
    -------
    ndarray, shape (x, y, z)
    """
    return np.where(mask, (np.abs(maps) if aggregate == "absmax" else maps).max(-1), 0.0)


def coarser_grid(
    shape: tuple[int, int, int], affine: np.ndarray, voxel_mm: float
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """A grid of larger voxels over the same field of view.

    Parameters
    ----------
    shape : tuple of int
    affine : ndarray, shape (4, 4)
        Its axes run along the brain's.
    voxel_mm : float
        Edge of the new voxels.

    Returns
    -------
    weights : three ndarrays, each of shape (new length, old length)
        Share of each new voxel that each old one fills, along each axis; a row sums to 1 or, at the end, less.
    affine : ndarray, shape (4, 4)
        Of the new grid.

    Raises
    ------
    UserError
        If the voxels would become smaller, or the axes do not run along the brain's.
    """
    columns = affine[:3, :3]
    edges = np.linalg.norm(columns, axis=0)
    if (np.count_nonzero(np.abs(columns) > 1e-4 * edges, axis=0) != 1).any():
        raise UserError(
            "the maps' axes do not run along the brain's, so voxel_mm cannot be used: set ica.grid to template."
        )
    if voxel_mm < edges.max() - 1e-6:
        raise UserError(
            f"voxel_mm is {voxel_mm:g}, but the maps have voxels of {edges.max():g} mm: give a larger number."
        )
    new_affine = affine.copy()
    new_affine[:3, :3] = columns * (voxel_mm / edges)
    # The outer faces of the first voxels of both grids are the same.
    corner = affine @ np.array([-0.5, -0.5, -0.5, 1.0])
    new_affine[:3, 3] = corner[:3] + new_affine[:3, :3] @ np.array([0.5, 0.5, 0.5])
    x, y, z = (_overlaps(length, float(edge), voxel_mm) for length, edge in zip(shape, edges, strict=True))
    return (x, y, z), new_affine


def _overlaps(length: int, edge: float, new_edge: float) -> np.ndarray:
    """Share of each new interval that each old one fills, both starting at 0."""
    count = int(np.ceil(length * edge / new_edge - 1e-9))
    old, new = np.arange(length) * edge, np.arange(count)[:, None] * new_edge
    both = np.minimum(old + edge, new + new_edge) - np.maximum(old, new)
    return np.clip(both, 0.0, None) / new_edge


def averaged(values: np.ndarray, mask: np.ndarray, weights: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Mean over the part of each new voxel that lies in the mask; 0 where less than half of it does.

    Parameters
    ----------
    values : ndarray, shape (x, y, z)
    mask : ndarray of bool, shape (x, y, z)
    weights : three ndarrays
        From `coarser_grid`.
    """
    total, share = (
        np.einsum("ai,bj,ck,ijk->abc", *weights, part, optimize=True)
        for part in (np.where(mask, values, 0.0), mask * 1.0)
    )
    return np.where(share >= LEAST_SHARE, total / np.maximum(share, LEAST_SHARE), 0.0)


def _common_grid(paths: list[str]) -> tuple[tuple[int, int, int], np.ndarray, int]:
    """Shape, affine and number of networks that all images share."""
    first: tuple[tuple[int, ...], np.ndarray] | None = None
    for path in paths:
        image = open_image(path)
        shape, affine = volume_shape(image), np.asarray(image.affine, dtype=np.float64)
        if len(shape) != 4:
            raise UserError(f"{path} has {len(shape)} dimensions: a 4-D image with one network a volume is needed.")
        if first is None:
            first = shape, affine
        if not same_grid(first[0], first[1], shape, affine):
            raise UserError(
                f"{path} lies on another grid than {paths[0]}: set ica.grid to template, or to a voxel size."
            )
        if shape[3] != first[0][3]:
            raise UserError(
                f"{path} has {shape[3]} networks, but {paths[0]} has {first[0][3]}: use one template for all."
            )
    assert first is not None
    (x, y, z, networks), affine = first
    return (x, y, z), affine, networks


def _samples(
    settings: MapsSettings,
    ids: list[str],
    paths: list[str],
    masks: Mapping[str, str],
    weights: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
) -> Iterator[np.ndarray]:
    for name, path in zip(ids, paths, strict=True):
        maps, affine = read_volumes(path)
        mask: np.ndarray = np.any(maps, axis=-1)
        if name in masks:
            given, own = read_mask(masks[name])
            if not same_grid(given.shape, own, maps.shape, affine):
                raise UserError(f"{masks[name]} lies on another grid than {path}: give the mask that belongs to it.")
            mask = given
        if not mask.any():
            raise UserError(f"{path} is 0 everywhere: run the participant's own job again.")
        sample = strongest(z_scores(maps, mask) if settings["standardise"] else maps, mask, settings["aggregate"])
        yield (sample if weights is None else averaged(sample, mask, weights)).astype(np.float32)


def _millimetres(size: tuple[int, ...], affine: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
    """Centres of the voxels along each axis of the array, in mm, where that axis runs along one of the brain's."""
    found = {}
    for axis, (name, length) in enumerate(zip(DIMENSIONS, size, strict=True)):
        along = int(np.argmax(np.abs(affine[:3, axis])))
        found[f"{name[-1]}_mm"] = (name, affine[along, axis] * np.arange(length) + affine[along, 3])
    return found
