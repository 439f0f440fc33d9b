"""Pictures of a cohort: networks by domain, connectivity by group, quality.  Nobody is named and no age is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from autospec.cohort.files import listed, read_json, read_table
from autospec.cohort.record import EXCLUSIONS, read_participants, read_scans
from autospec.errors import UserError
from autospec.figures.style import GROUP_COLOURS, MM, STYLE, save
from autospec.ica.derivative import note_on_data, subject_files
from autospec.ica.images import read_volumes, same_grid, to_grid
from autospec.ica.template import DOMAINS, STAND_IN_AFFINE, STAND_IN_KIND, STAND_IN_SHAPE

ROW_MM = 31.0
NETWORKS_A_ROW = 9  # where domains are not known
# One colour a network of a domain, the palette's, then darker and lighter ones.
NETWORK_COLOURS = (*GROUP_COLOURS, "#F0E442", "#000000", "#882255", "#44AA99", "#999933", "#AA4499", "#117733", "#88CCEE",
                   "#661100", "#6699CC", "#DDCC77")  # fmt: skip


class ViewSettings(TypedDict):
    """What the stage reads from the configuration."""

    view: Literal["connectivity", "networks", "quality"]
    dots_per_inch: int
    width_mm: float


@dataclass(frozen=True)
class Network:
    """One network: its label, and the short name of its domain, empty where that is not known."""

    label: str
    domain: str


@dataclass(frozen=True)
class Results:
    """What participants' own jobs found."""

    groups: dict[str, list[str]]
    """Names of the images' results by diagnosis."""
    people: dict[str, int]
    """Participants of each diagnosis, of whom some may have several images."""
    folders: dict[str, Path]
    quality: dict[str, dict[str, Any]]
    networks: list[Network]
    note: str
    """Says that data are simulated, or the template is the stand-in; empty otherwise."""
    excluded: Counter[str]
    """How many are left out, by part."""

    @property
    def order(self) -> list[int]:
        """Places of the networks, domain by domain."""
        known = list(DOMAINS)
        ranks = [known.index(each.domain) if each.domain in known else len(known) for each in self.networks]
        return sorted(range(len(self.networks)), key=lambda place: ranks[place])

    def title(self, group: str) -> str:
        """A group, and how many it has."""
        images = len(self.groups[group])
        several = f", {images} images" if images > self.people[group] else ""
        return f"{group} (n = {self.people[group]}{several})"


def build_view(settings: ViewSettings, participants: str, folders: list[str], outputs: list[str]) -> str:
    """Draw a picture of a cohort and write it in each format.

    Parameters
    ----------
    settings : ViewSettings
        What to draw and how large.
    participants : str
        The cohort's ``participants.tsv``, its other tables beside it.
    folders : list of str
        Folder of each functional participant.
    outputs : list of str
        Files to write; the extension decides the format.

    Returns
    -------
    str
        One line that says what was drawn.
    """
    results = read_results(participants, folders)
    draw: dict[str, Callable[[Results, float], Figure]] = {
        "connectivity": draw_connectivity,
        "networks": draw_networks,
        "quality": draw_quality,
    }
    with plt.rc_context(STYLE):
        figure = draw[settings["view"]](results, settings["width_mm"])
        save(figure, outputs, settings["dots_per_inch"])
        plt.close(figure)
    return f"{settings['view']} of {sum(results.people.values())} participants"


