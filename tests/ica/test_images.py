"""Opening images, their repetition time, and writing them reproducibly."""

import gzip
import json
import os

import nibabel as nib
import numpy as np
import pytest

from autospec.errors import UserError
from autospec.ica import images
from autospec.ica.images import (
    open_image,
    open_series,
    read_json,
    read_mask,
    read_volumes,
    repetition_time,
    same_grid,
    space_warnings,
    to_grid,
    write_image,
)
from autospec.ica.preprocessing import read_voxels
from tests.ica.conftest import AFFINE, save


def small(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def damaged(kind):
    """A function that makes a bad file, and what is said of it."""

    def missing(path):
        pass

    def empty(path):
        path.write_bytes(b"")

    def annex(path):
        path.write_text("/annex/objects/MD5E-s123--abc.nii.gz\n")

    def relative_annex(path):
        path.write_text("../../.git/annex/objects/Xx/1/MD5E-s123--abc.nii.gz/MD5E-s123--abc.nii.gz")

    def link(path):
        path.symlink_to("../.git/annex/objects/gone.nii.gz")

    def lfs(path):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")

    def text(path):
        path.write_text("this is no image at all, whatever its name says" * 20)

    def singular(path):
        save(path, small(4, 4, 4, 3))
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[280:328] = np.zeros(12, "<f4").tobytes()  # srow_x, srow_y, srow_z
        path.write_bytes(gzip.compress(bytes(raw)))

    return {
        "missing": (missing, "there is no image"),
        "empty": (empty, "is empty"),
        "annex": (annex, "git-annex pointer.*datalad get"),
        "relative annex": (relative_annex, "git-annex pointer.*datalad get"),
        "link": (link, "link to nowhere.*datalad get"),
        "lfs": (lfs, "Git LFS pointer.*git lfs pull"),
        "text": (text, "no image that can be read"),
        "singular": (singular, "affine of .* is singular"),
    }[kind]


@pytest.mark.parametrize("kind", ["missing", "empty", "annex", "relative annex", "link", "lfs", "text", "singular"])
def test_what_is_no_image_is_refused_in_one_sentence(tmp_path, kind):
    make, sentence = damaged(kind)
    path = tmp_path / "bold.nii.gz"
    make(path)
    with pytest.raises(UserError, match=sentence) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 4, 4, 1), (4, 4, 4, 1, 1), (4, 4)])
def test_one_volume_is_no_series(tmp_path, shape):
    with pytest.raises(UserError, match="not a series of volumes"):
        open_series(save(tmp_path / "one.nii.gz", small(*shape), step=None))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_truncated_image_is_refused(tmp_path, bold, brain, ending, part):
    whole = save(tmp_path / f"whole{ending}", bold).read_bytes()
    path = tmp_path / f"cut{ending}"
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match=r"cut short or damaged") as caught:
        read_voxels(path, brain, AFFINE, None, 0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ones", [(), (1,)])
@pytest.mark.parametrize("volumes", [60, 7])
def test_a_gzipped_image_with_a_flipped_byte_is_refused(tmp_path, bold, brain, monkeypatch, ones, volumes):
    """A value that changed on its way from the archive: only the checksum at the file's end tells."""
    monkeypatch.setattr(images, "VALUES_AT_A_TIME", volumes * brain.size)
    path = save(tmp_path / "flipped.nii", bold.reshape(*bold.shape, *ones))
    content = gzip.compress(path.read_bytes(), 0)  # stored as it is, so that a flip changes nothing else
    middle = len(content) // 2
    path = tmp_path / "flipped.nii.gz"
    path.write_bytes(content)
    assert read_voxels(path, brain, AFFINE, None, 0).covered.any()
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])
    assert nib.load(path).get_fdata().shape[3] == 60  # nibabel alone does not see it
    for read in (lambda: read_voxels(path, brain, AFFINE, None, 0), lambda: read_volumes(path)):
        with pytest.raises(UserError, match=r"cut short or damaged .*CRC") as caught:
            read()
        assert str(path) in str(caught.value)


