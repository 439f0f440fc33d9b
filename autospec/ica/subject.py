"""One subject end to end: an image in, a folder of networks' maps, time courses, connectivity and quality out.

A subject's job depends on that subject alone.  The mask is fixed by the template; voxels in which the subject has no
signal are left out of the computation, have the value 0 in the maps, and are counted in the coverage of each network.
What GIFT does over a whole cohort, its mask and the scaling of its maps, are functions of their own at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pandas as pd

from autospec.cohort.displacement import DISPLACEMENT, PARAMETERS, displacement_of
from autospec.cohort.files import digest_of
from autospec.errors import UserError
from autospec.ica.atlas import atlas_timecourses, read_timecourses
from autospec.ica.cleaning import clean_timecourses, connectivity, regress, spectral_summary
from autospec.ica.derivative import (
    check_subject,
    folder_written_whole,
    network_records,
    note_on_data,
    on_voxels,
    subject_files,
    template_record,
    write_excluded,
    write_gift_files,
    write_included,
    write_json,
    write_square,
    write_table,
)
from autospec.ica.images import (
    affine_warnings,
    open_image,
    open_series,
    read_json,
    read_mask,
    read_volumes,
    repetition_time,
    require_brain_size,
    same_grid,
    space_warnings,
    to_grid,
    volume_shape,
    write_image,
)
from autospec.ica.moo_icar import device_of, moo_icar
from autospec.ica.picture import Shown, write_picture
from autospec.ica.preprocessing import (
    STRATEGIES,
    choose_confounds,
    gift_mask_of,
    preprocess,
    read_confounds_table,
    read_voxels,
)
from autospec.ica.scaling import cohort_modes, scale_maps, scale_timecourses, shift_and_scale_maps
from autospec.ica.template import (
    LEAST_COVERAGE,
    Network,
    Template,
    analysis_grid,
    correlate_rows,
    coverage,
    fixed_mask,
    load_template,
    on_grid,
    require_networks,
)
from autospec.storage import written_whole

MUCH_MOTION_MM = 0.5
SCALED = "Less slow trends (line, sines and cosines of one and two cycles), divided by the standard deviation"
_Ground = tuple[np.ndarray, np.ndarray, np.ndarray]


class AlreadyDone(TypedDict, total=False):
    """What the layout's own pipeline had done; what is done again here is a warning."""

    drop_volumes: int
    smoothing_fwhm_mm: float
    confounds: str
    other: list[str]


class TimecourseSettings(TypedDict):
    """What a subject's job reads from the configuration, wherever its time courses come from."""

    drop_volumes: int
    smoothing_fwhm_mm: float
    confounds: str  # none, motion, or a name that nilearn's load_confounds_strategy knows
    repetition_time: float | None
    min_volumes: int
    max_mean_fd_mm: float | None
    scaling: Literal["z-score", "none"]
    despike: bool
    low_pass_hz: float | None
    on_bad_subject: Literal["fail", "exclude"]
    already_done: AlreadyDone


class SubjectSettings(TimecourseSettings):
    """What a subject's job reads from the configuration."""

    grid: str | float  # template, data, or a voxel size in mm
    confounds_on: Literal["image", "timecourses"]
    preprocessing: int  # 1 to 4
    dtype: Literal["float32", "float64"]
    converged: bool
    min_coverage: float  # of each network, 0 to 1
    gift_number: int | None  # the subject's number in GIFT's file names; None writes none


class SubjectFiles(TypedDict):
    """A subject's files; None where there is none.  Nothing else is read, but what nilearn finds beside the image."""

    bold: str
    sidecar: str | None  # JSON file of the image
    confounds: str | None  # table of confounds
    description: str | None  # dataset_description.json of the data set
    mask: str | None  # in place of the fixed mask


@dataclass(frozen=True)
class _Scan:
    """What is known of a subject's image before its voxels are read."""

    step: float
    simulated: bool
    confounds: np.ndarray | None
    kept: np.ndarray
    volumes: int
    confound_names: list[str]
    motion: dict[str, Any] | None
    displacement: np.ndarray | None
    warnings: list[str]


