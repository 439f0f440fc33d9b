"""Trajectories on disk: readable by anyone while they grow and after, reproducible, continued without a seam."""

import contextlib
import functools
import json
import re
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch import nn

import autospec
from autospec import trajectories
from autospec.errors import UserError
from autospec.introspection import WatchError

N = 10
LABELS = ["a", "b", "é b", None, "a"] * 2
CHUNK = 64


def network():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))


class Loop:
    """A training that can stop, keep its state and go on."""

    def __init__(self, **options):
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.x = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
        self.watcher = autospec.watch(self.model, LABELS, **{"attributes": {"seed": 4, "name": "é"}, **options})

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.model(self.x) - self.x).square().mean().backward()
            self.watcher.step()
            self.optimizer.step()

    def state(self):
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return json.dumps(self.watcher.state_dict()), {k: _clone(v) for k, v in saved.items()}

    def load(self, state):
        watcher, saved = state
        self.watcher.load_state_dict(json.loads(watcher))
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])


def _clone(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clone(item) for item in value]
    return value


def train(steps, **options):
    loop = Loop(**options)
    with loop.watcher:
        loop.run(steps)
    return loop.watcher.trajectories


@functools.cache
def in_memory(steps):
    """Records of a training that nothing interrupts and no store touches."""
    return train(steps)


def readers(path):
    """Open a store in the three ways that we promise."""
    yield autospec.open_trajectories(path)
    if path.suffix == ".zip":
        with zarr.storage.ZipStore(path, mode="r") as store, xr.open_datatree(store, engine="zarr") as tree:
            yield tree.load()
    else:
        with xr.open_datatree(path, engine="zarr") as tree:
            yield tree.load()


@pytest.mark.parametrize("name", ["x.zarr", "x.zarr.zip"])
@pytest.mark.parametrize("steps", [1, CHUNK, 150])
def test_the_reopened_store_is_identical_to_the_tree_in_memory(tmp_path, name, steps):
    memory, stored = in_memory(steps), train(steps, store=tmp_path / name)
    assert memory.sizes["step"] == steps
    xr.testing.assert_identical(stored, memory)
    for tree in readers(tmp_path / name):
        xr.testing.assert_identical(tree, memory)
        assert tree.attrs["name"] == "é"
        assert tree["layers/0.weight/gradient"].sel(group="é b", index=1).shape == (steps,)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def plain(path):
    with zarr.storage.ZipStore(path, mode="r") if path.suffix == ".zip" else zarr.storage.LocalStore(path) as store:
        group = zarr.open_group(store, mode="r")
        return {
            name: (a.shape, a.chunks, a.metadata, a[...]) for name, a in group.members(None) if hasattr(a, "chunks")
        }


@pytest.mark.parametrize("name", ["x.zarr", "x.zarr.zip"])
def test_plain_zarr_reads_the_arrays_their_names_and_their_chunks(tmp_path, name):
    tree = train(70, store=tmp_path / name, singular_values="all")
    arrays = plain(tmp_path / name)
    shape, chunks, metadata, values = arrays["layers/0.weight/gradient"]
    assert shape == (70, 4, 5)
    assert chunks == (CHUNK, 4, 5)
    assert metadata.dimension_names == ("step", "group", "index")
    np.testing.assert_array_equal(values, tree["layers/0.weight/gradient"].values)
    assert arrays["group"][3].tolist() == ["all", "a", "b", "é b"]
    assert arrays["step"][3].tolist() == list(range(70))


def test_no_text_has_a_fixed_width_in_memory_or_on_disk(tmp_path):
    for tree in (in_memory(3), train(3, store=tmp_path / "x.zarr")):
        for node in tree.subtree:
            for array in node.to_dataset(inherit=False).variables.values():
                assert array.dtype.kind not in "US"
    for file in (tmp_path / "x.zarr").rglob("zarr.json"):
        text = file.read_text()
        assert "fixed_length" not in text
        assert "utf32" not in text
    assert json.loads((tmp_path / "x.zarr" / "group" / "zarr.json").read_text())["data_type"] == "string"


