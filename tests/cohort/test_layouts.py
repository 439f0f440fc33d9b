"""Every layout in which people hold COBRE, with the traps of each."""

import json
import os
import re
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
import scipy.io

from autospec.cohort import gift, nitrc, trends
from autospec.cohort.bids import entities_of, read_bids
from autospec.cohort.layouts import description_of, is_simulated, read_layout, recognise
from autospec.cohort.precomputed import read_timecourses, write_timecourses
from autospec.cohort.record import read_participants, read_scans
from autospec.cohort.selection import candidates
from autospec.cohort.subjects import Done, Scan
from autospec.cohort.tables import build_cohort
from autospec.errors import UserError
from tests.cohort.trees import AFFINE, cobre, confounds, fmriprep, image, participants, settings, write

PEOPLE = [("sub-01", "SZ", "M", "30"), ("sub-02", "HC", "F", "n/a")]


def by_id(found):
    """Subjects by id."""
    return {subject.id: subject for subject in found[1]}


# BIDS and fMRIPrep


@pytest.fixture
def derivatives(tmp_path):
    """FMRIPrep's derivatives of two subjects, below their BIDS tree."""
    participants(tmp_path / "participants.tsv", PEOPLE)
    fmriprep(tmp_path / "derivatives" / "fmriprep", ["01", "02"])
    return tmp_path


