"""The calibration's tables and figure: false positives of each test, and power."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from autospec.figures.style import BATCH_COLOUR, GROUP_COLOURS, MM, STYLE, save
from autospec.paths import EXTENSIONS
from autospec.statistics.calibration.design import (
    ALPHA,
    CONFOUNDING,
    DATA,
    MEETING,
    PAPER,
    PERMUTATION,
    REFIT,
    TASKS,
    CalibrationSettings,
)
from autospec.statistics.calibration.tables import (
    ALL,
    HOLM_OVER_STEPS,
    OVER_STEPS,
    gather,
    write_described,
    write_table,
)

BLUE, ORANGE, GREEN, PINK, *_ = GROUP_COLOURS
WIDTH_MM, HEIGHT_MM = 180, 165
LEAST = 0.5
"""Smallest rate drawn, per cent: what is less stands there."""
TITLES = {
    "none": "no confounder",
    "number": "confounded by a number\n(head motion; ink)",
    "strata": "confounded by a stratum\n(site; half of the ink)",
}
# Marker, colour and label of each test in the upper panels; the paper's is shown for two families.
TESTS = {
    (PAPER, OVER_STEPS): ("D", ORANGE, "paper: first singular value, steps as samples"),
    (PAPER, HOLM_OVER_STEPS): ("s", ORANGE, "paper: any singular value, after Holm"),
    (PERMUTATION, ALL): ("o", BLUE, "permutation: whole run, family-wise"),
    (REFIT, ALL): ("^", GREEN, "refit: whole run, family-wise"),
}
STATISTICS = {
    "contrast": (BLUE, "o", "contrast's spectrum"),
    "difference": (ORANGE, "s", "difference of spectra"),
    "cosine": (GREEN, "^", "cosine"),
    "distance": (PINK, "D", "distance of the layers"),
}
POWER_STEP, POWER_EFFECT = "10", 0.8


def build_calibration(settings: CalibrationSettings, parts: Sequence[str], output: str) -> str:
    """Gather the parts' tables, describe them and draw the figure.

    Parameters
    ----------
    settings : CalibrationSettings
        With which the parts were carried out.
    parts : sequence of str
        Their tables.
    output : str
        ``calibration.tsv``; ``power.tsv``, ``calibration.json`` and the figure stand beside it.

    Returns
    -------
    str
        One line that says what was found.
    """
    null, power = gather(parts)
    folder, target = Path(output).parent, Path(output)
    write_table(null, target)
    write_table(power, folder / "power.tsv")
    write_described(settings, target.with_suffix(".json"))
    draw(null, power, [str(target.with_suffix(f".{extension}")) for extension in EXTENSIONS])
    run = null[(null["statistic"] == ALL) & (null["step"] == ALL) & (null["values"] == ALL)]
    held = run[run["expected"] == "alpha"]
    inside = int(((held["low"] <= ALPHA) & (held["high"] >= ALPHA)).sum())
    return (
        f"{len(null)} rates without a difference, {len(power)} with one; of {len(held)} family-wise rates that should be "
        f"{ALPHA:.0%}, {inside} have it in their interval"
    )


def draw(null: pd.DataFrame, power: pd.DataFrame, outputs: list[str]) -> None:
    """Draw false positives above and power below.

    Parameters
    ----------
    null, power : DataFrame
        As `gather` returns them.
    outputs : list of str
        Files to write, each in the format of its extension.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH_MM * MM, HEIGHT_MM * MM), layout="constrained")
        figure.get_layout_engine().set(rect=(0.015, 0, 0.98, 1))
        upper, lower = figure.subfigures(2, 1, height_ratios=[1.5, 1])
        columns = upper.subplots(1, 3, sharey=True)
        for axes, confounding in zip(columns, CONFOUNDING, strict=True):
            _false_positives(axes, null[null["confounding"] == confounding], confounding)
        upper.suptitle("False positives: how often a test rejects where the labels make no difference", fontsize=8)
        upper.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False)
        effect, step, refit = lower.subplots(1, 3, sharey=True)
        _against(effect, power[(power["task"] == "autoencoder") & (power["step"] == POWER_STEP)], "effect")
        effect.set_title(f"permutation, autoencoder, step {POWER_STEP}")
        chosen = (power["task"] == "autoencoder") & (power["effect"] == POWER_EFFECT) & (power["step"] != ALL)
        _against(step, power[chosen], "step")
        step.set_title(f"permutation, autoencoder, d = {POWER_EFFECT:g}")
        _against(refit, power[(power["task"] == "classifier") & (power["step"] == POWER_STEP)], "effect")
        refit.set_title(f"refit, classifier, step {POWER_STEP}")
        effect.set_ylabel("power (%)")
        lower.suptitle("Power: how often it rejects where eight of 39 volumes differ by d", fontsize=8)
        handles = [
            Line2D([], [], color=colour, marker=marker, markersize=3.5, label=label)
            for colour, marker, label in STATISTICS.values()
        ]
        lower.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        save(figure, outputs, dots_per_inch=200)
        plt.close(figure)


