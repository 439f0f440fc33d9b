"""Time courses that were computed before, in whatever file, as the table that every subject's job reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from autospec.cohort import gift, trends
from autospec.cohort.subjects import Scan
from autospec.errors import UserError
from autospec.storage import written_whole


def read_timecourses(scan: Scan) -> np.ndarray:
    """Read time courses of GIFT or TReNDS, (time, networks); raises UserError if they cannot be read."""
    if scan.components:
        return trends.read_timecourses(scan.timecourses, scan.components, scan.position)
    return gift.read_timecourses(scan.timecourses)


def shape_of(scan: Scan) -> tuple[int, int]:
    """How many time points and networks there are, from headers alone; raises UserError where a variable is missing."""
    if scan.components:
        return trends.shape_of(scan.timecourses, scan.components, scan.position)
    return gift.shape_of(scan.timecourses, scan.maps, scan.mask)


def write_timecourses(scan: Scan, repetition_time: float | None, path: str) -> None:
    """Write a subject's time courses as a table, and what is known of them beside it.

    Parameters
    ----------
    scan : Scan
        Of the layouts ``gift`` or ``trends``.
    repetition_time : float or None
        Seconds; neither layout's files say it.
    path : str
        The ``.tsv`` file: one row a time point, one column a network, named by its number.

    Raises
    ------
    UserError
        If the time courses cannot be read, or have missing values.
    """
    courses = read_timecourses(scan)
    if not np.isfinite(courses).all():
        raise UserError(f"{scan.timecourses} has missing values: a number for every time point and network is needed.")
    labels = [f"network-{k:03d}" for k in range(1, courses.shape[1] + 1)]
    lines = ["\t".join(labels), *("\t".join(f"{value:.9g}" for value in row) for row in courses)]
    described = {
        "Description": "Time course of each network, computed before; one row a time point.",
        "Sources": [Path(each).name for each in (scan.timecourses, scan.components) if each],
        "RepetitionTime": repetition_time,
    }
    for target, text in ((Path(path).with_suffix(".json"), json.dumps(described, indent=2)), (path, "\n".join(lines))):
        with written_whole(target) as temporary:
            temporary.write_text(text + "\n")
