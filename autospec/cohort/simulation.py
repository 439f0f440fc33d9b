"""The mathematics of the simulated cohort: pure functions of settings, a participant's number and random numbers.

Everything of participant i follows from the seed and i alone, so a larger cohort begins with the smaller one.

Groups differ in two ways, and in no other.  Connectivity: subcortical and sensorimotor networks are uncorrelated in
controls and correlated by a known amount in patients.  Volumes: eight structures differ by a known multiple of the
standard deviation between people.  Sex changes the size of the head alone; motion and age depend on nothing.
"""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np

from autospec.cohort.typical_volumes import EFFECTS, REGIONS
from autospec.errors import UserError


class SimulationSettings(TypedDict):
    """What the simulation reads from the configuration."""

    subjects: int
    seed: int
    volumes: int
    """Volumes of each image."""
    voxel_mm: int
    connectivity_effect: float
    """Correlation of subcortical with sensorimotor networks that patients have and controls have not."""
    volume_effect: float
    """Difference of the volumes that differ, in standard deviations between people (Cohen's d)."""
    null: bool
    """Whether the groups do not differ at all, whatever the effects say."""


REPETITION_TIME = 2.0
# COBRE's 72 patients and 74 controls.
CELLS = {("Patient", "Male"): 58, ("Patient", "Female"): 14, ("Control", "Male"): 51, ("Control", "Female"): 23}
DISENROLLED_SHARE = 2 / 146
# Shares of the codes of DSM-IV are rough; a few patients and controls have others, as in COBRE.
PATIENT_CODES = {
    **{"295.3": 0.55, "295.9": 0.15, "295.6": 0.12, "295.1": 0.04, "295.70 depressed type": 0.05},
    **{"295.70 bipolar type": 0.04, "290.3": 0.02, "296.4": 0.03},
}
CONTROL_CODES = {"None": 72 / 74, "311": 1 / 74, "296.26": 1 / 74}
HANDEDNESS = {"Right": 0.9, "Left": 0.07, "Both": 0.03}

# Squared loading of a network on its domain, so the correlation of networks of one domain.
WITHIN_DOMAIN = 0.35
ALTERED_DOMAINS = ("SC", "SM")
SETTLING_VOLUMES = 20

BASELINE = 1000.0
SIGNAL = 0.02
"""Standard deviation of a network's signal at its peak, as a share of the baseline."""
NOISE = 0.008
NOISE_MEMORY = 0.4
"""Correlation of the noise between neighbouring volumes."""
BLOB_SIGMA_MM = 8.0
LEFT_AFTER_REALIGNMENT = 0.2
HEAD_RADIUS_MM = 50.0
LARGE_MOVEMENT_MM = 0.5
HIGH_PASS_SECONDS = 128.0

# Independent streams of random numbers of one participant.
PHENOTYPE, COURSES, MOTION, NOISE_STREAM, ANATOMY = range(5)


def require_possible(settings: SimulationSettings) -> None:
    """Raise UserError where the settings ask for what cannot be simulated."""
    if not 0 <= settings["connectivity_effect"] <= WITHIN_DOMAIN:
        raise UserError(
            f"connectivity_effect is {settings['connectivity_effect']:g}: it is a correlation of 0 to {WITHIN_DOMAIN:g}."
        )
    if settings["subjects"] < 4:
        raise UserError(f"subjects is {settings['subjects']}: the simulated cohort has at least 4.")
    if not 4 <= settings["voxel_mm"] <= 12:
        raise UserError(f"voxel_mm is {settings['voxel_mm']}: simulated images have voxels of 4 to 12 mm.")
    if settings["volumes"] < 20:
        raise UserError(f"volumes is {settings['volumes']}: simulated images have at least 20.")


def stream(settings: SimulationSettings, number: int, which: int) -> np.random.Generator:
    """Random numbers for one purpose of one participant."""
    return np.random.default_rng([settings["seed"], number, which])


def effects(settings: SimulationSettings) -> tuple[float, float]:
    """The effects on connectivity and volumes that are built in: none under the null."""
    return (0.0, 0.0) if settings["null"] else (settings["connectivity_effect"], settings["volume_effect"])


