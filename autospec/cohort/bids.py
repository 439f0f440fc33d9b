"""BIDS with fMRIPrep's derivatives: ``sub-*/[ses-*/]func/*_space-MNI152NLin*_desc-preproc_bold.nii.gz``."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from autospec.cohort.files import existing, file_problem, listed, natural_key
from autospec.cohort.phenotypes import Phenotypes, matched, read_phenotypes
from autospec.cohort.subjects import CohortSettings, Done, Scan, Subject, checked_id, is_asked_for
from autospec.errors import UserError

SPACES = ("MNI152NLin6Asym", "MNI152NLin2009cAsym")
PREPROCESSED = re.compile(r"_desc-preproc_bold\.nii(\.gz)?$")
RAW = re.compile(r"_bold\.nii(\.gz)?$")
CONFOUNDS = re.compile(r"_desc-confounds_(timeseries|regressors)\.tsv$")
# Parts of an image's name that its table of confounds does not carry.
OF_THE_IMAGE = ("space", "res", "den", "cohort", "desc")


@dataclass(frozen=True)
class Named:
    """A file whose name consists of BIDS entities."""

    path: str
    entities: dict[str, str]


def read_bids(folder: str, settings: CohortSettings) -> list[Subject]:
    """Read a tree of fMRIPrep's derivatives, or a BIDS tree that holds one.

    Parameters
    ----------
    folder : str
        The derivatives, or the data set with its ``derivatives/fmriprep``.
    settings : CohortSettings
        Which task, session, run and space, and the table of participants.

    Returns
    -------
    list of Subject
        Whoever has a folder or a row in the table.

    Raises
    ------
    UserError
        If there are only raw images, no table of participants, or several images of a subject and no rule to choose.
    """
    root, scans, problems = find_scans(folder, settings)
    return join(scans, problems, _table(root, folder, settings), Done(smoothing_mm=0.0, confounds="none"))


def find_scans(folder: str, settings: CohortSettings) -> tuple[Path, dict[str, tuple[Scan, ...]], dict[str, str]]:
    """Find the images that the settings ask for, whether or not a table lists the subjects.

    Returns
    -------
    root : Path
        The folder of the derivatives.
    scans : dict of str to tuple of Scan
        By subject.
    problems : dict of str to str
        Why a subject's images cannot be used, by subject; empty where they can.

    Raises
    ------
    UserError
        If there are only raw images, or several images of a subject and no rule to choose.
    """
    root = derivatives_of(folder)
    if root is None:
        raise UserError(
            f"{folder} holds no preprocessed images (*_desc-preproc_bold.nii.gz): run  "
            f"{fmriprep_command(folder)}  and give its output."
        )
    files: dict[str, list[Named]] = {}
    for subject in subject_folders(root):
        name = checked_id(subject.name, str(root))
        if name in files:
            raise UserError(f"{root} has several folders for {name}: keep one.")
        files[name] = functional_files(subject)
    spaces = _spaces(files.values(), settings)
    scans: dict[str, tuple[Scan, ...]] = {}
    problems: dict[str, str] = {}
    for name, of_subject in files.items():
        scans[name], problems[name] = _choose(name, of_subject, spaces, settings)
    return root, scans, problems


def join(scans: dict[str, tuple[Scan, ...]], problems: dict[str, str], table: Phenotypes, done: Done) -> list[Subject]:
    """Bring images and the table of participants together: one subject for each id of either."""
    rows = matched(scans, table.rows, table.path)
    return [
        Subject(name, rows.get(name), scans.get(name, ()), done, problems.get(name, ""), table.path)
        for name in sorted({*scans, *rows}, key=natural_key)
    ]


def derivatives_of(folder: str | Path) -> Path | None:
    """The folder that holds preprocessed images: this one, or the usual ones below it."""
    for below in ("", "derivatives/fmriprep", "fmriprep", "derivatives"):
        root = Path(folder) / below
        if root.is_dir() and _holds(root, PREPROCESSED):
            return root
    return None


def holds_raw(folder: str | Path) -> bool:
    """Whether a folder holds functional images named as BIDS names them."""
    return _holds(Path(folder), RAW)


def _holds(root: Path, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(file.path) for subject in subject_folders(root) for file in functional_files(subject))


def fmriprep_command(folder: str | Path, output: str | Path | None = None) -> str:
    """The command that preprocesses a BIDS tree."""
    output = output or Path(folder) / "derivatives" / "fmriprep"
    return f"fmriprep {folder} {output} participant --output-spaces MNI152NLin6Asym:res-2 --fs-license-file LICENSE"


def subject_folders(root: Path) -> list[Path]:
    """Folders ``sub-*``, in order."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.name.startswith("sub-") and entry.is_dir()]
    return [root / name for name in sorted(names)]


