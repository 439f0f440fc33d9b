"""FreeSurfer's stats files and tables become one table of volumes."""

import numpy as np
import pandas as pd
import pytest

from autospec.errors import UserError
from autospec.freesurfer import (
    find_subjects_dir,
    is_sum,
    parse_stats,
    read_subject,
    read_volumes,
    region_name,
    subjects_of,
)
from tests.cohort.trees import recon, write

ASEG_TABLE = """Measure:volume\tLeft-Lateral-Ventricle\tLeft-Thalamus-Proper\tBrainSegVolNotVentSurf\tSupraTentorialVolNotVentVox\tlhSurfaceHoles\tEstimatedTotalIntraCranialVol
sub-01\t8000.5\t7300.0\t1100000\t1000000\t12\t1500000.25
/data/subjects/02/\t9000.5\t7400.0\t1110000\t1010000\t13\t1600000.25
"""
LH_TABLE = """lh.aparc.volume\tlh_bankssts_volume\tlh_insula_volume\tBrainSegVolNotVent\teTIV
sub-01\t2500\t6900\t1100000.0\t1500000.2
02\t2600\t7000\t1110000.0\t1600000.2
"""
RH_TABLE = LH_TABLE.replace("lh", "rh")


def test_stats_files_are_read(tmp_path):
    recon(tmp_path / "sub-01")
    recon(tmp_path / "02", name="Left-Thalamus-Proper", etiv=1.6e6, thalamus=7000.5, first=2600)
    recon(tmp_path / "fsaverage5")
    found = read_volumes([str(tmp_path)])
    assert found.ids == ["02", "01"]
    assert found.regions == [
        "Left-Lateral-Ventricle",
        "Left-Thalamus",
        "5th-Ventricle",
        "lh_bankssts",
        "lh_insula",
        "rh_bankssts",
        "rh_insula",
    ]
    np.testing.assert_array_equal(found.volumes[0], [8000, 7000.5, 0, 2600, 6900, 2600, 6900])
    np.testing.assert_array_equal(found.intracranial, [1.6e6, 1.5e6])
    assert set(found.whole_brain) == {"BrainSegVol", "eTIV"}
    assert found.notes == []


def test_tables_of_freesurfers_programs_are_joined(tmp_path):
    paths = [
        str(write(tmp_path / name, text))
        for name, text in (("aseg.txt", ASEG_TABLE), ("lh.txt", LH_TABLE), ("rh.txt", RH_TABLE))
    ]
    found = read_volumes(paths)
    assert found.ids == ["01", "02"]
    assert found.regions == [
        "Left-Lateral-Ventricle",
        "Left-Thalamus",
        "lh_bankssts",
        "lh_insula",
        "rh_bankssts",
        "rh_insula",
    ]
    plain = pd.read_csv(paths[1], sep="\t")
    np.testing.assert_array_equal(found.volumes[:, 2], plain["lh_bankssts_volume"])
    np.testing.assert_array_equal(found.intracranial, [1500000.25, 1600000.25])
    assert "lhSurfaceHoles" in found.whole_brain


def test_versions_agree_on_names(tmp_path):
    old = write(tmp_path / "old.txt", "Measure:volume\tLeft-Thalamus-Proper\tIntraCranialVol\n01\t7000\t1400000\n")
    new = write(
        tmp_path / "new.txt", "Measure:volume\tLeft-Thalamus\tEstimatedTotalIntraCranialVol\n01\t7000\t1400000\n"
    )
    before, after = read_volumes([str(old)]), read_volumes([str(new)])
    assert before.regions == after.regions == ["Left-Thalamus"]
    np.testing.assert_array_equal(before.intracranial, after.intracranial)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Left-Thalamus-Proper", "Left-Thalamus"),
        ("Right-Thalamus-Proper*", "Right-Thalamus"),
        ("Left.Thalamus.Proper", "Left-Thalamus"),
        ("X3rd.Ventricle", "3rd-Ventricle"),
        ("lh_bankssts_volume", "lh_bankssts"),
        ("lh.insula.volume", "lh_insula"),
        ("  Brain-Stem ", "Brain-Stem"),
        ("lh_G_and_S_frontomargin_volume", "lh_G_and_S_frontomargin"),
        ("unheard-of", "unheard-of"),
    ],
)
def test_names_of_regions(name, expected):
    assert region_name(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("BrainSegVol", "BrainSegVolNotVent", "BrainSegVolNotVentSurf", "VentricleChoroidVol", "lhCortexVol"),
        *("rhCortexVol", "CortexVol", "lhCerebralWhiteMatterVol", "CerebralWhiteMatterVol", "SubCortGrayVol"),
        *("lhCorticalWhiteMatterVol", "CorticalWhiteMatterVol", "TotalGrayVol", "SupraTentorialVol"),
        *("SupraTentorialVolNotVent", "SupraTentorialVolNotVentVox", "MaskVol", "BrainSegVol-to-eTIV"),
        *("MaskVol-to-eTIV", "lhSurfaceHoles", "SurfaceHoles", "EstimatedTotalIntraCranialVol", "eTIV", "ICV"),
        "IntraCranialVol",
    ],
)
def test_sums_are_no_regions(name):
    assert is_sum(name)
    assert not is_sum("CSF")
    assert not is_sum("WM-hypointensities")


