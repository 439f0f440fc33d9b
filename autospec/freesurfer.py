"""FreeSurfer's volumes: stats files of a SUBJECTS_DIR, its two kinds of tables, or one wide table, become one table.

Names of regions are those of version 7: ``Left-Thalamus-Proper`` of older versions is ``Left-Thalamus``; a cortical
region is ``lh_`` or ``rh_`` and its name.  Sums over the whole brain are kept apart from the regions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autospec.cohort.files import TextTable, file_problem, listed, read_table, read_text
from autospec.cohort.subjects import ID_COLUMNS, MISSING, are_row_numbers, checked_id, known
from autospec.errors import UserError

STATS = {"aseg": "Volume_mm3", "lh.aparc": "GrayVol", "rh.aparc": "GrayVol"}
INTRACRANIAL = ("estimatedtotalintracranialvol", "etiv", "intracranialvol", "icv")
# Sums over much of the brain, and what is no volume, as small letters and digits; a name that begins so is one.
SUMS = (
    *INTRACRANIAL,
    *("brainseg", "brainsegvol", "brainsegvolnotvent", "supratentorial", "supratentorialvol", "mask", "maskvol"),
    *("ventriclechoroidvol", "subcortgray", "totalgray", "cortexvol", "lhcortex", "rhcortex", "cortex"),
    *("lhcerebralwhitematter", "rhcerebralwhitematter", "cerebralwhitematter"),
    *("lhcorticalwhitematter", "rhcorticalwhitematter", "corticalwhitematter"),
    *("leftcerebralwhitematter", "rightcerebralwhitematter", "leftcerebralcortex", "rightcerebralcortex"),
    *("surfaceholes", "lhsurfaceholes", "rhsurfaceholes"),
)
SIDED = (
    *("Lateral-Ventricle", "Inf-Lat-Vent", "Cerebellum-White-Matter", "Cerebellum-Cortex", "Thalamus", "Caudate"),
    *("Putamen", "Pallidum", "Hippocampus", "Amygdala", "Accumbens-area", "VentralDC", "vessel", "choroid-plexus"),
    *("WM-hypointensities", "non-WM-hypointensities"),
)
UNSIDED = (
    *("3rd-Ventricle", "4th-Ventricle", "5th-Ventricle", "Brain-Stem", "CSF", "WM-hypointensities"),
    *("non-WM-hypointensities", "Optic-Chiasm", "CC_Posterior", "CC_Mid_Posterior", "CC_Central", "CC_Mid_Anterior"),
    "CC_Anterior",
)
SUBCORTICAL = (*(f"{side}-{name}" for side in ("Left", "Right") for name in SIDED), *UNSIDED)
CORTICAL = (
    *("bankssts", "caudalanteriorcingulate", "caudalmiddlefrontal", "cuneus", "entorhinal", "frontalpole", "fusiform"),
    *("inferiorparietal", "inferiortemporal", "insula", "isthmuscingulate", "lateraloccipital", "lateralorbitofrontal"),
    *("lingual", "medialorbitofrontal", "middletemporal", "paracentral", "parahippocampal", "parsopercularis"),
    *("parsorbitalis", "parstriangularis", "pericalcarine", "postcentral", "posteriorcingulate", "precentral"),
    *("precuneus", "rostralanteriorcingulate", "rostralmiddlefrontal", "superiorfrontal", "superiorparietal"),
    *("superiortemporal", "supramarginal", "temporalpole", "transversetemporal"),
)
# How asegstats2table and aparcstats2table begin the header of their tables, whose first column holds ids.
OWN_TABLE = re.compile(r"Measure:|[lr]h\.")
FOUND_BELOW = (
    "sourcedata/freesurfer",
    "derivatives/fmriprep/sourcedata/freesurfer",
    "derivatives/freesurfer",
    "freesurfer",
)


@dataclass(frozen=True)
class Volumes:
    """Volumes of many subjects."""

    ids: list[str]
    regions: list[str]
    volumes: np.ndarray
    """(subjects, regions), mm^3; NaN where a subject's data lack the region."""
    intracranial: np.ndarray
    """(subjects,), the estimated total intracranial volume, mm^3; NaN where it is not known."""
    whole_brain: dict[str, np.ndarray]
    """Sums over the whole brain, each (subjects,), left out of the regions."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why a subject is left out, by id, in words."""
    notes: list[str] = field(default_factory=list)
    """What was left out of the tables."""


