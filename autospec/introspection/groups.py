"""Groups of samples: labels in, a table of groups and of disjoint cells out."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import WatchError

ALL = "all"
# With more samples than this, as many groups as samples are taken for a mistake.
MANY = 20


@dataclass(frozen=True)
class Assignment:
    """Which samples of one batch belong to which groups.

    Attributes
    ----------
    cells : ndarray of int, shape (samples,)
        The cell of each sample: samples in exactly the same groups share a cell.
    members : ndarray of bool, shape (cells, groups)
        Which groups each cell belongs to; column 0 is the whole batch.
    """

    cells: np.ndarray
    members: np.ndarray

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Samples in each group, shape (groups,)."""
        return np.bincount(self.cells, minlength=len(self.members)) @ self.members.astype(np.int64)


class Groups:
    """The groups of a study, fixed by the labels first seen.

    Parameters
    ----------
    labels : array-like or mapping of str to array-like or None
        One label a sample; or several groupings by name; or None for the whole batch alone.
    crossed : sequence of sequences of str
        Groupings whose crossing is a grouping of its own, such as ``[("diagnosis", "sex")]``.

    Attributes
    ----------
    names : tuple of str
        ``all`` first, then the groups.
    groupings : tuple of str
        The grouping that each group comes from.
    missing : dict of str to int
        Samples without a label, by grouping.

    Raises
    ------
    WatchError
        If a label is ``all``, groupings differ in length, or a declared category has no member.
    """

    def __init__(self, labels: Any, crossed: Sequence[Sequence[str]] = ()) -> None:
        self._single = not isinstance(labels, Mapping)
        columns = self._columns(labels)
        if isinstance(crossed, str) or any(isinstance(names, str) for names in crossed):
            raise WatchError(f"crossed={crossed!r}: give a list of lists of groupings, such as [('diagnosis', 'sex')].")
        self._crossed = [tuple(names) for names in crossed]
        for names in self._crossed:
            if len(set(names)) < max(len(names), 2):
                raise WatchError(f"crossed names {names}: cross at least two groupings, each of them once.")
            absent = [name for name in names if name not in columns]
            if absent:
                raise WatchError(f"crossed names the grouping '{absent[0]}', but groups has no such grouping.")
        self._order = {name: _categories(name, values) for name, values in columns.items()}
        plain = self._single or len(columns) == 1
        self._tests: list[dict[str, str]] = [{}]
        group_names, groupings = [ALL], [ALL]
        for grouping, categories in self._order.items():
            for label in categories:
                self._tests.append({grouping: label})
                group_names.append(label if plain else f"{grouping}={label}")
                groupings.append(grouping)
        for crossing in self._crossed:
            for combination in _combinations(columns, self._order, crossing):
                self._tests.append(combination)
                group_names.append(" & ".join(f"{grouping}={label}" for grouping, label in combination.items()))
                groupings.append(" & ".join(crossing))
        self.names, self.groupings = tuple(group_names), tuple(groupings)
        twice = [name for name in self.names if self.names.count(name) > 1]
        if twice:
            raise WatchError(f"two groups have the name '{twice[0]}': rename a grouping or its labels.")
        self.missing = {name: int(sum(value is None for value in _strings(values))) for name, values in columns.items()}
        self.missing = {name: count for name, count in self.missing.items() if count}

    def assign(self, labels: Any) -> Assignment:
        """Assign one batch's samples to the groups.

        Parameters
        ----------
        labels : as for the constructor
            Labels of this batch, in the order of its samples.

        Raises
        ------
        WatchError
            If the groupings differ from the first ones, or a label was not among the first ones.
        """
        columns = self._columns(labels)
        if list(columns) != list(self._order):
            raise WatchError(
                f"groups has the groupings {list(columns)}, but watching began with {list(self._order)}: "
                "give the same groupings each time."
            )
        strings = {name: _strings(values) for name, values in columns.items()}
        for name, values in strings.items():
            unknown = sorted({v for v in values if v is not None} - set(self._order[name]))
            if unknown:
                raise WatchError(
                    f"the label '{unknown[0]}' was not among the groups given at the start ({self._order[name]}): "
                    "give watch(groups=...) the labels of the whole data set, then set_groups each batch's."
                )
        count = len(next(iter(strings.values()))) if strings else 0
        table = np.ones((count, len(self.names)), dtype=bool)
        arrays = {name: np.array(values, dtype=object) for name, values in strings.items()}
        for column, test in enumerate(self._tests):
            for grouping, label in test.items():
                table[:, column] &= arrays[grouping] == label
        members, cells = np.unique(table, axis=0, return_inverse=True)
        # The first group's cell comes first.
        return Assignment(len(members) - 1 - cells.reshape(-1), members[::-1])

    @staticmethod
    def _columns(labels: Any) -> dict[str, Any]:
        if labels is None:
            return {}
        if getattr(labels, "columns", None) is not None and getattr(labels, "ndim", 2) == 2:
            raise WatchError(
                f"groups is a table with the columns {list(map(str, labels.columns))}: give one column, groups=table['...'], or "
                "several groupings as a dict of columns."
            )
        columns = dict(labels) if isinstance(labels, Mapping) else {"group": labels}
        for name, values in columns.items():
            if not isinstance(values, Iterable) or isinstance(values, str | bytes) or getattr(values, "ndim", 1) == 0:
                raise WatchError(f"groups={values!r}: give one label for each sample of the batch.")
            columns[name] = values if hasattr(values, "__len__") else list(values)
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise WatchError(f"the groupings have different lengths ({lengths}): each needs one label a sample.")
        return columns


