"""NITRC's COBRE: ``COBRE_phenotypic_data.csv`` beside images, which are usable only where they are preprocessed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from autospec.cohort.bids import derivatives_of, fmriprep_command, join, read_bids
from autospec.cohort.files import existing, file_problem, listed, natural_key
from autospec.cohort.phenotypes import Phenotypes, matched, read_phenotypes
from autospec.cohort.subjects import MISSING, CohortSettings, Done, Scan, Subject, checked_id, is_asked_for
from autospec.errors import UserError

TABLE = "COBRE_phenotypic_data.csv"
IMAGE = re.compile(r".+\.nii(\.gz)?")
RAW_NAMES = ("rest.nii", "rest.nii.gz")
SESSION = re.compile(r"session_(\d+)")
RUN = re.compile(r"rest_(\d+)")
# Words behind which a number is none of a participant.
NUMBERED = ("run", "ses", "session")


def read_nitrc(folder: str, settings: CohortSettings) -> list[Subject]:
    """Read NITRC's table and preprocessed images beside it.

    The images are fMRIPrep's derivatives, or one file other than ``rest.nii.gz`` in each
    ``<id>/session_*/rest_*/``, or files in the folder itself whose names contain an id.

    Parameters
    ----------
    folder : str
        The folder with the table.
    settings : CohortSettings
        Which session and run, and another table if wanted.

    Returns
    -------
    list of Subject

    Raises
    ------
    UserError
        If there are only raw images (the sentence says how to preprocess them), or a subject has several images and
        no rule chooses.
    """
    path = settings["phenotypes"] or str(Path(folder) / TABLE)
    if derivatives_of(folder):
        return read_bids(folder, {**settings, "phenotypes": path})
    table = read_phenotypes(path, settings["columns"].get("id"))
    subjects = _subject_folders(folder)
    found = {name: _preprocessed(subject) for name, subject in subjects.items()}
    for name, images in _beside_the_table(folder, table).items():
        found[name] = found.get(name, []) + images
    if not any(found.values()):
        raise UserError(_refusal(folder, table, found))
    scans = {name: _choose(name, images, settings) for name, images in found.items()}
    problems = {
        name: next(filter(None, (file_problem(scan.bold) for scan in chosen)), "")
        or ("" if chosen else "its only image is raw, not in MNI space: preprocess it like the others")
        for name, chosen in scans.items()
    }
    return join(scans, problems, table, Done())


def _refusal(folder: str, table: Phenotypes, subjects: Collection[str]) -> str:
    """Why no image can be used: those there are raw, or no id of the table is in their names, or there are none."""
    others = [name for name in sorted(os.listdir(folder), key=natural_key) if IMAGE.fullmatch(name)]
    unnamed = f"{listed(others, 2)}, but no id of {table.path} (such as {listed(list(table.rows), 2)}) is in its name"
    if subjects:
        target = f"{str(folder).rstrip('/')}_bids"
        return (
            f"{folder} holds raw images only, which are not in MNI space{f' (and {unnamed})' if others else ''}: run  "
            f"autospec bidsify {folder} {target}  and then  {fmriprep_command(target)}  and give its output."
        )
    if others:
        return f"{folder} holds {unnamed}: put each participant's id into the name of the image, or correct the table."
    return (
        f"{folder} holds no images: put preprocessed ones there, with an id of {table.path} in each name, or NITRC's "
        "folders <id>/session_1/rest_1."
    )


def _subject_folders(folder: str) -> dict[str, Path]:
    """Folders that hold a ``session_*``, by id."""
    found: dict[str, Path] = {}
    for name in sorted(os.listdir(folder)):
        path = Path(folder) / name
        if path.is_dir() and any(SESSION.fullmatch(each) for each in os.listdir(path)):
            found[checked_id(name, folder)] = path
    return found


def _runs(subject: Path) -> list[tuple[str, str, Path]]:
    """Session, run and folder of each ``session_*/rest_*``."""
    return [
        (session[1], run[1], subject / session[0] / run[0])
        for session in filter(None, map(SESSION.fullmatch, sorted(os.listdir(subject), key=natural_key)))
        for run in filter(None, map(RUN.fullmatch, sorted(os.listdir(subject / session[0]), key=natural_key)))
    ]


def _preprocessed(subject: Path) -> list[Scan]:
    return [
        Scan(bold=str(where / name), session=session, run=run)
        for session, run, where in _runs(subject)
        for name in sorted(os.listdir(where))
        if IMAGE.fullmatch(name) and name not in RAW_NAMES
    ]


def _beside_the_table(folder: str, table: Phenotypes) -> dict[str, list[Scan]]:
    """Images in the folder itself, by the id in their names that the table has, with or without its leading zeros.

    Raises
    ------
    UserError
        If a name could be of several participants.
    """
    in_table: dict[str, set[str]] = {}
    for name in table.rows:
        in_table.setdefault(_short(name), set()).add(name)
    found: dict[str, list[Scan]] = {}
    for name in sorted(os.listdir(folder), key=natural_key):
        if IMAGE.fullmatch(name):
            parts = re.findall(r"[A-Za-z0-9]+", name)
            ids = [
                part
                for before, part in zip(["", *parts], parts, strict=False)
                if _short(part) in in_table and not (before.lower() in NUMBERED and part.isdecimal())
            ]
            fitting = ({part} if part in table.rows else in_table[_short(part)] for part in ids)
            whose = sorted(set().union(*fitting), key=natural_key)
            if len(whose) > 1:
                raise UserError(
                    f"{Path(folder) / name} could be an image of each of {listed(whose)}: rename it, with one id of {table.path}."
                )
            if ids:
                found.setdefault(ids[0], []).append(Scan(bold=str(Path(folder) / name)))
    return found


def _short(name: str) -> str:
    """An id without leading zeros, which tables and folders lose."""
    return name.lstrip("0") if name.isdecimal() else name


def _choose(subject: str, images: list[Scan], settings: CohortSettings) -> tuple[Scan, ...]:
    kept = [
        image
        for image in images
        if is_asked_for(image.session, settings["session"]) and is_asked_for(image.run, settings["run"])
    ]
    runs = {(image.session, image.run) for image in kept}
    if len(kept) > 1 and (settings["scans"] == "one" or len(runs) < len(kept)):
        raise UserError(
            f"{subject} has several images that fit: {listed([image.bold for image in kept])}; "
            "choose with session or run, set scans to first or all, or keep one image for each run."
        )
    return tuple(kept[:1] if settings["scans"] == "first" else kept)


def bidsify(folder: str, target: str) -> str:
    """Turn NITRC's layout into a BIDS tree of links, for fMRIPrep to read.

    Parameters
    ----------
    folder : str
        The folder with NITRC's table and ``<id>/session_*/{rest_*/rest,anat_*/mprage}.nii.gz``.
    target : str
        The folder to make; it appears whole or not at all.

    Returns
    -------
    str
        What was made, and the command to run next.

    Raises
    ------
    UserError
        If the target exists, the folder holds no such images, or an image's header names no repetition time.
    """
    made = Path(target)
    if os.path.lexists(made):
        raise UserError(f"{target} exists: name a folder that does not, or remove it.")
    table_path = existing(Path(folder) / TABLE)
    table = read_phenotypes(table_path) if table_path else Phenotypes("", [], {})
    links = {name: _links(name, path) for name, path in _subject_folders(folder).items()}
    links = {name: each for name, each in links.items() if each}
    if not links:
        raise UserError(f"{folder} holds no <id>/session_1/rest_1/rest.nii.gz: is it NITRC's layout of COBRE?")
    partial = made.with_name(f".{made.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, each in links.items():
            for source, place in each:
                link = partial / f"sub-{name}" / place
                link.parent.mkdir(parents=True, exist_ok=True)
                # Relative to where the link will stand, so that the two trees can move together.
                final = made / f"sub-{name}" / place
                link.symlink_to(os.path.relpath(source.absolute(), final.parent.absolute()))
        _describe(partial, table, links)
        os.replace(partial, made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{target} holds links for {len(links)} participants: now run  {fmriprep_command(target)}"


def _links(name: str, subject: Path) -> list[tuple[Path, str]]:
    """Image and its place in the BIDS tree, for each image of a subject."""
    runs = _runs(subject)
    sessions = sorted({session for session, _, _ in runs}, key=natural_key)
    found = []
    for session in sessions:
        mark, where = (f"_ses-{session}", f"ses-{session}/") if len(sessions) > 1 else ("", "")
        of_session = [(run, path) for each, run, path in runs if each == session]
        for run, path in of_session:
            number = f"_run-{run}" if len(of_session) > 1 else ""
            if source := existing(path / "rest.nii.gz", path / "rest.nii"):
                found.append((Path(source), f"{where}func/sub-{name}{mark}_task-rest{number}_bold{_extension(source)}"))
        anatomy = [
            subject / f"session_{session}" / f"anat_{i}" / f"mprage.nii{gz}" for i in (1, 2) for gz in (".gz", "")
        ]
        if source := existing(*anatomy):
            found.append((Path(source), f"{where}anat/sub-{name}{mark}_T1w{_extension(source)}"))
    return found


def _extension(path: str) -> str:
    return ".nii.gz" if path.endswith(".gz") else ".nii"


def _describe(root: Path, table: Phenotypes, links: dict[str, list[tuple[Path, str]]]) -> None:
    """Write what BIDS wants beside the images."""
    from autospec.cohort.images import time_between_volumes  # starts slowly, and readers do without

    runs = [str(source) for each in links.values() for source, place in each if "_bold.nii" in place]
    times = sorted({time_between_volumes(source, "", None) for source in runs})
    if len(times) != 1:
        raise UserError(f"the headers name the repetition times {times} s: BIDS wants one for the whole data set.")
    description = {
        "Name": "COBRE, links to NITRC's layout",
        "BIDSVersion": "1.10.0",
        "DatasetType": "raw",
        "GeneratedBy": [{"Name": "autospec bidsify"}],
    }
    (root / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n")
    task = {"TaskName": "rest", "RepetitionTime": times[0]}
    (root / "task-rest_bold.json").write_text(json.dumps(task, indent=2) + "\n")
    (root / "README").write_text("Links to images in NITRC's layout, arranged as BIDS asks for.\n")
    rows = matched(links, table.rows, table.path)
    lines = ["\t".join(["participant_id", *table.columns])]
    for name in links:
        row = rows.get(name, {})
        lines.append("\t".join([f"sub-{name}", *(row.get(column) or MISSING for column in table.columns)]))
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