def test_a_wide_table_with_other_columns(tmp_path):
    text = (
        "SubjID,Age,Sex,Left-Hippocampus ,Left.Amygdala,lh_insula_volume,lh_insula_thickness,eTIV,eTIV\n"
        "0040000,20,1,4000,1600,6900,2.9,1500000,1500000\n"
        "0040001,30,2,4100,n/a,7000,2.8,1600000,1600000\n"
    )
    found = read_volumes([str(write(tmp_path / "wide.csv", text))])
    assert found.ids == ["0040000", "0040001"]
    assert found.regions == ["Left-Hippocampus", "Left-Amygdala", "lh_insula"]
    np.testing.assert_array_equal(found.volumes, [[4000, 1600, 6900], [4100, np.nan, 7000]])
    np.testing.assert_array_equal(found.intracranial, [1.5e6, 1.6e6])
    assert "left out 3 columns that are no volumes (Age, Sex, lh_insula_thickness)" in found.notes[0]


def test_volumes_of_a_table_that_counts_its_rows_go_to_their_ids(tmp_path):
    frame = pd.DataFrame({"participant_id": ["sub-0003", "sub-0001", "sub-0002"], "Left-Caudate": [3.0, 1.0, 2.0]})
    frame.index += 1
    frame.to_csv(tmp_path / "wide.csv")
    found = read_volumes([str(tmp_path / "wide.csv")])
    assert dict(zip(found.ids, found.volumes[:, 0], strict=True)) == {"0003": 3, "0001": 1, "0002": 2}
    assert found.notes == []
    frame.rename(columns={"participant_id": "person"}).to_csv(tmp_path / "wide.csv")
    with pytest.raises(UserError, match=r"first column of .*wide\.csv, '', seems to hold numbers of rows"):
        read_volumes([str(tmp_path / "wide.csv")])
    # FreeSurfer's own folders may be called so.
    write(tmp_path / "aseg.txt", "Measure:volume\tLeft-Caudate\n1\t1\n2\t2\n")
    assert read_volumes([str(tmp_path / "aseg.txt")]).ids == ["1", "2"]


