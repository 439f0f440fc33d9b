"""What is recorded on another device is what the processor records, and the training there is unchanged."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch

from tests.introspection.families import EVERYTHING, FAMILIES
from tests.introspection.oracle import train_watched

from .simulated import NAME, moved, without_float64

WAYS = {
    "everything": (EVERYTHING, contextlib.nullcontext),
    "tracked": ({"solver": "tracked", "singular_values": 2}, contextlib.nullcontext),
    "everything, no float64": (EVERYTHING, without_float64),
    "gradients, no float64": ({"statistics": ["gradient"]}, without_float64),
}
# torch's sparse gradients have kernels of each device.
CASES = [name for name in FAMILIES if "sparse" not in name]
# Largest deviation of a variable in units of its largest value, if that is not below its noise floor; and those of numbers up
# to one, and of angles, which magnify rounding where directions are near each other.
TOLERANCE, ABSOLUTE = 3e-6, {"cosine": 3e-6, "alignment": 3e-6, "angles": 1e-3}


def train(made, device, options=None):
    """Train a copy; return its weights, and what was recorded."""
    model = copy.deepcopy(made.model)
    model, x = (moved(model), made.x.to(device)) if device == NAME else (model, made.x)
    watcher = train_watched(made, model, x, options)
    return [parameter.detach().cpu() for parameter in model.parameters()], watcher and watcher.trajectories


def assert_same(found, expected):
    """Compare two records, variable by variable."""
    for node in expected.subtree:
        for name, variable in node.data_vars.items():
            there, here = found[node.path][name].values, variable.values
            if here.dtype.kind != "f":
                assert (there == here).all(), (node.path, name)
                continue
            assert (np.isnan(there) == np.isnan(here)).all(), (node.path, name)
            if np.isnan(here).all():
                continue
            deviation = np.nanmax(np.abs(there - here))
            floor = node.data_vars.get(f"{name}_noise_floor")
            tolerance = max(TOLERANCE * np.nanmax(np.abs(here)), 0 if floor is None else np.nanmin(floor.values))
            assert deviation <= ABSOLUTE.get(name, tolerance), (node.path, name, deviation)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_a_record_is_that_of_the_processor_and_the_training_unchanged(case, way):
    options, limited = WAYS[way]
    torch.manual_seed(0)
    made = FAMILIES[case]()
    expected = train(made, "cpu", options)[1]
    with limited():
        plain, _ = train(made, NAME)
        weights, found = train(made, NAME, options)
    for watched, unwatched in zip(weights, plain, strict=True):
        assert torch.equal(watched, unwatched)
    assert found.attrs["audit"]["largest_error"] < 1e-6
    assert found.attrs["audit"]["outside"] == {}
    assert_same(found, expected)