def listed(labels: Any) -> Any:
    """Labels that can be read more than once: what an iterator gives as a list."""
    if isinstance(labels, Mapping):
        return {name: listed(values) for name, values in labels.items()}
    return list(labels) if isinstance(labels, Iterator) else labels


def _strings(values: Any) -> list[str | None]:
    """Labels as strings; None where the label is missing."""
    if not hasattr(values, "tolist") and hasattr(values, "__array__"):  # xarray's
        values = np.asarray(values)
    if hasattr(values, "tolist"):  # tensors, arrays and pandas columns
        values = values.tolist()
    dimensions = [None if isinstance(value, np.generic) else getattr(value, "ndim", None) for value in values]
    # A list of tensors of one number each, as a data set gives them sample by sample.
    values = [
        value.item() if dims == 0 and hasattr(value, "item") else value
        for value, dims in zip(values, dimensions, strict=True)
    ]
    if any(dims or isinstance(value, list | tuple) for value, dims in zip(values, dimensions, strict=True)):
        raise WatchError(
            "groups has more than one label for a sample: give one column of labels, or a dict of several."
        )
    return [
        None if _is_missing(value) else value.decode() if isinstance(value, bytes) else str(value) for value in values
    ]


def _is_missing(value: Any) -> bool:
    return value is None or type(value).__name__ in ("NAType", "NaTType") or value != value


def _categories(name: str, values: Any) -> list[str]:
    """Distinct labels in a sensible order: declared categories, else numbers by value, else by name."""
    declared = getattr(getattr(values, "dtype", None), "categories", None)
    present = {value for value in _strings(values) if value is not None}
    if declared is not None:
        order = [str(category) for category in declared]
        empty = [label for label in order if label not in present]
        if empty:
            raise WatchError(
                f"the group '{empty[0]}' of '{name}' has no member: remove the unused category "
                "(pandas: .cat.remove_unused_categories()), or check the selection of samples."
            )
    else:
        try:
            order = sorted(sorted(present), key=float)  # '1' and '1.0' too have one order
        except ValueError:
            order = sorted(present)
    if not order:
        raise WatchError(f"every label of '{name}' is missing: there is no group to watch.")
    if len(order) == len(values) > MANY:
        warnings.warn(
            f"'{name}' gives each of its {len(order)} samples a group of its own: groups are meant to be categories; "
            "cut a number such as age into a few ranges.",
            stacklevel=6,
        )
    if ALL in order:
        raise WatchError(f"'{ALL}' is the name of the whole batch and cannot be a group of '{name}': rename it.")
    return order


def _combinations(
    columns: dict[str, Any], order: dict[str, list[str]], crossing: tuple[str, ...]
) -> list[dict[str, str]]:
    """Observed combinations of several groupings, in the order of their labels."""
    rows = set(zip(*(_strings(columns[name]) for name in crossing), strict=True))
    rows = {row for row in rows if None not in row}
    rank = [{label: i for i, label in enumerate(order[name])} for name in crossing]
    ordered = sorted(rows, key=lambda row: [rank[i][label] for i, label in enumerate(row)])
    return [dict(zip(crossing, row, strict=True)) for row in ordered]


def places(labels: np.ndarray, count: int) -> np.ndarray:
    """Place of each entry among those with the same label, counted from 0."""
    order = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=count))])
    result = np.empty(len(labels), dtype=np.int64)
    result[order] = np.arange(len(labels)) - starts[labels[order]]
    return result
