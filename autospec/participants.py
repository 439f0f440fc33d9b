"""Who is in the config's cohort, and what each of the jobs on it depends on: light, for Snakemake to call at start-up."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autospec import specs
from autospec.cohort.files import listed
from autospec.cohort.layouts import description_of
from autospec.cohort.record import require_kind
from autospec.cohort.selection import Cohort, candidates, freesurfer_sources, functional_files
from autospec.cohort.simulated import simulated_candidates
from autospec.cohort.simulation import SimulationSettings, require_possible
from autospec.cohort.subjects import MISSING, CohortSettings, Done, Scan
from autospec.config import (
    Config,
    FolderCohort,
    FreesurferDataset,
    Ica,
    MapsDataset,
    People,
    SimulatedCohort,
    TimeseriesDataset,
)
from autospec.errors import UserError
from autospec.freesurfer import files_of
from autospec.paths import EXTENSIONS, result

# Layouts of time courses that were computed before.
COMPUTED = ("gift", "trends")
UNSMOOTHED_FWHM_MM = 6.0


def read_cohort(config: Config) -> Cohort:
    """Find who is in the cohort, from names of files and tables.

    Parameters
    ----------
    config : Config
        With a cohort.  Relative paths start at the current folder, the analysis.

    Returns
    -------
    Cohort
        Of a simulated cohort, what it will be; its files need not be there.

    Raises
    ------
    UserError
        If the cohort cannot be used, does not fit the other settings, or results of another kind are there already.
    """
    settings = cohort_settings(config)
    if isinstance(config.cohort, SimulatedCohort):
        simulation = simulation_settings(config)
        require_possible(simulation)
        cohort = simulated_candidates(simulation, settings)
    else:
        cohort = candidates(settings)
    _require_fit(config, cohort)
    for name in config.experiments:
        if config.experiments[name].dataset in config.cohort_datasets:
            _require_groups(config, cohort, name)
    require_kind(str(Path(result("cohort")).parent), cohort.kind)
    return cohort


def _require_fit(config: Config, cohort: Cohort) -> None:
    if config.needs_networks:
        computed = config.ica.timecourses == "precomputed"
        if computed and cohort.layout not in COMPUTED:
            raise UserError(
                f"ica.timecourses is precomputed, but the layout {cohort.layout} brings images: set it to scica or atlas."
            )
        if not computed and cohort.layout in COMPUTED:
            raise UserError(
                f"the layout {cohort.layout} brings time courses that were computed before, not images: "
                "set ica.timecourses to precomputed."
            )
        silent = [each.id for each in cohort.functional if each.done.repetition_time is None]
        if computed and silent and config.ica.repetition_time is None:
            raise UserError(
                f"nothing says the time between volumes of time courses in the layout {cohort.layout}: "
                "set ica.repetition_time, in seconds."
            )
        if not cohort.functional:
            raise UserError("nobody in the cohort has functional data: leave data sets of networks out of the config.")
    for name, dataset in config.datasets.items():
        if isinstance(dataset, FreesurferDataset) and not cohort.structural:
            raise UserError(
                f"the data set '{name}' needs FreeSurfer's volumes, and nobody in the cohort has any: "
                "name SUBJECTS_DIR or tables under cohort.freesurfer."
            )
        if isinstance(dataset, MapsDataset) and any(
            scan.timecourses and not scan.maps for each in cohort.functional for scan in each.scans
        ):
            raise UserError(
                f"the data set '{name}' needs maps, and the layout {cohort.layout} brings time courses alone."
            )


def groups_in(config: Config, cohort: Cohort, dataset: str) -> dict[str, list[str]]:
    """Labels of those whose data a data set of the cohort is made from, by grouping; ``n/a`` where one is not known."""
    structural = isinstance(config.datasets[dataset], FreesurferDataset)
    people = [each.person for each in (cohort.structural if structural else cohort.functional)]
    own = ("diagnosis", "sex", "diagnosis_sex", "site")
    found = {name: [getattr(person, name) for person in people] for name in own}
    for name in cohort_settings(config)["groupings"]:
        found.setdefault(name, [person.groupings.get(name, MISSING) for person in people])
    return {name: labels for name, labels in found.items() if name != "site" or set(labels) != {MISSING}}


def compared_groups(config: Config, cohort: Cohort, experiment: str) -> dict[str, int]:
    """Participants of each group that an experiment's panels may compare, by the names that `autospec.watch` gives groups."""
    settings = config.experiments[experiment]
    there = groups_in(config, cohort, settings.dataset)
    wanted = settings.groupings or ["diagnosis"]
    columns = list(dict.fromkeys(part for each in wanted for part in each.split(" x ")))
    named = {
        name: [f"{name}={label}" if len(columns) > 1 and label != MISSING else label for label in there[name]]
        for name in columns
    }
    groups = [label for labels in named.values() for label in labels]
    for crossing in (each.split(" x ") for each in wanted if " x " in each):
        pairs = zip(*(named[part] for part in crossing), strict=True)
        groups += [MISSING if MISSING in pair else " & ".join(pair) for pair in pairs]
    return dict(sorted(Counter(label for label in groups if label != MISSING).items()))