def functional_files(subject: Path) -> list[Named]:
    """Files of a subject's ``func`` folders, in order."""
    with os.scandir(subject) as entries:
        sessions = [entry.name for entry in entries if entry.name.startswith("ses-")]
    found = []
    for folder in ("func", *(f"{name}/func" for name in sorted(sessions, key=natural_key))):
        where = subject / folder
        if where.is_dir():
            found += [
                Named(str(where / name), entities_of(name)) for name in sorted(os.listdir(where), key=natural_key)
            ]
    return found


def entities_of(name: str) -> dict[str, str]:
    """The pairs of a BIDS file name: ``sub-01_task-rest_bold.nii.gz`` gives ``{"sub": "01", "task": "rest"}``."""
    pairs = [part.split("-", 1) for part in name.split(".", 1)[0].split("_") if "-" in part]
    return {key: value for key, value in pairs}


def _wanted(settings: CohortSettings) -> dict[str, str | None]:
    """The entities that an image must have; None where any will do."""
    return {"task": settings["task"], "ses": settings["session"], "run": settings["run"], **settings["entities"]}


def _fitting(files: Iterable[Named], settings: CohortSettings) -> list[Named]:
    """Preprocessed images that have the entities that the settings ask for, in any space."""
    wanted = _wanted(settings).items()
    images = [file for file in files if PREPROCESSED.search(file.path)]
    return [image for image in images if all(_fits(image, key, value) for key, value in wanted)]


def _fits(image: Named, key: str, value: str | None) -> bool:
    """Whether an entity has a value; run-01 is run-1, and ses-01 is ses-1."""
    found = image.entities.get(key)
    return is_asked_for(found, value) if key in ("ses", "run") else value in (None, found)


def _spaces(of_subjects: Iterable[list[Named]], settings: CohortSettings) -> tuple[str, ...]:
    """Spaces in which images are used, that of most subjects first, so that one that all have goes before the others."""
    if settings["space"] is not None:
        return (settings["space"],)
    counts = Counter(
        space
        for files in of_subjects
        for space in {image.entities.get("space", "") for image in _fitting(files, settings)}
    )
    return tuple(sorted(SPACES, key=lambda space: -counts[space]))


def _choose(
    subject: str, files: list[Named], spaces: tuple[str, ...], settings: CohortSettings
) -> tuple[tuple[Scan, ...], str]:
    """Images that the settings ask for in the first of the spaces that the subject has, or why there are none."""
    kept = _fitting(files, settings)
    if not kept and any(PREPROCESSED.search(file.path) for file in files):
        asked = ", ".join(f"{key}-{value}" for key, value in _wanted(settings).items() if value is not None)
        return (), f"none of its images has {asked}"
    there = sorted({image.entities.get("space", "its own") for image in kept})
    space = next((each for each in spaces if each in there), None)
    if kept and space is None:
        return (), (
            f"its images are in the space {listed(there)}, not in {' or '.join(spaces)}: "
            f"run fMRIPrep with  --output-spaces {spaces[0]}:res-2"
        )
    kept = [image for image in kept if image.entities.get("space") == space]
    _require_rule(subject, kept, settings)
    if settings["scans"] == "first":
        kept = kept[:1]
    problem = next(filter(None, (file_problem(image.path) for image in kept)), "")
    return tuple(_scan(image, files) for image in kept), problem


def _require_rule(subject: str, images: list[Named], settings: CohortSettings) -> None:
    """Refuse several images that no setting chooses among; "first" and "all" choose among sessions and runs alone."""
    alike = {tuple(sorted((k, v) for k, v in image.entities.items() if k not in ("ses", "run"))) for image in images}
    if len(images) > 1 and (settings["scans"] == "one" or len(alike) > 1):
        names = listed([Path(image.path).name for image in images])
        raise UserError(
            f"sub-{subject} has several images that fit: {names}; choose with task, session, run, space or entities"
            + (", or set scans to first or all." if len(alike) == 1 else ".")
        )


def _scan(image: Named, files: list[Named]) -> Scan:
    of_run = {key: value for key, value in image.entities.items() if key not in OF_THE_IMAGE}
    confounds = [
        file.path
        for file in files
        if CONFOUNDS.search(file.path) and {k: v for k, v in file.entities.items() if k != "desc"} == of_run
    ]
    return Scan(
        bold=image.path,
        confounds=confounds[0] if confounds else "",
        sidecar=existing(re.sub(r"\.nii(\.gz)?$", ".json", image.path)),
        task=image.entities.get("task", ""),
        session=image.entities.get("ses", ""),
        run=image.entities.get("run", ""),
        space=image.entities.get("space", ""),
    )


def _table(root: Path, folder: str, settings: CohortSettings) -> Phenotypes:
    """The table of participants: the one that the settings name, or one in or above the derivatives."""
    places = [root, Path(folder), root.parent, root.parent.parent]
    path = settings["phenotypes"] or existing(*(place / "participants.tsv" for place in places))
    if not path:
        raise UserError(f"{folder} has no participants.tsv: put one there, or name a table under phenotypes.")
    return read_phenotypes(path, settings["columns"].get("id"))