@pytest.mark.parametrize("below", ["", "derivatives/fmriprep"])
def test_fmripreps_derivatives_are_read_from_the_tree_or_from_themselves(derivatives, below):
    layout, subjects = read_layout(str(derivatives / below), settings(derivatives / below))
    assert layout == "bids"
    assert [subject.id for subject in subjects] == ["01", "02"]
    first = subjects[0]
    func = derivatives / "derivatives/fmriprep/sub-01/func"
    assert first.phenotype == {"diagnosis": "SZ", "sex": "M", "age": "30"}
    assert (first.done.smoothing_mm, first.done.confounds) == (0.0, "none")
    scan = first.scans[0]
    assert scan.bold == str(func / "sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    assert scan.confounds == str(func / "sub-01_task-rest_desc-confounds_timeseries.tsv")
    assert scan.sidecar == str(func / "sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.json")
    assert (scan.task, scan.session, scan.run, scan.space) == ("rest", "", "", "MNI152NLin6Asym")


def test_6asym_goes_before_2009casym_and_may_be_overruled(derivatives):
    fmriprep(derivatives / "derivatives/fmriprep", ["01", "02"], space="MNI152NLin2009cAsym")
    fmriprep(derivatives / "derivatives/fmriprep", ["01", "02"], space="T1w")
    _, subjects = read_layout(str(derivatives), settings(derivatives))
    assert {subject.scans[0].space for subject in subjects} == {"MNI152NLin6Asym"}
    assert {len(subject.scans) for subject in subjects} == {1}
    _, subjects = read_layout(str(derivatives), settings(derivatives, space="MNI152NLin2009cAsym"))
    assert {subject.scans[0].space for subject in subjects} == {"MNI152NLin2009cAsym"}


def test_a_space_that_all_have_goes_before_one_that_some_lack(derivatives):
    fmriprep(derivatives / "derivatives/fmriprep", ["01", "02", "03"], space="MNI152NLin2009cAsym")
    participants(derivatives / "participants.tsv", [*PEOPLE, ("03", "HC", "F", "29")])
    _, subjects = read_layout(str(derivatives), settings(derivatives))
    assert [subject.scans[0].space for subject in subjects] == ["MNI152NLin2009cAsym"] * 3


def test_a_subject_in_its_own_space_only_is_a_problem_with_advice(tmp_path):
    participants(tmp_path / "participants.tsv", PEOPLE)
    fmriprep(tmp_path, ["01"])
    fmriprep(tmp_path, ["02"], space="T1w")
    found = by_id(read_layout(str(tmp_path), settings(tmp_path)))
    assert found["01"].scans
    assert found["02"].scans == ()
    assert "in the space T1w, not in MNI152NLin6Asym or MNI152NLin2009cAsym" in found["02"].problem
    assert "--output-spaces" in found["02"].problem


def test_sessions_and_runs_are_chosen_or_listed(tmp_path):
    participants(tmp_path / "participants.tsv", PEOPLE[:1])
    for session, run in (("1", "1"), ("1", "2"), ("2", "1"), ("10", "1")):
        fmriprep(tmp_path, ["01"], session=session, run=run)
    with pytest.raises(UserError, match=r"sub-01 has several images that fit: .*first or all") as caught:
        read_bids(str(tmp_path), settings(tmp_path))
    assert "sub-01_ses-1_task-rest_run-2_space" in str(caught.value)

    def chosen(**more):
        (subject,) = read_bids(str(tmp_path), settings(tmp_path, **more))
        return [(scan.session, scan.run, Path(scan.confounds).name) for scan in subject.scans]

    assert chosen(session="2") == [("2", "1", "sub-01_ses-2_task-rest_run-1_desc-confounds_timeseries.tsv")]
    assert chosen(session="1", run="02")[0][:2] == ("1", "2")
    assert chosen(session="02") == chosen(session="2")
    assert [each[:2] for each in chosen(scans="first")] == [("1", "1")]
    assert [each[:2] for each in chosen(scans="all")] == [("1", "1"), ("1", "2"), ("2", "1"), ("10", "1")]
    (subject,) = read_bids(str(tmp_path), settings(tmp_path, session="3"))
    assert subject.problem == "none of its images has ses-3"


def test_other_entities_need_a_rule_of_their_own(tmp_path):
    participants(tmp_path / "participants.tsv", PEOPLE[:1])
    func = tmp_path / "sub-01/func"
    for state in ("open", "closed"):
        image(func / f"sub-01_task-rest_acq-{state}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
        confounds(func / f"sub-01_task-rest_acq-{state}_desc-confounds_regressors.tsv", [0.1] * 8)
    with pytest.raises(UserError, match=r"choose with task, session, run, space or entities\.$"):
        read_bids(str(tmp_path), settings(tmp_path, scans="all"))
    (subject,) = read_bids(str(tmp_path), settings(tmp_path, entities={"acq": "closed"}))
    assert subject.scans[0].confounds.endswith("sub-01_task-rest_acq-closed_desc-confounds_regressors.tsv")


def test_raw_bids_images_are_refused_with_the_command_to_run(tmp_path):
    participants(tmp_path / "participants.tsv", PEOPLE[:1])
    image(tmp_path / "sub-01/func/sub-01_task-rest_bold.nii.gz")
    assert recognise(str(tmp_path)) == "bids"
    command = f"fmriprep {tmp_path} {tmp_path}/derivatives/fmriprep participant --output-spaces MNI152NLin6Asym:res-2"
    with pytest.raises(UserError, match=re.escape(command)):
        read_layout(str(tmp_path), settings(tmp_path))


def test_a_pointer_in_the_place_of_an_image_is_a_problem(derivatives):
    file = (
        derivatives / "derivatives/fmriprep/sub-02/func/sub-02_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
    )
    file.unlink()
    file.symlink_to("../../.git/annex/objects/x/MD5E-s30--1.nii.gz")
    found = by_id(read_layout(str(derivatives), settings(derivatives)))
    assert found["01"].problem == ""
    assert "git-annex pointer" in found["02"].problem


def test_a_tree_without_a_table_says_where_one_is_expected(tmp_path):
    fmriprep(tmp_path / "deep" / "tree", ["01"])
    with pytest.raises(UserError, match=r"has no participants\.tsv"):
        read_layout(str(tmp_path / "deep" / "tree"), settings(tmp_path))


def test_entities():
    name = "sub-01_ses-1_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
    assert entities_of(name) == {
        "sub": "01",
        "ses": "1",
        "task": "rest",
        "space": "MNI152NLin6Asym",
        "desc": "preproc",
    }


# NIAK


def test_niak_017_gives_ids_their_zeros_back(tmp_path):
    header = "ID\tCurrent Age\tGender\tHandedness\tSubject Type\tDiagnosis\tFrames OK\tFD\tFD Scrubbed\n"
    rows = "40000\t20\tFemale\tRight\tPatient\t295.3\t133\t0.3\t0.2\n40001\t27\tMale\tRight\tControl\tNone\t150\t0.1\t0.1\n"
    write(tmp_path / "phenotypic_data.tsv.gz", header + rows)
    for name in ("0040000", "0040001"):
        image(tmp_path / f"fmri_{name}.nii.gz")
        write(tmp_path / f"fmri_{name}.tsv.gz", "FD\tscrub\n" + "0.1\t0\n" * 7 + "0.9\t1\n")
    layout, subjects = read_layout(str(tmp_path), settings(tmp_path))
    assert layout == "niak"
    assert [subject.id for subject in subjects] == ["0040000", "0040001"]
    assert subjects[0].phenotype["Diagnosis"] == "295.3"
    assert subjects[1].phenotype["Diagnosis"] == "None"
    assert subjects[0].scans[0].confounds == str(tmp_path / "fmri_0040000.tsv.gz")
    assert subjects[0].done.confounds == "none"
    assert subjects[0].done.smoothing_mm == 0.0
    assert subjects[0].done.repetition_time == 2.0


def test_niak_0124_knows_its_groups_by_sz_and_is_smoothed_already(tmp_path):
    write(
        tmp_path / "cobre_model_group.csv",
        " , sz, age, sex, FD\nszxxx0040000, 1, 20, 1, 0.2\ncontxxx0040013, 0, 30, 0, 0.1\n",
    )
    image(tmp_path / "fmri_szxxx0040000_session1_run1.nii.gz", volumes=6)
    image(tmp_path / "fmri_contxxx0040013_session1_run1.nii.gz", volumes=8)
    layout, subjects = read_layout(str(tmp_path), settings(tmp_path))
    assert layout == "niak"
    assert [(subject.id, subject.phenotype["sz"]) for subject in subjects] == [("0040000", "1"), ("0040013", "0")]
    assert subjects[0].done.smoothing_mm == 6.0
    assert "removed" in subjects[0].done.confounds
    image(tmp_path / "fmri_szxxx0040000_session1_run2.nii.gz")
    with pytest.raises(UserError, match=r"0040000 has several images: .*run1.*run2"):
        read_layout(str(tmp_path), settings(tmp_path))
    _, subjects = read_layout(str(tmp_path), settings(tmp_path, run="1"))
    assert [len(subject.scans) for subject in subjects] == [1, 1]


def test_niak_without_its_table_says_which(tmp_path):
    image(tmp_path / "fmri_0040000.nii.gz")
    with pytest.raises(UserError, match=r"no phenotypic_data\.tsv\.gz"):
        read_layout(str(tmp_path), settings(tmp_path))


# NITRC

COBRE_ROWS = [
    ("0040000", "20", "Female", "Right", "Control", "None"),
    ("0040001", "27", "Male", "Right", "Patient", "295.3"),
]


@pytest.fixture
def raw(tmp_path):
    """NITRC's layout, raw."""
    folder = tmp_path / "COBRE"
    cobre(folder / "COBRE_phenotypic_data.csv", COBRE_ROWS)
    for name in ("0040000", "0040001"):
        image(folder / name / "session_1/rest_1/rest.nii.gz")
        image(folder / name / "session_1/anat_1/mprage.nii.gz")
    return folder


def test_raw_nitrc_images_are_refused_with_both_commands(raw):
    assert recognise(str(raw)) == "nitrc"
    with pytest.raises(UserError, match="raw images only, which are not in MNI space") as caught:
        read_layout(str(raw), settings(raw))
    assert f"autospec bidsify {raw} {raw}_bids" in str(caught.value)
    assert f"fmriprep {raw}_bids {raw}_bids/derivatives/fmriprep participant" in str(caught.value)


def test_preprocessed_images_in_nitrcs_folders_are_read(raw):
    for name in ("0040000", "0040001"):
        image(raw / name / "session_1/rest_1/swrest.nii.gz")
    _, subjects = read_layout(str(raw), settings(raw))
    assert [Path(subject.scans[0].bold).name for subject in subjects] == ["swrest.nii.gz"] * 2
    assert subjects[0].phenotype["Diagnosis"] == "None"
    assert subjects[0].done.smoothing_mm is None
    image(raw / "0040001/session_1/rest_1/wrest.nii.gz")
    with pytest.raises(UserError, match=r"0040001 has several images that fit: .*swrest\.nii\.gz.*wrest\.nii\.gz"):
        read_layout(str(raw), settings(raw))
    with pytest.raises(UserError, match="keep one image for each run"):
        read_layout(str(raw), settings(raw, scans="all"))


def test_one_raw_image_among_preprocessed_ones_is_a_problem(raw):
    image(raw / "0040000/session_1/rest_1/swrest.nii.gz")
    found = by_id(read_layout(str(raw), settings(raw)))
    assert found["0040000"].problem == ""
    assert "only image is raw" in found["0040001"].problem


def test_preprocessed_images_beside_nitrcs_table_are_found_by_id(tmp_path):
    cobre(tmp_path / "COBRE_phenotypic_data.csv", COBRE_ROWS)
    image(tmp_path / "w0040000_rest_0040000.nii.gz")
    image(tmp_path / "rest-0040000-smooth.nii.gz")
    image(tmp_path / "rest-0040001-smooth.nii.gz")
    with pytest.raises(UserError, match="0040000 has several"):
        read_layout(str(tmp_path), settings(tmp_path))
    (tmp_path / "w0040000_rest_0040000.nii.gz").unlink()
    _, subjects = read_layout(str(tmp_path), settings(tmp_path))
    assert [Path(subject.scans[0].bold).name for subject in subjects] == [
        "rest-0040000-smooth.nii.gz",
        "rest-0040001-smooth.nii.gz",
    ]


@pytest.mark.parametrize("name", ["sub_012_run_107.nii.gz", "session-107_0012.nii.gz", "sub_12_ses_107.nii.gz"])
def test_the_number_of_a_run_or_session_is_no_id(name, tmp_path):
    rows = [(each, *row[1:]) for each, row in zip(("0107", "0012"), COBRE_ROWS, strict=False)]
    cobre(tmp_path / "COBRE_phenotypic_data.csv", rows)
    image(tmp_path / "swa_107.nii.gz")
    image(tmp_path / name)
    _, subjects = read_layout(str(tmp_path), settings(tmp_path))
    found = {subject.id.lstrip("0"): Path(subject.scans[0].bold).name for subject in subjects}
    assert found == {"107": "swa_107.nii.gz", "12": name}


def test_an_image_that_could_be_of_two_participants_is_refused(tmp_path):
    rows = [(each, *row[1:]) for each, row in zip(("0107", "0012"), COBRE_ROWS, strict=False)]
    cobre(tmp_path / "COBRE_phenotypic_data.csv", rows)
    image(tmp_path / "swa_12_v1_107.nii.gz")
    with pytest.raises(UserError, match=r"swa_12_v1_107\.nii\.gz could be an image of each of 0012, 0107: rename it"):
        read_layout(str(tmp_path), settings(tmp_path))


@pytest.mark.parametrize(("in_table", "in_name"), [("40000", "0040000"), ("0040000", "40000")])
def test_images_beside_nitrcs_table_are_found_where_ids_lost_their_zeros(tmp_path, in_table, in_name):
    cobre(tmp_path / "COBRE_phenotypic_data.csv", [(in_table, *COBRE_ROWS[0][1:])])
    image(tmp_path / f"swa_{in_name}_rest_01.nii.gz")
    _, (subject,) = read_layout(str(tmp_path), settings(tmp_path))
    assert (subject.id, subject.phenotype["Subject Type"]) == (in_name, "Control")
    assert Path(subject.scans[0].bold).name == f"swa_{in_name}_rest_01.nii.gz"


def test_images_beside_nitrcs_table_that_no_id_names_are_not_called_raw(tmp_path):
    cobre(tmp_path / "COBRE_phenotypic_data.csv", COBRE_ROWS)
    with pytest.raises(UserError, match=r"holds no images: put preprocessed ones there"):
        read_layout(str(tmp_path), settings(tmp_path))
    image(tmp_path / "swa_first.nii.gz")
    with pytest.raises(UserError, match=r"holds swa_first.nii.gz, but no id .* 0040000, 0040001\) is in its name"):
        read_layout(str(tmp_path), settings(tmp_path))
    image(tmp_path / "0040000/session_1/rest_1/rest.nii.gz")
    with pytest.raises(UserError, match=r"raw images only.* \(and swa_first.nii.gz, but no id .*autospec bidsify"):
        read_layout(str(tmp_path), settings(tmp_path))


def test_fmripreps_derivatives_beside_nitrcs_table_are_read(tmp_path):
    cobre(tmp_path / "COBRE_phenotypic_data.csv", COBRE_ROWS)
    fmriprep(tmp_path / "derivatives" / "fmriprep", ["0040000", "0040001"])
    layout, subjects = read_layout(str(tmp_path), settings(tmp_path))
    assert layout == "nitrc"
    assert subjects[1].phenotype["Subject Type"] == "Patient"
    assert "desc-preproc" in subjects[1].scans[0].bold


def test_nitrcs_folders_without_the_table_are_recognised_as_such(raw):
    (raw / "COBRE_phenotypic_data.csv").unlink()
    with pytest.raises(UserError, match=r"has no COBRE_phenotypic_data\.csv: copy it there"):
        recognise(str(raw))


def test_bidsify_makes_a_tree_of_links_that_bids_readers_understand(raw, tmp_path):
    image(raw / "0040001/session_2/rest_1/rest.nii.gz")
    image(raw / "0040001/session_2/rest_2/rest.nii.gz")
    target = tmp_path / "COBRE_bids"
    said = nitrc.bidsify(str(raw), str(target))
    assert "links for 2 participants" in said
    assert f"fmriprep {target} " in said
    links = sorted(str(path.relative_to(target)) for path in target.rglob("*.nii.gz"))
    assert links == [
        "sub-0040000/anat/sub-0040000_T1w.nii.gz",
        "sub-0040000/func/sub-0040000_task-rest_bold.nii.gz",
        "sub-0040001/ses-1/anat/sub-0040001_ses-1_T1w.nii.gz",
        "sub-0040001/ses-1/func/sub-0040001_ses-1_task-rest_bold.nii.gz",
        "sub-0040001/ses-2/func/sub-0040001_ses-2_task-rest_run-1_bold.nii.gz",
        "sub-0040001/ses-2/func/sub-0040001_ses-2_task-rest_run-2_bold.nii.gz",
    ]
    for link in links:
        path = target / link
        assert path.is_symlink()
        assert not os.path.isabs(os.readlink(path))
        assert nibabel.load(path).shape[3] == 8
    assert os.path.samefile(target / links[1], raw / "0040000/session_1/rest_1/rest.nii.gz")
    table = (target / "participants.tsv").read_text().splitlines()
    assert table[0].split("\t")[0] == "participant_id"
    assert table[1] == "sub-0040000\t20\tFemale\tRight\tControl\tNone"
    assert '"RepetitionTime": 2.0' in (target / "task-rest_bold.json").read_text()
    # It is raw still, so it is refused with the next command.
    with pytest.raises(UserError, match="run  fmriprep"):
        read_layout(str(target), settings(target))
    with pytest.raises(UserError, match="exists: name a folder that does not"):
        nitrc.bidsify(str(raw), str(target))


def test_bidsify_leaves_nothing_behind_when_it_fails(raw, tmp_path):
    image(raw / "0040001/session_1/rest_1/rest.nii.gz", time=0.0)
    with pytest.raises(UserError, match="repetition time"):
        nitrc.bidsify(str(raw), str(tmp_path / "made"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["COBRE"]
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="is it NITRC's layout"):
        nitrc.bidsify(str(tmp_path / "other"), str(tmp_path / "made"))


# A plain table


def test_a_plain_table_of_paths(tmp_path):
    image(tmp_path / "data/a.nii.gz")
    write(tmp_path / "data/a.json", '{"RepetitionTime": 2.0}')
    confounds(tmp_path / "data/a.tsv", [0.1] * 8)
    columns = ("participant_id", "diagnosis", "bold", "confounds")
    rows = [
        ("007", "HC", "data/a.nii.gz", "data/a.tsv"),
        ("008", "SZ", "n/a", "n/a"),
        ("009", "SZ", "gone.nii.gz", "n/a"),
    ]
    participants(tmp_path / "participants.tsv", rows, columns)
    layout, subjects = read_layout(str(tmp_path), settings(tmp_path))
    assert layout == "table"
    assert [subject.id for subject in subjects] == ["007", "008", "009"]
    assert subjects[0].scans[0].bold == str(tmp_path / "data/a.nii.gz")
    assert subjects[0].scans[0].sidecar == str(tmp_path / "data/a.json")
    assert subjects[0].problem == ""
    assert subjects[1].scans == ()
    assert "gone.nii.gz does not exist" in subjects[2].problem


def test_a_table_elsewhere_is_recognised_and_one_without_paths_refused(tmp_path):
    (tmp_path / "data").mkdir()
    table = participants(tmp_path / "mine.tsv", [("1", "HC", "n/a")], ("id", "dx", "bold"))
    assert recognise(str(tmp_path / "data"), str(table)) == "table"
    participants(table, [("1", "HC")], ("id", "dx"))
    with pytest.raises(UserError, match="no column 'bold'"):
        read_layout(str(tmp_path / "data"), settings(tmp_path, layout="table", phenotypes=str(table)))


def table_of_images(folder, rows, columns=("participant_id", "diagnosis", "sex", "session", "run", "FD", "bold")):
    """A table of paths with a row an image; images of different lengths."""
    for number, row in enumerate(rows):
        if row[-1] != "n/a":
            image(folder / row[-1], volumes=8 + number)
    return participants(folder / "participants.tsv", rows, columns)


IMAGES = [
    ("1", "HC", "M", "pre", "01", "0.1", "one.nii.gz"),
    ("1", "HC", "M", "pre", "02", "0.5", "two.nii.gz"),
    ("2", "SZ", "F", "pre", "01", "0.2", "three.nii.gz"),
    ("1", "HC", "M", "ses-post", "01", "0.3", "four.nii.gz"),
]


def test_a_table_may_have_a_row_for_each_image(tmp_path):
    table_of_images(tmp_path, IMAGES)
    with pytest.raises(
        UserError, match=r"several rows for 1: one.nii.gz, two.nii.gz, four.nii.gz; choose with task, ses"
    ):
        read_layout(str(tmp_path), settings(tmp_path))
    cohort = candidates(settings(tmp_path, scans="all", max_mean_fd=0.4))
    assert list(cohort.scans) == ["1_ses-pre_run-01", "1_ses-pre_run-02", "1_ses-post_run-01", "2_ses-pre_run-01"]
    statuses = {}
    for number, name in enumerate(cohort.scans):
        statuses[name] = str(write(tmp_path / f"{name}.json", f'{{"status": "included", "digest": "{number}"}}'))
    build_cohort(settings(tmp_path, scans="all", max_mean_fd=0.4), statuses, str(tmp_path / "made"))
    rows = {row["id"]: row for row in read_scans(str(tmp_path / "made/participants.tsv"))}
    # Each image has its own row's motion: the second run moved too much, and it alone is left out.
    assert {name: row["mean_fd"] for name, row in rows.items()} == {
        "1_ses-pre_run-01": "0.1",
        "1_ses-post_run-01": "0.3",
        "2_ses-pre_run-01": "0.2",
    }
    people = read_participants(str(tmp_path / "made/participants.tsv"))
    assert [(row["id"], row["mean_fd"]) for row in people] == [("1", "0.2"), ("2", "0.2")]
    assert "ses-pre_run-02: mean framewise displacement of 0.500 mm" in (tmp_path / "made/exclusions.tsv").read_text()


@pytest.mark.parametrize(
    ("more", "files"),
    [
        ({"scans": "first"}, {"1": "one.nii.gz", "2": "three.nii.gz"}),
        ({"session": "pre", "run": "2", "scans": "one"}, {"1": "two.nii.gz"}),
        ({"session": "post"}, {"1": "four.nii.gz"}),
    ],
)
def test_rows_of_a_table_are_chosen_by_session_and_run(tmp_path, more, files):
    table_of_images(tmp_path, IMAGES)
    found = {each.id: each for each in read_layout(str(tmp_path), settings(tmp_path, **more))[1]}
    assert {name: each.scans[0].bold.split("/")[-1] for name, each in found.items() if each.scans} == files
    for name in set(found) - set(files):
        assert found[name].problem.startswith("none of its images has session")


def test_names_of_bids_tell_a_tables_images_apart(tmp_path):
    rows = [("1", "SZ", f"sub-1_ses-{which}_task-rest_bold.nii.gz") for which in "ab"]
    table_of_images(tmp_path, rows, ("participant_id", "diagnosis", "bold"))
    assert list(candidates(settings(tmp_path, scans="all")).scans) == ["1_ses-a", "1_ses-b"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (("1", "SZ", "M", "pre", "03", "0.1", "five.nii.gz"), "rows for 1 in .* contradict each other"),
        (("1", "HC", "M", "pre", "03", "0.1", "one.nii.gz"), "several rows for 1 with the same image"),
        (("1", "HC", "M", "pre", "02", "0.1", "five.nii.gz"), "cannot be told from other images by session and run"),
    ],
)
def test_rows_that_do_not_fit_each_other_are_refused(tmp_path, row, sentence):
    table_of_images(tmp_path, [*IMAGES, row])
    with pytest.raises(UserError, match=sentence):
        candidates(settings(tmp_path, scans="all"))


# GIFT


def gift_images(folder, subjects, width=3, sessions=1):
    """Write GIFT's time courses, and maps that hold the subject's number."""
    folder.mkdir(exist_ok=True)
    for i in range(1, subjects + 1):
        for session in range(1, sessions + 1):
            courses = np.full((12, 4), float(i))
            nibabel.save(
                nibabel.Nifti1Image(courses, np.eye(4)),
                folder / f"P_sub{i:0{width}d}_timecourses_ica_s{session}_.nii",
            )
            nibabel.save(
                nibabel.Nifti1Image(np.full((2, 3, 4, 4), float(i)), AFFINE),
                folder / f"P_sub{i:0{width}d}_component_ica_s{session}_.nii",
            )
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 3, 4, 4)), AFFINE), folder / "P_mean_component_ica_s1_.nii")


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_gifts_subjects_are_known_by_their_order_whatever_the_width_of_their_numbers(tmp_path, width):
    gift_images(tmp_path, 11, width)
    names = [f"A{i:03d}" for i in range(11, 0, -1)]
    participants(tmp_path / "participants.tsv", [(name, "HC") for name in names], ("id", "dx"))
    layout, subjects = read_layout(str(tmp_path), settings(tmp_path))
    assert layout == "gift"
    found = {subject.id: gift.read_timecourses(subject.scans[0].timecourses)[0, 0] for subject in subjects}
    assert found == {name: i for i, name in enumerate(names, start=1)}
    image_of_maps = gift.read_maps(next(s for s in subjects if s.id == "A001").scans[0].maps)
    assert image_of_maps.shape == (2, 3, 4, 4)
    assert image_of_maps.dataobj[0, 0, 0, 0] == 11


