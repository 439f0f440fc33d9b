"""Preprocessing against scipy, GIFT's mask, confounds, and reading an image into a matrix."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import signal

from autospec.errors import UserError
from autospec.ica.preprocessing import (
    choose_confounds,
    gift_mask,
    gift_mask_of,
    motion_of,
    preprocess,
    read_confounds_table,
    read_voxels,
)
from tests.ica.conftest import AFFINE, SHAPE, VOLUMES, correlations, save


@pytest.fixture
def x():
    generator = np.random.default_rng(2)
    return 800 + generator.normal(size=(40, 1)) + generator.normal(scale=20, size=(40, 9000)).cumsum(axis=0)


def by_equation(x, kind):
    eps = 2.220446049250313e-16
    if kind == 2:
        x = x - x.mean(axis=0)
    if kind == 3:
        x = 100 * x / (x.mean(axis=0) + eps)
    if kind == 4:
        x = signal.detrend(x, axis=0, type="linear")
        x = x / (x.std(axis=0, ddof=1) + eps)
    return x - x.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_the_four_types_follow_their_equations(x, kind):
    original = x.copy()
    assert np.allclose(preprocess(x, kind), by_equation(x, kind), rtol=1e-9, atol=1e-9)
    assert np.array_equal(x, original)
    single = preprocess(x.astype("f4"), kind)
    assert single.dtype == np.float32
    assert np.allclose(single, by_equation(x.astype("f4").astype("f8"), kind), rtol=1e-4, atol=1e-3)


def test_an_unknown_type_is_refused(x):
    with pytest.raises(UserError, match="no preprocessing of type 5"):
        preprocess(x, 5)


def test_per_cent_of_nothing_is_refused(x):
    with pytest.raises(UserError, match="voxels of mean 0"):
        preprocess(x - x.mean(axis=0), 3)


def test_gifts_mask_keeps_what_is_as_bright_as_the_mean():
    volume = np.array([[[0.0, 1.0], [2.0, 9.0]]])
    assert gift_mask(volume).tolist() == [[[False, False], [False, True]]]
    assert gift_mask(np.full((2, 2, 2), 3.0)).all()
    assert gift_mask(np.array([[[np.nan, 4.0, 4.0]]])).tolist() == [[[False, True, True]]]


def test_gifts_mask_of_a_cohort_is_what_all_have_in_common(tmp_path):
    volumes = np.random.default_rng(0).uniform(size=(3, 4, 4, 4, 2)).astype("f4")
    paths = [save(tmp_path / f"{k}.nii.gz", v) for k, v in enumerate(volumes)]
    mask, affine = gift_mask_of(paths)
    assert np.array_equal(mask, np.logical_and.reduce([v[..., 0] >= v[..., 0].mean() for v in volumes]))
    assert np.allclose(affine, AFFINE)
    moved = AFFINE + np.diag([0, 0, 0, 0.0])
    moved[0, 3] += 3
    with pytest.raises(UserError, match=r"different grids"):
        gift_mask_of([*paths, save(tmp_path / "moved.nii.gz", volumes[0], moved)])


# ---------------------------------------------------------------------- confounds


def confounds_table(volumes, generator) -> pd.DataFrame:
    """fMRIPrep's columns that nilearn's strategy 'simple' reads."""
    table = {}
    names = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    for name in [*names, "csf", "white_matter", "global_signal"]:
        values = generator.normal(scale=0.01, size=volumes).cumsum()
        slope = np.r_[np.nan, np.diff(values)]
        table |= {
            name: values,
            f"{name}_derivative1": slope,
            f"{name}_power2": values**2,
            f"{name}_derivative1_power2": slope**2,
        }
    table |= {f"cosine{k:02d}": np.cos(np.pi * (k + 1) * (np.arange(volumes) + 0.5) / volumes) for k in range(2)}
    return pd.DataFrame(table)


@pytest.fixture
def fmriprep(tmp_path, bold):
    """An image with its table of confounds, named as fMRIPrep names them."""
    table = confounds_table(VOLUMES, np.random.default_rng(4))
    path = tmp_path / "sub-01_task-rest_desc-confounds_timeseries.tsv"
    table.to_csv(path, sep="\t", na_rep="n/a", index=False)
    path.with_suffix(".json").write_text(json.dumps({}))
    image = save(tmp_path / "sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz", bold)
    return image, path, table


def test_motion_and_the_strategies_of_nilearn_are_found(fmriprep):
    image, path, table = fmriprep
    read = read_confounds_table(path)
    none, kept, names = choose_confounds("none", image, read, VOLUMES, 4)
    assert none is None
    assert kept.tolist() == list(range(4, VOLUMES))
    assert names == []
    motion, kept, names = choose_confounds("motion", image, read, VOLUMES, 4)
    assert names == ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"]
    assert np.allclose(motion, table[names].to_numpy()[4:])
    simple, kept, names = choose_confounds("simple", image, read, VOLUMES, 4)
    assert simple.shape == (VOLUMES - 4, len(names))
    assert {"csf", "white_matter", "trans_x_derivative1_power2", "cosine00"} <= set(names)
    assert np.isfinite(simple).all()


@pytest.mark.parametrize("column", ["trans_x", "framewise_displacement", "cosine01"])
def test_a_decimal_comma_in_a_table_of_confounds_is_refused(fmriprep, column):
    _, path, table = fmriprep
    table["framewise_displacement"] = 0.5
    table["remark"] = "a, b"
    table = table.astype({column: object})
    table.loc[7, column] = "-0,015"
    table.to_csv(path, sep="\t", na_rep="n/a", index=False)
    with pytest.raises(UserError, match=rf"{path.name} has '-0,015' in the column {column}, row 9, which is no number"):
        read_confounds_table(path)
    assert path.read_text().splitlines()[9 - 1].count("-0,015") == 1
    table.loc[7, column] = "lost"
    table.to_csv(path, sep="\t", na_rep="n/a", index=False)
    if column == "cosine01":
        assert len(read_confounds_table(path)) == VOLUMES
    else:
        with pytest.raises(UserError, match=f"has 'lost' in the column {column}, row 9"):
            read_confounds_table(path)


def test_niaks_names_of_motion_are_known(tmp_path):
    names = ["motion_tx", "motion_ty", "motion_tz", "motion_rx", "motion_ry", "motion_rz"]
    values = np.random.default_rng(0).normal(size=(10, 6))
    table = pd.DataFrame(values, columns=names).assign(FD=np.arange(10.0))
    table.to_csv(tmp_path / "fmri_0040000.tsv.gz", sep="\t", index=False)
    read = read_confounds_table(tmp_path / "fmri_0040000.tsv.gz")
    assert np.allclose(motion_of(read), values)


@pytest.mark.parametrize(
    ("strategy", "given", "drop", "sentence"),
    [
        ("motion", False, 0, "needs the six parameters of motion"),
        ("wavelets", True, 0, "confounds is 'wavelets': it can be none, motion, simple"),
        ("ica_aroma", True, 0, "nilearn finds no confounds 'ica_aroma'"),
        ("none", True, 59, "drop_volumes = 59 leaves 1"),
        ("none", True, 100, "drop_volumes = 100 leaves 0"),
    ],
)
def test_confounds_that_are_not_there_are_refused(fmriprep, strategy, given, drop, sentence):
    image, path, _ = fmriprep
    with pytest.raises(UserError, match=sentence):
        choose_confounds(strategy, image, read_confounds_table(path) if given else None, VOLUMES, drop)


def test_a_table_of_another_run_is_refused(fmriprep):
    image, path, _ = fmriprep
    with pytest.raises(UserError, match="60 volumes, but its table of confounds has 50 rows"):
        choose_confounds("none", image, read_confounds_table(path)[:50], VOLUMES, 0)
    with pytest.raises(UserError, match=r"missing\.tsv cannot be read"):
        read_confounds_table(path.with_name("missing.tsv"))


# ---------------------------------------------------------------------- images


def test_voxels_are_read_as_they_are(subject, bold, brain):
    voxels = read_voxels(subject, brain, AFFINE, None, 0)
    assert np.array_equal(voxels.x, bold[brain].T)
    assert voxels.covered.all()
    assert voxels.volumes_in_file == VOLUMES
    assert voxels.overlap > 0.99


def test_volumes_are_kept_by_number_whatever_the_size_of_a_block(subject, bold, brain, monkeypatch):
    kept = np.array([3, 4, 9, 25, 59])
    for values in (10, 7 * brain.size, 10**9):
        monkeypatch.setattr("autospec.ica.images.VALUES_AT_A_TIME", values)
        voxels = read_voxels(subject, brain, AFFINE, kept, 0)
        assert np.array_equal(voxels.x, bold[brain].T[kept])


def test_smoothing_is_nilearns(tmp_path, subject, brain):
    from nilearn.image import smooth_img

    expected = smooth_img(nib.load(subject), 12.0).get_fdata()[brain].T
    assert np.allclose(read_voxels(subject, brain, AFFINE, None, 12.0).x, expected, rtol=1e-5, atol=1e-2)


def test_another_grid_is_resampled_as_nilearn_does(tmp_path, bold, brain, template):
    from nilearn.image import resample_img

    finer = np.diag([6.0, 6, 6, 1])
    finer[:3, 3] = [-79, -110, -68]
    there = resample_img(
        nib.Nifti1Image(bold, AFFINE), finer, (27, 31, 26), interpolation="linear", force_resample=True,
        copy_header=True,
    )  # fmt: skip
    path = save(tmp_path / "finer.nii.gz", there.get_fdata(dtype=np.float32), finer)
    back = resample_img(
        there, AFFINE, SHAPE, interpolation="linear", force_resample=True, copy_header=True
    ).get_fdata()  # fmt: skip
    voxels = read_voxels(path, brain, AFFINE, None, 0)
    assert np.allclose(voxels.x, back[brain].T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_any_order_of_axes_and_bytes_gives_the_same_voxels(tmp_path, bold, brain, kind):
    whole = np.round(bold).astype(np.float32)
    expected = whole[brain].T
    flipped = AFFINE.copy()
    flipped[0] = [-9, 0, 0, -78 + 9 * (SHAPE[0] - 1)]
    turned = AFFINE[:, [2, 0, 1, 3]]
    big = kind(whole[::-1].astype(">i2"), flipped, header=kind.header_class(endianness=">"))
    big.header.set_slope_inter(0.5, 0)
    nib.save(big, tmp_path / "big.nii.gz")
    raw = (tmp_path / "big.nii.gz").read_bytes()
    images = {
        "left is right": save(tmp_path / "las.nii.gz", whole[::-1].copy(), flipped, kind=kind),
        "turned axes": save(tmp_path / "turned.nii", np.transpose(whole, (2, 0, 1, 3)).copy(), turned, kind=kind),
        "one behind": save(tmp_path / "five.nii.gz", whole[..., None], kind=kind),
    }
    assert raw
    for name, path in images.items():
        assert np.array_equal(read_voxels(path, brain, AFFINE, None, 0).x, expected), name


def test_big_endian_scaled_int16_in_las_just_works(tmp_path, bold, brain):
    flipped = AFFINE.copy()
    flipped[0] = [-9, 0, 0, -78 + 9 * (SHAPE[0] - 1)]
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    image = nib.Nifti1Image(bold[::-1], flipped, header=header)
    nib.save(image, tmp_path / "niak.nii.gz")  # nibabel finds the slope
    loaded = nib.load(tmp_path / "niak.nii.gz")
    assert loaded.header.endianness == ">"
    assert loaded.get_data_dtype() == np.dtype(">i2")
    assert loaded.dataobj.slope != 1
    voxels = read_voxels(tmp_path / "niak.nii.gz", brain, AFFINE, None, 0)
    assert voxels.x.dtype == np.dtype("=f4")
    assert correlations(voxels.x, bold[brain].T).min() > 0.99999
    assert np.abs(voxels.x - bold[brain].T).max() < loaded.dataobj.slope


def test_voxels_without_signal_are_not_covered(tmp_path, bold, brain):
    cut = bold.copy()
    cut[:, :, :6] = 0
    cut[:, :4] = np.nan
    voxels = read_voxels(save(tmp_path / "cut.nii.gz", cut), brain, AFFINE, None, 0)
    signal_there = np.ones(SHAPE, dtype=bool)
    signal_there[:, :, :6] = False
    signal_there[:, :4] = False
    assert np.array_equal(voxels.covered, signal_there[brain])
    assert np.isfinite(voxels.x).all()


def test_demeaned_data_are_known_to_be_in_mni_space(tmp_path, bold, brain):
    demeaned = bold - bold.mean(axis=3, keepdims=True)
    voxels = read_voxels(save(tmp_path / "demeaned.nii.gz", demeaned), brain, AFFINE, None, 0)
    assert voxels.overlap > 0.95
    assert voxels.covered.all()


def partly_nan(bold):
    changed = bold.copy()
    changed[9, 10, 9, 5:8] = np.nan
    return changed


@pytest.mark.parametrize(
    ("change", "affine", "sentence"),
    [
        (lambda b: np.zeros_like(b), AFFINE, "is zero everywhere in the MNI brain"),
        (lambda b: np.repeat(b[..., :1], 30, axis=3), AFFINE, "does not change with time"),
        (lambda b: np.full_like(b, np.nan), AFFINE, "no finite value in the brain"),
        (partly_nan, AFFINE, "NaN or infinity in some volumes at 1 voxels"),
        (lambda b: b, np.diag([9.0, 9, 9, 1]), "not in MNI space"),
        (lambda b: b, np.diag([2.0, 2, 2, 1]), "not in MNI space"),
    ],
)
def test_unusable_images_are_refused_in_one_sentence(tmp_path, bold, brain, change, affine, sentence):
    path = save(tmp_path / "bold.nii.gz", change(bold), affine)
    with pytest.raises(UserError, match=sentence) as caught:
        read_voxels(path, brain, AFFINE, None, 0)
    assert str(path) in str(caught.value)


def test_an_image_named_after_another_space_is_refused(tmp_path, bold, brain):
    path = save(tmp_path / "sub-01_task-rest_space-T1w_desc-preproc_bold.nii.gz", bold)
    with pytest.raises(UserError, match="in the space 'T1w', but the template is in MNI space"):
        read_voxels(path, brain, AFFINE, None, 0)
