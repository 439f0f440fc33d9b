"""Time courses of networks as a labelled data set: [sample, time, network]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, TypedDict

import numpy as np

from autospec.datasets.labelled import write_samples
from autospec.datasets.participants import files_of, read_half, read_origin
from autospec.errors import UserError
from autospec.ica.derivative import read_table


class TimeseriesSettings(TypedDict):
    """What the stage reads from the configuration."""

    name: str
    courses: Literal["timecourses", "cleaned"]
    """Which of each participant's tables the stage is given."""
    length: int | None
    """Time points to keep, from the first; None keeps as many as the shortest has."""


def build_timeseries(settings: TimeseriesSettings, participants: str, files: Mapping[str, str], output: str) -> str:
    """Build a data set of time courses and write it, one sample at a time.

    Parameters
    ----------
    settings : TimeseriesSettings
    participants : str
        The cohort's ``participants.tsv``.
    files : mapping of str to str
        Table of time courses by participant's id: one row a time point, one column a network.
    output : str
        The ``.zarr.zip`` file to write.

    Returns
    -------
    str
        One line that says what was built.

    Raises
    ------
    UserError
        If somebody's table is missing, has other networks, is too short, or holds a network without any change.
    """
    half = read_half(participants, "functional")
    paths = files_of(half, files, "time courses")
    origin = read_origin(paths, half)
    networks, lengths = _survey(paths)
    length = _common_length(lengths, settings["length"], paths)
    write_samples(
        _samples(paths, networks, length),
        shape=(length, len(networks)),
        dims=("time", "network"),
        ids=half.ids,
        target=half.target,
        groupings=half.groupings,
        attributes={
            "kind": "timeseries",
            "source": participants,
            "cohort_digest": half.cohort_digest,
            "time_points": length,
            "fewest_time_points": min(lengths),
            "most_time_points": max(lengths),
            "scaling": "each network of each participant has mean 0 and standard deviation 1 over the time points kept",
            **origin.attributes,
        },
        coordinates={"network": ("network", networks)},
        path=output,
        subjects=half.subjects,
        covariates=half.covariates,
    )
    cut = f", cut from up to {max(lengths)}" if max(lengths) > length else ""
    return f"{settings['name']}: {half.counted}, {length} time points{cut}, {len(networks)} networks"


def standardise(courses: np.ndarray) -> np.ndarray:
    """Give each column of (time, network) mean 0 and standard deviation 1; a constant one becomes NaN."""
    centred = courses - courses.mean(0)
    spread = centred.std(0)
    # Rounding leaves a constant column with a spread that is tiny beside its size.
    spread[spread <= 1e-12 * np.abs(courses).max(0)] = np.nan
    return centred / spread


def _survey(paths: list[str]) -> tuple[list[str], list[int]]:
    """Networks that all tables share, and the length of each table."""
    networks: list[str] = []
    lengths = []
    for path in paths:
        courses, labels = read_table(path)
        networks = networks or labels
        if labels != networks:
            raise UserError(f"{path} has other networks than {paths[0]}: run all of them with one template.")
        lengths.append(len(courses))
    return networks, lengths


def _common_length(lengths: list[int], wanted: int | None, paths: list[str]) -> int:
    shortest = min(lengths)
    if wanted is not None and shortest < wanted:
        raise UserError(
            f"{paths[lengths.index(shortest)]} has {shortest} time points, fewer than length ({wanted}): "
            "lower length, or set min_volumes so that it is left out."
        )
    return shortest if wanted is None else wanted


def _samples(paths: list[str], networks: list[str], length: int) -> Iterator[np.ndarray]:
    for path in paths:
        sample = standardise(read_table(path)[0][:length])
        constant = [name for name, bad in zip(networks, ~np.isfinite(sample).all(0), strict=True) if bad]
        if constant:
            raise UserError(f"{path}: the time course of {constant[0]} does not change or has missing values.")
        yield sample.astype(np.float32)
