"""Which labellings of the subjects a permutation test compares with the observed one.

The unit is the subject, with all its sessions and windows.  A comparison permutes within its two groups, among subjects
with as many samples, on request within strata such as sites; a continuous confounder is met by labellings drawn
conditionally on it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from autospec.errors import UserError
from autospec.statistics.table import NO_P

SMALLEST_GROUP = 2
# With fewer subjects in a group than this, the result says that it rests on few.
FEW_SUBJECTS = 10
# Rounds of swaps between two labellings of the conditional sampler.
ROUNDS = 50
# Weight of the squared coefficients of standardised confounders in the propensity model.
PENALTY = 1.0
# An imbalance remains if it is larger than this many standard deviations and the drawn labellings do not share it.
IMBALANCE = 0.25
MIDDLE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two groups of subjects.

    Attributes
    ----------
    first, second : str
        Labels of the two groups.
    unit : ndarray of int, shape (samples,)
        Number of each sample's subject among those compared; -1 where the sample is in neither group.
    subjects : ndarray of str, shape (units,)
        The subjects, sorted, so that the order of the samples decides nothing.
    in_first : ndarray of bool, shape (units,)
        Which subjects are in the first group.
    stratum : ndarray of int, shape (units,)
        Number of each subject's stratum; subjects of one stratum have as many samples.
    sizes : ndarray of int, shape (units,)
        Samples of each subject.
    """

    first: str
    second: str
    unit: np.ndarray
    subjects: np.ndarray
    in_first: np.ndarray
    stratum: np.ndarray
    sizes: np.ndarray

    @property
    def name(self) -> str:
        """Both groups, as in the tree's contrasts."""
        return f"{self.first} - {self.second}"

    @property
    def warnings(self) -> list[str]:
        """What a reader should know of the groups' sizes."""
        counts = {self.first: int(self.in_first.sum()), self.second: int((~self.in_first).sum())}
        found = [
            f"the group '{label}' has only {count} subjects: a test of so few finds large differences alone"
            for label, count in counts.items()
            if count < FEW_SUBJECTS
        ]
        return found + unequal_sizes(self.sizes, self.stratum, self.in_first)

    def distinct(self) -> int:
        """Count the labellings, the observed one too, that keep each group's number of subjects in each stratum."""
        sizes = np.bincount(self.stratum)
        chosen = np.bincount(self.stratum, self.in_first).astype(int)
        return math.prod(math.comb(int(n), int(k)) for n, k in zip(sizes, chosen, strict=True))


