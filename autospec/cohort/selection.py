"""Who takes part, and in words why others do not: from names of files and tables only, so that it takes no time."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from autospec.cohort.files import natural_key
from autospec.cohort.layouts import is_simulated, read_layout
from autospec.cohort.mixed import require_one_task
from autospec.cohort.motion import motion_of
from autospec.cohort.phenotypes import UNCODED, Person, Refusal, describe, matched, united
from autospec.cohort.record import Kind
from autospec.cohort.subjects import CohortSettings, Done, Scan, Subject
from autospec.errors import UserError
from autospec.freesurfer import find_subjects_dir, subjects_of

Part = Literal["all", "functional", "structural"]


@dataclass(frozen=True)
class Exclusion:
    """Someone who is left out, and why."""

    id: str
    part: Part
    """Left out of everything, or of the functional or the structural half alone."""
    reason: str
    bad: bool = False
    """Whether the data are at fault, so that `on_bad_subject` decides; otherwise a choice, or a half that is not there."""


@dataclass(frozen=True)
class Participant:
    """Someone who takes part in one half or both."""

    id: str
    person: Person
    scans: tuple[Scan, ...]
    """Functional runs; none where only the structural half knows the participant."""
    freesurfer: tuple[str, ...]
    """Folder of FreeSurfer's results, or the tables that hold them; none where only the functional half knows the participant."""
    done: Done = field(default_factory=Done)
    phenotype: dict[str, str] = field(default_factory=dict)

    @property
    def named_scans(self) -> dict[str, Scan]:
        """Functional runs by the name of their results: the id, and where all runs are taken which it is."""
        return {f"{self.id}_{scan.label}" if scan.label else self.id: scan for scan in self.scans}


@dataclass(frozen=True)
class Cohort:
    """A cohort as it is before any image was read."""

    layout: str
    kind: Kind
    participants: list[Participant]
    exclusions: list[Exclusion]
    table: str = ""
    """The file of the table of participants."""
    notes: list[str] = field(default_factory=list)
    """Labels of it that were taken as one."""

    @property
    def functional(self) -> list[Participant]:
        """Participants with functional runs."""
        return [each for each in self.participants if each.scans]

    @property
    def scans(self) -> dict[str, tuple[Participant, Scan]]:
        """Functional runs, each a job, by the name of their results, and whose they are."""
        return {name: (each, scan) for each in self.participants for name, scan in each.named_scans.items()}

    @property
    def structural(self) -> list[Participant]:
        """Participants with volumes."""
        return [each for each in self.participants if each.freesurfer]


def candidates(settings: CohortSettings) -> Cohort:
    """Say who is in a cohort, from names of files and tables only.

    Parameters
    ----------
    settings : CohortSettings
        Where the data are, and who is wanted.

    Returns
    -------
    Cohort
        Participants in the order of their ids, and everybody who is left out.

    Raises
    ------
    UserError
        If the folder cannot be read, the two halves are of different kinds, images are of different tasks, nobody is
        left, or, with ``on_bad_subject: fail``, someone's data are at fault.
    """
    folder = settings["folder"]
    layout, subjects = read_layout(folder, settings)
    sources = freesurfer_sources(settings)
    volumes, problems = subjects_of(sources) if sources else ({}, {})
    kind = _kind(folder, sources)
    return select(layout, kind, subjects, volumes, problems, settings)


def freesurfer_sources(settings: CohortSettings) -> list[str]:
    """Folder or tables of the structural half; ``["auto"]`` looks where they usually stand."""
    if settings["freesurfer"] != ["auto"]:
        return list(settings["freesurfer"])
    found = find_subjects_dir(settings["folder"])
    return [found] if found else []


def _kind(folder: str, sources: list[str]) -> Kind:
    kinds = {path: "simulated" if is_simulated(path) else "real" for path in (folder, *sources)}
    if len(set(kinds.values())) > 1:
        raise UserError(
            f"{' and '.join(f'{path} ({kind})' for path, kind in kinds.items())} are of different kinds: "
            "do not mix real and simulated data."
        )
    return "simulated" if kinds[folder] == "simulated" else "real"


def select(
    layout: str,
    kind: Kind,
    subjects: list[Subject],
    volumes: dict[str, tuple[str, ...]],
    problems: dict[str, str],
    settings: CohortSettings,
) -> Cohort:
    """Decide who takes part.

    Parameters
    ----------
    layout, kind : str
        What the cohort is.
    subjects : list of Subject
        Whoever the layout or its table knows.
    volumes : dict of str to tuple of str
        Folder or tables of FreeSurfer's results by id.
    problems : dict of str to str
        Why someone's volumes cannot be used, by id.
    settings : CohortSettings
        Who is wanted.

    Returns
    -------
    Cohort

    Raises
    ------
    UserError
        If nobody is left, two participants have one image, images are of different tasks, or, with
        ``on_bad_subject: fail``, someone's data are at fault.
    """
    by_id = {subject.id: subject for subject in subjects}
    volumes = matched(by_id, volumes, "the FreeSurfer data")
    problems = matched(by_id, problems, "the FreeSurfer data")
    participants: list[Participant] = []
    exclusions: list[Exclusion] = []
    for name in sorted({*by_id, *volumes}, key=natural_key):
        subject = by_id.get(name, Subject(name))
        places = volumes.get(name, ())
        found = _decide(subject, places, problems.get(name, ""), bool(volumes), settings)
        exclusions += found[1]
        if found[0] is not None:
            participants.append(found[0])
    bad = [each for each in exclusions if each.bad]
    if bad and settings["on_bad_subject"] == "fail":
        others = f" ({len(bad) - 1} more cannot be used either)" if len(bad) > 1 else ""
        raise UserError(
            f"sub-{bad[0].id} cannot be used: {bad[0].reason}{others}; correct the data, or set on_bad_subject: exclude."
        )
    if not participants:
        first = f", the first because: {exclusions[0].reason}" if exclusions else ""
        raise UserError(f"nobody in {settings['folder']} can take part: {len(exclusions)} are left out{first}.")
    _require_images_of_their_own(participants)
    uncoded = sum(UNCODED in each.reason for each in exclusions)
    if uncoded and not any(each.person.diagnosis == "SZ" for each in participants):
        raise UserError(
            f"no patient counts as strict schizophrenia, since the table has no codes of diagnoses for {uncoded} of them: "
            "set diagnosis to Patient as labelled, or name the column of codes under columns (code)."
        )
    tables = [subject.table for subject in subjects if subject.table]
    people, notes = united([each.person for each in participants])
    participants = [replace(each, person=person) for each, person in zip(participants, people, strict=True)]
    require_one_task({each.id: each.scans for each in participants})
    return Cohort(layout, kind, participants, exclusions, tables[0] if tables else "", notes)


