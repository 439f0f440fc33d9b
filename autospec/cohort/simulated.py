"""The simulated cohort as files: an ordinary folder of BIDS derivatives that says what it is."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autospec.cohort import simulation as model
from autospec.cohort.files import read_json
from autospec.cohort.selection import Cohort, select
from autospec.cohort.simulation import SimulationSettings
from autospec.cohort.subjects import CohortSettings, Done, Scan, Subject
from autospec.cohort.typical_volumes import EFFECTS, EMPTY_SEGMENTS, REGIONS, SEGMENT_NUMBERS
from autospec.errors import UserError

if TYPE_CHECKING:
    import nibabel

NETWORKS = ("autospec.ica", "data/neuromark_1_0_networks.csv")
NAME = "Simulated cohort of autospec"
SPACE, TASK = "MNI152NLin6Asym", "rest"
PARAMETERS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
STATS_FOLDER = "sourcedata/freesurfer"
TRUTH = "truth"
DESCRIPTION = "dataset_description.json"
OWN_NAMES = re.compile(r"sub-sim\d+|sourcedata|participants\.(tsv|json)|truth|\.bidsignore|\.snakemake_timestamp")
COLUMNS = ("Current Age", "Gender", "Handedness", "Subject Type", "Diagnosis")


@dataclass(frozen=True)
class Networks:
    """Published networks: domains and peaks, (networks, 3), in mm."""

    labels: list[str]
    domains: list[str]
    peaks: np.ndarray


@dataclass(frozen=True)
class Brain:
    """Voxels of the brain on a coarse grid."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    mask: np.ndarray
    points: np.ndarray
    """(voxels, 3), mm."""
    maps: np.ndarray
    """(networks, voxels)."""
    gradient: np.ndarray
    """(voxels, 3), change of brightness per mm."""


