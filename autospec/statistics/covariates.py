"""Covariates of subjects: what two groups are matched for, and how far they differ in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from autospec.datasets.labelled import covariates_of, group_labels
from autospec.statistics.matching import BALANCED, matched_pairs, standardised_difference
from autospec.statistics.table import NO_P

# Covariates that a matched subsample is matched for, beside sex.
MATCHED = ("age", "mean_fd")


def matched_for(samples: xr.Dataset) -> dict[str, np.ndarray]:
    """Those of the covariates that a data set has, shape (samples,) each."""
    there = covariates_of(samples)
    return {name: there[name] for name in MATCHED if name in there}


def labels_of(samples: xr.Dataset, grouping: str) -> np.ndarray | None:
    """Labels of a grouping, None where they are missing; None where the data set has no such grouping."""
    if f"grouping_{grouping}" not in samples:
        return None
    return np.array(group_labels(samples, grouping), dtype=object)


def described_by(samples: xr.Dataset) -> dict[str, np.ndarray]:
    """Numbers of each sample whose balance is reported: what is matched for, and sex."""
    sexes = labels_of(samples, "sex")
    numbers = matched_for(samples)
    if sexes is not None:
        numbers["sex"] = np.array([np.nan if each is None else float(each == "M") for each in sexes])
    return numbers


def compares_targets(labels: np.ndarray, pair: tuple[str, str], target: np.ndarray) -> bool:
    """Whether each of the two groups is everybody of one target, such as a diagnosis."""
    for group in pair:
        targets = set(target[labels == group])
        if len(targets) != 1 or (target == targets.pop()).sum() != (labels == group).sum():
            return False
    return True


def by_subject(values: np.ndarray, rows: np.ndarray, subjects: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each subject's samples, and the number of each row's subject."""
    _, unit = np.unique(np.asarray(subjects, dtype=object)[rows].astype(str), return_inverse=True)
    return np.bincount(unit, values[rows]) / np.bincount(unit), unit


def matched_samples(
    labels: np.ndarray, pair: tuple[str, str], samples: xr.Dataset, subjects: Sequence[str]
) -> np.ndarray:
    """Number of each sample's matched pair of subjects; -1 where its subject has no partner.

    Parameters
    ----------
    labels : ndarray of object, shape (samples,)
        Group of each sample, or None.
    pair : (str, str)
        The two groups.
    samples : xarray.Dataset
        The labelled data set.
    subjects : sequence of str
        Whose each sample is.
    """
    numbers, sexes = matched_for(samples), labels_of(samples, "sex")
    known = np.array([each in pair for each in labels]) & np.isfinite(np.stack(list(numbers.values()))).all(0)
    exact = np.full(len(labels), "", dtype=object) if sexes is None else sexes
    known &= np.array([each is not None for each in exact])
    result = np.full(len(labels), -1)
    if not known.any():
        return result
    columns = [by_subject(values, known, subjects) for values in numbers.values()]
    unit = columns[0][1]
    first_row = np.unique(unit, return_index=True)[1]
    in_first = (labels[known] == pair[0])[first_row]
    pairs = matched_pairs(np.stack([means for means, _ in columns], 1), exact[known][first_row].astype(str), in_first)
    of_unit = np.full(len(first_row), -1)
    for number, both in enumerate(pairs):
        of_unit[list(both)] = number
    result[known] = of_unit[unit]
    return result


def imbalance_after_matching(worst: float) -> str:
    """Say why no p may be given among matched subjects; empty where they are alike enough."""
    if worst <= BALANCED:
        return ""
    return f"an imbalance of {worst:.2f} standard deviations remains after matching, so {NO_P}"


def balance_in_words(
    labels: np.ndarray, pair: tuple[str, str], numbers: Mapping[str, np.ndarray], subjects: Sequence[str]
) -> tuple[str, float]:
    """Standardised differences of the groups in words, and the largest; none where a group has one subject, who has no spread."""
    words, worst = [], 0.0
    for name, values in numbers.items():
        known = np.array([each in pair for each in labels]) & np.isfinite(values)
        if not known.any():
            continue
        means, unit = by_subject(values, known, subjects)
        in_first = (labels[known] == pair[0])[np.unique(unit, return_index=True)[1]]
        if min(in_first.sum(), (~in_first).sum()) < 2:
            continue
        difference = float(standardised_difference(means[:, None], in_first)[0])
        words.append(f"{name} {difference:+.2f}")
        worst = max(worst, abs(difference))
    return ", ".join(words), worst