def test_gift_needs_a_table_with_as_many_rows_and_all_subjects(tmp_path):
    gift_images(tmp_path, 3)
    with pytest.raises(UserError, match="names its subjects by number only: name a table"):
        read_layout(str(tmp_path), settings(tmp_path))
    table = participants(tmp_path / "table.tsv", [("a", "HC"), ("b", "SZ")], ("id", "dx"))
    with pytest.raises(UserError, match=r"has 2 rows, but .* results of 3 subjects"):
        read_layout(str(tmp_path), settings(tmp_path, phenotypes=str(table)))
    (tmp_path / "P_sub002_timecourses_ica_s1_.nii").unlink()
    with pytest.raises(UserError, match="results of subject 3, but none of 2"):
        read_layout(str(tmp_path), settings(tmp_path, phenotypes=str(table)))


def test_gifts_sessions_are_chosen_or_listed(tmp_path):
    gift_images(tmp_path, 2, sessions=2)
    participants(tmp_path / "participants.tsv", [("a", "HC"), ("b", "SZ")], ("id", "dx"))
    with pytest.raises(UserError, match="a has several sessions"):
        read_layout(str(tmp_path), settings(tmp_path))
    _, subjects = read_layout(str(tmp_path), settings(tmp_path, session="2"))
    assert read_layout(str(tmp_path), settings(tmp_path, session="02"))[1] == subjects
    assert [subject.scans[0].session for subject in subjects] == ["2", "2"]
    _, subjects = read_layout(str(tmp_path), settings(tmp_path, scans="all"))
    assert [len(subject.scans) for subject in subjects] == [2, 2]


