"""What the data sets of a cohort have in common: who is in them, with which labels, and what their data say of themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autospec.cohort.files import listed, read_json
from autospec.cohort.record import groupings_of, read_participants, read_record, read_scans
from autospec.cohort.subjects import MISSING
from autospec.errors import UserError
from autospec.ica.derivative import subject_files


@dataclass(frozen=True)
class Half:
    """Samples of the functional or of the structural data sets."""

    ids: list[str]
    """One a sample: a participant's id, and where several images of somebody are taken the session and the run."""
    subjects: list[str]
    """Whose each sample is."""
    target: list[str]
    groupings: dict[str, list[str]]
    covariates: dict[str, list[float]]
    """Age in years, and mean framewise displacement in mm; NaN where not known."""
    simulated: bool
    cohort_digest: str

    @property
    def counted(self) -> str:
        """How many participants there are, and how many samples where somebody has several."""
        people = len(set(self.subjects))
        return f"{people} participants" + (f" ({len(self.ids)} images)" if len(self.ids) > people else "")


@dataclass(frozen=True)
class Origin:
    """What the JSON files beside some results say of them."""

    simulated: bool
    template: str | None
    """Kind of the template; None where there was none."""
    template_digest: str | None
    repetition_times: list[float]
    """Seconds, each once."""

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of a data set."""
        known: dict[str, Any] = {
            "simulated": self.simulated,
            "template": self.template,
            "template_digest": self.template_digest,
            "stand_in_template": self.template == "stand-in template",
        }
        if len(self.repetition_times) == 1:
            known["repetition_time"] = self.repetition_times[0]
        return {name: value for name, value in known.items() if value is not None}


def read_half(participants: str, part: Literal["functional", "structural"]) -> Half:
    """Read who is in one half of a cohort.

    Parameters
    ----------
    participants : str
        The table ``participants.tsv`` that ``autospec cohort`` wrote, its table of images and its record beside it.
    part : {"functional", "structural"}

    Raises
    ------
    UserError
        If the table or its record cannot be read, or nobody is in this half.
    """
    people = [row for row in read_participants(participants) if row.get(part) == "yes"]
    if not people:
        raise UserError(f"nobody in {participants} has {part} data: leave this data set out of the config.")
    by_id = {row["id"]: row for row in people}
    samples = people if part == "structural" else read_scans(participants)
    subjects = [row["id" if part == "structural" else "subject"] for row in samples]
    rows = [by_id[name] for name in subjects]
    record = read_record(str(Path(participants).parent))
    return Half(
        ids=[row["id"] for row in samples],
        subjects=subjects,
        target=[row["diagnosis"] for row in rows],
        groupings=groupings_of(rows),
        covariates={
            "age": [_number(row["age"]) for row in rows],
            "mean_fd": [_number(row["mean_fd"]) for row in samples],
        },
        simulated=record.get("kind") == "simulated",
        cohort_digest=str(record.get("digest", "")),
    )


def _number(cell: str) -> float:
    return math.nan if cell == MISSING else float(cell)


def files_in(folders: list[str], kind: str) -> dict[str, str]:
    """One file of each functional image's own job, by the name of its results: ``timecourses``, ``cleaned``, ``maps`` or ``mask``.

    Parameters
    ----------
    folders : list of str
        ``sub-<id>``; that of an excluded participant, who is in no data set, lacks the file.
    kind : str
        A key of `autospec.ica.derivative.subject_files`.
    """
    ids = {Path(folder).name.removeprefix("sub-"): folder for folder in folders}
    return {name: str(Path(folder) / subject_files(name)[kind]) for name, folder in ids.items()}


def files_of(half: Half, files: Mapping[str, str], what: str) -> list[str]:
    """Files of the participants, in their order; raises UserError if somebody's is missing."""
    missing = [name for name in half.ids if name not in files]
    if missing:
        raise UserError(
            f"there are no {what} of {listed([f'sub-{name}' for name in missing])}: their own jobs have not run."
        )
    return [files[name] for name in half.ids]


def read_origin(files: list[str], half: Half) -> Origin:
    """Read what the JSON files beside some results say.

    Parameters
    ----------
    files : list of str
        Tables or images, each with a JSON file of the same name beside it.
    half : Half
        The participants.

    Raises
    ------
    UserError
        If a JSON file is missing, or results of different kinds or templates are mixed.
    """
    described = {file: read_json(_sidecar(file)) for file in files}
    simulated = {bool(content.get("Simulated")) for content in described.values()} | {half.simulated}
    if len(simulated) > 1:
        raise UserError(f"{files[0]} and others are results of real and of simulated data: run the cohort again.")
    templates = {_template(content) for content in described.values()}
    if len(templates) > 1:
        raise UserError(f"{files[0]} and others are results of different templates: run all of them with one.")
    times = {float(each["RepetitionTime"]) for each in described.values() if each.get("RepetitionTime") is not None}
    kind, digest = templates.pop()
    return Origin(half.simulated, kind, digest, sorted(times))


def _template(content: dict[str, Any]) -> tuple[str | None, str | None]:
    record = content.get("Template") or {}
    return record.get("Kind"), record.get("SHA256OfGridAffineAndValues")


def _sidecar(file: str) -> str:
    for ending in (".nii.gz", ".nii", ".tsv"):
        if file.endswith(ending):
            return file.removesuffix(ending) + ".json"
    raise UserError(f"{file} is neither an image nor a table: give results of autospec ica.")
