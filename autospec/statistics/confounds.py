"""Is it just motion?  The same test beside each comparison of diagnoses: of motion, site, sex, matched people, and chance.

A difference of diagnoses that high and low motion, or two sites, show as well, or that goes away among matched people, is
no finding about the diagnosis.  With labels shuffled once, the test should find nothing.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from autospec.datasets.labelled import covariates_of
from autospec.errors import UserError
from autospec.statistics.covariates import (
    balance_in_words,
    by_subject,
    compares_targets,
    described_by,
    imbalance_after_matching,
    labels_of,
    matched_for,
    matched_samples,
)
from autospec.statistics.permutation_test import NullDistributions, evaluate
from autospec.statistics.permutations import Comparison, compare, draw_labellings
from autospec.statistics.study import Question, Study, columns_of
from autospec.statistics.table import CONFOUNDS_COLUMNS
from autospec.storage import written_whole

STATISTICS = ("contrast", "distance")
WITHIN_TARGET = "permuted within each target, of which the classifier has seen nothing else"


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
    given : tuple of dict
        Rows of the table, where refits made the test.
    """

    comparison: str
    name: str
    groups: tuple[str, str]
    question: Question | None
    balance: str = ""
    note: str = ""
    refused: bool = False
    given: tuple[dict[Hashable, Any], ...] = ()


def questions(
    study: Study, asked: Sequence[Question], settings: CheckSettings, of_refits: pd.DataFrame | None = None
) -> list[Check]:
    """Tests beside each comparison of diagnoses, where the data set has covariates.

    Parameters
    ----------
    study : Study
        The samples.
    asked : sequence of Question
        The comparisons of groups under test; those of two targets are looked into.  A classifier's are refused there, and
        looked into all the same.
    settings : CheckSettings
        How labels are permuted.
    of_refits : DataFrame, optional
        Rows of this table that refits gave.
    """
    if not covariates_of(study.samples):
        return []
    if study.task == "classifier":
        return [
            check
            for comparison in _learned(study, settings)
            for check in _checks(study, comparison, None, settings, of_refits)
        ]
    return [
        check
        for question in asked
        if compares_targets(
            _labels_from(question.comparison, question.comparison.in_first),
            (question.comparison.first, question.comparison.second),
            study.target,
        )
        for check in _checks(study, question.comparison, question, settings, None)
    ]


def _learned(study: Study, settings: CheckSettings) -> Iterator[Comparison]:
    """Comparisons of the targets that a classifier learned."""
    for grouping in study.groupings:
        for pair in grouping.pairs:
            if compares_targets(grouping.labels, pair, study.target):
                with contextlib.suppress(UserError):  # too small a group, which the description says
                    yield compare(
                        grouping.labels, *pair, subjects=study.subjects, minimum=settings["minimum_group_size"]
                    )


def _rows_of(comparison: Comparison, units: np.ndarray) -> np.ndarray:
    """Which samples are some units', shape (samples,)."""
    compared = comparison.unit >= 0
    compared[compared] = units[comparison.unit[compared]]
    return compared


