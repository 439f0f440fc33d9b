"""The table of tests of groups, as it is written and read: labels of groups stay text, whatever they look like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autospec.errors import UserError
from autospec.storage import written_whole

# Every column of the table, in its order, in words.
COLUMNS: Mapping[str, str] = {
    "layer": "Name of the parameter.",
    "statistic": (
        "What is compared. Of the paper's tests: the spectra of gradient, activation or adjoint. Of permutation and refit: "
        "contrast, the singular values of G_a/N_a - G_b/N_b, where G is a group's share of the gradient and N its number "
        "of samples; difference, the groups' singular values divided by their samples; cosine, between the two shares; "
        "effective_rank, the difference of the shares' effective ranks; distance, the Frobenius norm of the contrast."
    ),
    "step": (
        "Number of updates before the values arose; empty where one singular value is compared over all recorded steps."
    ),
    "index": "Number of the singular value, from 1; empty where the whole spectrum or the whole layer is compared.",
    "group_a": "Label of the first group.",
    "group_b": "Label of the second group.",
    "comparison": "Both groups, as in 'a - b'.",
    "test": (
        "paper_student and paper_welch: the paper's t-tests; permutation: labels permuted with the weights as they are; "
        "refit: labels permuted before training, and the training repeated."
    ),
    "estimate": (
        "Of the paper's tests the difference of means, of logarithms where those are tested; elsewhere the statistic."
    ),
    "interval_low": (
        "Lower end of the estimate's 95 % interval: by the t distribution, or elsewhere the shifts of the statistic that a "
        "test by the same permutations would not reject."
    ),
    "interval_high": "Upper end of that interval.",
    "effect_size": (
        "Hedges' g of the paper's tests; elsewhere the statistic's distance from its mean over the other labellings, in "
        "their standard deviations."
    ),
    "effect_low": "Lower end of the effect size's 95 % interval; infinite where there are fewer than 39 other labellings.",
    "effect_high": "Upper end of that interval.",
    "p": "P-value, uncorrected; empty where nothing is tested.",
    "p_adjusted": (
        "P-value corrected for the family of tests, whose members the description names: Holm's of the paper's tests, by "
        "the maximum of the standardised statistics elsewhere."
    ),
    "p_bh": "P-value adjusted by Benjamini and Hochberg, which controls the false discovery rate.",
    "p_holm": "P-value adjusted by Holm.",
    "significant": (
        "Whether p is below alpha, uncorrected as in the paper, of the paper's tests; whether p_adjusted is at most alpha "
        "elsewhere."
    ),
    "below_floor": "Whether rounding alone could have made the values; such rows are not tested.",
}
# The same of the table that asks whether it is just motion.
CONFOUNDS_COLUMNS: Mapping[str, str] = {
    "comparison": "The comparison of diagnoses that is looked into.",
    "check": (
        "labels: the diagnoses themselves; motion: high against low mean framewise displacement, split at the median; site: "
        "the two largest sites; sex; matched: the diagnoses among people matched for age, sex and motion; shuffled: the "
        "diagnoses, shuffled once.  Of a classifier, labels, matched and shuffled are by refits."
    ),
    "layer": "Name of the parameter; empty for the whole network.",
    "group_a": "Label of the first group of this test.",
    "group_b": "Label of the second group.",
    "n_a": "Subjects in the first group.",
    "n_b": "Subjects in the second group.",
    "largest_statistic": (
        "Largest of the tested statistics' distances from their means over the other labellings, in their standard deviations."
    ),
    "largest_low": "Lower end of its 95 % interval: the shifts that a test by the same permutations would not reject.",
    "largest_high": "Upper end of that interval.",
    "p": "Family-wise p of that layer, or of the whole network; empty where nothing is tested.",
    "balance": "Differences of the two groups' means in standard deviations; of sex, of the shares of men.",
    "note": "What a reader should know.",
}
TEXT = ("layer", "statistic", "group_a", "group_b", "comparison", "test")
WHOLE = ("step", "index")
TRUE_OR_FALSE = ("significant", "below_floor")
NUMBERS = tuple(name for name in COLUMNS if name not in (*TEXT, *WHOLE, *TRUE_OR_FALSE))
# In every sentence that says why a test that was made has no p.
NO_P = "no p is given"
PAPER = ("paper_student", "paper_welch")
TESTS = (*PAPER, "permutation", "refit")


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """Give a table all columns, in their order and with their types; those it lacks are empty."""
    found = table.reindex(columns=list(COLUMNS))
    types: dict[str, Any] = {
        **dict.fromkeys(TEXT, str),
        **dict.fromkeys(WHOLE, "Int64"),
        **dict.fromkeys(NUMBERS, float),
        **dict.fromkeys(TRUE_OR_FALSE, bool),
    }
    return found.astype(types)


def write_tests(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table of tests, tab-separated; it appears whole or not at all."""
    with written_whole(path) as temporary:
        tidy(table).to_csv(temporary, sep="\t", index=False, float_format="%.8g")


def read_tests(path: str | Path) -> pd.DataFrame:
    """Read a table of tests; labels such as "0" and "NA" stay text.

    Raises
    ------
    UserError
        If there is no such table, or it has other columns.
    """
    types: dict[str, Any] = {
        **dict.fromkeys(TEXT, str),
        **dict.fromkeys(WHOLE, "Int64"),
        **dict.fromkeys(NUMBERS, float),
    }
    empty = {column: [""] for column in (*WHOLE, *NUMBERS)}
    try:
        table = pd.read_csv(path, sep="\t", dtype=types, keep_default_na=False, na_values=empty)
    except FileNotFoundError:
        raise UserError(f"there is no table of tests at {path}: run the tests of that run.") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path} is no table of tests ({error}): make it again.") from error
    if list(table.columns) != list(COLUMNS):
        raise UserError(f"{path} is no table of tests: its columns are {list(table.columns)}; make it again.")
    return table


def read_confounds(path: str | Path) -> pd.DataFrame:
    """Read a table that asks whether it is just motion; labels such as "NA" stay text.

    Raises
    ------
    UserError
        If it is none.
    """
    numbers = ("n_a", "n_b", "largest_statistic", "largest_low", "largest_high", "p")
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        table = table.assign(**{name: pd.to_numeric(table[name], errors="coerce") for name in numbers})
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no readable table of confounds ({error}): make it again.") from None
    for name in ("n_a", "n_b"):
        table[name] = table[name].astype("Int64")
    return table[list(CONFOUNDS_COLUMNS)]


def smallest_p(rows: pd.DataFrame) -> pd.Series | None:
    """The row with the smallest corrected p, of several the one with the largest effect; None where no row has a p."""
    found = rows[rows["p_adjusted"].notna()]
    if found.empty:
        return None
    order = np.lexsort((-found["effect_size"].abs().to_numpy(dtype=float), found["p_adjusted"].to_numpy(dtype=float)))
    return found.iloc[int(order[0])]


def write_description(description: Mapping[str, Any], path: str | Path) -> None:
    """Write a description as JSON; it appears whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def comparison_name(group_a: str, group_b: str) -> str:
    """Both groups, as in the trajectories' contrasts."""
    return f"{group_a} - {group_b}"
