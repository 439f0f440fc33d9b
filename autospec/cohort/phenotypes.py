"""Tables of participants: one vocabulary for ids, diagnoses, sexes and ages, whatever a cohort calls them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from autospec.cohort.files import TextTable, listed, read_table
from autospec.cohort.subjects import ID_COLUMNS, MISSING, CohortSettings, are_row_numbers, checked_id, known
from autospec.errors import UserError

# Names of columns, in small letters; the first that a table has is taken.
LABEL_COLUMNS = ("subject type", "dx", "group", "sz", "diagnosis")
CODE_COLUMNS = ("diagnosis",)
SEX_COLUMNS = ("sex", "gender")
AGE_COLUMNS = (
    *("age", "current age", "age_at_scan", "age at scan", "agescan", "age_scan", "scan_age", "age_at_mri"),
    *("age_years", "age_yrs", "age_in_years", "age (years)", "age (yrs)", "age [years]", "age in years"),
)
OLDEST_YEARS = 120
SITE_COLUMNS = ("site", "site_id", "siteid")

CONTROL, PATIENT, STRICT, RELATED, OTHER = "control", "patient", "strict", "related", "other"
# What a word in the column of diagnoses means, in small letters.
WORDS = {
    **dict.fromkeys(("control", "controls", "healthy control", "healthy", "hc", "ctrl", "con"), CONTROL),
    **dict.fromkeys(("no_known_disorder", "no known disorder"), CONTROL),
    **dict.fromkeys(("patient", "patients"), PATIENT),
    **dict.fromkeys(("schizophrenia", "schizophrenia_strict", "sz", "scz", "schz"), STRICT),
    **dict.fromkeys(("schizophrenia_broad", "schizoaffective", "schizoaffective disorder"), RELATED),
    **dict.fromkeys(("bipolar", "bipolar_disorder", "bipolar disorder", "adhd"), OTHER),
}
SZ_COLUMN = {"1": PATIENT, "1.0": PATIENT, "0": CONTROL, "0.0": CONTROL}
# Codes of DSM-IV: 295.1, .2, .3, .6 and .9 are the types of schizophrenia; .4 is the schizophreniform disorder and .7
# the schizoaffective one.
STRICT_CODE = re.compile(r"295\.[12369]")
CODE = re.compile(r"\d{3}(\.\d+)?")

SEXES = {"m": "M", "male": "M", "man": "M", "f": "F", "female": "F", "woman": "F", "o": "O", "other": "O"}
UNCODED = "without a code, so strict schizophrenia cannot be established"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Phenotypes:
    """A table of participants, all text."""

    path: str
    columns: list[str]
    rows: dict[str, dict[str, str]]
    """Rows by id, in the table's order."""


@dataclass(frozen=True)
class Person:
    """What the table says of one participant, in one vocabulary."""

    diagnosis: str
    sex: str
    age: str
    site: str
    groupings: dict[str, str]

    @property
    def diagnosis_sex(self) -> str:
        """Both together; n/a where one is not known."""
        known = MISSING not in (self.diagnosis, self.sex)
        return f"{self.diagnosis} {self.sex}" if known else MISSING


@dataclass(frozen=True)
class Refusal:
    """Why a participant's diagnosis cannot be used."""

    reason: str
    bad: bool
    """Whether the table is at fault, not the choice of who takes part."""


def read_phenotypes(path: str, id_column: str | None = None) -> Phenotypes:
    """Read a table of participants.

    Parameters
    ----------
    path : str
        A table of text, gzipped or not.
    id_column : str or None
        The column of ids where it has no usual name; a first column without a name is one, too, unless it counts rows.

    Raises
    ------
    UserError
        If there is no column of ids, an id stands twice, or an id could not name a folder.
    """
    columns, by_id = read_rows(path, id_column)
    if twice := [name for name, rows in by_id.items() if len(rows) > 1]:
        raise UserError(f"{path} has several rows for {listed(twice)}: keep one row for each participant.")
    return Phenotypes(path, columns, {name: rows[0] for name, rows in by_id.items()})


def read_rows(path: str, id_column: str | None = None) -> tuple[list[str], dict[str, list[dict[str, str]]]]:
    """Read a table in which a participant may have several rows.

    Returns
    -------
    columns : list of str
        Without that of ids.
    rows : dict of str to list of dict
        Cells by column, the rows of each id in the table's order.

    Raises
    ------
    UserError
        If there is no column of ids, or an id could not name a folder.
    """
    table = read_table(path)
    place = _id_place(table, id_column)
    rows: dict[str, list[dict[str, str]]] = {}
    for cells in table.rows:
        row = {column: cell for i, (column, cell) in enumerate(zip(table.columns, cells, strict=True)) if i != place}
        rows.setdefault(checked_id(cells[place], path), []).append(row)
    return [column for i, column in enumerate(table.columns) if i != place], rows


