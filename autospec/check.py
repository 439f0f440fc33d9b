"""``autospec check``: what an analysis would use of its cohort, said before any job."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from autospec import inputs
from autospec.cohort.check import Report, check_cohort, planned_cohort
from autospec.cohort.files import listed
from autospec.cohort.images import Header
from autospec.cohort.selection import Cohort
from autospec.cohort.simulated import coarse_brain
from autospec.cohort.simulation import REPETITION_TIME
from autospec.cohort.subjects import MISSING
from autospec.config import Config, FreesurferDataset, MapsDataset, SimulatedCohort, TimeseriesDataset, load_config
from autospec.datasets.maps import coarser_grid
from autospec.datasets.split import held_out_rows
from autospec.errors import UserError
from autospec.freesurfer import read_volumes
from autospec.ica.cleaning import least_volumes
from autospec.ica.template import Template, analysis_grid, coverage, fixed_mask, load_template, on_grid
from autospec.participants import cohort_settings, compared_groups, dataset_settings, read_cohort, simulation_settings
from autospec.specs import tested

MUCH = 0.99
"""Share of a network below which an image is said to cut it."""


def check_analysis(folder: str) -> str:
    """Say what an analysis would use of its cohort.

    Parameters
    ----------
    folder : str
        The analysis, with its ``config.yaml``.

    Returns
    -------
    str
        Lines for a person to read: who takes part and who does not, grids, times, what the template covers, predicted
        time and disk, data sets.

    Raises
    ------
    UserError
        If the config, the cohort or the template cannot be used, or a data set cannot be made.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}: make an analysis with autospec init.")
    with contextlib.chdir(folder):
        config = load_config("config.yaml")
        if config.cohort is None:
            raise UserError(f"{folder}/config.yaml names no cohort, so there is nothing to check: see docs/cohort.md.")
        inputs.require_files(config)
        cohort = read_cohort(config)
        template = load_template(config.template) if _seeks(config) else None
        drop_volumes = config.ica.drop_volumes if config.needs_networks else 0
        if config.cohort.kind == "simulated" and not Path(cohort.table).is_file():
            header = _planned_header(config)
            report = planned_cohort(
                cohort,
                header,
                REPETITION_TIME,
                _networks(config, template),
                _voxel_mm(config, template),
                drop_volumes,
            )
            lines = ["not there yet: simulated data, which the workflow will write", *report.lines()]
        else:
            report = check_cohort(
                cohort_settings(config),
                _networks(config, template),
                _voxel_mm(config, template),
                config.ica.repetition_time,
                drop_volumes,
                partial(least_volumes, cutoff=config.ica.low_pass_hz) if config.needs_networks else None,
                config.ica.confounds if config.needs_networks else "none",
                own_grids=template is not None and config.ica.grid == "data",
            )
            lines = report.lines()
        _require_data_sets(config, template, report)
        if template is not None:
            lines += _template_lines(config, template, report)
        lines += _group_lines(config, replace(cohort, participants=report.participants))
    sets = ", ".join(f"{name} ({dataset.kind})" for name, dataset in config.datasets.items())
    return "\n".join([*lines, f"data sets: {sets or 'none'}"])


def _require_data_sets(config: Config, template: Template | None, report: Report) -> None:
    """Refuse data sets that cannot be made: their own jobs would say so only after everybody's networks."""
    for name, dataset in config.datasets.items():
        if isinstance(dataset, FreesurferDataset) and not isinstance(config.cohort, SimulatedCohort):
            read_volumes(dataset_settings(config, name)["sources"])
        if isinstance(dataset, TimeseriesDataset) and dataset.length is not None and report.volumes is not None:
            fewest = report.volumes[0]
            if fewest < dataset.length:
                raise UserError(
                    f"datasets.{name}.length is {dataset.length}, but the shortest series has {fewest} time points: lower it, or "
                    "set cohort.min_volumes so that it is left out."
                )
        if isinstance(dataset, MapsDataset) and dataset.voxel_mm is not None and template is not None:
            try:
                coarser_grid(*analysis_grid(config.ica.grid, template, None), dataset.voxel_mm)
            except UserError as error:
                raise UserError(f"datasets.{name} cannot be made: {error}") from None


