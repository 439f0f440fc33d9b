"""Time courses of an atlas and precomputed ones."""

import nibabel as nib
import numpy as np
import pytest

from autospec.errors import UserError
from autospec.ica.atlas import atlas_timecourses, read_timecourses
from tests.ica.conftest import VOLUMES, save


@pytest.fixture
def regions(brain):
    """Three slabs of the brain, numbered 1, 2 and 7."""
    numbers = np.zeros(brain.shape, dtype=np.int16)
    for number, slab in ((1, slice(4, 8)), (2, slice(8, 12)), (7, slice(12, 16))):
        numbers[:, :, slab] = number
    return numbers * brain


EVERY = np.arange(VOLUMES)


@pytest.mark.parametrize("smoothing", [0, 12.0])
def test_regions_are_those_of_nilearns_masker(tmp_path, subject, regions, smoothing):
    from nilearn.maskers import NiftiLabelsMasker

    atlas = save(tmp_path / "atlas.nii.gz", regions, step=None)
    courses, labels = atlas_timecourses(subject, atlas, ["low", "middle", "high"], EVERY, smoothing)
    masker = NiftiLabelsMasker(str(atlas), standardize=None, smoothing_fwhm=smoothing or None, keep_masked_labels=False)
    assert np.allclose(courses, masker.fit_transform(str(subject)), rtol=1e-4)
    assert labels == ["low", "middle", "high"]
    some, labels = atlas_timecourses(subject, atlas, None, EVERY[5:], smoothing)
    assert np.allclose(some, courses[5:])
    assert labels == ["region-001", "region-002", "region-003"]


def test_regions_are_means_over_voxels_with_signal(tmp_path, bold, regions):
    cut = bold.copy()
    cut[:, :, :6] = 0
    atlas = save(tmp_path / "atlas.nii.gz", regions, step=None)
    courses, _ = atlas_timecourses(save(tmp_path / "bold.nii.gz", cut), atlas, None, EVERY, 0)
    signal = np.where(np.arange(18) < 6, 0, regions)
    for k, number in enumerate((1, 2, 7)):
        assert np.allclose(courses[:, k], bold[signal == number].mean(axis=0), rtol=1e-5)


def test_maps_are_those_of_nilearns_masker(tmp_path, subject, template):
    from nilearn.maskers import NiftiMapsMasker

    atlas = save(tmp_path / "maps.nii.gz", template.maps, step=None)
    courses, _ = atlas_timecourses(subject, atlas, None, EVERY, 0)
    expected = NiftiMapsMasker(str(atlas), standardize=None).fit_transform(str(subject))
    assert np.allclose(courses, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "labels", "sentence"),
    [
        (lambda r: r.astype("f4") + 0.5, None, "whole numbers"),
        (lambda r: 0 * r, None, "is 0 everywhere"),
        (lambda r: r, ["one"], "3 regions, and there are 1 labels"),
    ],
)
def test_an_atlas_that_does_not_fit_is_refused(tmp_path, subject, regions, change, labels, sentence):
    atlas = save(tmp_path / "atlas.nii.gz", change(regions), step=None)
    with pytest.raises(UserError, match=sentence):
        atlas_timecourses(subject, atlas, labels, EVERY, 0)


def test_a_region_without_signal_is_refused(tmp_path, subject, regions, brain):
    outside = regions.copy()
    outside[0, 0, 0] = 9
    assert not brain[0, 0, 0]
    with pytest.raises(UserError, match=r"region-004 of the atlas .* has no signal"):
        atlas_timecourses(subject, save(tmp_path / "atlas.nii.gz", outside, step=None), None, EVERY, 0)


def test_precomputed_time_courses_are_read_from_tables_and_from_gifts_images(tmp_path):
    values = np.random.default_rng(0).normal(size=(30, 3))
    for name, separator in (("a.tsv", "\t"), ("a.csv", ","), ("a.tsv.gz", "\t")):
        import pandas as pd

        pd.DataFrame(values, columns=["x", "y", "z"]).to_csv(tmp_path / name, sep=separator, index=False)
        read, labels = read_timecourses(tmp_path / name)
        assert np.allclose(read, values)
        assert labels == ["x", "y", "z"]
    nib.save(nib.Nifti1Image(values.astype("f4"), np.eye(4)), tmp_path / "P_sub001_timecourses_ica_s1_.nii")
    read, labels = read_timecourses(tmp_path / "P_sub001_timecourses_ica_s1_.nii")
    assert np.allclose(read, values, atol=1e-6)
    assert labels == ["network-001", "network-002", "network-003"]


@pytest.mark.parametrize(
    ("content", "sentence"), [("a\tb\n1\tn/a\n", "missing values"), ("a\tb\n1\tx\n", "cannot be read"), (None, "cannot be read")]
)  # fmt: skip
def test_unusable_time_courses_are_refused(tmp_path, content, sentence):
    if content:
        (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_timecourses(tmp_path / "a.tsv")


def test_an_image_of_the_brain_is_no_time_course(subject):
    with pytest.raises(UserError, match="not of volumes x networks"):
        read_timecourses(subject)
