"""A plain table of paths: ``participants.tsv`` with a column ``bold``."""

from __future__ import annotations

from pathlib import Path

from autospec.cohort.files import existing, file_problem, natural_key
from autospec.cohort.phenotypes import read_phenotypes
from autospec.cohort.subjects import MISSING, CohortSettings, Done, Scan, Subject
from autospec.errors import UserError


def read_paths(folder: str, settings: CohortSettings) -> list[Subject]:
    """Read a table of paths.

    Parameters
    ----------
    folder : str
        The folder with ``participants.tsv``; relative paths in the table start there.
    settings : CohortSettings
        Names of columns, and another table if wanted.

    Returns
    -------
    list of Subject
        One a row; a row whose ``bold`` is ``n/a`` has no image.

    Raises
    ------
    UserError
        If the table cannot be read or has no column ``bold``.
    """
    path = settings["phenotypes"] or str(Path(folder) / "participants.tsv")
    table = read_phenotypes(path, settings["columns"].get("id"))
    if "bold" not in table.columns:
        raise UserError(f"{path} has no column 'bold': add one with the path of each participant's 4-D image.")
    subjects = []
    for name, row in table.rows.items():
        bold, confounds = (_path(folder, row.get(column, "")) for column in ("bold", "confounds"))
        scan = Scan(bold=bold, confounds=confounds, sidecar=existing(_beside(bold)) if bold else "")
        problem = file_problem(bold) if bold else ""
        if confounds and not problem:
            problem = file_problem(confounds)
        subjects.append(Subject(name, row, (scan,) if bold else (), Done(), problem, path))
    return sorted(subjects, key=lambda subject: natural_key(subject.id))


def _path(folder: str, cell: str) -> str:
    return "" if cell in ("", MISSING) else str(Path(folder) / cell)


def _beside(image: str) -> str:
    return image.removesuffix(".gz").removesuffix(".nii") + ".json"
