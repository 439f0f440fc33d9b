"""The zarr schema of a run: how trajectories are written, packed and opened.

While a run trains, its trajectories are a directory store that grows by whole chunks; consolidated metadata,
replaced as the last thing of each write, always describe a consistent state, so another process can read
along.  A finished run is packed into one zip file with sorted names and one fixed date: the same content gives
the same bytes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from autospec.errors import UserError
from autospec.storage import open_store, pack, without_consolidation_warning

STEPS_PER_CHUNK = 64


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

    Notes
    -----
    Steps are written where they belong, by number: what a write that failed has left is written over by the next one.
    """

    steps_per_chunk = STEPS_PER_CHUNK

    def __init__(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        self.path = Path(path)
        self._packed = self.path.suffix == ".zip"
        self._folder = self.path.with_name(self.path.name + ".partial") if self._packed else self.path
        if not self.path.parent.is_dir():
            raise UserError(f"{self.path.parent} is not a folder: create it before trajectories are stored in it.")
        if not resume or (self._packed and self.path.exists()):
            self._refuse_what_stands()
        # Steps that the store holds, if it is known to be this one's.
        self._written: int | None = None if self._folder.exists() else 0

    def append(self, tree: xr.DataTree) -> None:
        """Write the records of some more steps."""
        if not tree.sizes["step"]:
            return
        if self._written is None:
            raise UserError(
                f"{self._folder} holds records already: continue it with watcher.load_state_dict() of the checkpoint, "
                "or begin a new store without resume=True."
            )
        if self._written:
            self._require_own()
            _write(self._folder, tree, self._written)
        else:
            self._begin(tree)
        self._written += tree.sizes["step"]

    def _begin(self, tree: xr.DataTree) -> None:
        """Write the first steps beside the store's place and move them there: of several that begin at once, one succeeds."""
        self._refuse_what_stands()
        first = self._folder.with_name(f".{self._folder.name}.{secrets.token_hex(4)}.partial")
        try:
            _write(first, tree, 0)
            try:
                first.rename(self._folder)
            except OSError:
                self._refuse_what_stands()
                raise
        finally:
            shutil.rmtree(first, ignore_errors=True)

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` recorded steps, and drop what came after them."""
        if self._written == 0:  # what has come since is somebody else's
            self._refuse_what_stands()
        self._written = count
        if not self._folder.exists():
            if count:
                raise UserError(f"{self._folder} is missing, but {count} recorded steps should be in it.")
            return
        if not count:
            shutil.rmtree(self._folder)
            return
        for cut_off in self._folder.rglob("*.partial"):  # zarr's name for a file that it is writing
            cut_off.unlink()
        with without_consolidation_warning():
            # Consolidated metadata do not know an array that a write which was cut off had just begun.
            group = zarr.open_group(str(self._folder), mode="r+", use_consolidated=False)
            for path, array in _stored_arrays(group):
                if _grows(array):
                    if array.shape[0] < count:
                        raise UserError(
                            f"{self._folder} holds fewer steps ({array.shape[0]}) than {count} in '{path}'."
                        )
                    array.resize((count, *array.shape[1:]))
                    if kept := count % array.chunks[0]:
                        array[-kept:] = array[-kept:]  # writes the last chunk again, without what was dropped
            zarr.consolidate_metadata(str(self._folder))

    def finish(self, attributes: dict[str, Any], complete: bool) -> None:
        """Write the final attributes and, for a zip, pack the store."""
        if not self._written:
            return
        self._require_own()
        with without_consolidation_warning():
            zarr.open_group(str(self._folder), mode="r+").update_attributes(attributes)
            zarr.consolidate_metadata(str(self._folder))
        if self._packed and complete:
            pack(self._folder, self.path)
            shutil.rmtree(self._folder)

    def _refuse_what_stands(self) -> None:
        if self.path.exists():
            raise UserError(f"{self.path} exists already: choose another name for the store, or delete it first.")
        if self._folder.exists():
            raise UserError(
                f"{self._folder} holds the records of a training that has not ended: continue it with resume=True and "
                "watcher.load_state_dict(), choose another name for the store, or delete it first."
            )

    def _require_own(self) -> None:
        """Refuse to write where somebody else has written since; a packed store is unpacked to go on with it."""
        if self._packed and self.path.exists() and not self._folder.exists():
            with zipfile.ZipFile(self.path) as archive:
                archive.extractall(self._folder)
        if not self._folder.exists():
            raise UserError(f"{self._folder} is gone, in which this watcher wrote {self._written} steps: begin again.")
        with without_consolidation_warning():
            step: Any = zarr.open_group(str(self._folder), mode="r")["step"]
        if step.shape[0] != self._written:
            raise UserError(
                f"{self._folder} holds {step.shape[0]} steps instead of the {self._written} that this watcher wrote: another one "
                "writes to it, so give each watcher a store of its own."
            )

    def open(self) -> xr.DataTree:
        """Open what has been written."""
        if self._written == 0:  # what stands there is somebody else's
            self._refuse_what_stands()
        return open_trajectories(self._folder if self._folder.exists() else self.path)


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
    partial = Path(f"{path}.partial")
    if not Path(path).exists() and partial.exists():
        raise UserError(f"there are no trajectories at {path} yet, but unfinished ones at {partial}: open those.")
    if not Path(path).exists():
        raise UserError(
            f"there are no trajectories at {path}: check the name; a store that grows appears with its first "
            f"{STEPS_PER_CHUNK} recorded steps."
        )
    tree = open_store(path, "trajectories")
    if "layers" not in tree or "step" not in tree.coords:
        raise UserError(f"{path} is a store, but not one of trajectories: give one that a training wrote.")
    stored = {node.path: node.to_dataset(inherit=False) for node in tree.subtree}
    # A store lists nodes by name; the model's own order reads better.
    order = [f"/layers/{name}" for name in tree.attrs.get("layers", [])]
    paths = ["/", *(path for path in order if path in stored), *(path for path in stored if path not in order)]
    return xr.DataTree.from_dict({path: stored[path] for path in dict.fromkeys(paths)})


def add_training_curves(folder: str | os.PathLike[str], curves: dict[str, np.ndarray]) -> None:
    """Add a node ``training`` with one value per parameter update for each curve, such as the loss.

    Parameters
    ----------
    folder : path-like
        A directory store.
    curves : dict of str to ndarray, shape (updates,)
        ``update`` counts from 0.
    """
    shutil.rmtree(Path(folder) / "training", ignore_errors=True)  # even one whose writing was cut off
    with without_consolidation_warning():
        group = zarr.open_group(str(folder), mode="r+", use_consolidated=False)
        node = group.create_group("training")
        length = len(next(iter(curves.values())))
        for name, values in {"update": np.arange(length), **curves}.items():
            array = node.create_array(
                name, shape=values.shape, dtype=values.dtype, chunks=(max(1, length),), dimension_names=["update"]
            )
            array[:] = values
        zarr.consolidate_metadata(str(folder))


def add_attributes(folder: str | os.PathLike[str], attributes: dict[str, Any]) -> None:
    """Add attributes to the root of a directory store, or replace those of the same names."""
    with without_consolidation_warning():
        zarr.open_group(str(folder), mode="r+").update_attributes(attributes)
        zarr.consolidate_metadata(str(folder))


def _write(folder: Path, tree: xr.DataTree, before: int) -> None:
    """Write the records of the steps that follow so many; what describes them comes last."""
    after = before + tree.sizes["step"]
    with without_consolidation_warning():
        if not before:
            _create(folder, tree)
        group = zarr.open_group(str(folder), mode="r+", use_consolidated=False)
        written = set()
        for path, array in _arrays(tree):
            stored: Any = group[path] if path in group else _new_array(group, path, array, before)
            if "step" in array.dims:
                _write_steps(stored, array.values, before)
                written.add(path)
            elif array.name == "rank_limit":  # larger batches may have come
                stored[...] = array.values
            elif array.size > stored.size:
                stored.resize(array.shape)
                stored[...] = array.values
        for path, stored in _stored_arrays(group):
            if _grows(stored) and path not in written:  # nothing of it in these steps
                stored.resize((after, *stored.shape[1:]))
        zarr.consolidate_metadata(str(folder))


def _create(folder: Path, tree: xr.DataTree) -> None:
    """Create the arrays of a store, empty along ``step``, complete otherwise."""
    root = zarr.open_group(str(folder), mode="w", zarr_format=3, attributes=_plain(tree.attrs))
    for node in tree.subtree:
        if node.path != "/":
            root.require_group(node.path.lstrip("/"), overwrite=False).attrs.update(_plain(node.attrs))
    for path, array in _arrays(tree):
        _new_array(root, path, array)
    # xarray finds coordinates that are no dimensions by this attribute.
    auxiliary = [str(name) for name in tree.coords if name not in tree.dims]
    if auxiliary:
        for name in tree.data_vars:
            root[str(name)].attrs["coordinates"] = " ".join(auxiliary)


def _new_array(root: zarr.Group, path: str, array: xr.DataArray, steps: int = 0) -> zarr.Array:
    """Create an array, with nothing in so many steps; complete where it has none."""
    grows = "step" in array.dims
    text = array.dtype.kind in "TOU"
    chunks = (STEPS_PER_CHUNK, *array.shape[1:]) if grows else array.shape
    stored = root.create_array(
        path,
        shape=(steps, *array.shape[1:]) if grows else array.shape,
        dtype="string" if text else array.dtype,
        chunks=tuple(max(1, size) for size in chunks),
        fill_value=np.nan if array.dtype.kind == "f" else None,
        dimension_names=list(map(str, array.dims)),
        attributes=_plain(array.attrs),
    )
    if not grows:
        stored[...] = array.values.astype(object) if text else array.values
    return stored


def _write_steps(stored: zarr.Array, values: np.ndarray, before: int) -> None:
    """Write the steps that follow some, whose other sizes may be others: longer sequences may have come, or shorter ones."""
    sizes = tuple(max(sizes) for sizes in zip(stored.shape[1:], values.shape[1:], strict=True))
    after = before + len(values)
    if stored.shape != (after, *sizes):
        stored.resize((after, *sizes))
    if values.shape[1:] != sizes:
        values = np.pad(
            values,
            [(0, size - had) for size, had in zip((len(values), *sizes), values.shape, strict=True)],
            constant_values=np.nan,
        )
    stored[before:after] = values


def _grows(stored: zarr.Array) -> bool:
    return "step" in (getattr(stored.metadata, "dimension_names", None) or ())


def _arrays(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataArray]]:
    """Every array that a node holds itself, with its path."""
    for node in tree.subtree:
        dataset = node.to_dataset(inherit=False)
        for name, array in dataset.variables.items():
            yield f"{node.path}/{name}".lstrip("/"), xr.DataArray(array, name=str(name))


def _stored_arrays(group: zarr.Group) -> Iterator[tuple[str, zarr.Array]]:
    for path, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            yield path, member


def _plain(attributes: Any) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in attributes.items()}