@pytest.mark.parametrize("name", ["x.zarr", "x.zarr.zip"])
def test_a_growing_store_is_whole_after_every_64_recorded_steps(tmp_path, name):
    folder = tmp_path / (name if name == "x.zarr" else "x.zarr.zip.partial")
    loop = Loop(store=tmp_path / name)
    with loop.watcher:
        for steps, stored in ((CHUNK - 1, 0), (1, CHUNK), (CHUNK - 1, CHUNK), (1, 2 * CHUNK), (9, 2 * CHUNK)):
            loop.run(steps)
            assert folder.exists() == bool(stored)
            if stored:
                expected = in_memory(150).isel(step=slice(stored))
                xr.testing.assert_equal(autospec.open_trajectories(folder), expected)


def test_a_reader_sees_a_consistent_store_at_any_moment_of_a_write(tmp_path, monkeypatch):
    path, memory, moments, saved, written = tmp_path / "x.zarr", in_memory(150), [], [], []
    save, write = zarr.consolidate_metadata, zarr.Array.__setitem__

    def look():
        if not path.exists():
            with pytest.raises(UserError, match="a store that grows appears with its first 64"):
                autospec.open_trajectories(path)
            moments.append(0)
            return
        for tree in readers(path):
            count = tree.sizes["step"]
            xr.testing.assert_equal(tree, memory.isel(step=slice(count)))
        arrays = {n: v for n, v in plain(path).items() if v[2].dimension_names[0] == "step"}
        assert {shape[0] for shape, *_ in arrays.values()} == {count}
        moments.append(count)

    def watched_write(array, *args):
        write(array, *args)
        written.append(array.path)
        if len(written) % 3 == 0:
            look()

    def watched_save(*args, **kwargs):
        look()
        saved.append(save(*args, **kwargs))
        look()

    monkeypatch.setattr(zarr.Array, "__setitem__", watched_write)
    monkeypatch.setattr(zarr, "consolidate_metadata", watched_save)
    loop = Loop(store=path)
    with loop.watcher:
        loop.run(80)
        loop.watcher.state_dict()  # a part of a chunk is written, and written over later
        loop.run(70)
    assert sorted(set(moments)) == [0, 64, 80, 144, 150]
    assert moments == sorted(moments)
    assert len(moments) > 15


def test_two_identical_trainings_give_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        train(70, store=tmp_path / folder / "x.zarr.zip")
    first, second = ((tmp_path / folder / "x.zarr.zip").read_bytes() for folder in ("one", "two"))
    assert first == second
    with zipfile.ZipFile(tmp_path / "one" / "x.zarr.zip") as archive:
        names = archive.namelist()
        assert names == sorted(names)
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.testzip() is None
    train(71, store=tmp_path / "other.zarr.zip")
    assert (tmp_path / "other.zarr.zip").read_bytes() != first


@pytest.mark.parametrize(
    ("stored", "at", "options"),
    [
        (None, 20, {}),
        (None, 20, {"singular_values": "all", "audit": 5}),
        ("x.zarr", 20, {}),
        ("x.zarr", CHUNK, {"singular_values": "all", "audit": 5}),
        ("x.zarr", 100, {"every": 3}),
        ("x.zarr.zip", 100, {}),
    ],
)
def test_a_resumed_training_continues_without_a_seam_and_drops_later_records(tmp_path, stored, at, options):
    expected = train(140, **options) if options else in_memory(140)
    store = {} if stored is None else {"store": tmp_path / stored}
    first = Loop(**store, **options)
    with contextlib.suppress(KeyboardInterrupt), first.watcher:
        first.run(at)
        state = first.state()
        first.run(35)
        raise KeyboardInterrupt
    again = Loop(**store, **options, **({"resume": True} if stored else {}))
    again.load(state)
    with again.watcher:
        again.run(140 - at)
    xr.testing.assert_identical(again.watcher.trajectories, expected)
    if stored:
        xr.testing.assert_identical(autospec.open_trajectories(tmp_path / stored), expected)


