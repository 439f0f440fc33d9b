"""What a cohort would give, before any job: from names of files, tables and headers of images, .mat and HDF5 files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from autospec.cohort.files import digest_of, file_problem, listed
from autospec.cohort.images import Header, grids_of, read_header, require_mni, time_between_volumes
from autospec.cohort.mixed import differences, differences_of_images
from autospec.cohort.motion import motion_of, motion_problem
from autospec.cohort.precomputed import shape_of
from autospec.cohort.selection import Cohort, Exclusion, Participant, candidates, nobody_is_left
from autospec.cohort.subjects import MISSING, CohortSettings, Scan
from autospec.errors import UserError
from autospec.ica.preprocessing import choose_confounds, read_confounds_table

# One subject of COBRE's size (60,304 voxels of 3 mm in the brain, 150 volumes, 53 networks) takes two CPU seconds, and
# reading a gzipped image a second for each 80 million bytes.
BRAIN_MM3 = 60_304 * 27.0
SECONDS_PER_VALUE = 2.0 / (60_304 * 150)
BYTES_PER_SECOND = 80e6
# Each participant is a process of its own, which imports its libraries, loads the template and draws a picture.
SECONDS_TO_START = 4.0
# What a number takes on the disk: four bytes of a map, hardly smaller when gzipped, and text of time courses, twice.
BYTES_PER_MAP_VALUE = 3.6
BYTES_PER_COURSE_VALUE = 22.0
GLANCE_BYTES = 1 << 12


@dataclass(frozen=True)
class Report:
    """What a cohort would give."""

    layout: str
    kind: str
    groups: dict[str, int]
    """Participants of each diagnosis."""
    sexes: dict[str, int]
    """Participants of each diagnosis and sex."""
    groupings: dict[str, dict[str, int]]
    """Participants with each label, of the further columns by which a study groups."""
    functional: int
    structural: int
    exclusions: list[Exclusion]
    grids: dict[str, int]
    """Images on each grid, in words."""
    repetition_times: dict[str, int]
    """Images with each repetition time, in seconds."""
    volumes: tuple[int, int] | None
    """Fewest and most volumes of an image, without those dropped at the start."""
    seconds: float
    """CPU time that spatially constrained ICA will take, about."""
    bytes: float
    """Disk that its results will take, about."""
    warnings: list[str] = field(default_factory=list)
    headers: list[Header] = field(default_factory=list)
    """Of the images that can be used."""
    networks: dict[str, int] = field(default_factory=dict)
    """Files of time courses that were computed before, by their number of networks."""
    drop_volumes: int = 0
    """Volumes dropped at the start of each image."""
    ages: list[float] = field(default_factory=list)
    """Of participants whose age is known, in years."""
    participants: list[Participant] = field(default_factory=list)
    """Those who take part, with the images that are used."""

    def lines(self) -> list[str]:
        """The report, for a person to read."""
        text = [
            f"layout: {self.layout} ({self.kind} data)",
            f"participants: {_counted(self.groups)} ({_counted(self.sexes)})",
            *(f"{name}: {_counted(counts)}" for name, counts in self.groupings.items()),
            f"functional: {self.functional}, structural: {self.structural}",
            self._ages(),
        ]
        if self.grids:
            text.append(f"grid: {'; '.join(f'{grid} ({count} images)' for grid, count in self.grids.items())}")
            times = "; ".join(f"{time} ({count} images)" for time, count in self.repetition_times.items())
            text.append(f"repetition time: {times}")
        if self.volumes is not None:
            fewest, most = self.volumes
            same = (
                f"{fewest} in every image" if fewest == most else f"{fewest} to {most}; data sets are cut to the fewest"
            )
            dropped = f", without the first {self.drop_volumes} of each" if self.drop_volumes else ""
            text.append(f"volumes: {same}{dropped}")
        if self.networks:
            counts = "; ".join(f"{number} ({count} time courses)" for number, count in self.networks.items())
            text.append(f"networks computed before: {counts}")
        if self.headers:
            text.append(
                f"time and disk: about {_duration(self.seconds)} of one core, {max(1, self.bytes / 1e6):,.0f} MB"
            )
        text += [f"left out: sub-{each.id} ({each.part}): {each.reason}" for each in self.exclusions]
        if not self.exclusions:
            text.append("left out: nobody")
        return text + [f"warning: {warning}" for warning in self.warnings]

    def _ages(self) -> str:
        unknown = sum(self.groups.values()) - len(self.ages)
        if not self.ages:
            return "age: not known of anybody"
        return f"age: {min(self.ages):g} to {max(self.ages):g} years" + (f", not known of {unknown}" if unknown else "")


@dataclass(frozen=True)
class _Seen:
    """What headers say of one functional run: of an image, or of time courses that were computed before."""

    volumes: int
    header: Header | None = None
    time: float = 0.0
    networks: int | None = None


@dataclass(frozen=True)
class _Plan:
    """What will be done to each run, as far as it decides whether the run has enough volumes."""

    networks: int
    repetition_time: float | None
    drop_volumes: int
    least_volumes: Callable[[float], int] | None
    confounds: str


def check_cohort(
    settings: CohortSettings,
    networks: int = 53,
    voxel_mm: float | None = 3.0,
    repetition_time: float | None = None,
    drop_volumes: int = 0,
    least_volumes: Callable[[float], int] | None = None,
    confounds: str = "none",
    own_grids: bool = False,
) -> Report:
    """Say what a cohort would give.

    Parameters
    ----------
    settings : CohortSettings
        Where the data are, and who is wanted.
    networks : int
        How many networks the template has.
    voxel_mm : float or None
        Voxels in which networks will be sought; None stands for the images' own.
    repetition_time : float or None
        Seconds between volumes, where the configuration says it.
    drop_volumes : int
        How many volumes at the start of each image are not used.
    least_volumes : callable or None
        How many volumes so many seconds apart are needed to clean time courses; None where none are made.
    confounds : str
        What will be regressed out, as under ``ica.confounds``: whoever lacks it cannot be used.
    own_grids : bool
        Whether networks will be sought on each image's own grid, ``ica.grid: data``.

    Returns
    -------
    Report

    Raises
    ------
    UserError
        If the cohort cannot be used at all, or, with ``on_bad_subject: fail``, someone's data are at fault.
    """
    cohort = candidates(settings)
    plan = _Plan(networks, repetition_time, drop_volumes, least_volumes, confounds)
    exclusions = list(cohort.exclusions)
    seen: list[_Seen] = []
    taking_part: list[Participant] = []
    for each in cohort.participants:
        used: list[Scan] = []
        for scan in each.scans:
            found, exclusion = _examine(each, scan, settings, plan)
            if exclusion is None:
                used.append(scan)
                seen += found
            elif exclusion.bad and settings["on_bad_subject"] == "fail":
                raise UserError(
                    f"sub-{each.id} cannot be used: {exclusion.reason}; correct the data, or set on_bad_subject: exclude."
                )
            else:
                exclusions.append(exclusion)
        if used or each.freesurfer:
            taking_part.append(replace(each, scans=tuple(used)))
    if not taking_part:
        raise nobody_is_left(cohort, exclusions)
    images = {each.id: each.scans for each in taking_part}
    warnings = [*differences(images, sessions=settings["scans"] != "all"), *_copies(taking_part)]
    left = replace(cohort, participants=taking_part, exclusions=exclusions)
    report = _report(left, seen, networks, voxel_mm, own_grids, warnings)
    return replace(report, drop_volumes=drop_volumes)


def planned_cohort(
    cohort: Cohort,
    header: Header,
    repetition_time: float,
    networks: int = 53,
    voxel_mm: float | None = 3.0,
    drop_volumes: int = 0,
) -> Report:
    """Say what a cohort would give whose images are not written yet and will be alike.

    Parameters
    ----------
    cohort : Cohort
    header : Header
        Of each image.
    repetition_time : float
        Seconds.
    networks, voxel_mm, drop_volumes
        As for `check_cohort`.
    """
    seen = [_Seen(header.volumes - drop_volumes, header, repetition_time)] * len(cohort.scans)
    report = _report(cohort, seen, networks, voxel_mm)
    return replace(report, drop_volumes=drop_volumes)


def _examine(
    participant: Participant, scan: Scan, settings: CohortSettings, plan: _Plan
) -> tuple[list[_Seen], Exclusion | None]:
    """What headers say of a run, or why it cannot be used."""
    name, which = participant.id, f"{scan.label}: " if scan.label else ""
    try:
        found = [_look(scan, plan, plan.repetition_time or participant.done.repetition_time)] if scan.file else []
        confounds = [scan.confounds] if scan.confounds else []
        motion = motion_of(confounds, scan.row or participant.phenotype, drop_volumes=plan.drop_volumes)
    except UserError as error:
        return [], Exclusion(name, "functional", which + str(error).rstrip("."), bad=True)
    for each in found:
        motion = motion.of_used(each.volumes)
    problem = motion_problem(motion, settings["max_mean_fd"], settings["min_volumes"])
    wanted = settings["min_volumes"]
    for each in found:
        if not problem and wanted is not None and motion.usable_volumes is None and each.volumes < wanted:
            problem = f"{each.volumes} volumes, fewer than min_volumes ({wanted})"
    return found, Exclusion(name, "functional", which + problem) if problem else None


def _look(scan: Scan, plan: _Plan, stated_time: float | None) -> _Seen:
    """What headers say of a run that can be used; raises UserError otherwise."""
    if not scan.bold:
        volumes, count = shape_of(scan)
        return _Seen(_kept(scan, volumes, max(0, volumes - plan.drop_volumes), stated_time, plan), networks=count)
    header = read_header(scan.bold)
    require_mni(header)
    time = time_between_volumes(scan.bold, scan.sidecar, stated_time)
    table = read_confounds_table(scan.confounds) if scan.confounds else None
    _, kept, _ = choose_confounds(plan.confounds, scan.bold, table, header.volumes, plan.drop_volumes)
    return _Seen(_kept(scan, header.volumes, len(kept), time, plan), header, time)


def _kept(scan: Scan, volumes: int, kept: int, time: float | None, plan: _Plan) -> int:
    """How many volumes of a run are used; raises UserError where they are too few."""
    why = f"drop_volumes = {plan.drop_volumes}" if plan.drop_volumes else ""
    if kept < volumes - plan.drop_volumes:  # scrubbed
        why = f"{why} and confounds: {plan.confounds}" if why else f"confounds: {plan.confounds}"
    dropped = f", of which {why} leaves {kept}" if why else ""
    if scan.bold and kept < plan.networks:
        raise UserError(f"{scan.file} has {volumes} volumes{dropped}, too few for {plan.networks} networks.")
    least = 0 if time is None or plan.least_volumes is None else plan.least_volumes(time)
    if kept < least:
        raise UserError(
            f"{scan.file} has {volumes} volumes{dropped}, too few to clean time courses: at least {least} are needed."
        )
    return kept


def _report(
    cohort: Cohort,
    seen: list[_Seen],
    networks: int,
    voxel_mm: float | None,
    own_grids: bool = False,
    warnings: Sequence[str] = (),
) -> Report:
    """What a cohort of those who take part, with the images that are used, would give."""
    taking_part = cohort.participants
    headers = [each.header for each in seen if each.header is not None]
    times = Counter(f"{each.time:g} s" for each in seen if each.header is not None)
    volumes = [each.volumes for each in seen]
    counts = Counter(str(each.networks) for each in seen if each.networks is not None)
    return Report(
        layout=cohort.layout,
        kind=cohort.kind,
        groups=_sorted(Counter(each.person.diagnosis for each in taking_part)),
        sexes=_sorted(Counter(f"{each.person.diagnosis} {each.person.sex}" for each in taking_part)),
        groupings={
            name: _sorted(Counter(each.person.groupings[name] for each in taking_part))
            for name in (taking_part[0].person.groupings if taking_part else ())
        },
        functional=len(cohort.functional),
        structural=len(cohort.structural),
        exclusions=cohort.exclusions,
        grids=grids_of(headers),
        repetition_times=dict(times),
        volumes=(min(volumes), max(volumes)) if volumes else None,
        seconds=sum(SECONDS_TO_START + predicted_seconds(header, voxel_mm) for header in headers),
        bytes=sum(predicted_bytes(header, networks, voxel_mm) for header in headers),
        warnings=[*cohort.notes, *_warnings(headers, times, counts, cohort, own_grids), *warnings],
        headers=headers,
        networks=_sorted(counts),
        ages=[float(each.person.age) for each in taking_part if each.person.age != MISSING],
        participants=taking_part,
    )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _warnings(
    headers: list[Header], times: Counter[str], counts: Counter[str], cohort: Cohort, own_grids: bool
) -> list[str]:
    warnings = []
    if len(counts) > 1:
        warnings.append(
            f"time courses have different numbers of networks ({listed(sorted(counts))}); data sets need one number"
        )
    warnings += differences_of_images(grids_of(headers), times)
    if own_grids and len(grids_of(headers)) > 1:
        warnings.append("data sets of maps need one grid: set ica.grid to template or to a voxel size")
    said: dict[str, list[str]] = {}  # the same words of different files
    for header in headers:
        for warning in header.warnings:
            said.setdefault(warning.replace(Path(header.path).name, ""), []).append(warning)
    for first, *more in said.values():
        warnings.append(first + (f" ({len(more)} more say so, too)" if more else ""))
    if cohort.kind == "real" and any(header.simulated for header in headers):
        warnings.append("some images say that they are simulated, but their data set does not")
    return warnings


def _copies(participants: list[Participant]) -> list[str]:
    """Warn of images of two participants that hold the same, reading whole only those that seem to."""
    alike: dict[tuple[int, bytes], list[tuple[Participant, str]]] = {}
    for each in participants:
        for scan in each.scans:
            if scan.bold and not file_problem(scan.bold):
                alike.setdefault(_glance(scan.bold), []).append((each, scan.bold))
    found: dict[str, tuple[Participant, str]] = {}
    warnings = []
    for images in alike.values():
        for each, bold in images if len(images) > 1 else ():
            other, copied = found.setdefault(digest_of([bold]), (each, bold))
            if other is not each:
                warnings.append(
                    f"sub-{other.id} and sub-{each.id} have the same image, since {bold} is a copy of {copied}: "
                    "give each their own, or leave one of them out"
                )
    return warnings


def _glance(path: str) -> tuple[int, bytes]:
    """Size of a file and what stands in its middle."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        file.seek(size // 2)
        return size, file.read(GLANCE_BYTES)


def predicted_seconds(header: Header, voxel_mm: float | None) -> float:
    """CPU seconds that spatially constrained ICA of an image takes, reading included, about."""
    read = 2.0 * float(np.prod(header.shape)) * header.volumes / BYTES_PER_SECOND
    return _brain_voxels(header, voxel_mm) * header.volumes * SECONDS_PER_VALUE + read


def predicted_bytes(header: Header, networks: int, voxel_mm: float | None) -> float:
    """Bytes that its maps and time courses take, about."""
    return networks * (_brain_voxels(header, voxel_mm) * BYTES_PER_MAP_VALUE + header.volumes * BYTES_PER_COURSE_VALUE)


def _brain_voxels(header: Header, voxel_mm: float | None) -> float:
    size = float(np.prod(header.voxel_mm)) if voxel_mm is None else voxel_mm**3
    return BRAIN_MM3 / size


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{label}: {count}" for label, count in counts.items())


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
