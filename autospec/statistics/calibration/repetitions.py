"""The tests of groups on many repetitions of a study: the paper's, permutation and refit, on the same samples and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from autospec.introspection.sample_shares import FactoredShares
from autospec.introspection.spectra import noise_floor
from autospec.statistics import measures, null
from autospec.statistics.calibration.networks import ENCODER, LAYERS, Factors, initial_parameters, spectra, train
from autospec.statistics.calibration.tables import (
    ALL,
    ANY_OVER_STEPS,
    ANY_OVER_VALUES,
    CLUSTERS,
    FIRST_VALUE,
    HOLM_OVER_STEPS,
    OVER_STEPS,
    OVER_VALUES,
)
from autospec.statistics.permutation_test import NullDistributions, Values
from autospec.statistics.permutations import Comparison, Labellings, group_sizes

Found = Mapping[int, Mapping[tuple[str, str], Values]]
"""Values under every labelling, by step, then by layer and statistic."""

# Of refits all statistics are tested to both sides: see `autospec.statistics.refit`.
BOTH_SIDES = dict.fromkeys(measures.STATISTICS, "two-sided")


class Family(NamedTuple):
    """What one p-value refers to."""

    statistic: str
    """A measure of difference, ``all`` of them, or ``gradient``: the groups' spectra, which the paper's tests take."""
    step: str
    """A step, or ``all``."""
    values: str
    """Which values of the statistic."""


# ---------------------------------------------------------------------- training


class Recorded(NamedTuple):
    """What was recorded of many trainings."""

    spectra: dict[str, np.ndarray]
    """Of both groups' shares, by layer, shape (2, repetitions, steps, singular values)."""
    floors: dict[str, np.ndarray]
    """Their noise floors, shape (2, repetitions, steps)."""
    factors: dict[int, dict[str, Factors]]
    """Of the scheduled steps."""


def record(
    x: Tensor,
    in_first: Tensor,
    seeds: Sequence[int],
    task: str,
    hidden: int,
    steps: Sequence[int],
    learning_rate: float,
) -> Recorded:
    """Train one network a repetition, and record both groups' spectra at every step.

    Parameters
    ----------
    x : Tensor
        Samples, shape (repetitions, features, samples).
    in_first : Tensor of bool
        Who is in the first group, shape (repetitions, 1, samples); a classifier's target.
    seeds : sequence of int
        Of each repetition's initial weights.
    task : {"autoencoder", "classifier"}
        What is learned.
    hidden : int
        Width of the hidden layer.
    steps : sequence of int
        The scheduled steps; training ends before the last.
    learning_rate : float
        Adam's.
    """
    kept: dict[int, dict[str, Factors]] = {}
    found: dict[str, list[Tensor]] = {layer: [] for layer in LAYERS}
    groups = (in_first.float(), (~in_first).float())
    for step, factors in enumerate(_training(x, in_first, seeds, task, hidden, max(steps), learning_rate)):
        for layer in LAYERS:
            wide = factors[layer].double()
            found[layer].append(spectra(torch.stack([wide.share(group)[:, 0] for group in groups])))
        if step in steps:
            kept[step] = factors
    values = {layer: torch.stack(parts, 2).numpy() for layer, parts in found.items()}
    rows = np.stack([group.sum((1, 2)).numpy() for group in groups])[:, :, None]
    shapes = {layer: shape_of(factors) for layer, factors in kept[max(steps)].items()}
    floors = {
        layer: noise_floor(each[..., 0], shapes[layer], rows, torch.float32, "gradient")
        for layer, each in values.items()
    }
    return Recorded(values, floors, kept)


def _training(x, in_first, seeds, task, hidden, updates, learning_rate):  # type: ignore[no-untyped-def]
    classifier = task == "classifier"
    features = x.shape[1]
    parameters = initial_parameters(seeds, in_first.shape[1], features, hidden, 2 if classifier else features)
    return train(parameters, x, (~in_first).long() if classifier else None, updates, learning_rate)


def shape_of(factors: Factors) -> tuple[int, int]:
    """Shape of the parameter's matrix."""
    return factors.adjoint.shape[2], factors.activation.shape[2]


