"""A subject's folder as a BIDS derivative: names, tables with JSON files beside them, and all of it or nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from autospec.errors import UserError
from autospec.ica.images import write_image
from autospec.ica.template import STAND_IN_KIND, Template

STATUS = "status.json"


def check_subject(subject: str) -> None:
    """Raise UserError if an id cannot be part of a path."""
    if not re.fullmatch(r"[A-Za-z0-9]+([._+-][A-Za-z0-9]+)*", subject):
        raise UserError(
            f"'{subject}' cannot be a subject's id: use letters and digits, with single . _ + or - between them."
        )


def subject_files(subject: str) -> dict[str, str]:
    """Names of the files in an included subject's folder, the JSON files beside tables and images left out."""
    start = f"sub-{subject}_desc"
    return {
        "maps": f"{start}-scica_components.nii.gz",
        "mask": f"{start}-covered_mask.nii.gz",
        "timecourses": f"{start}-scica_timeseries.tsv",
        "cleaned": f"{start}-cleaned_timeseries.tsv",
        "connectivity": f"{start}-fnc_relmat.tsv",
        "quality": f"{start}-scica_qc.json",
        "picture": f"{start}-scica_qc.png",
        "status": STATUS,
    }


@contextmanager
def folder_written_whole(target: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside the target; move it into place if the block succeeds.

    Parameters
    ----------
    target : path-like
        Where the folder shall stand.  It appears whole or not at all; one that stands there is replaced then.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = (target.with_name(f".{target.name}.{word}") for word in ("partial", "replaced"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON with sorted keys; a number that is not finite becomes null."""
    path.write_text(json.dumps(_plain(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_included(folder: Path, subject: str, volumes: int, digest: str) -> None:
    """Say that a subject is included, how many volumes were used, and what its files were, as a digest."""
    write_json({"subject": subject, "status": "included", "volumes": volumes, "digest": digest}, folder / STATUS)


def write_excluded(folder: Path, subject: str, reason: str) -> None:
    """Say that a subject is excluded and why, and nothing else: whatever stands in the folder is removed."""
    shutil.rmtree(folder)
    folder.mkdir()
    write_json({"subject": subject, "status": "excluded", "reason": reason}, folder / STATUS)


def write_table(values: np.ndarray, labels: Sequence[str], path: Path, content: dict[str, Any]) -> None:
    """Write a tab-separated table, one column a label, and the JSON file that explains it.

    Parameters
    ----------
    values : ndarray, shape (rows, labels)
    labels : sequence of str
    path : Path
        Ends in ``.tsv``.
    content : dict
        Of the JSON file.
    """
    table = pd.DataFrame(values, columns=list(labels))
    table.to_csv(path, sep="\t", index=False, float_format="%.8g", na_rep="n/a", lineterminator="\n")
    write_json(content, path.with_suffix(".json"))


def write_square(values: np.ndarray, labels: Sequence[str], path: Path, content: dict[str, Any]) -> None:
    """Write a matrix with labels in its first row and its first column, and the JSON file that explains it."""
    table = pd.DataFrame(values, columns=list(labels), index=pd.Index(list(labels), name="network"))
    table.to_csv(path, sep="\t", float_format="%.8g", na_rep="n/a", lineterminator="\n")
    write_json(content, path.with_suffix(".json"))


def read_table(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """Read what `write_table` wrote: values (rows, columns) and labels; raises UserError if it cannot be read."""
    try:
        table = pd.read_csv(path, sep="\t", na_values=["n/a"], keep_default_na=False)
        return table.to_numpy(dtype=np.float64), [str(label) for label in table.columns]
    except (OSError, ValueError) as error:
        raise UserError(f"the table {path} cannot be read ({' '.join(str(error).split())}): make it again.") from None


def on_voxels(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Put values of a mask's voxels back into space: (networks, voxels) becomes float32 (X, Y, Z, networks)."""
    volume = np.zeros((*mask.shape, len(values)), dtype=np.float32)
    volume[mask] = values.T
    return volume


def network_records(template: Template) -> list[dict[str, Any]]:
    """What is known of each network, for JSON files."""
    return [
        {"Number": n.number, "Label": n.label, "Region": n.region or None, "Domain": n.domain or None}
        for n in template.networks
    ]


def template_record(template: Template) -> dict[str, Any]:
    """What a template is, for JSON files; outputs of the stand-in say so."""
    record: dict[str, Any] = {
        "Kind": template.kind,
        "Source": template.source,
        "SHA256OfGridAffineAndValues": template.digest,
        "Networks": len(template.networks),
    }
    if template.kind == STAND_IN_KIND:
        record["Note"] = "Made with the stand-in template: not NeuroMark 1.0, and not for conclusions about brains."
    return record


def note_on_data(simulated: bool, template_kind: str | None) -> str:
    """What a picture must say of its data: that they are simulated, or that the template is the stand-in."""
    said = ["simulated data"] * simulated
    if template_kind == STAND_IN_KIND:
        said.append("stand-in template, not NeuroMark 1.0")
    words = f"{', '.join(said)}: not for conclusions about brains"
    return words[0].upper() + words[1:] if said else ""


def write_gift_files(
    folder: Path, number: int, maps: np.ndarray, mask: np.ndarray, affine: np.ndarray, timecourses: np.ndarray
) -> None:
    """Write maps, time courses and mask under the names that GIFT gives them.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    number : int
        The subject's, from 1.
    maps : ndarray, shape (networks, voxels)
    mask, affine : ndarray of bool (X, Y, Z), ndarray (4, 4)
    timecourses : ndarray, shape (volumes, networks)
    """
    folder.mkdir(exist_ok=True)
    write_image(on_voxels(maps, mask), affine, folder / f"autospec_sub{number:03d}_component_ica_s1_.nii")
    courses = nib.Nifti1Image(np.asarray(timecourses, dtype=np.float32), np.eye(4))
    nib.save(courses, folder / f"autospec_sub{number:03d}_timecourses_ica_s1_.nii")
    write_image(mask, affine, folder / "autospecMask.nii")


def _plain(value: Any) -> Any:
    """Python's own types instead of NumPy's, and numbers of 8 digits."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value