def simulate_cohort(settings: SimulationSettings, folder: str) -> str:
    """Write a simulated cohort.

    Parameters
    ----------
    settings : SimulationSettings
        Size, seed and effects.
    folder : str
        Where; it appears whole or not at all, and replaces a simulated cohort that is there.

    Returns
    -------
    str
        One line that says what was written.

    Raises
    ------
    UserError
        If the settings are impossible, or the folder holds something else.
    """
    model.require_possible(settings)
    target = Path(folder)
    if os.path.lexists(target) and not _is_ours(target):
        raise UserError(f"{folder} exists and holds no simulated cohort: name another folder, or remove it.")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _describe(partial, settings)
        for number in range(1, settings["subjects"] + 1):
            write_subject(settings, number, partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    counts = Counter(" ".join(cell) for cell in model.cells(settings["subjects"]))
    groups = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
    difference = "without any difference of groups" if settings["null"] else "with known differences of groups"
    return f"simulated {settings['subjects']} participants ({groups}) {difference} in {folder}"


def simulated_candidates(simulation: SimulationSettings, settings: CohortSettings) -> Cohort:
    """Say who will be in a simulated cohort, before its files are written.

    Parameters
    ----------
    simulation : SimulationSettings
        Size, seed and effects.
    settings : CohortSettings
        Who is wanted; its ``folder`` is where the cohort will stand.

    Returns
    -------
    Cohort
        The same that `autospec.cohort.selection.candidates` returns afterwards.
    """
    root = settings["folder"]
    subjects = []
    for name, row in _table(simulation):
        there = row["Subject Type"] != "Disenrolled"
        stem = str(Path(root) / f"sub-{name}" / "func" / f"sub-{name}_task-{TASK}")
        scan = Scan(
            bold=f"{stem}_space-{SPACE}_desc-preproc_bold.nii.gz",
            confounds=f"{stem}_desc-confounds_timeseries.tsv",
            sidecar=f"{stem}_space-{SPACE}_desc-preproc_bold.json",
            task=TASK,
            space=SPACE,
        )
        done = Done(smoothing_mm=0.0, confounds="none")
        subjects.append(Subject(name, row, (scan,) if there else (), done, table=str(Path(root) / "participants.tsv")))
    structural = bool(settings["freesurfer"])
    places: dict[str, tuple[str, ...]] = {
        each.id: (str(Path(root) / STATS_FOLDER / f"sub-{each.id}"),) for each in subjects if each.scans and structural
    }
    return select("bids", "simulated", subjects, places, {}, settings)


def subject_name(number: int) -> str:
    """Id of a simulated participant."""
    return f"sim{number:04d}"


def _table(settings: SimulationSettings) -> list[tuple[str, dict[str, str]]]:
    """Ids and rows of the table of phenotypes; a few more have left the study, as in COBRE, and have no data."""
    rows = [
        (subject_name(number), model.phenotype(settings, number, cell))
        for number, cell in enumerate(model.cells(settings["subjects"]), start=1)
    ]
    left = max(1, round(settings["subjects"] * model.DISENROLLED_SHARE))
    return rows + [(f"simleft{i:02d}", dict.fromkeys(COLUMNS, "Disenrolled")) for i in range(1, left + 1)]


def write_subject(settings: SimulationSettings, number: int, root: str | Path) -> None:
    """Write one participant's images, confounds, volumes and truth.

    Parameters
    ----------
    settings : SimulationSettings
    number : int
        The participant's, from 1; what is written depends on it and the seed alone.
    root : path-like
        The cohort's folder.
    """
    import nibabel

    name = subject_name(number)
    subject_type, sex = model.cells(number)[-1]
    patient = subject_type == "Patient"
    connectivity, volume = model.effects(settings)
    networks, brain = read_networks(), coarse_brain(settings["voxel_mm"])
    random = model.stream(settings, number, model.COURSES)
    courses = model.time_courses(random, networks.domains, connectivity, patient, settings["volumes"])
    position = model.movement(model.stream(settings, number, model.MOTION), settings["volumes"])
    noise = model.stream(settings, number, model.NOISE_STREAM)
    seen = model.images(noise, courses, brain.maps, brain.gradient, brain.points, position)

    functional = Path(root) / f"sub-{name}" / "func"
    functional.mkdir(parents=True, exist_ok=True)
    stem = f"sub-{name}_task-{TASK}"
    image = f"{stem}_space-{SPACE}_desc-preproc_bold"
    nibabel.save(_image(seen, brain), functional / f"{image}.nii.gz")
    _write_json(
        functional / f"{image}.json",
        {"RepetitionTime": model.REPETITION_TIME, "TaskName": TASK, "SkullStripped": True, "Simulated": True},
    )
    _write_columns(functional / f"{stem}_desc-confounds_timeseries.tsv", confounds(seen, brain, position))
    stats = Path(root) / STATS_FOLDER / f"sub-{name}" / "stats"
    stats.mkdir(parents=True, exist_ok=True)
    anatomy = model.stream(settings, number, model.ANATOMY)
    volumes, intracranial = model.regional_volumes(anatomy, volume, patient, sex == "Male")
    (stats / "aseg.stats").write_text(aseg_stats(volumes, intracranial, name))
    for side in ("lh", "rh"):
        (stats / f"{side}.aparc.stats").write_text(aparc_stats(volumes, intracranial, side, name))
    truth = Path(root) / TRUTH
    truth.mkdir(exist_ok=True)
    columns = {label: courses[:, k] for k, label in enumerate(networks.labels)}
    _write_columns(truth / f"sub-{name}_timecourses.tsv", columns)


@lru_cache(maxsize=1)
def read_networks() -> Networks:
    """The 53 networks of NeuroMark 1.0."""
    text = resources.files(NETWORKS[0]).joinpath(NETWORKS[1]).read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    peaks = np.array([[float(row[axis]) for axis in "xyz"] for row in rows])
    return Networks([row["label"] for row in rows], [row["domain"] for row in rows], peaks)


@lru_cache(maxsize=2)
def coarse_brain(voxel_mm: int) -> Brain:
    """The MNI brain that nilearn ships, on a grid of large voxels."""
    from nilearn.datasets import load_mni152_brain_mask
    from scipy.ndimage import gaussian_filter

    image = load_mni152_brain_mask(resolution=voxel_mm)
    mask, affine = np.asarray(image.dataobj) > 0, np.asarray(image.affine)
    points = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    # Brightness falls off over some millimetres at the brain's edge.
    smooth = gaussian_filter(mask.astype(float), 6.0 / voxel_mm)
    gradient = np.stack([np.gradient(smooth, voxel_mm, axis=axis) for axis in range(3)], axis=-1)[mask]
    x, y, z = mask.shape
    return Brain((x, y, z), affine, mask, points, model.blobs(points, read_networks().peaks), gradient)


def _image(seen: np.ndarray, brain: Brain) -> nibabel.Nifti1Image:
    """Whole units, as scanners store them."""
    import nibabel

    data = np.zeros((*brain.shape, len(seen)), dtype=np.int16)
    data[brain.mask] = np.rint(seen.T).astype(np.int16)
    image = nibabel.Nifti1Image(data, brain.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms((*image.header.get_zooms()[:3], model.REPETITION_TIME))
    image.header["descrip"] = b"Simulated by autospec"
    image.set_sform(brain.affine, code=4)
    image.set_qform(brain.affine, code=4)
    return image


def confounds(seen: np.ndarray, brain: Brain, position: np.ndarray) -> dict[str, np.ndarray]:
    """Table of confounds under fMRIPrep's names, NaN where it writes ``n/a``.

    Parameters
    ----------
    seen : ndarray, shape (volumes, voxels)
        The images.
    brain : Brain
    position : ndarray, shape (volumes, 6)
        The head's.
    """
    quiet = brain.maps.sum(0)
    columns = {
        "global_signal": seen.mean(1),
        "white_matter": seen[:, quiet <= np.median(quiet)].mean(1),
        "csf": seen[:, quiet <= np.quantile(quiet, 0.1)].mean(1),
    }
    change = np.diff(seen, axis=0)
    variation = np.sqrt((change**2).mean(1))
    columns["std_dvars"] = np.concatenate([[np.nan], variation / variation.mean()])
    displacement = model.framewise_displacement(position)
    columns["framewise_displacement"] = np.concatenate([[np.nan], displacement[1:]])
    columns |= {name: position[:, i] for i, name in enumerate(PARAMETERS)}
    for name in ("csf", "white_matter", "global_signal", *PARAMETERS):
        derivative = np.concatenate([[np.nan], np.diff(columns[name])])
        columns[f"{name}_derivative1"] = derivative
        columns[f"{name}_power2"] = columns[name] ** 2
        columns[f"{name}_derivative1_power2"] = derivative**2
    columns |= {f"cosine{i:02d}": wave for i, wave in enumerate(model.slow_waves(len(seen)).T)}
    moved = np.flatnonzero(displacement > model.LARGE_MOVEMENT_MM)
    columns |= {f"motion_outlier{i:02d}": (np.arange(len(seen)) == at).astype(float) for i, at in enumerate(moved)}
    return columns


def _describe(root: Path, settings: SimulationSettings) -> None:
    """Write what belongs to the cohort as a whole, and the truth."""
    description = {
        "Name": NAME,
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "autospec", "Description": "Simulated: no person was scanned"}],
        "Simulated": True,
    }
    _write_json(root / DESCRIPTION, description)
    rows = _table(settings)
    lines = ["\t".join(["participant_id", *COLUMNS])]
    lines += ["\t".join([f"sub-{name}", *(row[column] for column in COLUMNS)]) for name, row in rows]
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    described = {column: {"Description": f"{column}, as COBRE's table has it; simulated"} for column in COLUMNS}
    _write_json(root / "participants.json", described)
    (root / ".bidsignore").write_text(f"{TRUTH}/\n")
    (root / TRUTH).mkdir()
    _write_json(root / TRUTH / "truth.json", truth(settings))