def compare(
    labels: Any,
    first: Any,
    second: Any,
    *,
    subjects: Any = None,
    strata: Mapping[str, Any] | None = None,
    minimum: int = SMALLEST_GROUP,
) -> Comparison:
    """Take two groups out of a study's labels.

    Subjects with unequal numbers of samples are of different strata: the more samples there are, the less does their mean
    vary, so that such subjects are not exchangeable (Winkler et al. 2014, "Permutation inference for the general linear
    model", NeuroImage 92).

    Parameters
    ----------
    labels : array-like, shape (samples,)
        Label of each sample; None and NaN belong to no group.
    first, second
        The labels of the groups that are compared.
    subjects : array-like, shape (samples,), optional
        Subject of each sample; by default each sample is a subject.
    strata : mapping of str to array-like, optional
        Columns such as site and sex, one value a sample: labels are permuted only among subjects that share them all.
    minimum : int
        Smallest number of subjects a group may have, at least 2.

    Raises
    ------
    UserError
        If a group does not exist or is too small, the columns differ in length, a subject is in both groups or in two
        strata, a stratum is missing, or no other labelling is possible.  (A subject's samples with other labels count
        in neither group.)
    """
    first, second = str(first), str(second)
    column_of_labels = np.asarray(labels, dtype=object)
    if column_of_labels.ndim != 1:
        raise UserError(f"labels has the shape {column_of_labels.shape}: give a list with one label for each sample.")
    count = len(column_of_labels)
    strata = {} if strata is None else strata
    if not isinstance(strata, Mapping | pd.DataFrame) or any(strata[name] is None for name in strata):
        raise UserError("strata is to hold columns by name: {'site': [one for each sample]}, say, or a table of them.")
    strata = {str(name): np.asarray(strata[name], dtype=object) for name in strata}
    named = [None if absent else str(label) for label, absent in _with_absent(column_of_labels)]
    present = sorted({value for value in named if value is not None})
    columns = {"subjects": subjects, **strata}
    for name, column in columns.items():
        if column is not None and len(column) != count:
            raise UserError(
                f"'{name}' has {len(column)} entries, but there are {count} labels: give one for each sample."
            )
    if first == second:
        raise UserError(f"the comparison of '{first}' with itself was asked for: name two groups out of {present}.")
    for label in (first, second):
        if label not in present:
            raise UserError(
                f"the comparison names the group '{label}', but the labels are {present}: name two of these."
            )
    rows = np.array([value in (first, second) for value in named])
    unit = np.full(count, -1)
    if subjects is None:
        ids = np.flatnonzero(rows).astype(str)
        unit[rows] = np.arange(rows.sum())
    else:
        of_sample = np.asarray(subjects, dtype=object)[rows]
        if pd.isna(of_sample).any():
            raise UserError("'subjects' names no subject for some samples: give one for each sample with a label.")
        ids, unit[rows] = np.unique(of_sample.astype(str), return_inverse=True)
    label_of = _one_value_each(np.array(named, dtype=object), unit, ids, "label")
    in_first = label_of == first
    for label, size in ((first, in_first.sum()), (second, (~in_first).sum())):
        if size < max(minimum, SMALLEST_GROUP):
            raise UserError(
                f"the group '{label}' has {size} subject{'s' if size > 1 else ''}, fewer than the "
                f"{max(minimum, SMALLEST_GROUP)} that a test needs: leave it out or merge it with another."
            )
    stratum = np.zeros(len(ids), dtype=np.int64)
    for name, values in strata.items():
        if pd.isna(values[rows]).any():
            raise UserError(f"the stratum '{name}' is missing for some samples: leave them out or give it.")
        value_of = _one_value_each(values, unit, ids, f"value of '{name}'").astype(str)
        _, codes = np.unique(value_of, return_inverse=True)
        _, stratum = np.unique(stratum * (codes.max() + 1) + codes, return_inverse=True)
    sizes = np.bincount(unit[rows])
    comparison = Comparison(first, second, unit, ids, in_first, by_size(stratum, sizes), sizes)
    if comparison.distinct() == 1:
        if replace(comparison, stratum=stratum).distinct() > 1:
            raise UserError(
                f"no two subjects of '{first}' and '{second}' {'of one stratum ' if strata else ''}have as many samples, so no "
                "labels can be exchanged: use as many samples of each subject, one scan say."
            )
        raise UserError(
            f"no stratum holds subjects of both '{first}' and '{second}', so nothing can be permuted: use fewer strata."
        )
    return comparison


def unequal_sizes(sizes: np.ndarray, stratum: np.ndarray, label: np.ndarray) -> list[str]:
    """Say what unequal numbers of samples mean for the labellings, in a sentence; nothing where they are equal.

    Parameters
    ----------
    sizes, stratum, label : ndarray, shape (units,)
        Samples of each unit, number of its stratum, and its label.
    """
    if len(set(sizes.tolist())) == 1:
        return []
    fixed = sum(len(set(label[stratum == each].tolist())) == 1 for each in stratum.tolist())
    return [
        f"subjects have {sizes.min()} to {sizes.max()} samples, and labels were exchanged among those with as many: {fixed} of "
        f"{len(sizes)} had nobody with another label to exchange with"
    ]


