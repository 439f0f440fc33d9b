"""The cohort's tables as those read them that come after: participants, their labels, and the record of the cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from autospec.cohort.files import read_json, read_table
from autospec.cohort.subjects import MISSING
from autospec.errors import UserError

Kind = Literal["real", "simulated"]
TABLE, DICTIONARY, SCANS, EXCLUSIONS, RECORD = (
    *("participants.tsv", "participants.json", "scans.tsv", "exclusions.tsv", "cohort.json"),
)
# Columns of the table, before and after those by which a study groups its participants besides.
FIRST_COLUMNS = ("participant_id", "diagnosis", "sex", "diagnosis_sex", "age", "site")
LAST_COLUMNS = (
    *("functional", "structural", "mean_fd", "volumes", "usable_volumes", "bold", "confounds", "freesurfer"),
    *("functional_digest", "structural_digest"),
)
SCAN_COLUMNS = (
    *("participant_id", "scan_id", "task", "session", "run", "space", "mean_fd", "volumes", "usable_volumes"),
    *("bold", "confounds", "digest"),
)
NO_GROUPINGS = {"id", "participant_id", "age", *LAST_COLUMNS}


def require_kind(folder: str, kind: Kind) -> None:
    """Refuse to put a cohort where one of another kind was.

    Parameters
    ----------
    folder : str
        The folder of the cohort's tables.
    kind : {"real", "simulated"}
        What is to be put there.

    Raises
    ------
    UserError
        If its record says otherwise.
    """
    record = Path(folder) / RECORD
    if record.is_file() and (before := read_json(record).get("kind")) != kind:
        raise UserError(
            f"{folder} holds results of a {before} cohort, and this one is {kind}: "
            "use another analysis folder, or remove its results."
        )


def read_record(folder: str) -> dict[str, Any]:
    """Kind, layout, digest and counts of the cohort in a folder; raises UserError if there is none."""
    return read_json(Path(folder) / RECORD)


def read_participants(path: str) -> list[dict[str, str]]:
    """Read a table that `build_cohort` wrote: one mapping of text a participant, with its ``id`` without ``sub-``."""
    table = read_table(path)
    if "participant_id" not in table.columns:
        raise UserError(f"{path} has no column participant_id: give a table that autospec cohort wrote.")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    return [{**row, "id": row["participant_id"].removeprefix("sub-")} for row in rows]


def read_scans(participants: str) -> list[dict[str, str]]:
    """Read the functional images that are used, from the table beside the participants'.

    Parameters
    ----------
    participants : str
        The table ``participants.tsv`` that `build_cohort` wrote.

    Returns
    -------
    list of dict
        One mapping of text an image, with its ``id``, which is the name of its results, and its ``subject``.

    Raises
    ------
    UserError
        If there is no such table.
    """
    table = read_table(str(Path(participants).with_name(SCANS)))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    return [
        {**row, "id": row["scan_id"].removeprefix("sub-"), "subject": row["participant_id"].removeprefix("sub-")}
        for row in rows
    ]


def groupings_of(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    """Labels of each grouping, one a participant: diagnosis, sex, both together, the site if known, and further columns."""
    names = [name for name in rows[0] if name not in NO_GROUPINGS]
    grouped = {name: [row[name] for row in rows] for name in names}
    return {name: labels for name, labels in grouped.items() if name != "site" or set(labels) != {MISSING}}
