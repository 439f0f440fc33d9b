"""Who takes part, who does not and why, and the tables that say so."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from autospec.cohort.check import check_cohort
from autospec.cohort.displacement import displacement_of, framewise_displacement
from autospec.cohort.files import TextTable
from autospec.cohort.motion import motion_of, motion_of_table, motion_problem
from autospec.cohort.record import groupings_of, read_participants, read_record, require_kind
from autospec.cohort.selection import candidates, functional_files
from autospec.cohort.tables import build_cohort, digest_of
from autospec.errors import UserError
from tests.cohort.trees import cobre, confounds, fmriprep, image, participants, recon, settings, write


def reasons(cohort):
    """Reasons by id and half."""
    return {(each.id, each.part): each.reason for each in cohort.exclusions}


@pytest.fixture
def mixed(tmp_path):
    """A cohort whose two halves cover different people, with everything that can be wrong with a subject."""
    rows = [
        ("0040000", "20", "Female", "Right", "Control", "None"),
        ("0040001", "27", "Male", "Right", "Patient", "295.3"),
        ("0040002", "30", "Male", "Right", "Patient", "295.70 bipolar type"),
        ("0040003", "31", "Male", "Right", "Control", "311"),
        ("0040004", "Disenrolled", "Disenrolled", "Disenrolled", "Disenrolled", "Disenrolled"),
        ("0040005", "40", "Female", "Left", "Somebody", "None"),
        ("0040006", "41", "Female", "Left", "Patient", "295.6"),
        ("0040007", "42", "Female", "Left", "Patient", "295.6"),
        ("0040008", "43", "Male", "Left", "Control", "None"),
    ]
    cobre(tmp_path / "COBRE_phenotypic_data.csv", rows)
    prepared = tmp_path / "derivatives" / "fmriprep"
    fmriprep(prepared, ["0040000", "0040001", "0040002", "0040003", "0040004", "0040008", "9999999"])
    fmriprep(prepared, ["0040008"], moved=0.9)
    subjects_dir = prepared / "sourcedata" / "freesurfer"
    for name in ("sub-0040000", "40001", "0040006", "8888888"):
        recon(subjects_dir / name)
    recon(subjects_dir / "0040002")
    (subjects_dir / "0040002" / "stats" / "rh.aparc.stats").unlink()
    recon(subjects_dir / "fsaverage")
    return tmp_path


def test_the_two_halves_may_cover_different_people(mixed):
    cohort = candidates(settings(mixed, freesurfer=["auto"]))
    assert (cohort.layout, cohort.kind) == ("nitrc", "real")
    people = {each.id: (bool(each.scans), bool(each.freesurfer)) for each in cohort.participants}
    assert people == {
        "0040000": (True, True),
        "0040001": (True, True),
        "0040002": (True, False),
        "0040003": (True, False),
        "0040006": (False, True),
        "0040008": (True, False),
    }
    assert cohort.participants[1].freesurfer == (f"{mixed}/derivatives/fmriprep/sourcedata/freesurfer/40001",)
    found = reasons(cohort)
    assert found[("0040004", "all")] == "Disenrolled"
    assert "'Somebody' in the column 'Subject Type' is none of" in found[("0040005", "all")]
    assert found[("0040006", "functional")] == "there is no functional image of it"
    assert found[("0040007", "all")] == "is in the table of participants, but has no data"
    assert found[("0040003", "structural")] == "there are no FreeSurfer volumes of it"
    assert "no rh.aparc.stats: recon-all has not finished" in found[("0040002", "structural")]
    assert found[("9999999", "all")] == "has an image, but no row in the table of participants"
    assert found[("8888888", "all")] == "has FreeSurfer volumes, but no row in the table of participants"
    assert ("fsaverage", "all") not in found
    assert len(cohort.functional) == 5
    assert len(cohort.structural) == 3


def test_strict_schizophrenia_is_a_choice(mixed):
    cohort = candidates(settings(mixed, diagnosis="strict schizophrenia", freesurfer=["auto"]))
    assert [each.id for each in cohort.participants] == ["0040000", "0040001", "0040006", "0040008"]
    found = reasons(cohort)
    assert found[("0040002", "all")] == "the diagnosis '295.70 bipolar type' is not strict schizophrenia"
    assert "a control with the diagnosis '311'" in found[("0040003", "all")]


def test_on_bad_subject_fail_names_the_first_and_counts_the_rest(mixed):
    with pytest.raises(UserError, match=r"sub-0040002 cannot be used: .*rh\.aparc.*\(4 more cannot be used either\)"):
        candidates(settings(mixed, freesurfer=["auto"], on_bad_subject="fail"))
    # Who was disenrolled, or is in one half only, is no mistake.
    with pytest.raises(UserError, match=r"sub-0040005 cannot be used: .*'Somebody'"):
        candidates(settings(mixed, on_bad_subject="fail"))


def test_a_cohort_of_which_nobody_is_left_says_why(tmp_path):
    participants(tmp_path / "participants.tsv", [("1", "Bipolar")], ("participant_id", "dx"))
    fmriprep(tmp_path, ["1"])
    with pytest.raises(UserError, match=r"nobody in .* can take part: 1 are left out, the first because: .*neither"):
        candidates(settings(tmp_path))


def test_counts_of_cobres_table(tmp_path):
    """The published counts: 148 rows, 2 disenrolled, 72 patients (58 M) and 74 controls (51 M, 72 without a diagnosis)."""
    cells = [("Patient", "Male", "295.3")] * 50 + [("Patient", "Male", "295.70 depressed type")] * 6
    cells += [("Patient", "Male", "290.3"), ("Patient", "Male", "296.4")] + [("Patient", "Female", "295.9")] * 14
    cells += [("Control", "Male", "None")] * 50 + [("Control", "Male", "311")]
    cells += [("Control", "Female", "None")] * 22 + [("Control", "Female", "296.26")]
    rows = [(f"{40000 + i:07d}", "30", sex, "Right", kind, code) for i, (kind, sex, code) in enumerate(cells)]
    rows += [(f"{40200 + i:07d}", *["Disenrolled"] * 5) for i in range(2)]
    table = cobre(tmp_path / "COBRE_phenotypic_data.csv", rows)
    fmriprep(tmp_path, [row[0] for row in rows[:1]])
    for name in [row[0] for row in rows]:
        path = (
            tmp_path / f"sub-{name}" / "func" / f"sub-{name}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
        )
        write(path, "a file that is not opened")
    started = time.perf_counter()
    cohort = candidates(settings(tmp_path))
    seconds = time.perf_counter() - started
    counts = pd.Series([f"{p.person.diagnosis} {p.person.sex}" for p in cohort.participants]).value_counts()
    assert counts.to_dict() == {"SZ M": 58, "SZ F": 14, "HC M": 51, "HC F": 23}
    assert [each.reason for each in cohort.exclusions] == ["Disenrolled"] * 2
    assert seconds < 1.0
    strict = candidates(settings(tmp_path, diagnosis="strict schizophrenia"))
    counts = pd.Series([p.person.diagnosis for p in strict.participants]).value_counts()
    assert counts.to_dict() == {"SZ": 64, "HC": 72}
    assert len(strict.exclusions) == 12
    assert table.read_text().startswith(",Current Age")


def test_candidates_start_without_heavy_packages(mixed):
    code = (
        "import json, sys; from autospec.cohort.selection import candidates; "
        f"candidates(json.loads({json.dumps(json.dumps(settings(mixed, freesurfer=['auto'])))})); "
        "print(sorted({'nibabel', 'torch', 'pandas', 'xarray', 'scipy', 'h5py'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_halves_may_not_mix_real_and_simulated_data(mixed, tmp_path_factory):
    other = tmp_path_factory.mktemp("simulated")
    write(other / "dataset_description.json", '{"Simulated": true}')
    recon(other / "freesurfer" / "0040000")
    with pytest.raises(UserError, match=r"\(real\) and .*\(simulated\) are of different kinds"):
        candidates(settings(mixed, freesurfer=[str(other / "freesurfer")]))


def test_niaks_codes_of_sexes_must_be_explained(tmp_path):
    write(tmp_path / "cobre_model_group.csv", ",sz,age,sex,FD\nszxxx0040000,1,20,1,0.2\ncontxxx0040013,0,30,2,0.1\n")
    for name in ("szxxx0040000", "contxxx0040013"):
        image(tmp_path / f"fmri_{name}_session1_run1.nii.gz")
    with pytest.raises(UserError, match="sex_labels"):
        candidates(settings(tmp_path))
    cohort = candidates(settings(tmp_path, sex_labels={"1": "M", "2": "F"}))
    assert [(p.person.diagnosis, p.person.sex, p.person.age) for p in cohort.participants] == [
        ("SZ", "M", "20"),
        ("HC", "F", "30"),
    ]


# Motion


def test_motion_of_fmripreps_table(tmp_path):
    path = confounds(tmp_path / "c.tsv", [9.0, 0.1, 0.2, 0.6], outliers=2)
    motion = motion_of([str(path)], None)
    expected = pd.read_csv(path, sep="\t")["framewise_displacement"].mean()
    assert motion.mean_fd == pytest.approx(expected) == pytest.approx(0.3)
    assert (motion.volumes, motion.usable_volumes) == (4, 2)


def test_motion_over_runs_counts_volumes(tmp_path):
    paths = [confounds(tmp_path / "a.tsv", [0.2] * 10), confounds(tmp_path / "b.tsv", [0.5] * 5)]
    motion = motion_of([str(path) for path in paths], None)
    assert motion.mean_fd == pytest.approx((0.2 * 10 + 0.5 * 5) / 15)
    assert motion.volumes == 15


def test_motion_of_niaks_table_and_of_phenotypes():
    table = TextTable("t", ["FD", "scrub"], [["0.1", "0"], ["0.3", "1"], ["0.2", "0"]])
    motion = motion_of_table(table)
    assert motion.mean_fd == pytest.approx(0.2)
    assert (motion.volumes, motion.usable_volumes) == (3, 2)
    motion = motion_of([], {"FD": "0.25", "Frames OK": "133"})
    assert (motion.mean_fd, motion.volumes, motion.usable_volumes) == (0.25, None, 133)
    assert motion_of([], {"FD": "n/a"}).mean_fd is None
    assert motion_of([], {"FD": "nan"}).mean_fd is None
    with pytest.raises(UserError, match="table of confounds t holds a cell that is no number"):
        motion_of_table(TextTable("t", ["FD"], [["x"]]))


def test_framewise_displacement_follows_power():
    motion = np.zeros((4, 6))
    motion[1:] += [1, -2, 0, 0.01, 0, 0]
    motion[3, 5] = -0.02
    expected = [np.nan, 3.5, 0, 1.0]  # the first volume moved from nowhere
    np.testing.assert_allclose(framewise_displacement(motion), expected)
    columns = dict(zip(("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"), motion.T, strict=True))
    found, source = displacement_of(columns)
    np.testing.assert_allclose(found, expected)
    assert source.startswith("computed from trans_x")
    assert displacement_of({**columns, "FD": np.arange(4.0)})[1] == "FD"
    # A column that says nothing is none; NIAK's turns are in degrees.
    assert displacement_of({**columns, "FD": np.full(4, np.nan)})[1].startswith("computed")
    assert displacement_of({"motion_tx": motion[:, 0], "motion_rx": motion[:, 3]}) is None


def test_motion_is_computed_where_a_table_has_parameters_alone(tmp_path):
    rows = [["0"] * 6, ["0.1", "0", "0", "0", "0", "0.002"], ["0.1", "0.3", "0", "0", "0", "0.002"]]
    table = TextTable("t", ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"], rows)
    motion = motion_of_table(table)
    assert motion.mean_fd == pytest.approx((0.2 + 0.3) / 2)
    assert "mean framewise displacement of 0.250 mm" in motion_problem(motion, 0.2, None)
    unknown = motion_of_table(TextTable("t", ["csf"], [["1"], ["2"]]))
    said = motion_problem(unknown, 0.2, None)
    assert "its table of confounds has neither framewise_displacement nor trans_x" in said


@pytest.mark.parametrize("column", ["FD", "mean_FD", "Frames ok"])
@pytest.mark.parametrize("text", ["0,15", "much", "-1", "inf"])
def test_a_motion_that_is_no_number_is_refused_by_name(tmp_path, column, text):
    columns = ("id", "dx", column)
    participants(tmp_path / "participants.tsv", [("1", "HC", "0.25"), ("2", "SZ", text)], columns)
    for name in "12":
        image(tmp_path / f"sub-{name}/func/sub-{name}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    with pytest.raises(UserError, match=f"the row of sub-2 in .* has '{text}' in the column {column}: write a number"):
        candidates(settings(tmp_path))
    # Where there are tables of confounds, the column is not read.
    for name in "12":
        confounds(tmp_path / f"sub-{name}/func/sub-{name}_task-rest_desc-confounds_timeseries.tsv", [0.1] * 8)
    assert len(candidates(settings(tmp_path)).participants) == 2


def test_limits_of_motion():
    moved = motion_of([], {"FD": "0.25", "Frames OK": "133"})
    assert motion_problem(moved, 0.25, 133) == ""
    assert "0.250 mm, more than max_mean_fd (0.2 mm)" in motion_problem(moved, 0.2, None)
    assert "133 usable volumes, fewer than min_volumes (134)" in motion_problem(moved, None, 134)
    assert "nothing says how much it moved" in motion_problem(motion_of([], None), 0.5, None)
    assert motion_problem(motion_of([], None), None, 100) == ""


# Tables


def test_the_cohorts_tables(mixed, tmp_path):
    chosen = settings(mixed, freesurfer=["auto"], max_mean_fd=0.5, groupings=["Handedness"])
    said = build_cohort(chosen, None, str(tmp_path / "out"))
    assert said.startswith(
        "real cohort (nitrc): 5 participants (HC: 2, SZ: 3), 4 with functional and 3 with structural"
    )
    # Read as anyone would, independently of our own reader.
    table = pd.read_csv(tmp_path / "out/participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert table["participant_id"].tolist() == [f"sub-004000{i}" for i in (0, 1, 2, 3, 6)]
    assert table["diagnosis"].tolist() == ["HC", "SZ", "SZ", "HC", "SZ"]
    assert table["diagnosis_sex"].tolist() == ["HC F", "SZ M", "SZ M", "HC M", "SZ F"]
    assert table["Handedness"].tolist() == ["Right"] * 4 + ["Left"]
    assert table["functional"].tolist() == ["yes"] * 4 + ["no"]
    assert table["structural"].tolist() == ["yes", "yes", "no", "no", "yes"]
    assert table["site"].tolist() == ["n/a"] * 5
    assert table["mean_fd"].tolist() == ["0.1"] * 4 + ["n/a"]
    assert table["usable_volumes"].tolist() == ["6"] * 4 + ["n/a"]
    first = table.iloc[0]
    assert nibabel.load(first["bold"]).shape[3] == 8
    stats = [f"{first['freesurfer']}/stats/{name}.stats" for name in ("aseg", "lh.aparc", "rh.aparc")]
    content = b"".join(Path(path).read_bytes() for path in stats)
    assert first["structural_digest"] == hashlib.sha256(content).hexdigest()[:16]
    assert table["structural_digest"].tolist()[2] == "n/a"
    excluded = pd.read_csv(tmp_path / "out/exclusions.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert excluded.columns.tolist() == ["participant_id", "part", "reason"]
    moved = excluded[excluded["participant_id"] == "sub-0040008"]
    assert "0.900 mm, more than max_mean_fd" in " ".join(moved["reason"])
    dictionary = json.loads((tmp_path / "out/participants.json").read_text())
    assert list(dictionary) == [name for name in table.columns]
    assert all(each["Description"] for each in dictionary.values())
    record = read_record(str(tmp_path / "out"))
    assert (record["kind"], record["layout"], record["functional"], record["structural"]) == ("real", "nitrc", 4, 3)
    assert record["groups"] == {"HC": 2, "SZ": 3}


def test_the_digest_of_a_cohort_knows_its_content_and_not_its_place(mixed, tmp_path):
    def digest(name, **more):
        build_cohort(settings(mixed, **more), None, str(tmp_path / name))
        return read_record(str(tmp_path / name))["digest"]

    before = digest("a")
    mixed = mixed.rename(mixed.with_name("moved"))
    tmp_path = mixed
    assert digest("b") == before
    assert digest("c", diagnosis="strict schizophrenia") != before
    file = mixed / "derivatives/fmriprep/sub-0040000/func/sub-0040000_task-rest_desc-confounds_timeseries.tsv"
    file.write_text(file.read_text() + "0.1\t0.1\t0.0\t0.0\n")
    assert digest("d") != before


def test_what_a_subjects_own_job_found_is_taken_over(mixed, tmp_path):
    cohort = candidates(settings(mixed))
    statuses = {}
    for each in cohort.functional:
        content = {"status": "included", "digest": f"of-{each.id}"}
        if each.id == "0040001":
            content = {"status": "excluded", "reason": "the image is zero everywhere"}
        statuses[each.id] = str(write(tmp_path / f"ica/sub-{each.id}/status.json", json.dumps(content)))
    build_cohort(settings(mixed), statuses, str(tmp_path / "out"))
    rows = read_participants(str(tmp_path / "out/participants.tsv"))
    assert [row["id"] for row in rows] == ["0040000", "0040002", "0040003", "0040008"]
    assert rows[0]["functional_digest"] == "of-0040000"
    excluded = (tmp_path / "out/exclusions.tsv").read_text()
    assert "sub-0040001\tfunctional\tthe image is zero everywhere" in excluded
    # Whoever has volumes stays in the structural half.
    build_cohort(settings(mixed, freesurfer=["auto"]), statuses, str(tmp_path / "out"))
    rows = {row["id"]: row for row in read_participants(str(tmp_path / "out/participants.tsv"))}
    assert (rows["0040001"]["functional"], rows["0040001"]["structural"], rows["0040001"]["bold"]) == (
        "no",
        "yes",
        "n/a",
    )
    del statuses["0040003"]
    with pytest.raises(UserError, match="no status of sub-0040003"):
        build_cohort(settings(mixed), statuses, str(tmp_path / "out"))


@pytest.mark.parametrize(("drop", "used", "usable"), [(0, 8, 6), (1, 7, 6), (4, 4, 4), (4, 3, 3)])
def test_usable_volumes_are_among_those_that_are_used(tmp_path, drop, used, usable):
    participants(tmp_path / "participants.tsv", [("1", "HC", "M", "20")])
    fmriprep(tmp_path, ["1"])  # the first two of its eight volumes are outliers
    content = json.dumps({"status": "included", "volumes": used, "digest": "of-1"})
    statuses = {"1": str(write(tmp_path / "ica/sub-1/status.json", content))}
    build_cohort(settings(tmp_path, min_volumes=usable), statuses, str(tmp_path / "out"), drop)
    (row,) = read_participants(str(tmp_path / "out/participants.tsv"))
    assert (row["volumes"], row["usable_volumes"]) == ("8", str(usable))
    assert f"\t{usable}\t" in (tmp_path / "out/scans.tsv").read_text()
    with pytest.raises(UserError, match=rf"{usable} usable volumes, fewer than min_volumes \({usable + 1}\)"):
        build_cohort(settings(tmp_path, min_volumes=usable + 1), statuses, str(tmp_path / "out"), drop)


def test_motion_is_that_of_the_volumes_that_are_used(tmp_path):
    path = confounds(tmp_path / "c.tsv", [9.0, 0.8, 0.2, 0.6], outliers=2)
    motion = motion_of([str(path)], None, drop_volumes=2)
    assert motion.mean_fd == pytest.approx(0.4)
    assert (motion.volumes, motion.usable_volumes) == (4, 2)


def test_another_kind_of_cohort_in_the_same_place_is_refused(mixed, tmp_path):
    build_cohort(settings(mixed), None, str(tmp_path / "out"))
    require_kind(str(tmp_path / "out"), "real")
    require_kind(str(tmp_path / "nowhere"), "simulated")
    with pytest.raises(UserError, match="holds results of a real cohort, and this one is simulated"):
        require_kind(str(tmp_path / "out"), "simulated")


def test_limits_that_leave_nobody_are_refused(mixed, tmp_path):
    said = r"nobody is left of 5 participants: of sub-\d+ \(and of \d more the like\): .*max_mean_fd"
    with pytest.raises(UserError, match=said):
        build_cohort(settings(mixed, max_mean_fd=0.01), None, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_groupings_of_a_table(mixed, tmp_path):
    build_cohort(settings(mixed, groupings=["Handedness"]), None, str(tmp_path / "out"))
    found = groupings_of(read_participants(str(tmp_path / "out/participants.tsv")))
    assert list(found) == ["diagnosis", "sex", "diagnosis_sex", "Handedness"]
    participants(tmp_path / "t/participants.tsv", [("1", "HC", "M", "3", "x")], ("id", "dx", "sex", "age", "bold"))
    fmriprep(tmp_path / "t", ["1"])
    chosen = settings(tmp_path / "t", layout="bids", groupings=["bold"])
    with pytest.raises(UserError, match="the grouping 'bold' has the name of a column"):
        build_cohort(chosen, None, str(tmp_path / "out"))


def test_spellings_of_a_site_are_one_site(tmp_path):
    columns = ("participant_id", "diagnosis", "sex", "site", "drug")
    rows = [("1", "HC", "M", "Rome", "a b"), ("2", "SZ", "F", "rome", "A  B"), ("3", "SZ", "F", "Rome", "a b")]
    participants(tmp_path / "participants.tsv", rows, columns)
    fmriprep(tmp_path, ["1", "2", "3"])
    chosen = settings(tmp_path, groupings=["drug"])
    build_cohort(chosen, None, str(tmp_path / "out"))
    found = groupings_of(read_participants(str(tmp_path / "out/participants.tsv")))
    assert (found["site"], found["drug"]) == (["Rome"] * 3, ["a b"] * 3)
    report = check_cohort(chosen, networks=5)
    assert report.groupings == {"drug": {"a b": 3}}
    assert "warning: site: 'Rome' (2), 'rome' (1) are taken as one label, 'Rome'" in report.lines()


def test_the_site_is_a_grouping_where_it_is_known(tmp_path):
    columns = ("participant_id", "diagnosis", "sex", "site")
    participants(tmp_path / "participants.tsv", [("1", "HC", "M", "Rome"), ("2", "SZ", "n/a", "Bonn")], columns)
    fmriprep(tmp_path, ["1", "2"])
    build_cohort(settings(tmp_path, groupings=["site"]), None, str(tmp_path / "out"))
    found = groupings_of(read_participants(str(tmp_path / "out/participants.tsv")))
    assert found["site"] == ["Rome", "Bonn"]
    assert found["sex"] == ["M", "n/a"]
    assert found["diagnosis_sex"] == ["HC M", "n/a"]


def test_files_of_a_subjects_job(tmp_path):
    participants(tmp_path / "participants.tsv", [("1", "HC")], ("id", "dx"))
    fmriprep(tmp_path, ["1"])
    (only,) = candidates(settings(tmp_path)).functional
    names = [path.rsplit("/", 1)[1] for path in functional_files(only)]
    assert names == [
        "sub-1_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz",
        "sub-1_task-rest_desc-confounds_timeseries.tsv",
        "sub-1_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.json",
    ]
    assert digest_of([]) == ""
    with pytest.raises(UserError, match="cannot be read"):
        digest_of([str(tmp_path / "gone")])


def test_all_images_are_told_apart_by_session_and_run(tmp_path):
    participants(tmp_path / "participants.tsv", [("1", "HC", "M", "3"), ("2", "SZ", "F", "4")])
    for session, run in (("pre", "1"), ("pre", "2"), ("post", "1")):
        fmriprep(tmp_path, ["1"], session=session, run=run)
    fmriprep(tmp_path, ["2"])
    with pytest.raises(UserError, match=r"sub-1 has several images that fit.*or set scans to first or all"):
        candidates(settings(tmp_path))
    cohort = candidates(settings(tmp_path, scans="all"))
    assert list(cohort.scans) == ["1_ses-post_run-1", "1_ses-pre_run-1", "1_ses-pre_run-2", "2"]
    participant, scan = cohort.scans["1_ses-pre_run-2"]
    assert (participant.id, scan.session, scan.run) == ("1", "pre", "2")
    assert list(candidates(settings(tmp_path, scans="first")).scans) == ["1", "2"]