def test_a_resumed_store_has_the_bytes_of_one_that_was_never_interrupted(tmp_path):
    train(100, store=tmp_path / "whole.zarr.zip")
    first = Loop(store=tmp_path / "parts.zarr.zip")
    with contextlib.suppress(KeyboardInterrupt), first.watcher:
        first.run(70)
        state = first.state()
        first.run(80)
        raise KeyboardInterrupt
    again = Loop(store=tmp_path / "parts.zarr.zip", resume=True)
    again.load(state)
    with again.watcher:
        again.run(30)
    assert (tmp_path / "parts.zarr.zip").read_bytes() == (tmp_path / "whole.zarr.zip").read_bytes()


def test_a_state_is_a_snapshot_and_what_was_recorded_before_can_be_read_at_once():
    loop = Loop(singular_values="all", audit=1)
    with loop.watcher:
        loop.run(3)
        state, tree = loop.watcher.state_dict(), loop.watcher.trajectories
        kept = json.dumps(state)
        loop.run(2)
    assert json.dumps(state) == kept
    assert tree.attrs["audit"]["steps"] == [0, 1, 2]
    again = Loop(singular_values="all", audit=1)
    again.watcher.load_state_dict(state)
    xr.testing.assert_identical(again.watcher.trajectories, tree)


def test_a_state_survives_a_checkpoint_file_that_holds_weights_only(tmp_path):
    loop = Loop()
    with loop.watcher:
        loop.run(3)
        torch.save(loop.watcher.state_dict(), tmp_path / "state.pt")
        expected = loop.watcher.trajectories
    again = Loop()
    again.watcher.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    xr.testing.assert_identical(again.watcher.trajectories, expected)


def test_a_write_that_was_cut_off_is_put_right_on_resuming(tmp_path, monkeypatch):
    expected = in_memory(140)
    first = Loop(store=tmp_path / "x.zarr")
    write, calls = zarr.Array.__setitem__, []

    def pull_the_plug(array, *args):
        calls.append(array.path)
        if len(calls) > 5:
            raise OSError("pulled")
        write(array, *args)

    with monkeypatch.context() as patch, contextlib.suppress(OSError), first.watcher:
        first.run(CHUNK)
        state = first.state()
        patch.setattr(zarr.Array, "__setitem__", pull_the_plug)
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of the records that could not be stored
        first.run(CHUNK)
    assert len(calls) > 5
    assert autospec.open_trajectories(tmp_path / "x.zarr").sizes["step"] == CHUNK
    again = Loop(store=tmp_path / "x.zarr", resume=True)
    again.load(state)
    with again.watcher:
        again.run(140 - CHUNK)
    xr.testing.assert_identical(autospec.open_trajectories(tmp_path / "x.zarr"), expected)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("failing", [1, 4, 9])
def test_a_write_that_failed_once_is_made_again_on_leaving_the_block(tmp_path, monkeypatch, chunk, failing):
    write, calls = zarr.Array.__setitem__, []

    def fill_the_disk(array, *args):
        calls.append(array.path)
        if len(calls) == failing:
            raise OSError("no space left on device")
        write(array, *args)

    loop = Loop(store=tmp_path / "x.zarr")
    with monkeypatch.context() as patch, contextlib.suppress(OSError), loop.watcher:
        loop.run((chunk - 1) * CHUNK)
        patch.setattr(zarr.Array, "__setitem__", fill_the_disk)
        loop.run(CHUNK)
    assert len(calls) > failing
    xr.testing.assert_identical(autospec.open_trajectories(tmp_path / "x.zarr"), in_memory(chunk * CHUNK))


def test_a_store_that_never_could_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    loop = Loop(store=tmp_path / "x.zarr")
    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with (
        pytest.warns(UserWarning, match="last records could not be stored: no space left"),
        pytest.raises(OSError, match="no space left"),
        loop.watcher,
    ):
        loop.run(CHUNK)
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_a_killed_write_had_just_begun_is_put_right_on_resuming(tmp_path, monkeypatch):
    def begin(store):
        loop = Loop(store=store)
        loop.model[0].weight.requires_grad_(False)
        return loop

    whole = begin(tmp_path / "whole.zarr")
    with whole.watcher:
        whole.run(CHUNK)
        whole.model[0].weight.requires_grad_(True)
        whole.run(10)
    first = begin(tmp_path / "x.zarr")
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt), first.watcher:
        first.run(CHUNK)
        state = first.state()
        first.model[0].weight.requires_grad_(True)
        patch.setattr(zarr, "consolidate_metadata", _killed)
        first.run(CHUNK)
    again = Loop(store=tmp_path / "x.zarr", resume=True)
    again.load(state)
    with again.watcher:
        again.run(10)
    expected = autospec.open_trajectories(tmp_path / "whole.zarr")
    xr.testing.assert_identical(autospec.open_trajectories(tmp_path / "x.zarr"), expected)