def read_results(participants: str, folders: list[str]) -> Results:
    """Read who is in the functional half, and the numbers of quality of each.

    Parameters
    ----------
    participants : str
        The cohort's ``participants.tsv``.
    folders : list of str
        Folder of each functional image's results.

    Raises
    ------
    UserError
        If a folder is missing, or results have different networks.
    """
    by_id = {Path(folder).name.removeprefix("sub-"): Path(folder) for folder in folders}
    diagnoses = {row["id"]: row["diagnosis"] for row in read_participants(participants)}
    rows = read_scans(participants)
    if not rows:
        raise UserError(
            f"nobody in {participants} has functional data that can be used, so there is nothing to draw: "
            "exclusions.tsv beside it has the reasons."
        )
    if missing := [row["id"] for row in rows if row["id"] not in by_id]:
        raise UserError(f"there are no results of {listed(missing)}: their own jobs have not run.")
    groups: dict[str, list[str]] = {label: [] for label in sorted({diagnoses[row["subject"]] for row in rows})}
    for row in rows:
        groups[diagnoses[row["subject"]]].append(row["id"])
    people = Counter(diagnoses[subject] for subject in {row["subject"] for row in rows})
    used = {row["id"]: by_id[row["id"]] for row in rows}
    quality = {name: read_json(folder / subject_files(name)["quality"]) for name, folder in used.items()}
    labels = {tuple(each["Spectra"]["PeakHz"]) for each in quality.values()}
    if len(labels) > 1:
        raise UserError(
            f"participants in {participants} have results of different networks: run all with one template."
        )
    first = rows[0]["id"]
    record = read_json((used[first] / subject_files(first)["timecourses"]).with_suffix(".json"))
    named = [Network(each["Label"], each["Domain"] or "") for each in record.get("Networks", [])]
    excluded = read_table(Path(participants).with_name(EXCLUSIONS))
    return Results(
        groups,
        dict(people),
        used,
        quality,
        named or [Network(label, "") for label in columns_of(used[first], first)],
        note_of(list(quality.values())),
        Counter(row[1] for row in excluded.rows),
    )


def columns_of(folder: Path, subject: str) -> list[str]:
    """Labels of a participant's networks, in order."""
    return read_table(folder / subject_files(subject)["timecourses"]).columns


def note_of(quality: list[dict[str, Any]]) -> str:
    """What a picture must say of its data: from what stands beside them, never from the config."""
    kinds = {(each.get("Template") or {}).get("Kind") for each in quality}
    simulated = any(bool(each.get("Simulated")) for each in quality)
    return note_on_data(simulated, STAND_IN_KIND if STAND_IN_KIND in kinds else None)


def _note(figure: Figure, results: Results) -> None:
    if results.note:
        figure.text(0.995, 0.004, results.note, ha="right", va="bottom", fontsize=6.5, color="#B03A00", weight="bold")


# ---------------------------------------------------------------------- connectivity