def _id_place(table: TextTable, id_column: str | None) -> int:
    path, columns = table.path, table.columns
    if id_column is not None:
        if id_column not in columns:
            raise UserError(f"{path} has no column '{id_column}': its columns are {listed(columns, 12)}.")
        return columns.index(id_column)
    small = [column.lower() for column in columns]
    for name in ID_COLUMNS:
        if name in small:
            return small.index(name)
    if small[0] == "":
        if are_row_numbers([row[0] for row in table.rows]):
            raise UserError(
                f"the first column of {path} has no name and seems to hold numbers of rows: name the column of ids under "
                f"columns (id), or call the first one participant_id if these are the ids; its columns are "
                f"{listed(columns[1:], 12)}."
            )
        return 0
    raise UserError(
        f"{path} has no column of ids: call it participant_id, or name it under columns (id); "
        f"its columns are {listed(columns, 12)}."
    )


def matched(ids: Iterable[str], by_id: Mapping[str, Value], source: str) -> dict[str, Value]:
    """Give a table's entries the ids of the images where they lost their zeros.

    Parameters
    ----------
    ids : iterable of str
        Ids as the images spell them.
    by_id : mapping
        Entries by the id that the table spells, such as ``40000``.
    source : str
        The table, for the error message.

    Returns
    -------
    dict
        The entries; an id of digits that is no image's becomes the image's that differs from it by leading zeros only.

    Raises
    ------
    UserError
        If two entries become one, or two images differ by leading zeros only.
    """
    short: dict[str, list[str]] = {}
    spelled = set(ids)
    for name in sorted(spelled):
        if name.isdecimal():
            short.setdefault(name.lstrip("0"), []).append(name)
    result: dict[str, Value] = {}
    for name, entry in by_id.items():
        like = short.get(name.lstrip("0"), []) if name.isdecimal() and name not in spelled else []
        if len(like) > 1:
            raise UserError(f"the id '{name}' in {source} could be any of {listed(like)}: write it with its zeros.")
        full = like[0] if like else name
        if full in result:
            raise UserError(f"{source} has several entries for {full}: keep one row for each participant.")
        result[full] = entry
    return result


def describe(row: Mapping[str, str], settings: CohortSettings, source: str) -> Person | Refusal:
    """Put a participant's row into the common vocabulary.

    Parameters
    ----------
    row : mapping of str to str
        Cells by column.
    settings : CohortSettings
        Whose diagnosis counts, further groupings, and columns with unusual names.
    source : str
        The table, for error messages.

    Returns
    -------
    Person, or Refusal
        The latter where the participant does not belong to any group.

    Raises
    ------
    UserError
        If a needed column is missing, or a sex or an age cannot be understood.
    """
    if any(cell.lower() == "disenrolled" for cell in row.values()):
        return Refusal("Disenrolled", bad=False)
    diagnosis = _diagnosis(row, settings, source)
    if isinstance(diagnosis, Refusal):
        return diagnosis
    for column in settings["groupings"]:
        if column not in row:
            raise UserError(f"{source} has no column '{column}' to group by: its columns are {listed(list(row), 12)}.")
    return Person(
        diagnosis=diagnosis,
        sex=sex_of(_cell(row, settings, "sex", SEX_COLUMNS, source), settings["sex_labels"], source),
        age=age_of(_cell(row, settings, "age", AGE_COLUMNS, source), source),
        site=known(_cell(row, settings, "site", SITE_COLUMNS, source)),
        groupings={column: known(row[column]) for column in settings["groupings"]},
    )


def _cell(row: Mapping[str, str], settings: CohortSettings, what: str, usual: tuple[str, ...], source: str) -> str:
    """A cell by what it says; empty where the table has no such column."""
    column = find_column(list(row), settings, what, usual, source)
    return "" if column is None else row[column]


def find_column(
    columns: list[str], settings: CohortSettings, what: str, usual: tuple[str, ...], source: str
) -> str | None:
    """Name of the column that says something, or None; raises UserError if the settings name one that is not there."""
    named = settings["columns"].get(what)
    if named is not None:
        if named not in columns:
            raise UserError(f"{source} has no column '{named}' ({what}): its columns are {listed(columns, 12)}.")
        return named
    small = {column.lower(): column for column in reversed(columns)}
    return next((small[name] for name in usual if name in small), None)


def _diagnosis(row: Mapping[str, str], settings: CohortSettings, source: str) -> str | Refusal:
    column = find_column(list(row), settings, "diagnosis", LABEL_COLUMNS, source)
    if column is None:
        raise UserError(
            f"{source} has no column of diagnoses: call it diagnosis, or name it under columns (diagnosis); "
            f"its columns are {listed(list(row), 12)}."
        )
    text = row[column]
    if settings["labels"]:
        label = _of_label(text, settings["labels"])
        return label if label is not None else Refusal(_outside(text, column, list(settings["labels"])), bad=True)
    code_column = find_column(list(row), settings, "code", CODE_COLUMNS, source)
    code = row[code_column] if code_column not in (None, column) else ""
    return diagnosis_of(text, code, settings["diagnosis"] == "strict schizophrenia", column)


def _outside(text: str, column: str, labels: list[str]) -> str:
    if known(text) == MISSING:
        return f"the column '{column}' says nothing of it"
    return (
        f"the diagnosis '{text}' in the column '{column}' is none of {listed(labels, 12)}; give it a group under labels"
    )


