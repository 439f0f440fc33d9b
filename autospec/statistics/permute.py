"""The stage that tests groups by permuting labels, with the weights as they were at some updates of a training."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from autospec.datasets.labelled import open_labelled, samples_with, subjects_of
from autospec.errors import UserError
from autospec.introspection.generators import restore_random_state
from autospec.introspection.sample_shares import SampleShares, sample_shares
from autospec.statistics import confounds as checks
from autospec.statistics import subjects
from autospec.statistics.permutation_test import NullDistributions, Tests, average_over_seeds, evaluate
from autospec.statistics.permutations import compare, draw_conditional_labellings, draw_labellings
from autospec.statistics.study import Question, Study, columns_of, exchangeable, grouped, numbers_of
from autospec.statistics.table import COLUMNS, comparison_name, read_confounds, write_description, write_tests
from autospec.storage import write_packed
from autospec.training.prepare import Prepared, prepare
from autospec.training.progress import Progress
from autospec.training.snapshots import Snapshots, open_snapshots

TEST = "permutation"


class PermutationSettings(TypedDict):
    """What the stage reads from the configuration."""

    name: str
    alpha: float
    permutations: int
    seed: int
    within: list[str]
    conditional_on: list[str]
    minimum_group_size: int
    confounds: bool
    keep_null: bool


class Outputs(TypedDict):
    """Files that the stage writes; each appears whole or not at all."""

    table: str
    described: str
    confounds: str
    null: str | None


@dataclass
class Plan:
    """What is tested, and what is not and why."""

    questions: list[Question] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def build_permutation(
    settings: PermutationSettings,
    code: str,
    dataset: str,
    weights: Sequence[str],
    outputs: Outputs,
    work: str,
    refit: str | None = None,
) -> str:
    """Test every pair of groups of a run whose labels may be exchanged, and write the tables.

    Parameters
    ----------
    settings : PermutationSettings
        How labels are permuted.
    code : str
        Fingerprint of the code, so that an interrupted test is continued by the same code alone.
    dataset : str
        The labelled data set.
    weights : sequence of str
        Weights of the run from each of its seeds; the statistics are averaged over them.
    outputs : Outputs
        Files to write.
    work : str
        Folder in which finished steps are kept until all are.
    refit : str, optional
        What refits of the run say in the table that asks whether it is just motion.

    Returns
    -------
    str
        One line that says what was tested.

    Raises
    ------
    UserError
        If the settings name a grouping or covariate that the data set lacks, or the weights belong to another data set.
    """
    runs = [open_snapshots(path) for path in weights]
    digest, *of_weights = (file_digest(path) for path in (dataset, *weights))
    for path, run in zip(weights, runs, strict=True):
        if not digest.startswith(run.data):
            raise UserError(f"{path} was trained on other data than {dataset}: train the run again.")
    prepared = [prepare(run.settings, dataset, torch.device("cpu")) for run in runs]
    study = study_of(open_labelled(dataset), prepared[0], runs[0])
    plan = plan_questions(study, settings)
    of_refits = read_confounds(refit) if refit else None
    asked = checks.questions(study, plan.questions, settings, of_refits) if settings["confounds"] else []
    questions = [*plan.questions, *(check.question for check in asked if check.question is not None)]
    identity = json.dumps([settings, code, digest, of_weights], sort_keys=True)
    folder = Path(work) / settings["name"] / f"permutation-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    distributions = null_distributions(questions, runs, prepared, folder, settings["name"])
    found = [
        evaluate(each, alpha=settings["alpha"], comparisons=len(plan.questions))
        for each in distributions[: len(plan.questions)]
    ]
    tables = [tests.table for tests in found]
    write_tests(pd.concat(tables) if tables else pd.DataFrame(columns=list(COLUMNS)), outputs["table"])
    description = describe(plan, distributions, found, runs, settings)
    if len(runs) > 1:
        description["population"] = describe_population(plan, runs, prepared, settings["seed"])
    write_description(description, outputs["described"])
    checks.write(asked, distributions[len(plan.questions) :], settings["alpha"], outputs["confounds"])
    if outputs["null"]:
        write_packed(null_tree(distributions[: len(plan.questions)]), outputs["null"])
    shutil.rmtree(folder, ignore_errors=True)
    pairs = f"{len(plan.questions)} {'pair' if len(plan.questions) == 1 else 'pairs'}"
    return f"{settings['name']}: {pairs} of groups tested by permutation, {len(plan.refused)} refused"


def file_digest(path: str) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def study_of(samples: xr.Dataset, prepared: Prepared, run: Snapshots) -> Study:
    """Take the samples that a network was trained on, with what is known of them."""
    trained = samples_with(samples, set(prepared.training.ids))
    return Study(
        run.settings["task"],
        np.array([str(label) for label in trained["target"].values], dtype=object),
        subjects_of(trained),
        trained,
        grouped(prepared.groups(), prepared.crossed),
    )


def plan_questions(study: Study, settings: PermutationSettings) -> Plan:
    """Decide which pairs of groups can be tested, and draw their labellings.

    A pair is refused, with a sentence, where the network has seen its labels, where a group is too small, or where no
    other labelling is possible.  A classifier's labels are exchanged within its targets.
    """
    strata = columns_of(study.samples, settings["within"], "statistics.within")
    numbers = numbers_of(study.samples, settings["conditional_on"], "statistics.conditional_on")
    if study.task == "classifier":
        strata = {**strata, "target": list(study.target)}
    plan = Plan()
    for grouping in study.groupings:
        for a, b in grouping.pairs:
            why_not = exchangeable(study.task, study.target, grouping.labels, a, b)
            if not why_not:
                try:
                    plan.questions.append(_question(study, grouping.labels, (a, b), strata, numbers, settings))
                except UserError as error:
                    why_not = f"{str(error)[0].upper()}{str(error)[1:]}"
            if why_not:
                plan.refused[comparison_name(a, b)] = why_not
    return plan


def _question(
    study: Study,
    labels: np.ndarray,
    pair: tuple[str, str],
    strata: Mapping[str, Sequence[str | None]],
    numbers: Mapping[str, np.ndarray],
    settings: PermutationSettings,
) -> Question:
    comparison = compare(labels, *pair, subjects=study.subjects, strata=strata, minimum=settings["minimum_group_size"])
    count, seed = settings["permutations"], settings["seed"]
    if numbers:
        return Question(comparison, draw_conditional_labellings(comparison, numbers, count, seed))
    return Question(comparison, draw_labellings(comparison, count, seed))


def null_distributions(
    questions: Sequence[Question], runs: Sequence[Snapshots], prepared: Sequence[Prepared], folder: Path, name: str
) -> list[NullDistributions]:
    """Compute every question's statistics at every kept update, averaged over seeds.

    Each update's shares are computed once for all questions.  Finished updates are kept in the folder.
    """
    of_seeds: list[list[NullDistributions]] = []
    progress, done = Progress(name, sum(len(run.steps) for run in runs)), 0
    for number, (run, setting) in enumerate(zip(runs, prepared, strict=True)):
        found = []
        for place, question in enumerate(questions):
            checkpoint = folder / f"seed-{number}" / f"comparison-{place}"
            found.append(NullDistributions(question.comparison, question.labellings, question.statistics, checkpoint))
        for step in run.steps:
            if any(step not in each.steps for each in found):
                shares = shares_at(run, setting, step)
                for each in found:
                    each.add(step, shares)
                progress.show(done, "labels permuted")
            done += 1
        of_seeds.append(found)
    return [average_over_seeds(each) for each in zip(*of_seeds, strict=True)]


def shares_at(run: Snapshots, prepared: Prepared, step: int) -> dict[str, SampleShares]:
    """Each training sample's share of every gradient, with the weights as they were before an update.

    Raises
    ------
    UserError
        If no weights were kept before that update.
    """
    prepared.model.load_state_dict(run.weights(step))
    random = run.random_state(step)
    if random is not None:
        restore_random_state(random, prepared.device)

    def loss(model: nn.Module) -> Tensor:
        return prepared.criterion(model(prepared.x), prepared.answer)

    return sample_shares(
        model=prepared.model, loss=loss, samples=len(prepared.x), layers=run.settings["introspection"]["layers"]
    )


def describe(
    plan: Plan,
    distributions: Sequence[NullDistributions],
    found: Sequence[Tests],
    runs: Sequence[Snapshots],
    settings: PermutationSettings,
) -> dict[str, Any]:
    """The test in words that a section on methods can quote, with the numbers filled in."""
    within = f" within {' and '.join(settings['within'])}" if settings["within"] else ""
    if settings["conditional_on"]:
        within += (
            f", conditionally on {' and '.join(settings['conditional_on'])} by a logistic model of the label (Berrett et al. "
            "2020)"
        )
    within = within or ", restricted by no grouping or covariate"
    if runs[0].settings["task"] == "classifier":
        within += "; a classifier's labels were exchanged within one and the same target"
    seeds = f", averaged over {len(runs)} trainings from different seeds" if len(runs) > 1 else ""
    steps = runs[0].steps
    comparisons = {}
    for question, each, tests in zip(plan.questions, distributions, found, strict=False):
        comparison = question.comparison
        in_first = comparison.in_first
        clusters = tests.clusters[tests.clusters["p_adjusted"] <= settings["alpha"]]
        comparisons[comparison.name] = {
            "subjects": {comparison.first: int(in_first.sum()), comparison.second: int((~in_first).sum())},
            "strata": int(comparison.stratum.max()) + 1,
            "labellings": len(each.labellings),
            "enumerated": each.labellings.enumerated,
            "family": tests.family,
            "messages": tests.messages,
            "balance": None if each.labellings.balance is None else each.labellings.balance.to_dict("records"),
            "clusters_found": len(tests.clusters),
            "significant_clusters": json.loads(clusters.to_json(orient="records")),
        }
    return {
        "method": (
            f"For each pair of groups the labels of subjects were permuted{within} ({settings['permutations']} permutations "
            f"asked for, seed {settings['seed']}), the same ones at each of {len(steps)} updates ({steps[0]} to {steps[-1]})"
            f"{seeds}, with the network's weights as they were before that update. Of each layer the singular values of the "
            "difference of the groups' mean shares of the gradient (contrast), the difference of their spectra, the cosine "
            "between the shares, the difference of effective ranks and the Frobenius norm of the contrast were compared with "
            "their distribution over labellings; p counts the observed labelling (Phipson and Smyth 2010). Family-wise "
            "p-values are by the maximum of the statistics, centred and scaled over labellings (Nichols and Holmes 2002), "
            "multiplied by the number of comparisons; clusters of neighbouring updates are tested by their mass (Maris and "
            f"Oostenveld 2007). Differences are called significant at a family-wise p of {settings['alpha']:g} or less."
        ),
        "comparisons": comparisons,
        "refused": plan.refused,
    }


def describe_population(
    plan: Plan, runs: Sequence[Snapshots], prepared: Sequence[Prepared], seed: int
) -> dict[str, Any]:
    """Intervals over subjects at the last update of which all seeds kept the weights."""
    step = max(set.intersection(*(set(run.steps) for run in runs)))
    shares = [shares_at(run, each, step) for run, each in zip(runs, prepared, strict=True)]
    return {
        "what_it_is": subjects.WHAT_IT_IS,
        "method": (
            f"{subjects.REPETITIONS} draws of subjects, the same for each of {len(runs)} trainings, over which statistics are "
            f"averaged, at update {step}: the base-2 logarithm of the ratio of the groups' largest singular values per sample, "
            "and the cosine between their shares."
        ),
        "comparisons": {
            question.comparison.name: subjects.population_intervals(shares, question.comparison, seed)
            for question in plan.questions
        },
    }


def null_tree(distributions: Sequence[NullDistributions]) -> xr.DataTree:
    """Statistics under every labelling: a node ``<comparison>/<layer>/<statistic>`` with ``value (labelling, step, index)``."""
    nodes = {}
    for each in distributions:
        steps = sorted(each.steps)
        for layer, statistic in each.steps[steps[0]] if steps else ():
            values = np.stack([each.steps[step][layer, statistic].values for step in steps], axis=1)
            nodes[f"{each.comparison.name}/{layer}/{statistic}"] = xr.Dataset(
                {"value": (("labelling", "step", "index"), values, {"description": "row 0 is the observed labelling"})},
                coords={"step": steps, "index": np.arange(1, values.shape[2] + 1)},
            )
    return xr.DataTree.from_dict(nodes)
