"""What a cohort would give, before any job."""

import gzip
import re
import shutil
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest

from autospec.cohort.check import check_cohort
from autospec.cohort.images import read_header, require_mni, time_between_volumes
from autospec.cohort.tables import build_cohort
from autospec.errors import UserError
from tests.cohort.trees import AFFINE, SHAPE, confounds, fmriprep, image, participants, settings, write


def test_a_report_of_a_sound_cohort(tmp_path):
    people = [("1", "HC", "M", "20"), ("2", "SZ", "F", "30"), ("3", "SZ", "F", "31")]
    participants(tmp_path / "participants.tsv", people)
    fmriprep(tmp_path, ["1", "2"])
    fmriprep(tmp_path, ["3"], volumes=12)
    report = check_cohort(settings(tmp_path, on_bad_subject="fail"), networks=5)
    assert report.groups == {"HC": 1, "SZ": 2}
    assert report.sexes == {"HC M": 1, "SZ F": 2}
    assert (report.functional, report.structural) == (3, 0)
    assert report.volumes == (8, 12)
    assert report.grids == {"10 x 12 x 10 voxels of 20 x 20 x 20 mm from (-90, -126, -72) mm": 3}
    assert report.repetition_times == {"2 s": 3}
    assert report.seconds > 0
    assert report.bytes > 0
    assert report.warnings == []
    text = "\n".join(report.lines())
    assert "volumes: 8 to 12; data sets are cut to the fewest" in text
    assert "left out: nobody" in text


def test_a_cohort_of_cobres_size_is_checked_quickly(tmp_path):
    names = [f"{40000 + i:07d}" for i in range(157)]
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in names])
    fmriprep(tmp_path, names)
    started = time.perf_counter()
    report = check_cohort(settings(tmp_path), networks=5)
    assert time.perf_counter() - started < 10
    assert report.functional == 157


def bad_images(folder):
    """Images that cannot be used, and what is said of each."""
    shifted = AFFINE.copy()
    shifted[:3, 3] = [0, 0, 0]
    good = "sub-{}/func/sub-{}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
    paths = {name: folder / good.format(name, name) for name in "abcdefgh"}
    image(paths["a"], affine=shifted)
    image(paths["b"], volumes=4)
    image(paths["c"], time=0.0)
    image(paths["d"], time=3.0)
    write(paths["d"].with_name(paths["d"].name.replace(".nii.gz", ".json")), '{"RepetitionTime": 2.0}')
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE), AFFINE), paths["e"])
    image(paths["f"])
    paths["f"].write_bytes(paths["f"].read_bytes()[:-3000])
    paths["g"].write_bytes(gzip.compress(b"no image" * 400))
    image(paths["h"], volumes=5)
    return {
        "a": "not in MNI space",
        "b": "has 4 volumes, too few for 5 networks",
        "c": "repetition time .* is neither in its header",
        "d": "header says 3 s, its JSON sidecar says 2 s",
        "e": "10 x 12 x 10, not a series",
        "f": "is cut short",
        "g": "no image that can be read",
    }


def prepare(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"sub-{name}" / "func").mkdir(parents=True)
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in "abcdefgh"])
    return bad_images(tmp_path)


def test_every_bad_image_is_reported_in_one_sentence(tmp_path):
    said = prepare(tmp_path)
    report = check_cohort(settings(tmp_path), networks=5)
    assert report.functional == 1
    assert [each.id for each in report.exclusions] == sorted(said)
    for each in report.exclusions:
        assert re.search(said[each.id], each.reason), each.reason
        assert f"sub-{each.id}" in each.reason
        assert each.bad
    assert f"left out: sub-a (functional): {report.exclusions[0].reason}" in report.lines()


def test_a_bad_image_stops_the_check_where_that_is_wanted(tmp_path):
    prepare(tmp_path)
    with pytest.raises(UserError, match=r"sub-a cannot be used: .* set on_bad_subject: exclude"):
        check_cohort(settings(tmp_path, on_bad_subject="fail"), networks=5)


def test_motion_excludes_and_volumes_are_taken_from_headers_where_no_table_says_them(tmp_path):
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in "1234"])
    fmriprep(tmp_path, ["1", "2"])
    fmriprep(tmp_path, ["2"], moved=0.8)
    image(tmp_path / "sub-4/func/sub-4_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz", volumes=9)
    image(tmp_path / "sub-3/func/sub-3_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz", volumes=7)
    found = {each.id: each for each in check_cohort(settings(tmp_path, max_mean_fd=0.5), networks=5).exclusions}
    assert "0.800 mm" in found["2"].reason
    assert "nothing says how much it moved" in found["3"].reason
    assert not found["2"].bad
    found = {each.id: each.reason for each in check_cohort(settings(tmp_path, min_volumes=8), networks=5).exclusions}
    assert found["1"] == "6 usable volumes, fewer than min_volumes (8)"
    assert found["3"] == "7 volumes, fewer than min_volumes (8)"
    assert "4" not in found
    said = r"nobody is left of 4 participants: of sub-1 \(and of 1 more the like\): 6 usable volumes"
    with pytest.raises(UserError, match=said):
        check_cohort(settings(tmp_path, min_volumes=10), networks=5)


