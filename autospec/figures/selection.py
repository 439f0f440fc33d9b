"""What of a run is drawn: which layers, which groups, and whether the run learned anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

STATISTICS = ("gradient", "activation", "adjoint")


def shown_layers(names: Sequence[str], most: int | None) -> list[str]:
    """At most that many layers, evenly chosen in the model's order, the first and the last among them."""
    if most is None or len(names) <= most:
        return list(names)
    return [names[position] for position in np.linspace(0, len(names) - 1, most).round().astype(int)]


def recorded_statistics(tree: xr.DataTree) -> list[str]:
    """Statistics that a run recorded, in the order of the columns."""
    first = next(iter(tree["layers"].children.values()))
    return [statistic for statistic in STATISTICS if statistic in first]


def shown_groups(tree: xr.DataTree) -> list[str]:
    """The whole batch and the groups of the finest grouping: that with most groups, the first of several."""
    names, groupings = ([str(name) for name in tree[part].values] for part in ("group", "grouping"))
    counts = {grouping: groupings[1:].count(grouping) for grouping in groupings[1:]}
    finest = max(counts, key=lambda grouping: counts[grouping], default="")
    return [
        names[0],
        *(name for name, grouping in zip(names[1:], groupings[1:], strict=True) if grouping == finest),
    ]


def at_chance(tree: xr.DataTree) -> bool:
    """Whether the run was measured on held-out data and did no better than chance."""
    return bool((tree.attrs.get("performance") or {}).get("at_chance"))


def rank_limits(tree: xr.DataTree, layer: str, statistic: str, groups: Sequence[str]) -> np.ndarray:
    """Largest rank that each group's rows allow, for the gradient; without bound elsewhere.

    Returns
    -------
    ndarray of float, shape (groups,)
    """
    node = tree["layers"][layer]
    if statistic != "gradient" or "rank_limit" not in node:
        return np.full(len(groups), np.inf)
    limits = node["rank_limit"].sel(group=list(groups)).values.astype(float)
    return np.where(limits > 0, limits, np.inf)  # 0: never recorded