def _require_images_of_their_own(participants: list[Participant]) -> None:
    """Refuse an image that two participants have: it would be in both groups, or trained on and held out."""
    whose: dict[str, str] = {}
    for each in participants:
        for bold in {os.path.realpath(scan.bold) for scan in each.scans if scan.bold}:
            if bold in whose:
                raise UserError(
                    f"sub-{whose[bold]} and sub-{each.id} have the same image, {bold}: correct the table of participants, or "
                    "leave one of them out."
                )
            whose[bold] = each.id


def _decide(
    subject: Subject, places: tuple[str, ...], volumes_problem: str, has_structural: bool, settings: CohortSettings
) -> tuple[Participant | None, list[Exclusion]]:
    """A participant, or None, and what it is left out of."""
    name = subject.id
    if subject.phenotype is None:
        what = "an image" if subject.scans or subject.problem else "FreeSurfer volumes"
        return None, [Exclusion(name, "all", f"has {what}, but no row in the table of participants", bad=True)]
    table = settings["phenotypes"] or f"the table of participants in {settings['folder']}"
    source = f"the row of sub-{name} in {table}"
    person = describe(subject.phenotype, settings, source)
    if isinstance(person, Refusal):
        return None, [Exclusion(name, "all", person.reason, person.bad)]
    exclusions = []
    scans = () if subject.problem else subject.scans
    for scan in scans:
        if not scan.confounds:
            motion_of([], scan.row or subject.phenotype, source)  # a number that is none is found before any job
    if settings["scans"] == "all":
        scans = _labelled(name, scans)
    if subject.problem:
        exclusions.append(Exclusion(name, "functional", subject.problem, bad=True))
    elif not scans and places:
        exclusions.append(Exclusion(name, "functional", "there is no functional image of it"))
    if volumes_problem:
        exclusions.append(Exclusion(name, "structural", volumes_problem, bad=True))
    elif has_structural and not places:
        exclusions.append(Exclusion(name, "structural", "there are no FreeSurfer volumes of it"))
    places = () if volumes_problem else places
    if not scans and not places:
        if not any(each.bad for each in exclusions):
            exclusions = [Exclusion(name, "all", "is in the table of participants, but has no data", bad=True)]
        return None, exclusions
    return Participant(name, person, scans, places, subject.done, subject.phenotype), exclusions


def _labelled(subject: str, scans: tuple[Scan, ...]) -> tuple[Scan, ...]:
    """Runs with what tells them apart."""
    found: dict[str, Scan] = {}
    for scan in scans:
        parts = {"ses": scan.session, "run": scan.run}
        label = "_".join(f"{key}-{value}" for key, value in parts.items() if value)
        if label in found or not re.fullmatch(r"([A-Za-z0-9]+([_-][A-Za-z0-9]+)*)?", label):
            raise UserError(
                f"{scan.file} of sub-{subject} cannot be told from other images by session and run: "
                "give sessions and runs different names of letters and digits."
            )
        found[label] = replace(scan, label=label)
    return tuple(found.values())


def nobody_is_left(cohort: Cohort, exclusions: Sequence[Exclusion]) -> UserError:
    """Say that nobody is left, and why: the commonest reason, with somebody as an example."""
    # Numbers differ from one to the next: 0.61 mm, 0.52 mm.
    kinds = [re.sub(r"\S*\d\S*", "", each.reason) for each in exclusions]
    why = "nobody has data that can be used"
    if kinds:
        commonest, count = Counter(kinds).most_common(1)[0]
        first = exclusions[kinds.index(commonest)]
        others = f" (and of {count - 1} more the like)" if count > 1 else ""
        why = f"of sub-{first.id}{others}: {first.reason.rstrip('.')}"
    return UserError(f"nobody is left of {len(cohort.participants)} participants: {why}.")


def functional_files(participant: Participant) -> list[str]:
    """Files that a participant's own job reads, each once."""
    kinds = ("bold", "confounds", "sidecar", "timecourses", "maps", "mask", "components")
    files = [getattr(scan, kind) for scan in participant.scans for kind in kinds]
    return [file for file in dict.fromkeys(files) if file]
