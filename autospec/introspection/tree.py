"""The labelled tree: records of steps in, an xarray.DataTree out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from .spectra import NOISE_CONSTANTS, NOISE_CONSTANTS_OF_HALF

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
    alignment : dict of layer to ndarray, shape (groups,)
        Nuclear norm of the share over the sum of products of its factors' singular values.
    by_position : dict of layer to ndarray, shape (groups, positions, index)
        Singular values of the shares of each position.
    contrasts : dict of (pair, layer, variable) to ndarray
        What compares two groups: spectrum of the contrast and its noise floor, cosine, angles.
    """

    step: int
    group_size: np.ndarray
    spectra: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    sigma_1: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    floors: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    alignment: dict[str, np.ndarray] = field(default_factory=dict)
    by_position: dict[str, np.ndarray] = field(default_factory=dict)
    contrasts: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Plain lists and dicts, which a checkpoint can hold with ``weights_only=True``."""
        state: dict[str, Any] = {"step": self.step, "group_size": self.group_size.tolist()}
        for name in _ARRAYS:
            # Keys are one or several names.
            items = getattr(self, name).items()
            state[name] = [([key] if isinstance(key, str) else list(key), value.tolist()) for key, value in items]
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Record:
        """Make a record from `state`."""
        record = cls(state["step"], np.array(state["group_size"]))
        for name in _ARRAYS:
            for key, value in state[name]:
                getattr(record, name)[key[0] if len(key) == 1 else tuple(key)] = np.array(value, dtype=np.float32)
        return record


_ARRAYS = ("spectra", "floors", "alignment", "by_position", "contrasts")


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
    pairs: Sequence[str] = (),
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
    for pair in pairs:
        for layout in layouts:
            nodes[f"contrasts/{pair}/{layout.name}"] = _contrast_node(records, pair, layout, statistics)
    return xr.DataTree.from_dict(nodes)


def _layer_node(records: Sequence[Record], layout: LayerLayout, groups: int, statistics: Sequence[str]) -> xr.Dataset:
    variables: dict[str, Any] = {}
    recorded = [name for name in statistics if name in DESCRIPTIONS]
    count, number = _index(layout, [record.spectra.get((layout.name, name)) for record in records for name in recorded])
    for statistic in recorded:
        key = (layout.name, statistic)
        values = _stacked([record.spectra.get(key) for record in records], (groups, count))
        floors = _stacked([record.floors.get(key) for record in records], (groups,))
        variables[statistic] = (("step", "group", "index"), values, {"description": DESCRIPTIONS[statistic]})
        variables[f"{statistic}_noise_floor"] = (
            ("step", "group"),
            floors,
            {
                "description": f"level below which a singular value of the {statistic} is rounding",
                "constant": NOISE_CONSTANTS[statistic],
                "constant_in_half_precision": NOISE_CONSTANTS_OF_HALF[statistic],
            },
        )
    limit = layout.rank_limit if layout.rank_limit is not None else np.zeros(groups)
    variables["rank_limit"] = (
        "group",
        np.asarray(limit, dtype=np.int64),
        {"description": "largest rank that the group's rows allow the gradient"},
    )
    if any(layout.name in record.alignment for record in records):
        variables["alignment"] = (
            ("step", "group"),
            _stacked([record.alignment.get(layout.name) for record in records], (groups,)),
            {"description": "nuclear norm of the gradient over the sum of products of its factors' singular values"},
        )
    coords: dict[str, Any] = {"index": ("index", number, {"description": "number of the singular value, from 1"})}
    by_position = [record.by_position.get(layout.name) for record in records]
    positions = max((each.shape[1] for each in by_position if each is not None), default=0)
    if positions:
        whole = _stacked(by_position, (groups, positions, count))
        variables["gradient_by_position"] = (
            ("step", "group", "position", "index"),
            whole,
            {"description": "singular values of the shares of each position along the tying dimension"},
        )
        coords["position"] = ("position", np.arange(positions), {"description": "position, from 0"})
    attributes: dict[str, Any] = {"shape": list(layout.shape)}
    if layout.also:
        attributes["also"] = list(layout.also)
    return xr.Dataset(
        variables,
        coords=coords,
        attrs=attributes,
    )


CONTRAST_VARIABLES = {
    "contrast": (
        ("gradient", "singular values of the difference of the groups' shares, each divided by its number of samples"),
        ("gradient_noise_floor", "level below which a singular value of the contrast is rounding"),
    ),
    "cosine": (("cosine", "cosine between the groups' shares"),),
    "angles": (
        ("angles", "principal angles between the leading right singular subspaces of the groups' shares, radians"),
    ),
}


def _contrast_node(records: Sequence[Record], pair: str, layout: LayerLayout, statistics: Sequence[str]) -> xr.Dataset:
    """What compares two groups in one layer."""
    variables: dict[str, Any] = {}
    names = [
        (name, words) for each in statistics if each in CONTRAST_VARIABLES for name, words in CONTRAST_VARIABLES[each]
    ]
    by_index = {
        name: ("step",) if name in ("cosine", "gradient_noise_floor") else ("step", "index") for name, _ in names
    }
    found = {name: [record.contrasts.get((pair, layout.name, name)) for record in records] for name in by_index}
    spectra = [each for name, dims in by_index.items() if len(dims) > 1 for each in found[name]]
    count, number = _index(layout, spectra)
    for name, words in names:
        stacked = _stacked(found[name], (count,)[: len(by_index[name]) - 1])
        variables[name] = (by_index[name], stacked, {"description": words})
    index = ("index", number, {"description": "number of the singular value, from 1"})
    return xr.Dataset(variables, coords={"index": index}, attrs={"shape": list(layout.shape)})


def _index(layout: LayerLayout, spectra: Sequence[np.ndarray | None]) -> tuple[int, np.ndarray]:
    """How many singular values are in a node, and their numbers: a layer may have had wider rows at one step than at another."""
    count = max([len(layout.index), *(each.shape[-1] for each in spectra if each is not None)])
    return count, layout.index if count == len(layout.index) else np.arange(1, count + 1)


def _stacked(steps: Sequence[np.ndarray | None], shape: tuple[int, ...]) -> np.ndarray:
    """What was found at each step, of that shape or smaller, one after the other; NaN where there is nothing."""
    whole = np.full((len(steps), *shape), np.nan, dtype=np.float32)
    for step, found in enumerate(steps):
        if found is not None:
            place: tuple[Any, ...] = (step, *(slice(size) for size in np.shape(found)))
            whole[place] = found
    return whole
