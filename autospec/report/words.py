"""The report's captions, written from the data that the figures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import xarray as xr

from autospec.describe import content, effect_words, group_words, performance_words
from autospec.figures.differences import of_pair
from autospec.statistics.sizes import training_samples
from autospec.statistics.table import NO_P, comparison_name, smallest_p

# Title and caption of each picture of a cohort.
VIEWS = {
    "networks": (
        "Networks",
        "Mean map of each network over a group's participants, drawn where it is above half its maximum: one row a "
        "domain, one colour a network. Networks that look alike in all groups were found alike; one without a "
        "patch, or with scattered patches, was not found.",
    ),
    "connectivity": (
        "Connectivity",
        "Fisher's z of the correlation of every two networks' cleaned time courses, averaged over each group's "
        "participants, and the difference of the first two groups on a scale of its own. Networks are ordered by domain. "
        "No test was made: a difference of small groups is large by chance.",
    ),
    "quality": (
        "Quality",
        "Above, one dot an image, with median and quartiles: motion where it is known, volumes used, the least share of any "
        "network that the image covers, the median correlation of maps with the template, and how much slower than noise the "
        "time courses are (power below 0.1 Hz over that from 0.15 to 0.25 Hz). Below, how well each network's map matches "
        "its reference. Groups that differ here differ in quality before they differ in anything else.",
    ),
}
QUALITY_WITHOUT_TEMPLATE = (
    "One dot an image, with median and quartiles: motion where it is known, volumes used, and how much slower than noise "
    "the time courses are (power below 0.1 Hz over that from 0.15 to 0.25 Hz). Groups that differ here differ in quality "
    "before they differ in anything else."
)


def view_words(view: str, views: Sequence[str]) -> tuple[str, str]:
    """Title and caption of a picture of a cohort that is shown with others: without a template there is none of networks."""
    title, caption = VIEWS[view]
    return title, QUALITY_WITHOUT_TEMPLATE if view == "quality" and "networks" not in views else caption


def page_caption(panels: list[dict[str, Any]]) -> str:
    """Caption of a composed page: what each panel is."""
    spectra = [
        f"{panel['letter']} {content(panel)}"
        for panel in panels
        if panel["compare"] is None and not panel["by_position"]
    ]
    positions = [f"{panel['letter']} {content(panel)}" for panel in panels if panel["by_position"]]
    differences = [f"{panel['letter']} {content(panel)}" for panel in panels if panel["compare"] is not None]
    parts = []
    if spectra:
        parts.append(
            f"Singular values of gradient, activation and adjoint over training, by group: {'; '.join(spectra)}."
        )
    if differences:
        parts.append(f"Differences between two groups, with the test: {'; '.join(differences)}.")
    if positions:
        parts.append(f"The gradient's largest singular value at each position: {'; '.join(positions)}.")
    return " ".join(parts)


def spectra_caption(tree: xr.DataTree) -> str:
    """Caption of a panel of spectra."""
    steps = tree["step"].values
    sizes = training_samples(tree)
    groups = ", ".join(group_words(group, sizes.get(group)) for group in map(str, tree["group"].values[1:]))
    loss = tree["training/loss"].values
    words = (
        f"One row for each layer, one column for each statistic; {len(steps)} recorded steps from {steps[0]} to "
        f"{steps[-1]}. Groups: {groups}; of several groupings the finest is drawn, the first of those as fine. "
        f"The loss fell from {loss[0]:.3g} to {loss[-1]:.3g}"
    )
    if "accuracy" in tree["training"]:
        words += (
            f", and the accuracy on the training samples reached {100 * tree['training/accuracy'].values[-1]:.1f} %"
        )
    strongest: dict[str, list[str]] = {}
    for name, node in tree["layers"].children.items():
        if "gradient" not in node:
            continue
        last = node["gradient"].isel(step=-1, index=0).values[1:]
        group = str(tree["group"].values[1:][last.argmax()])
        strongest.setdefault(group, []).append(name)
    if strongest:
        parts = [f"of group {group} in {' and '.join(names)}" for group, names in strongest.items()]
        words += (
            f". At the last step the share of the gradient with the largest singular value is that {', '.join(parts)}"
        )
    return f"{words}.{_held_out(tree)}"


def position_caption(tree: xr.DataTree, pair: list[str]) -> str:
    """Caption of a panel along positions."""
    return (
        f"For each layer whose weights are used at several positions, the largest singular value of the share of the "
        f"gradient that comes from one position, over training: groups {pair[0]} and {pair[1]}, and the logarithm (base 2) "
        f"of their ratio. Dotted grey: not above the noise floor of the group's whole share.{_held_out(tree)}"
    )


def difference_caption(
    tree: xr.DataTree,
    tests: pd.DataFrame,
    described: Mapping[str, Any],
    pair: list[str],
    test: str,
    variance: str,
    alpha: float,
) -> str:
    """Caption of a panel of differences: what it marks, and every test of this pair beside each other."""
    return (
        f"Colour: the logarithm (base 2) of the ratio of the singular values of {pair[0]} to those of {pair[1]}, at each "
        f"recorded step; dotted grey below the noise floor, hatched beyond the rank that either group's samples allow. "
        f"The marks are those of the test {test}. {test_words(tests, described, pair, variance, alpha)}{_held_out(tree)}"
    )


def test_words(tests: pd.DataFrame, described: Mapping[str, Any], pair: list[str], variance: str, alpha: float) -> str:
    """Every test of two groups: the paper's beside the valid ones, which is which, and to which family a p refers."""
    rows = of_pair(tests, pair, "paper", variance)
    values, steps = rows[rows["step"].isna() & ~rows["below_floor"]], rows[rows["index"].isna()]
    words = [
        f"paper (describes this run, no evidence about groups): {int(values['significant'].sum())} of {len(values)} "
        f"singular values that lie above the noise floor at every step and change over training, and "
        f"{int(steps['significant'].sum())} of {len(steps)} steps, have p < {alpha:g}, uncorrected"
    ]
    for name, valid in (
        ("permutation", "valid where neither weights nor adjoints have seen the labels"),
        ("refit", "valid for classifiers"),
    ):
        about = of_comparison(described, name, pair)
        rows = of_pair(tests, pair, name, variance)
        contrast = rows[rows["statistic"] == "contrast"]
        if rows.empty:
            words.append(f"{name}: not made for these groups{about['why_not']}")
            continue
        smallest = smallest_p(contrast)
        if smallest is None:
            words.append(
                f"{name} ({valid}): no singular value of the contrast has a p{about['why_not']}{about['family']}"
            )
            continue
        # What lies below the noise floor has no p.
        count = int(contrast["p_adjusted"].notna().sum())
        words.append(
            f"{name} ({valid}): {int(contrast['significant'].sum())} of {count} singular values of the contrast that lie "
            f"above the noise floor have a family-wise p of at most {alpha:g}; the smallest is "
            f"{smallest['p_adjusted']:.3g} with an effect of {effect_words(smallest)} standard deviations{about['family']}"
        )
    return f"Tests: {'; '.join(words)}."


def names_of_pair(pair: list[str]) -> set[str]:
    """What the comparison of two groups may be called, whichever stands first."""
    return {comparison_name(*pair), comparison_name(*reversed(pair))}


def of_comparison(described: Mapping[str, Any], test: str, pair: list[str]) -> dict[str, str]:
    """To which family a valid test's corrected p refers, and why there is no p, each to be appended to a sentence."""
    about = described["tests"].get(test, {})
    names = names_of_pair(pair)
    here = next((each for name, each in about.get("comparisons", {}).items() if name in names), about)
    refused = next((why for name, why in about.get("refused", {}).items() if name in names), "")
    why_not = refused or next((each for each in here.get("messages", []) if NO_P in each), "")
    family = here.get("family", "").rstrip(".")
    return {
        "family": f"; the family is {family}" if family else "",
        "why_not": f" ({why_not[0].lower()}{why_not[1:].rstrip('.')})" if why_not else "",
    }


def _held_out(tree: xr.DataTree) -> str:
    words = performance_words(tree.attrs.get("performance"))
    return f" {words[0].upper()}{words[1:]}." if words else ""