def test_two_analyses_in_one_folder_are_refused(tmp_path):
    gift_images(tmp_path, 1)
    (tmp_path / "Q_sub001_timecourses_ica_s1_.nii").write_bytes(b"x" * 400)
    with pytest.raises(UserError, match=r"results of several analyses \(P, Q\)"):
        read_layout(str(tmp_path), settings(tmp_path))


COURSES = np.arange(12.0 * 4).reshape(12, 4)
MAPS = np.arange(4.0 * 5).reshape(4, 5)


def matlab73(path, struct, transposed):
    """Write a .mat file of version 7.3 as MATLAB does: HDF5 with the axes of every array reversed."""
    courses = COURSES.T if transposed else COURSES
    with h5py.File(path, "w", userblock_size=512) as file:
        place = file.create_group("compSet") if struct else file
        place["tc"] = courses.T
        place["ic"] = MAPS.T
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    return path


def matlab5(path, struct, transposed):
    """Write an older .mat file."""
    content = {"tc": COURSES.T if transposed else COURSES, "ic": MAPS}
    scipy.io.savemat(path, {"compSet": content} if struct else content)
    return path


@pytest.mark.parametrize("version", [matlab73, matlab5])
@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_mat_files_give_time_by_network_whichever_way_round_they_are(tmp_path, version, struct, transposed):
    path = version(tmp_path / "P_ica_br1.mat", struct, transposed)
    if version is matlab73:
        with pytest.raises(NotImplementedError):
            scipy.io.loadmat(path)
    np.testing.assert_array_equal(gift.read_timecourses(str(path)), COURSES)