@dataclass(frozen=True)
class _Courses:
    """A subject's time courses, (volumes, networks), and what is regressed from them before connectivity."""

    scaled: np.ndarray
    unscaled: np.ndarray
    confounds: np.ndarray | None
    networks: Sequence[Network]


def build_subject(
    settings: SubjectSettings,
    subject: str,
    files: SubjectFiles,
    template: str | Path | Template,
    output: str | Path,
    device: str | None = None,
) -> str:
    """Find a subject's networks and write their folder.

    Parameters
    ----------
    settings : SubjectSettings
    subject : str
        Id, without ``sub-``.
    files : SubjectFiles
    template : path-like or Template
        A path, "stand-in", or one that is loaded already.
    output : path-like
        The subject's folder.  It appears whole or not at all.
    device : str, optional
        Where components are computed: "cpu", "cuda" or "auto", as for `moo_icar`; None is the processor.

    Returns
    -------
    str
        One line that says what was done.

    Raises
    ------
    UserError
        If a setting or the template cannot be used; and, unless ``on_bad_subject`` is "exclude", if the subject's
        files cannot.
    """
    check_subject(subject)
    _check_settings(settings)
    device_of(device)
    references = template if isinstance(template, Template) else load_template(template)
    # What does not depend on the subject comes first: a mistake there excludes nobody.
    ground = None if settings["grid"] == "data" else _ground(settings, files, references)
    with folder_written_whole(output) as folder:
        reason = _carried_out(
            lambda: _write_networks(settings, subject, files, references, ground, folder, device),
            settings,
            subject,
            files,
            folder,
        )
    return f"sub-{subject}: excluded, {reason}" if reason else f"sub-{subject}: {len(references.networks)} networks"


def build_timecourses(
    settings: TimecourseSettings,
    subject: str,
    files: SubjectFiles,
    atlas: str | None,
    labels: list[str] | None,
    output: str | Path,
) -> str:
    """Write a subject's folder from an atlas or from precomputed time courses: the same files, without maps.

    Confounds, if any, are regressed from all of them.

    Parameters
    ----------
    settings : TimecourseSettings
    subject : str
        Id, without ``sub-``.
    files : SubjectFiles
        ``bold`` is the image, or where there is no atlas the precomputed time courses.
    atlas : str or None
        Image of regions or of maps.
    labels : list of str or None
        Of the atlas's regions.
    output : path-like
        The subject's folder.

    Returns
    -------
    str
        One line that says what was done.
    """
    check_subject(subject)
    _check_common(settings)
    if atlas is not None:
        require_brain_size(open_image(atlas), f"the atlas {atlas}")  # a mistake there excludes nobody
    with folder_written_whole(output) as folder:
        reason = _carried_out(
            lambda: _write_timecourses(settings, subject, files, atlas, labels, folder),
            settings,
            subject,
            files,
            folder,
        )
    return f"sub-{subject}: excluded, {reason}" if reason else f"sub-{subject}: time courses"