def _checks(
    study: Study,
    comparison: Comparison,
    question: Question | None,
    settings: CheckSettings,
    of_refits: pd.DataFrame | None,
) -> list[Check]:
    """Checks of one comparison.

    What a classifier learned cannot be permuted after training; what it did not learn can be within each target, given
    which the weights and adjoints have seen nothing of it.
    """
    pair = (comparison.first, comparison.second)
    rows = comparison.unit >= 0
    labels = _labels_from(comparison, comparison.in_first)
    sexes, sites = (labels_of(study.samples, name) for name in ("sex", "site"))
    described = described_by(study.samples)
    within: dict[str, Any] = dict(columns_of(study.samples, settings["within"], "statistics.within"))
    classifier = study.task == "classifier"
    if classifier:
        within["target"] = list(study.target)

    def check(name: str, of_samples: np.ndarray, groups: tuple[str, str], note: str = "") -> Check:
        others = {each: values for each, values in described.items() if each != {"motion": "mean_fd"}.get(name, name)}
        balance, worst = balance_in_words(of_samples, groups, others, study.subjects)
        refused = imbalance_after_matching(worst) if name == "matched" else ""
        try:
            strata = {column: values for column, values in within.items() if column != name}
            minimum = settings["minimum_group_size"]
            compared = compare(of_samples, *groups, subjects=study.subjects, strata=strata, minimum=minimum)
        except UserError as error:
            return Check(comparison.name, name, groups, None, balance, str(error).rstrip("."))
        drawn = draw_labellings(compared, settings["permutations"], settings["seed"])
        question = Question(compared, drawn, STATISTICS)
        return Check(comparison.name, name, groups, question, balance, refused or note, bool(refused))

    def by_refits(name: str) -> Check:
        if of_refits is None:
            note = "the classifier has learned these labels, so only refits test them: set refit to true for this run"
            return Check(comparison.name, name, pair, None, note=note)
        found = of_refits[(of_refits["comparison"] == comparison.name) & (of_refits["check"] == name)]
        return Check(comparison.name, name, pair, None, given=tuple(found.to_dict("records")))

    if question is None:
        found = [by_refits("labels")]
    else:
        balance, _ = balance_in_words(labels, pair, described, study.subjects)
        as_labelled = Question(comparison, question.labellings, STATISTICS)
        note = question.labellings.refused.rstrip(".")
        found = [Check(comparison.name, "labels", pair, as_labelled, balance, note)]
    of_target = WITHIN_TARGET if classifier else ""
    if "mean_fd" in described:
        split = _split_at_median(described["mean_fd"], rows, study.subjects)
        found.append(check("motion", split, ("high", "low"), of_target))
    for name, column in (("site", sites), ("sex", sexes)):
        if column is None:
            continue
        column[~rows] = None
        present = Counter(label for label in column if label is not None)
        if len(present) > 1:
            a, b = sorted(label for label, _ in present.most_common(2))
            notes = [f"the two largest of {len(present)}" if len(present) > 2 else "", of_target]
            found.append(check(name, column, (a, b), "; ".join(filter(None, notes))))
    if classifier:
        return [*found, by_refits("matched"), by_refits("shuffled")]
    if matched_for(study.samples):
        partner = matched_samples(labels, pair, study.samples, study.subjects)
        found.append(check("matched", np.where(partner >= 0, labels, np.array(None, dtype=object)), pair))
    order = np.random.default_rng([settings["seed"], 2**31]).permutation(len(comparison.in_first))
    found.append(check("shuffled", _labels_from(comparison, comparison.in_first[order]), pair))
    return found


def _labels_from(comparison: Comparison, in_first: np.ndarray) -> np.ndarray:
    """Label of each sample, None where it is not compared, if these subjects were the first group."""
    labels = np.full(len(comparison.unit), None, dtype=object)
    labels[comparison.unit >= 0] = comparison.second
    labels[_rows_of(comparison, in_first)] = comparison.first
    return labels


def _split_at_median(values: np.ndarray, rows: np.ndarray, subjects: Sequence[str]) -> np.ndarray:
    """High or low of each compared sample's subject; None where the number is missing."""
    known = rows & np.isfinite(values)
    labels = np.full(len(values), None, dtype=object)
    if known.any():
        means, unit = by_subject(values, known, subjects)
        labels[known] = np.where(means > np.median(means), "high", "low")[unit]
    return labels


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
    rows: list[dict[Hashable, Any]] = []
    waiting = iter(distributions)
    for check in checks:
        if check.question is None:
            rows += check.given or [row(check)]
            continue
        in_first = check.question.comparison.in_first
        rows += rows_of(check, int(in_first.sum()), int((~in_first).sum()), evaluate(next(waiting), alpha=alpha).table)
    write_table(rows, path)


def write_table(rows: Sequence[Mapping[Hashable, Any]], path: str) -> None:
    """Write rows as a tab-separated table; it appears whole or not at all."""
    with written_whole(path) as temporary:
        found = pd.DataFrame(rows, columns=list(CONFOUNDS_COLUMNS))
        found.to_csv(temporary, sep="\t", index=False, float_format="%.6g")


def rows_of(check: Check, n_a: int, n_b: int, table: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """Rows of one check, for the whole network and for each layer, from its table of tests."""
    rows = []
    for layer in ["", *table["layer"].unique()]:
        part = table if not layer else table[table["layer"] == layer]
        size = part["effect_size"].where(part["test"] != "refit", part["effect_size"].abs()).to_numpy()
        effect = (np.nan,) * 3
        if np.isfinite(size).any():
            effect = part[list(EFFECT)].to_numpy()[np.nanargmax(size)].tolist()
        p = np.nan if check.refused else float(part["p_adjusted"].min())
        rows.append(row(check, layer, (n_a, n_b), effect, p))
    return rows


EFFECT = ("effect_size", "effect_low", "effect_high")


def row(
    check: Check,
    layer: str = "",
    sizes: tuple[int, int] | None = None,
    effect: Sequence[float] = (np.nan,) * 3,
    p: float = np.nan,
) -> dict[Hashable, Any]:
    """One row of the table."""
    return {
        "comparison": check.comparison,
        "check": check.name,
        "layer": layer,
        "group_a": check.groups[0],
        "group_b": check.groups[1],
        "n_a": "" if sizes is None else sizes[0],
        "n_b": "" if sizes is None else sizes[1],
        "largest_statistic": effect[0],
        "largest_low": effect[1],
        "largest_high": effect[2],
        "p": p,
        "balance": check.balance,
        "note": check.note,
    }