def test_mat_maps_are_put_back_into_the_mask_in_matlabs_order(tmp_path):
    path = matlab73(tmp_path / "P_ica_c1-1.mat", False, False)
    mask = np.zeros((3, 2, 2))
    mask[0, 0, 0] = mask[2, 0, 0] = mask[1, 1, 0] = mask[0, 0, 1] = mask[2, 1, 1] = 1
    nibabel.save(nibabel.Nifti1Image(mask[..., None], AFFINE), tmp_path / "PMask.nii")  # a trailing dimension of 1
    participants(tmp_path / "participants.tsv", [("a", "HC")], ("id", "dx"))
    layout, (subject,) = read_layout(str(tmp_path), settings(tmp_path))
    assert layout == "gift"
    scan = subject.scans[0]
    assert (scan.timecourses, scan.maps, scan.mask) == (str(path), str(path), str(tmp_path / "PMask.nii"))
    maps = gift.read_maps(scan.maps, scan.mask)
    values = np.asarray(maps.dataobj)
    # MATLAB lists voxels with the first index fastest: (0,0,0), (2,0,0), (1,1,0), (0,0,1), (2,1,1).
    for place, voxel in enumerate([(0, 0, 0), (2, 0, 0), (1, 1, 0), (0, 0, 1), (2, 1, 1)]):
        np.testing.assert_array_equal(values[voxel], MAPS[:, place])
    assert np.count_nonzero(np.abs(values).sum(-1)) == 5
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2)), AFFINE), tmp_path / "PMask.nii")
    with pytest.raises(UserError, match=r"lists 5 voxels, but .* has 8"):
        gift.read_maps(scan.maps, scan.mask)
    with pytest.raises(UserError, match="needs the mask image"):
        gift.read_maps(scan.maps)


