"""The stage that writes the report: figures, captions that explain them, tables to sort."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import jinja2
import numpy as np
import pandas as pd
import xarray as xr

from autospec.cohort.files import read_table
from autospec.cohort.record import read_participants, read_record
from autospec.datasets.labelled import open_labelled, subjects_of
from autospec.describe import content, effect_words, interval_words, network, performance_words
from autospec.figures.selection import shown_groups
from autospec.paths import result
from autospec.report.template import PAGE
from autospec.report.words import (
    difference_caption,
    names_of_pair,
    page_caption,
    position_caption,
    spectra_caption,
    view_words,
)
from autospec.statistics.calibration.tables import ALL, HOLM_OVER_STEPS, OVER_STEPS, read_part
from autospec.statistics.paper import WHAT_IT_IS_NOT
from autospec.statistics.table import read_confounds, read_tests, smallest_p
from autospec.storage import written_whole
from autospec.trajectories import open_trajectories


class ReportSettings(TypedDict):
    """What the stage reads from the configuration."""

    title: str
    alpha: float
    variance: str
    scale: str
    cohort: dict[str, Any] | None
    """Names of its data sets and pictures; None where there is no cohort."""
    calibration: bool
    """Whether the calibration of the tests is shown."""
    experiments: list[dict[str, Any]]


LONG = 48
"""Texts of more characters than this are broken into lines."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what is shown, and the number it sorts by."""

    text: str
    key: float | None = None

    @property
    def kind(self) -> str:
        """How the cell is set: a number, a sentence, or neither."""
        if self.key is not None:
            return "number"
        return "sentence" if len(self.text) > LONG else ""


@dataclass(frozen=True)
class Run:
    """What the tables need of a run's trajectories, which are read once and not kept."""

    experiment: dict[str, Any]
    name: str
    attrs: dict[str, Any]
    curves: xr.Dataset