def test_the_range_of_ages_is_said(tmp_path):
    rows = [("1", "HC", "M", "21.5"), ("2", "SZ", "M", "64"), ("3", "SZ", "F", "n/a")]
    participants(tmp_path / "participants.tsv", rows)
    fmriprep(tmp_path, ["1", "2", "3"])
    assert "age: 21.5 to 64 years, not known of 1" in check_cohort(settings(tmp_path), networks=5).lines()
    participants(tmp_path / "participants.tsv", [(*row[:3], "n/a") for row in rows])
    assert "age: not known of anybody" in check_cohort(settings(tmp_path), networks=5).lines()


def test_volumes_dropped_at_the_start_do_not_count(tmp_path):
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in "12"])
    fmriprep(tmp_path, ["1"])  # the first two of its eight volumes are outliers
    fmriprep(tmp_path, ["2"], volumes=20)

    def found(drop, **more):
        report = check_cohort(settings(tmp_path, **more), networks=4, drop_volumes=drop)
        return report, {each.id: each.reason for each in report.exclusions}

    report, reasons = found(3, min_volumes=5)
    assert not reasons
    assert report.volumes == (5, 17)
    assert "volumes: 5 to 17; data sets are cut to the fewest, without the first 3 of each" in report.lines()
    _, reasons = found(4, min_volumes=5)
    assert reasons == {"1": "4 usable volumes, fewer than min_volumes (5)"}
    _, reasons = found(5)
    assert "has 8 volumes, of which drop_volumes = 5 leaves 3, too few for 4 networks" in reasons["1"]
    _, reasons = found(8)
    assert "of which drop_volumes = 8 leaves 0" in reasons["1"]


def test_a_table_of_confounds_of_another_run_is_found(tmp_path):
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in "123"])
    fmriprep(tmp_path, ["1", "2", "3"])
    table = tmp_path / "sub-{0}/func/sub-{0}_task-rest_desc-confounds_timeseries.tsv"
    confounds(Path(str(table).format(2)), [0.1] * 7)
    with_commas = Path(str(table).format(3))
    with_commas.write_text(with_commas.read_text().replace("\t0.1\t", "\t0,1\t"))
    found = {each.id: each for each in check_cohort(settings(tmp_path), networks=5).exclusions}
    assert sorted(found) == ["2", "3"]
    assert "has 8 volumes, but its table of confounds has 7 rows" in found["2"].reason
    assert "has '0,1' in the column trans_x, row 2, which is no number" in found["3"].reason
    assert found["2"].bad


def test_confounds_that_somebody_lacks_are_found(tmp_path):
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in "1234"])
    fmriprep(tmp_path, ["1", "2", "3", "4"])
    table = str(tmp_path / "sub-{0}/func/sub-{0}_task-rest_desc-confounds_timeseries.tsv")
    columns = ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z", "motion_outlier00"]
    for name in "12":
        rows = [[f"{(t * 7 + i) % 5}" for i in range(6)] + [str(int(t == 3))] for t in range(8)]
        write(Path(table.format(name)), "\n".join("\t".join(row) for row in [columns, *rows]))
    Path(table.format("3")).unlink()

    def reasons(confounds):
        found = check_cohort(settings(tmp_path), networks=5, confounds=confounds)
        return {each.id: each.reason for each in found.exclusions}

    assert reasons("none") == {}
    found = reasons("motion")  # sub-4 has a table without these columns
    assert sorted(found) == ["3", "4"]
    assert all("confounds: motion needs the six parameters of motion of" in reason for reason in found.values())
    with pytest.raises(UserError, match=r"of sub-1 .* nilearn finds no confounds 'simple'"):
        reasons("simple")


def test_volumes_that_are_scrubbed_are_not_counted(tmp_path, monkeypatch):
    participants(tmp_path / "participants.tsv", [("1", "HC", "M", "20")])
    fmriprep(tmp_path, ["1"])
    kept = np.array([1, 2, 4, 5, 6, 7])
    monkeypatch.setattr("autospec.cohort.check.choose_confounds", lambda *_: (None, kept, []))
    found = check_cohort(settings(tmp_path), networks=5, confounds="scrubbing")
    assert found.volumes == (6, 6)
    with pytest.raises(
        UserError, match="has 8 volumes, of which confounds: scrubbing leaves 6, too few for 7 networks"
    ):
        check_cohort(settings(tmp_path), networks=7, confounds="scrubbing")