def _write_networks(
    settings: SubjectSettings,
    subject: str,
    files: SubjectFiles,
    template: Template,
    ground: _Ground | None,
    folder: Path,
    device: str | None,
) -> int:
    """Write everything but the status; return the number of volumes used."""
    bold = files["bold"]
    image = open_series(bold)
    scan = _scan(
        settings,
        files,
        volume_shape(image)[3],
        repetition_time(image, bold, read_json(files["sidecar"]), settings["repetition_time"]),
    )
    if len(scan.kept) < len(template.networks):
        raise UserError(
            f"{bold} has {len(scan.kept)} usable volumes for {len(template.networks)} networks: at least as many are needed."
        )
    maps, mask, affine = ground or _ground(settings, files, template)
    voxels = read_voxels(bold, mask, affine, scan.kept, settings["smoothing_fwhm_mm"])
    covered = mask.copy()
    covered[mask] = voxels.covered
    shares = coverage(template, covered, affine)
    require_networks(template, shares, settings["min_coverage"], f"what {bold} covers")

    x = voxels.x if voxels.covered.all() else voxels.x[:, voxels.covered]
    if scan.confounds is not None and settings["confounds_on"] == "image":
        x = regress(x, scan.confounds)
    x = preprocess(x.astype(settings["dtype"], copy=False), settings["preprocessing"])
    references = maps[covered].T
    found = moo_icar(x, references, settings["dtype"], settings["converged"], device)
    scaled = settings["scaling"] == "z-score"
    networks = scale_maps(found.maps) if scaled else found.maps
    timecourses = scale_timecourses(found.timecourses) if scaled else found.timecourses

    warnings = [*scan.warnings, *space_warnings(image, bold), *template.warnings]
    on_image = settings["confounds_on"] == "image"
    record = _record(settings, files, scan, warnings) | {
        "Confounds": scan.confound_names if on_image else [],
        "Template": template_record(template),
        "Networks": network_records(template),
    }
    names = subject_files(subject)
    write_image(on_voxels(networks, covered), affine, folder / names["maps"])
    described = {"Description": "Map of each network, one a volume; 0 where the subject has no signal."}
    write_json(record | described, folder / names["maps"].replace(".nii.gz", ".json"))
    write_image(covered, affine, folder / names["mask"])
    described = {"Description": "Voxels of the mask in which the subject has a signal."}
    write_json(record | described, folder / names["mask"].replace(".nii.gz", ".json"))
    quality = {
        "Voxels": int(mask.sum()),
        "VoxelsCovered": int(covered.sum()),
        "OverlapWithBrain": voxels.overlap,
        "Rank": found.rank,
        "Device": found.device,
        "TemplateMatch": dict(zip(template.labels, correlate_rows(found.maps, references), strict=True)),
        "Coverage": dict(zip(template.labels, shares, strict=True)),
        "AcceptedSteps": dict(zip(template.labels, found.accepted_steps, strict=True)),
    }
    courses = _Courses(timecourses, found.timecourses, None if on_image else scan.confounds, template.networks)
    _write_courses(settings, subject, scan, record, quality, courses, folder)
    if settings["gift_number"] is not None:
        write_gift_files(folder / "gift", settings["gift_number"], networks, covered, affine, timecourses)
    return len(timecourses)


def _write_timecourses(
    settings: TimecourseSettings,
    subject: str,
    files: SubjectFiles,
    atlas: str | None,
    labels: list[str] | None,
    folder: Path,
) -> int:
    """Write everything but the status; return the number of volumes used."""
    bold = files["bold"]
    sidecar = read_json(files["sidecar"])
    if atlas is None:
        values, found = read_timecourses(bold)
        step = sidecar.get("RepetitionTime", settings["repetition_time"])
        if not isinstance(step, int | float):
            raise UserError(f"the repetition time of {bold} is in no JSON sidecar: set repetition_time.")
        scan = _scan(settings, files, len(values), float(step))
        values = values[scan.kept]
        warnings = scan.warnings
    else:
        image = open_series(bold)
        step = repetition_time(image, bold, sidecar, settings["repetition_time"])
        scan = _scan(settings, files, volume_shape(image)[3], step)
        values, found = atlas_timecourses(bold, atlas, labels, scan.kept, settings["smoothing_fwhm_mm"])
        warnings = [*scan.warnings, *space_warnings(image, bold), *affine_warnings(open_image(atlas), atlas)]
    source = {"Atlas": Path(atlas).name} if atlas else {"Precomputed": True}
    record = _record(settings, files, scan, warnings) | source
    networks = [Network(k, label, "", "") for k, label in enumerate(found, start=1)]
    # A region's time course is a linear map of the image, so regressing from it is regressing from the image.
    if settings["scaling"] == "z-score":
        scaled = scale_timecourses(values, scan.confounds)
    else:
        scaled = values if scan.confounds is None else regress(values, scan.confounds)
    courses = _Courses(scaled, values, scan.confounds, networks)
    _write_courses(settings, subject, scan, record, {}, courses, folder)
    return len(values)


