"""Tables as text, and the one vocabulary for what they say."""

import gzip

import pandas as pd
import pytest

from autospec.cohort.files import file_problem, natural_key, read_json, read_table, read_text
from autospec.cohort.phenotypes import (
    Person,
    Refusal,
    age_of,
    describe,
    diagnosis_of,
    matched,
    read_phenotypes,
    sex_of,
    united,
)
from autospec.cohort.subjects import checked_id
from autospec.errors import UserError
from tests.cohort.trees import cobre, settings, write


def test_nothing_in_a_table_is_guessed(tmp_path):
    path = cobre(tmp_path / "table.csv", [("0040000", "20", "Female", "Right", "Control", "None")])
    table = read_phenotypes(str(path))
    assert table.columns == ["Current Age", "Gender", "Handedness", "Subject Type", "Diagnosis"]
    assert table.rows == {
        "0040000": dict(zip(table.columns, ["20", "Female", "Right", "Control", "None"], strict=True))
    }
    # What pandas would have made of it.
    guessed = pd.read_csv(path)
    assert guessed.iloc[0, 0] == 40000
    assert guessed["Diagnosis"].isna().all()


@pytest.mark.parametrize("delimiter", ["\t", ",", ";", " "])
@pytest.mark.parametrize("packed", [False, True])
def test_delimiter_and_compression_are_recognised(tmp_path, delimiter, packed):
    text = delimiter.join(["id", "dx"]) + "\n" + delimiter.join(["007", "HC"]) + "\n\n"
    path = write(tmp_path / ("table.tsv.gz" if packed else "table.tsv"), text)
    table = read_table(path)
    assert (table.columns, table.rows) == (["id", "dx"], [["007", "HC"]])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_machine(tmp_path, end):
    path = tmp_path / "table.csv"
    path.write_bytes(end.join(["id,dx", "01,HC", "02,SZ", ""]).encode())
    assert read_table(path).rows == [["01", "HC"], ["02", "SZ"]]


