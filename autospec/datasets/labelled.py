"""The labelled store that every data set becomes, and every training reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from autospec.errors import UserError
from autospec.storage import open_store, pack, without_consolidation_warning

MISSING = "n/a"
"""How a label that is not known is stored; such a sample belongs to no group of the grouping."""


def labelled(
    x: np.ndarray,
    dims: tuple[str, ...],
    ids: list[str],
    target: list[str],
    groupings: dict[str, list[str]],
    attributes: dict[str, Any],
    subjects: Sequence[str] | None = None,
    covariates: Mapping[str, Sequence[float]] | None = None,
) -> xr.Dataset:
    """Arrange samples with their labels.

    Parameters
    ----------
    x : ndarray, shape (samples, ...)
        What the network sees; stored as float32.
    dims : tuple of str
        Names of the other dimensions of ``x``, such as ``("time", "network")``.
    ids : list of str
        One id a sample.
    target : list of str
        The label that a classifier learns, one a sample.
    groupings : dict of str to list of str
        Labels of each grouping, one a sample; ``n/a`` where it is not known.
    attributes : dict
        Where the data came from.
    subjects : sequence of str, optional
        Whose each sample is, where somebody may have several: the unit of splits and of permutations.
    covariates : mapping of str to sequence of float, optional
        Numbers of each sample that may explain a difference of groups, such as age; NaN where not known.

    Returns
    -------
    xarray.Dataset
        ``x (sample, *dims)``, ``target (sample)``, ``grouping_<name>`` and ``covariate_<name>``, with ``id`` and, where
        given, ``subject`` as coordinates.
    """
    dataset = _labels(ids, target, groupings, attributes, subjects, covariates)
    return dataset.assign(x=(("sample", *dims), np.ascontiguousarray(x, dtype=np.float32)))


def _labels(
    ids: list[str],
    target: list[str],
    groupings: Mapping[str, list[str]],
    attributes: dict[str, Any],
    subjects: Sequence[str] | None,
    covariates: Mapping[str, Sequence[float]] | None,
) -> xr.Dataset:
    """Everything of a labelled data set but ``x``."""
    text = np.dtypes.StringDType()
    variables: dict[str, Any] = {"target": ("sample", np.array(target, dtype=text))}
    for name, labels in groupings.items():
        variables[f"grouping_{name}"] = ("sample", np.array(labels, dtype=text))
    for name, numbers in (covariates or {}).items():
        variables[f"covariate_{name}"] = ("sample", np.asarray(numbers, dtype=np.float64))
    coordinates = {"id": ids} if subjects is None else {"id": ids, "subject": list(subjects)}
    return xr.Dataset(
        variables,
        coords={name: ("sample", np.array(values, dtype=text)) for name, values in coordinates.items()},
        attrs=attributes,
    )


@contextmanager
def _packed(target: Path) -> Iterator[Path]:
    """Give a place for a directory store; pack it into the target if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".packing-") as folder:
        store = Path(folder) / "store"
        yield store
        pack(store, target)


def write_labelled(dataset: xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Write a labelled data set as one zip file, reproducibly."""
    with _packed(Path(path)) as store, without_consolidation_warning():
        dataset.to_zarr(store, zarr_format=3, consolidated=True)


def write_samples(
    samples: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dims: tuple[str, ...],
    ids: list[str],
    target: list[str],
    groupings: Mapping[str, list[str]],
    attributes: dict[str, Any],
    coordinates: Mapping[str, tuple[str, list[str] | np.ndarray]],
    path: str | os.PathLike[str],
    subjects: Sequence[str] | None = None,
    covariates: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write a labelled data set sample by sample, so that memory does not grow with their number.

    Parameters
    ----------
    samples : iterable of ndarray, each of the given shape
        In the order of ``ids``; one is held at a time.
    shape : tuple of int
        Shape of one sample.
    dims : tuple of str
        Names of a sample's dimensions.
    ids, target, groupings, attributes
        As for `labelled`.
    coordinates : mapping of str to (dimension, values)
        Further coordinates, such as ``{"network": ("network", names)}``.
    path : path-like
        The zip file; it appears whole or not at all.
    subjects, covariates
        As for `labelled`.

    Raises
    ------
    ValueError
        If a sample has another shape, or there are more or fewer than ids.
    """
    text = np.dtypes.StringDType()
    dataset = _labels(ids, target, groupings, attributes, subjects, covariates).assign_coords(
        {
            name: (dim, values if isinstance(values, np.ndarray) else np.array(values, dtype=text))
            for name, (dim, values) in coordinates.items()
        }
    )
    with _packed(Path(path)) as store:
        with without_consolidation_warning():
            dataset.to_zarr(store, zarr_format=3, consolidated=False)
            x = zarr.open_group(store, mode="a").create_array(
                "x",
                shape=(len(ids), *shape),
                chunks=(1, *shape),
                dtype="float32",
                fill_value=np.nan,
                dimension_names=("sample", *dims),
            )
        written = 0
        for sample in samples:
            if sample.shape != shape or written == len(ids):
                raise ValueError(f"sample {written} has the shape {sample.shape}; {len(ids)} of {shape} are expected")
            x[written] = sample
            written += 1
        if written < len(ids):
            raise ValueError(f"{written} samples were given, but {len(ids)} ids")
        with without_consolidation_warning():
            zarr.consolidate_metadata(store)


def open_labelled(path: str | os.PathLike[str]) -> xr.Dataset:
    """Open a labelled data set; raises UserError if it cannot be read."""
    dataset = open_store(path, "samples").to_dataset()
    if not {"x", "target"} <= set(dataset.data_vars):
        raise UserError(f"{path} holds no labelled samples: give a store that autospec dataset wrote.")
    return dataset


def group_labels(dataset: xr.Dataset, grouping: str | None) -> list[str | None]:
    """Group of each sample.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `open_labelled`.
    grouping : str or None
        Whose labels; None stands for the target's.

    Returns
    -------
    list of str or None
        None where the label is not known: such a sample belongs to no group.

    Raises
    ------
    UserError
        If there is no such grouping.
    """
    name = "target" if grouping is None else f"grouping_{grouping}"
    if name not in dataset:
        there = [str(each).removeprefix("grouping_") for each in dataset if str(each).startswith("grouping_")]
        raise UserError(f"the data set has no grouping '{grouping}': grouping can be one of {there}.")
    return [None if label in ("", MISSING) else str(label) for label in dataset[name].values]


def samples_with(dataset: xr.Dataset, ids: Collection[str]) -> xr.Dataset:
    """The samples of these ids alone, in the data set's own order."""
    return dataset.isel(sample=np.flatnonzero([str(name) in ids for name in dataset["id"].values]))


def subjects_of(dataset: xr.Dataset) -> list[str]:
    """Whose each sample is: the unit of splits and permutations; each sample's own id where nobody has several."""
    return [str(name) for name in dataset["subject" if "subject" in dataset.variables else "id"].values]


def covariates_of(dataset: xr.Dataset) -> dict[str, np.ndarray]:
    """Covariates by name, (sample,) each, NaN where not known; none where the data set has none."""
    start = "covariate_"
    return {str(name).removeprefix(start): dataset[name].values for name in dataset if str(name).startswith(start)}
