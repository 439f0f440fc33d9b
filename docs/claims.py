"""Print the numbers of docs/paper.md from the results of a run: ``python docs/claims.py [results]``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import xarray as xr

from autospec import open_trajectories
from autospec.describe import effect_words
from autospec.statistics.table import read_tests, smallest_p

MEN = ("diagnosis=SZ & sex=M", "diagnosis=HC & sex=M")


def largest(tree: xr.DataTree, layer: str) -> xr.DataArray:
    """Log2 of the largest singular value of the whole batch's gradient, by step; arithmetic keeps the shared steps."""
    values = tree[f"layers/{layer}/gradient"].sel(group="all", index=1, drop=True)
    return np.log2(values.where(values > 0))


def layers(tree: xr.DataTree) -> list[str]:
    """Names of the layers, from the input on."""
    return [str(name) for name in tree["layers"].children]


def effective_rank(tree: xr.DataTree, layer: str) -> float:
    """Effective rank (Roy and Vetterli 2007) of the whole batch's gradient, median over steps."""
    values = np.nan_to_num(tree[f"layers/{layer}/gradient"].sel(group="all").values.astype(float))
    share = values / values.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nanmedian(np.exp(-np.nansum(share * np.log(share), axis=1))))


def distance(a: xr.DataTree, b: xr.DataTree) -> tuple[float, float]:
    """Mean of |log2 ratio| of the largest singular values over layers: in the first and in the last quarter of the training."""
    apart = np.array([np.abs(largest(a, layer) - largest(b, layer)) for layer in layers(a)])
    quarter = max(1, apart.shape[1] // 4)
    return float(np.nanmean(apart[:, :quarter])), float(np.nanmean(apart[:, -quarter:]))


def row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def head(*cells: str) -> None:
    """Print the head of a Markdown table."""
    print()
    row(*cells)
    row(*["---"] * len(cells))


def print_tables(results: Path) -> None:
    """Print every table."""
    experiments = sorted(folder.name for folder in (results / "runs").iterdir())
    trees = {
        (name, file.name.removesuffix(".zarr.zip")): open_trajectories(file)
        for name in experiments
        for file in sorted((results / "runs" / name).glob("*.zarr.zip"))
    }
    width = {name: 8 if name == "mnist_cnn2d" else 32 for name in experiments}

    head(
        "experiment",
        "first layer",
        "sigma_1 classifier / autoencoder, first step",
        "last step",
        "effective rank autoencoder",
        "classifier",
    )
    for name in experiments:
        coder, judge = (trees[name, f"{task}_{width[name]}_relu"] for task in ("autoencoder", "classifier"))
        layer = layers(coder)[0]
        ratio = largest(judge, layer) - largest(coder, layer)
        row(
            name,
            layer,
            float(2 ** ratio[0]),
            float(2 ** ratio[-1]),
            effective_rank(coder, layer),
            effective_rank(judge, layer),
        )

    head(
        "experiment",
        "Sigmoid against Tanh, first quarter",
        "last quarter",
        "ReLU against Tanh, first quarter",
        "last quarter",
    )
    for name in experiments:
        relu, sigmoid, tanh = (trees[name, f"autoencoder_{width[name]}_{kind}"] for kind in ("relu", "sigmoid", "tanh"))
        row(name, *distance(sigmoid, tanh), *distance(relu, tanh))

    head(
        "experiment", "jump between recorded steps, median of absolute log2", "largest jump", "sigma_1, last over first"
    )
    for name in experiments:
        tree = trees[name, f"autoencoder_{width[name]}_relu"]
        curves = np.array([largest(tree, layer) for layer in layers(tree)])
        jumps = np.abs(np.diff(curves, axis=1))
        row(
            name,
            float(np.nanmedian(jumps)),
            float(np.nanmax(jumps)),
            float(np.nanmedian(2 ** (curves[:, -1] - curves[:, 0]))),
        )

    head(
        "experiment",
        "task",
        "layer",
        "paper's test: values called different",
        "permutation: smallest family-wise p, effect (95 % interval)",
        "refit: the same",
        "held out",
    )
    for name in experiments:
        for task in ("autoencoder", "classifier"):
            run = f"{task}_{width[name]}_relu"
            tree, tests = trees[name, run], read_tests(results / "statistics" / name / f"{run}.tsv")
            pair = (
                MEN if MEN[0] in tree["group"].values else ("SZ", "HC") if "SZ" in tree["group"].values else ("0", "3")
            )
            tests = tests[tests["group_a"].isin(pair) & tests["group_b"].isin(pair)]
            for layer in layers(tree):
                part = tests[tests["layer"] == layer]
                paper = part[
                    (part["test"] == "paper_student") & (part["statistic"] == "gradient") & part["index"].notna()
                ]
                smallest = [smallest_p(part[part["test"] == test]) for test in ("permutation", "refit")]
                found = ["-" if row is None else f"{row['p_adjusted']:.3g}, {effect_words(row)}" for row in smallest]
                learned = tree.attrs["performance"]
                measure = "accuracy" if "accuracy" in learned else "explained"
                grey = " (at chance)" if learned.get("at_chance") else ""
                row(
                    name,
                    task,
                    layer,
                    f"{int(paper['significant'].sum())} of {len(paper)}",
                    *found,
                    f"{learned[measure]:.2f}{grey}",
                )


if __name__ == "__main__":
    print_tables(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