def _killed(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["x.zarr", "x.zarr.zip"])
def test_two_watchers_do_not_write_to_one_store(tmp_path, name):
    one, two = Loop(store=tmp_path / name), Loop(store=tmp_path / name)
    with one.watcher:
        one.run(CHUNK)
        with (
            pytest.warns(UserWarning, match="could not be stored"),
            pytest.raises(UserError, match=r"x\.zarr.*(exists already|has not ended)"),
            two.watcher,
        ):
            two.run(CHUNK)
        with pytest.raises(UserError, match=r"exists already|has not ended"):
            _ = two.watcher.trajectories
        one.run(6)
    xr.testing.assert_identical(autospec.open_trajectories(tmp_path / name), in_memory(70))
    late = Loop(store=tmp_path / "y.zarr.zip")
    train(3, store=tmp_path / "y.zarr.zip")
    with pytest.raises(UserError, match="exists already"), late.watcher:
        late.run(2)
    assert autospec.open_trajectories(tmp_path / "y.zarr.zip").sizes["step"] == 3


def test_a_state_without_records_deletes_nobody_elses_store(tmp_path):
    late = Loop(store=tmp_path / "x.zarr")
    state = late.watcher.state_dict()
    train(3, store=tmp_path / "x.zarr")
    with pytest.raises(UserError, match="exists already"):
        late.watcher.load_state_dict(state)
    assert autospec.open_trajectories(tmp_path / "x.zarr").sizes["step"] == 3


def test_a_step_that_could_not_be_stored_is_not_recorded_twice(tmp_path, monkeypatch):
    write, calls = zarr.Array.__setitem__, []

    def fill_the_disk(array, *args):
        calls.append(array.path)
        if len(calls) == 4:
            raise OSError("no space left on device")
        write(array, *args)

    monkeypatch.setattr(zarr.Array, "__setitem__", fill_the_disk)
    loop = Loop(store=tmp_path / "x.zarr")
    with loop.watcher:
        for _ in range(70):
            loop.optimizer.zero_grad()
            (loop.model(loop.x) - loop.x).square().mean().backward()
            with contextlib.suppress(OSError):
                loop.watcher.step()
            loop.optimizer.step()
    xr.testing.assert_identical(autospec.open_trajectories(tmp_path / "x.zarr"), in_memory(70))


def test_two_trainings_that_resume_one_store_are_found_out(tmp_path):
    first = Loop(store=tmp_path / "x.zarr")
    with first.watcher:
        first.run(10)
        state = first.state()
    one, two = (Loop(store=tmp_path / "x.zarr", resume=True) for _ in range(2))
    one.load(state)
    two.load(state)
    with one.watcher:
        one.run(5)
    with (
        pytest.raises(UserError, match=r"holds 15 steps instead of the 10 .* give each watcher a store of its own"),
        two.watcher,
    ):
        two.run(5)


@pytest.mark.parametrize("store", [{}, {"store": "x.zarr"}], ids=["memory", "store"])
def test_what_ended_the_loop_is_seen_where_the_last_records_fail_too(tmp_path, monkeypatch, store):
    monkeypatch.chdir(tmp_path)

    def broken(_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    loop = Loop(**store)

    def train_and_break():
        with loop.watcher:
            loop.run(3)
            monkeypatch.setattr(type(loop.watcher._measurement), "finish", broken)
            raise KeyError("the loop's own")

    with (
        pytest.warns(UserWarning, match="last records could not be stored: CUDA error"),
        pytest.raises(KeyError, match="the loop's own"),
    ):
        train_and_break()
    monkeypatch.undo()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loop.model.modules())
    with autospec.watch(loop.model, LABELS, quiet=True):
        pass


