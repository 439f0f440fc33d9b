"""Participants whose images are of different kinds: another task, space, session or acquisition."""

import pandas as pd
import pytest

from autospec.cli import main
from autospec.cohort.check import check_cohort
from autospec.cohort.mixed import differences
from autospec.cohort.record import read_record
from autospec.cohort.selection import candidates
from autospec.cohort.subjects import Scan
from autospec.cohort.tables import build_cohort
from autospec.errors import UserError
from tests.cohort.trees import fmriprep, image, participants, settings


@pytest.fixture
def four(tmp_path):
    """A table of four participants, without images."""
    participants(tmp_path / "participants.tsv", [(name, "HC", "M", "20") for name in "1234"])
    return tmp_path


def test_different_tasks_are_refused_until_one_is_chosen(four, capsys):
    fmriprep(four, ["1", "2", "4"])
    fmriprep(four, ["3"], task="nback")
    said = (
        r"different tasks: rest \(3: sub-1, sub-2, sub-4\); nback \(1: sub-3\); choose one with task, as in  task: rest"
    )
    with pytest.raises(UserError, match=said):
        candidates(settings(four))
    cohort = candidates(settings(four, task="rest"))
    assert list(cohort.scans) == ["1", "2", "4"]
    assert [each.reason for each in cohort.exclusions] == ["none of its images has task-rest"]
    app = ["ica", str(four), str(four / "out"), "participant", "--template", "stand-in"]
    assert main(app) == 1
    assert "of different tasks: rest (3" in capsys.readouterr().err
    assert not (four / "out").exists()


def test_tasks_of_a_table_of_paths_are_compared_too(tmp_path):
    rows = [("1", "HC", "1.nii", "rest"), ("2", "SZ", "2.nii", "n/a"), ("3", "SZ", "3.nii", "nback")]
    for name in "123":
        image(tmp_path / f"{name}.nii")
    participants(tmp_path / "participants.tsv", rows, ("id", "dx", "bold", "task"))
    with pytest.raises(UserError, match=r"different tasks: rest \(1: sub-1\); nback \(1: sub-3\)"):
        candidates(settings(tmp_path))
    participants(tmp_path / "participants.tsv", rows[:2], ("id", "dx", "bold", "task"))
    assert list(candidates(settings(tmp_path)).scans) == ["1", "2"]


def warned(folder, **more):
    """Warnings of the check, which the log and the record of the cohort repeat."""
    chosen = settings(folder, **more)
    found = check_cohort(chosen, networks=5).warnings
    line = build_cohort(chosen, None, str(folder / "out"))
    assert all(f"; warning: {warning}" in line for warning in found)
    assert read_record(str(folder / "out"))["warnings"] == found
    return found


def test_spaces_that_must_be_mixed_are_warned_of(four):
    fmriprep(four, ["1", "2", "3"])
    assert warned(four) == []
    fmriprep(four, ["4"], space="MNI152NLin2009cAsym")
    (said,) = warned(four)
    assert "different spaces: MNI152NLin6Asym (3: sub-1, sub-2, sub-3); MNI152NLin2009cAsym (1: sub-4)" in said
    assert "choose one with space" in said
    table = pd.read_csv(four / "out/scans.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert table["task"].tolist() == ["rest"] * 4
    assert table["space"].tolist() == ["MNI152NLin6Asym"] * 3 + ["MNI152NLin2009cAsym"]
    assert warned(four, space="MNI152NLin6Asym") == []


def test_sessions_that_are_mixed_are_warned_of_unless_all_are_taken(four):
    fmriprep(four, ["1", "2"], session="1")
    fmriprep(four, ["3"], session="01")
    fmriprep(four, ["2", "4"], session="2", volumes=9)
    (said,) = warned(four, scans="first")
    assert "different sessions: 1 (3: sub-1, sub-2, sub-3); 2 (1: sub-4); choose one with session" in said
    assert warned(four, scans="all") == []
    assert warned(four, session="1") == []


def test_sessions_of_time_courses_computed_before_are_compared_too():
    images = {name: [Scan(timecourses=f"{name}.nii", session=name)] for name in "12"}
    (said,) = differences(images)
    assert "different sessions: 1 (1: sub-1); 2 (1: sub-2)" in said
    assert differences(images, sessions=False) == []


def test_acquisitions_that_differ_are_warned_of(four):
    fmriprep(four, ["1", "2", "3"])
    image(four / "sub-4/func/sub-4_task-rest_acq-eyesopen_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    (said,) = warned(four)
    assert "differ in acq: none (3: sub-1, sub-2, sub-3); eyesopen (1: sub-4); choose one with entities" in said
    assert "entities: {acq: eyesopen}" in said
