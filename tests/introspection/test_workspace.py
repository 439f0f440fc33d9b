"""Memory that is used again: nothing is handed out while somebody still needs it."""

import copy
import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import autospec
from autospec.introspection import gathering, shares, spectra, stacks, watcher, workspace
from autospec.introspection.sorting import Sorting
from autospec.introspection.workspace import LARGEST_KEPT, Workspace

from .families import FAMILIES, Branches
from .oracle import record

FLOAT, CPU = torch.float32, torch.device("cpu")
LARGE = (LARGEST_KEPT // 4 + 1,)


@pytest.mark.parametrize("case", FAMILIES)
def test_spectra_are_the_same_where_every_sorted_copy_counts_as_large(case, monkeypatch):
    options = {"statistics": ("gradient", "activation", "adjoint", "contrast"), "activation": "unfolded"}
    made, given_back = FAMILIES[case](), []
    usual = record(copy.deepcopy(made), **options)
    original = Workspace.give_back
    monkeypatch.setattr(
        Workspace,
        "give_back",
        lambda self, tensor: given_back.append(tensor.shape) or original(self, tensor.fill_(1e9)),
    )
    for module in (workspace, shares):
        monkeypatch.setattr(module, "LARGEST_KEPT", 0)
    large = record(made, **options)
    if case in ("Linear, 3-D", "3-D network", "LSTM, twice", "Attention", "Linear, one input"):
        assert given_back  # where a step has few rows, all are kept
    for node in usual["layers"].children:
        for name, values in usual["layers"][node].data_vars.items():
            if values.dtype.kind != "f" or "floor" in name:
                continue
            scale = np.nanmax(np.abs(values.values), initial=0.0)
            difference = np.abs(values.values - large["layers"][node][name].values)
            assert np.nanmax(difference, initial=0.0) <= 2e-6 * scale, (node, name)


@pytest.mark.parametrize(
    "labels", [["a", "b"] * 4, ["a"] * 4 + ["b"] * 4, None], ids=["sorted", "in order", "no groups"]
)
@pytest.mark.parametrize("unused", [0, 1])
def test_an_input_of_several_layers_is_sorted_and_multiplied_out_once(unused, labels, monkeypatch):
    model, x = three_branches(unused)
    sort, grams, sorted_inputs, multiplied = Sorting.sort, spectra.column_gram, [], []

    def counted_sort(self, items, room=None):
        if items.shape[-1] == 6:
            sorted_inputs.append(items.shape)
        return sort(self, items, room)

    def counted_gram(rows, room):
        if rows.shape[-1] == 6:
            multiplied.append(rows.shape)
        return grams(rows, room)

    monkeypatch.setattr(Sorting, "sort", counted_sort)
    for module in (stacks, gathering):  # where it is asked for, and where it is forgotten
        monkeypatch.setattr(module, "column_gram", counted_gram)
    with autospec.watch(model, labels, statistics=("gradient", "activation"), audit=100, quiet=True) as watching:
        for _ in range(3):
            model(x).square().sum().backward()
            watching.step()
            model.zero_grad()
        del sorted_inputs[:], multiplied[:]
        model(x).square().sum().backward()
        watching.step()
    assert len(sorted_inputs) == 2  # the hidden layer's output, and the adjoint of the first layer
    assert len(multiplied) == (2 if labels else 1)


@pytest.mark.parametrize("unused", [0, 1])
def test_nothing_is_kept_for_a_layer_that_the_loss_does_not_use_beyond_one_backward_pass(unused):
    model, x = three_branches(unused)
    with autospec.watch(model, ["a", "b"] * 4, audit=100, quiet=True) as watching:
        held = []
        for _ in range(4):
            model(x).square().sum().backward()
            held.append((len(watching._gathering._sorted_inputs), len(watching._gathering.workspace._known)))
        watching.step()
        assert watching._gathering._sorted_inputs == {}
    assert held[1:] == held[:1] * 3
    assert held[0][0] == unused


def test_evaluations_of_the_loss_between_two_updates_take_no_more_memory_than_one():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20)), torch.randn(64, 30)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=12)
    held = []

    def evaluate():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        held.append(sum(map(len, watching._gathering.workspace._tensors.values())))
        return loss

    with autospec.watch(model, ["a", "b", "c", "d"] * 16, quiet=True) as watching:
        optimizer.step(evaluate)
        watching.step()
    assert len(held) > 5
    assert held[1:] == held[:1] * (len(held) - 1)
    assert held[0] > 0


def three_branches(unused):
    torch.manual_seed(0)
    model = Branches(nn.Linear(7, 6), *(nn.Linear(6, 5) for _ in range(3)), unused=unused)
    return model, torch.randn(8, 9, 7)


def test_a_large_tensor_is_handed_out_again_once_it_is_given_back_and_no_earlier():
    room = Workspace()
    first, second = room.take(LARGE, FLOAT, CPU), room.take(LARGE, FLOAT, CPU)
    assert first.data_ptr() != second.data_ptr()
    room.give_back(first)
    assert room.take(LARGE, FLOAT, CPU) is first
    room.give_back(first)
    room.take_back()
    assert room.take(LARGE, FLOAT, CPU) is first


def test_large_tensors_that_a_step_did_not_need_are_given_up():
    room = Workspace()
    room.give_back(room.take(LARGE, FLOAT, CPU))
    room.take_back()
    room.take((3,), FLOAT, CPU)
    room.take_back()
    assert room._large == {}


def test_small_tensors_stay_until_the_end_of_the_step():
    room = Workspace()
    first = room.take((3,), FLOAT, CPU)
    room.give_back(first)
    assert room.take((3,), FLOAT, CPU) is not first
    room.take_back()
    assert room.take((3,), FLOAT, CPU) is first


def test_scratch_memory_is_used_again_and_given_up_once_it_is_far_too_large():
    room = Workspace()
    large = room.scratch("products", (1000,), FLOAT, CPU)
    assert room.scratch("products", (30, 30), FLOAT, CPU).data_ptr() == large.data_ptr()
    assert room.scratch("patches", (30, 30), FLOAT, CPU).data_ptr() != large.data_ptr()
    room.take_back()
    assert room.scratch("products", (10,), FLOAT, CPU).data_ptr() == large.data_ptr()
    room.take_back()
    assert room.scratch("products", (10,), FLOAT, CPU).untyped_storage().nbytes() == 40


MAPPED = """
import ctypes
import torch
from autospec.introspection.workspace import keep_freed_memory

class Info(ctypes.Structure):  # man mallinfo2
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info

def mapped_for_a_tensor():
    before = mallinfo().hblkhd
    tensor = torch.zeros(5 * 2**20)
    return mallinfo().hblkhd - before

print(mapped_for_a_tensor())
keep_freed_memory()
print(mapped_for_a_tensor())
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer, which can tell what it maps"
)
def test_large_matrices_come_from_memory_that_is_kept_and_not_each_from_the_system():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    out = subprocess.run([sys.executable, "-c", MAPPED], env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, out.stdout.split())
    assert before >= 20 * 2**20
    assert after == 0


def test_entering_the_block_keeps_freed_memory(monkeypatch):
    kept = []
    monkeypatch.setattr(watcher, "keep_freed_memory", lambda: kept.append(True))
    model = nn.Linear(3, 2)
    made = autospec.watch(model, quiet=True)
    assert not kept
    with made:
        assert kept
