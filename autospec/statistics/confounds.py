"""Is it just motion?  The same test beside each comparison of diagnoses: of motion, site, sex, matched people, and chance.

A difference of diagnoses that high and low motion, or two sites, show as well, or that goes away among matched people, is
no finding about the diagnosis.  With labels shuffled once, the test should find nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from autospec.datasets.labelled import covariates_of, group_labels
from autospec.errors import UserError
from autospec.statistics.matching import BALANCED, matched_pairs, standardised_difference
from autospec.statistics.permutation_test import NullDistributions, evaluate
from autospec.statistics.permutations import Comparison, compare, draw_labellings
from autospec.statistics.study import Question, Study, columns_of
from autospec.storage import written_whole

COLUMNS = {
    "comparison": "The comparison of diagnoses that is looked into.",
    "check": (
        "labels: the diagnoses themselves; motion: high against low mean framewise displacement, split at the median; site: "
        "the two largest sites; sex; matched: the diagnoses among people matched for age, sex and motion; shuffled: the "
        "diagnoses, shuffled once."
    ),
    "layer": "Name of the parameter; empty for the whole network.",
    "group_a": "Label of the first group of this test.",
    "group_b": "Label of the second group.",
    "n_a": "Subjects in the first group.",
    "n_b": "Subjects in the second group.",
    "largest_statistic": (
        "Largest of the tested statistics' distances from their mean over permutations, in their standard deviations."
    ),
    "p": "Family-wise p of that layer, or of the whole network; empty where nothing is tested.",
    "balance": "Differences of the two groups' means in standard deviations; of sex, of the shares of men.",
    "note": "What a reader should know.",
}
STATISTICS = ("contrast", "distance")
# Covariates that a matched subsample is matched for, beside sex.
MATCHED = ("age", "mean_fd")


class CheckSettings(TypedDict):
    """How labels are permuted."""

    permutations: int
    seed: int
    within: list[str]
    minimum_group_size: int


@dataclass(frozen=True)
class Check:
    """One test beside a comparison of diagnoses.

    Attributes
    ----------
    comparison : str
        The comparison that is looked into.
    name : str
        What is checked.
    groups : (str, str)
        The two groups of this test.
    question : Question or None
        The test; None where it cannot be made.
    balance, note : str
        In words.
    refused : bool
        Whether an imbalance remains, so that no p may be given.
    """

    comparison: str
    name: str
    groups: tuple[str, str]
    question: Question | None
    balance: str = ""
    note: str = ""
    refused: bool = False


def questions(study: Study, asked: Sequence[Question], settings: CheckSettings) -> list[Check]:
    """Tests beside each comparison of diagnoses, where the data set has covariates.

    Parameters
    ----------
    study : Study
        The samples.
    asked : sequence of Question
        The comparisons of groups under test; those of two targets are looked into.
    settings : CheckSettings
        How labels are permuted.
    """
    numbers = covariates_of(study.samples)
    if not numbers:
        return []
    return [
        check
        for question in asked
        if compares_targets(study, question.comparison)
        for check in _checks(study, question, numbers, settings)
    ]


def compares_targets(study: Study, comparison: Comparison) -> bool:
    """Whether each of the two groups is everybody of one target, such as a diagnosis."""
    for in_group in (comparison.in_first, ~comparison.in_first):
        rows = _rows_of(comparison, in_group)
        targets = set(study.target[rows])
        if len(targets) != 1 or (study.target == targets.pop()).sum() != rows.sum():
            return False
    return True


def _rows_of(comparison: Comparison, units: np.ndarray) -> np.ndarray:
    """Which samples are some units', shape (samples,)."""
    compared = comparison.unit >= 0
    compared[compared] = units[comparison.unit[compared]]
    return compared


def _checks(
    study: Study, question: Question, covariates: dict[str, np.ndarray], settings: CheckSettings
) -> list[Check]:
    comparison = question.comparison
    pair = (comparison.first, comparison.second)
    rows = comparison.unit >= 0
    labels = _labels_from(comparison, comparison.in_first)
    sexes, sites = (_labels(study, name) for name in ("sex", "site"))
    numbers: dict[str, np.ndarray] = {name: covariates[name] for name in MATCHED if name in covariates}
    described = {**numbers, **_as_numbers(sexes)}
    within = columns_of(study.samples, settings["within"], "statistics.within")

    def check(name: str, of_samples: np.ndarray, groups: tuple[str, str], note: str = "") -> Check:
        others = {each: values for each, values in described.items() if each != {"motion": "mean_fd"}.get(name, name)}
        balance, worst = _balance(of_samples, groups, others, study.subjects)
        refused = name == "matched" and worst > BALANCED
        if refused:
            note = f"an imbalance of {worst:.2f} standard deviations remains after matching, so no p is given"
        try:
            strata = {column: values for column, values in within.items() if column != name}
            minimum = settings["minimum_group_size"]
            compared = compare(of_samples, *groups, subjects=study.subjects, strata=strata, minimum=minimum)
        except UserError as error:
            return Check(comparison.name, name, groups, None, balance, str(error).rstrip("."))
        drawn = draw_labellings(compared, settings["permutations"], settings["seed"])
        return Check(comparison.name, name, groups, Question(compared, drawn, STATISTICS), balance, note, refused)

    balance, _ = _balance(labels, pair, described, study.subjects)
    note = question.labellings.refused.rstrip(".")
    as_labelled = Question(comparison, question.labellings, STATISTICS)
    found = [Check(comparison.name, "labels", pair, as_labelled, balance, note)]
    if "mean_fd" in numbers:
        found.append(check("motion", _split_at_median(numbers["mean_fd"], rows, study.subjects), ("high", "low")))
    for name, column in (("site", sites), ("sex", sexes)):
        if column is None:
            continue
        column[~rows] = None
        present = Counter(label for label in column if label is not None)
        if len(present) > 1:
            a, b = sorted(label for label, _ in present.most_common(2))
            note = f"the two largest of {len(present)}" if len(present) > 2 else ""
            found.append(check(name, column, (a, b), note))
    if numbers:
        found.append(check("matched", _matched(labels, pair, numbers, sexes, study.subjects), pair))
    order = np.random.default_rng([settings["seed"], 2**31]).permutation(len(comparison.in_first))
    found.append(check("shuffled", _labels_from(comparison, comparison.in_first[order]), pair))
    return found