def truth(settings: SimulationSettings) -> dict[str, Any]:
    """What is built into a simulated cohort, as it is written beside it."""
    connectivity, volume = model.effects(settings)
    networks = read_networks()
    first, second = model.ALTERED_DOMAINS
    altered = [
        [networks.labels[i], networks.labels[j]]
        for i, a in enumerate(networks.domains)
        for j, b in enumerate(networks.domains)
        if (a, b) == (first, second)
    ]
    return {
        "settings": dict(settings),
        "counts": dict(sorted(Counter(" ".join(cell) for cell in model.cells(settings["subjects"])).items())),
        "connectivity": {
            "correlation_within_domains": model.WITHIN_DOMAIN,
            "correlation_between_domains": 0.0,
            "altered_domains": list(model.ALTERED_DOMAINS),
            "altered_pairs": altered,
            "correlation_of_altered_pairs": {"HC": 0.0, "SZ": connectivity},
        },
        "volumes": {
            "cohens_d": {name: sign * volume for name, sign in EFFECTS.items()},
            "all_other_regions": 0.0,
        },
    }


def aseg_stats(volumes: dict[str, float], intracranial: float, name: str) -> str:
    """Text of an ``aseg.stats`` file, as FreeSurfer 7 lays it out."""
    inside = sum(volumes.values())
    cortex = sum(value for region, value in volumes.items() if region.startswith(("lh_", "rh_")))
    measures = [
        ("BrainSeg", "BrainSegVol", "Brain Segmentation Volume", inside * 1.65),
        ("BrainSegNotVent", "BrainSegVolNotVent", "Brain Segmentation Volume Without Ventricles", inside * 1.62),
        ("Cortex", "CortexVol", "Total cortical gray matter volume", cortex),
        ("TotalGray", "TotalGrayVol", "Total gray matter volume", cortex * 1.35),
        ("EstimatedTotalIntraCranialVol", "eTIV", "Estimated Total Intracranial Volume", intracranial),
    ]
    lines = [
        "# Title Segmentation Statistics ",
        "# ",
        "# generating_program autospec (Simulated: no person was scanned)",
        f"# subjectname sub-{name}",
        *(f"# Measure {a}, {b}, {c}, {value:.6f}, mm^3" for a, b, c, value in measures),
        "# NRows " + str(len(SEGMENT_NUMBERS) + len(EMPTY_SEGMENTS)),
        "# NTableCols 10 ",
        "# ColHeaders  Index SegId NVoxels Volume_mm3 StructName normMean normStdDev normMin normMax normRange  ",
    ]
    numbers = sorted({**SEGMENT_NUMBERS, **EMPTY_SEGMENTS}.items(), key=lambda pair: pair[1])
    for index, (region, number) in enumerate(numbers, start=1):
        value = volumes.get(region, 0.0)
        lines.append(
            f"{index:3d} {number:3d}  {round(value):8d} {value:10.1f}  {region:<30s} "
            "   80.0000    10.0000    20.0000   120.0000   100.0000 "
        )
    return "\n".join(lines) + "\n"