def diagnosis_of(text: str, code: str, strict: bool, column: str) -> str | Refusal:
    """Group of a participant: SZ or HC.

    Parameters
    ----------
    text : str
        The label, such as ``Patient``, ``Schizophrenia_Strict``, or a code of DSM-IV where the table has codes only.
    code : str
        The code beside a label, such as ``295.30`` or ``None``, or a word as labels are; empty where the table has none.
    strict : bool
        Whether only schizophrenia itself counts, and only controls without any diagnosis; otherwise labels are believed.
    column : str
        The label's column, for the reasons.
    """
    small, code = text.lower(), "" if known(code) == MISSING else code
    meaning = SZ_COLUMN.get(small) if column.lower() == "sz" else WORDS.get(small)
    if meaning is None and not code and (small == "none" or CODE.match(text)):
        meaning, code = CONTROL if small == "none" else PATIENT if text.startswith("295") else OTHER, text
    if meaning is None:
        return Refusal(_outside(text, column, ["Patient", "Control", "SZ", "HC", "codes of DSM-IV"]), bad=True)
    if meaning == OTHER:
        return Refusal(f"the diagnosis '{text}' is neither schizophrenia nor control", bad=False)
    if not strict:
        return "HC" if meaning == CONTROL else "SZ"
    coded = WORDS.get(code.lower())
    if coded == PATIENT:  # no more than the label says
        code = ""
    if meaning == CONTROL:
        healthy = coded == CONTROL or code.lower() in ("", "none")
        return "HC" if healthy else Refusal(f"a control with the diagnosis '{code}' (strict schizophrenia)", bad=False)
    if meaning == STRICT or (meaning == PATIENT and (coded == STRICT or STRICT_CODE.match(code))):
        return "SZ"
    if meaning == PATIENT and not code:
        return Refusal(f"called '{text}' {UNCODED}", bad=False)
    return Refusal(f"the diagnosis '{code or text}' is not strict schizophrenia", bad=False)


def _of_label(text: str, labels: Mapping[str, Value]) -> Value | None:
    """What a mapping of labels says of one: exactly so written first, else by the same label in other letters."""
    return labels.get(text, next((value for label, value in labels.items() if same(label) == same(text)), None))


def same(label: str) -> str:
    """What labels have in common that differ only in case, or in how wide a space is."""
    return " ".join(label.split()).casefold()


def united(people: Sequence[Person]) -> tuple[list[Person], list[str]]:
    """Give labels of sites and groupings that differ only in case, or in how wide a space is, one spelling.

    Parameters
    ----------
    people : sequence of Person

    Returns
    -------
    people : list of Person
        In the same order, with each label as most of them spell it, the first of several such spellings.
    notes : list of str
        What was taken as one, a sentence a label, without a full stop.
    """
    notes: list[str] = []

    def spelled(column: str, labels: list[str]) -> list[str]:
        spellings: dict[str, Counter[str]] = {}
        for label in labels:
            spellings.setdefault(same(label), Counter())[label] += 1
        for counts in spellings.values():
            if len(counts) > 1:
                words = ", ".join(f"'{label}' ({count})" for label, count in counts.most_common())
                notes.append(f"{column}: {words} are taken as one label, '{counts.most_common(1)[0][0]}'")
        return [spellings[same(label)].most_common(1)[0][0] for label in labels]

    sites = spelled("site", [each.site for each in people])
    columns = list(people[0].groupings) if people else []
    groupings = {column: spelled(column, [each.groupings[column] for each in people]) for column in columns}
    changed = [
        replace(each, site=site, groupings={column: groupings[column][i] for column in columns})
        for i, (each, site) in enumerate(zip(people, sites, strict=True))
    ]
    return changed, notes


def sex_of(text: str, labels: Mapping[str, str], source: str) -> str:
    """Sex as M, F, O or n/a; raises UserError at a code that nothing explains."""
    if (said := _of_label(text, labels)) is not None:
        return said
    if known(text) == MISSING:
        return MISSING
    if text.lower() not in SEXES:
        raise UserError(
            f"{source} has the sex '{text}', which could mean either: say what it means under sex_labels, as in '1': M."
        )
    return SEXES[text.lower()]


def age_of(text: str, source: str) -> str:
    """Age in years as it is written, or n/a; ``89+`` is 89; raises UserError where it is no number from 0 to 120."""
    if known(text) == MISSING:
        return MISSING
    number = text.removesuffix("+")
    try:
        years = float(number)
    except ValueError:
        years = math.nan
    if not 0 <= years < math.inf:
        point = f"write {text.replace(',', '.')}, with a point" if re.fullmatch(r"\d+,\d+", text) else "correct it"
        raise UserError(f"{source} has the age '{text}', which is no number of years: {point}, or write n/a.")
    if years > OLDEST_YEARS:
        raise UserError(
            f"{source} has the age '{text}', more than {OLDEST_YEARS} years: write years, neither months nor the year of "
            "birth, and n/a where the age is not known."
        )
    return number