def test_a_warning_as_an_error_on_leaving_the_block_loses_no_record(tmp_path):
    loop = Loop(store=tmp_path / "x.zarr.zip")
    with warnings.catch_warnings(), contextlib.suppress(UserWarning):
        warnings.simplefilter("error")
        with loop.watcher:
            loop.run(5)
            loop.model.append(nn.Linear(5, 5))
    xr.testing.assert_identical(autospec.open_trajectories(tmp_path / "x.zarr.zip"), in_memory(5))


def test_a_store_that_was_deleted_meanwhile_is_missed(tmp_path):
    loop = Loop(store=tmp_path / "x.zarr")
    with loop.watcher:
        loop.run(3)
        loop.watcher.state_dict()
        shutil.move(tmp_path / "x.zarr", tmp_path / "elsewhere")
        loop.run(3)
        with pytest.raises(UserError, match=r"x\.zarr is gone, in which this watcher wrote 3 steps"):
            loop.watcher.state_dict()
        shutil.move(tmp_path / "elsewhere", tmp_path / "x.zarr")
    xr.testing.assert_identical(loop.watcher.trajectories, in_memory(6))


def test_an_unfinished_record_is_not_deleted_by_a_training_that_begins_again(tmp_path):
    first = Loop(store=tmp_path / "x.zarr.zip")
    with contextlib.suppress(KeyboardInterrupt), first.watcher:
        first.run(3)
        raise KeyboardInterrupt
    with pytest.raises(
        UserError, match=r"x\.zarr\.zip\.partial holds the records of a training that has not ended: .*resume=True"
    ):
        Loop(store=tmp_path / "x.zarr.zip")
    xr.testing.assert_equal(autospec.open_trajectories(tmp_path / "x.zarr.zip.partial"), in_memory(3))


@pytest.mark.parametrize("name", [None, "x.zarr", "x.zarr.zip"])
def test_a_block_that_is_entered_again_continues_the_record(tmp_path, name):
    loop = Loop(**({} if name is None else {"store": tmp_path / name}))
    for _ in range(2):
        with loop.watcher:
            loop.run(3)
    xr.testing.assert_identical(loop.watcher.trajectories, in_memory(6))
    if name:
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_names_of_the_records_own_attributes_are_refused():
    with pytest.raises(WatchError, match=r"attributes= holds \['layers'\].*choose other names"):
        Loop(attributes={"layers": 3})


def test_files_that_were_cut_off_are_not_packed(tmp_path):
    train(100, store=tmp_path / "whole.zarr.zip")
    first = Loop(store=tmp_path / "parts.zarr.zip")
    with contextlib.suppress(KeyboardInterrupt), first.watcher:
        first.run(70)
        state = first.state()
        raise KeyboardInterrupt
    # What zarr leaves behind when it is killed while it writes a chunk.
    (chunk,) = (tmp_path / "parts.zarr.zip.partial/layers/0.weight/gradient").glob("c/0/0/0")
    chunk.with_name("0.0123abcd.partial").write_bytes(chunk.read_bytes()[:50])
    again = Loop(store=tmp_path / "parts.zarr.zip", resume=True)
    again.load(state)
    with again.watcher:
        again.run(30)
    assert (tmp_path / "parts.zarr.zip").read_bytes() == (tmp_path / "whole.zarr.zip").read_bytes()


@pytest.mark.parametrize("discard", [True, False])
def test_a_pass_that_failed_can_be_made_again(discard):
    loop = Loop()
    with loop.watcher:
        loop.run(3)
        (loop.model(loop.x[:7].repeat(N, 1)[:N]) - loop.x).square().mean().backward()  # what shall not count
        loop.optimizer.zero_grad()
        if discard:
            loop.watcher.discard()
            with pytest.raises(WatchError, match="no gradient of a watched layer has arrived"):
                loop.watcher.step()
        loop.run(2)
    xr.testing.assert_identical(loop.watcher.trajectories, in_memory(5))