def _require_groups(config: Config, cohort: Cohort, name: str) -> None:
    """Refuse what of an experiment the cohort's table does not have: groupings, groups, covariates, a classifier's classes."""
    experiment, there = config.experiments[name], groups_in(config, cohort, config.experiments[name].dataset)

    column = ", or name further columns of the cohort's table under cohort.groupings"

    def require(what: str, wanted: str, known: Iterable[str], else_: str = column) -> None:
        if wanted not in known:
            raise UserError(
                f"{what} names '{wanted}', but there is {listed([repr(each) for each in sorted(known)])}: correct it{else_}."
            )

    for wanted in (part for each in experiment.groupings for part in each.split(" x ")):
        require(f"experiments.{name}.groupings", wanted, there)
        if set(there[wanted]) <= {MISSING}:
            raise UserError(
                f"experiments.{name}.groupings names '{wanted}', which is not known of anybody in the cohort."
            )
    classifier = next((run for run, chosen in experiment.runs.items() if chosen.task == "classifier"), None)
    if classifier is not None and len(diagnoses := set(there["diagnosis"])) < 2:
        raise UserError(
            f"experiments.{name}.runs.{classifier} is a classifier, but everybody in the data set '{experiment.dataset}' has the "
            f"diagnosis '{min(diagnoses)}': take in a second group, by cohort.labels say, or make the run an autoencoder."
        )
    groups = compared_groups(config, cohort, name)
    for label in [label for panel in experiment.panels for label in panel.compare or ()]:
        if label not in groups:
            raise UserError(
                f"a panel of '{name}' compares the group '{label}', but the groups are {listed([repr(each) for each in groups])}: "
                "correct compare in the config."
            )
    if any(specs.tested(config, name, run) for run in experiment.runs):
        numbers = {"age", "mean_fd"}
        if isinstance(config.datasets[experiment.dataset], FreesurferDataset):
            numbers.add("intracranial_volume")
        for wanted in config.statistics.within:
            require("statistics.within", wanted, {*there, "target"})
        for wanted in config.statistics.conditional_on:
            require("statistics.conditional_on", wanted, numbers, "")


def cohort_settings(config: Config) -> CohortSettings:
    """What the readers of layouts take."""
    chosen = config.cohort
    assert chosen is not None
    source = chosen
    if isinstance(chosen, SimulatedCohort):
        people = {name: getattr(chosen, name) for name in People.model_fields}
        source = FolderCohort(kind="folder", folder=result("simulated"), layout="bids", **people)
    settings: Any = source.model_dump(mode="json", exclude={"kind"})
    return settings


def simulation_settings(config: Config) -> SimulationSettings:
    """What the simulation takes."""
    chosen = config.cohort
    assert isinstance(chosen, SimulatedCohort)
    return {
        "subjects": chosen.subjects,
        "seed": chosen.seed,
        "volumes": chosen.volumes,
        "voxel_mm": chosen.voxel_mm,
        "connectivity_effect": chosen.connectivity_effect,
        "volume_effect": chosen.volume_effect,
        "null": chosen.no_effect,
    }


def simulated_files(config: Config) -> list[str]:
    """Files of the simulated cohort that others read, beside its description, whoever of it is wanted."""
    root = Path(result("simulated"))
    everybody: CohortSettings = {
        **cohort_settings(config),
        "diagnosis": "Patient as labelled",
        "groupings": [],
    }
    cohort = simulated_candidates(simulation_settings(config), everybody)
    files = [str(root / name) for name in ("participants.tsv", "truth/truth.json")]
    for each in cohort.participants:
        files += functional_files(each) + files_of(each.freesurfer)
    return files


