"""Samples in which the truth is known: simulated volumes of the brain, and real digits with labels drawn at random.

With a confounder, the label's odds depend on it and so do the data, but given the confounder the label says nothing about
the data: whoever looks at the groups alone finds a difference that the label did not make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import optimize, special

from autospec.cohort.simulation import framewise_displacement, movement, regional_volumes
from autospec.cohort.typical_volumes import SEGMENT_NUMBERS
from autospec.statistics.calibration.design import MISSPECIFIED

# How strongly motion, or the site, changes every volume: standard deviations of the volume between people.
CONFOUNDED_VOLUME = 0.5
# Change of the label's log odds by a standard deviation of the confounder, or by the second stratum.
CONFOUNDED_LABEL = {"none": 0.0, "number": 1.0, "strata": 1.5, **dict.fromkeys(MISSPECIFIED, 1.0)}
# What label and data depend on in place of the standardised number itself.
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "square": np.square,
    "threshold": lambda z: (z > 1).astype(np.float64),
    "cube": lambda z: z**3 - 3 * z,
    "wave": lambda z: np.sin(3 * z),
}
VOLUMES = 60
"""Of each simulated image, whose mean framewise displacement is the motion."""
MEN = 0.75
POOLED = 4
"""Edge of the squares of pixels whose mean is taken."""


@dataclass(frozen=True)
class Drawn:
    """The samples of one repetition.

    Attributes
    ----------
    x : ndarray of float32, shape (samples, features)
        Data.
    in_first : ndarray of bool, shape (samples,)
        Who is in the first group.
    confounder : ndarray, shape (samples,)
        Standardised number, or 0 and 1 of two strata; zeros where there is none.
    """

    x: np.ndarray
    in_first: np.ndarray
    confounder: np.ndarray


class Source(Protocol):
    """Draws the samples of a repetition."""

    def __call__(self, generator: np.random.Generator, in_first: int, in_second: int, confounding: str) -> Drawn:
        """Groups of these sizes, with a confounder of the kind ``none``, ``number`` or ``strata``, or one of `SHAPES`."""
        ...


def draw_labels(generator: np.random.Generator, logits: np.ndarray, in_first: int) -> np.ndarray:
    """Draw who is in the first group from a logistic model, given how many are.

    Parameters
    ----------
    generator : numpy.random.Generator
    logits : ndarray, shape (samples,)
        Log odds of each sample, up to a common constant.
    in_first : int
        Size of the first group.

    Returns
    -------
    ndarray of bool, shape (samples,)
    """
    # Independent labels are drawn until the size is right; the constant makes that likely and changes nothing else.
    constant = optimize.brentq(lambda c: special.expit(logits + c).sum() - in_first, -50, 50)
    probability = special.expit(logits + constant)
    while True:
        labels = generator.random((32, len(logits))) < probability
        found = np.flatnonzero(labels.sum(1) == in_first)
        if len(found):
            return labels[found[0]]


def standardised_columns(x: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 in every column."""
    return (x - x.mean(0)) / x.std(0)


class Volumes:
    """Volumes of subcortical structures from the simulated cohort's generator, standardised over the sample.

    Without an effect the groups do not differ.  Where the confounder is a number it is the logarithm of mean framewise
    displacement, and every volume is measured smaller with motion; strata are two sites, of which the second measures larger.
    Where it is one of `SHAPES`, label and volumes depend on this function of motion, and the confounder is motion itself.

    Parameters
    ----------
    effect : float
        Cohen's d of the eight structures that differ.
    """

    def __init__(self, effect: float = 0.0) -> None:
        self.effect = effect

    def __call__(self, generator: np.random.Generator, in_first: int, in_second: int, confounding: str) -> Drawn:
        """Draw a repetition's participants."""
        count = in_first + in_second
        confounder = np.zeros(count)
        if confounding == "number" or confounding in SHAPES:
            motion = [framewise_displacement(movement(generator, VOLUMES)).mean() for _ in range(count)]
            confounder = standardised_columns(np.log(motion))
        elif confounding == "strata":
            confounder = generator.permutation(np.arange(count) % 2).astype(np.float64)
        acting = standardised_columns(SHAPES[confounding](confounder)) if confounding in SHAPES else confounder
        labels = draw_labels(generator, CONFOUNDED_LABEL[confounding] * acting, in_first)
        people = [
            regional_volumes(generator, self.effect, bool(patient), bool(generator.random() < MEN))[0]
            for patient in labels
        ]
        x = standardised_columns(np.array([[person[name] for name in SEGMENT_NUMBERS] for person in people]))
        shift = CONFOUNDED_VOLUME * (acting if confounding == "strata" else -acting)
        return Drawn(standardised_columns(x + shift[:, None]).astype(np.float32), labels, confounder)


class Digits:
    """Real images of one digit, with labels drawn at random.

    The confounder is the ink, the mean of an image's pixels; strata are its upper and lower half.

    Parameters
    ----------
    images : ndarray, shape (images, rows, columns)
        Images of one digit, pixels of 0 to 255.
    """

    def __init__(self, images: np.ndarray) -> None:
        count, rows, columns = images.shape
        blocks = images.reshape(count, rows // POOLED, POOLED, columns // POOLED, POOLED)
        self.x = (blocks.mean((2, 4)).reshape(count, -1) / 255).astype(np.float32)

    def __call__(self, generator: np.random.Generator, in_first: int, in_second: int, confounding: str) -> Drawn:
        """Draw a repetition's images."""
        count = in_first + in_second
        x = self.x[generator.choice(len(self.x), count, replace=False)]
        ink = x.mean(1)
        confounder = np.zeros(count)
        if confounding == "number":
            confounder = standardised_columns(ink.astype(np.float64))
        elif confounding == "strata":
            confounder = (ink > np.median(ink)).astype(np.float64)
        return Drawn(x, draw_labels(generator, CONFOUNDED_LABEL[confounding] * confounder, in_first), confounder)
