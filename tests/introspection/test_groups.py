"""Labels become groups, in a sensible order and with their sizes."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.introspection.groups import Groups

from .oracle import Problem, assert_exact, record

N = 12


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ("all", "a", "b")),
        ([10, 9, 10], ("all", "9", "10")),
        (np.array([2.5, 1.0, 2.5]), ("all", "1.0", "2.5")),
        (torch.tensor([1, 0, 1]), ("all", "0", "1")),
        ([torch.tensor(1), torch.tensor(0), torch.tensor(1)], ("all", "0", "1")),
        ([np.array("b"), np.array("a"), np.array("b")], ("all", "a", "b")),
        (xr.DataArray(["b", "a", "b"], dims="subject"), ("all", "a", "b")),
        ([True, False, True], ("all", "False", "True")),
        (pd.Series(["b", "a", "b"], index=[7, 8, 9]), ("all", "a", "b")),
        (pd.Series(["low", "high", "low"], dtype=pd.CategoricalDtype(["low", "high"])), ("all", "low", "high")),
        (pd.Categorical(["z", "a", "z"], categories=["z", "a"]), ("all", "z", "a")),
        (np.array(["é", "z", "a b"]), ("all", "a b", "z", "é")),
        (["1.0", "1", "01"], ("all", "01", "1", "1.0")),
        ({"diagnosis": ["b", "a", "b"]}, ("all", "a", "b")),
    ],
    ids=str,
)
def test_labels_become_names(labels, names):
    assert Groups(labels).names == names


@pytest.mark.parametrize(
    "labels",
    [
        ["x", None, "y", float("nan")],
        pd.Series(["x", pd.NA, "y", None], dtype="string"),
        pd.Series(["x", None, "y", np.nan], dtype="category"),
        pd.Series([1.0, np.nan, 2.0, np.nan]),
        np.array([1.0, np.nan, 2.0, np.nan]),
        pd.Series([1, None, 2, None], dtype="Int64"),
        pd.to_datetime(pd.Series(["2020-01-01", None, "2021-01-01", None])),
    ],
    ids=str,
)
def test_missing_labels_count_in_all_alone_and_are_reported(labels):
    groups = Groups(labels)
    assert len(groups.names) == 3
    assert groups.missing == {"group": 2}
    assert groups.assign(labels).sizes.tolist() == [4, 1, 1]


GROUPINGS = {"diagnosis": ["SZ", "HC", "SZ", "HC", None, "SZ"] * 2, "sex": ["F", "F", "M", "F", "M", None] * 2}


def test_several_groupings_and_their_crossing_are_named_and_counted():
    groups = Groups(GROUPINGS, crossed=[("diagnosis", "sex")])
    assert dict(zip(groups.names, groups.assign(GROUPINGS).sizes.tolist(), strict=True)) == {
        "all": 12,
        "diagnosis=HC": 4,
        "diagnosis=SZ": 6,
        "sex=F": 6,
        "sex=M": 4,
        "diagnosis=HC & sex=F": 4,
        "diagnosis=SZ & sex=F": 2,
        "diagnosis=SZ & sex=M": 2,
    }
    assert groups.groupings == ("all", *["diagnosis"] * 2, *["sex"] * 2, *["diagnosis & sex"] * 3)


def test_crossed_groups_are_exact_and_stand_in_the_tree():
    problem = Problem(torch.nn.Linear(6, 5), torch.randn(N, 6), lambda y: y.tanh().square().sum(), GROUPINGS)
    tree = record(problem, crossed=[("diagnosis", "sex")])
    diagnosis, sex = (np.array(GROUPINGS[name], dtype=object) for name in GROUPINGS)
    table = {
        "all": np.ones(N, dtype=bool),
        "diagnosis=SZ": diagnosis == "SZ",
        "sex=M": sex == "M",
        "diagnosis=SZ & sex=F": (diagnosis == "SZ") & (sex == "F"),
        "diagnosis=HC & sex=F": (diagnosis == "HC") & (sex == "F"),
    }
    assert_exact(tree, problem, table)
    for group, member in table.items():
        assert int(tree.group_size.sel(group=group)[0]) == member.sum()
    assert str(tree.grouping.sel(group="diagnosis=SZ & sex=F").item()) == "diagnosis & sex"
    assert tree.attrs["audit"]["samples_without_label"] == {"diagnosis": 2, "sex": 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["x", "y", None])), min_size=2, max_size=30))
def test_cells_are_disjoint_and_rebuild_every_group(pairs):
    labels = {"one": [p[0] for p in pairs], "two": [p[1] for p in pairs]}
    if not any(labels["two"]):
        return
    groups = Groups(labels, crossed=[("one", "two")])
    assignment = groups.assign(labels)
    table = assignment.members[assignment.cells]
    for column, name in enumerate(groups.names):
        wanted = dict(part.split("=") for part in name.split(" & ")) if column else {}
        expected = [all(labels[g][i] == label for g, label in wanted.items()) for i in range(len(pairs))]
        assert table[:, column].tolist() == expected
    assert assignment.sizes.tolist() == table.sum(0).tolist()


def test_the_order_of_the_batch_is_the_order_of_the_labels():
    groups = Groups(["a", "b", "c"])
    assignment = groups.assign(["c", "a", "a"])
    assert assignment.members[assignment.cells][:, 1:].tolist() == [
        [False, False, True],
        [True, False, False],
        [True, False, False],
    ]
    assert assignment.sizes.tolist() == [3, 2, 0, 1]