# ---------------------------------------------------------------------- one participant


def simulated_description() -> str:
    """The file that says that the cohort is simulated."""
    return f"{result('simulated')}/dataset_description.json"


def names_of_images(cohort: Cohort) -> str:
    """Pattern of the names of the functional images' results; it fits nothing where there is none."""
    return "|".join(map(re.escape, cohort.scans)) or "(?!)"


def subject_files(config: Config, cohort: Cohort, name: str) -> dict[str, list[str]]:
    """Files that an image's own job reads, by what they are.

    Parameters
    ----------
    config : Config
    cohort : Cohort
    name : str
        Of the job's results, without ``sub-``: a participant's id, and where several images of somebody are taken the
        session and the run.
    """
    _, scan = cohort.scans[name]
    if scan.bold:
        found = {"bold": scan.bold, "confounds": scan.confounds, "sidecar": scan.sidecar}
        found["template"] = _template_file(config)
        found["atlas"] = config.ica.atlas or ""
        found["mask"] = result("gift_mask") if config.ica.mask == "gift" and not config.ica.atlas else ""
    else:
        kinds = ("timecourses", "maps", "mask", "components")
        found = {kind: getattr(scan, kind) for kind in kinds}
    found["description"] = _description(config, scan)
    return {kind: [file] if file else [] for kind, file in found.items()}


def _template_file(config: Config) -> str:
    return config.template if config.template != "stand-in" and config.ica.timecourses == "scica" else ""


def _description(config: Config, scan: Scan) -> str:
    if isinstance(config.cohort, SimulatedCohort):
        return simulated_description()
    found = description_of(scan.file)
    # Relative where the cohort is, so that an analysis that moved with its data is the same one.
    return os.path.relpath(found) if found and not Path(scan.file).is_absolute() else found


def subject_settings(config: Config, cohort: Cohort, subject: str) -> dict[str, Any]:
    """Settings of an image's own job, by the name of its results; its files are the rule's inputs.

    Who moved too much, or has too few volumes, is decided where the cohort comes together, so that another limit
    does not find anybody's networks again.  What happens to bad data is no setting of the job either: it changes nothing
    that a good one writes.
    """
    (participant, scan), ica = cohort.scans[subject], config.ica
    if ica.timecourses == "precomputed":
        chosen = timecourse_settings(ica, participant.done, image=False)
        return {"subject": subject, "position": scan.position, "ica": chosen}
    if ica.timecourses == "atlas":
        return {"subject": subject, "stand_in": False, "ica": timecourse_settings(ica, participant.done)}
    number = list(cohort.scans).index(subject) + 1 if ica.gift_files else None
    return {
        "subject": subject,
        "stand_in": not _template_file(config),
        "ica": network_settings(ica, participant.done, number),
    }


def timecourse_settings(ica: Ica, done: Done, image: bool = True) -> dict[str, Any]:
    """Settings of a participant's job, wherever the time courses come from.

    Parameters
    ----------
    ica : Ica
        The config's.
    done : Done
        What was done to the data before.
    image : bool
        Whether there is an image to smooth and to take confounds from.
    """
    smoothing = ica.smoothing_fwhm_mm
    if smoothing is None:
        smoothing = UNSMOOTHED_FWHM_MM if done.smoothing_mm == 0 else 0.0
    return {
        "drop_volumes": ica.drop_volumes,
        "smoothing_fwhm_mm": smoothing if image else 0.0,
        "confounds": ica.confounds if image else "none",
        "repetition_time": ica.repetition_time or done.repetition_time,
        "min_volumes": 0,
        "max_mean_fd_mm": None,
        # GIFT's scaling comes later and starts from maps that are not scaled.
        "scaling": "z-score" if ica.scaling == "z-score" else "none",
        "despike": ica.despike,
        "low_pass_hz": ica.low_pass_hz,
        "already_done": done.record,
    }


def network_settings(ica: Ica, done: Done, number: int | None = None) -> dict[str, Any]:
    """Settings of a participant's job that finds networks with a template.

    Parameters
    ----------
    ica : Ica
        The config's.
    done : Done
        What was done to the data before.
    number : int or None
        The participant's in GIFT's file names; None writes none.
    """
    return {
        **timecourse_settings(ica, done),
        "grid": ica.grid,
        "confounds_on": ica.confounds_on,
        "preprocessing": ica.preprocessing,
        "dtype": "float32",
        "converged": ica.converged,
        "min_coverage": ica.min_coverage,
        "gift_number": number,
    }


