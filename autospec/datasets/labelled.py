"""The labelled store that every data set becomes, and every training reads."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from autospec.errors import UserError
from autospec.storage import open_store, pack, without_consolidation_warning


def labelled(
    x: np.ndarray,
    dims: tuple[str, ...],
    ids: list[str],
    target: list[str],
    groupings: dict[str, list[str]],
    attributes: dict[str, Any],
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
        Labels of each grouping, one a sample.
    attributes : dict
        Where the data came from.

    Returns
    -------
    xarray.Dataset
        ``x (sample, *dims)``, ``target (sample)`` and one variable for each grouping, with ``id`` as coordinate.
    """
    text = np.dtypes.StringDType()
    variables: dict[str, Any] = {
        "x": (("sample", *dims), np.ascontiguousarray(x, dtype=np.float32)),
        "target": ("sample", np.array(target, dtype=text)),
    }
    for name, labels in groupings.items():
        variables[f"grouping_{name}"] = ("sample", np.array(labels, dtype=text))
    return xr.Dataset(variables, coords={"id": ("sample", np.array(ids, dtype=text))}, attrs=attributes)


def write_labelled(dataset: xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Write a labelled data set as one zip file, reproducibly."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".packing-") as folder:
        with without_consolidation_warning():
            dataset.to_zarr(Path(folder) / "store", zarr_format=3, consolidated=True)
        pack(Path(folder) / "store", target)


def open_labelled(path: str | os.PathLike[str]) -> xr.Dataset:
    """Open a labelled data set; raises UserError if it cannot be read."""
    dataset = open_store(path, "samples").to_dataset()
    if not {"x", "target"} <= set(dataset.data_vars):
        raise UserError(f"{path} holds no labelled samples: give a store that autospec dataset wrote.")
    return dataset


def group_labels(dataset: xr.Dataset, grouping: str | None) -> list[str]:
    """Group of each sample: a grouping's labels, or the target; raises UserError if there is no such grouping."""
    name = "target" if grouping is None else f"grouping_{grouping}"
    if name not in dataset:
        there = [str(each).removeprefix("grouping_") for each in dataset if str(each).startswith("grouping_")]
        raise UserError(f"the data set has no grouping '{grouping}': grouping can be one of {there}.")
    return [str(label) for label in dataset[name].values]