def _write_courses(
    settings: TimecourseSettings,
    subject: str,
    scan: _Scan,
    record: dict[str, Any],
    quality: dict[str, Any],
    courses: _Courses,
    folder: Path,
) -> None:
    """Write time courses, their cleaned version, connectivity and quality."""
    names, timecourses = subject_files(subject), courses.scaled
    labels = [network.label for network in courses.networks]
    cleaned = clean_timecourses(
        courses.unscaled, scan.step, courses.confounds, settings["despike"], settings["low_pass_hz"]
    )
    correlated = connectivity(cleaned)
    scale = SCALED if settings["scaling"] == "z-score" else "Neither scaled nor detrended"
    described = {"Description": f"Time course of each network, one a column; one row a volume. {scale}."}
    write_table(timecourses, labels, folder / names["timecourses"], record | described)
    described = {"Description": "Time courses as connectivity is computed from them."}
    record = record | {"Confounds": scan.confound_names}
    write_table(cleaned, labels, folder / names["cleaned"], record | described)
    described = {"Description": "Fisher's z of the Pearson correlation of every two cleaned time courses; diagonal 0."}
    write_square(correlated, labels, folder / names["connectivity"], record | described)
    spectra = spectral_summary(timecourses, scan.step)
    quality = quality | {
        "Subject": subject,
        "Simulated": record["Simulated"],
        "Template": record.get("Template"),
        "Volumes": len(timecourses),
        "VolumesInFile": scan.volumes,
        "RepetitionTime": scan.step,
        "Motion": scan.motion,
        "Spectra": {
            "LowToHighPower": dict(zip(labels, spectra["low_to_high_power"], strict=True)),
            "DynamicRange": dict(zip(labels, spectra["dynamic_range"], strict=True)),
            "PeakHz": dict(zip(labels, spectra["peak_hz"], strict=True)),
        },
        "Warnings": record["Warnings"],
    }
    write_json(quality, folder / names["quality"])
    match = quality.get("TemplateMatch")
    shown = Shown(
        title=f"sub-{subject}: {len(labels)} networks, {len(timecourses)} volumes, {scan.step:g} s apart",
        note=note_on_data(scan.simulated, (record.get("Template") or {}).get("Kind")),
        networks=courses.networks,
        match=None if match is None else np.array(list(match.values())),
        connectivity=correlated,
        timecourses=timecourses,
        step=scan.step,
        displacement=scan.displacement,
        much=MUCH_MOTION_MM,
    )
    write_picture(shown, folder / names["picture"])


def _scan(settings: TimecourseSettings, files: SubjectFiles, volumes: int, step: float) -> _Scan:
    """Find confounds, motion and the volumes to keep."""
    table = None if files["confounds"] is None else read_confounds_table(files["confounds"])
    confounds, kept, names = choose_confounds(
        settings["confounds"], files["bold"], table, volumes, settings["drop_volumes"]
    )
    if len(kept) < settings["min_volumes"]:
        raise UserError(
            f"{files['bold']} has {len(kept)} usable volumes, and min_volumes is {settings['min_volumes']}."
        )
    found = None if table is None else displacement_of(_numbers(table))
    motion = displacement = None
    # Of volumes that were scrubbed, too: how much somebody moved is no better for it.
    if found is not None and np.isfinite(found[0][settings["drop_volumes"] :]).any():
        displacement = found[0][settings["drop_volumes"] :]
        mean = np.nanmean(displacement)
        motion = {
            "MeanFramewiseDisplacementMm": mean,
            "LargestFramewiseDisplacementMm": np.nanmax(displacement),
            f"VolumesAbove{MUCH_MOTION_MM}Mm": int((displacement > MUCH_MOTION_MM).sum()),
            "FramewiseDisplacement": found[1],
        }
        most = settings["max_mean_fd_mm"]
        if most is not None and mean > most:
            raise UserError(
                f"{files['bold']} has a mean framewise displacement of {mean:.3f} mm, and max_mean_fd_mm is {most}."
            )
    elif settings["max_mean_fd_mm"] is not None:
        raise UserError(
            f"max_mean_fd_mm is {settings['max_mean_fd_mm']}, but nothing says how much the subject of {files['bold']} "
            "moved: give its table of confounds."
        )
    described = (read_json(files["sidecar"]), read_json(files["description"]))
    warnings = _twice(settings)
    if len(kept) != kept[-1] - kept[0] + 1:
        warnings.append(
            "volumes were left out in between; filters and spectra treat the others as if they were adjacent"
        )
    return _Scan(
        step=step,
        simulated=any(bool(each.get("Simulated")) for each in described),
        confounds=confounds,
        kept=kept,
        volumes=volumes,
        confound_names=names,
        motion=motion,
        displacement=displacement,
        warnings=warnings,
    )


