"""The report's captions, written from the data that the figures show."""

from __future__ import annotations

from typing import Any

import pandas as pd
import xarray as xr

from autospec.describe import content

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
        "Above, one dot a participant, with median and quartiles: motion, volumes used, the least share of any network that "
        "the image covers, the median correlation of maps with the template, and how much slower than noise the time "
        "courses are (power below 0.1 Hz over that from 0.15 to 0.25 Hz). Below, how well each network's map matches its "
        "reference. Groups that differ here differ in quality before they differ in anything else.",
    ),
}


def page_caption(panels: list[dict[str, Any]]) -> str:
    """Caption of a composed page: what each panel is."""
    spectra = [f"{panel['letter']} {content(panel)}" for panel in panels if panel["compare"] is None]
    differences = [f"{panel['letter']} {content(panel)}" for panel in panels if panel["compare"] is not None]
    parts = []
    if spectra:
        parts.append(
            f"Singular values of gradient, activation and adjoint over training, by group: {'; '.join(spectra)}."
        )
    if differences:
        parts.append(f"Differences between two groups: {'; '.join(differences)}.")
    return " ".join(parts)


def spectra_caption(tree: xr.DataTree) -> str:
    """Caption of a panel of spectra."""
    steps = tree["step"].values
    groups = ", ".join(
        f"{group} (N = {size})"
        for group, size in zip(tree["group"].values[1:], tree["group_size"].values[0][1:], strict=True)
    )
    loss = tree["training/loss"].values
    words = (
        f"One row for each layer, one column for each statistic; {len(steps)} recorded steps from {steps[0]} to "
        f"{steps[-1]}. Groups: {groups}. The loss fell from {loss[0]:.3g} to {loss[-1]:.3g}"
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
    return words + "."


def difference_caption(tree: xr.DataTree, tests: pd.DataFrame, pair: list[str], variance: str, alpha: float) -> str:
    """Caption of a panel of differences, with the counts that it marks."""
    rows = tests[tests["group_a"].isin(pair) & tests["group_b"].isin(pair)]
    counts = []
    for (layer, statistic), part in rows.groupby(["layer", "statistic"], sort=False):
        values = part[(part["test"] == "singular_value") & part["resolved"]]
        counts.append(f"{int((values[f'p_{variance}'] < alpha).sum())} of {len(values)} in {layer}, {statistic}")
    steps = rows[rows["test"] == "step"]
    significant = int((steps["resolved"] & (steps[f"p_{variance}"] < alpha)).sum())
    return (
        f"Colour: the logarithm (base 2) of the ratio of the singular values of {pair[0]} to those of {pair[1]}, at each "
        f"recorded step; grey below the noise floor. Dots to the right mark singular values that the paper's t-test "
        f"over steps calls significant (p < {alpha:g}): {'; '.join(counts)}, counting those that lie above the noise "
        "floor at every step and change over training. "
        f"Squares above mark steps that its t-test over singular values calls significant: {significant} of {len(steps)}, "
        "over all layers and statistics. Both tests treat dependent samples as independent."
    )
