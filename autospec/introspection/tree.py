"""The labelled tree: records of steps in, an xarray.DataTree out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from .spectra import NOISE_CONSTANTS

DESCRIPTIONS = {
    "gradient": "singular values of the group shares of the weight's gradient",
    "activation": "singular values of the rows that enter the layer",
    "adjoint": "singular values of the derivatives of the loss at the output of the layer's affine map",
}


@dataclass
class Record:
    """Spectra of one step.

    Attributes
    ----------
    step : int
        Parameter updates done before this backward pass.
    group_size : ndarray of int, shape (groups,)
        Samples in each group of this batch.
    spectra : dict of (layer, statistic) to ndarray, shape (groups, index)
        Singular values, float32.
    sigma_1, floors : dict of (layer, statistic) to ndarray, shape (groups,)
        Largest singular values, and noise floors.
    rows : dict of layer to ndarray, shape (groups,)
        Rows that each group contributed.
    """

    step: int
    group_size: np.ndarray
    spectra: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    sigma_1: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    floors: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Plain lists and dicts, which a checkpoint can hold with ``weights_only=True``."""
        return {
            "step": self.step,
            "group_size": self.group_size.tolist(),
            "spectra": [(*key, value.tolist()) for key, value in self.spectra.items()],
            "floors": [(*key, value.tolist()) for key, value in self.floors.items()],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Record:
        """Make a record from `state`."""
        return cls(
            state["step"],
            np.array(state["group_size"]),
            {(a, b): np.array(v, dtype=np.float32) for a, b, v in state["spectra"]},
            floors={(a, b): np.array(v, dtype=np.float32) for a, b, v in state["floors"]},
        )


@dataclass(frozen=True)
class LayerLayout:
    """What one layer's node looks like: name, other names, shape, which singular values, attainable rank."""

    name: str
    also: tuple[str, ...]
    shape: tuple[int, int]
    index: np.ndarray
    rank_limit: np.ndarray | None


def strings(values: Sequence[str]) -> np.ndarray:
    """Text of variable length, the only kind that zarr's third format specifies."""
    return np.array(list(values), dtype=np.dtypes.StringDType())


def build_tree(
    records: Sequence[Record],
    layouts: Sequence[LayerLayout],
    groups: Sequence[str],
    groupings: Sequence[str],
    statistics: Sequence[str],
    attributes: Mapping[str, Any],
) -> xr.DataTree:
    """Arrange records as a tree.

    Returns
    -------
    xarray.DataTree
        Root: coordinates ``step``, ``group``, ``grouping``; ``group_size (step, group)``.  A node
        ``layers/<parameter>`` holds each statistic ``(step, group, index)``, its noise floor ``(step, group)``
        and ``rank_limit (group)``.
    """
    root = xr.Dataset(
        {
            "group_size": (
                ("step", "group"),
                np.array([record.group_size for record in records], dtype=np.int64).reshape(-1, len(groups)),
                {"description": "samples of the batch in each group"},
            )
        },
        coords={
            "step": (
                "step",
                np.array([record.step for record in records], dtype=np.int64),
                {"description": "parameter updates done before this backward pass"},
            ),
            "group": ("group", strings(groups)),
            "grouping": ("group", strings(groupings)),
        },
        attrs={**attributes, "layers": [layout.name for layout in layouts]},
    )
    nodes = {"/": root}
    for layout in layouts:
        nodes[f"layers/{layout.name}"] = _layer_node(records, layout, len(groups), statistics)
    return xr.DataTree.from_dict(nodes)


def _layer_node(records: Sequence[Record], layout: LayerLayout, groups: int, statistics: Sequence[str]) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for statistic in statistics:
        key = (layout.name, statistic)
        empty = np.full((groups, len(layout.index)), np.nan, dtype=np.float32)
        values = [record.spectra.get(key, empty) for record in records]
        floors = [record.floors.get(key, empty[:, 0]) for record in records]
        variables[statistic] = (
            ("step", "group", "index"),
            np.array(values, dtype=np.float32).reshape(len(records), groups, len(layout.index)),
            {"description": DESCRIPTIONS[statistic]},
        )
        variables[f"{statistic}_noise_floor"] = (
            ("step", "group"),
            np.array(floors, dtype=np.float32).reshape(len(records), groups),
            {
                "description": f"level below which a singular value of the {statistic} is rounding",
                "constant": NOISE_CONSTANTS[statistic],
            },
        )
    limit = layout.rank_limit if layout.rank_limit is not None else np.zeros(groups)
    variables["rank_limit"] = (
        "group",
        np.asarray(limit, dtype=np.int64),
        {"description": "largest rank that the group's rows allow the gradient"},
    )
    attributes: dict[str, Any] = {"shape": list(layout.shape)}
    if layout.also:
        attributes["also"] = list(layout.also)
    return xr.Dataset(
        variables,
        coords={"index": ("index", layout.index, {"description": "number of the singular value, from 1"})},
        attrs=attributes,
    )
