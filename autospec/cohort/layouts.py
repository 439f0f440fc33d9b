"""Which layout a folder has, and its subjects."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from autospec.cohort import bids, gift, niak, nitrc, table, trends
from autospec.cohort.files import existing, read_json, read_table
from autospec.cohort.subjects import CohortSettings, Subject
from autospec.errors import UserError

READERS: dict[str, Callable[[str, CohortSettings], list[Subject]]] = {
    "bids": bids.read_bids,
    "niak": niak.read_niak,
    "nitrc": nitrc.read_nitrc,
    "table": table.read_paths,
    "gift": gift.read_gift,
    "trends": trends.read_trends,
}
# How many folders above a file may hold the description that says whether it is simulated.
LEVELS = 5
DESCRIPTION = "dataset_description.json"


def recognise(folder: str, phenotypes: str | None = None) -> str:
    """Say which layout a folder has.

    Parameters
    ----------
    folder : str
        The folder of a cohort.
    phenotypes : str or None
        A table of participants that stands elsewhere.

    Returns
    -------
    str
        A name in `READERS`.

    Raises
    ------
    UserError
        If there is no such folder, or nothing in it is known.
    """
    if not Path(folder).is_dir():
        raise UserError(f"the cohort's folder {folder} does not exist: correct folder in the config.")
    names = os.listdir(folder)
    if trends.DATA in names:
        return "trends"
    if any(pattern.fullmatch(name) for name in names for pattern in (gift.TIMECOURSES, gift.SCALED, gift.UNSCALED)):
        return "gift"
    if "cobre_model_group.csv" in names or any(re.fullmatch(r"fmri_.+\.nii(\.gz)?", name) for name in names):
        return "niak"
    if nitrc.TABLE in names:
        return "nitrc"
    if phenotypes and not Path(phenotypes).is_file():
        raise UserError(f"the table {phenotypes} does not exist: correct phenotypes in the config.")
    tables = [phenotypes] if phenotypes else [str(Path(folder) / "participants.tsv")]
    if any(Path(each).is_file() and table.names_images(read_table(each).columns) for each in tables):
        return "table"
    if bids.derivatives_of(folder) or bids.holds_raw(folder):
        return "bids"
    if any(nitrc.SESSION.fullmatch(path.name) for path in Path(folder).glob("*/session_*")):
        raise UserError(f"{folder} looks like NITRC's layout, but has no {nitrc.TABLE}: copy it there from NITRC.")
    raise UserError(
        f"{folder} has no layout that is known: it holds neither fMRIPrep's *_desc-preproc_bold.nii.gz, nor NIAK's "
        f"fmri_*.nii.gz, nor {nitrc.TABLE}, nor a participants.tsv with a column bold, nor results of GIFT, "
        f"nor {trends.DATA}.{_other_table(names, phenotypes)}"
    )


def _other_table(names: Collection[str], phenotypes: str | None) -> str:
    """What to do with a table of another name."""
    found = sorted(name for name in names if re.fullmatch(r"participants\.(csv|txt|xlsx?)", name))
    return f" It holds {found[0]}: name it under phenotypes." if found and not phenotypes else ""


def read_layout(folder: str, settings: CohortSettings) -> tuple[str, list[Subject]]:
    """Read a cohort's folder, whatever its layout.

    Returns
    -------
    layout : str
        Its name.
    subjects : list of Subject
        Whoever the folder or its table knows.

    Raises
    ------
    UserError
        If the layout is not known or its files do not fit each other.
    """
    layout = recognise(folder, settings["phenotypes"]) if settings["layout"] == "auto" else settings["layout"]
    if not Path(folder).is_dir():
        raise UserError(f"the cohort's folder {folder} does not exist: correct folder in the config.")
    return layout, READERS[layout](folder, settings)


def description_of(path: str | Path) -> str:
    """The nearest ``dataset_description.json`` at or above a path; empty where there is none."""
    place = Path(path).absolute()
    return existing(*(folder / DESCRIPTION for folder in (place, *place.parents)[: LEVELS + 1]))


def is_simulated(path: str | Path) -> bool:
    """Whether the nearest description of a data set at or above a path calls it simulated."""
    description = description_of(path)
    return bool(description) and read_json(description).get("Simulated") is True