def _group_lines(config: Config, cohort: Cohort) -> list[str]:
    """Warn of comparisons that will not be tested, for want of participants whom a network is trained on."""
    found = []
    least = config.statistics.minimum_group_size
    for name, experiment in config.experiments.items():
        if experiment.dataset not in config.cohort_datasets:
            continue
        groups = compared_groups(config, cohort, name)
        for panel in experiment.panels:
            if not panel.compare or not tested(config, name, panel.run):
                continue
            try:
                trained = compared_groups(config, _trained_on(config, cohort, name, panel.run), name)
            except UserError as error:
                found.append(f"warning: '{name}': {error}")
                continue
            for label in sorted(panel.compare):
                count, left = groups.get(label, 0), trained.get(label, 0)
                if left < least:
                    kept = f" ({left} without those whom training.held_out keeps from training)" if left < count else ""
                    found.append(
                        f"warning: '{name}' compares '{label}', of whom there are {count}{kept}: groups of fewer than "
                        f"statistics.minimum_group_size ({least}) are not tested"
                    )
    unknown = [each.id for each in cohort.participants if each.person.age == MISSING]
    if "age" in config.statistics.conditional_on and unknown:
        found.append(
            f"warning: statistics.conditional_on names age, which is not known of {listed([f'sub-{name}' for name in unknown])}: "
            "comparisons that they are in have no p"
        )
    return list(dict.fromkeys(found))


def _trained_on(config: Config, cohort: Cohort, experiment: str, run: str) -> Cohort:
    """The participants of an experiment's data set whom a run does not hold out."""
    structural = isinstance(config.datasets[config.experiments[experiment].dataset], FreesurferDataset)
    people = cohort.structural if structural else cohort.functional
    training = config.training_of(experiment, run)
    held_out = held_out_rows(
        [each.id for each in people],
        [each.person.diagnosis for each in people],
        training.held_out,
        training.split_seed,
    )
    return replace(cohort, participants=[each for each, held in zip(people, held_out, strict=True) if not held])


def _seeks(config: Config) -> bool:
    return config.needs_networks and config.ica.timecourses == "scica"


def _networks(config: Config, template: Template | None) -> int:
    """Least number of volumes that networks need."""
    return 1 if template is None else len(template.networks)


def _voxel_mm(config: Config, template: Template | None) -> float | None:
    if template is None or config.ica.grid == "data":
        return None
    if config.ica.grid == "template":
        return float(np.abs(np.linalg.det(template.affine[:3, :3])) ** (1 / 3))
    return float(config.ica.grid)


def _planned_header(config: Config) -> Header:
    """What the header of each image of a simulated cohort will say."""
    settings = simulation_settings(config)
    edge = settings["voxel_mm"]
    brain = coarse_brain(edge)
    return Header("", brain.shape, settings["volumes"], (edge, edge, edge), brain.affine, simulated=True, warnings=[])


def _template_lines(config: Config, template: Template, report: Report) -> list[str]:
    """What the template is, on which grid it is used, and what of it the images can show."""
    lines = [f"template: {template.source}, {template.kind}, {len(template.networks)} networks"]
    lines += [f"warning: {warning}" for warning in template.warnings]
    if config.ica.grid != "data":
        shape, affine = analysis_grid(config.ica.grid, template, None)
        mask = fixed_mask(template, on_grid(template, shape, affine), affine)
        edges = " x ".join(f"{edge:g}" for edge in np.linalg.norm(affine[:3, :3], axis=0))
        lines.append(
            f"analysis grid: {' x '.join(map(str, shape))} voxels of {edges} mm, {int(mask.sum())} of them in the mask"
        )
    seen: list[tuple[tuple[int, int, int], np.ndarray]] = []
    for header in report.headers:
        if any(shape == header.shape and np.allclose(affine, header.affine, atol=1e-3) for shape, affine in seen):
            continue
        seen.append((header.shape, header.affine))
        shares = coverage(template, np.ones(header.shape, dtype=bool), header.affine)
        worst = int(shares.argmin())
        lines.append(
            f"template coverage of {header.grid}: at least {100 * shares[worst]:.0f} % of each network"
            f" ({template.labels[worst]} least)"
        )
        lost = [label for label, share in zip(template.labels, shares, strict=True) if share < config.ica.min_coverage]
        if lost:
            lines.append(f"warning: such images cover less than min_coverage of {listed(lost)}")
        elif shares[worst] < MUCH:
            cut = [label for label, share in zip(template.labels, shares, strict=True) if share < MUCH]
            lines.append(f"warning: such images cut {len(cut)} networks ({listed(cut)})")
    return lines