def by_size(stratum: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Strata of units that have as many samples, and share their stratum; shapes (units,)."""
    return np.unique(np.stack([stratum, sizes]), axis=1, return_inverse=True)[1].reshape(-1)


def _with_absent(values: np.ndarray) -> Iterator[tuple[object, bool]]:
    """Each value, and whether it is missing."""
    return zip(values.tolist(), pd.isna(values).tolist(), strict=True)


def _one_value_each(values: np.ndarray, unit: np.ndarray, ids: np.ndarray, what: str) -> np.ndarray:
    """The value of each subject, which must be the same for all its samples."""
    rows = np.flatnonzero(unit >= 0)
    found = np.empty(len(ids), dtype=object)
    found[unit[rows]] = values[rows]
    for row in rows:
        if values[row] != found[unit[row]]:
            raise UserError(
                f"the subject '{ids[unit[row]]}' has more than one {what}: give all its samples the same one."
            )
    return found


@dataclass(frozen=True)
class Labellings:
    """The observed labelling, and those that it is compared with.

    Attributes
    ----------
    in_first : ndarray of bool, shape (labellings, units)
        Which subjects are in the first group; row 0 is the observed labelling.
    enumerated : bool
        Whether these are all possible labellings.
    message : str
        How they came about, in a sentence.
    balance : DataFrame or None
        Of a conditional drawing: see `balance_of`.
    refused : str
        Why no p may be given, or empty.
    """

    in_first: np.ndarray
    enumerated: bool
    message: str
    balance: pd.DataFrame | None = None
    refused: str = ""

    def __len__(self) -> int:
        return len(self.in_first)

    @property
    def digest(self) -> str:
        """Digest of the labellings, the same on every machine."""
        return hashlib.sha256(
            np.packbits(self.in_first, axis=None).tobytes() + repr(self.in_first.shape).encode()
        ).hexdigest()


def draw_labellings(comparison: Comparison, permutations: int, seed: int) -> Labellings:
    """Draw labellings at random within strata, or list all of them where there are no more than asked for.

    Parameters
    ----------
    comparison : Comparison
        The groups.
    permutations : int
        How many labellings beside the observed one.
    seed : int
        Labelling b depends on this and on b alone.

    Raises
    ------
    UserError
        If no permutation is asked for.
    """
    _check_count(permutations, seed)
    distinct = comparison.distinct()
    if distinct <= permutations + 1:
        rows = list(_every_labelling(comparison))
        observed = next(i for i, row in enumerate(rows) if np.array_equal(row, comparison.in_first))
        rows[0], rows[observed] = rows[observed], rows[0]
        message = (
            f"all {distinct} possible labellings were used"
            if distinct == permutations + 1
            else f"only {distinct} labellings are possible, fewer than the {permutations} asked for: all were used"
        )
        return Labellings(np.stack(rows), True, message)
    by_stratum = comparison.in_first[np.argsort(comparison.stratum, kind="stable")]
    in_first = np.empty((permutations + 1, len(by_stratum)), dtype=bool)
    in_first[0] = comparison.in_first
    for b in range(1, permutations + 1):
        in_first[b, _shuffled(comparison.stratum, np.random.default_rng([seed, b]))] = by_stratum
    return Labellings(in_first, False, f"{permutations} of {distinct} possible labellings were drawn with seed {seed}")


def _check_count(permutations: int, seed: int) -> None:
    whole = all(isinstance(each, int | np.integer) for each in (permutations, seed))
    if not whole or permutations < 1 or seed < 0:
        raise UserError(
            f"permutations={permutations} and seed={seed}: ask for at least one permutation, and a seed of 0 or more, both whole."
        )


def _shuffled(stratum: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Units in random order within strata, stratum after stratum."""
    return np.lexsort((generator.random(len(stratum)), stratum))


def _every_labelling(comparison: Comparison) -> Iterator[np.ndarray]:
    members = [np.flatnonzero(comparison.stratum == s) for s in range(int(comparison.stratum.max()) + 1)]
    choices = [itertools.combinations(units, int(comparison.in_first[units].sum())) for units in members]
    for chosen in itertools.product(*choices):
        row = np.zeros(len(comparison.in_first), dtype=bool)
        row[[unit for units in chosen for unit in units]] = True
        yield row


# ---------------------------------------------------------------------- continuous confounders


def draw_conditional_labellings(
    comparison: Comparison, confounders: Mapping[str, Any], permutations: int, seed: int
) -> Labellings:
    """Draw labellings that depend on confounders as the observed one does.

    A logistic model of the label given the confounders says how likely each labelling is; pairs of subjects of one
    stratum exchange their labels with the odds that the model gives (Berrett, Wang, Barber and Samworth 2020, "The
    conditional permutation test for independence while controlling for confounders", J. R. Stat. Soc. B 82).  All
    labellings, the observed one too, are as far from a common one in the middle, so that they are exchangeable.

    Parameters
    ----------
    comparison : Comparison
        The groups.
    confounders : mapping of str to array-like, shape (samples,)
        Numbers such as age and mean framewise displacement; a subject's is the mean over its samples.
    permutations : int
        How many labellings beside the observed one.
    seed : int
        Labelling b depends on this and on b alone.

    Returns
    -------
    Labellings
        With the balance; ``refused`` says so where an imbalance remains.

    Raises
    ------
    UserError
        If a confounder is missing for a sample, does not vary, or is not a number.
    """
    _check_count(permutations, seed)
    table = confounders_of_units(comparison, confounders)
    label = comparison.in_first.astype(np.int64)
    logits = propensity_logits(table.to_numpy(), comparison.in_first)
    giver = conditional_givers(
        label, np.column_stack([np.zeros(len(logits)), logits]), comparison.stratum, permutations, seed
    )
    in_first = comparison.in_first[giver]
    balance = balance_of(in_first, table)
    refused = remaining_imbalance(balance)
    moved = (in_first[1:] != in_first[0]).mean()
    message = (
        f"{permutations} labellings were drawn conditionally on {', '.join(table.columns)} with seed {seed}; on "
        f"average {moved:.0%} of the subjects have another label than the observed one"
    )
    return Labellings(in_first, False, message, balance, refused)


def conditional_givers(
    label: np.ndarray, logits: np.ndarray, stratum: np.ndarray, permutations: int, seed: int
) -> np.ndarray:
    """Whose label each unit gets in each labelling that depends on confounders as the observed one does.

    Parameters
    ----------
    label : ndarray of int, shape (units,)
        The observed labels, from 0.
    logits : ndarray, shape (units, labels)
        Log odds of each label against the first.
    stratum : ndarray of int, shape (units,)
        Number of each unit's stratum.
    permutations : int
        How many labellings beside the observed one.
    seed : int
        Labelling b depends on this and on b alone.

    Returns
    -------
    ndarray of int, shape (permutations + 1, units)
        Row 0 leaves all labels as they are.
    """
    middle = _exchanged(label, logits, stratum, np.random.default_rng([seed, 0]))
    giver = np.empty((permutations + 1, len(label)), dtype=np.int64)
    giver[0] = np.arange(len(label))
    for b in range(1, permutations + 1):
        giver[b] = middle[_exchanged(label[middle], logits, stratum, np.random.default_rng([seed, b]))]
    return giver


def remaining_imbalance(balance: pd.DataFrame) -> str:
    """Say why no p may be given, where the drawn labellings do not share an imbalance; empty where they do."""
    worst = balance[balance["imbalanced"]]
    if not len(worst):
        return ""
    name, observed = worst.iloc[0]["confounder"], worst.iloc[0]["observed"]
    if worst.iloc[0]["separated"]:
        return (
            f"each group has one value of '{name}' of its own, so that nothing can be told apart from it, and {NO_P}."
        )
    return (
        f"the groups differ in '{name}' by {observed:.2f} standard deviations and the drawn labellings do not: the "
        f"model of the label does not describe the confounder, so {NO_P}; match the groups, or use strata."
    )


def confounders_of_units(comparison: Comparison, confounders: Mapping[str, Any]) -> pd.DataFrame:
    """Confounders of each subject compared, the mean over its samples, shape (units, confounders)."""
    return means_of_units(confounders, comparison.unit, comparison.sizes)


def means_of_units(confounders: Mapping[str, Any], unit: np.ndarray, sizes: np.ndarray) -> pd.DataFrame:
    """Mean of each confounder over a unit's samples, shape (units, confounders).

    Parameters
    ----------
    confounders : mapping of str to array-like, shape (samples,)
        Numbers.
    unit : ndarray of int, shape (samples,)
        Number of each sample's unit; -1 leaves it out.
    sizes : ndarray of int, shape (units,)
        Samples of each unit.

    Raises
    ------
    UserError
        If a confounder is missing for a sample, does not vary, or is not a number.
    """
    rows = unit >= 0
    columns = {}
    for name, column in confounders.items():
        if np.ndim(column) != 1:
            raise UserError(
                f"the confounder '{name}' has the shape {np.shape(column)}: give one number for each sample, and each column a name."
            )
        if len(column) != len(rows):
            raise UserError(
                f"the confounder '{name}' has {len(column)} entries for {len(rows)} samples: give one for each."
            )
        try:
            values = np.asarray(column, dtype=np.float64)[rows]
        except (TypeError, ValueError) as error:
            raise UserError(f"the confounder '{name}' is not a number ({error}): use categories as strata.") from error
        if not np.isfinite(values).all():
            raise UserError(f"the confounder '{name}' is missing for some samples: leave them out or give it.")
        columns[name] = np.bincount(unit[rows], values) / sizes
        if np.ptp(columns[name]) == 0:
            raise UserError(f"the confounder '{name}' is the same for all subjects: leave it out.")
    if not columns:
        raise UserError("no confounder was given: name at least one, or permute without.")
    return pd.DataFrame(columns)


def propensity_logits(
    confounders: np.ndarray, in_first: np.ndarray, penalty: float = PENALTY, among: np.ndarray | None = None
) -> np.ndarray:
    """Log odds of the first group given the confounders, by logistic regression with a ridge penalty.

    Parameters
    ----------
    confounders : ndarray, shape (units, confounders)
        Standardised here.
    in_first : ndarray of bool, shape (units,)
        The observed labels.
    penalty : float
        Half of it times the squared coefficients is added to minus the log likelihood; the intercept is free.
    among : ndarray of bool, shape (units,), optional
        Units that the model is fitted to, where others belong to neither group.

    Returns
    -------
    ndarray, shape (units,)
        Of all units.
    """
    fitted = np.ones(len(in_first), dtype=bool) if among is None else among
    spread = confounders[fitted].std(0)
    standard = (confounders - confounders[fitted].mean(0)) / np.where(spread > 0, spread, 1.0)
    everyone = np.column_stack([np.ones(len(standard)), standard])
    design, in_first = everyone[fitted], in_first[fitted]
    ridge = penalty * np.diag([0.0] + [1.0] * standard.shape[1])
    coefficients = np.zeros(design.shape[1])
    coefficients[0] = math.log(in_first.sum() / (~in_first).sum())
    value = math.inf
    for _ in range(100):  # Newton's method on a convex function, with steps halved where they go too far
        logits = design @ coefficients
        probability = 1 / (1 + np.exp(-logits))
        gradient = design.T @ (probability - in_first) + ridge @ coefficients
        weights = probability * (1 - probability)
        step = np.linalg.solve(design.T @ (weights[:, None] * design) + ridge, gradient)
        value = _penalised_loss(design @ coefficients, in_first, coefficients, penalty)
        length = 1.0
        while length > 1e-10:
            tried = coefficients - length * step
            if _penalised_loss(design @ tried, in_first, tried, penalty) <= value:
                break
            length /= 2
        coefficients = coefficients - length * step
        if np.abs(length * step).max() < 1e-10:
            break
    return everyone @ coefficients


def _penalised_loss(logits: np.ndarray, in_first: np.ndarray, coefficients: np.ndarray, penalty: float) -> float:
    likelihood = np.logaddexp(0, np.where(in_first, -logits, logits)).sum()
    return float(likelihood + penalty / 2 * np.square(coefficients[1:]).sum())


def _exchanged(
    label: np.ndarray, logits: np.ndarray, stratum: np.ndarray, generator: np.random.Generator, rounds: int = ROUNDS
) -> np.ndarray:
    """Whose label each unit has after rounds of exchanges between random pairs of a stratum, with the model's odds."""
    giver = np.arange(len(label))
    order = np.argsort(stratum, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(stratum))])[stratum[order]]
    # The first places of pairs: every second of a stratum that has a next one in it.
    places = np.arange(len(order))
    has_next = np.append(stratum[order][1:] == stratum[order][:-1], False)
    pairs = places[((places - starts) % 2 == 0) & has_next]
    for _ in range(rounds):
        shuffled = _shuffled(stratum, generator)
        i, j = shuffled[pairs], shuffled[pairs + 1]
        a, b = label[giver[i]], label[giver[j]]
        # Exchanged to not exchanged: the odds of one label there and the other here.
        difference = logits[i, b] + logits[j, a] - logits[i, a] - logits[j, b]
        swap = generator.random(len(pairs)) < 1 / (1 + np.exp(-difference))
        giver[i[swap]], giver[j[swap]] = giver[j[swap]], giver[i[swap]]
    return giver


