"""COBRE as figshare distributes it, preprocessed with NIAK 0.17 (6 mm voxels) or 0.12.4 (3 mm voxels)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from autospec.cohort.bids import join
from autospec.cohort.files import existing, file_problem, listed, natural_key
from autospec.cohort.phenotypes import Phenotypes, read_phenotypes
from autospec.cohort.subjects import CohortSettings, Done, Scan, Subject, checked_id, is_asked_for
from autospec.errors import UserError

SPACE = "MNI152NLin2009aSym"
# 0.12.4 calls its files fmri_szxxx0040000_session1_run1.nii.gz and fmri_contxxx0040013_session1_run1.nii.gz.
OLD_NAME = re.compile(r"fmri_(?:[a-z]+xxx)?(?P<id>\w+?)_session(?P<session>\d+)_run(?P<run>\d+)\.nii(\.gz)?")
NEW_NAME = re.compile(r"fmri_(?P<id>[A-Za-z0-9]+)\.nii(\.gz)?")
GROUP_MARK = re.compile(r"^[a-z]+xxx")

NEW_DONE = Done(smoothing_mm=0.0, confounds="none", space=SPACE, repetition_time=2.0)
OLD_DONE = Done(
    smoothing_mm=6.0,
    confounds="slow drifts, motion, white matter and ventricles regressed out; volumes that moved more than 0.5 mm removed",
    space=SPACE,
    repetition_time=2.0,
)


def read_niak(folder: str, settings: CohortSettings) -> list[Subject]:
    """Read either release.

    Parameters
    ----------
    folder : str
        The folder with ``fmri_*.nii.gz`` and the release's table.
    settings : CohortSettings
        Names of columns, and another table if wanted.

    Returns
    -------
    list of Subject

    Raises
    ------
    UserError
        If the table is missing, or a subject has several images and no rule chooses.
    """
    names = sorted(os.listdir(folder), key=natural_key)
    old = [match for match in map(OLD_NAME.fullmatch, names) if match]
    return _read_old(folder, settings, old) if old else _read_new(folder, settings, names)


def _read_new(folder: str, settings: CohortSettings, names: list[str]) -> list[Subject]:
    scans: dict[str, tuple[Scan, ...]] = {}
    problems: dict[str, str] = {}
    for match in filter(None, map(NEW_NAME.fullmatch, names)):
        name, path = checked_id(match["id"], folder), str(Path(folder) / match.string)
        table = str(Path(folder) / f"fmri_{match['id']}.tsv")
        scans[name] = (Scan(bold=path, confounds=existing(f"{table}.gz", table), space=SPACE),)
        problems[name] = file_problem(path)
    return join(scans, problems, _table(folder, settings, "phenotypic_data.tsv.gz", "phenotypic_data.tsv"), NEW_DONE)


def _read_old(folder: str, settings: CohortSettings, matches: list[re.Match[str]]) -> list[Subject]:
    scans: dict[str, tuple[Scan, ...]] = {}
    problems: dict[str, str] = {}
    for match in matches:
        if not all(is_asked_for(match[key], settings[key]) for key in ("session", "run")):
            continue
        name, path = checked_id(match["id"], folder), str(Path(folder) / match.string)
        scan = Scan(bold=path, session=match["session"], run=match["run"], space=SPACE)
        scans[name] = (*scans.get(name, ()), scan)
        problems[name] = problems.get(name) or file_problem(path)
    for name, several in scans.items():
        if len(several) > 1 and settings["scans"] == "one":
            raise UserError(
                f"{name} has several images: {listed([Path(each.bold).name for each in several])}; "
                "choose with session or run, or set scans to first or all."
            )
    if settings["scans"] == "first":
        scans = {name: several[:1] for name, several in scans.items()}
    table = _table(folder, settings, "cobre_model_group.csv")
    rows = {GROUP_MARK.sub("", name): row for name, row in table.rows.items()}
    if len(rows) < len(table.rows):
        raise UserError(f"{table.path} has ids that differ only in the mark of their group: keep one row for each.")
    return join(scans, problems, Phenotypes(table.path, table.columns, rows), OLD_DONE)


def _table(folder: str, settings: CohortSettings, *names: str) -> Phenotypes:
    path = settings["phenotypes"] or existing(*(Path(folder) / name for name in names))
    if not path:
        raise UserError(
            f"{folder} has no {names[0]}: copy it there from the same release, or name a table under phenotypes."
        )
    return read_phenotypes(path, settings["columns"].get("id"))
