"""One small picture of a subject's results: match with the template, connectivity, spectra, motion.

It stands in the subject's own folder, so this file is part of what the subject's job depends on: it imports none of the
other figures' code, whose edits would find everybody's networks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autospec.ica.cleaning import power_spectra
from autospec.ica.template import DOMAINS, Network

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 110
WIDTH_INCHES, ROW_INCHES, HEAD_INCHES, FOOT_INCHES = 7.1, 2.0, 0.35, 0.2
# Okabe and Ito's palette, told apart with every common kind of colour vision; grey where a domain is not known.
COLOURS = dict(zip(DOMAINS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), strict=True))
UNKNOWN = "#777777"
FASTEST_HZ = 0.25


@dataclass(frozen=True)
class Shown:
    """What the picture shows of a subject.

    Attributes
    ----------
    title : str
        Names the subject by its id and nothing else.
    note : str
        That data are simulated or the template is the stand-in; empty otherwise.
    networks : sequence of Network
    match : ndarray, shape (networks,), or None
        Correlation of each map with its reference.
    connectivity : ndarray, shape (networks, networks)
        Fisher's z.
    timecourses : ndarray, shape (volumes, networks)
    step : float
        Seconds between volumes.
    displacement : ndarray, shape (volumes,), or None
        Framewise displacement, mm, without the volumes dropped at the start; NaN where not known, as of the first of all.
    much : float
        Displacement that is called much, mm.
    """

    title: str
    note: str
    networks: Sequence[Network]
    match: np.ndarray | None
    connectivity: np.ndarray
    timecourses: np.ndarray
    step: float
    displacement: np.ndarray | None
    much: float


def write_picture(shown: Shown, path: Path) -> None:
    """Draw a subject's picture.

    Parameters
    ----------
    shown : Shown
    path : Path
        ``.png`` file.
    """
    # Without pyplot, which costs time and keeps figures.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = list(DOMAINS)
    ranks = [known.index(each.domain) if each.domain in known else len(known) for each in shown.networks]
    order = np.argsort(ranks, kind="stable")
    domains = [shown.networks[place].domain for place in order]
    rows = 1 if shown.match is None else 2
    height = HEAD_INCHES + rows * ROW_INCHES + FOOT_INCHES
    style = {"font.family": "DejaVu Sans", "font.size": 6, "axes.titlesize": 6.5, "axes.linewidth": 0.5}
    with rc_context({**style, "text.parse_math": False}):  # names of networks are drawn as they are written
        figure = Figure(figsize=(WIDTH_INCHES, height))
        FigureCanvasAgg(figure)
        columns = 2 if shown.displacement is None else 3
        grid = figure.add_gridspec(
            rows,
            columns,
            left=0.065,
            right=0.985,
            top=1 - (HEAD_INCHES + 0.12) / height,
            bottom=(FOOT_INCHES + 0.34) / height,
            hspace=0.75,
            wspace=0.28,
        )
        if shown.match is not None:
            labels = [shown.networks[place].label for place in order]
            _draw_match(figure.add_subplot(grid[0, :]), shown.match[order], labels, domains)
        last = rows - 1
        _draw_connectivity(figure.add_subplot(grid[last, 0]), shown.connectivity[np.ix_(order, order)], domains)
        _draw_spectra(figure.add_subplot(grid[last, 1]), shown.timecourses[:, order], shown.step, domains)
        if shown.displacement is not None:
            _draw_motion(figure.add_subplot(grid[last, 2]), shown.displacement, shown.much)
        top = 1 - 0.06 / height
        figure.text(0.01, top, shown.title, va="top", fontsize=8, weight="bold")
        figure.text(0.985, 0.05 / height, shown.note, ha="right", fontsize=6.5, weight="bold", color="#B03A00")
        figure.savefig(path, format="png", dpi=DOTS_PER_INCH)


def _draw_match(axes: Axes, match: np.ndarray, labels: list[str], domains: list[str]) -> None:
    places = np.arange(len(match))
    colours = [COLOURS.get(domain, UNKNOWN) for domain in domains]
    axes.vlines(places, 0, match, colors=colours, linewidth=min(20.0, 300 / len(match)))
    for start in _starts(domains):
        axes.text(start - 0.4, 1.02, domains[start], color=colours[start], weight="bold", va="bottom")
    axes.set_xticks([])
    for place in places[:: max(1, len(labels) // 60)]:  # plain text takes a third of the time of ticks
        label = labels[place].replace("/", "/\n")
        axes.text(
            place, -0.02, label, rotation=90, fontsize=4.5, ha="center", va="top", transform=axes.get_xaxis_transform()
        )
    axes.set_xlim(-0.6, len(match) - 0.4)
    axes.set_ylim(min(0.0, float(np.nanmin(match))), 1)
    axes.set_ylabel("r of map and template")


def _draw_connectivity(axes: Axes, values: np.ndarray, domains: list[str]) -> None:
    shown = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    limit = max(0.05, float(np.quantile(np.abs(values), 0.99)))
    axes.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_facecolor("#DDDDDD")
    axes.set_title(f"connectivity: Fisher z, ±{limit:.2f}")
    starts = _starts(domains)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="black", linewidth=0.4)
        axes.axvline(start - 0.5, color="black", linewidth=0.4)
    ends = [*starts[1:], len(domains)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)] if any(domains) else []
    axes.set_xticks(middles, [domains[start] for start in starts] if middles else [], rotation=90, fontsize=5)
    axes.set_yticks(middles, [domains[start] for start in starts] if middles else [], fontsize=5)
    axes.tick_params(length=0, pad=1)


def _draw_spectra(axes: Axes, timecourses: np.ndarray, step: float, domains: list[str]) -> None:
    from matplotlib.collections import LineCollection

    frequencies, power = power_spectra(timecourses, step)
    share = power / power.sum(axis=0)
    slow = frequencies <= FASTEST_HZ
    lines = [np.column_stack([frequencies[slow], one]) for one in share[slow].T]
    axes.add_collection(LineCollection(lines, colors="#CCCCCC", linewidths=0.3))
    for domain in dict.fromkeys(domains):
        mean = share[:, [each == domain for each in domains]].mean(axis=1)
        axes.plot(frequencies[slow], mean[slow], color=COLOURS.get(domain, UNKNOWN), linewidth=0.9)
    axes.set_title("spectra of networks; " + ("means of domains" if any(domains) else "their mean"))
    axes.set_xlabel("Hz", labelpad=1)
    axes.set_ylabel("share of power")
    axes.set_xlim(0, frequencies[slow][-1])
    axes.set_ylim(0, 1.05 * share[slow].max())


def _draw_motion(axes: Axes, displacement: np.ndarray, much: float) -> None:
    axes.plot(np.arange(1, len(displacement) + 1), displacement, color="#333333", linewidth=0.6)
    axes.axhline(much, color="#D55E00", linewidth=0.6, linestyle="--")
    axes.set_title(f"motion: mean displacement {np.nanmean(displacement):.3f} mm")
    axes.set_xlabel("volume", labelpad=1)
    axes.set_ylabel("mm")
    axes.set_xlim(1, len(displacement))
    axes.set_ylim(0, 1.1 * max(much, float(np.nanmax(displacement))))


def _starts(domains: list[str]) -> list[int]:
    """Where each domain begins, in order."""
    return [i for i, domain in enumerate(domains) if i == 0 or domain != domains[i - 1]]
