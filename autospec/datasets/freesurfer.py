"""FreeSurfer's volumes as a labelled data set: [sample, region].

Line and scale are fitted to everybody here.  A training fits both again to the samples that it trains on; what comes out
is the same as if it had begun with volumes in mm^3 (`autospec.training.prepare`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from autospec.cohort.files import listed
from autospec.cohort.phenotypes import matched
from autospec.datasets.intracranial import Adjustment, adjust
from autospec.datasets.labelled import write_samples
from autospec.datasets.participants import read_half
from autospec.errors import UserError
from autospec.freesurfer import Volumes, read_volumes


class VolumesSettings(TypedDict):
    """What the stage reads from the configuration."""

    name: str
    sources: list[str]
    """SUBJECTS_DIR, or tables of volumes."""
    icv: Adjustment
    """How to account for the size of the head."""
    training: list[str] | None
    """Ids to which the scaling is fitted, where others are held out; None fits it to all."""


@dataclass(frozen=True)
class Features:
    """Volumes as a network sees them."""

    x: np.ndarray
    """(subjects, regions), z-scores."""
    regions: list[str]
    notes: list[str]
    """Which regions were dropped, and why."""


def build_volumes(settings: VolumesSettings, participants: str, sources: list[str], output: str) -> str:
    """Build a data set of volumes and write it.

    Parameters
    ----------
    settings : VolumesSettings
    participants : str
        The cohort's ``participants.tsv``.
    sources : list of str
        SUBJECTS_DIR, or tables of volumes.
    output : str
        The ``.zarr.zip`` file to write.

    Returns
    -------
    str
        One line that says what was built.

    Raises
    ------
    UserError
        If somebody's volumes are missing, the size of a head is needed and not known, or no region is left.
    """
    half = read_half(participants, "structural")
    found = read_volumes(sources)
    volumes, intracranial = in_order(found, half.ids)
    training = _training_rows(half.ids, settings["training"])
    features = make_features(volumes, found.regions, intracranial, half.ids, settings["icv"], training)
    write_samples(
        iter(features.x.astype(np.float32)),
        shape=(len(features.regions),),
        dims=("region",),
        ids=half.ids,
        target=half.target,
        groupings=half.groupings,
        attributes={
            "kind": "freesurfer",
            "source": participants,
            "cohort_digest": half.cohort_digest,
            "icv": settings["icv"],
            "fitted_to": int(training.sum()),
            "notes": [*found.notes, *features.notes],
            "simulated": half.simulated,
            "stand_in_template": False,
        },
        coordinates={"region": ("region", features.regions)},
        path=output,
        subjects=half.subjects,
        covariates=half.covariates | {"intracranial_volume": list(intracranial)},
    )
    dropped = len(found.regions) - len(features.regions)
    why = "; ".join(note.removeprefix("dropped, ") for note in features.notes)
    return f"{settings['name']}: {len(half.ids)} participants, {len(features.regions)} regions ({dropped} dropped{why and ': ' + why})"


def in_order(found: Volumes, ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Volumes and sizes of heads in the order of some ids, which may have zeros that FreeSurfer's lost.

    Raises
    ------
    UserError
        If somebody has no volumes.
    """
    rows = matched(ids, {name: i for i, name in enumerate(found.ids)}, "the FreeSurfer data")
    missing = [name for name in ids if name not in rows]
    if missing:
        why = found.problems.get(missing[0], "it is in no source")
        raise UserError(f"there are no FreeSurfer volumes of {listed(missing)} ({why}): build the cohort again.")
    order = [rows[name] for name in ids]
    return found.volumes[order], found.intracranial[order]


def make_features(
    volumes: np.ndarray,
    regions: list[str],
    intracranial: np.ndarray,
    ids: list[str],
    icv: Adjustment,
    training: np.ndarray,
) -> Features:
    """Adjust volumes for the size of the head, drop useless regions, and scale.

    Parameters
    ----------
    volumes : ndarray, shape (subjects, regions)
        mm^3; NaN where missing.
    regions : list of str
    intracranial : ndarray, shape (subjects,)
        mm^3.
    ids : list of str
        For error messages.
    icv : {"none", "proportional", "residual"}
    training : ndarray of bool, shape (subjects,)
        Subjects to whom everything is fitted.

    Returns
    -------
    Features

    Raises
    ------
    UserError
        If the size of a head is needed and not known, or no region is left.
    """
    unknown = [name for name, size in zip(ids, intracranial, strict=True) if not size > 0]
    if icv != "none" and unknown:
        raise UserError(
            f"icv is {icv}, but the intracranial volume of {listed(unknown)} is not known: "
            "give tables that have it (eTIV), or set icv to none."
        )
    notes = []
    whole = np.isfinite(volumes).all(0)
    if not whole.all():
        lacking = [name for name, row in zip(ids, volumes, strict=True) if not np.isfinite(row).all()]
        notes.append(f"dropped, missing in {listed(lacking)}: {', '.join(np.array(regions)[~whole])}")
    # Whether a region is constant is seen before it is divided by the size of the head, which varies.
    varies = whole & (np.ptp(np.where(whole, volumes, 0.0)[training], axis=0) > 0)
    if not varies[whole].all():
        notes.append(f"dropped, constant: {', '.join(np.array(regions)[whole & ~varies])}")
    if not varies.any():
        raise UserError("no FreeSurfer region is left: each one is missing in somebody, or constant.")
    adjusted = adjust(volumes[:, varies], intracranial, icv, training)
    return Features(
        standardise(adjusted, training), [r for r, keep in zip(regions, varies, strict=True) if keep], notes
    )


def standardise(values: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Subtract each column's mean and divide by its standard deviation, both of the training rows."""
    fitted = values[training]
    return (values - fitted.mean(0)) / fitted.std(0)


def _training_rows(ids: list[str], training: list[str] | None) -> np.ndarray:
    if training is None:
        return np.ones(len(ids), dtype=bool)
    if strangers := sorted(set(training) - set(ids)):
        raise UserError(f"the training participants {listed(strangers)} are not in this data set.")
    rows = np.isin(ids, training)
    if rows.sum() < 2:
        raise UserError(f"{rows.sum()} participants are for training: scaling needs at least two.")
    return rows
