"""What the readers of layouts hand over, and the settings that they read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from autospec.errors import UserError

MISSING = "n/a"
# What says, in small letters, that nothing is known.
NOT_KNOWN = ("", MISSING, "na", "nan", "unknown")
# Names of a table's column of ids, in small letters; the first that a table has is taken.
ID_COLUMNS = ("participant_id", "subject_id", "subjectid", "subject", "id", "subjid", "src_subject_id")


class CohortSettings(TypedDict):
    """What this stage reads from the configuration."""

    folder: str
    layout: Literal["auto", "bids", "niak", "nitrc", "table", "gift", "trends"]
    phenotypes: str | None
    """A table of participants instead of the one that the layout brings."""
    columns: dict[str, str]
    """Names of the columns `id`, `diagnosis`, `code`, `sex`, `age` and `site` where they are not the usual ones."""
    diagnosis: Literal["strict schizophrenia", "Patient as labelled"]
    labels: dict[str, str]
    """The group of each word in the column of diagnoses, instead of the usual vocabulary."""
    sex_labels: dict[str, str]
    """Sex of each code in the column of sexes, such as 1: M, where the column holds numbers."""
    groupings: list[str]
    """Further columns of the table by which participants are grouped."""
    task: str | None
    session: str | None
    run: str | None
    space: str | None
    entities: dict[str, str]
    """Further parts of BIDS file names that an image must have, such as acq: eyesopen."""
    scans: Literal["one", "first", "all"]
    """Which images of a subject to take where several fit; `one` makes several a mistake, `all` a sample of each."""
    freesurfer: list[str]
    """SUBJECTS_DIR, or tables of volumes: the structural half.  ["auto"] looks in the usual places; empty for none."""
    max_mean_fd: float | None
    """Largest mean framewise displacement, in mm."""
    min_volumes: int | None
    """Smallest number of usable volumes."""
    on_bad_subject: Literal["fail", "exclude"]


@dataclass(frozen=True)
class Done:
    """What was done to the data before they came here; None where it is not known."""

    smoothing_mm: float | None = None
    """Full width at half maximum of the kernel; 0 where the data are not smoothed."""
    confounds: str | None = None
    """What was regressed out or removed; "none" where nothing was."""
    space: str | None = None
    repetition_time: float | None = None
    """Seconds."""

    @property
    def record(self) -> dict[str, float | str]:
        """What is known, under the names that a subject's own job reads."""
        known = {"smoothing_fwhm_mm": self.smoothing_mm, "confounds": self.confounds}
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class Scan:
    """One functional run: its image, or what was already computed from it."""

    bold: str = ""
    """The 4-D image."""
    confounds: str = ""
    """Its table of confounds."""
    sidecar: str = ""
    """The JSON file that describes the image."""
    timecourses: str = ""
    """Time courses that were already computed."""
    maps: str = ""
    """Maps that were already computed."""
    mask: str = ""
    """The mask whose voxels the maps list, where they are no image themselves."""
    components: str = ""
    """Table of the components to keep, counted from one."""
    position: int = 0
    """Place of the subject in a file that holds several, counted from zero."""
    task: str = ""
    session: str = ""
    run: str = ""
    space: str = ""
    label: str = ""
    """What tells it from others of its subject, such as ses-1_run-2; empty unless all of a subject are taken."""
    row: dict[str, str] = field(default_factory=dict, hash=False)
    """Its own row of the table of participants, where that has a row for each image."""

    @property
    def file(self) -> str:
        """The file that holds the run."""
        return self.bold or self.timecourses


@dataclass(frozen=True)
class Subject:
    """What a layout holds of one subject."""

    id: str
    phenotype: dict[str, str] | None = None
    """The subject's row of the table, as text; None where it has none."""
    scans: tuple[Scan, ...] = ()
    done: Done = field(default_factory=Done)
    problem: str = ""
    """Why its images cannot be used, in words."""
    table: str = ""
    """The file of the table in which it was looked for."""


def known(cell: str) -> str:
    """A cell of a table as it is, or ``n/a`` where it says that nothing is known."""
    return MISSING if cell.lower() in NOT_KNOWN else cell


def is_asked_for(found: str | None, wanted: str | None) -> bool:
    """Whether a session or a run is the one that is asked for, if one is; 01 is 1."""
    if wanted is None or found == wanted:
        return True
    return found is not None and found.isdecimal() and wanted.isdecimal() and int(found) == int(wanted)


def checked_id(text: str, source: str) -> str:
    """Id of a subject without the mark of BIDS.

    Parameters
    ----------
    text : str
        The id as it was found, such as ``sub-0040000`` or ``0040000``; zeros are kept.
    source : str
        Where it was found, for the error message.

    Raises
    ------
    UserError
        If it could not name a folder safely.
    """
    name = re.sub("^sub-", "", text.strip(), flags=re.IGNORECASE)
    if not re.fullmatch(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*", name):
        raise UserError(
            f"the id '{text}' in {source} cannot name a folder: "
            "make ids of letters and digits, joined by single - or _ if need be."
        )
    return name


def are_row_numbers(cells: list[str]) -> bool:
    """Whether cells look like numbers of rows and not like ids, as R and pandas write them into a first column.

    They are whole numbers without zeros in front, each another one, and begin within the table's own length; rows that
    were sorted or left out keep their numbers.
    """
    numbers = {int(cell) for cell in cells if cell.isdecimal() and cell == str(int(cell))}
    return len(numbers) == len(cells) and bool(cells) and min(numbers) <= len(cells)