def test_a_byte_order_mark_and_quoted_commas_are_read(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b'\xef\xbb\xbfid,dx\r\n01,"295.3, paranoid"\r\n')
    assert read_table(path).rows == [["01", "295.3, paranoid"]]
    assert read_table(path).columns[0] == "id"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty: it should have"),
        (b"id,dx\n01\n", "row 2 .* has 1 cells, but the header names 2"),
        (b'id,dx\n01,"HC\n' + b"02,SZ\n" * 30_000, "from line 2 on .*field larger than .* a quotation mark not closed"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
        (b"PK\x03\x04\x14\x00", "a workbook, as of Excel.*save its sheet as CSV"),
        (gzip.compress(b"id\n" * 900)[:-12], "damaged or cut short"),
        (b"/annex/objects/MD5E-s8--0\n", "git-annex pointer; its content was not fetched"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
    ids=["empty", "blank", "ragged", "quote", "binary", "workbook", "truncated", "annex", "lfs"],
)
def test_a_table_that_cannot_be_read_is_refused_by_name(tmp_path, data, said):
    path = tmp_path / "table.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_dead_links_folders_and_missing_files_are_told_apart(tmp_path):
    (tmp_path / "annexed").symlink_to("../.git/annex/objects/xx/MD5E-s8--0")
    (tmp_path / "dead").symlink_to("nowhere")
    assert "git-annex pointer" in file_problem(tmp_path / "annexed")
    assert "dead link" in file_problem(tmp_path / "dead")
    assert "is a folder" in file_problem(tmp_path)
    assert "does not exist" in file_problem(tmp_path / "x")
    with pytest.raises(UserError, match="does not exist"):
        read_text(tmp_path / "x")


def test_json_that_is_no_mapping_is_refused(tmp_path):
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(write(tmp_path / "a.json", "{"))
    with pytest.raises(UserError, match="holds a list"):
        read_json(write(tmp_path / "b.json", "[1]"))


def test_numbers_in_names_sort_by_size():
    assert sorted(["run-10", "run-2", "run-1"], key=natural_key) == ["run-1", "run-2", "run-10"]
    assert sorted(["a", "10", "9"], key=natural_key) == ["9", "10", "a"]


@pytest.mark.parametrize("text", ["../x", "", "a/b", "a b", ".", "-a", "a--b", "a.b", "é", "a\n"])
def test_ids_that_could_leave_their_folder_are_refused(text):
    if text == "a\n":
        assert checked_id(text, "here") == "a"
        return
    with pytest.raises(UserError, match=r"the id '.*' in here cannot name a folder"):
        checked_id(text, "here")


def test_an_unsafe_id_in_a_table_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the id '\.\./x' in .*table"):
        read_phenotypes(str(write(tmp_path / "table.tsv", "participant_id\tdx\n../x\tHC\n")))


def test_ids_keep_their_zeros_and_lose_the_mark_of_bids():
    assert checked_id("sub-0040000", "here") == "0040000"
    assert checked_id(" A00012_1 ", "here") == "A00012_1"
    assert checked_id("SUB-0003", "here") == checked_id("Sub-0003", "here") == "0003"


def test_duplicate_ids_are_an_error_that_names_them(tmp_path):
    path = write(tmp_path / "table.tsv", "participant_id\tdx\nsub-01\tHC\n01\tSZ\n02\tSZ\n")
    with pytest.raises(UserError, match="several rows for 01: keep one"):
        read_phenotypes(str(path))


def test_a_table_without_ids_says_what_it_has(tmp_path):
    path = write(tmp_path / "table.tsv", "name\tdx\nx\tHC\n")
    with pytest.raises(UserError, match=r"no column of ids: .* its columns are name, dx"):
        read_phenotypes(str(path))
    assert list(read_phenotypes(str(path), "name").rows) == ["x"]
    with pytest.raises(UserError, match="no column 'who'"):
        read_phenotypes(str(path), "who")


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"person": ["sub-03", "sub-01", "sub-02"], "dx": ["SZ", "HC", "SZ"]}),
        pd.DataFrame({"person": ["sub-03", "sub-01"], "dx": ["SZ", "HC"]}, index=[1, 2]),
        pd.DataFrame({"person": ["sub-01", "sub-03"], "dx": ["HC", "SZ"]}, index=[2, 7]),
    ],
    ids=["from zero", "from one", "rows left out"],
)
def test_numbers_of_rows_are_no_ids(tmp_path, frame):
    path = tmp_path / "table.csv"
    frame.to_csv(path)
    with pytest.raises(
        UserError, match=r"no name and seems to hold numbers of rows: .* columns \(id\).* are person, dx"
    ):
        read_phenotypes(str(path))
    read = {name: row["dx"] for name, row in read_phenotypes(str(path), "person").rows.items()}
    assert read == dict(zip(frame["person"].str.removeprefix("sub-"), frame["dx"], strict=True))
    frame.rename(columns={"person": "Subject_ID"}).to_csv(path)
    assert {name: row["dx"] for name, row in read_phenotypes(str(path)).rows.items()} == read


def test_a_column_without_a_name_may_hold_ids_that_lost_their_zeros(tmp_path):
    path = write(tmp_path / "table.csv", ",dx\n40001,HC\n40000,SZ\n")
    assert list(read_phenotypes(str(path)).rows) == ["40001", "40000"]
    path = write(tmp_path / "table.csv", ",dx\n01,HC\n02,SZ\n")
    assert list(read_phenotypes(str(path)).rows) == ["01", "02"]


def test_lost_zeros_are_found_again():
    images = ["0040000", "0040001", "A1"]
    assert matched(images, {"40000": 1, "0040001": 2, "A1": 3, "77": 4}, "t") == {
        "0040000": 1,
        "0040001": 2,
        "A1": 3,
        "77": 4,
    }
    with pytest.raises(UserError, match="'1' in t could be any of 001, 01"):
        matched(["001", "01"], {"1": 0}, "t")
    with pytest.raises(UserError, match="t has several entries for 0040000"):
        matched(images, {"40000": 1, "0040000": 2}, "t")


