"""The zarr schema of a run: how trajectories are written, packed and opened.

While a run trains, its trajectories are a directory store that grows by whole chunks; consolidated metadata,
replaced as the last thing of each write, always describe a consistent state, so another process can read
along.  A finished run is packed into one zip file with sorted names and one fixed date: the same content gives
the same bytes.
"""

from __future__ import annotations

import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from autospec.errors import UserError
from autospec.introspection.watcher import STEPS_PER_CHUNK

ZIP_DATE = (1980, 1, 1, 0, 0, 0)


class TrajectoryStore:
    """A growing directory store of trajectories.

    Parameters
    ----------
    path : path-like
        Where the store lies.  A name that ends in ``.zip`` is written at the end, by packing; until then the
        store grows in a folder ``<path>.partial`` beside it.
    resume : bool
        Continue a store that exists, instead of refusing it.

    Raises
    ------
    UserError
        If something stands at the path already and ``resume`` is False, or its folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        self.path = Path(path)
        self._packed = self.path.suffix == ".zip"
        self._folder = self.path.with_name(self.path.name + ".partial") if self._packed else self.path
        if not self.path.parent.is_dir():
            raise UserError(f"{self.path.parent} is not a folder: create it before trajectories are stored in it.")
        if self.path.exists() and not (resume and not self._packed):
            raise UserError(f"{self.path} exists already: choose another name for the store, or delete it first.")
        if self._folder.exists() and not resume:
            shutil.rmtree(self._folder)

    def append(self, tree: xr.DataTree) -> None:
        """Write the records of some more steps."""
        if not tree.sizes["step"]:
            return
        with _quiet():
            if not self._folder.exists():
                _create(self._folder, tree)
            group = zarr.open_group(str(self._folder), mode="r+")
            for path, array in _arrays(tree):
                if "step" in array.dims:
                    group[path].append(array.values, axis=0)
            zarr.consolidate_metadata(str(self._folder))

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` recorded steps, and drop what came after them."""
        if not self._folder.exists():
            if count:
                raise UserError(f"{self._folder} is missing, but {count} recorded steps should be in it.")
            return
        if not count:
            shutil.rmtree(self._folder)
            return
        with _quiet():
            group = zarr.open_group(str(self._folder), mode="r+")
            for path, array in _stored_arrays(group):
                if array.metadata.dimension_names[0] == "step":
                    if array.shape[0] < count:
                        raise UserError(f"{self._folder} holds fewer steps ({array.shape[0]}) than {count} in '{path}'.")
                    array.resize((count, *array.shape[1:]))
            zarr.consolidate_metadata(str(self._folder))

    def finish(self, attributes: dict[str, Any], complete: bool) -> None:
        """Write the final attributes and, for a zip, pack the store."""
        if not self._folder.exists():
            return
        with _quiet():
            zarr.open_group(str(self._folder), mode="r+").attrs.update(attributes)
            zarr.consolidate_metadata(str(self._folder))
        if self._packed and complete:
            pack(self._folder, self.path)
            shutil.rmtree(self._folder)

    def open(self) -> xr.DataTree:
        """Open what has been written."""
        return open_trajectories(self.path if self._packed and self.path.exists() else self._folder)


def open_trajectories(path: str | os.PathLike[str]) -> xr.DataTree:
    """Open the trajectories of a run.

    Parameters
    ----------
    path : path-like
        A ``.zarr.zip`` file, or the ``.zarr`` folder of a run, which may still be growing.

    Returns
    -------
    xarray.DataTree
        In memory.  Coordinates ``step``, ``group``, ``grouping`` at the root; nodes
        ``layers/<parameter>`` with ``gradient``, ``activation``, ``adjoint`` ``(step, group, index)`` and their
        noise floors ``(step, group)``; ``training`` where the workflow trained the run.

    Raises
    ------
    UserError
        If there is no such store, or it cannot be read.

    Examples
    --------
    >>> tree = open_trajectories("results/runs/mnist_mlp/autoencoder_32_relu.zarr.zip")  # doctest: +SKIP
    >>> tree["layers/encoder.0.weight/gradient"].sel(group="3", index=1)  # doctest: +SKIP
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there are no trajectories at {path}: check the name, or wait for the first steps.")
    try:
        if path.is_dir():
            with xr.open_datatree(path, engine="zarr") as tree:
                return tree.load()
        with zarr.storage.ZipStore(path, mode="r") as store, xr.open_datatree(store, engine="zarr") as tree:
            return tree.load()
    except (zipfile.BadZipFile, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a readable store of trajectories ({error}): make the run again.") from error


def add_training_curves(folder: str | os.PathLike[str], curves: dict[str, np.ndarray]) -> None:
    """Add a node ``training`` with one value per parameter update for each curve, such as the loss.

    Parameters
    ----------
    folder : path-like
        A directory store.
    curves : dict of str to ndarray, shape (updates,)
        ``update`` counts from 0.
    """
    with _quiet():
        group = zarr.open_group(str(folder), mode="r+")
        if "training" in group:
            del group["training"]
        node = group.create_group("training")
        length = len(next(iter(curves.values())))
        for name, values in {"update": np.arange(length), **curves}.items():
            array = node.create_array(
                name, shape=values.shape, dtype=values.dtype, chunks=(max(1, length),), dimension_names=["update"]
            )
            array[:] = values
        zarr.consolidate_metadata(str(folder))


def pack(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Pack a directory store into a zip file, reproducibly, and move it into place.

    Parameters
    ----------
    folder : path-like
        The directory store; it is left as it is.
    target : path-like
        The zip file.  It appears whole or not at all.
    """
    folder, target = Path(folder), Path(target)
    temporary = target.with_name(target.name + ".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), date_time=ZIP_DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes())
    os.replace(temporary, target)


def _create(folder: Path, tree: xr.DataTree) -> None:
    """Create the arrays of a store, empty along ``step``, complete otherwise."""
    root = zarr.open_group(str(folder), mode="w", zarr_format=3, attributes=dict(tree.attrs))
    for node in tree.subtree:
        if node.path != "/":
            root.require_group(node.path.lstrip("/"), overwrite=False).attrs.update(node.attrs)
    for path, array in _arrays(tree):
        grows = "step" in array.dims
        shape = (0, *array.shape[1:]) if grows else array.shape
        text = array.dtype.kind in "TOU"
        chunks = (STEPS_PER_CHUNK, *array.shape[1:]) if grows else array.shape
        stored = root.create_array(
            path,
            shape=shape,
            dtype="string" if text else array.dtype,
            chunks=tuple(max(1, size) for size in chunks),
            fill_value=np.nan if array.dtype.kind == "f" else None,
            dimension_names=list(map(str, array.dims)),
            attributes=_plain(array.attrs),
        )
        if not grows:
            stored[...] = array.values.astype(object) if text else array.values
        # xarray finds coordinates that are no dimensions by this attribute.
    auxiliary = [str(name) for name in tree.coords if name not in tree.dims]
    if auxiliary:
        for name in tree.data_vars:
            root[str(name)].attrs["coordinates"] = " ".join(auxiliary)


def _arrays(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataArray]]:
    """Every array that a node holds itself, with its path."""
    for node in tree.subtree:
        dataset = node.to_dataset(inherit=False)
        for name, array in dataset.variables.items():
            yield f"{node.path}/{name}".lstrip("/"), xr.DataArray(array)


def _stored_arrays(group: zarr.Group) -> Iterator[tuple[str, zarr.Array]]:
    for path, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            yield path, member


def _plain(attributes: Any) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in attributes.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Zarr warns that consolidated metadata is not in the third format's specification; readers may ignore it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        yield