# ---------------------------------------------------------------------- the paper's tests


def paper_p(recorded: Recorded) -> dict[Family, np.ndarray]:
    """Smallest p of the paper's t-tests (Student's, two-tailed) over each family, shape (repetitions,).

    What `autospec.statistics.paper` does with one run, for all repetitions at once.  What is not resolved is not significant:
    NaN for a single test, 1 where a family has none.
    """
    by_value, by_step = [], []
    for layer in LAYERS:
        (a, b), (floor_a, floor_b) = recorded.spectra[layer], recorded.floors[layer]
        above = (a > floor_a[..., None]) & (b > floor_b[..., None])
        varies = (np.ptp(a, 1) > floor_a.max(1)[:, None]) | (np.ptp(b, 1) > floor_b.max(1)[:, None])
        with np.errstate(divide="ignore", invalid="ignore"):
            of_values = np.where(above.all(1) & varies, stats.ttest_ind(a, b, axis=1).pvalue, np.nan)
            of_steps = np.where(
                (above.sum(2) >= 2) & varies.any(1)[:, None], stats.ttest_ind(a, b, axis=2).pvalue, np.nan
            )
        by_value.append(of_values)
        by_step.append(of_steps)
    values, steps = np.concatenate(by_value, 1), np.concatenate(by_step, 1)
    smallest = np.nan_to_num(values, nan=1.0).min(1)
    last = str(by_step[0].shape[1] - 1)
    return {
        Family("gradient", ALL, OVER_STEPS): by_value[0][:, 0],
        Family("gradient", ALL, ANY_OVER_STEPS): smallest,
        # Holm's smallest p is Bonferroni's.
        Family("gradient", ALL, HOLM_OVER_STEPS): np.minimum(smallest * np.isfinite(values).sum(1), 1),
        Family("gradient", last, OVER_VALUES): by_step[0][:, -1],
        Family("gradient", ALL, ANY_OVER_VALUES): np.nan_to_num(steps, nan=1.0).min(1),
    }


# ---------------------------------------------------------------------- permutation


def permuted(
    factors: Mapping[int, Mapping[str, Factors]], repetition: int, comparison: Comparison, labellings: Labellings
) -> Found:
    """Statistics of one repetition's training at the scheduled steps under every labelling."""
    distributions = NullDistributions(comparison, labellings)
    for step, layers in factors.items():
        shares = {}
        for layer, each in layers.items():
            activation, adjoint = each.activation[repetition, 0].T.double(), each.adjoint[repetition, 0].T.double()
            samples = len(activation)
            shares[layer] = FactoredShares(activation, adjoint, np.arange(samples), samples, torch.float32)
        distributions.add(step, shares)
    return distributions.steps


# ---------------------------------------------------------------------- refit


def refitted(
    x: Tensor,
    labellings: Sequence[Labellings],
    seeds: Sequence[int],
    hidden: int,
    steps: Sequence[int],
    learning_rate: float,
) -> list[Found]:
    """Train a classifier again under every labelling, and take the statistics at the scheduled steps.

    Parameters
    ----------
    x : Tensor
        Samples, shape (repetitions, features, samples).
    labellings : sequence of Labellings
        Of each repetition; as many in each.
    seeds, hidden, steps, learning_rate
        As for `record`; the networks of a repetition begin with the same weights.
    """
    in_first = torch.from_numpy(np.stack([each.in_first for each in labellings]))
    samples = in_first.shape[2]
    found: list[dict[int, dict[tuple[str, str], Values]]] = [{} for _ in labellings]
    for step, layers in enumerate(_training(x, in_first, seeds, "classifier", hidden, max(steps), learning_rate)):
        if step not in steps:
            continue
        for each in found:
            each[step] = {}
        for layer, factors in layers.items():
            compared = compare_shares(factors, in_first)
            for i, labelling in enumerate(labellings):
                sizes = group_sizes(labelling, np.ones(samples, dtype=np.int64))
                spectra_of = measures.LabelledSpectra(*(part[i].numpy() for part in compared))
                for name in measures.STATISTICS:
                    found[i][step][layer, name] = _values(spectra_of, name, sizes, shape_of(factors))
    return list(found)