def test_an_image_that_was_copied_to_somebody_else_is_warned_of(tmp_path):
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in "1234"])
    fmriprep(tmp_path, ["1", "2", "3"])
    fmriprep(tmp_path, ["4"], volumes=9)
    paths = sorted(tmp_path.glob("sub-*/func/*.nii.gz"))
    assert check_cohort(settings(tmp_path), networks=5).warnings == []
    shutil.copy(paths[0], paths[2])
    (said,) = check_cohort(settings(tmp_path), networks=5).warnings
    assert said.startswith(f"sub-1 and sub-3 have the same image, since {paths[2]} is a copy of {paths[0]}")
    line = build_cohort(settings(tmp_path), None, str(tmp_path / "results"))
    assert line.endswith("; 0 exclusions; warning: sub-1 and sub-3 have the same image")
    image(paths[2])
    assert "warning" not in build_cohort(settings(tmp_path), None, str(tmp_path / "results"))


def test_images_that_differ_are_warned_of(tmp_path):
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in "12"])
    fmriprep(tmp_path, ["1", "2"])
    moved = AFFINE.copy()
    moved[0, 3] += 2
    other = tmp_path / "sub-2/func/sub-2_task-rest_space-MNI152NLin6Asym_desc-preproc_bold"
    image(other.with_suffix(".nii.gz"), affine=moved, time=2.5, description=b"Simulated by hand")
    write(other.with_suffix(".json"), "{}")
    report = check_cohort(settings(tmp_path), networks=5)
    assert len(report.grids) == 2
    assert set(report.repetition_times) == {"2 s", "2.5 s"}
    text = " ".join(report.warnings)
    grid = "10 x 12 x 10 voxels of 20 x 20 x 20 mm from"
    assert f"several grids ({grid} (-90, -126, -72) mm: 1; {grid} (-88, -126, -72) mm: 1), so they differ" in text
    assert "repetition times differ (2 s: 1; 2.5 s: 1)" in text
    assert "ica.grid" not in text
    assert "set ica.grid to template" in " ".join(check_cohort(settings(tmp_path), 5, own_grids=True).warnings)
    assert "some images say that they are simulated" in text


def test_what_headers_say_against_themselves_is_said_once_for_each_kind(tmp_path):
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in "123"])
    fmriprep(tmp_path, ["1", "2", "3"])
    for name, codes in (("1", (1, 1)), ("2", (4, 4)), ("3", (4, 4))):
        path = next(tmp_path.glob(f"sub-{name}/func/*_bold.nii.gz"))
        made = nibabel.load(path)
        made = nibabel.Nifti1Image(np.asarray(made.dataobj) + int(name), made.affine, made.header)
        made.set_sform(AFFINE, codes[0])
        made.set_qform(AFFINE @ np.diag([1, 1, 1 if name == "1" else -1, 1]), codes[1])
        nibabel.save(made, path)
    stem = "task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
    assert check_cohort(settings(tmp_path), networks=5).warnings == [
        f"the header of sub-1_{stem} says scanner coordinates, not MNI space",
        f"the sform and the qform of sub-2_{stem} do not agree within 1 mm; the sform is used (1 more say so, too)",
    ]