@pytest.mark.parametrize(
    ("text", "code", "labelled", "strict"),
    [
        ("Patient", "295.3", "SZ", "SZ"),
        ("Patient", "295.92", "SZ", "SZ"),
        ("Patient", "295.70 depressed type", "SZ", None),
        ("Patient", "295.70 bipolar type", "SZ", None),
        ("Patient", "295.40", "SZ", None),
        ("Patient", "290.3", "SZ", None),
        ("Patient", "296.4", "SZ", None),
        ("Patient", "", "SZ", None),
        ("Control", "None", "HC", "HC"),
        ("Control", "", "HC", "HC"),
        ("Control", "311", "HC", None),
        ("Control", "296.26", "HC", None),
        ("HC", "healthy control", "HC", "HC"),
        ("Control", "No_Known_Disorder", "HC", "HC"),
        ("Control", "Schizophrenia", "HC", None),
        ("Patient", "Schizophrenia", "SZ", "SZ"),
        ("Patient", "schizoaffective", "SZ", None),
        ("Patient", "Bipolar", "SZ", None),
        ("Patient", "patient", "SZ", None),
        ("No_Known_Disorder", "", "HC", "HC"),
        ("Schizophrenia_Strict", "", "SZ", "SZ"),
        ("Schizoaffective", "", "SZ", None),
        ("Bipolar_Disorder", "", None, None),
        ("SCHZ", "", "SZ", "SZ"),
        ("CONTROL", "", "HC", "HC"),
        ("None", "", "HC", "HC"),
        ("295.3", "", "SZ", "SZ"),
        ("295.70", "", "SZ", None),
        ("311", "", None, None),
    ],
)
def test_the_vocabulary_of_diagnoses(text, code, labelled, strict):
    for choice, expected in ((False, labelled), (True, strict)):
        found = diagnosis_of(text, code, choice, "Subject Type")
        assert (None if isinstance(found, Refusal) else found) == expected
        assert expected is not None or not found.bad


def test_one_and_zero_mean_something_in_the_column_sz_only():
    assert diagnosis_of("1", "", False, "sz") == "SZ"
    assert diagnosis_of("0.0", "", False, "sz") == "HC"
    assert diagnosis_of("1", "", False, "group").bad


def test_a_diagnosis_outside_of_the_vocabulary_is_bad_and_says_what_to_do():
    refusal = diagnosis_of("Alien", "", False, "dx")
    assert refusal.bad
    assert "'Alien' in the column 'dx' is none of" in refusal.reason
    assert "under labels" in refusal.reason
    assert "says nothing" in diagnosis_of("n/a", "", False, "dx").reason


def test_a_row_becomes_a_person():
    row = {
        "Current Age": "18",
        "Gender": "Female",
        "Subject Type": "Patient",
        "Diagnosis": "295.3",
        "Site": "n/a",
        "medication": "yes",
    }
    person = describe(row, settings("x", groupings=["medication"]), "t")
    assert person == Person("SZ", "F", "18", "n/a", {"medication": "yes"})
    with pytest.raises(UserError, match="no column 'dose' to group by: its columns are Current Age"):
        describe(row, settings("x", groupings=["dose"]), "t")
    assert describe({**row, "Gender": "Disenrolled"}, settings("x"), "t") == Refusal("Disenrolled", bad=False)


@pytest.mark.parametrize("text", ["", "n/a", "N/A", "NA", "na", "nan", "NaN", "unknown"])
def test_what_is_not_known_is_no_group(text):
    row = {"dx": "Patient", "diagnosis": text, "sex": text, "age": text, "site": text, "dose": text}
    assert describe(row, settings("x", groupings=["dose"]), "t") == Person("SZ", "n/a", "n/a", "n/a", {"dose": "n/a"})
    assert describe({**row, "dx": "HC"}, settings("x", diagnosis="strict schizophrenia"), "t").diagnosis == "HC"
    refusal = describe({**row, "dx": text}, settings("x"), "t")
    assert refusal == Refusal("the column 'dx' says nothing of it", bad=True)
    # Somebody may say what it means.
    assert describe({**row, "dx": text}, settings("x", labels={text: "rest"}), "t").diagnosis == "rest"