def test_masks_with_ones_behind_are_masks(tmp_path):
    inside = np.zeros((4, 5, 6), dtype=np.uint8)
    inside[1:3, 2, 3] = 1
    for number, values in enumerate((inside, inside[..., None], inside[..., None, None])):
        mask, affine = read_mask(save(tmp_path / f"{number}.nii.gz", values, step=None))
        assert mask.dtype == bool
        assert np.array_equal(mask, inside == 1)
        assert np.allclose(affine, AFFINE)


@pytest.mark.parametrize(
    ("values", "sentence"), [(np.zeros((3, 3, 3), "u1"), "is empty"), (np.ones((3, 3, 3, 2), "u1"), "has 2 volumes")]
)
def test_what_is_no_mask_is_refused(tmp_path, values, sentence):
    with pytest.raises(UserError, match=sentence):
        read_mask(save(tmp_path / "mask.nii.gz", values, step=None))


# ---------------------------------------------------------------------- repetition time


@pytest.mark.parametrize(
    ("step", "unit", "sidecar", "stated", "expected"),
    [
        (2.0, "sec", {}, None, 2.0),
        (2000.0, "msec", {}, None, 2.0),
        (2e6, "usec", {"RepetitionTime": 2}, None, 2.0),
        (2.0, "unknown", {}, None, 2.0),
        (1.0, "unknown", {"RepetitionTime": 2.5}, None, 2.5),  # what programs write that do not know
        (1.0, "sec", {}, None, 1.0),
        (0.0, "sec", {"RepetitionTime": 0.72}, None, 0.72),
        (0.0, "sec", {}, 3.0, 3.0),
        (2.0, "sec", {"RepetitionTime": 2.0004}, 2.0, 2.0),
    ],
)
def test_the_repetition_time_is_found(tmp_path, step, unit, sidecar, stated, expected):
    path = save(tmp_path / "bold.nii.gz", small(3, 3, 3, 4), step=step, unit=unit)
    assert repetition_time(open_image(path), path, sidecar, stated) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "unit", "sidecar", "stated", "sentence"),
    [
        (0.0, "sec", {}, None, "neither in its header nor in a JSON sidecar"),
        (1.0, "unknown", {}, None, "neither in its header nor in a JSON sidecar"),
        (2.0, "sec", {"RepetitionTime": 2.5}, None, "contradictory .*header says 2 s.*sidecar says 2.5 s"),
        (2.0, "sec", {}, 3.0, "contradictory .*repetition_time says 3 s"),
        (2000.0, "sec", {}, None, "2000 s, which no scan has"),
        (2.0, "sec", {"RepetitionTime": "two"}, None, "'two'.*must be a number"),
        (2.0, "sec", {"RepetitionTime": -2}, None, "must be a number of seconds"),
    ],
)
def test_a_repetition_time_that_cannot_be_is_refused(tmp_path, step, unit, sidecar, stated, sentence):
    path = save(tmp_path / "bold.nii.gz", small(3, 3, 3, 4), step=step, unit=unit)
    with pytest.raises(UserError, match=sentence) as caught:
        repetition_time(open_image(path), path, sidecar, stated)
    assert str(path) in str(caught.value)


def test_json_files_are_read_or_refused(tmp_path):
    assert read_json(None) == {}
    (tmp_path / "good.json").write_text(json.dumps({"RepetitionTime": 2}))
    assert read_json(tmp_path / "good.json") == {"RepetitionTime": 2}
    for content, sentence in (("{", "is no JSON file"), ("[1]", "holds no JSON object")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=sentence):
            read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "missing.json")