@pytest.mark.parametrize("content", ["nothing", "other", "damaged"])
def test_mat_files_without_time_courses_are_refused(tmp_path, content):
    path = tmp_path / "P_ica_br1.mat"
    if content == "nothing":
        with h5py.File(path, "w") as file:
            file["x"] = 1.0
    elif content == "other":
        scipy.io.savemat(path, {"compSet": {"ic": MAPS}})
    else:
        path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(3000))
    with pytest.raises(UserError, match=r"holds no time courses 'tc'|no readable .mat file"):
        gift.read_timecourses(str(path))


def test_results_in_zip_files_are_not_recognised_and_advice_is_given(tmp_path):
    (tmp_path / "P_sub01_component_ica_s1_.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"where they are in \.zip files, unpack these"):
        read_layout(str(tmp_path), settings(tmp_path, layout="gift"))


# TReNDS


@pytest.fixture
def hdf5(tmp_path):
    """TReNDS' layout of three subjects; values tell subject, component and time."""
    data = np.array([[[s * 1e6 + c * 1e3 + t for t in range(7)] for c in range(100)] for s in range(3)])
    with h5py.File(tmp_path / "COBRE_AllData.h5", "w") as file:
        file["COBRE_dataset"] = data.reshape(3, -1)
    write(tmp_path / "labels_COBRE.csv", "1\n2\n2\n")
    write(tmp_path / "correct_indices_GSP.csv", "1\n69\n100\n")
    return tmp_path


def test_trends_components_are_counted_from_one(hdf5):
    layout, subjects = read_layout(str(hdf5), settings(hdf5))
    assert layout == "trends"
    assert [(s.id, s.phenotype["Subject Type"]) for s in subjects] == [
        ("001", "Control"),
        ("002", "Patient"),
        ("003", "Patient"),
    ]
    scan = subjects[2].scans[0]
    courses = trends.read_timecourses(scan.timecourses, scan.components, scan.position)
    assert courses.shape == (7, 3)
    np.testing.assert_array_equal(courses[4], [2e6 + 0 + 4, 2e6 + 68e3 + 4, 2e6 + 99e3 + 4])


def test_trends_tables_may_stand_in_a_row_or_have_a_header_or_a_folder(hdf5):
    (hdf5 / "labels_COBRE.csv").unlink()
    write(hdf5 / "IndicesAndLabels" / "labels_COBRE.csv", "label\n1\n2\n1.0\n")
    write(hdf5 / "correct_indices_GSP.csv", "1,69,100\n")
    assert trends.whole_numbers(str(hdf5 / "correct_indices_GSP.csv")) == [1, 69, 100]
    _, subjects = read_layout(str(hdf5), settings(hdf5))
    assert [s.phenotype["Subject Type"] for s in subjects] == ["Control", "Patient", "Control"]


def test_numbers_of_rows_are_no_components_and_no_labels(hdf5):
    for name, values in (("correct_indices_GSP.csv", [3, 1, 2]), ("labels_COBRE.csv", [2, 1, 2])):
        frame = pd.DataFrame({"x": values}, index=[1, 2, 3])
        frame.to_csv(hdf5 / name)
        assert trends.whole_numbers(str(hdf5 / name)) == values
        pd.DataFrame(values).to_csv(hdf5 / name)  # with the header ",0"
        assert trends.whole_numbers(str(hdf5 / name)) == values
    assert first_courses(hdf5).shape == (7, 3)
    pd.DataFrame({"component": [3, 1], "domain": [5, 6]}).to_csv(hdf5 / "correct_indices_GSP.csv")
    with pytest.raises(UserError, match="several rows and columns: keep the one column"):
        first_courses(hdf5)


def first_courses(folder):
    """Time courses of the first subject."""
    scan = read_layout(str(folder), settings(folder))[1][0].scans[0]
    return trends.read_timecourses(scan.timecourses, scan.components, scan.position)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("labels_COBRE.csv", "0\n1\n2\n", r"labels \[0\]: 1 \(control\) and 2"),
        ("labels_COBRE.csv", "a\nb\n", "whole numbers only"),
        ("correct_indices_GSP.csv", "0\n1\n", "components 0 to 1, but they are counted from 1 to 100"),
        ("correct_indices_GSP.csv", "1\n101\n", "components 1 to 101"),
    ],
)
def test_trends_tables_that_do_not_fit_are_refused(hdf5, file, text, said):
    write(hdf5 / file, text)
    with pytest.raises(UserError, match=said):
        first_courses(hdf5)