def mat_files(folder, count):
    """GIFT's results as .mat files of version 7.3: HDF5 with the axes of every array reversed."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:6, 4:6, 4:6] = 1
    nibabel.save(nibabel.Nifti1Image(mask[..., None], AFFINE), folder / "PMask.nii")
    participants(folder / "participants.tsv", [(f"{i}", "HC", "M", "20") for i in range(1, count + 1)])
    for i in range(1, count + 1):
        with h5py.File(folder / f"P_ica_c{i}-1.mat", "w", userblock_size=512) as file:
            file["tc"], file["ic"] = np.zeros((5, 40)), np.zeros((8, 5))


def test_mat_files_are_opened_and_their_variables_and_shapes_verified(tmp_path):
    mat_files(tmp_path, 7)
    with h5py.File(tmp_path / "P_ica_c2-1.mat", "w") as file:
        file["ic"] = np.zeros((8, 5))
    with h5py.File(tmp_path / "P_ica_c3-1.mat", "w") as file:
        file["tc"], file["ic"] = np.zeros((5, 40)), np.zeros((9, 5))
    with h5py.File(tmp_path / "P_ica_c4-1.mat", "w") as file:
        file["tc"], file["ic"] = np.zeros((6, 40)), np.zeros((8, 5))
    cut = tmp_path / "P_ica_c5-1.mat"
    cut.write_bytes(cut.read_bytes()[:3000])
    with h5py.File(tmp_path / "P_ica_c6-1.mat", "w") as file:  # the other way round, and of other networks
        file["tc"], file["ic"] = np.zeros((30, 4)), np.zeros((8, 4))
    report = check_cohort(settings(tmp_path))
    said = {each.id: each.reason for each in report.exclusions}
    assert sorted(said) == ["2", "3", "4", "5"]
    assert "holds no time courses 'tc'" in said["2"]
    assert "lists 9 voxels, but" in said["3"]
    assert "time courses of 6 networks, but it has maps of 5" in said["4"]
    assert "no readable .mat file" in said["5"]
    assert (report.functional, report.volumes, report.networks) == (3, (30, 40), {"4": 1, "5": 2})
    text = "\n".join(report.lines())
    assert "volumes: 30 to 40; data sets are cut to the fewest" in text
    assert "networks computed before: 4 (1 time courses); 5 (2 time courses)" in text
    assert "different numbers of networks (4, 5)" in text
    with pytest.raises(UserError, match="sub-2 cannot be used"):
        check_cohort(settings(tmp_path, on_bad_subject="fail"))
    assert sum("fewer than min_volumes (35)" in each.reason for each in check_cohort(settings(tmp_path, min_volumes=35)).exclusions) == 1  # fmt: skip


def test_mat_files_of_cobres_size_are_checked_quickly(tmp_path):
    mat_files(tmp_path, 157)
    started = time.perf_counter()
    assert check_cohort(settings(tmp_path)).networks == {"5": 157}
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("shape", "name", "said"),
    [
        ((157, 14000), "COBRE_dataset", None),
        ((157, 100, 140), "COBRE_dataset", None),
        ((157, 14001), "COBRE_dataset", "cannot be divided into 100 components"),
        ((157, 2, 140), "COBRE_dataset", "components 1 to 100, but they are counted from 1 to 2"),
        ((156, 14000), "COBRE_dataset", "has 157 labels, but .* holds 156 subjects: give one label a subject"),
        ((158, 14000), "COBRE_dataset", "has 157 labels, but .* holds 158 subjects"),
        ((157, 14000), "other", "holds no 'COBRE_dataset', only"),
    ],
)
def test_trends_file_is_opened_and_its_shape_verified(tmp_path, shape, name, said):
    with h5py.File(tmp_path / "COBRE_AllData.h5", "w") as file:
        file.create_dataset(name, shape, "f4")
    write(tmp_path / "labels_COBRE.csv", "1\n" * 68 + "2\n" * 89)
    write(tmp_path / "correct_indices_GSP.csv", "1\n50\n100\n")
    chosen = settings(tmp_path, on_bad_subject="fail")
    if said is None:
        report = check_cohort(chosen)
        assert (report.functional, report.volumes, report.networks) == (157, (140, 140), {"3": 157})
    else:
        with pytest.raises(UserError, match=said):
            check_cohort(chosen)


@pytest.mark.parametrize("dtype", [">i2", "<f4", "uint8"])
def test_headers_of_unusual_images(tmp_path, dtype):
    las = AFFINE.copy()
    las[0] = [-20, 0, 0, 90]
    header = nibabel.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    made = nibabel.Nifti1Image(np.ones((*SHAPE, 8, 1), dtype=dtype), las, header)
    made.header.set_slope_inter(2.0, 1.0)
    made.header.set_xyzt_units("mm", "msec")
    made.header["pixdim"][4] = 2000.0
    path = tmp_path / "image.nii"
    nibabel.save(made, path)
    found = read_header(str(path))
    assert (found.shape, found.volumes) == (SHAPE, 8)
    assert found.voxel_mm == (20.0, 20.0, 20.0)
    require_mni(found)
    assert time_between_volumes(str(path), "", None) == 2.0
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is cut short: its header promises"):
        read_header(str(path))


def test_a_gzipped_image_of_several_parts_is_whole(tmp_path):
    path = image(tmp_path / "image.nii.gz")
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    assert read_header(str(path)).volumes == 8
    path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:-1]))
    with pytest.raises(UserError, match="cut short"):
        read_header(str(path))


def test_a_time_that_is_stated_counts_where_files_are_silent_and_may_not_contradict_them(tmp_path):
    silent = image(tmp_path / "a.nii.gz", time=0.0)
    assert time_between_volumes(str(silent), "", 2.0) == 2.0
    with pytest.raises(UserError, match="neither in its header"):
        time_between_volumes(str(silent), "", None)
    with pytest.raises(UserError, match=r"header says 2.5 s, repetition_time says 2 s"):
        time_between_volumes(str(image(tmp_path / "b.nii.gz", time=2.5)), "", 2.0)