def compare_shares(factors: Factors, in_first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spectra of both groups' shares and of their contrast, and the cosine between the shares, of many networks.

    Parameters
    ----------
    factors : Factors
        Of networks, shape (repetitions, networks, ...).
    in_first : Tensor of bool
        Who is in the first group of each network, shape (repetitions, networks, samples).

    Returns
    -------
    tuple of Tensor
        Three of shape (repetitions, networks, singular values), and one of (repetitions, networks); float64.
    """
    wide = factors.double()
    groups = (in_first.double(), (~in_first).double())
    first, second = (wide.share(group) for group in groups)
    sizes = [group.sum(2)[..., None, None] for group in groups]
    values = spectra(torch.stack([first, second, first / sizes[0] - second / sizes[1]]))
    norms = (first.square().sum((2, 3)) * second.square().sum((2, 3))).sqrt()
    return values[0], values[1], values[2], (first * second).sum((2, 3)) / norms


def _values(
    of: measures.LabelledSpectra, statistic: str, sizes: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]
) -> Values:
    possible = measures.values_possible(statistic, shape, sizes)
    values = measures.measure(of, statistic, *sizes)[:, :possible].astype(np.float32)
    above = measures.resolved(of, statistic, *sizes, shape, sizes, torch.float32)[:, :possible]
    finite = np.isfinite(values).all(0)
    return Values(values, (above.mean(0) >= 0.5) & finite, above[0] & finite)


# ---------------------------------------------------------------------- p-values


def family_p(found: Found, alternatives: Mapping[str, str] = measures.ALTERNATIVES) -> dict[Family, float]:
    """P-value of each family: of a single value, and the smallest corrected one of all values of a step, and of the run.

    Parameters
    ----------
    found : Found
        Values under every labelling.
    alternatives : mapping of str to str
        For each statistic, which values speak for a difference; refits are tested to `BOTH_SIDES`.

    Returns
    -------
    dict of Family to float
        1 where nothing of a family is tested.
    """
    p: dict[Family, float] = {}
    members: dict[Family, list[tuple[np.ndarray, np.ndarray]]] = {}
    for step, values in found.items():
        for (layer, statistic), each in values.items():
            z, tie = null.standardised(np.nan_to_num(each.values), alternatives[statistic])
            if layer == ENCODER:
                tested = each.tested[0] and each.above[0]
                p[Family(statistic, str(step), FIRST_VALUE)] = float(null.p_values(z, tie)[0]) if tested else 1.0
            observed = np.where(each.above, z[0], -math.inf)[each.tested]
            part = (z[:, each.tested], np.stack([observed, tie[each.tested]]))
            for family in (
                Family(statistic, str(step), ALL),
                Family(statistic, ALL, ALL),
                Family(ALL, ALL, ALL),
            ):
                members.setdefault(family, []).append(part)
    for family, parts in members.items():
        largest = null.maxima(np.concatenate([z for z, _ in parts], 1))
        observed, tie = np.concatenate([each for _, each in parts], 1)
        p[family] = float(null.familywise_p(observed, largest, tie).min(initial=1.0))
    p[Family(ALL, ALL, CLUSTERS)] = _cluster_p(found, alternatives)
    return p


def _cluster_p(found: Found, alternatives: Mapping[str, str]) -> float:
    """Smallest family-wise p of a cluster of steps."""
    steps = sorted(found)
    largest = np.zeros(0)
    for key in found[steps[0]]:
        each = [found[step][key] for step in steps]
        z = np.stack([null.standardised(np.nan_to_num(of.values), alternatives[key[1]])[0] for of in each], 1)
        tested = np.stack([of.tested for of in each])
        threshold = np.where(tested, null.cluster_threshold(z), math.inf)
        mass = null.largest_cluster(z, threshold)
        largest = mass if not len(largest) else np.maximum(largest, mass)
    if largest[0] == 0:
        return 1.0
    return float(null.familywise_p(largest[:1], largest, null.TIE * largest[:1])[0])