def test_words_and_columns_can_be_named():
    row = {"state": "ASD", "geschlecht": "2"}
    chosen = settings(
        "x",
        labels={"ASD": "autism", "TD": "control"},
        columns={"diagnosis": "state", "sex": "geschlecht"},
        sex_labels={"2": "F"},
    )
    assert describe(row, chosen, "t") == Person("autism", "F", "n/a", "n/a", {})
    refusal = describe({**row, "state": "?"}, chosen, "t")
    assert refusal.bad
    assert "none of ASD, TD" in refusal.reason
    with pytest.raises(UserError, match="no column 'stat'"):
        describe(row, {**chosen, "columns": {"diagnosis": "stat"}}, "t")
    with pytest.raises(UserError, match="no column of diagnoses"):
        describe({"x": "1"}, settings("x"), "t")


def test_labels_of_the_config_are_found_in_any_case():
    chosen = settings("x", labels={"Fall": "SZ", "Kontrolle": "HC", "FALL ": "other"}, sex_labels={"Mann": "M"})
    for text, group in (("Fall", "SZ"), ("fall", "SZ"), ("KONTROLLE", "HC"), ("FALL ", "other")):
        assert describe({"dx": text, "sex": "mann"}, chosen, "t") == Person(group, "M", "n/a", "n/a", {})
    assert describe({"dx": "Fal"}, chosen, "t").bad


def test_labels_that_differ_in_case_or_spaces_are_one():
    sites = ["mannheim", "Mannheim", "Site 1", "site  1", "Mannheim", "n/a", "Bonn"]
    doses = ["Clozapine", "clozapine", "none", "n/a", "none", "None", "NONE"]
    people = [Person("HC", "M", "20", site, {"dose": dose}) for site, dose in zip(sites, doses, strict=True)]
    found, notes = united(people)
    assert [each.site for each in found] == ["Mannheim", "Mannheim", "Site 1", "Site 1", "Mannheim", "n/a", "Bonn"]
    assert [each.groupings["dose"] for each in found] == ["Clozapine", "Clozapine", "none", "n/a", *["none"] * 3]
    assert notes == [
        "site: 'Mannheim' (2), 'mannheim' (1) are taken as one label, 'Mannheim'",
        "site: 'Site 1' (1), 'site  1' (1) are taken as one label, 'Site 1'",
        "dose: 'Clozapine' (1), 'clozapine' (1) are taken as one label, 'Clozapine'",
        "dose: 'none' (2), 'None' (1), 'NONE' (1) are taken as one label, 'none'",
    ]
    assert united([]) == ([], [])


def test_codes_of_sexes_are_not_guessed():
    assert [sex_of(text, {}, "t") for text in ("Male", "f", "n/a", "", "O")] == ["M", "F", "n/a", "n/a", "O"]
    with pytest.raises(UserError, match=r"t has the sex '1', which could mean either: .* sex_labels"):
        sex_of("1", {}, "t")


def test_ages_are_numbers_or_missing():
    assert [age_of(text, "t") for text in ("18", "21.5", "89+", "n/a", "")] == ["18", "21.5", "89", "n/a", "n/a"]
    for text in ("old", "-3", "inf"):
        with pytest.raises(UserError, match="no number of years"):
            age_of(text, "t")
    with pytest.raises(UserError, match=r"the age '21,5', which is no number of years: write 21.5, with a point"):
        age_of("21,5", "t")


@pytest.mark.parametrize("text", ["121", "999", "1990", "360"])
def test_ages_that_nobody_reaches_are_refused(text):
    assert age_of("120", "t") == "120"
    with pytest.raises(
        UserError, match=f"t has the age '{text}', more than 120 years: write years, neither months nor"
    ):
        age_of(text, "t")


@pytest.mark.parametrize("column", ["Age_at_scan", "age_years", "Age (years)", "Current Age"])
def test_usual_names_of_the_column_of_ages_are_known(column):
    assert describe({"dx": "Patient", column: "31"}, settings("x"), "t").age == "31"
