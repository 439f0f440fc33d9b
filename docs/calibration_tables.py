"""Print the tables of docs/calibration.md from the results of ``snakemake calibration``: ``python docs/calibration_tables.py [results]``."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pandas as pd

GROUPS = ("32 and 32", "48 and 16")
CONFOUNDERS = {
    "volumes": {"none": "none", "number": "motion", "strata": "site"},
    "digits": {"none": "none", "number": "ink", "strata": "half of the ink"},
}
FUNCTIONS = {
    "number": "z, as the model says (first table)",
    "square": "z squared: much and little against average",
    "threshold": "z above 1: a threshold",
    "cube": "z cubed less 3 z, which has neither line nor square in it",
    "wave": "sine of 3 z, up and down several times",
}
MEETS = {"number": "conditional on the confounder", "strata": "within strata"}
STATISTICS = {
    "contrast": "contrast's spectrum",
    "difference": "difference of spectra",
    "cosine": "cosine",
    "effective_rank": "difference of effective ranks",
    "distance": "distance of the layers",
}
WHOLE = {"statistic": "all", "step": "all", "values": "all"}
FIRST = {"step": "all", "values": "first of the encoder, steps as samples"}
HOLM = {"step": "all", "values": "any after Holm, steps as samples"}
POWER_EFFECT = 0.8
POWER_STEP = "20"


def chosen(table: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """Rows with these values."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def words(rows: pd.DataFrame) -> str:
    """A rate in per cent with its interval, and how many studies have no p."""
    if not len(rows):
        return ""
    row = rows.iloc[0]
    refused = f", {row['refusals']} refused" if row["refusals"] else ""
    return f"{100 * row['rate']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f}){refused}"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    for line in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(line)} |")
    print()


def false_positives(table: pd.DataFrame, task: str) -> None:
    """Rejections where nothing differs: the paper's tests, the valid one, and it again where it meets the confounder."""
    test = "permutation" if task == "autoencoder" else "refit"
    rows = []
    for data, names in CONFOUNDERS.items():
        for (kind, name), groups in itertools.product(names.items(), GROUPS):
            part = chosen(table, task=task, data=data, confounding=kind, groups=groups)
            cells = [words(chosen(part, test="paper", **place)) for place in (FIRST, HOLM)]
            if task == "classifier":
                cells.append(words(chosen(part, test="permutation", **WHOLE)))
            cells.append(words(chosen(part, test=test, **WHOLE)))
            cells.append(words(chosen(part, test=f"{test} {MEETS[kind]}", **WHOLE)) if kind in MEETS else "")
            rows.append([data, groups, name, *cells])
    tests = ["permutation"] if task == "autoencoder" else ["permutation (refused by autospec)", "refit"]
    paper = ["paper: first singular value", "paper: any, after Holm"]
    print_table(["data", "groups", "confounder", *paper, *tests, f"{test} that meets the confounder"], rows)


def totals(table: pd.DataFrame) -> None:
    """Rejections of the valid tests over all settings of a kind, and how many intervals miss 5 per cent."""
    whole = chosen(table[table["expected"] == "alpha"], **WHOLE)
    plain = ~whole["confounding"].isin(["square", "threshold", "cube", "wave"])
    for test, rows in whole[plain].groupby("test", sort=False):
        studies = int((rows["repetitions"] - rows["refusals"]).sum())
        print(
            f"{test}: {rows['rejections'].sum()} of {studies} studies, {rows['rejections'].sum() / studies:.1%}",
            end="; ",
        )
        print(f"{rows['refusals'].sum()} of {rows['repetitions'].sum()} refused")
    every = table[(table["expected"] == "alpha") & table["confounding"].isin(["none", *MEETS])]
    for test, rows in every.groupby("test", sort=False):
        above, below = int((rows["low"] > 0.05).sum()), int((rows["high"] < 0.05).sum())
        print(f"{test}: of {len(rows)} intervals {above} lie above 5 % and {below} below")
    print()


def wrong_models(table: pd.DataFrame) -> None:
    """The conditional test where its model of the label is wrong."""
    rows = []
    for kind, name in FUNCTIONS.items():
        part = chosen(table, task="autoencoder", data="volumes", groups=GROUPS[0], confounding=kind, **WHOLE)
        conditional = chosen(part, test=f"permutation {MEETS['number']}")
        refused = "" if not len(conditional) else str(conditional.iloc[0]["refusals"])
        cells = [words(chosen(part, test="permutation")), words(conditional).partition(",")[0], refused]
        rows.append([name, *cells])
    repetitions = int(chosen(table, test="permutation", **WHOLE)["repetitions"].max())
    print_table(
        ["label and volumes depend on", "motion left out", "conditional on z", f"no p, of {repetitions:,}"], rows
    )


def power(table: pd.DataFrame) -> None:
    """Rejections of each statistic, by the size of the effect and by the step."""
    for task, test in (("autoencoder", "permutation"), ("classifier", "refit")):
        part = chosen(table, task=task, test=test, values="all")
        at_step, of_effect = chosen(part, step=POWER_STEP), chosen(part[part["step"] != "all"], effect=POWER_EFFECT)
        for column, found, name in (("effect", at_step, "d = {:g}"), ("step", of_effect, "step {}")):
            values = sorted(found[column].unique(), key=float)
            rows = [
                [
                    title,
                    *(f"{100 * chosen(found, statistic=statistic, **{column: v}).iloc[0]['rate']:.0f}" for v in values),
                ]
                for statistic, title in STATISTICS.items()
            ]
            print(f"{test}, {task}, {f'step {POWER_STEP}' if column == 'effect' else f'd = {POWER_EFFECT:g}'}:\n")
            print_table(["statistic", *map(name.format, values)], rows)


def main(results: str = "results") -> None:
    """Print everything."""
    folder = Path(results) / "calibration"
    table, powers = (
        pd.read_csv(folder / name, sep="\t", dtype={"step": str}) for name in ("calibration.tsv", "power.tsv")
    )
    for task in ("autoencoder", "classifier"):
        false_positives(table, task)
    totals(table)
    wrong_models(table)
    power(powers)


if __name__ == "__main__":
    main(*sys.argv[1:2])