def test_an_hdf5_file_without_the_data_set_is_refused(hdf5):
    data, indices = str(hdf5 / "COBRE_AllData.h5"), str(hdf5 / "correct_indices_GSP.csv")
    with pytest.raises(UserError, match="no subject 4"):
        trends.read_timecourses(data, indices, 3)
    with h5py.File(data, "w") as file:
        file["other"] = np.ones((3, 5))
    with pytest.raises(UserError, match=r"no 'COBRE_dataset', only \['other'\]"):
        trends.read_timecourses(data, indices, 0)
    with h5py.File(data, "w") as file:
        file["COBRE_dataset"] = np.ones((3, 150))
    with pytest.raises(UserError, match="cannot be divided into 100 components"):
        trends.read_timecourses(data, indices, 0)
    Path(data).write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="no HDF5 file, or is cut short"):
        trends.read_timecourses(data, indices, 0)
    Path(data).unlink()
    with pytest.raises(UserError, match="does not exist"):
        trends.read_timecourses(data, indices, 0)


def test_trends_subjects_may_be_named_by_a_table(hdf5):
    table = participants(hdf5 / "who.tsv", [("b", "HC"), ("a", "SZ"), ("c", "SZ")], ("id", "dx"))
    found = by_id(read_layout(str(hdf5), settings(hdf5, phenotypes=str(table))))
    assert {name: subject.scans[0].position for name, subject in found.items()} == {"b": 0, "a": 1, "c": 2}
    participants(table, [("b", "SZ")], ("id", "dx"))
    with pytest.raises(UserError, match=r"1 rows, but .* 3 labels"):
        read_layout(str(hdf5), settings(hdf5, phenotypes=str(table)))