def _numbers(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """What a table of confounds says of motion, by column."""
    names = [name for name in (*DISPLACEMENT, *PARAMETERS) if name in table.columns]
    return {name: table[name].to_numpy(dtype=np.float64) for name in names}


def _record(settings: TimecourseSettings, files: SubjectFiles, scan: _Scan, warnings: list[str]) -> dict[str, Any]:
    """What every JSON file of the subject says."""
    return {
        "Sources": [Path(path).name for path in (files["bold"], files["confounds"]) if path],
        "Simulated": scan.simulated,
        "RepetitionTime": scan.step,
        "DoneBefore": dict(settings["already_done"]),
        "DoneHere": {name: value for name, value in settings.items() if name not in ("already_done", "on_bad_subject")},
        "Confounds": scan.confound_names,
        "VolumesUsed": len(scan.kept),
        "Warnings": warnings,
    }


def _ground(settings: SubjectSettings, files: SubjectFiles, template: Template) -> _Ground:
    """The template's maps on the grid in use, the mask, and the grid's affine."""
    shape, affine = analysis_grid(settings["grid"], template, files["bold"])
    maps = on_grid(template, shape, affine)
    if files["mask"] is None:
        return maps, fixed_mask(template, maps, affine), affine
    values, own = read_mask(files["mask"])
    mask = to_grid(values, own, maps.shape, affine, "nearest") & maps.any(axis=3)
    require_networks(template, coverage(template, mask, affine), LEAST_COVERAGE, f"the mask {files['mask']}")
    return maps, mask, affine


def _carried_out(
    write: Callable[[], int], settings: TimecourseSettings, subject: str, files: SubjectFiles, folder: Path
) -> str | None:
    """Do a subject's work and write how it ended; return why it cannot be used where such subjects are excluded."""
    bold = files["bold"]
    try:
        volumes = write()
    except UserError as error:
        reason = str(error) if bold in str(error) else f"{bold}: {error}"
        if settings["on_bad_subject"] == "fail":
            raise UserError(reason) from None
        write_excluded(folder, subject, reason)
        return reason
    read = (bold, files["confounds"], files["sidecar"])
    write_included(folder, subject, volumes, digest_of(file for file in read if file))
    return None


def _twice(settings: TimecourseSettings) -> list[str]:
    """Warn of what the layout's pipeline had done already."""
    done, warnings = settings["already_done"], []
    if done.get("smoothing_fwhm_mm") and settings["smoothing_fwhm_mm"]:
        warnings.append(
            f"smoothed twice: {done['smoothing_fwhm_mm']:g} mm before, {settings['smoothing_fwhm_mm']:g} mm here"
        )
    if done.get("confounds", "none") != "none" and settings["confounds"] != "none":
        warnings.append(f"confounds regressed twice: {done['confounds']} before, {settings['confounds']} here")
    if done.get("drop_volumes") and settings["drop_volumes"]:
        warnings.append(f"volumes dropped twice: {done['drop_volumes']} before, {settings['drop_volumes']} here")
    return warnings


def _check_common(settings: TimecourseSettings) -> None:
    if settings["drop_volumes"] < 0 or settings["smoothing_fwhm_mm"] < 0:
        raise UserError("drop_volumes and smoothing_fwhm_mm cannot be negative.")
    if settings["confounds"] not in ("none", "motion", *STRATEGIES):
        raise UserError(f"confounds is '{settings['confounds']}': it can be none, motion, {', '.join(STRATEGIES)}.")
    if settings["scaling"] not in ("z-score", "none"):
        raise UserError(f"scaling is '{settings['scaling']}': it can be z-score or none.")
    if settings["low_pass_hz"] is not None and not settings["low_pass_hz"] > 0:
        raise UserError(f"low_pass_hz is {settings['low_pass_hz']}: it must be above 0, or null for no filter.")


def _check_settings(settings: SubjectSettings) -> None:
    _check_common(settings)
    if settings["preprocessing"] not in (1, 2, 3, 4):
        raise UserError(f"there is no preprocessing of type {settings['preprocessing']}: it can be 1, 2, 3 or 4.")
    if settings["dtype"] not in ("float32", "float64"):
        raise UserError(f"dtype is '{settings['dtype']}': it can be float32 or float64.")
    if settings["confounds_on"] not in ("image", "timecourses"):
        raise UserError(f"confounds_on is '{settings['confounds_on']}': it can be image or timecourses.")


# ---------------------------------------------------------------------- over a cohort, as GIFT does


def build_gift_mask(images: list[str], output: str | Path) -> str:
    """Write GIFT's default mask of a cohort: voxels as bright as their image's mean in every subject.

    Parameters
    ----------
    images : list of str
        4-D images on one grid.
    output : path-like
        ``.nii.gz`` file; give it as ``mask`` of every subject.

    Returns
    -------
    str
        One line that says what was done.
    """
    mask, affine = gift_mask_of(images)
    write_image(mask, affine, output)
    return f"{output}: {int(mask.sum())} voxels are in the mask of all {len(images)} images"


def build_gift_modes(subjects: list[tuple[str, str]], output: str | Path) -> str:
    """Write the mode of each network's mean map over a cohort, for `build_gift_maps`.

    Parameters
    ----------
    subjects : list of (str, str)
        Each subject's image of maps and mask of covered voxels, all on one grid.  Voxels that all subjects cover are
        used.
    output : path-like
        JSON file.

    Returns
    -------
    str
        One line that says what was done.
    """
    if not subjects:
        raise UserError("GIFT's scaling needs at least one subject.")
    common, affine = read_mask(subjects[0][1])
    for _, path in subjects[1:]:
        mask, own = read_mask(path)
        if not same_grid(mask.shape, own, common.shape, affine):
            raise UserError(f"{path} and {subjects[0][1]} have different grids: GIFT's scaling needs one grid.")
        common &= mask
    if not common.any():
        raise UserError("no voxel is covered by every subject, so GIFT's scaling is not possible.")
    modes = cohort_modes(_maps(path, common) for path, _ in subjects)
    with written_whole(output) as temporary:
        write_json({"Modes": modes, "Subjects": len(subjects), "Voxels": int(common.sum())}, temporary)
    return f"{output}: modes of {len(modes)} mean maps over {len(subjects)} subjects"


def build_gift_maps(maps: str, mask: str, modes: str, output: str | Path) -> str:
    """Write a subject's maps in GIFT's scaling: less the cohort's modes, divided by their root mean square.

    Parameters
    ----------
    maps, mask : str
        The subject's image of maps and mask of covered voxels.
    modes : str
        From `build_gift_modes`.
    output : path-like
        ``.nii.gz`` file.

    Returns
    -------
    str
        One line that says what was done.
    """
    covered, affine = read_mask(mask)
    values = _maps(maps, covered)
    shifts = np.asarray(read_json(modes).get("Modes", []), dtype=np.float64)
    if len(shifts) != len(values):
        raise UserError(f"{modes} has {len(shifts)} modes for the {len(values)} maps of {maps}: make it again.")
    write_image(on_voxels(shift_and_scale_maps(values, shifts), covered), affine, output)
    return f"{output}: {len(values)} maps"


def _maps(path: str, mask: np.ndarray) -> np.ndarray:
    """Maps of a subject's image on a mask's voxels, shape (networks, voxels)."""
    values, _ = read_volumes(path)
    if values.ndim != 4 or values.shape[:3] != mask.shape:
        raise UserError(f"the maps {path} and the mask have different grids: take both from one subject's folder.")
    return values[mask].T
