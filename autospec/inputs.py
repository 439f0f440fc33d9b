"""Which results each rule reads, where a wildcard alone does not say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from autospec import custom_model, specs
from autospec.config import Config
from autospec.errors import UserError
from autospec.paths import EXTENSIONS, PAGE_EXTENSIONS, PATHS, result


def require_files(config: Config) -> None:
    """Check that every file of the user's that the config names is there.

    Raises
    ------
    UserError
        If one is missing; relative paths are relative to the current folder, the analysis.
    """
    get = " NeuroMark 1.0 comes with autospec fetch-template; stand-in needs no file."
    for key, path in (("template", config.ica.template), ("atlas", config.ica.atlas)):
        if config.needs_networks and path not in (None, "stand-in") and not Path(path).is_file():
            raise UserError(
                f"ica.{key} names the file {path}, which does not exist (looked in {Path.cwd()}): correct the path in "
                f"the config; relative paths start at the analysis folder.{get if key == 'template' else ''}"
            )
    for path in config.models.values():
        custom_model.require_class(path)
    for name in config.datasets:
        for path in specs.dataset_files(config, name):
            if not Path(path).is_file():
                raise UserError(
                    f"the data set '{name}' needs the file {path}, which does not exist (looked in {Path.cwd()}): "
                    "correct the path in the config; relative paths start at the analysis folder."
                )


def unknown_target(config: Config, target: str) -> str | None:
    """Say what a target names that the config does not have: a figure, an experiment, or a name in a result's path.

    Parameters
    ----------
    config : Config
    target : str
        What somebody asks Snakemake for: ``figure_1``, ``experiment_mnist_mlp``, or the path of a result.

    Returns
    -------
    str or None
        One sentence that lists what there is; None for every other target, of which Snakemake knows more.
    """
    if re.fullmatch("(figure|experiment)_[A-Za-z0-9_]+", target):
        there = [f"{kind}_{name}" for kind in ("figure", "experiment") for name in _names(config, kind, "") or []]
        return None if target in there else f"this config has no target '{target}': it has {', '.join(there)}."
    names = _names_in(target)
    for kind, name in names.items():
        known = _names(config, kind, names.get("experiment", ""))
        if known is not None and name not in known:
            return f"this config has no {kind} '{name}', which {target} needs: it has {', '.join(known) or 'none'}."
    return None


def _names_in(path: str) -> dict[str, str]:
    """Names that a result's path is made of, by kind, such as ``{"experiment": "mnist_mlp"}``; none for other paths."""
    for template in PATHS.values():
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[A-Za-z0-9_-]+)", re.escape(template))
        if found := re.fullmatch(pattern, path):
            return found.groupdict()
    return {}


def _names(config: Config, kind: str, experiment: str) -> list[str] | None:
    """The config's names of a kind, those of runs and panels in one experiment; None where others know them."""
    match kind:
        case "dataset":
            return list(config.datasets)
        case "experiment":
            return list(config.experiments)
        case "figure":
            return sorted(figures(config), key=lambda figure: figures(config)[figure][1])  # supplements last
        case "run":
            return [run for name, run in every_run(config) if name == experiment]
        case "panel":
            return specs.panel_names(config, experiment)
        case _:
            return None


def names_of(config: Config, kind: str) -> str:
    """Pattern of the names of the data sets of one kind; it fits nothing where there is none."""
    names = [re.escape(name) for name, dataset in config.datasets.items() if dataset.kind == kind]
    return "|".join(names) or "(?!)"


def dataset_of(config: Config, experiment: str) -> str:
    """The labelled data set that an experiment trains on."""
    return result("dataset", dataset=config.experiments[experiment].dataset)


def of_every_seed(config: Config, kind: str, experiment: str, run: str) -> list[str]:
    """Results of a run from each of its seeds."""
    return [result(kind, experiment=experiment, run=name) for name in specs.runs_of(config, experiment, run)]


def refit_parts(config: Config, experiment: str, run: str) -> list[str]:
    """Refits of a run from each of its seeds, in parts."""
    return [
        result("refits", experiment=experiment, run=name, part=part)
        for name in specs.runs_of(config, experiment, run)
        for part in specs.refit_parts(config, experiment)
    ]


def tests_found(config: Config, test: str, experiment: str, run: str) -> list[str]:
    """Table and description of a run's permutation test, or refit; empty where it is not made."""
    made = (
        config.experiments[experiment].runs[run].refit if test == "refit" else specs.permuted(config, experiment, run)
    )
    return [result(kind, experiment=experiment, run=run) for kind in (test, f"{test}_described")] if made else []


def null_kept(config: Config, experiment: str, run: str) -> list[str]:
    """The statistics of every permutation of a run; empty where they are not kept, or labels are not permuted."""
    kept = config.statistics.keep_null and specs.permuted(config, experiment, run)
    return [result("permutation_null", experiment=experiment, run=run)] if kept else []