OTHERS = {
    "groups": {"groups": ["a", "b", "c", None, "a"] * 2},
    "groups that come later": {"groups": None},
    "layers": {"layers": ["0.weight"]},
    "statistics": {"statistics": ["gradient"]},
    "options": {"activation": "unfolded"},
    "options, positions": {"per_position": True},
    "options, angles": {"angles": 2},
    "singular values": {"singular_values": [1, 3]},
}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("what", OTHERS)
def test_the_state_of_a_watcher_made_in_another_way_is_refused(tmp_path, what, stored):
    store = {"store": tmp_path / "x.zarr"} if stored else {}
    first = Loop(**store)
    with first.watcher:
        first.run(3)
        state = json.loads(json.dumps(first.watcher.state_dict()))
    resumed = {**store, "resume": True} if stored else {}
    other = autospec.watch(network(), **{"groups": LABELS, **OTHERS[what], **resumed})
    with pytest.raises(
        WatchError,
        match=f"saved by a watcher with other {re.split(' that|,', what)[0]}.*make the watcher as that one was",
    ):
        other.load_state_dict(state)


def test_resuming_without_a_state_is_refused_instead_of_recording_steps_twice(tmp_path):
    loop = Loop(store=tmp_path / "x.zarr")
    with loop.watcher:
        loop.run(70)
    again = Loop(store=tmp_path / "x.zarr", resume=True)
    with pytest.raises(UserError, match="load_state_dict"), again.watcher:
        again.run(3)
    assert autospec.open_trajectories(tmp_path / "x.zarr").sizes["step"] == 70


def test_resuming_where_nothing_was_written_begins_a_store(tmp_path):
    loop = Loop(store=tmp_path / "x.zarr", resume=True)
    with loop.watcher:
        loop.run(5)
    xr.testing.assert_identical(autospec.open_trajectories(tmp_path / "x.zarr"), in_memory(5))


def test_resuming_beyond_what_the_store_holds_is_refused(tmp_path):
    loop = Loop(store=tmp_path / "x.zarr")
    with loop.watcher:
        loop.run(70)
        state = loop.state()
    again = Loop(store=tmp_path / "y.zarr", resume=True)
    with pytest.raises(UserError, match=r"y\.zarr is missing, but 70 recorded steps"):
        again.load(state)
    train(20, store=tmp_path / "z.zarr")
    shorter = Loop(store=tmp_path / "z.zarr", resume=True)
    with pytest.raises(UserError, match=r"fewer steps \(20\) than 70"):
        shorter.load(state)


def test_larger_batches_later_raise_the_rank_limit_on_disk_too(tmp_path):
    trees = []
    for store in (None, tmp_path / "x.zarr"):
        model, x = nn.Linear(5, 4), torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
        torch.nn.init.constant_(model.weight, 0.1)
        with autospec.watch(model, LABELS, store=store) as watcher:
            for step in range(80):
                rows = [0, 1] if step < 70 else list(range(N))
                watcher.set_groups([LABELS[i] for i in rows])
                model.zero_grad()
                model(x[rows]).tanh().sum().backward()
                watcher.step()
        trees.append(watcher.trajectories["layers/weight/rank_limit"].values.tolist())
    assert trees == [[4, 4, 2, 2], [4, 4, 2, 2]]


