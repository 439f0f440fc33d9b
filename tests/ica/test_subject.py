"""One subject from image to folder: agreement with GIFT, what is written, and every bad subject."""

import gzip
import json
import os

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from autospec.cohort.motion import motion_of
from autospec.errors import UserError
from autospec.ica import subject as module
from autospec.ica.cleaning import clean_timecourses, connectivity, remove_trends
from autospec.ica.derivative import folder_written_whole, read_table, subject_files
from autospec.ica.scaling import cohort_modes, scale_timecourses, shift_and_scale_maps
from autospec.ica.subject import (
    build_gift_maps,
    build_gift_mask,
    build_gift_modes,
    build_subject,
    build_timecourses,
)
from autospec.ica.template import correlate_rows
from tests.ica.conftest import AFFINE, NETWORKS, SHAPE, VOLUMES, correlations, files, save, settings


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def load(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def made(tmp_path_factory, bold, template):
    """A subject's folder with all options' defaults; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    image = save(folder / "sub-01_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz", bold)
    message = build_subject(settings(), "01", files(image), template, folder / "sub-01")
    assert message == "sub-01: 5 networks"
    return folder / "sub-01"


def test_the_whole_way_from_niaks_kind_of_image_ends_where_gift_ends(tmp_path, gift):
    """Big-endian scaled int16 in LAS order, a mask with a one behind, and a template in the other order."""
    mask, affine = gift["mask"], gift["affine"]

    def image(rows):
        values = np.zeros((*mask.shape, len(rows)), dtype=np.float32)
        values[mask] = rows.T
        return values

    flipped = affine.copy()
    flipped[0] = [-9, 0, 0, affine[0, 3] + 9 * (mask.shape[0] - 1)]
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    bold = nib.Nifti1Image(image(gift["bold"])[::-1], flipped, header=header)
    bold.header.set_xyzt_units("mm", "sec")
    bold.header.set_zooms((9, 9, 9, 2.0))
    nib.save(bold, tmp_path / "fmri_0040000.nii.gz")
    maps = save(tmp_path / "template.nii", image(gift["template"]), affine)
    inside = save(tmp_path / "mask.nii.gz", mask.astype("u1")[::-1, ..., None], flipped, step=None)
    chosen = settings(scaling="none", grid="template", gift_number=7)
    there = files(tmp_path / "fmri_0040000.nii.gz", mask=str(inside))
    build_subject(chosen, "0040000", there, str(maps), tmp_path / "out")
    names = subject_files("0040000")
    found = nib.load(tmp_path / "out" / names["maps"]).get_fdata()[mask].T
    courses, labels = read_table(tmp_path / "out" / names["timecourses"])
    # int16 keeps 0.5 of intensities whose noise is tens.
    assert correlations(found, gift["gift_maps"]).min() > 0.9999
    assert correlations(courses.T, gift["gift_timecourses"].T).min() > 0.9999
    assert labels[0] == "network-001"
    # The same under GIFT's names.
    folder = tmp_path / "out" / "gift"
    assert sorted(os.listdir(folder)) == [
        "autospecMask.nii",
        "autospec_sub007_component_ica_s1_.nii",
        "autospec_sub007_timecourses_ica_s1_.nii",
    ]
    assert nib.load(folder / "autospec_sub007_timecourses_ica_s1_.nii").shape == (80, 53)
    components = nib.load(folder / "autospec_sub007_component_ica_s1_.nii")
    assert np.allclose(components.get_fdata()[mask].T, found)


def test_a_folder_holds_what_it_should(made, template, brain):
    names = subject_files("01")
    assert sorted(content(made)) == sorted(
        [*names.values(), *(n.replace(".nii.gz", ".json").replace(".tsv", ".json") for n in names.values() if not n.endswith((".json", ".png")))]
    )  # fmt: skip
    status = load(made / "status.json")
    assert (status["status"], status["subject"], status["volumes"]) == ("included", "01", 60)
    assert len(status["digest"]) == 16
    maps = nib.load(made / names["maps"])
    assert maps.shape == (*SHAPE, NETWORKS)
    assert maps.get_data_dtype() == np.float32
    assert np.allclose(maps.affine, AFFINE)
    values = maps.get_fdata()
    assert not values[~brain].any()
    assert np.allclose(values[brain].mean(axis=0), 0, atol=1e-4)
    assert np.allclose(values[brain].std(axis=0, ddof=1), 1, atol=1e-4)
    courses, labels = read_table(made / names["timecourses"])
    assert labels == template.labels
    assert courses.shape == (VOLUMES, NETWORKS)
    assert np.allclose(courses.std(axis=0, ddof=1), 1, atol=1e-5)
    cleaned, _ = read_table(made / names["cleaned"])
    square = pd.read_csv(made / names["connectivity"], sep="\t", index_col=0)
    assert list(square.columns) == list(square.index) == labels
    assert np.allclose(square, connectivity(cleaned), atol=1e-5)
    again = clean_timecourses(courses, 2.0, None, True, 0.15)
    assert np.allclose(square, connectivity(again), atol=1e-4)


def test_the_blobs_and_their_time_courses_are_found(made, bold, template, brain):
    names = subject_files("01")
    quality = load(made / names["quality"])
    assert min(quality["TemplateMatch"].values()) > 0.8
    values = nib.load(made / names["maps"]).get_fdata()[brain].T
    assert list(quality["TemplateMatch"].values()) == pytest.approx(
        correlations(values, template.maps[brain].T).tolist(), abs=1e-4
    )
    assert list(quality["Coverage"].values()) == [1.0] * NETWORKS
    assert quality["Voxels"] == quality["VoxelsCovered"] == brain.sum()
    assert quality["Volumes"] == quality["VolumesInFile"] == VOLUMES
    assert quality["RepetitionTime"] == 2.0
    assert quality["Motion"] is None
    assert min(quality["Spectra"]["LowToHighPower"].values()) > 1
    assert set(quality["AcceptedSteps"]) == set(template.labels)


def test_sidecars_say_what_was_done_before_and_here(tmp_path, subject, template):
    done = {"smoothing_fwhm_mm": 6.0, "confounds": "none", "other": ["slice timing"]}
    build_subject(settings(already_done=done, smoothing_fwhm_mm=6.0), "01", files(subject), template, tmp_path / "out")
    for name in ("maps", "mask", "timecourses", "cleaned", "connectivity"):
        file = subject_files("01")[name].replace(".nii.gz", ".json").replace(".tsv", ".json")
        record = load(tmp_path / "out" / file)
        assert record["DoneBefore"] == done
        assert record["DoneHere"]["smoothing_fwhm_mm"] == 6.0
        assert record["DoneHere"]["preprocessing"] == 1
        assert record["Warnings"] == ["smoothed twice: 6 mm before, 6 mm here"]
        assert record["Sources"] == [subject.name]
        assert record["Simulated"] is False
        assert record["Template"]["Kind"] == "custom template"
        assert record["Template"]["SHA256OfGridAffineAndValues"] == template.digest
        assert "Note" not in record["Template"]
        assert [n["Label"] for n in record["Networks"]] == template.labels
        assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize(
    ("done", "here", "warning"),
    [
        ({"confounds": "simple"}, {"confounds": "motion"}, "confounds regressed twice: simple before, motion here"),
        ({"drop_volumes": 4}, {"drop_volumes": 2}, "volumes dropped twice: 4 before, 2 here"),
        ({"drop_volumes": 4, "smoothing_fwhm_mm": 6}, {}, None),
    ],
)
def test_doing_it_twice_is_a_warning(done, here, warning):
    assert module._twice(settings(already_done=done, **here)) == ([warning] if warning else [])


def test_simulated_data_and_the_stand_in_say_so_everywhere(tmp_path, bold):
    image = save(tmp_path / "bold.nii.gz", bold)
    (tmp_path / "bold.json").write_text(json.dumps({"RepetitionTime": 2.0}))
    (tmp_path / "dataset_description.json").write_text(json.dumps({"Name": "x", "Simulated": True}))
    there = files(image, sidecar=str(tmp_path / "bold.json"), description=str(tmp_path / "dataset_description.json"))
    message = build_subject(settings(grid="data"), "01", there, "stand-in", tmp_path / "out")
    assert message == "sub-01: 53 networks"
    written = [path for path in (tmp_path / "out").glob("*.json") if path.name != "status.json"]
    assert len(written) == 6
    for path in written:
        record = load(path)
        assert record["Simulated"] is True
        assert record["Template"]["Kind"] == "stand-in template"
        assert "stand-in template" in record["Template"]["Note"]


def test_the_same_subject_gives_the_same_bytes(tmp_path, made, bold, template):
    image = save(tmp_path / "sub-01_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz", bold)
    build_subject(settings(), "01", files(image), template, tmp_path / "again")
    assert content(tmp_path / "again") == content(made)


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": "data"},
        {"grid": 9},
        {"preprocessing": 2},
        {"preprocessing": 3},
        {"preprocessing": 4},
        {"dtype": "float64"},
        {"converged": True},
        {"smoothing_fwhm_mm": 8.0},
        {"drop_volumes": 5},
        {"despike": False, "low_pass_hz": None},
    ],
    ids=lambda changes: ", ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_setting_works(tmp_path, subject, template, made, changes):
    build_subject(settings(**changes), "01", files(subject), template, tmp_path / "out")
    names = subject_files("01")
    quality = load(tmp_path / "out" / names["quality"])
    assert min(quality["TemplateMatch"].values()) > 0.6
    assert quality["Volumes"] == VOLUMES - changes.get("drop_volumes", 0)
    maps = [nib.load(folder / names["maps"]).get_fdata() for folder in (tmp_path / "out", made)]
    courses = [read_table(folder / names["cleaned"])[0] for folder in (tmp_path / "out", made)]
    same = "grid" in changes or changes.get("dtype") == "float64"
    close = maps[0].shape == maps[1].shape and np.allclose(*maps, atol=2e-3)
    if same:
        assert close
    elif "despike" in changes:
        assert close
        assert not np.allclose(*courses, atol=1e-3)
    else:
        assert not close


def motion_table(path, bold):
    generator = np.random.default_rng(3)
    motion = generator.normal(scale=[0.1] * 3 + [0.001] * 3, size=(VOLUMES, 6))
    table = pd.DataFrame(motion, columns=["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"])
    table["framewise_displacement"] = [np.nan, *np.abs(np.diff(motion, axis=0)).sum(axis=1)]
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return str(path), motion, table


@pytest.mark.parametrize("place", ["image", "timecourses"])
def test_motion_is_regressed_from_the_image_or_the_time_courses(tmp_path, bold, template, brain, place):
    path, motion, table = motion_table(tmp_path / "confounds.tsv", bold)
    moved = bold + (brain[..., None] * 40 * motion[:, 0]).astype("f4") * template.maps.sum(axis=3)[..., None]
    image = save(tmp_path / "bold.nii.gz", moved)
    chosen = settings(
        confounds="motion", confounds_on=place, drop_volumes=2, despike=False, low_pass_hz=None, scaling="none"
    )
    build_subject(chosen, "01", files(image, confounds=path), template, tmp_path / "out")
    names = subject_files("01")
    for table_name, without in (("timecourses", place == "image"), ("cleaned", True)):
        courses, _ = read_table(tmp_path / "out" / names[table_name])
        jitter = remove_trends(motion[2:])
        together = np.corrcoef(np.column_stack([courses, jitter]), rowvar=False)[:NETWORKS, NETWORKS:]
        assert (np.abs(together).max() < 1e-4) == without
    quality = load(tmp_path / "out" / names["quality"])
    displacement = table["framewise_displacement"][2:]
    assert quality["Motion"]["MeanFramewiseDisplacementMm"] == pytest.approx(displacement.mean())
    assert quality["Motion"]["LargestFramewiseDisplacementMm"] == pytest.approx(displacement.max())
    assert quality["Motion"]["VolumesAbove0.5Mm"] == (displacement > 0.5).sum()
    for table_name, without in (("timecourses", place == "image"), ("cleaned", True)):
        record = load(tmp_path / "out" / names[table_name].replace(".tsv", ".json"))
        assert record["Confounds"] == (list(table.columns[:6]) if without else [])


@pytest.mark.parametrize("place", ["image", "timecourses", "atlas"])
@pytest.mark.parametrize("scaling", ["z-score", "none"])
def test_where_all_drifts_motion_is_removed_and_not_added(tmp_path, bold, template, brain, place, scaling):
    """The scanner drifts, and so does the head, which also jitters; nothing in the image follows the jitter."""
    path, motion, table = motion_table(tmp_path / "confounds.tsv", bold)
    ramp = np.linspace(-1, 1, VOLUMES)
    motion += 3 * ramp[:, None] * motion.std(axis=0)
    table[table.columns[:6]] = motion
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    image = save(tmp_path / "bold.nii.gz", bold + (300 * template.maps.sum(axis=3)[..., None] * ramp).astype("f4"))
    chosen = settings(confounds="motion", scaling=scaling, despike=False, low_pass_hz=None)
    there = files(image, confounds=path)
    if place == "atlas":
        atlas = save(tmp_path / "atlas.nii.gz", ((np.arange(18) // 6 + 1) * brain).astype("i2"), step=None)
        build_timecourses(chosen, "01", there, str(atlas), None, tmp_path / "out")
    else:
        build_subject({**chosen, "confounds_on": place}, "01", there, template, tmp_path / "out")
    waves = [f(2 * np.pi * n * np.arange(VOLUMES) / (VOLUMES - 1)) for f in (np.sin, np.cos) for n in (1, 2)]
    trends = np.column_stack([np.ones(VOLUMES), ramp, *waves])
    jitter = motion - trends @ np.linalg.lstsq(trends, motion)[0]
    names = subject_files("01")
    for name in ("cleaned",) if place == "timecourses" else ("timecourses", "cleaned"):
        courses, _ = read_table(tmp_path / "out" / names[name])
        if name == "timecourses" and scaling == "none":  # it keeps its trends
            assert np.abs(np.corrcoef(courses.T, ramp)[-1, :-1]).min() > 0.5
            courses = courses - trends @ np.linalg.lstsq(trends, courses)[0]
        assert np.abs(np.linalg.norm(trends.T @ courses, axis=0)).max() < 1e-3 * np.linalg.norm(courses)
        fitted = jitter @ np.linalg.lstsq(jitter, courses)[0]
        assert (fitted.var(axis=0) / courses.var(axis=0)).max() < 1e-6


def test_what_a_subject_lacks_is_left_out_and_counted(tmp_path, bold, template, brain, made):
    cut = bold.copy()
    cut[:, :, :7] = 0
    image = save(tmp_path / "bold.nii.gz", cut)
    build_subject(settings(), "01", files(image), template, tmp_path / "out")
    names = subject_files("01")
    quality = load(tmp_path / "out" / names["quality"])
    there = brain.copy()
    there[:, :, :7] = False
    assert quality["VoxelsCovered"] == there.sum() < quality["Voxels"]
    squares = template.maps.astype("f8") ** 2
    assert list(quality["Coverage"].values()) == pytest.approx(
        (squares[there].sum(axis=0) / squares.sum(axis=(0, 1, 2))).tolist(), abs=1e-6
    )
    values = nib.load(tmp_path / "out" / names["maps"]).get_fdata()
    assert not values[~there].any()
    assert np.allclose(values[there].std(axis=0, ddof=1), 1, atol=1e-4)
    assert np.array_equal(nib.load(tmp_path / "out" / names["mask"]).get_fdata() > 0, there)
    whole = nib.load(made / names["maps"]).get_fdata()
    assert correlate_rows(values[there].T, whole[there].T).min() > 0.98


def test_affines_that_disagree_are_written_down(tmp_path, bold, template, brain):
    def mirrored(name, values):
        """An image whose qform has left where its sform has right."""
        image = nib.Nifti1Image(values, AFFINE)
        image.set_sform(AFFINE, 4)
        image.set_qform(np.diag([-1.0, 1, 1, 1]) @ AFFINE, 4)
        image.header.set_zooms((9, 9, 9, 2.0)[: values.ndim])
        nib.save(image, tmp_path / name)
        return str(tmp_path / name)

    there = files(mirrored("bold.nii.gz", bold))
    build_subject(settings(), "01", there, mirrored("maps.nii.gz", template.maps), tmp_path / "networks")
    atlas = mirrored("atlas.nii.gz", brain.astype("i2"))
    build_timecourses(settings(), "01", there, atlas, None, tmp_path / "regions")
    for folder, other in (("networks", "maps.nii.gz"), ("regions", "atlas.nii.gz")):
        said = load(tmp_path / folder / subject_files("01")["quality"])["Warnings"]
        assert said == [
            f"the sform and the qform of {name} do not agree within 1 mm; the sform is used"
            for name in ("bold.nii.gz", other)
        ]


def test_an_atlas_in_centimetres_excludes_nobody(tmp_path, subject, brain):
    atlas = save(tmp_path / "atlas.nii.gz", brain.astype("i2"), np.diag([0.1, 0.1, 0.1, 1]) @ AFFINE, step=None)
    with pytest.raises(UserError, match=r"the atlas .*voxels of 0\.9 x 0\.9 x 0\.9 mm .*write it in millimetres"):
        build_timecourses(settings(on_bad_subject="exclude"), "01", files(subject), str(atlas), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- bad subjects


def annex(path, bold):
    path.write_text("/annex/objects/MD5E-s123--abc.nii.gz\n")


def truncated(path, bold):
    path.write_bytes(save(path, bold).read_bytes()[:-5000])


def unpacked(path, bold):
    path.write_bytes(gzip.decompress(save(path, bold).read_bytes())[:50_000])


def with_nan(path, bold):
    changed = bold.copy()
    changed[9, 9, 9, 7] = np.nan
    save(path, changed)


BAD = {
    "missing": (lambda p, b: None, {}, "there is no image"),
    "annex pointer": (annex, {}, "git-annex pointer"),
    "truncated": (truncated, {}, "cut short or damaged"),
    "truncated after unpacking": (unpacked, {}, "no image that can be read|cut short or damaged"),
    "3-D": (lambda p, b: save(p, b[..., 0], step=None), {}, "not a series of volumes"),
    "all zero": (lambda p, b: save(p, 0 * b), {}, "is zero everywhere"),
    "all NaN": (lambda p, b: save(p, np.full_like(b, np.nan)), {}, "no finite value"),
    "NaN": (with_nan, {}, "NaN or infinity in some volumes"),
    "not MNI": (lambda p, b: save(p, b, np.diag([9.0, 9, 9, 1])), {}, "not in MNI space"),
    "in centimetres": (
        lambda p, b: save(p, b, np.diag([0.1, 0.1, 0.1, 1]) @ AFFINE), {}, r"0\.9 x 0\.9 x 0\.9 mm.*millimetres",
    ),
    "no TR": (lambda p, b: save(p, b, step=0.0), {}, "neither in its header nor in a JSON sidecar"),
    "too few volumes": (lambda p, b: save(p, b), {"min_volumes": 80}, "60 usable volumes, and min_volumes is 80"),
    "too few left": (lambda p, b: save(p, b), {"drop_volumes": 45}, "15 usable volumes, and min_volumes is 20"),
    "fewer volumes than networks": (
        lambda p, b: save(p, b[..., :4]), {"min_volumes": 2}, "4 usable volumes for 5 networks",
    ),
    "half a brain": (lambda p, b: save(p, b * (np.arange(21) > 15)[:, None, None]), {}, "not in MNI space|outside"),
    "a network cut off": (
        lambda p, b: save(p, b * (np.arange(18) > 8)[:, None, None, None]), {}, "lies? outside what .* covers",
    ),
    "motion unknown": (lambda p, b: save(p, b), {"max_mean_fd_mm": 0.5}, "nothing says how much the subject"),
    "no motion to regress": (lambda p, b: save(p, b), {"confounds": "motion"}, "needs the six parameters of motion"),
    "one volume repeated": (
        lambda p, b: save(p, np.tile(b[..., :2], 30)), {}, "only 2 independent dimensions for 5 networks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_subject_fails_in_one_sentence_or_is_excluded_with_it(tmp_path, bold, template, case):
    make, changes, sentence = BAD[case]
    image = tmp_path / "bold.nii.gz"
    make(image, bold)
    with pytest.raises(UserError, match=sentence) as caught:
        build_subject(settings(**changes), "01", files(image), template, tmp_path / "out" / "sub-01")
    assert str(image) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "out") == []
    chosen = settings(on_bad_subject="exclude", **changes)
    message = build_subject(chosen, "01", files(image), template, tmp_path / "out" / "sub-01")
    assert message == f"sub-01: excluded, {caught.value}"
    assert os.listdir(tmp_path / "out" / "sub-01") == ["status.json"]
    assert load(tmp_path / "out" / "sub-01" / "status.json") == {
        "reason": str(caught.value), "status": "excluded", "subject": "01",
    }  # fmt: skip


def test_a_contradicted_repetition_time_and_too_much_motion_are_refused(tmp_path, subject, bold, template):
    (tmp_path / "bold.json").write_text(json.dumps({"RepetitionTime": 3.0}))
    with pytest.raises(UserError, match="contradictory"):
        build_subject(settings(), "01", files(subject, sidecar=str(tmp_path / "bold.json")), template, tmp_path / "out")
    path, *_ = motion_table(tmp_path / "confounds.tsv", bold)
    with pytest.raises(UserError, match=r"mean framewise displacement of 0\.\d+ mm, and max_mean_fd_mm is 0\.1"):
        build_subject(settings(max_mean_fd_mm=0.1), "01", files(subject, confounds=path), template, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("subject_id", ["../x", "a/b", "", ".", "a b", "-x", "sub..1", "x\n"])
def test_ids_that_cannot_be_part_of_a_path_are_refused(tmp_path, subject, template, subject_id):
    with pytest.raises(UserError, match="cannot be a subject's id"):
        build_subject(settings(on_bad_subject="exclude"), subject_id, files(subject), template, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "template_path", "sentence"),
    [
        ({"preprocessing": 5}, None, "no preprocessing of type 5"),
        ({"confounds": "wavelets"}, None, "confounds is 'wavelets'"),
        ({"scaling": "percent"}, None, "scaling is 'percent'"),
        ({"confounds_on": "maps"}, None, "confounds_on is 'maps'"),
        ({"drop_volumes": -1}, None, "cannot be negative"),
        ({"low_pass_hz": 0}, None, "must be above 0"),
        ({"dtype": "float16"}, None, "dtype is 'float16'"),
        ({"grid": "fine"}, None, "grid is 'fine'"),
        ({"grid": 0.1}, None, "a voxel size of 1 to 20 mm"),
        ({}, "missing.nii", "there is no image missing.nii"),
    ],
)
def test_a_mistake_in_the_settings_excludes_nobody(tmp_path, subject, template, changes, template_path, sentence):
    chosen = settings(on_bad_subject="exclude", **changes)
    with pytest.raises(UserError, match=sentence):
        build_subject(chosen, "01", files(subject), template_path or template, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mask_or_a_device_that_is_not_there_excludes_nobody(tmp_path, subject, template, brain):
    chosen = settings(on_bad_subject="exclude")
    part = brain & (np.arange(18) < 6)[:, None, None]
    for path, sentence in (
        (tmp_path / "missing.nii", "there is no image"),
        (
            save(tmp_path / "part.nii.gz", part.astype("u1"), step=None),
            r"network-\d+.* outside the mask .*part\.nii\.gz",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            build_subject(chosen, "01", files(subject, mask=str(path)), template, tmp_path / "out")
    with pytest.raises(UserError, match="no device 'abacus'"):
        build_subject(chosen, "01", files(subject), template, tmp_path / "out", device="abacus")
    assert not (tmp_path / "out").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "sub-01"
    with folder_written_whole(target) as folder:
        (folder / "a").write_text("old")
        assert not target.exists()

    def fails():
        with folder_written_whole(target) as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert (target / "a").read_text() == "old"
    (tmp_path / ".sub-01.partial").mkdir()
    (tmp_path / ".sub-01.partial" / "rest").write_text("of a process that was killed")
    with folder_written_whole(target) as folder:
        (folder / "b").write_text("new")
    assert os.listdir(target) == ["b"]
    assert os.listdir(tmp_path) == ["sub-01"]


# ---------------------------------------------------------------------- other sources, and whole cohorts


def test_an_atlas_gives_the_same_folder_without_maps(tmp_path, subject, bold, brain):
    numbers = (np.arange(18)[None, None] // 6 + 1) * brain
    atlas = save(tmp_path / "atlas.nii.gz", numbers.astype("i2"), step=None)
    message = build_timecourses(settings(), "01", files(subject), str(atlas), ["a", "b", "c"], tmp_path / "out")
    assert message == "sub-01: time courses"
    names = subject_files("01")
    assert not (tmp_path / "out" / names["maps"]).exists()
    cleaned, labels = read_table(tmp_path / "out" / names["cleaned"])
    assert labels == ["a", "b", "c"]
    means = np.column_stack([bold[numbers == k].mean(axis=0) for k in (1, 2, 3)])
    assert np.allclose(cleaned, clean_timecourses(means, 2.0, None, True, 0.15), atol=1e-2)
    assert load(tmp_path / "out" / names["quality"])["Template"] is None


@pytest.mark.parametrize("column", ["framewise_displacement", None])
def test_everybody_says_the_same_of_motion(tmp_path, bold, brain, monkeypatch, column):
    shown = []
    monkeypatch.setattr(module, "write_picture", lambda picture, _: shown.append(picture))
    path, _, table = motion_table(tmp_path / "confounds.tsv", bold)
    table = table if column else table.drop(columns="framewise_displacement")
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    image = save(tmp_path / "bold.nii.gz", bold)
    atlas = save(tmp_path / "atlas.nii.gz", brain.astype("i2"), step=None)
    build_timecourses(settings(), "01", files(image, confounds=path), str(atlas), None, tmp_path / "out")
    motion = load(tmp_path / "out" / subject_files("01")["quality"])["Motion"]
    assert motion["MeanFramewiseDisplacementMm"] == pytest.approx(motion_of([path], None).mean_fd)
    assert motion["MeanFramewiseDisplacementMm"] == pytest.approx(np.nanmean(shown[0].displacement))
    assert motion["FramewiseDisplacement"].startswith(column or "computed from trans_x")
    assert np.isnan(shown[0].displacement[0])
    if column:
        assert motion["MeanFramewiseDisplacementMm"] == pytest.approx(table[column][1:].mean())


@pytest.mark.parametrize("place", ["image", "timecourses"])
def test_motion_is_regressed_from_regions_too(tmp_path, bold, brain, place):
    path, motion, _ = motion_table(tmp_path / "confounds.tsv", bold)
    image = save(tmp_path / "bold.nii.gz", bold + (brain[..., None] * 400 * motion[:, 0]).astype("f4"))
    numbers = (np.arange(18)[None, None] // 6 + 1) * brain
    atlas = save(tmp_path / "atlas.nii.gz", numbers.astype("i2"), step=None)
    correlated = {}
    for confounds in ("none", "motion"):
        chosen = settings(confounds=confounds, confounds_on=place, drop_volumes=2, despike=False, low_pass_hz=None)
        folder = tmp_path / confounds
        build_timecourses(chosen, "01", files(image, confounds=path), str(atlas), None, folder)
        for name in ("timecourses", "cleaned"):
            courses, _ = read_table(folder / subject_files("01")[name])
            together = np.corrcoef(np.column_stack([courses, motion[2:]]), rowvar=False)[:3, 3:]
            correlated[confounds, name] = np.abs(together).max()
            record = load(folder / subject_files("01")[name].replace(".tsv", ".json"))
            assert bool(record["Confounds"]) == (confounds == "motion")
    assert min(correlated["none", "timecourses"], correlated["none", "cleaned"]) > 0.8
    assert max(correlated["motion", "timecourses"], correlated["motion", "cleaned"]) < 1e-5


def test_time_courses_that_are_not_scaled_stay_as_they_came(tmp_path, bold, brain):
    path, motion, _ = motion_table(tmp_path / "confounds.tsv", bold)
    values = np.random.default_rng(0).normal(size=(VOLUMES, 3)).cumsum(axis=0)
    pd.DataFrame(values, columns=["x", "y", "z"]).to_csv(tmp_path / "courses.tsv", sep="\t", index=False)
    names = subject_files("01")
    for scaling, said in (("none", "Neither scaled nor detrended."), ("z-score", "Less slow trends")):
        chosen = settings(repetition_time=2.0, scaling=scaling)
        build_timecourses(chosen, "01", files(tmp_path / "courses.tsv"), None, None, tmp_path / scaling)
        found, _ = read_table(tmp_path / scaling / names["timecourses"])
        assert np.allclose(found, values if scaling == "none" else scale_timecourses(values), atol=1e-6)
        assert said in load(tmp_path / scaling / names["timecourses"].replace(".tsv", ".json"))["Description"]
    numbers = ((np.arange(18)[None, None] // 6 + 1) * brain).astype("i2")
    image, atlas = save(tmp_path / "bold.nii.gz", bold), save(tmp_path / "atlas.nii.gz", numbers, step=None)
    chosen = settings(scaling="none", confounds="motion")
    build_timecourses(chosen, "01", files(image, confounds=path), str(atlas), None, tmp_path / "regions")
    found, _ = read_table(tmp_path / "regions" / names["timecourses"])
    means = np.column_stack([bold[numbers == k].mean(axis=0) for k in (1, 2, 3)]).astype("f8")
    jitter = remove_trends(motion)
    assert np.allclose(found, means - jitter @ np.linalg.lstsq(jitter, means)[0], atol=1e-2)


def test_precomputed_time_courses_give_connectivity(tmp_path):
    values = np.random.default_rng(0).normal(size=(VOLUMES, 3)).cumsum(axis=0)
    pd.DataFrame(values, columns=["x", "y", "z"]).to_csv(tmp_path / "courses.tsv", sep="\t", index=False)
    there = files(tmp_path / "courses.tsv")
    with pytest.raises(UserError, match="set repetition_time"):
        build_timecourses(settings(), "01", there, None, None, tmp_path / "out")
    build_timecourses(settings(repetition_time=2.0, drop_volumes=10), "01", there, None, None, tmp_path / "out")
    square = pd.read_csv(tmp_path / "out" / subject_files("01")["connectivity"], sep="\t", index_col=0)
    expected = connectivity(clean_timecourses(values[10:], 2.0, None, True, 0.15))
    assert np.allclose(square, expected, atol=1e-5)


def test_gifts_mask_and_scaling_over_a_cohort(tmp_path, bold, template, brain):
    generator = np.random.default_rng(0)
    images = [
        str(save(tmp_path / f"{k}.nii.gz", bold + 5 * generator.normal(size=bold.shape).astype("f4") * brain[..., None]))
        for k in range(3)
    ]  # fmt: skip
    message = build_gift_mask(images, tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz").get_fdata() > 0
    assert f"{mask.sum()} voxels" in message
    assert mask.sum() <= brain.sum()
    names, subjects = subject_files("x"), []
    for k, image in enumerate(images):
        there = files(image, mask=str(tmp_path / "mask.nii.gz"))
        build_subject(settings(scaling="none"), "x", there, template, tmp_path / str(k))
        subjects.append(tuple(str(tmp_path / str(k) / names[name]) for name in ("maps", "mask")))
    build_gift_modes(subjects, tmp_path / "modes.json")
    build_gift_maps(*subjects[1], str(tmp_path / "modes.json"), tmp_path / "scaled.nii.gz")
    raw = [nib.load(maps).get_fdata()[mask].T for maps, _ in subjects]
    expected = shift_and_scale_maps(raw[1], cohort_modes(raw))
    scaled = nib.load(tmp_path / "scaled.nii.gz").get_fdata()
    assert np.allclose(scaled[mask].T, expected, atol=1e-5)
    assert not scaled[~mask].any()