def refit_confounds(config: Config, experiment: str, run: str) -> list[str]:
    """What a run's refits say on motion and the like; empty where there are none, or nobody asks."""
    made = config.experiments[experiment].runs[run].refit and config.statistics.confounds
    return [result("refit_confounds", experiment=experiment, run=run)] if made else []


def confounds_of(config: Config, experiment: str, run: str) -> list[str]:
    """The table that asks whether a run's differences are just motion; empty where nobody asks."""
    settings = config.experiments[experiment]
    if not config.statistics.confounds or settings.dataset not in config.cohort_datasets:
        return []
    if specs.permuted(config, experiment, run):
        return [result("confounds", experiment=experiment, run=run)]
    return refit_confounds(config, experiment, run)


def of_panels(config: Config, kind: str, experiment: str) -> list[str]:
    """Trajectories of the runs that an experiment's panels draw, or tests of those in which two groups are compared."""
    panels = config.experiments[experiment].panels
    needed = [panel.run for panel in panels if kind == "run" or panel.compare is not None]
    return [result(kind, experiment=experiment, run=run) for run in dict.fromkeys(needed)]


def of_figure(config: Config, kind: str, figure: str) -> list[str]:
    """Trajectories, or tests, of the runs that a figure's panels draw; of every run for a supplement."""
    name, supplement = figures(config)[figure]
    if supplement:
        return [result(kind, experiment=name, run=run) for run in config.experiments[name].runs]
    return of_panels(config, kind, name)


def figure_settings(config: Config, figure: str) -> dict[str, Any]:
    """Settings of the job that composes a figure or a supplement."""
    name, supplement = figures(config)[figure]
    return (specs.supplement_settings if supplement else specs.figure_settings)(config, name)


def figures(config: Config) -> dict[str, tuple[str, bool]]:
    """The experiment of each figure's name, and whether it is a supplement; an unknown name is a missing input."""
    found = {}
    for name, experiment in config.experiments.items():
        found[experiment.figure_name(name)] = (name, False)
        if supplement := experiment.supplement_name(name):
            found[supplement] = (name, True)
    return found


def every_run(config: Config) -> list[tuple[str, str]]:
    """Every training: experiment and run, further seeds included."""
    return [
        (name, each)
        for name, experiment in config.experiments.items()
        for run in experiment.runs
        for each in specs.runs_of(config, name, run)
    ]


def of_summary(config: Config) -> list[str]:
    """Trajectories of every training and tests of every run."""
    runs = [result("run", experiment=name, run=run) for name, run in every_run(config)]
    tests = [
        result("tests", experiment=name, run=run) for name, each in config.experiments.items() for run in each.runs
    ]
    return [*runs, *tests]


def pages(config: Config) -> list[str]:
    """Every composed page, in every format."""
    return [
        result("figure", figure=figure, extension=extension)
        for figure in figures(config)
        for extension in PAGE_EXTENSIONS
    ]


def panels(config: Config, experiment: str) -> list[str]:
    """Every panel of an experiment on its own, in every format."""
    names = specs.panel_names(config, experiment)
    return [result("panel", experiment=experiment, panel=name, extension=kind) for name in names for kind in EXTENSIONS]


def of_experiment(config: Config, experiment: str) -> list[str]:
    """Everything that belongs to an experiment: its pages, its panels and every run's tests."""
    settings = config.experiments[experiment]
    of_it = [figure for figure, (name, _) in figures(config).items() if name == experiment]
    return [
        *(result("figure", figure=figure, extension=extension) for figure in of_it for extension in PAGE_EXTENSIONS),
        *panels(config, experiment),
        *(result("tests", experiment=experiment, run=run) for run in settings.runs),
    ]


def of_report(config: Config) -> list[str]:
    """Everything that the report shows."""
    paths = [
        result("figure", figure=figure, extension="pdf" if supplement else "png")
        for figure, (_, supplement) in figures(config).items()
    ]
    if config.cohort is not None:
        paths += [result(kind) for kind in ("participants", "exclusions", "cohort")]
        paths += [result("view", view=view, extension="png") for view in specs.views(config)]
        paths += [result("dataset", dataset=name) for name in config.cohort_datasets]
    for name, experiment in config.experiments.items():
        paths.append(result("dataset", dataset=experiment.dataset))
        paths += [path for path in panels(config, name) if path.endswith(".png")]
        for run in experiment.runs:
            kinds = ("run", "run_resources", "tests", "tests_described")
            paths += [result(kind, experiment=name, run=run) for kind in kinds]
            paths += confounds_of(config, name, run)
    if config.calibration.in_report:
        paths += [result("calibration"), result("calibration_described"), result("calibration_figure", extension="png")]
    return list(dict.fromkeys(paths))