class Changing(nn.Module):
    """A layer that is frozen for some steps, and one that reads sequences of any length."""

    def __init__(self):
        super().__init__()
        self.read, self.decide = nn.Linear(5, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.decide(torch.tanh(self.read(x)).mean(1))


CHANGES = {
    "frozen at first": (lambda step: step < 70, lambda step: 3),
    "frozen later": (lambda step: step >= 64, lambda step: 3),
    "longer sequences later": (lambda step: False, lambda step: 3 if step < 70 else 6),
    "shorter sequences later": (lambda step: False, lambda step: 6 if step < 70 else 3),
}


@pytest.mark.parametrize("name", ["x.zarr", "x.zarr.zip"])
@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_from_one_chunk_to_the_next_is_stored_as_it_is_in_memory(tmp_path, case, name):
    frozen, length = CHANGES[case]

    def train_with(**options):
        torch.manual_seed(5)
        model, x = Changing(), torch.randn(N, 6, 5)
        recorded = ["gradient", "activation", "adjoint", "contrast", "cosine", "angles"]
        given = {"statistics": recorded, "per_position": True, "singular_values": "all", "quiet": True}
        with autospec.watch(model, LABELS, **given, **options) as watcher:
            for step in range(150):
                model.read.weight.requires_grad_(not frozen(step))
                model.zero_grad()
                model(x[:, : length(step)]).square().mean().backward()
                watcher.step()
        return watcher.trajectories

    stored, expected = train_with(store=tmp_path / name), train_with()
    for node in expected.subtree:
        found = stored[node.path].to_dataset(inherit=False)
        xr.testing.assert_equal(found, node.to_dataset(inherit=False))
    assert not frozen(65) or np.isnan(expected["layers/read.weight/alignment"].sel(step=65)).all()


def test_a_training_that_fails_leaves_its_records_readable(tmp_path):
    loop = Loop(store=tmp_path / "x.zarr.zip")
    with contextlib.suppress(RuntimeError), loop.watcher:
        loop.run(70)
        raise RuntimeError("out of memory")
    assert not (tmp_path / "x.zarr.zip").exists()
    assert loop.watcher.trajectories.sizes["step"] == 70


def test_opening_what_is_not_there_or_not_whole_gives_one_clear_sentence(tmp_path):
    train(3, store=tmp_path / "x.zarr.zip")
    whole = (tmp_path / "x.zarr.zip").read_bytes()
    with pytest.raises(UserError, match=r"no trajectories at .*absent\.zarr"):
        autospec.open_trajectories(tmp_path / "absent.zarr")
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.zarr.zip").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.zarr\.zip is not a readable store of trajectories") as raised:
            autospec.open_trajectories(tmp_path / "cut.zarr.zip")
        assert "\n" not in str(raised.value)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(UserError, match=r"empty\.zarr is not a readable store"):
        autospec.open_trajectories(tmp_path / "empty.zarr")


@pytest.mark.parametrize("damage", ["flipped", "other"])
def test_a_damaged_store_gives_one_clear_sentence(tmp_path, damage):
    train(3, store=tmp_path / "x.zarr.zip")
    train(3, store=tmp_path / "x.zarr")
    whole = bytearray((tmp_path / "x.zarr.zip").read_bytes())
    if damage == "flipped":
        with zipfile.ZipFile(tmp_path / "x.zarr.zip") as archive:
            entry = archive.getinfo("layers/0.weight/gradient/c/0/0/0")
        whole[entry.header_offset + 80] ^= 0xFF
        (tmp_path / "x.zarr.zip").write_bytes(whole)
        chunk = next((tmp_path / "x.zarr" / "layers" / "0.weight" / "gradient" / "c").rglob("0/0/0"), None)
        chunk = chunk or tmp_path / "x.zarr/layers/0.weight/gradient/c/0/0/0"
        chunk.write_bytes(chunk.read_bytes()[:-9])
    else:
        with zipfile.ZipFile(tmp_path / "x.zarr.zip", "w") as archive:
            archive.writestr("letter.txt", "hello")
        (tmp_path / "x.zarr" / "zarr.json").write_text("{")
    for name in ("x.zarr.zip", "x.zarr"):
        with pytest.raises(UserError, match="not a readable store of trajectories") as raised:
            autospec.open_trajectories(tmp_path / name)
        assert len(str(raised.value)) < 1000


def test_training_curves_stand_beside_the_layers_and_can_be_replaced(tmp_path):
    train(3, store=tmp_path / "x.zarr")
    for loss in ([3.0, 2.0, 1.0], [3.0, 2.5, 2.0]):
        trajectories.add_training_curves(tmp_path / "x.zarr", {"loss": np.array(loss)})
        tree = autospec.open_trajectories(tmp_path / "x.zarr")
        assert tree["training/loss"].values.tolist() == loss
        assert tree["training/update"].values.tolist() == [0, 1, 2]
        assert tree["layers/0.weight/gradient"].shape == (3, 4, 4)


def test_a_store_of_something_else_is_refused(tmp_path):
    xr.Dataset({"x": ("sample", [1.0, 2.0])}).to_zarr(tmp_path / "other.zarr", consolidated=False)
    with pytest.warns(RuntimeWarning, match="consolidated"), pytest.raises(ValueError, match="not one of trajectories"):
        autospec.open_trajectories(tmp_path / "other.zarr")