def balance_of(in_first: np.ndarray, confounders: pd.DataFrame, in_second: np.ndarray | None = None) -> pd.DataFrame:
    """Standardised mean differences of the confounders, of the observed labelling and of the drawn ones.

    A logistic model without penalty reproduces the observed mean exactly, so squares are compared too: they show where
    the label depends on the confounder in another way than the model says.

    Parameters
    ----------
    in_first : ndarray of bool, shape (labellings, units)
        Row 0 is the observed labelling.
    confounders : DataFrame, shape (units, confounders)
        One column each.
    in_second : ndarray of bool, shape (labellings, units), optional
        The second group; by default everybody else.

    Returns
    -------
    DataFrame
        ``confounder``, each itself and its squared distance from its mean; ``observed`` difference (first minus second
        group) in units of the observed groups' pooled standard deviation; ``low``, ``median`` and ``high`` of the drawn
        labellings (the middle 95 %); ``imbalanced``: the observed difference is larger than 0.25 and outside of that middle,
        or the groups are separated; and ``separated``: each group has one value of its own, so that nothing can be told apart
        from the confounder (the unit is the standard deviation of all then).
    """
    plain = confounders.to_numpy(dtype=np.float64)
    values = np.column_stack([plain, np.square(plain - plain.mean(0))])
    names = [*confounders.columns, *(f"{name} squared" for name in confounders.columns)]
    second = ~in_first if in_second is None else in_second
    weights = in_first / in_first.sum(1, keepdims=True) - second / second.sum(1, keepdims=True)
    groups = [values[in_first[0]], values[second[0]]]
    squares = sum(np.square(group - group.mean(0)).sum(0) for group in groups)
    pooled = np.sqrt(squares / (sum(map(len, groups)) - 2))
    rounding = 1e-9 * np.abs(values).max(0)
    spread = values.std(0)
    scale = np.select([pooled > rounding, spread > rounding], [pooled, spread], np.inf)
    differences = (weights @ values) / scale
    observed = differences[0]
    separated = (pooled <= rounding) & (observed != 0)
    low, median, high = np.quantile(differences[1:], [(1 - MIDDLE) / 2, 0.5, (1 + MIDDLE) / 2], axis=0)
    return pd.DataFrame(
        {
            "confounder": names,
            "observed": observed,
            "low": low,
            "median": median,
            "high": high,
            "imbalanced": (np.abs(observed) > IMBALANCE) & ((observed < low) | (observed > high) | separated),
            "separated": separated,
        }
    )


def group_sizes(labellings: Labellings, sizes: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Samples in the first and in the second group under each labelling, each of shape (labellings,)."""
    first = labellings.in_first @ np.asarray(sizes)
    return first, int(np.sum(sizes)) - first