def draw_connectivity(results: Results, width_mm: float) -> Figure:
    """Mean connectivity of each group, and the difference of the first two, networks ordered by domain.

    Parameters
    ----------
    results : Results
    width_mm : float
        Of the figure.
    """
    order = results.order
    means = {group: _mean_connectivity(results, ids)[np.ix_(order, order)] for group, ids in results.groups.items()}
    names = list(means)
    pictures = [(results.title(group), means[group], False) for group in names]
    if len(names) > 1:
        pictures.append((f"{names[1]} − {names[0]}", means[names[1]] - means[names[0]], True))
    columns = min(3, len(pictures))
    lines = -(-len(pictures) // columns)
    side = width_mm / columns
    tall = 1.17 if any(each.domain for each in results.networks) else 1.26
    figure, axes = plt.subplots(
        lines, columns, figsize=(width_mm * MM, (lines * side * tall + 8) * MM), layout="constrained", squeeze=False
    )
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    limits = {
        difference: _limit([values for _, values, which in pictures if which == difference])
        for difference in {which for _, _, which in pictures}
    }
    domains = [results.networks[place].domain for place in order]
    for place, (title, values, difference) in zip(axes.flat, pictures, strict=False):
        limit = limits[difference]
        shown = np.where(np.eye(len(values), dtype=bool), np.nan, values)
        image = place.imshow(
            shown, cmap="PuOr_r" if difference else "RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        place.set_facecolor("#DDDDDD")
        place.set_title(title)
        _mark_domains(place, domains)
        alike = [np.abs(each).max() for _, each, which in pictures if which == difference]
        beyond = "both" if max(alike) > limit else "neither"
        bar = figure.colorbar(image, ax=place, orientation="horizontal", shrink=0.8, aspect=30, pad=0.02, extend=beyond)
        bar.set_label("difference of mean Fisher z" if difference else "mean Fisher z", fontsize=6)
        bar.outline.set_linewidth(0.3)
    for place in list(axes.flat)[len(pictures) :]:
        place.set_axis_off()
    _note(figure, results)
    return figure


def _limit(matrices: list[np.ndarray]) -> float:
    """End of the scale of colours: all but the largest half per cent of values lie within."""
    return max(0.05, float(np.quantile(np.abs(matrices), 0.995)))


def _mean_connectivity(results: Results, ids: list[str]) -> np.ndarray:
    total = np.zeros((len(results.networks),) * 2)
    for name in ids:
        table = read_table(results.folders[name] / subject_files(name)["connectivity"])
        total += np.array([[float(cell) for cell in row[1:]] for row in table.rows])
    return total / len(ids)


def _mark_domains(axes: Axes, domains: list[str]) -> None:
    """Lines between domains, and their short names at both edges."""
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(True)
    if not any(domains):
        every = range(0, len(domains), max(1, -(-len(domains) // 12)))
        axes.set_xticks(list(every), [str(place + 1) for place in every])
        axes.set_yticks(list(every), [str(place + 1) for place in every])
        axes.set_xlabel("network")
        return
    starts = [i for i, domain in enumerate(domains) if i == 0 or domain != domains[i - 1]]
    ends = [*starts[1:], len(domains)]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="black", linewidth=0.4)
        axes.axvline(start - 0.5, color="black", linewidth=0.4)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    names = [domains[start] for start in starts]
    axes.set_xticks(middles, names, fontsize=5.5, rotation=90)
    axes.set_yticks(middles, names, fontsize=5.5)


# ---------------------------------------------------------------------- networks


def draw_networks(results: Results, width_mm: float) -> Figure:
    """Glass brains: mean networks of each group, one row a domain, one colour a network.

    Parameters
    ----------
    results : Results
    width_mm : float
        Of the figure.
    """
    from nilearn.plotting import plot_glass_brain

    means = {group: _mean_maps(results, ids) for group, ids in results.groups.items()}
    rows = _rows(results)
    head_mm, foot_mm, name_mm = 7.0, 9.0, 26.0
    height_mm = head_mm + foot_mm + ROW_MM * len(rows)
    figure = plt.figure(figsize=(width_mm * MM, height_mm * MM))
    cell = (width_mm - name_mm) / len(means)
    for column, (group, maps) in enumerate(means.items()):
        left = (name_mm + column * cell) / width_mm
        figure.text(
            left + cell / width_mm / 2,
            1 - 4.5 / height_mm,
            results.title(group),
            ha="center",
            weight="bold",
            fontsize=8,
        )
        for line, (_, places) in enumerate(rows):
            bottom = (height_mm - head_mm - (line + 1) * ROW_MM) / height_mm
            axes = figure.add_axes((left, bottom, cell / width_mm, 0.96 * ROW_MM / height_mm))
            display = plot_glass_brain(None, figure=figure, axes=axes, display_mode="ortho", annotate=False)
            if line == 0:
                display.annotate(size=6)
            for number, place in enumerate(places):
                _fill(display, maps[..., place], NETWORK_COLOURS[number % len(NETWORK_COLOURS)])
    for line, (title, places) in enumerate(rows):
        middle = (height_mm - head_mm - (line + 0.5) * ROW_MM) / height_mm
        figure.text(3 / width_mm, middle, title, va="center", fontsize=7.5, weight="bold", linespacing=1.3)
        below = f"{len(places)} network" + "s" * (len(places) > 1)
        figure.text(3 / width_mm, middle - 6.0 / height_mm, below, va="center", fontsize=6, color="#555555")
    figure.text(
        3 / width_mm,
        5.2 / height_mm,
        "Filled where a group's mean map is above half its maximum.",
        fontsize=6,
        color="#555555",
    )
    _note(figure, results)
    return figure


def _rows(results: Results) -> list[tuple[str, list[int]]]:
    """Networks of each row: a domain, or a few of them where domains are not known."""
    if any(each.domain for each in results.networks):
        found: dict[str, list[int]] = {}
        for place in results.order:
            found.setdefault(results.networks[place].domain, []).append(place)
        return [(DOMAINS.get(name, name or "other").replace(" ", "\n"), places) for name, places in found.items()]
    places = list(range(len(results.networks)))
    parts = [places[start : start + NETWORKS_A_ROW] for start in range(0, len(places), NETWORKS_A_ROW)]
    return [(f"{part[0] + 1} to {part[-1] + 1}", part) for part in parts]


def _fill(display: Any, values: np.ndarray, colour: str) -> None:
    """Fill a map on the standard grid, where it is above half its maximum, in each view of a glass brain.

    nilearn's own contours take a second for each map, because they work on a grid of half millimetres.
    """
    highest = float(values.max())
    if highest <= 0:
        return
    millimetres = [
        STAND_IN_AFFINE[axis, axis] * np.arange(length) + STAND_IN_AFFINE[axis, 3]
        for axis, length in enumerate(values.shape)
    ]
    for direction, across, up in (("x", 1, 2), ("y", 0, 2), ("z", 0, 1)):
        seen = values.max(axis="xyz".index(direction))
        display.axes[direction].ax.contourf(
            millimetres[across], millimetres[up], seen.T, levels=[highest / 2, highest], colors=[colour], alpha=0.75
        )


def _mean_maps(results: Results, ids: list[str]) -> np.ndarray:
    """Mean of everybody's maps on the standard grid of 3 mm, one participant in memory at a time."""
    total, affine, first = np.zeros(0), np.eye(4), ""
    for name in ids:
        path = results.folders[name] / subject_files(name)["maps"]
        maps, own = read_volumes(path)
        if not first:
            total, affine, first = np.zeros(maps.shape, dtype=np.float32), own, str(path)
        elif not same_grid(maps.shape, own, total.shape, affine):
            raise UserError(f"{path} lies on another grid than {first}: set ica.grid to template, or to a voxel size.")
        total += maps
    return to_grid(total / np.float32(len(ids)), affine, STAND_IN_SHAPE, STAND_IN_AFFINE, "linear")


# ---------------------------------------------------------------------- quality


def draw_quality(results: Results, width_mm: float) -> Figure:
    """Distributions of numbers of quality, one dot an image, and how well each network matches its template.

    Parameters
    ----------
    results : Results
    width_mm : float
        Of the figure.
    """
    numbers = _numbers(results)
    matched = all("TemplateMatch" in each for each in results.quality.values())
    height_mm = 62 + 50 * matched
    figure = plt.figure(figsize=(width_mm * MM, height_mm * MM), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    grid = figure.add_gridspec(2 if matched else 1, max(1, len(numbers)), height_ratios=[1, 1] if matched else [1])
    for column, (title, values) in enumerate(numbers.items()):
        axes = figure.add_subplot(grid[0, column])
        for place, ids in enumerate(results.groups.values()):
            _dots(axes, place, np.array([values[name] for name in ids]), GROUP_COLOURS[place % len(GROUP_COLOURS)])
        axes.set_xticks(range(len(results.groups)), [f"{group}\n{len(ids)}" for group, ids in results.groups.items()])
        axes.set_xlim(-0.6, len(results.groups) - 0.4)
        axes.set_title(title)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=title.startswith("volumes")))
    if matched:
        _draw_match(figure.add_subplot(grid[1, :]), results)
    where = {"all": "altogether", "functional": "from the functional half", "structural": "from the structural half"}
    left_out = ", ".join(f"{count} {where.get(part, part)}" for part, count in sorted(results.excluded.items()))
    words = f"Left out: {left_out} (reasons in exclusions.tsv)." if left_out else "Nobody is left out."
    figure.text(0.01, 0.004, words, ha="left", va="bottom", fontsize=6.5, color="#555555")
    _note(figure, results)
    return figure


def _numbers(results: Results) -> dict[str, dict[str, float]]:
    """Numbers of quality by title and participant; those that nobody has are left out."""

    def motion(quality: dict[str, Any]) -> float | None:
        return (quality.get("Motion") or {}).get("MeanFramewiseDisplacementMm")

    def least(quality: dict[str, Any]) -> float | None:
        shares = [value for value in quality.get("Coverage", {}).values() if value is not None]
        return 100 * min(shares) if shares else None

    def median(*keys: str) -> Callable[[dict[str, Any]], float | None]:
        def found(quality: dict[str, Any]) -> float | None:
            for key in keys:
                quality = quality.get(key, {})
            values = [value for value in quality.values() if value is not None]
            return float(np.median(values)) if values else None

        return found

    ways: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "mean framewise\ndisplacement (mm)": motion,
        "volumes\nused": lambda quality: quality["Volumes"],
        "least coverage of\na network (%)": least,
        "match with template\n(median r)": median("TemplateMatch"),
        "power < 0.1 Hz over\n0.15–0.25 Hz (median)": median("Spectra", "LowToHighPower"),
    }
    table = {
        title: {name: np.nan if (value := way(quality)) is None else float(value) for name, quality in results.quality.items()}
        for title, way in ways.items()
    }  # fmt: skip
    return {title: values for title, values in table.items() if np.isfinite(list(values.values())).any()}


def _dots(axes: Axes, place: int, values: np.ndarray, colour: str) -> None:
    """One dot an image, spread sideways by rank, with median and quartiles."""
    finite = np.sort(values[np.isfinite(values)])
    if not len(finite):
        return
    spread = 0.22 * (((np.arange(len(finite)) * 0.618) % 1) - 0.5) * 2  # no random numbers: the same picture each time
    axes.plot(place + spread, finite, "o", color=colour, markersize=2.2, markeredgewidth=0, alpha=0.75)
    low, middle, high = np.quantile(finite, [0.25, 0.5, 0.75])
    axes.plot([place - 0.34, place + 0.34], [middle, middle], color="black", linewidth=0.9)
    axes.plot([place, place], [low, high], color="black", linewidth=0.6)


def _draw_match(axes: Axes, results: Results) -> None:
    """Match of each network with its reference: median and quartiles of each group."""
    order = results.order
    labels = [results.networks[place].label for place in order]
    shift = 0.7 / max(1, len(results.groups))
    for k, (group, ids) in enumerate(results.groups.items()):
        values = np.array(
            [[results.quality[name]["TemplateMatch"][label] or np.nan for label in labels] for name in ids]
        )
        low, middle, high = np.nanquantile(values, [0.25, 0.5, 0.75], axis=0)
        at = np.arange(len(labels)) + (k - (len(results.groups) - 1) / 2) * shift
        colour = GROUP_COLOURS[k % len(GROUP_COLOURS)]
        axes.vlines(at, low, high, color=colour, linewidth=0.8)
        axes.plot(at, middle, "o", color=colour, markersize=2.4, label=results.title(group))
    domains = [results.networks[place].domain for place in order]
    for i in range(1, len(order)):
        if domains[i] != domains[i - 1]:
            axes.axvline(i - 0.5, color="#BBBBBB", linewidth=0.5)
    axes.set_xticks(
        range(len(labels)),
        [label.replace("/", "/\n") for label in labels],
        rotation=90,
        fontsize=4.5 if len(labels) > 30 else 6,
    )
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_ylabel("r with the template")
    axes.set_title("Match of each network with its template: median and quartiles", loc="left")
    axes.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