def test_repeated_columns_must_agree(tmp_path):
    path = write(tmp_path / "wide.csv", "id,Left-Caudate,Left-Caudate \n1,3500,3500\n2,3600,3600\n")
    assert read_volumes([str(path)]).regions == ["Left-Caudate"]
    write(path, "id,Left-Caudate,Left-Caudate \n1,3500,3500\n2,3600,3601\n")
    with pytest.raises(UserError, match="has the column Left-Caudate twice, with different values"):
        read_volumes([str(path)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lh.aparc.thickness\tlh_insula_thickness\n1\t2.9\n", "holds thickness, not volumes: .* --meas volume"),
        ("lh.aparc.area\tlh_insula_area\n1\t2000\n", "holds area, not volumes"),
        ("Measure:mean\tLeft-Caudate\n1\t80\n", "holds mean, not volumes"),
        ("id,age,height\n1,20,180\n", "no column that is known as a FreeSurfer volume"),
        ("id,Left-Caudate\n1,much\n", "has 'much' in the column Left-Caudate"),
        ("Measure:volume\t1\t2\nLeft-Caudate\t3500\t3600\neTIV\t1500000\t1600000\n", "a row for each region.*without"),
        ("region,1,2\nlh_G_and_S_frontomargin_volume,3500,3600\n", "a row for each region.*without"),
        ("id,Left-Caudate\n1,-99\n", "has '-99' in the column Left-Caudate: .* of at least 0"),
        ("id,Left-Caudate\n1,inf\n", "has 'inf' in the column Left-Caudate"),
        ("id,Left-Caudate\n1,3_500\n", "has '3_500' in the column Left-Caudate"),
        ("id,Left-Caudate,eTIV\n1,0,0\n", "has '0' in the column eTIV: .* above 0"),
        ("id,Left-Caudate\n1,3500\n1,3600\n", "several rows for 1"),
        ("id,Left-Caudate\n../1/..,3500\n", "cannot name a folder"),
    ],
)
def test_tables_that_are_no_volumes_are_refused(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_volumes([str(write(tmp_path / "table.txt", text))])


def test_ids_may_be_paths_of_folders_and_of_stats_files(tmp_path):
    rows = "".join(f"{name}\t3500\n" for name in ("sub-01", "/data/02/", "sub-03_ses-1", "fs/sub-04/stats/aseg.stats"))
    table = write(tmp_path / "aseg.tsv", f"Measure:volume\tLeft-Caudate\n{rows}")
    assert read_volumes([str(table)]).ids == ["01", "02", "03", "04"]


def test_tables_that_contradict_each_other_are_refused(tmp_path):
    a = write(tmp_path / "a.csv", "id,Left-Caudate\n1,3500\n")
    b = write(tmp_path / "b.csv", "id,Left-Caudate,Left-Putamen\n1,3501,5000\n")
    assert read_volumes([str(a), str(write(tmp_path / "c.csv", "id,Left-Caudate,CSF\n1,3500.1,900\n"))]).regions == [
        "Left-Caudate",
        "CSF",
    ]
    with pytest.raises(UserError, match="Left-Caudate of 1 is 3500 in one table and 3501"):
        read_volumes([str(a), str(b)])


def test_whoever_is_in_one_table_only_is_left_out_with_the_reason(tmp_path):
    aseg = write(tmp_path / "aseg.txt", ASEG_TABLE)
    lh = write(tmp_path / "lh.txt", "\n".join(LH_TABLE.splitlines()[:2]) + "\n03\t1\t2\t3\t4\n")
    places, problems = subjects_of([str(aseg), str(lh)])
    assert set(places) == {"01", "02", "03"}
    assert problems["02"] == f"has a row in {aseg}, but none in {lh}"
    assert problems["03"] == f"has a row in {lh}, but none in {aseg}"
    found = read_volumes([str(aseg), str(lh)])
    assert found.ids == ["01"]
    assert found.problems == problems


def test_an_unfinished_recon_all_is_a_problem_of_its_subject_alone(tmp_path):
    recon(tmp_path / "01")
    recon(tmp_path / "02")
    (tmp_path / "02/stats/lh.aparc.stats").unlink()
    found = read_volumes([str(tmp_path)])
    assert found.ids == ["01"]
    assert "has no lh.aparc.stats: recon-all has not finished" in found.problems["02"]
    with pytest.raises(UserError, match=r"lh.aparc.stats does not exist"):
        read_subject(tmp_path / "02")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no stats file",
        "# ColHeaders Index StructName\n1 CSF\n",
        "# ColHeaders StructName Volume_mm3\nCSF much\n",
        "# ColHeaders StructName Volume_mm3\nCSF 1 2\n",
        "# Measure a, b, c, many, mm^3\n# ColHeaders StructName Volume_mm3\nCSF 1\n",
        "# ColHeaders StructName Volume_mm3\nCSF -1\n",
    ],
)
def test_damaged_stats_files_are_refused(text):
    with pytest.raises(
        UserError, match=r"here (is no stats file|names no region|has '(much|many|-1)' for .*: volumes are numbers)"
    ):
        parse_stats(text, "Volume_mm3", "here")


def test_folders_and_sessions_of_freesurfer(tmp_path):
    recon(tmp_path / "sub-01_ses-1")
    assert read_volumes([str(tmp_path)]).ids == ["01"]
    recon(tmp_path / "sub-01_ses-2")
    with pytest.raises(UserError, match="several folders for 01"):
        read_volumes([str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="as FreeSurfer's SUBJECTS_DIR does: name that folder"):
        read_volumes([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="does not exist"):
        read_volumes([str(tmp_path / "nowhere.csv")])
    with pytest.raises(UserError, match="no FreeSurfer folder or table is named"):
        read_volumes([])


def test_where_freesurfers_results_usually_stand(tmp_path):
    assert find_subjects_dir(str(tmp_path / "x")) == ""
    (tmp_path / "freesurfer").mkdir()
    assert find_subjects_dir(str(tmp_path / "x")) == str(tmp_path / "freesurfer")
    (tmp_path / "x/sourcedata/freesurfer").mkdir(parents=True)
    assert find_subjects_dir(str(tmp_path / "x")) == str(tmp_path / "x/sourcedata/freesurfer")