def find_subjects_dir(folder: str) -> str:
    """Where FreeSurfer's results stand in or beside a cohort's folder; empty where there are none."""
    places = [*(Path(folder) / below for below in FOUND_BELOW), Path(folder).parent / "freesurfer"]
    return next((str(place) for place in places if place.is_dir()), "")


def subjects_of(paths: list[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Say who has volumes, from names of files and the ids in tables.

    Parameters
    ----------
    paths : list of str
        A SUBJECTS_DIR, or tables.

    Returns
    -------
    places : dict of str to tuple of str
        The subject's folder, or every table that has a row of it, by id.
    problems : dict of str to str
        Why a subject's volumes cannot be used, by id.
    """
    found = [_ids_of(path) for path in paths]
    places: dict[str, tuple[str, ...]] = {}
    problems: dict[str, str] = {}
    for path, by_id in zip(paths, found, strict=True):
        for name, (place, problem) in by_id.items():
            places[name] = (*places.get(name, ()), place)
            lacking = [other for other, there in zip(paths, found, strict=True) if name not in there]
            if problem or lacking:
                problems.setdefault(name, problem or f"has a row in {path}, but none in {listed(lacking)}")
    return places, problems


def files_of(places: Iterable[str]) -> list[str]:
    """Files that volumes are read from: of a subject's folder the three stats files, otherwise the table itself."""
    return [
        file
        for place in places
        for file in ([place] if Path(place).is_file() else [f"{place}/stats/{stats}.stats" for stats in STATS])
    ]


def read_volumes(paths: list[str]) -> Volumes:
    """Read volumes of grey matter and subcortical structures.

    Parameters
    ----------
    paths : list of str
        One SUBJECTS_DIR; or tables of asegstats2table and aparcstats2table (``--meas volume``), of one or both
        hemispheres; or one wide table with a row a subject.

    Returns
    -------
    Volumes
        Subjects that are complete, in the order of the first source.

    Raises
    ------
    UserError
        If a source cannot be read, holds something else than volumes, or contradicts itself or another.
    """
    if not paths:
        raise UserError("no FreeSurfer folder or table is named: name a SUBJECTS_DIR, or tables of volumes.")
    notes: list[str] = []
    measured: dict[str, dict[str, float]] = {}
    _, problems = subjects_of(paths)
    for path in paths:
        rows = _read_folder(path, problems) if Path(path).is_dir() else _read_table(path, notes)
        for name, row in rows.items():
            if name in problems:
                continue
            before = measured.setdefault(name, {})
            for column, value in row.items():
                if column in before and not _close(before[column], value):
                    raise UserError(
                        f"{column} of {name} is {before[column]:g} in one table and {value:g} in {path}: "
                        "give tables of one analysis."
                    )
                before[column] = value
    return _arranged(measured, problems, notes)


def _arranged(measured: dict[str, dict[str, float]], problems: dict[str, str], notes: list[str]) -> Volumes:
    columns = list(dict.fromkeys(column for row in measured.values() for column in row))
    table = {column: np.array([row.get(column, np.nan) for row in measured.values()]) for column in columns}
    regions = [column for column in columns if not is_sum(column)]
    total = next((column for key in INTRACRANIAL for column in columns if _key(column) == key), None)
    shape = (len(measured), len(regions))
    return Volumes(
        ids=list(measured),
        regions=regions,
        volumes=np.array([table[region] for region in regions]).T.reshape(shape),
        intracranial=table[total] if total is not None else np.full(len(measured), np.nan),
        whole_brain={column: values for column, values in table.items() if is_sum(column)},
        problems=problems,
        notes=notes,
    )


def _close(a: float, b: float) -> bool:
    """Equal, or written with fewer digits in one place."""
    return bool(np.isclose(a, b, rtol=1e-4, atol=0, equal_nan=True))


def _key(name: str) -> str:
    """Small letters and digits of a name, which survive R's and Excel's renaming."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


# R puts an X before a name that begins with a digit.
REGION_OF = {
    _key(name): name for name in (*SUBCORTICAL, *(f"{side}_{name}" for side in ("lh", "rh") for name in CORTICAL))
}
REGION_OF |= {f"x{key}": name for key, name in REGION_OF.items() if key[0].isdigit()}
REGION_OF |= {f"{_key(name)}proper": name for name in SUBCORTICAL if "Thalamus" in name}
REGION_NAMES = frozenset(REGION_OF.values())
SUM_KEYS = {
    key + end for key in SUMS for end in ("", "vol", "notvent", "notventsurf", "notventvox", "toetiv", "voltoetiv")
}


def region_name(name: str) -> str:
    """Name of a region in version 7, whatever version or program wrote it; other names stay as they are."""
    name = re.sub(r"[_.](volume|grayvol)$", "", name.strip(), flags=re.IGNORECASE)
    return REGION_OF.get(_key(name), name)


def is_sum(name: str) -> bool:
    """Whether a column is a sum over the whole brain, or no region at all."""
    return _key(name) in SUM_KEYS


def _id(text: str, source: str) -> str:
    """Id of a subject as FreeSurfer's folder is called, ``sub-01_ses-1`` and ``sub-01/stats/aseg.stats`` included."""
    folder = Path(re.sub(r"/stats/[^/]+\.stats$", "", text.strip()))
    return checked_id(re.sub(r"_ses-[A-Za-z0-9]+$", "", folder.name), source)


def _ids_of(path: str) -> dict[str, tuple[str, str]]:
    """Place and problem of each subject's volumes in one source, by id."""
    found: dict[str, tuple[str, str]] = {}
    if Path(path).is_dir():
        for folder in _folders(path):
            name = _id(folder.name, path)
            if name in found:
                raise UserError(f"{path} has several folders for {name}: keep one.")
            missing = [f"{stats}.stats" for stats in STATS if file_problem(folder / "stats" / f"{stats}.stats")]
            problem = f"{folder} has no {listed(missing)}: recon-all has not finished" if missing else ""
            found[name] = (str(folder), problem)
        if not found:
            raise UserError(
                f"{path} holds no <subject>/stats, as FreeSurfer's SUBJECTS_DIR does: name that folder, or tables, under "
                "freesurfer; or [] for none."
            )
        return found
    table, place = _checked_table(path)
    for row in table.rows:
        name = _id(row[place], path)
        if name in found:
            raise UserError(f"{path} has several rows for {name}: keep one row for each participant.")
        found[name] = (path, "")
    return found


def _folders(path: str) -> list[Path]:
    names = sorted(name for name in os.listdir(path) if not name.startswith("fsaverage"))
    return [Path(path) / name for name in names if (Path(path) / name / "stats").is_dir()]


def _read_folder(path: str, problems: dict[str, str]) -> dict[str, dict[str, float]]:
    folders = {_id(folder.name, path): folder for folder in _folders(path)}
    return {name: read_subject(folder) for name, folder in folders.items() if name not in problems}


def read_subject(folder: str | Path) -> dict[str, float]:
    """Read one subject's three stats files.

    Parameters
    ----------
    folder : path-like
        ``SUBJECTS_DIR/<subject>``.

    Returns
    -------
    dict of str to float
        mm^3 by region, and by sum over the whole brain.

    Raises
    ------
    UserError
        If a file is missing or is no stats file with volumes.
    """
    measured: dict[str, float] = {}
    for stats, column in STATS.items():
        path = Path(folder) / "stats" / f"{stats}.stats"
        regions, sums = parse_stats(read_text(path), column, str(path))
        side = "" if stats == "aseg" else f"{stats[:2]}_"
        measured |= {region_name(side + name): value for name, value in regions.items()}
        if stats == "aseg":
            measured |= sums
    return measured


def parse_stats(text: str, column: str, source: str) -> tuple[dict[str, float], dict[str, float]]:
    """Parse the text of a stats file.

    Parameters
    ----------
    text : str
        Comments with measures of the whole brain and names of columns, then a row a region.
    column : str
        The column to take, such as ``Volume_mm3``.
    source : str
        Where the text came from, for error messages.

    Returns
    -------
    regions : dict of str to float
        The column's value by ``StructName``.
    sums : dict of str to float
        Measures in mm^3 of the whole brain, by their short names.

    Raises
    ------
    UserError
        If the text is no stats file, has no such column, or a number that no volume can have.
    """
    columns: list[str] = []
    regions: dict[str, float] = {}
    sums: dict[str, float] = {}
    try:
        for line in text.splitlines():
            if line.startswith("# ColHeaders"):
                columns = line.split()[2:]
            elif line.startswith("# Measure"):
                cells = [cell.strip() for cell in line.removeprefix("# Measure").split(",")]
                if cells[-1] == "mm^3":
                    sums[cells[1]] = _volume(cells[-2], cells[1], source)
            elif line.strip() and not line.startswith("#"):
                row = dict(zip(columns, line.split(), strict=True))
                regions[row["StructName"]] = _volume(row[column], row["StructName"], source)
    except (ValueError, KeyError, IndexError):
        raise UserError(
            f"{source} is no stats file of FreeSurfer with a column {column}: run recon-all again."
        ) from None
    if not regions:
        raise UserError(f"{source} names no region: run recon-all again.")
    return regions, sums


def _checked_table(path: str) -> tuple[TextTable, int]:
    """A table of volumes, and the place of its column of ids."""
    table = read_table(path)
    place = _id_place(table)
    measure = re.fullmatch(r"(?:Measure:|[lr]h\.\S+\.)(\w+)", table.columns[place])
    if measure and measure[1].lower() not in ("volume", "volume_mm3", "grayvol"):
        raise UserError(f"{path} holds {measure[1]}, not volumes: make it again with  --meas volume.")
    if sum(_is_volume(row[place]) for row in table.rows) > len(table.rows) / 2:
        raise UserError(
            f"{path} has a row for each region: make it again without  --transpose, with a row for each participant."
        )
    return table, place


def _id_place(table: TextTable) -> int:
    """Where ids stand: under one of their usual names, else in the first column, unless that counts rows."""
    small = [column.lower() for column in table.columns]
    if OWN_TABLE.match(table.columns[0]):
        return 0
    for name in ID_COLUMNS:
        if name in small:
            return small.index(name)
    if are_row_numbers([row[0] for row in table.rows]):
        raise UserError(
            f"the first column of {table.path}, '{table.columns[0]}', seems to hold numbers of rows: "
            "call the column of ids participant_id."
        )
    return 0


def _read_table(path: str, notes: list[str]) -> dict[str, dict[str, float]]:
    """Volumes by subject from a table of FreeSurfer's programs or a wide one."""
    table, id_place = _checked_table(path)
    places, ignored = _columns(table, id_place)
    if not any(not is_sum(name) for name in places):
        raise UserError(
            f"{path} has no column that is known as a FreeSurfer volume: names such as Left-Hippocampus and "
            "lh_insula_volume are expected."
        )
    if ignored:
        notes.append(f"{path}: left out {len(ignored)} columns that are no volumes ({listed(ignored)})")
    return {
        _id(row[id_place], path): {name: _number(row[place], name, path) for name, place in places.items()}
        for row in table.rows
    }


def _is_volume(column: str) -> bool:
    """Whether a name is known as that of a volume, or of a sum over the whole brain."""
    name = region_name(column)
    return is_sum(name) or name in REGION_NAMES or re.fullmatch(r"[lr]h_\w+_volume", column) is not None


def _columns(table: TextTable, id_place: int) -> tuple[dict[str, int], list[str]]:
    """Place of each volume in a table, and columns that are none; a wide table may hold ages and thicknesses, too."""
    own = OWN_TABLE.match(table.columns[0]) is not None
    places: dict[str, int] = {}
    ignored = []
    for i, column in enumerate(table.columns):
        name = region_name(column)
        if i == id_place or name == "":
            continue
        if not (own or _is_volume(column)):
            ignored.append(column)
        elif name not in places:
            places[name] = i
        elif any(row[i] != row[places[name]] for row in table.rows):
            raise UserError(
                f"{table.path} has the column {name} twice, with different values "
                f"('{table.columns[places[name]]}' and '{column}'): remove one."
            )
    return places, ignored


def _number(cell: str, name: str, path: str) -> float:
    if known(cell) == MISSING:
        return np.nan
    return _volume(cell, name, path, "in the column", ", or n/a where one is missing")


def _volume(text: str, name: str, path: str, where: str = "for", otherwise: str = "") -> float:
    """A volume in mm^3; refuse what can be none, such as -99, by which tables often mean that it is missing."""
    intracranial = _key(name) in INTRACRANIAL
    try:
        volume = float(text)
    except ValueError:
        volume = np.nan
    # A structure may be absent, a head is not; Python reads 1_000 as a number.
    possible = volume > 0 if intracranial else volume >= 0
    if not possible or not np.isfinite(volume) or "_" in text:
        least = "above 0" if intracranial else "of at least 0"
        raise UserError(f"{path} has '{text}' {where} {name}: volumes are numbers {least} in mm^3{otherwise}.")
    return volume