def build_report(settings: ReportSettings, inputs: list[str], output: str) -> str:
    """Write the report.

    Parameters
    ----------
    settings : ReportSettings
        Titles, experiments, runs and panels.
    inputs : list of str
        Every file that is read; they stand at the paths of `autospec.paths`, below the current folder.
    output : str
        The HTML file to write.

    Returns
    -------
    str
        One line that says what the report holds.
    """
    experiments, runs = [], []
    for experiment in settings["experiments"]:
        trees = {
            run: open_trajectories(result("run", experiment=experiment["name"], run=run)) for run in experiment["runs"]
        }
        experiments.append(_experiment(experiment, trees, settings))
        runs += [Run(experiment, run, tree.attrs, tree["training"].to_dataset()) for run, tree in trees.items()]
    cohort = None if settings["cohort"] is None else describe_cohort(settings["cohort"])
    tables = [
        _table("runs", "Runs", *_runs_table(runs)),
        _table("tests", "Tests of groups", *_tests_table(runs, settings)),
        _table("families", "What was tested", *_families_table(runs)),
        *_confounds_table(settings, inputs),
        *_seeds_table(runs),
        _table("audit", "Exactness", *_audit_table(runs)),
    ]
    tables = tables if experiments else []
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(PAGE).render(
        title=settings["title"],
        warning=WHAT_IT_IS_NOT,
        experiments=experiments,
        tables=tables,
        cohort=cohort,
        calibration=describe_calibration() if settings["calibration"] else None,
    )
    with written_whole(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    panels = sum(len(experiment["panels"]) for experiment in experiments)
    more = "" if cohort is None else f"a cohort with {len(cohort['pictures'])} pictures, "
    return f"{output}: {more}{len(experiments)} figure{'s' * (len(experiments) != 1)}, {panels} panels, {len(tables)} tables, from {len(inputs)} files"


def _experiment(experiment: dict[str, Any], trees: dict[str, xr.DataTree], settings: ReportSettings) -> dict[str, Any]:
    name = experiment["name"]
    samples = open_labelled(result("dataset", dataset=experiment["dataset"]))
    panels = []
    for panel in experiment["panels"]:
        image = _embedded(result("panel", experiment=name, panel=panel["name"], extension="png"))
        caption = _caption(trees[panel["run"]], panel, name, settings)
        panels.append({"letter": panel["letter"], "content": content(panel), "caption": caption, "image": image})
    origin = "Simulated data" if samples.attrs.get("simulated") else "Real data"
    return {
        "key": experiment["key"],
        "heading": experiment["heading"],
        "title": experiment["title"],
        "data": f"{origin}: {samples.sizes['sample']} samples from {samples.attrs['source']}; "
        f"data set “{experiment['dataset']}”.",
        "image": _embedded(result("figure", figure=experiment["key"], extension="png")),
        "caption": page_caption(experiment["panels"]),
        "panels": panels,
        "supplement": _supplement(experiment),
    }


def _caption(tree: xr.DataTree, panel: dict[str, Any], experiment: str, settings: ReportSettings) -> str:
    if panel["by_position"]:
        return position_caption(tree, panel["pair"] or shown_groups(tree)[1:3])
    if panel["compare"] is None:
        return spectra_caption(tree)
    tests = read_tests(result("tests", experiment=experiment, run=panel["run"]))
    return difference_caption(
        tree,
        tests,
        _described(experiment, panel["run"]),
        panel["compare"],
        panel["test"],
        settings["variance"],
        settings["alpha"],
    )


def _described(experiment: str, run: str) -> dict[str, Any]:
    """What was tested in a run, as the table of tests is described."""
    found: dict[str, Any] = json.loads(
        Path(result("tests_described", experiment=experiment, run=run)).read_text("utf-8")
    )
    return found


def _supplement(experiment: dict[str, Any]) -> dict[str, Any] | None:
    """The pages with the comparisons of every run, which stand as a PDF beside the report."""
    key = experiment["supplement"]
    if key is None:
        return None
    runs = [network({**run, "architecture": experiment["model"]}) for run in experiment["runs"].values()]
    return {
        "link": str(Path(result("figure", figure=key, extension="pdf")).relative_to("results")),
        "caption": "holds the same comparisons of groups for every variant, marked by the paper's test as in the paper's "
        f"supplement: {'; '.join(runs)}. The table of tests below shows the valid tests beside it.",
    }


def _runs_table(runs: list[Run]) -> tuple[str, list[dict[str, Any]]]:
    rows = []
    for run in runs:
        chosen, curves = run.experiment["runs"][run.name], run.curves
        used = json.loads(Path(result("run_resources", experiment=run.experiment["name"], run=run.name)).read_text())
        rows.append(
            {
                "experiment": run.experiment["name"],
                "run": run.name,
                "task": chosen["task"],
                "hidden": " x ".join(map(str, chosen["hidden"])),
                "activation": chosen["activation"],
                "updates": curves.sizes["update"],
                "first loss": float(curves["loss"][0]),
                "final loss": float(curves["loss"][-1]),
                "final accuracy": float(curves["accuracy"][-1]) if "accuracy" in curves else np.nan,
                "held-out samples": performance_words(run.attrs.get("performance")) or "–",
                "wall seconds": used["wall_seconds"],
                "CPU seconds": used["cpu_seconds"],
                "peak memory (MiB)": used["peak_memory_mib"],
                "device": run.attrs["device"],
            }
        )
    return "Loss is that of the batch before the update; final accuracy is on the training samples.", rows


def _tests_table(runs: list[Run], settings: ReportSettings) -> tuple[str, list[dict[str, Any]]]:
    rows = []
    for run in runs:
        chance = (run.attrs.get("performance") or {}).get("at_chance")
        tests = read_tests(result("tests", experiment=run.experiment["name"], run=run.name))
        paper = tests[tests["test"] == f"paper_{settings['variance']}"]
        gradient, contrast = paper[paper["statistic"] == "gradient"], tests[tests["statistic"] == "contrast"]
        tested, none = _by_place(paper), gradient[:0]
        of_values, of_steps = (
            _by_place(gradient[gradient["step"].isna()]),
            _by_place(gradient[gradient["index"].isna()]),
        )
        valid = {test: _by_place(contrast[contrast["test"] == test]) for test in ("permutation", "refit")}
        for pair in tests[["group_a", "group_b"]].drop_duplicates().itertuples(index=False, name=None):
            for layer in paper["layer"].unique():
                place = (layer, frozenset(pair))
                if place not in tested:
                    continue
                values, steps = of_values.get(place, none), of_steps.get(place, none)
                rows.append(
                    {
                        "experiment": run.experiment["name"],
                        "run": run.name,
                        "layer": layer,
                        "group": pair[0],
                        "against": pair[1],
                        "at chance": "–" if chance is None else "yes" if chance else "no",
                        "resolved values": int((~values["below_floor"]).sum()),
                        "paper: significant values": int(values["significant"].sum()),
                        "paper: significant steps": int(steps["significant"].sum()),
                        "paper: Hedges' g": effect_words(smallest_p(values)),
                        **{key: value for test in valid for key, value in _valid(valid[test].get(place, none), test)},
                    }
                )
    test = {"student": "Student's", "welch": "Welch's"}[settings["variance"]]
    scale = "singular values" if settings["scale"] == "raw" else "logarithms of singular values"
    caption = (
        f"Of the gradient. Columns “paper”: {test} two-tailed t-test of {scale}, p < {settings['alpha']:g}, "
        "uncorrected, of resolved values alone: those that lie above the noise floor in both groups at every step and "
        f"change over training. {WHAT_IT_IS_NOT} Columns “permutation” and “refit”, the valid tests: the smallest "
        "family-wise p of the contrast's singular values, where that test applies to the run and the groups; the next table "
        "says to which family it refers, and why there is none elsewhere. A difference of groups in a network at chance is no "
        "finding. Effects, with 95 % "
        "intervals: Hedges' g of the paper's tests, elsewhere the distance from the mean over the other labellings in their standard "
        "deviations, of the value with the smallest p."
    )
    return caption, rows


def _by_place(tests: pd.DataFrame) -> dict[Any, pd.DataFrame]:
    """Rows of each layer and pair of groups, whichever stands first."""
    return {
        (layer, frozenset((group_a, group_b))): rows
        for (layer, group_a, group_b), rows in tests.groupby(["layer", "group_a", "group_b"])
    }


def _valid(contrast: pd.DataFrame, test: str) -> list[tuple[str, Any]]:
    """Smallest family-wise p of the contrast's singular values, and the effect that it stands for."""
    found = smallest_p(contrast)
    p = np.nan if found is None else float(found["p_adjusted"])
    return [(f"{test}: smallest p", p), (f"{test}: effect", effect_words(found))]


def _families_table(runs: list[Run]) -> tuple[str, list[dict[str, Any]]]:
    """To which family each corrected p refers, and why some groups have none."""
    rows = []
    for run in runs:
        for test, about in _described(run.experiment["name"], run.name)["tests"].items():
            comparisons = about.get("comparisons", {"all": about})
            refused = {name: {"messages": [f"Refused. {why}"]} for name, why in about.get("refused", {}).items()}
            for name, here in [*comparisons.items(), *refused.items()]:
                subjects = here.get("subjects", {})
                rows.append(
                    {
                        "experiment": run.experiment["name"],
                        "run": run.name,
                        "test": test,
                        "comparison": name,
                        "subjects": " and ".join(map(str, subjects.values())) or "–",
                        "labellings": str(here.get("labellings", "–")),
                        "family of the corrected p": here.get("family", "–"),
                        "balance of confounders": _balance_words(here.get("balance")),
                        "note": "; ".join(here.get("messages", [])) or "–",
                    }
                )
    caption = (
        "The tests among which each p_adjusted was corrected: by the maximum of the standardised statistics, and by Holm's "
        "method for the paper's. Where labels were drawn conditionally on confounders, their balance: the difference of the "
        "groups' means in standard deviations, observed, and in the middle 95 % of the drawn labellings."
    )
    return caption, rows


def _balance_words(balance: list[dict[str, Any]] | None) -> str:
    return (
        "; ".join(
            f"{row['comparison'] + ', ' if 'comparison' in row else ''}{row['confounder']} {row['observed']:+.2f} "
            f"(drawn {row['low']:+.2f} to {row['high']:+.2f})"
            for row in balance or []
        )
        or "–"
    )


def _seeds_table(runs: list[Run]) -> list[dict[str, Any]]:
    """Variability over initialisations, with the fits' own warnings, and intervals over subjects."""
    rows: list[dict[str, Any]] = []
    words: dict[str, None] = {}
    for run in runs:
        described = _described(run.experiment["name"], run.name)
        if "seeds" not in described:
            continue
        resampled = described["tests"].get("permutation", {}).get("population", {})
        population = resampled.get("comparisons", {})
        for each in (described["seeds"], resampled):
            words |= dict.fromkeys([each["what_it_is"]] if each else [])
        for found in described["seeds"]["layers"]:
            model, last = found["mixed_model"], found["last_step"]
            again: dict[str, Any] = next(
                (each for each in population.get(found["comparison"], []) if each["layer"] == found["layer"]), {}
            )
            rows.append(
                {
                    "experiment": run.experiment["name"],
                    "run": run.name,
                    "trainings": len(described["seeds"]["trainings"]),
                    "layer": found["layer"],
                    "comparison": found["comparison"],
                    "log2 ratio, mixed model": interval_words(model["estimate"], model["low"], model["high"]),
                    "deviation between seeds": _number(model["deviation_between_seeds"]),
                    "within a training": _number(model["deviation_within"]),
                    "log2 ratio at the last step": interval_words(
                        last["mean"], last["bootstrap_low"], last["bootstrap_high"]
                    ),
                    **{
                        f"{quantity}, subjects drawn again": interval_words(*again[name].values()) if again else "–"
                        for name, quantity in (("log2_ratio", "log2 ratio"), ("cosine", "cosine"))
                    },
                    "said by the fit": "; ".join(model["warnings"])
                    or ("converged" if model["converged"] else "did not converge"),
                }
            )
    if not rows:
        return []
    return [_table("seeds", "Seeds", " ".join(words), rows)]


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _confounds_table(settings: ReportSettings, inputs: list[str]) -> list[dict[str, Any]]:
    """Is it just motion?  The same test beside each comparison of diagnoses, next to the panels that show it."""
    rows = []
    for experiment in settings["experiments"]:
        for run in experiment["runs"]:
            kinds = ("confounds", "refit_confounds")
            paths = [result(kind, experiment=experiment["name"], run=run) for kind in kinds]
            there = [path for path in paths if path in inputs]
            if not there:
                continue
            compared = [
                (panel["letter"], panel["compare"])
                for panel in experiment["panels"]
                if panel["run"] == run and panel["compare"] is not None
            ]
            table = read_confounds(there[0])
            for found in table[table["layer"] == ""].to_dict("records"):
                shown = [letter for letter, pair in compared if found["comparison"] in names_of_pair(pair)]
                effect = [found[name] for name in ("largest_statistic", "largest_low", "largest_high")]
                rows.append(
                    {
                        "experiment": experiment["name"],
                        "run": run,
                        "panels": ", ".join(shown) or "–",
                        "comparison": found["comparison"],
                        "check": found["check"],
                        "group": found["group_a"],
                        "against": found["group_b"],
                        "subjects": "–" if pd.isna(found["n_a"]) else f"{found['n_a']} and {found['n_b']}",
                        "largest effect": interval_words(*effect),
                        "p": found["p"],
                        "balance": found["balance"] or "–",
                        "note": found["note"] or "–",
                    }
                )
    if not rows:
        return []
    caption = (
        "The same test for the diagnoses (labels), for high against low motion, for the two largest sites, for sex, for the "
        "diagnoses among subjects matched for age, sex and motion, and for diagnoses shuffled once. A difference that motion "
        "or site shows as well, or that goes away among matched subjects, is no finding about the diagnosis. Family-wise p of "
        "the whole network over the contrast's singular values and the layers' distances; effect: the largest statistic's "
        "distance from its mean over the other labellings in their standard deviations, with its 95 % interval."
    )
    return [_table("confounds", "Is it just motion?", caption, rows)]


def _audit_table(runs: list[Run]) -> tuple[str, list[dict[str, Any]]]:
    rows = []
    for run in runs:
        audit = run.attrs["audit"]
        rows.append(
            {
                "experiment": run.experiment["name"],
                "run": run.name,
                "audited steps": len(audit["steps"]),
                "largest error against float64": audit["largest_error"],
                "largest deviation of the shares' sum": audit["largest_guard_deviation"],
                "allowed deviation": audit["guard_tolerance"],
                "layers with outside gradient": len(audit["outside"]),
                "passes to find the samples' rows": audit["probe_passes"],
            }
        )
    caption = (
        "The watcher checks itself: spectra of one layer against float64 (relative to the largest singular value), and "
        "the sum of the groups' shares against the gradient that arrived (in units of rounding)."
    )
    return caption, rows


def describe_cohort(shown: dict[str, Any]) -> dict[str, Any]:
    """What the page says of the cohort: counts, pictures, exclusions, data sets, warnings; nobody's age, and no path.

    Parameters
    ----------
    shown : dict
        Names of data sets and pictures.
    """
    record = read_record(str(Path(result("participants")).parent))
    people = read_participants(result("participants"))
    simulated = record["kind"] == "simulated"
    counts = []
    for label in sorted({person["diagnosis"] for person in people}):
        group = [person for person in people if person["diagnosis"] == label]
        sexes = Counter(person["sex"] for person in group)
        counts.append(
            {
                "diagnosis": label,
                "participants": len(group),
                **{f"sex {sex}": sexes[sex] for sex in sorted({person["sex"] for person in people})},
                "functional": sum(person["functional"] == "yes" for person in group),
                "structural": sum(person["structural"] == "yes" for person in group),
            }
        )
    left_out = read_table(result("exclusions"))
    exclusions = [
        {"participant": name, "left out of": part, "reason": _without_folders(reason)}
        for name, part, reason in left_out.rows
    ]
    datasets, stand_in = [], False
    for name in shown["datasets"]:
        samples = open_labelled(result("dataset", dataset=name))
        stand_in |= bool(samples.attrs.get("stand_in_template"))
        datasets.append(
            {
                "data set": name,
                "kind": samples.attrs["kind"],
                "participants": len(set(subjects_of(samples))),
                "samples": samples.sizes["sample"],
                "one sample": f"{' x '.join(map(str, samples['x'].shape[1:]))} ({', '.join(map(str, samples['x'].dims[1:]))})",
                "template": samples.attrs.get("template") or "–",
                "data": "simulated" if samples.attrs.get("simulated") else "real",
            }
        )
    layout = f"Layout: {record['layout']}. Diagnosis: {record['diagnosis']}. Digest of the cohort: {record['digest']}."
    return {
        "simulated": simulated,
        "stand_in": stand_in,
        "warnings": [f"{words[0].upper()}{words[1:]}." for words in record.get("warnings", [])],
        "pictures": [
            {"title": title, "image": _embedded(result("view", view=view, extension="png")), "caption": caption}
            for view in shown["views"]
            for title, caption in [view_words(view, shown["views"])]
        ],
        "tables": [
            _table("participants", "Participants", layout, counts),
            _table("exclusions", "Left out", "Everybody who is not in both halves, and why.", exclusions),
            _table("datasets", "Data sets", "What networks are trained on.", datasets),
        ],
    }


def describe_calibration() -> dict[str, Any]:
    """What the page says of the calibration: its figure, and how often each test rejects in a whole run."""
    found = read_part(result("calibration"))
    families = {ALL: "whole run, family-wise", OVER_STEPS: OVER_STEPS, HOLM_OVER_STEPS: HOLM_OVER_STEPS}
    of_run = found[found["statistic"].isin([ALL, "gradient"]) & (found["step"] == ALL) & found["values"].isin(families)]
    rows = [
        {
            **{name: row[name] for name in ("data", "groups", "confounding", "task", "test")},
            "values": families[row["values"]],
            "per cent": 100 * row["rate"],
            "95 % interval": f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            "repetitions": row["repetitions"],
            "refused": row["refusals"],
            "expected": row["why"] or ("alpha" if row["expected"] == "alpha" else "–"),
        }
        for row in of_run.to_dict("records")
    ]
    described = json.loads(Path(result("calibration_described")).read_text("utf-8"))
    columns = {name: described["columns"][name] for name in ("data", "confounding")}
    caption = f"{described['method']} {'; '.join(f'{name}: {words}' for name, words in columns.items())}."
    return {
        "image": _embedded(result("calibration_figure", extension="png")),
        "table": _table("rates", "Rejections where nothing differs", caption, rows),
    }


def _without_folders(text: str) -> str:
    """A reason without the folders of the files that it names."""
    return re.sub(r"(?<![\w.])[\w.~+-]*/(?:[^\s/]+/)*(?=[^\s/])", "", text)


def _table(id: str, title: str, caption: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    cells = [[_cell(value) for value in row.values()] for row in rows]
    return {"id": id, "title": title, "caption": caption, "columns": list(rows[0]) if rows else [], "rows": cells}


def _cell(value: Any) -> Cell:
    if isinstance(value, float):
        return Cell("–" if np.isnan(value) else f"{value:.4g}", -1.0 if np.isnan(value) else value)
    return Cell(str(value), float(value)) if isinstance(value, int) else Cell(str(value))


def _embedded(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
