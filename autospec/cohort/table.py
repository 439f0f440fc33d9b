"""A plain table of paths: ``participants.tsv`` with a column ``bold``, a row a participant or a row an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autospec.cohort.bids import entities_of
from autospec.cohort.files import existing, file_problem, listed, natural_key
from autospec.cohort.phenotypes import Person, describe, read_rows, united
from autospec.cohort.subjects import MISSING, CohortSettings, Done, Scan, Subject, is_asked_for, known
from autospec.errors import UserError

# Columns that say which image a row is of; without them the image's name is asked, where it is one of BIDS.
OF_IMAGES = {"task": ("task", "task_id"), "ses": ("session", "session_id", "ses"), "run": ("run", "run_id")}


def read_paths(folder: str, settings: CohortSettings) -> list[Subject]:
    """Read a table of paths.

    Parameters
    ----------
    folder : str
        The folder with ``participants.tsv``; relative paths in the table start there.
    settings : CohortSettings
        Names of columns, which images, and another table if wanted.

    Returns
    -------
    list of Subject
        One an id; a row whose ``bold`` is ``n/a`` has no image.

    Raises
    ------
    UserError
        If the table cannot be read or has no column ``bold``; if rows of one id contradict each other, or name several
        images and no rule chooses.
    """
    path = settings["phenotypes"] or existing(Path(folder) / "participants.tsv")
    if not path:
        raise UserError(f"{folder} has no participants.tsv: put one there, or name a table under phenotypes.")
    columns, by_id = read_rows(path, settings["columns"].get("id"))
    if not names_images(columns):
        raise UserError(f"{path} has no column 'bold': add one with the path of each participant's 4-D image.")
    subjects = []
    for name, rows in by_id.items():
        if len(rows) > 1:
            _require_agreement(name, rows, settings, path)
        scans, problem = _choose(name, [_scan(folder, row, len(rows) > 1) for row in rows], settings, path)
        files = [file for scan in scans for file in (scan.bold, scan.confounds) if file]
        problem = problem or next(filter(None, map(file_problem, files)), "")
        subjects.append(Subject(name, rows[0], scans, Done(), problem, path))
    return sorted(subjects, key=lambda subject: natural_key(subject.id))


def names_images(columns: list[str]) -> bool:
    """Whether a table has a column of images."""
    return "bold" in [column.lower() for column in columns]


def _scan(folder: str, row: dict[str, str], several: bool) -> Scan:
    """The image of a row, with what is known of which one it is."""
    small = {column.lower(): cell for column, cell in reversed(row.items())}
    bold, confounds = (_path(folder, small.get(column, "")) for column in ("bold", "confounds"))
    entities = entities_of(Path(bold).name)
    for entity, names in OF_IMAGES.items():
        cell = next((small[name] for name in names if known(small.get(name, "")) != MISSING), "")
        if cell:
            entities[entity] = cell.removeprefix(f"{entity}-")
    return Scan(
        bold=bold,
        confounds=confounds,
        sidecar=existing(_beside(bold)) if bold else "",
        task=entities.get("task", ""),
        session=entities.get("ses", ""),
        run=entities.get("run", ""),
        row=row if several else {},
    )


def _choose(name: str, scans: list[Scan], settings: CohortSettings, path: str) -> tuple[tuple[Scan, ...], str]:
    """Images that the settings ask for, in the table's order, or why there are none."""
    images = [scan for scan in scans if scan.bold]
    if len({scan.bold for scan in images}) < len(images):
        raise UserError(f"{path} has several rows for {name} with the same image: keep one row for each image.")
    wanted = {what: value for what in ("task", "session", "run") if (value := settings[what]) is not None}
    kept = [scan for scan in images if all(is_asked_for(getattr(scan, what), value) for what, value in wanted.items())]
    if images and not kept:
        asked = listed([f"{what} {value}" for what, value in wanted.items()])
        return (), f"none of its images has {asked} (a column of that name, or the image's name, says so)"
    if len(kept) > 1 and settings["scans"] == "one":
        raise UserError(
            f"{path} has several rows for {name}: {listed([Path(scan.bold).name for scan in kept])}; choose with task, "
            "session or run, set scans to first or all, or keep one row."
        )
    return tuple(kept[:1] if settings["scans"] == "first" else kept), ""


def _require_agreement(name: str, rows: list[dict[str, str]], settings: CohortSettings, path: str) -> None:
    """Refuse rows of one participant that make different people of it; ages may differ from session to session."""
    described = [describe(row, settings, path) for row in rows]
    people, _ = united([replace(each, age="") for each in described if isinstance(each, Person)])
    alike = {repr(each) for each in [*people, *(each for each in described if not isinstance(each, Person))]}
    if len(alike) > 1:
        raise UserError(
            f"the rows for {name} in {path} contradict each other in diagnosis, sex, site or a grouping: "
            "write the same in each of them."
        )


def _path(folder: str, cell: str) -> str:
    return "" if known(cell) == MISSING else str(Path(folder) / cell)


def _beside(image: str) -> str:
    return image.removesuffix(".gz").removesuffix(".nii") + ".json"