def cells(subjects: int) -> list[tuple[str, str]]:
    """Subject type and sex of each participant: at every number the proportions are as near COBRE's as they can be."""
    total = sum(CELLS.values())
    counts = dict.fromkeys(CELLS, 0)
    chosen = []
    for i in range(1, subjects + 1):
        cell = max(CELLS, key=lambda each: CELLS[each] * i / total - counts[each])
        counts[cell] += 1
        chosen.append(cell)
    return chosen


def phenotype(settings: SimulationSettings, number: int, cell: tuple[str, str]) -> dict[str, str]:
    """A row of COBRE's table of phenotypes.

    Parameters
    ----------
    settings : SimulationSettings
    number : int
        The participant's, from 1.
    cell : tuple of str
        Subject type and sex, from `cells`.
    """
    random = stream(settings, number, PHENOTYPE)
    codes = PATIENT_CODES if cell[0] == "Patient" else CONTROL_CODES
    return {
        "Current Age": str(round(float(np.clip(random.normal(37, 13), 18, 65)))),
        "Gender": cell[1],
        "Handedness": _drawn(random, HANDEDNESS),
        "Subject Type": cell[0],
        "Diagnosis": _drawn(random, codes),
    }


def _drawn(random: np.random.Generator, shares: dict[str, float]) -> str:
    weights = np.array(list(shares.values()))
    return str(random.choice(list(shares), p=weights / weights.sum()))


def loadings(domains: list[str], effect: float, patient: bool) -> np.ndarray:
    """How strongly each network follows its domain and what links two domains in patients.

    Parameters
    ----------
    domains : list of str
        Domain of each network.
    effect : float
        Correlation that the link causes.
    patient : bool
        Whether there is the link.

    Returns
    -------
    ndarray, shape (networks, factors)
        Rows have squares that sum to `WITHIN_DOMAIN` in both groups, so correlations within a domain are the same.
    """
    names = sorted(set(domains))
    matrix = np.zeros((len(domains), len(names) + 1))
    for i, domain in enumerate(domains):
        link = effect if patient and domain in ALTERED_DOMAINS else 0.0
        matrix[i, names.index(domain)] = math.sqrt(WITHIN_DOMAIN - link)
        matrix[i, -1] = math.sqrt(link)
    return matrix


def expected_correlation(domains: list[str], effect: float, patient: bool) -> np.ndarray:
    """Correlation of the networks' true time courses, (networks, networks)."""
    matrix = loadings(domains, effect, patient)
    correlation = matrix @ matrix.T
    np.fill_diagonal(correlation, 1.0)
    return correlation


def haemodynamic_response(repetition_time: float, duration: float = 32.0) -> np.ndarray:
    """Response of blood to a short activity: a gamma density less a sixth of a later one; at each volume."""
    seconds = np.arange(0.0, duration, repetition_time)

    def gamma(shape: int) -> np.ndarray:
        return seconds ** (shape - 1) * np.exp(-seconds) / math.factorial(shape - 1)

    return gamma(6) - gamma(16) / 6


def time_courses(
    random: np.random.Generator, domains: list[str], effect: float, patient: bool, volumes: int
) -> np.ndarray:
    """Time courses of networks: correlated activity, seen through the haemodynamic response.

    Returns
    -------
    ndarray, shape (volumes, networks)
        Mean 0, standard deviation 1.
    """
    matrix = loadings(domains, effect, patient)
    length = volumes + SETTLING_VOLUMES
    shared = random.standard_normal((length, matrix.shape[1])) @ matrix.T
    own = random.standard_normal((length, len(domains))) * math.sqrt(1 - WITHIN_DOMAIN)
    response = haemodynamic_response(REPETITION_TIME)
    seen = np.apply_along_axis(np.convolve, 0, shared + own, response)[SETTLING_VOLUMES : SETTLING_VOLUMES + volumes]
    return (seen - seen.mean(0)) / seen.std(0)