def _false_positives(axes: Axes, table: pd.DataFrame, confounding: str) -> None:
    """Rates of one kind of confounder: a row for each kind of data, task and groups."""
    sizes = list(dict.fromkeys(table["groups"]))
    rows = [(data, task, groups) for data in DATA for task in TASKS for groups in sizes]
    of_run = table[(table["statistic"].isin([ALL, "gradient"])) & (table["step"] == ALL)]
    for y, (data, task, groups) in enumerate(rows):
        here = of_run[(of_run["data"] == data) & (of_run["task"] == task) & (of_run["groups"] == groups)]
        shown = [
            (name, values, meeting)
            for name, values in TESTS
            for meeting in dict.fromkeys(["", MEETING[confounding]])
            if ((here["test"] == name + meeting) & (here["values"] == values)).any()
        ]
        for i, (name, values, meeting) in enumerate(shown):
            marker, colour, _ = TESTS[name, values]
            each = here[(here["test"] == name + meeting) & (here["values"] == values)].iloc[0]
            if pd.isna(each["rate"]):  # refused in every repetition
                continue
            rate, low, high = (max(100 * each[key], LEAST) for key in ("rate", "low", "high"))
            place = y - 0.3 + 0.6 * (i + 0.5) / len(shown)
            axes.plot([low, high], [place, place], color=colour, linewidth=0.8)
            filled = colour if each["expected"] == "alpha" else "white"
            axes.plot(rate, place, marker, color=colour, markerfacecolor=filled, markersize=3.8, markeredgewidth=0.9)
        if y:
            axes.axhline(y - 0.5, color="#dddddd", linewidth=0.4, zorder=0)
    axes.axvline(100 * ALPHA, color=BATCH_COLOUR, linewidth=0.7, dashes=(3, 2), zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(LEAST * 0.85, 120)
    ticks = [LEAST, 1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"≤{LEAST:g}", *(f"{tick:g}" for tick in ticks[1:])])
    axes.minorticks_off()
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"{data}, {task}\n{groups}" for data, task, groups in rows])
    axes.set_xlabel("rejections (%)")
    axes.set_title(TITLES[confounding])


def _legend() -> list[Line2D]:
    handles = [
        Line2D([], [], color=colour, marker=marker, markerfacecolor=face, markersize=3.8, linewidth=0.8, label=label)
        for (name, _), (marker, colour, label) in TESTS.items()
        for face in ["white" if name == PAPER else colour]
    ]
    for face, label in ((BATCH_COLOUR, "filled: should be at 5 %"), ("white", "open: need not be")):
        handles.append(Line2D([], [], color=BATCH_COLOUR, marker="o", markerfacecolor=face, linewidth=0, label=label))
        handles[-1].set_markersize(3.8)
    return handles


def _against(axes: Axes, table: pd.DataFrame, column: str) -> None:
    """Power of each statistic, with intervals, against the effect or the step."""
    numbers = sorted({float(value) for value in table[column]})
    for offset, (statistic, (colour, marker, _)) in enumerate(STATISTICS.items()):
        here = table[(table["statistic"] == statistic) & (table["values"] == ALL)]
        here = here.assign(at=here[column].astype(float)).sort_values("at")
        # Steps stand at equal distances; what lies at one place is moved apart a little.
        at = here["at"] if column == "effect" else here["at"].map(numbers.index)
        at = at + (offset - 1.5) * (0.012 if column == "effect" else 0.05)
        axes.plot(at, 100 * here["rate"], color=colour, marker=marker, markersize=3, linewidth=1)
        axes.vlines(at, 100 * here["low"], 100 * here["high"], color=colour, linewidth=0.7)
    axes.axhline(100 * ALPHA, color=BATCH_COLOUR, linewidth=0.7, dashes=(3, 2), zorder=0)
    axes.set_ylim(0, 100)
    if column == "step":
        axes.set_xticks(range(len(numbers)), [f"{number:g}" for number in numbers])
    axes.set_xlabel("effect, d" if column == "effect" else "updates done before")
