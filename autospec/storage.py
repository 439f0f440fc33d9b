"""Zarr stores in one file: packing reproducibly, opening, and never a half-written file at a final path."""

from __future__ import annotations

import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autospec.errors import UserError

# xarray and zarr are loaded where they are used: most jobs need this module for `written_whole` alone.
if TYPE_CHECKING:
    import xarray as xr

ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@contextmanager
def written_whole(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside the target; move it into place if the block succeeds.

    Parameters
    ----------
    target : path-like
        Where the file shall stand.  It appears whole or not at all.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def pack(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Pack a directory store into a zip file with sorted names and one fixed date.

    Parameters
    ----------
    folder : path-like
        The directory store; it is left as it is.
    target : path-like
        The zip file.  The same content gives the same bytes.
    """
    folder = Path(folder)
    with written_whole(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), date_time=ZIP_DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes())


def write_packed(tree: xr.DataTree, target: str | os.PathLike[str]) -> None:
    """Write a tree as one zip file, reproducibly; it appears whole or not at all."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(target).parent, prefix=".packing-") as folder:
        with without_consolidation_warning():
            tree.to_zarr(Path(folder) / "store", zarr_format=3, consolidated=True)
        pack(Path(folder) / "store", target)


def open_store(path: str | os.PathLike[str], what: str) -> xr.DataTree:
    """Open a zarr folder or zip file, in memory.

    Parameters
    ----------
    path : path-like
        A ``.zarr`` folder, which may still be growing, or a ``.zarr.zip`` file.
    what : str
        What it should hold, for the error message.

    Raises
    ------
    UserError
        If there is no such store, or it cannot be read.
    """
    import xarray as xr
    import zarr

    path = Path(path)
    if not path.exists():
        raise UserError(f"there are no {what} at {path}: check the name.")
    try:
        if path.is_dir():
            with xr.open_datatree(path, engine="zarr") as tree:
                return tree.load()
        zipfile.ZipFile(path).close()  # zarr's own complaint about a damaged file names no file
        with zarr.storage.ZipStore(path, mode="r") as store, xr.open_datatree(store, engine="zarr") as tree:
            return tree.load()
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a readable store of {what} ({error}): make it again.") from error


@contextmanager
def without_consolidation_warning() -> Iterator[None]:
    """Silence zarr's remark that consolidated metadata are not in the third format's specification."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        yield