def movement(random: np.random.Generator, volumes: int) -> np.ndarray:
    """Position of the head: a slow drift, and a few sudden movements.

    Returns
    -------
    ndarray, shape (volumes, 6)
        Translations in mm, rotations in radians.
    """
    size = math.exp(random.normal(0.0, 0.35))
    steps = random.standard_normal((volumes, 6)) * np.array([0.02] * 3 + [0.0003] * 3) * size
    position = np.cumsum(steps, 0)
    for at in random.integers(1, volumes, size=random.poisson(2 * size)):
        position[at] += random.standard_normal(6) * np.array([0.25] * 3 + [0.004] * 3)
    return position - position[0]


def framewise_displacement(position: np.ndarray) -> np.ndarray:
    """Displacement of each volume from the one before, mm, on a sphere of 50 mm (Power et al. 2012); the first is 0."""
    change = np.abs(np.diff(position, axis=0, prepend=position[:1]))
    return change[:, :3].sum(1) + HEAD_RADIUS_MM * change[:, 3:].sum(1)


def blobs(points: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Maps of networks: Gaussian blobs around their peaks, (networks, points); both arguments are in mm, (n, 3)."""
    squared = ((points[None] - peaks[:, None]) ** 2).sum(-1)
    return np.exp(-squared / (2 * BLOB_SIGMA_MM**2))


def images(
    random: np.random.Generator,
    courses: np.ndarray,
    maps: np.ndarray,
    gradient: np.ndarray,
    points: np.ndarray,
    position: np.ndarray,
) -> np.ndarray:
    """What the scanner would have seen.

    Parameters
    ----------
    random : numpy.random.Generator
    courses : ndarray, shape (volumes, networks)
    maps : ndarray, shape (networks, voxels)
    gradient : ndarray, shape (voxels, 3)
        Change of the baseline's brightness in each direction, per mm.
    points : ndarray, shape (voxels, 3)
        Where the voxels are, mm.
    position : ndarray, shape (volumes, 6)
        The head's, from `movement`.

    Returns
    -------
    ndarray, shape (volumes, voxels)
        Arbitrary units, about `BASELINE`.
    """
    volumes, voxels = len(courses), len(points)
    signal = SIGNAL * courses @ maps
    # A small movement u(r) = t + w x r changes the brightness by -gradient . u.
    turning = np.cross(points, gradient)
    artefact = -LEFT_AFTER_REALIGNMENT * (position[:, :3] @ gradient.T + position[:, 3:] @ turning.T)
    # A sudden movement disturbs the magnetisation, so the whole volume is darker.
    darker = 0.01 * np.minimum(framewise_displacement(position), 2.0)
    drift = np.outer(np.linspace(-1, 1, volumes), random.standard_normal(voxels) * 0.003)
    noise = random.standard_normal((volumes, voxels)) * NOISE
    for t in range(1, volumes):
        noise[t] = NOISE_MEMORY * noise[t - 1] + math.sqrt(1 - NOISE_MEMORY**2) * noise[t]
    return BASELINE * (1 + signal + artefact - darker[:, None] + drift + noise)


def slow_waves(volumes: int) -> np.ndarray:
    """Cosines slower than the usual high-pass filter, (volumes, waves), as fMRIPrep's table of confounds has them."""
    count = int(2 * volumes * REPETITION_TIME / HIGH_PASS_SECONDS)
    times = (np.arange(volumes) + 0.5) / volumes
    return np.cos(np.pi * np.outer(times, np.arange(1, count + 1))) * math.sqrt(2 / volumes)


def regional_volumes(
    random: np.random.Generator, effect: float, patient: bool, male: bool
) -> tuple[dict[str, float], float]:
    """Volumes of regions and of the skull's inside.

    Parameters
    ----------
    random : numpy.random.Generator
    effect : float
        Cohen's d of the regions that differ.
    patient, male : bool

    Returns
    -------
    volumes : dict of str to float
        mm^3, by region.
    intracranial : float
        mm^3.
    """
    intracranial = float(random.normal(1.58e6 if male else 1.40e6, 1.1e5))
    size = intracranial / 1.5e6
    volumes = {}
    for name, (mean, spread) in REGIONS.items():
        difference = effect * EFFECTS.get(name, 0) if patient else 0.0
        share = 1 + spread * (random.standard_normal() + difference)
        volumes[name] = mean * size * max(share, 0.1)
    return volumes, intracranial
