"""How much a participant moved, from tables of confounds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from autospec.cohort.displacement import DISPLACEMENT, PARAMETERS, displacement_of
from autospec.cohort.files import TextTable, read_table
from autospec.cohort.subjects import MISSING, known
from autospec.errors import UserError

# fMRIPrep marks each volume to leave out with a column of its own; NIAK marks all of them in one.
MARKS = re.compile(r"(motion_outlier|non_steady_state_outlier)\d+|scrub")
# What stands for no number beside what is not known anywhere.
NO_NUMBER = ("-", ".", "none", "null", "missing")
# Columns of tables of participants, in small letters.
OF_PHENOTYPES = {"mean_fd": ("fd", "mean_fd"), "usable_volumes": ("frames ok",)}


@dataclass(frozen=True)
class Motion:
    """What is known of motion; None where it is not."""

    mean_fd: float | None = None
    """Mean framewise displacement, mm."""
    volumes: int | None = None
    usable_volumes: int | None = None
    """Volumes that are used and that no column marks as an outlier."""

    def of_used(self, volumes: int) -> Motion:
        """The same where no more than so many volumes are used."""
        return self if self.usable_volumes is None else replace(self, usable_volumes=min(self.usable_volumes, volumes))


def motion_of_table(table: TextTable, drop_volumes: int = 0) -> Motion:
    """Sum up a table of confounds.

    Parameters
    ----------
    table : TextTable
        One row a volume, as fMRIPrep or NIAK writes them.
    drop_volumes : int
        How many at the start are left out, and neither moved nor are usable.

    Raises
    ------
    UserError
        If a displacement, a parameter of motion or a mark is no number.
    """
    places = {name: place for place, name in enumerate(table.columns)}
    try:
        read = {
            name: np.array([_number(row[places[name]]) for row in table.rows])
            for name in (*DISPLACEMENT, *PARAMETERS)
            if name in places
        }
        marks = [i for i, name in enumerate(table.columns) if MARKS.fullmatch(name)]
        usable = sum(not any(float(row[i]) for i in marks) for row in table.rows[drop_volumes:])
    except ValueError as error:
        raise UserError(f"the table of confounds {table.path} holds a cell that is no number ({error}).") from None
    found = displacement_of(read)
    displacement = np.array([]) if found is None else found[0][drop_volumes:]
    return Motion(
        mean_fd=None if np.isnan(displacement).all() else float(np.nanmean(displacement)),
        volumes=len(table.rows),
        usable_volumes=usable,
    )


def _number(cell: str) -> float:
    return math.nan if known(cell) == MISSING else float(cell)


def motion_of(
    confounds: list[str],
    phenotype: Mapping[str, str] | None,
    source: str = "the table of participants",
    drop_volumes: int = 0,
) -> Motion:
    """Motion over a participant's runs: from tables of confounds, else from the table of participants.

    Parameters
    ----------
    confounds : list of str
        Tables, one a run.
    phenotype : mapping or None
        The participant's row, whose ``FD`` and ``Frames OK`` are taken where there are no tables.
    source : str
        Where the row stands, for error messages.
    drop_volumes : int
        How many volumes at the start of each run are left out.

    Raises
    ------
    UserError
        If one of them is no number.
    """
    tables = [motion_of_table(read_table(path), drop_volumes) for path in confounds]
    return together(tables) if tables else _of_phenotype(phenotype or {}, source)


def together(runs: list[Motion]) -> Motion:
    """Motion over several runs, each counted by its volumes, or all alike where somebody's volumes are not known."""
    known = [(each.mean_fd, each.volumes or each.usable_volumes) for each in runs if each.mean_fd is not None]
    weights = [volumes or 0 for _, volumes in known] if all(volumes for _, volumes in known) else [1] * len(known)
    total = sum(weights)
    volumes, usable = ([getattr(each, what) for each in runs] for what in ("volumes", "usable_volumes"))
    return Motion(
        mean_fd=sum((mean or 0.0) * w for (mean, _), w in zip(known, weights, strict=True)) / total if total else None,
        volumes=None if None in volumes else sum(volumes),
        usable_volumes=None if None in usable else sum(usable),
    )


def _of_phenotype(phenotype: Mapping[str, str], source: str) -> Motion:
    small = {column.lower(): column for column in reversed(list(phenotype))}
    values: dict[str, float | None] = {}
    for what, names in OF_PHENOTYPES.items():
        column = next((small[name] for name in names if name in small), None)
        text = MISSING if column is None else known(phenotype[column])
        text = MISSING if text.lower() in NO_NUMBER else text
        try:
            values[what] = None if text == MISSING else float(text)
        except ValueError:
            values[what] = math.nan
        if not 0 <= (values[what] or 0) < math.inf:
            raise UserError(f"{source} has '{text}' in the column {column}: write a number, with a point, or n/a.")
    usable = values["usable_volumes"]
    return Motion(mean_fd=values["mean_fd"], usable_volumes=None if usable is None else int(usable))


def motion_problem(motion: Motion, max_mean_fd: float | None, min_volumes: int | None) -> str:
    """Say why a participant moved too much, or nothing; with a limit, somebody's motion must be known."""
    if max_mean_fd is not None and motion.mean_fd is None:
        lacking = "there is no table of confounds"
        if motion.volumes is not None:
            lacking = f"its table of confounds has neither {DISPLACEMENT[0]} nor {', '.join(PARAMETERS)}"
        return f"nothing says how much it moved ({lacking}), and max_mean_fd is set"
    if max_mean_fd is not None and motion.mean_fd is not None and motion.mean_fd > max_mean_fd:
        return f"mean framewise displacement of {motion.mean_fd:.3f} mm, more than max_mean_fd ({max_mean_fd:g} mm)"
    if min_volumes is not None and motion.usable_volumes is not None and motion.usable_volumes < min_volumes:
        return f"{motion.usable_volumes} usable volumes, fewer than min_volumes ({min_volumes})"
    return ""