def test_scanner_coordinates_are_a_warning(tmp_path):
    for code, expected in ((1, 1), (2, 0), (4, 0)):
        image = nib.Nifti1Image(small(3, 3, 3, 3), AFFINE)
        image.set_sform(AFFINE, code)
        image.set_qform(AFFINE, code)
        nib.save(image, tmp_path / "image.nii")
        assert len(space_warnings(open_image(tmp_path / "image.nii"), "image.nii")) == expected


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    ("change", "codes", "expected"),
    [
        (np.diag([-1.0, 1, 1, 1]), (4, 4), 1),  # left and right, as two programs that read either would see them
        (np.diag([-1.0, 1, 1, 1]), (4, 0), 0),
        (np.diag([-1.0, 1, 1, 1]), (0, 4), 0),
        (np.diag([1.2, 1, 1, 1]), (4, 4), 1),  # the same origin, 200 * 0.2 mm at the other end
        (np.diag([1.0001, 1, 1, 1]), (4, 2), 0),
        (np.eye(4), (4, 4), 0),
    ],
)
def test_two_affines_that_differ_are_a_warning(tmp_path, kind, change, codes, expected):
    sform = np.diag([9.0, 9, 9, 1])
    sform[:3, 3] = [-90, -110, -70]
    image = kind(small(20, 4, 4, 3), sform)
    image.set_sform(sform, codes[0])
    image.set_qform(change @ sform, codes[1])
    nib.save(image, tmp_path / "image.nii")
    read = open_image(tmp_path / "image.nii")
    found = space_warnings(read, tmp_path / "image.nii")
    assert found == ["the sform and the qform of image.nii do not agree within 1 mm; the sform is used"] * expected
    if codes[0]:
        assert np.allclose(read.affine, sform)


def test_a_qform_that_is_no_rotation_is_a_warning(tmp_path):
    image = nib.Nifti1Image(small(3, 3, 3, 3), AFFINE)
    image.set_sform(AFFINE, 4)
    image.set_qform(AFFINE, 4)
    image.header["quatern_b"] = 5
    nib.save(image, tmp_path / "image.nii")
    (said,) = space_warnings(open_image(tmp_path / "image.nii"), "image.nii")
    assert said.endswith("do not agree within 1 mm; the sform is used")


# ---------------------------------------------------------------------- grids, and writing


def test_equal_dimensions_are_not_the_same_grid():
    moved = AFFINE.copy()
    moved[1, 3] += 1
    assert same_grid((4, 4, 4), AFFINE, (4, 4, 4, 9), AFFINE + 1e-5)
    assert not same_grid((4, 4, 4), AFFINE, (4, 4, 4), moved)
    assert not same_grid((4, 4, 4), AFFINE, (4, 4, 5), AFFINE)
    values = np.arange(64, dtype="f4").reshape(4, 4, 4)
    moved[1, 3] = AFFINE[1, 3] + 9
    assert np.array_equal(to_grid(values, AFFINE, (4, 4, 4), moved, "linear")[:, :3], values[:, 1:])


def test_the_same_values_give_the_same_bytes_whatever_name_and_time(tmp_path, monkeypatch):
    values = small(5, 6, 7, 3)
    write_image(values, AFFINE, tmp_path / "first.nii.gz")
    monkeypatch.setattr("time.time", lambda: 1.0)
    write_image(values.copy(order="F"), AFFINE, tmp_path / "second.nii.gz")
    first, second = ((tmp_path / f"{name}.nii.gz").read_bytes() for name in ("first", "second"))
    assert first == second
    assert first[4:8] == b"\0\0\0\0"  # no time
    assert first[3] == 0  # no name
    read, affine = read_volumes(tmp_path / "first.nii.gz")
    assert np.array_equal(read, values)
    assert np.allclose(affine, AFFINE)
    assert int(nib.load(tmp_path / "first.nii.gz").header["sform_code"]) == 4
    assert sorted(os.listdir(tmp_path)) == ["first.nii.gz", "second.nii.gz"]