# ---------------------------------------------------------------------- the cohort as a whole


def folders(config: Config, cohort: Cohort) -> list[str]:
    """Folder of each functional image's own job; none where no networks are sought."""
    return [result("ica", subject=name) for name in cohort.scans] if config.needs_networks else []


def cohort_files(config: Config, cohort: Cohort) -> list[str]:
    """Files that the cohort's tables are made from, beside the participants' folders."""
    files = [cohort.table]
    for each in cohort.participants:
        read = functional_files(each)
        if config.needs_networks:  # their content is known to the participants' own jobs
            read = [scan.confounds for scan in each.scans if scan.confounds]
        files += read
    files += volume_files(cohort)
    if isinstance(config.cohort, SimulatedCohort):
        files.append(simulated_description())
    return [file for file in dict.fromkeys(files) if file]


def volume_files(cohort: Cohort) -> list[str]:
    """Files that a data set of volumes is made from."""
    return files_of(dict.fromkeys(place for each in cohort.structural for place in each.freesurfer))


def tables() -> list[str]:
    """The cohort's own tables."""
    return [result(kind) for kind in ("participants", "participants_described", "scans", "exclusions", "cohort")]


def shared_settings(config: Config, cohort: Cohort) -> dict[str, Any]:
    """Settings of the job that writes the cohort's tables."""
    return {
        "cohort": _with_layout(config, cohort),
        "networks": config.needs_networks,
        "drop_volumes": config.ica.drop_volumes if config.needs_networks else 0,
    }


def gift_mask_settings(config: Config, cohort: Cohort) -> dict[str, Any]:
    """Settings of the job that makes GIFT's mask."""
    return {"cohort": _with_layout(config, cohort)}


def _with_layout(config: Config, cohort: Cohort) -> dict[str, Any]:
    """What the readers of layouts take, with the layout that was found: to name it, or to leave it to `auto`, is no change."""
    return {**cohort_settings(config), "layout": cohort.layout}


def images(cohort: Cohort) -> list[str]:
    """Every functional image."""
    return [scan.bold for each in cohort.functional for scan in each.scans]


# ---------------------------------------------------------------------- data sets and pictures


def dataset_settings(config: Config, name: str) -> dict[str, Any]:
    """Settings of the job that builds a data set of the cohort."""
    dataset = config.datasets[name]
    if isinstance(dataset, TimeseriesDataset):
        return {"name": name, "length": dataset.length, "courses": "cleaned" if dataset.cleaned else "timecourses"}
    if isinstance(dataset, MapsDataset):
        scaled = config.ica.timecourses == "scica" and config.ica.scaling != "none"
        return {
            "name": name,
            "aggregate": dataset.aggregate,
            "voxel_mm": dataset.voxel_mm,
            "standardise": not scaled,
        }
    assert isinstance(dataset, FreesurferDataset)
    # Everybody: each training fits line and scale again, to those whom it trains on.
    return {
        "name": name,
        "icv": dataset.icv,
        "training": None,
        "sources": _sources(config),
    }


def _sources(config: Config) -> list[str]:
    if isinstance(config.cohort, SimulatedCohort):
        return [f"{result('simulated')}/sourcedata/freesurfer"]
    return freesurfer_sources(cohort_settings(config))


def pictures(config: Config) -> list[str]:
    """Every picture of the cohort."""
    return [result("view", view=view, extension=kind) for view in specs.views(config) for kind in EXTENSIONS]


def view_settings(config: Config, view: str) -> dict[str, Any]:
    """Settings of the job that draws a picture of the cohort."""
    return {"view": view, "dots_per_inch": config.figures.dots_per_inch, "width_mm": config.figures.panel_width_mm}


def everything(config: Config) -> list[str]:
    """All that is made of a cohort: its tables, pictures, networks and data sets."""
    wanted = tables() + pictures(config) + [result("dataset", dataset=name) for name in config.datasets]
    if config.needs_networks and config.ica.timecourses == "scica" and config.ica.scaling == "gift":
        wanted.append(result("gift_maps"))
    return wanted
