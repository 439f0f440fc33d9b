"""The cohort's own tables: who takes part (``participants.tsv``), who does not and why (``exclusions.tsv``)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autospec.cohort.files import digest_of, file_problem, listed, natural_key, read_json
from autospec.cohort.images import grids_of, read_header
from autospec.cohort.mixed import differences, differences_of_images
from autospec.cohort.motion import Motion, motion_of, motion_problem, together
from autospec.cohort.record import (
    DICTIONARY,
    EXCLUSIONS,
    FIRST_COLUMNS,
    LAST_COLUMNS,
    RECORD,
    SCAN_COLUMNS,
    SCANS,
    TABLE,
    require_kind,
)
from autospec.cohort.selection import Cohort, Exclusion, Participant, candidates, functional_files, nobody_is_left
from autospec.cohort.subjects import MISSING, CohortSettings, Scan
from autospec.errors import UserError
from autospec.freesurfer import files_of
from autospec.ica.derivative import subject_files
from autospec.storage import written_whole

DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "participant_id": {"Description": "Id of the participant, with its zeros"},
    "diagnosis": {"Description": "Group by diagnosis", "Levels": {"SZ": "schizophrenia", "HC": "healthy control"}},
    "sex": {"Description": "Sex", "Levels": {"M": "male", "F": "female", "O": "other"}},
    "diagnosis_sex": {"Description": "Diagnosis and sex together"},
    "age": {"Description": "Age", "Units": "years"},
    "site": {"Description": "Where the participant was scanned"},
    "functional": {"Description": "Whether the participant is in the functional data sets: yes or no"},
    "structural": {"Description": "Whether the participant is in the structural data sets: yes or no"},
    "mean_fd": {
        "Description": (
            "Mean framewise displacement over all runs, from the tables of confounds: their own column, or computed from "
            "the six parameters of motion on a head of radius 50 mm (Power et al. 2012) where they have none; else from "
            "the table of participants"
        ),
        "Units": "mm",
    },
    "volumes": {"Description": "Volumes in the tables of confounds, all runs together"},
    "usable_volumes": {
        "Description": "Volumes that are used and that no column of the tables of confounds marks as an outlier"
    },
    "bold": {"Description": "Functional images, or the file of time courses computed before, separated by ;"},
    "confounds": {"Description": "Tables of confounds, separated by ;"},
    "freesurfer": {"Description": "Folder of FreeSurfer's results, or the tables that hold them, separated by ;"},
    "functional_digest": {"Description": "Beginning of the SHA-256 of the functional files"},
    "structural_digest": {"Description": "Beginning of the SHA-256 of FreeSurfer's files"},
}
OWN_COLUMNS = (*FIRST_COLUMNS, *LAST_COLUMNS)
PATHS = ("bold", "confounds", "freesurfer")


@dataclass(frozen=True)
class _Used:
    """A functional image that is used."""

    name: str
    scan: Scan
    motion: Motion
    digest: str


def build_cohort(
    settings: CohortSettings, statuses: Mapping[str, str] | None, folder: str, drop_volumes: int = 0
) -> str:
    """Write the cohort's tables.

    Parameters
    ----------
    settings : CohortSettings
        Where the data are, and who is wanted.
    statuses : mapping of str to str, or None
        What the job of each functional image found, as the path of its ``status.json`` by the name of its results;
        None where no such job ran.
    folder : str
        Where to write, such as ``results/cohort``.
    drop_volumes : int
        How many volumes at the start of each image are not used.

    Returns
    -------
    str
        One line that says who takes part.

    Raises
    ------
    UserError
        As `candidates` does; if a status is missing; or if the folder already holds a cohort of another kind.
    """
    return write_cohort(candidates(settings), settings, statuses, folder, drop_volumes)


def write_cohort(
    cohort: Cohort,
    settings: CohortSettings,
    statuses: Mapping[str, str] | None,
    folder: str,
    drop_volumes: int = 0,
) -> str:
    """Write the tables of a cohort that was read already; see `build_cohort`."""
    require_kind(folder, cohort.kind)
    exclusions = list(cohort.exclusions)
    images: dict[str, list[Scan]] = {}
    used_statuses: dict[str, str] = {}
    rows, scan_rows = [], []
    for each in cohort.participants:
        used: list[_Used] = []
        for name, scan in each.named_scans.items():
            status = _status(name, statuses)
            motion = motion_of(_confounds([scan]), scan.row or each.phenotype, drop_volumes=drop_volumes)
            if status.get("volumes") is not None:
                motion = motion.of_used(int(status["volumes"]))
            problem = _functional_problem(status, motion, settings)
            if status.get("status") == "excluded" and settings["on_bad_subject"] == "fail":
                raise UserError(
                    f"sub-{name} cannot be used: {problem.rstrip('.')}; correct the data, or set on_bad_subject: exclude."
                )
            if problem:
                which = f"{scan.label}: " if scan.label else ""
                exclusions.append(Exclusion(each.id, "functional", which + problem))
            else:
                digest = status.get("digest") or digest_of(functional_files(replace(each, scans=(scan,))))
                used.append(_Used(name, scan, motion, digest))
                used_statuses |= {name: statuses[name]} if statuses else {}
        images[each.id] = [image.scan for image in used]
        scan_rows += [_scan_row(each, image) for image in used]
        if used or each.freesurfer:
            rows.append(_row(each, used, settings, drop_volumes))
    if not rows:
        raise nobody_is_left(cohort, exclusions)
    columns = [*FIRST_COLUMNS, *extra_columns(settings), *LAST_COLUMNS]
    exclusions.sort(key=lambda each: natural_key(each.id))
    excluded = [{"participant_id": f"sub-{each.id}", "part": each.part, "reason": each.reason} for each in exclusions]
    warnings = [*cohort.notes, *differences(images, sessions=settings["scans"] != "all")]
    warnings += [*_recorded_differences(images, used_statuses), *_same_images(scan_rows)]
    record = _record(cohort, rows, len(scan_rows), exclusions, settings, columns) | {"warnings": warnings}
    target = Path(folder)
    _write(target / DICTIONARY, _json(_dictionary(columns, settings)))
    _write(target / SCANS, _tsv(list(SCAN_COLUMNS), scan_rows))
    _write(target / EXCLUSIONS, _tsv(["participant_id", "part", "reason"], excluded))
    _write(target / RECORD, _json(record))
    _write(target / TABLE, _tsv(columns, rows))
    groups = ", ".join(f"{label}: {count}" for label, count in record["groups"].items())
    return (
        f"{cohort.kind} cohort ({cohort.layout}): {len(rows)} participants ({groups}), {record['functional']} with "
        f"functional and {record['structural']} with structural data; {len(exclusions)} exclusions"
        + "".join(f"; warning: {warning}" for warning in warnings)
    )


def _recorded_differences(images: Mapping[str, Sequence[Scan]], statuses: Mapping[str, str]) -> list[str]:
    """Say what differs between images in which networks were found: from their headers, and what their own jobs wrote."""
    if not statuses:
        return []
    files = [scan.bold for scans in images.values() for scan in scans if scan.bold and not file_problem(scan.bold)]
    times: Counter[str] = Counter()
    for name, status in statuses.items():
        described = Path(status).with_name(subject_files(name)["timecourses"]).with_suffix(".json")
        if described.is_file():
            times[f"{read_json(described)['RepetitionTime']:g} s"] += 1
    volumes = [read_json(status).get("volumes") for status in statuses.values()]
    return differences_of_images(
        grids_of(map(read_header, files)), times, [int(each) for each in volumes if each is not None]
    )


def _same_images(scan_rows: list[dict[str, str]]) -> list[str]:
    """Warn of participants whose files hold the same; time courses of everybody may stand in one file."""
    whose: dict[str, dict[str, str]] = {}
    pairs = []
    for row in scan_rows:
        first = whose.setdefault(row["digest"], row)
        if first["bold"] != row["bold"] and first["participant_id"] != row["participant_id"]:
            pairs.append(f"{first['participant_id']} and {row['participant_id']}")
    return [f"{listed(pairs)} have the same image"] if pairs else []


def extra_columns(settings: CohortSettings) -> list[str]:
    """Further columns by which participants are grouped; raises UserError if one would hide a column of ours."""
    names = [name for name in settings["groupings"] if name.lower() not in ("diagnosis", "sex", "site")]
    for name in names:
        if name in OWN_COLUMNS or name == "id":
            raise UserError(
                f"the grouping '{name}' has the name of a column of {TABLE}: rename the column in your table."
            )
    return names


def _status(name: str, statuses: Mapping[str, str] | None) -> dict[str, Any]:
    if statuses is None:
        return {}
    if name not in statuses:
        raise UserError(f"there is no status of sub-{name}: its own job has not run.")
    return read_json(statuses[name])


def _confounds(scans: Iterable[Scan]) -> list[str]:
    return [scan.confounds for scan in scans if scan.confounds]


def _functional_problem(status: dict[str, Any], motion: Motion, settings: CohortSettings) -> str:
    if status.get("status") == "excluded":
        return str(status.get("reason", "excluded by its own job"))
    if motion.usable_volumes is None and status.get("volumes") is not None:
        motion = replace(motion, usable_volumes=int(status["volumes"]))
    return motion_problem(motion, settings["max_mean_fd"], settings["min_volumes"])


def _row(participant: Participant, used: list[_Used], settings: CohortSettings, drop_volumes: int) -> dict[str, str]:
    person = participant.person
    scans = [each.scan for each in used]
    # Of several images whose motion is known from the participant's row alone, each would count it once.
    own = [each.motion for each in used if len(used) == 1 or each.scan.confounds or each.scan.row]
    unused = [] if used else _confounds(participant.scans)
    motion = together(own) if own else motion_of(unused, participant.phenotype, drop_volumes=drop_volumes)
    digests = [each.digest for each in used]
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    return {
        "participant_id": f"sub-{participant.id}",
        "diagnosis": person.diagnosis,
        "sex": person.sex,
        "diagnosis_sex": person.diagnosis_sex,
        "age": person.age,
        "site": person.site,
        **{name: person.groupings[name] for name in extra_columns(settings)},
        "functional": "yes" if used else "no",
        "structural": "yes" if participant.freesurfer else "no",
        "mean_fd": _number(motion.mean_fd),
        "volumes": _number(motion.volumes),
        "usable_volumes": _number(motion.usable_volumes),
        "bold": ";".join(scan.file for scan in scans),
        "confounds": ";".join(_confounds(scans)),
        "freesurfer": ";".join(participant.freesurfer),
        "functional_digest": joined if len(digests) > 1 else "".join(digests),
        "structural_digest": digest_of(files_of(participant.freesurfer)),
    }


def _scan_row(participant: Participant, used: _Used) -> dict[str, str]:
    return {
        "participant_id": f"sub-{participant.id}",
        "scan_id": f"sub-{used.name}",
        "task": used.scan.task,
        "session": used.scan.session,
        "run": used.scan.run,
        "space": used.scan.space,
        "mean_fd": _number(used.motion.mean_fd),
        "volumes": _number(used.motion.volumes),
        "usable_volumes": _number(used.motion.usable_volumes),
        "bold": used.scan.file,
        "confounds": used.scan.confounds,
        "digest": used.digest,
    }


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _record(
    cohort: Cohort,
    rows: list[dict[str, str]],
    scans: int,
    exclusions: list[Exclusion],
    settings: CohortSettings,
    columns: list[str],
) -> dict[str, Any]:
    # Paths are left out: the same cohort in another folder is the same cohort.
    content = [[row[column] for column in columns if column not in PATHS] for row in rows]
    return {
        "kind": cohort.kind,
        "layout": cohort.layout,
        "digest": hashlib.sha256(json.dumps([columns, content]).encode()).hexdigest()[:16],
        "diagnosis": settings["diagnosis"] if not settings["labels"] else "labels of the config",
        "participants": len(rows),
        "groups": dict(sorted(Counter(row["diagnosis"] for row in rows).items())),
        "functional": sum(row["functional"] == "yes" for row in rows),
        "scans": scans,
        "structural": sum(row["structural"] == "yes" for row in rows),
        "exclusions": len(exclusions),
    }


def _dictionary(columns: list[str], settings: CohortSettings) -> dict[str, Any]:
    described = {
        name: DESCRIPTIONS.get(name, {"Description": f"The column '{name}' of the cohort's table"}) for name in columns
    }
    if settings["labels"]:
        described["diagnosis"] = {
            "Description": "Group by diagnosis",
            "Levels": {group: f"'{text}' in the cohort's table" for text, group in settings["labels"].items()},
        }
    return described


def _tsv(columns: list[str], rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([re.sub(r"[\t\r\n]+", " ", row[column]) or MISSING for column in columns])
    return text.getvalue()


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