def test_a_table_that_contradicts_trends_labels_is_refused(hdf5):
    table = participants(hdf5 / "who.tsv", [("a", "HC"), ("c", "n/a"), ("b", "HC")], ("id", "dx"))
    with pytest.raises(UserError, match=r"who.tsv says HC of b, but its label in labels_COBRE.csv is 2 \(patient\)"):
        read_layout(str(hdf5), settings(hdf5, phenotypes=str(table)))
    # Groups of the user's own are not compared with labels.
    chosen = settings(hdf5, phenotypes=str(table), labels={"HC": "young", "n/a": "old"})
    assert len(read_layout(str(hdf5), chosen)[1]) == 3


@pytest.mark.parametrize("layout", ["gift", "trends"])
def test_time_courses_computed_before_become_tables(request, tmp_path, layout):
    if layout == "trends":
        folder, expected = request.getfixturevalue("hdf5"), (7, 3)
    else:
        folder, expected = tmp_path / "gift", (12, 4)
        gift_images(folder, 1)
        participants(folder / "participants.tsv", [("a", "HC")], ("id", "dx"))
    subject = read_layout(str(folder), settings(folder))[1][0]
    path = tmp_path / "out" / "courses.tsv"
    write_timecourses(subject.scans[0], subject.done.repetition_time, str(path))
    table = pd.read_csv(path, sep="\t")
    assert table.shape == expected
    assert table.columns[-1] == f"network-{expected[1]:03d}"
    np.testing.assert_allclose(table, read_timecourses(subject.scans[0]))
    described = json.loads(path.with_suffix(".json").read_text())
    assert described["RepetitionTime"] == (2.0 if layout == "trends" else None)


def test_time_courses_with_missing_values_are_refused(tmp_path):
    courses = np.ones((12, 4))
    courses[3, 2] = np.nan
    path = tmp_path / "P_sub001_timecourses_ica_s1_.nii"
    nibabel.save(nibabel.Nifti1Image(courses, np.eye(4)), path)
    with pytest.raises(UserError, match="has missing values"):
        write_timecourses(Scan(timecourses=str(path)), None, str(tmp_path / "x.tsv"))
    assert not (tmp_path / "x.tsv").exists()


# A table of paths


def test_columns_of_paths_are_found_whatever_their_case(tmp_path):
    image(tmp_path / "a.nii.gz")
    confounds(tmp_path / "a.tsv", [0.1] * 8)
    participants(tmp_path / "participants.tsv", [("1", "HC", "a.nii.gz", "a.tsv")], ("ID", "dx", "BOLD", "Confounds"))
    layout, (subject,) = read_layout(str(tmp_path), settings(tmp_path))
    assert layout == "table"
    assert [(scan.bold, scan.confounds) for scan in subject.scans] == [
        (str(tmp_path / "a.nii.gz"), str(tmp_path / "a.tsv"))
    ]


# What is none of these


def test_a_table_of_another_name_is_pointed_to(tmp_path):
    (tmp_path / "participants.csv").write_text("id,bold\n1,a.nii\n")
    with pytest.raises(
        UserError, match=r"no layout that is known.* It holds participants.csv: name it under phenotypes"
    ):
        recognise(str(tmp_path))
    with pytest.raises(UserError, match=r"the table gone.csv does not exist: correct phenotypes"):
        recognise(str(tmp_path), "gone.csv")
    with pytest.raises(UserError, match=r"has no participants.tsv: put one there, or name a table under phenotypes"):
        candidates(settings(tmp_path, layout="table"))


def test_an_image_of_two_participants_is_refused(tmp_path):
    image(tmp_path / "a.nii.gz")
    (tmp_path / "participants.tsv").write_text("id\tbold\tdiagnosis\tsex\n1\ta.nii.gz\tHC\tM\n2\t./a.nii.gz\tSZ\tF\n")
    with pytest.raises(UserError, match=r"sub-1 and sub-2 have the same image, .*a.nii.gz"):
        candidates(settings(tmp_path, diagnosis="Patient as labelled"))


def test_an_unknown_folder_is_refused_with_what_is_known(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"no layout that is known: .*COBRE_AllData") as caught:
        recognise(str(tmp_path))
    assert str(caught.value).count(". ") == 0
    with pytest.raises(UserError, match="does not exist: correct folder"):
        recognise(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="does not exist: correct folder"):
        read_layout(str(tmp_path / "nowhere"), settings(tmp_path, layout="bids"))


def test_simulated_data_are_known_by_their_description(tmp_path):
    write(tmp_path / "dataset_description.json", '{"Simulated": true}')
    inner = write(tmp_path / "a/b/image.nii.gz", "x")
    assert is_simulated(inner)
    write(tmp_path / "a/dataset_description.json", '{"Name": "real"}')
    assert not is_simulated(inner)
    assert description_of(inner) == str(tmp_path / "a/dataset_description.json")
    assert is_simulated(tmp_path)
    assert description_of("/") == ""


def test_what_was_done_is_recorded_as_far_as_it_is_known():
    assert Done(smoothing_mm=6.0).record == {"smoothing_fwhm_mm": 6.0}
    assert Done(smoothing_mm=0.0, confounds="none").record == {"smoothing_fwhm_mm": 0.0, "confounds": "none"}
