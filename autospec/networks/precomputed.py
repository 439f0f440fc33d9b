"""The stage that takes one participant's networks as GIFT or TReNDS computed them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal, TypedDict

from autospec.cohort import gift
from autospec.cohort.files import digest_of, read_json
from autospec.cohort.precomputed import write_timecourses
from autospec.cohort.subjects import Scan
from autospec.errors import UserError
from autospec.ica.derivative import (
    STATUS,
    folder_written_whole,
    subject_files,
    write_excluded,
    write_included,
    write_json,
)
from autospec.ica.images import read_values, write_image
from autospec.ica.subject import SubjectFiles, TimecourseSettings, build_timecourses


class PrecomputedSettings(TypedDict):
    """What the stage reads from the configuration."""

    subject: str
    position: int
    """Place of the participant in a file that holds several, counted from zero."""
    ica: TimecourseSettings
    """Without ``on_bad_subject``."""


class PrecomputedFiles(TypedDict):
    """The participant's files; empty where there is none."""

    timecourses: str
    maps: str
    mask: str
    components: str
    description: str


def build_precomputed(
    settings: PrecomputedSettings, files: PrecomputedFiles, on_bad_subject: Literal["fail", "exclude"], output: str
) -> str:
    """Write a participant's folder from what was computed before.

    Parameters
    ----------
    settings : PrecomputedSettings
    files : PrecomputedFiles
    on_bad_subject : {"fail", "exclude"}
        Whether to stop at files that cannot be used, or to write that down as the reason of an exclusion.
    output : str
        The folder; it appears whole or not at all.

    Returns
    -------
    str
        One line that says what was taken over.

    Raises
    ------
    UserError
        If the files cannot be used, unless bad subjects are excluded.
    """
    subject, chosen = settings["subject"], settings["ica"]
    scan = Scan(
        timecourses=files["timecourses"],
        maps=files["maps"],
        mask=files["mask"],
        components=files["components"],
        position=settings["position"],
    )
    with folder_written_whole(output) as folder:
        try:
            volumes = _take_over(chosen, subject, scan, files["description"], folder)
        except UserError as error:
            if on_bad_subject == "fail":
                raise
            reason = str(error).rstrip(".")
            write_excluded(folder, subject, reason)
            return f"sub-{subject}: excluded, {reason}"
        read = dict.fromkeys((scan.timecourses, scan.maps, scan.mask, scan.components))
        write_included(folder, subject, volumes, digest_of(file for file in read if file))
    return f"sub-{subject}: networks computed before"


def _take_over(settings: TimecourseSettings, subject: str, scan: Scan, description: str, folder: Path) -> int:
    """Write everything but the status; return the number of volumes."""
    names = subject_files(subject)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        table = Path(place) / f"{Path(scan.timecourses).name}.tsv"
        write_timecourses(scan, settings["repetition_time"], str(table))
        files: SubjectFiles = {
            "bold": str(table),
            "sidecar": str(table.with_suffix(".json")),
            "confounds": None,
            "description": description or None,
            "mask": None,
        }
        made = Path(place) / "made"
        try:
            build_timecourses({**settings, "on_bad_subject": "fail"}, subject, files, None, None, made)
        except UserError as error:
            raise UserError(str(error).replace(str(table), scan.timecourses)) from None
        volumes = int(read_json(made / STATUS)["volumes"])
        (made / STATUS).unlink()
        for file in made.iterdir():
            file.rename(folder / file.name)
    if scan.maps:
        record = read_json((folder / names["timecourses"]).with_suffix(".json"))
        image = gift.read_maps(scan.maps, scan.mask)
        write_image(read_values(image, scan.maps), image.affine, folder / names["maps"])
        described = {"Description": "Map of each network, one a volume, as it was computed before."}
        write_json(record | described, folder / names["maps"].replace(".nii.gz", ".json"))
    return volumes