def _labels_from(comparison: Comparison, in_first: np.ndarray) -> np.ndarray:
    """Label of each sample, None where it is not compared, if these subjects were the first group."""
    labels = np.full(len(comparison.unit), None, dtype=object)
    labels[comparison.unit >= 0] = comparison.second
    labels[_rows_of(comparison, in_first)] = comparison.first
    return labels


def _labels(study: Study, grouping: str) -> np.ndarray | None:
    """Labels of a grouping, None where they are missing; None where the data set has no such grouping."""
    if f"grouping_{grouping}" not in study.samples:
        return None
    return np.array(group_labels(study.samples, grouping), dtype=object)


def _as_numbers(sexes: np.ndarray | None) -> dict[str, np.ndarray]:
    if sexes is None:
        return {}
    return {"sex": np.array([np.nan if each is None else float(each == "M") for each in sexes])}


def _by_subject(values: np.ndarray, rows: np.ndarray, subjects: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each subject's samples, and the number of each row's subject."""
    _, unit = np.unique(np.asarray(subjects, dtype=object)[rows].astype(str), return_inverse=True)
    return np.bincount(unit, values[rows]) / np.bincount(unit), unit


def _split_at_median(values: np.ndarray, rows: np.ndarray, subjects: Sequence[str]) -> np.ndarray:
    """High or low of each compared sample's subject; None where the number is missing."""
    known = rows & np.isfinite(values)
    labels = np.full(len(values), None, dtype=object)
    if known.any():
        means, unit = _by_subject(values, known, subjects)
        labels[known] = np.where(means > np.median(means), "high", "low")[unit]
    return labels


def _matched(
    labels: np.ndarray,
    pair: tuple[str, str],
    numbers: dict[str, np.ndarray],
    sexes: np.ndarray | None,
    subjects: Sequence[str],
) -> np.ndarray:
    """Labels of the matched subjects alone."""
    known = np.array([each in pair for each in labels]) & np.isfinite(np.stack(list(numbers.values()))).all(0)
    exact = np.full(len(labels), "", dtype=object) if sexes is None else sexes
    known &= np.array([each is not None for each in exact])
    result = np.full(len(labels), None, dtype=object)
    if not known.any():
        return result
    columns = [_by_subject(values, known, subjects) for values in numbers.values()]
    unit = columns[0][1]
    first_row = np.unique(unit, return_index=True)[1]
    in_first = (labels[known] == pair[0])[first_row]
    pairs = matched_pairs(np.stack([means for means, _ in columns], 1), exact[known][first_row].astype(str), in_first)
    kept = np.isin(unit, [subject for each in pairs for subject in each])
    result[np.flatnonzero(known)[kept]] = labels[known][kept]
    return result


def _balance(
    labels: np.ndarray, pair: tuple[str, str], numbers: dict[str, np.ndarray], subjects: Sequence[str]
) -> tuple[str, float]:
    """Standardised differences of the groups in words, and the largest."""
    words, worst = [], 0.0
    for name, values in numbers.items():
        known = np.array([each in pair for each in labels]) & np.isfinite(values)
        if not known.any():
            continue
        means, unit = _by_subject(values, known, subjects)
        in_first = (labels[known] == pair[0])[np.unique(unit, return_index=True)[1]]
        if in_first.all() or not in_first.any():
            continue
        difference = float(standardised_difference(means[:, None], in_first)[0])
        words.append(f"{name} {difference:+.2f}")
        worst = max(worst, abs(difference))
    return ", ".join(words), worst


def write(checks: Sequence[Check], distributions: Sequence[NullDistributions], alpha: float, path: str) -> None:
    """Evaluate the checks that were made and write the table; with no check, its header alone.

    Parameters
    ----------
    checks : sequence of Check
        All checks.
    distributions : sequence of NullDistributions
        Of those that have a question, in their order.
    alpha : float
        Level of significance.
    path : str
        The tab-separated table to write.
    """
    rows: list[dict[str, Any]] = []
    waiting = iter(distributions)
    for check in checks:
        if check.question is None:
            rows.append(_row(check, "", np.nan, np.nan))
            continue
        table = evaluate(next(waiting), alpha=alpha).table
        for layer in ["", *table["layer"].unique()]:
            part = table if not layer else table[table["layer"] == layer]
            p = np.nan if check.refused else part["p_adjusted"].min()
            rows.append(_row(check, layer, part["effect_size"].max(), p))
    with written_whole(path) as temporary:
        found = pd.DataFrame(rows, columns=list(COLUMNS))
        found.to_csv(temporary, sep="\t", index=False, float_format="%.6g")


def _row(check: Check, layer: str, largest: float, p: float) -> dict[str, Any]:
    in_first = np.empty(0, dtype=bool) if check.question is None else check.question.comparison.in_first
    return {
        "comparison": check.comparison,
        "check": check.name,
        "layer": layer,
        "group_a": check.groups[0],
        "group_b": check.groups[1],
        "n_a": int(in_first.sum()) if check.question else "",
        "n_b": int((~in_first).sum()) if check.question else "",
        "largest_statistic": largest,
        "p": p,
        "balance": check.balance,
        "note": check.note,
    }
