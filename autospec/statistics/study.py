"""Who was trained on, who belongs to which group, and whose labels may be exchanged once a network has been trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from autospec.datasets.labelled import covariates_of, group_labels
from autospec.errors import UserError
from autospec.introspection.groups import Groups
from autospec.statistics.measures import STATISTICS
from autospec.statistics.permutations import Comparison, Labellings


@dataclass(frozen=True)
class Grouped:
    """Labels of one grouping.

    Attributes
    ----------
    name : str
        The grouping, as the trajectories call it.
    labels : ndarray of object, shape (samples,)
        Name of each sample's group; None where it belongs to none.
    pairs : list of (str, str)
        Every pair of its groups, in the trajectories' order.
    """

    name: str
    labels: np.ndarray
    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class Study:
    """The samples on which networks were trained, with everything that is known of them.

    Attributes
    ----------
    task : {"autoencoder", "classifier"}
        What the network learned.
    target : ndarray of str, shape (samples,)
        What a classifier learned.
    subjects : list of str
        Whose each sample is.
    samples : xarray.Dataset
        The labelled data set, of these samples alone.
    groupings : list of Grouped
        The groupings under test.
    """

    task: str
    target: np.ndarray
    subjects: list[str]
    samples: xr.Dataset
    groupings: list[Grouped]


@dataclass(frozen=True)
class Question:
    """A comparison that is tested, with the labellings that it is compared with."""

    comparison: Comparison
    labellings: Labellings
    statistics: tuple[str, ...] = STATISTICS


def grouped(labels: Any, crossed: Sequence[Sequence[str]] = ()) -> list[Grouped]:
    """Groupings with their groups, named as `autospec.watch` names them.

    Parameters
    ----------
    labels, crossed
        As ``groups`` and ``crossed`` of `autospec.watch`.
    """
    groups = Groups(labels, crossed)
    assigned = groups.assign(labels)
    members = assigned.members[assigned.cells]
    found = []
    for grouping in dict.fromkeys(groups.groupings[1:]):
        columns = [i for i, name in enumerate(groups.groupings) if name == grouping]
        names = np.full(len(members), None, dtype=object)
        for column in columns:
            names[members[:, column]] = groups.names[column]
        in_order = [groups.names[column] for column in columns]
        pairs = [(a, b) for i, a in enumerate(in_order) for b in in_order[i + 1 :]]
        found.append(Grouped(grouping, names, pairs))
    return found


def exchangeable(
    task: str, target: Sequence[str] | np.ndarray, labels: Sequence[Any] | np.ndarray, group_a: str, group_b: str
) -> str:
    """Say why the labels of two groups cannot be exchanged after training; empty where they can.

    Parameters
    ----------
    task : {"autoencoder", "classifier"}
        What the network learned.  An autoencoder has seen no label.
    target : sequence of str, shape (samples,)
        What a classifier learned: within one and the same target it has seen nothing of the labels.
    labels : sequence of str or None, shape (samples,)
        Group of each sample.
    group_a, group_b : str
        The groups.

    Returns
    -------
    str
        One sentence, or nothing.
    """
    if task == "autoencoder":
        return ""
    of_sample, of_target = np.asarray(labels, dtype=object), np.asarray(target, dtype=object)
    if set(of_target[of_sample == group_a]) & set(of_target[of_sample == group_b]):
        return ""
    return (
        f"The groups '{group_a}' and '{group_b}' differ in the target, which the weights and adjoints of this classifier "
        "have seen, so their labels cannot be exchanged after training: refits, with refit set to true for this run, permute "
        "them before it."
    )


def columns_of(dataset: xr.Dataset, names: Sequence[str], what: str) -> dict[str, list[str | None]]:
    """Labels of some groupings of a data set, (samples,) each; ``target`` and ``diagnosis`` may stand for the target's.

    Raises
    ------
    UserError
        If there is no such grouping; ``what`` says which setting names it.
    """
    found = {}
    for name in names:
        missing = f"grouping_{name}" not in dataset
        if missing and name not in ("target", "diagnosis"):
            there = sorted(str(each).removeprefix("grouping_") for each in dataset if str(each).startswith("grouping_"))
            raise UserError(f"{what} names '{name}', but the data set's groupings are {there}: name some of these.")
        found[name] = group_labels(dataset, None if missing else name)
    return found


def numbers_of(dataset: xr.Dataset, names: Sequence[str], what: str) -> dict[str, np.ndarray]:
    """Some covariates of a data set, (samples,) each.

    Raises
    ------
    UserError
        If there is no such covariate; ``what`` says which setting names it.
    """
    there = covariates_of(dataset)
    for name in names:
        if name not in there:
            raise UserError(
                f"{what} names '{name}', but the data set's covariates are {sorted(there)}: name some of these."
            )
    return {name: there[name] for name in names}