def aparc_stats(volumes: dict[str, float], intracranial: float, side: str, name: str) -> str:
    """Text of an ``lh.aparc.stats`` or ``rh.aparc.stats`` file, as FreeSurfer 7 lays it out."""
    regions = [region for region in REGIONS if region.startswith(f"{side}_")]
    lines = [
        "# Table of FreeSurfer cortical parcellation anatomical statistics ",
        "# ",
        "# generating_program autospec (Simulated: no person was scanned)",
        f"# subjectname sub-{name}",
        f"# hemi {side}",
        f"# Measure EstimatedTotalIntraCranialVol, eTIV, Estimated Total Intracranial Volume, {intracranial:.6f}, mm^3",
        "# NTableCols 10 ",
        "# ColHeaders StructName NumVert SurfArea GrayVol ThickAvg ThickStd MeanCurv GausCurv FoldInd CurvInd",
    ]
    for region in regions:
        value = round(volumes[region])
        area = round(value / 2.6)
        lines.append(
            f"{region[3:]:<40s} {round(area * 1.5):5d}  {area:5d}  {value:5d}  2.500 0.500     0.120     0.020"
            f"  {area // 100:7d}     {area / 1000:.1f}"
        )
    return "\n".join(lines) + "\n"


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a simulated cohort, or what is left of one, or nothing."""
    description = folder / DESCRIPTION
    if description.is_file():
        return read_json(description).get("Name") == NAME
    return folder.is_dir() and all(OWN_NAMES.fullmatch(name) for name in os.listdir(folder))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_columns(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write a table of numbers, tab-separated, ``n/a`` for NaN."""
    rows: Sequence[Sequence[float]] = np.stack(list(columns.values()), axis=1).tolist()
    lines = ["\t".join(columns)]
    lines += ["\t".join("n/a" if value != value else f"{value:.7g}" for value in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
