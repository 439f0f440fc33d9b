"""TReNDS' COBRE: time courses of 157 subjects in one HDF5 file, with one-based numbers of the components to keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autospec.cohort.bids import join
from autospec.cohort.files import existing, file_problem, read_table
from autospec.cohort.phenotypes import Person, Phenotypes, describe, read_phenotypes
from autospec.cohort.subjects import CohortSettings, Done, Scan, Subject, are_row_numbers
from autospec.errors import UserError

if TYPE_CHECKING:
    import numpy as np

DATA, LABELS, INDICES = "COBRE_AllData.h5", "labels_COBRE.csv", "correct_indices_GSP.csv"
DATASET = "COBRE_dataset"
COMPONENTS = 100
WORDS = {1: "Control", 2: "Patient"}
GROUPS = {1: "HC", 2: "SZ"}


def read_trends(folder: str, settings: CohortSettings) -> list[Subject]:
    """Read who is in the file.

    Parameters
    ----------
    folder : str
        The folder with the HDF5 file and the two tables, or these in ``IndicesAndLabels``.
    settings : CohortSettings
        Another table of participants if wanted, one row a subject in the file's order.

    Returns
    -------
    list of Subject
        Ids are their places in the file, from ``001``, unless a table brings ids.

    Raises
    ------
    UserError
        If a file is missing, a label is neither 1 (control) nor 2 (patient), there is not one label a subject, or a
        table of participants contradicts the labels.
    """
    data = str(Path(folder) / DATA)
    labels = whole_numbers(_beside(folder, LABELS))
    if unknown := sorted(set(labels) - set(WORDS)):
        raise UserError(f"{_beside(folder, LABELS)} holds the labels {unknown}: 1 (control) and 2 (patient) are known.")
    if (subjects := _subjects_in(data)) not in (None, len(labels)):
        raise UserError(
            f"{_beside(folder, LABELS)} has {len(labels)} labels, but {data} holds {subjects} subjects: "
            "give one label a subject, in the file's order."
        )
    if settings["phenotypes"]:
        table = read_phenotypes(settings["phenotypes"], settings["columns"].get("id"))
        if len(table.rows) != len(labels):
            raise UserError(
                f"{table.path} has {len(table.rows)} rows, but {LABELS} has {len(labels)} labels: "
                "give one row a subject, in the file's order."
            )
        _require_agreement(table, labels, settings)
    else:
        rows = {f"{i:03d}": {"Subject Type": WORDS[label]} for i, label in enumerate(labels, start=1)}
        table = Phenotypes(_beside(folder, LABELS), ["Subject Type"], rows)
    indices = _beside(folder, INDICES)
    scans: dict[str, tuple[Scan, ...]] = {
        name: (Scan(timecourses=data, components=indices, position=position),)
        for position, name in enumerate(table.rows)
    }
    # The release keeps 140 of the 150 volumes and says nothing else of what was done.
    return join(scans, dict.fromkeys(scans, file_problem(data)), table, Done(repetition_time=2.0))


def _beside(folder: str, name: str) -> str:
    path = existing(Path(folder) / name, Path(folder) / "IndicesAndLabels" / name)
    if not path:
        raise UserError(f"{folder} has no {name}: copy it beside {DATA}, from where that came from.")
    return path


def _require_agreement(table: Phenotypes, labels: list[int], settings: CohortSettings) -> None:
    """Refuse a table whose diagnoses are not those of the labels: its rows are in another order."""
    for (name, row), label in zip(table.rows.items(), labels, strict=True):
        person = describe(row, settings, f"the row of {name} in {table.path}")
        if isinstance(person, Person) and person.diagnosis in GROUPS.values() and person.diagnosis != GROUPS[label]:
            raise UserError(
                f"{table.path} says {person.diagnosis} of {name}, but its label in {LABELS} is {label} "
                f"({WORDS[label].lower()}): give one row a subject, in the file's order."
            )


def _subjects_in(data: str) -> int | None:
    """How many subjects the HDF5 file holds; None where it cannot be opened, which `shape_of` explains."""
    import h5py

    if file_problem(data):
        return None
    try:
        with h5py.File(data, "r") as file:
            return int(file[DATASET].shape[0])
    except (OSError, KeyError, AttributeError, IndexError):
        return None


def whole_numbers(path: str) -> list[int]:
    """Read a table of whole numbers, in a row or a column, with or without a header; raises UserError if it is none.

    Numbers of rows, as R and pandas write them into a first column without a name, are left out.
    """
    table = read_table(path)
    lines = table.rows
    if table.columns[0] == "" and are_row_numbers([row[0] for row in lines]):
        lines = [row[1:] for row in lines]
    elif all(_is_whole(cell) for cell in table.columns if cell):
        lines = [[cell for cell in table.columns if cell], *lines]
    if len(lines) > 1 and max(map(len, lines)) > 1:
        raise UserError(f"{path} has several rows and columns: keep the one column, or row, of whole numbers.")
    cells = [cell for line in lines for cell in line]
    if not cells or not all(_is_whole(cell) for cell in cells):
        raise UserError(f"{path} should hold whole numbers only: is it the right file?")
    return [int(float(cell)) for cell in cells]


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def read_timecourses(data: str, components: str, position: int) -> np.ndarray:
    """Read one subject's time courses.

    Parameters
    ----------
    data : str
        The HDF5 file: subject x (component x time).
    components : str
        Table of the components to keep, counted from ONE.
    position : int
        The subject's place, counted from zero.

    Returns
    -------
    ndarray, shape (time, networks)

    Raises
    ------
    UserError
        If the file holds no such data set, or the components do not fit it.
    """
    import h5py

    shape_of(data, components, position)
    numbers = whole_numbers(components)
    with h5py.File(data, "r") as file:
        values = file[DATASET][position]
    rows = values.reshape(COMPONENTS, -1) if values.ndim == 1 else values
    return rows[[number - 1 for number in numbers]].T


def shape_of(data: str, components: str, position: int) -> tuple[int, int]:
    """Say how many time points and networks a subject's results have, without reading them.

    Parameters and errors are those of `read_timecourses`.
    """
    import h5py

    if problem := file_problem(data):
        raise UserError(f"{problem}.")
    numbers = whole_numbers(components)
    try:
        with h5py.File(data, "r") as file:
            names = sorted(file)
            array = file.get(DATASET)
            shape: tuple[int, ...] = getattr(array, "shape", ())
    except OSError:
        raise UserError(f"{data} is no HDF5 file, or is cut short: copy it again.") from None
    if DATASET not in names:
        raise UserError(f"{data} holds no '{DATASET}', only {names}: is it TReNDS' file?")
    if len(shape) not in (2, 3) or position >= shape[0]:
        raise UserError(f"{data} holds an array of shape {shape}, which has no subject {position + 1}.")
    if len(shape) == 2 and shape[1] % COMPONENTS:
        raise UserError(f"{data} cannot be divided into {COMPONENTS} components: is it TReNDS' file?")
    rows, time = (COMPONENTS, shape[1] // COMPONENTS) if len(shape) == 2 else shape[1:]
    if min(numbers) < 1 or max(numbers) > rows:
        raise UserError(
            f"{components} names components {min(numbers)} to {max(numbers)}, but they are counted from 1 to {rows}."
        )
    return time, len(numbers)
