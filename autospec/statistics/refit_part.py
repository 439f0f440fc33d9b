"""The stage that trains a network again and again with permuted labels, some refits a job."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import torch
import xarray as xr

from autospec.datasets.labelled import open_labelled, samples_with
from autospec.errors import UserError
from autospec.statistics.covariates import (
    balance_in_words,
    compares_targets,
    described_by,
    imbalance_after_matching,
    matched_for,
    matched_samples,
)
from autospec.statistics.measures import SPECTRAL, STATISTICS, deciding, effective_rank
from autospec.statistics.permutations import (
    balance_of,
    by_size,
    conditional_givers,
    means_of_units,
    propensity_logits,
    remaining_imbalance,
    unequal_sizes,
)
from autospec.statistics.study import columns_of, exchangeable, grouped, numbers_of
from autospec.statistics.table import comparison_name
from autospec.storage import write_packed
from autospec.training.device import chosen_device, deterministic
from autospec.training.loop import Trainer
from autospec.training.prepare import Prepared, prepare
from autospec.training.settings import RunSettings
from autospec.training.snapshots import snapshot_updates
from autospec.watching import watch

NOTHING_TO_PERMUTE = (
    "all labels are equal within each stratum of subjects with as many samples, so there is nothing to permute: use fewer "
    "strata (statistics.within), one scan of each subject, or do not ask for refits."
)


class RefitPartSettings(TypedDict):
    """What the stage reads from the configuration."""

    run: RunSettings
    first: int
    last: int
    refits: int
    seed: int
    within: list[str]
    conditional_on: list[str]
    minimum_group_size: int
    matched: bool
    """Whether labels are exchanged within pairs of matched subjects, to see whether it is just motion."""


class About(TypedDict):
    """Who is compared."""

    n_a: int
    n_b: int
    balance: str
    note: str


@dataclass(frozen=True)
class Relabellings:
    """Whose labels each subject is given in each refit.

    Attributes
    ----------
    giver : ndarray of int, shape (refits, subjects)
        Number of the subject whose target and groups each subject gets; row 0 leaves them as they are.
    enumerated : bool
        Whether these are all that differ.
    message : str
        How they came about.
    balance : list of dict
        Of a conditional drawing: `autospec.statistics.permutations.balance_of` each pair of targets.
    imbalance : str
        Why no p may be given, or empty.
    """

    giver: np.ndarray
    enumerated: bool
    message: str
    balance: list[dict[str, Any]] = field(default_factory=list)
    imbalance: str = ""


def build_refit_part(settings: RefitPartSettings, dataset: str, output: str, device: str = "auto") -> str:
    """Carry out some refits of a run and write their statistics.

    Parameters
    ----------
    settings : RefitPartSettings
        The run, and which refits; refit 0 is the run with its labels as they are.
    dataset : str
        The labelled data set.
    output : str
        The ``.zarr.zip`` file to write.
    device : str
        Where to train, not part of the settings.

    Returns
    -------
    str
        One line that says what was done.

    Raises
    ------
    UserError
        If no pair of groups can be tested by refits, or the labels of one subject differ between its samples.
    """
    run = settings["run"]
    prepared = prepare(run, dataset, chosen_device(device))
    subjects, unit = np.unique(np.array(prepared.training.subjects, dtype=object).astype(str), return_inverse=True)
    strata, names = strata_of(prepared, dataset, settings["within"], unit)
    labels = of_subjects([prepared.target.tolist(), *prepared.labels.values()], unit, subjects, "target or groups")
    count, seed = settings["refits"], settings["seed"]
    numbers_of_subjects = confounders_of(prepared, dataset, settings["conditional_on"], unit)
    if numbers_of_subjects is None:
        drawn = draw_relabellings(labels, strata, count, seed)
    else:
        target = prepared.target.numpy(force=True)[np.unique(unit, return_index=True)[1]]
        drawn = draw_conditional_relabellings(target, prepared.classes, strata, numbers_of_subjects, count, seed)
    pairs, refused = testable(prepared, unit, settings["minimum_group_size"])
    checked = checks_of(prepared, dataset, settings, pairs, unit, labels, strata) if settings["matched"] else Checks()
    compared = len(checked.matched) if settings["matched"] else len(pairs)
    numbers = range(settings["first"], min(settings["last"] + 1, len(drawn.giver)))
    epochs = run["training"]["epochs"]
    updates = epochs * Trainer(prepared).batches.in_an_epoch
    steps = snapshot_updates(run["training"]["snapshots"], updates)
    found = []
    with deterministic(prepared.device):
        for number in numbers if compared else ():
            if settings["matched"]:
                found.append(joined_statistics(list(checked.statistics(number, steps, updates, unit))))
            else:
                relabelled = with_labels_of(prepared, drawn.giver[number], unit)
                found.append(statistics_of(retrained(relabelled, steps, updates), pairs))
    family = found[0] if found else statistics_of(None, [])
    attributes = {
        "labellings": len(drawn.giver),
        "enumerated": drawn.enumerated,
        "message": "; ".join([drawn.message, *unequal_sizes(np.bincount(unit), strata, labels)]),
        "digest": hashlib.sha256(
            b"".join(each.giver.astype("<i8").tobytes() for each in (drawn, *(one.drawn for one in checked.matched)))
        ).hexdigest(),
        "strata": names,
        "conditional_on": settings["conditional_on"],
        "balance": drawn.balance,
        "imbalance": drawn.imbalance,
        "pairs": compared,
        "refused": refused,
        "of_matched": settings["matched"],
        "diagnoses": checked.diagnoses,
        "matched": {each.name: {**each.about, "labellings": len(each.drawn.giver)} for each in checked.matched},
        "unmatched": checked.unmatched,
        "seed": seed,
    }
    write_packed(_as_tree(found, family, list(numbers) if compared else [], attributes), output)
    of = " of matched subjects" if settings["matched"] else ""
    return f"{run['name']}: refits {numbers.start} to {numbers.stop - 1} of {settings['refits']}, {compared} pairs of groups{of}"


# ---------------------------------------------------------------------- labels


def of_subjects(columns: Sequence[Sequence[Any]], unit: np.ndarray, subjects: np.ndarray, what: str) -> np.ndarray:
    """Number of each subject's combination of labels, shape (subjects,).

    Raises
    ------
    UserError
        If the samples of one subject differ.
    """
    combinations = list(zip(*columns, strict=True))
    numbers = {combination: i for i, combination in enumerate(dict.fromkeys(combinations))}
    codes = np.array([numbers[combination] for combination in combinations], dtype=np.int64)
    result = np.zeros(len(subjects), dtype=np.int64)
    result[unit] = codes
    differs = result[unit] != codes
    if differs.any():
        raise UserError(
            f"the samples of the subject '{subjects[unit[np.argmax(differs)]]}' differ in {what}, but labels are permuted "
            "by subject: give all of a subject's samples the same ones."
        )
    return result


def strata_of(
    prepared: Prepared, dataset: str, within: Sequence[str], unit: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Number of each subject's stratum, and the groupings that make the strata.

    Labels are permuted within the groupings asked for, and within whatever the target is crossed with: where groups are
    diagnosis x sex, the diagnosis is permuted within each sex.  Subjects with unequal numbers of samples are not exchangeable:
    see `autospec.statistics.permutations.compare`.
    """
    trained = samples_with(open_labelled(dataset), set(prepared.training.ids))
    columns = columns_of(trained, within, "statistics.within")
    target = prepared.target.tolist()
    for name in dict.fromkeys(itertools.chain(*prepared.crossed)):
        if not _determines(prepared.labels[name], target):
            columns[name] = prepared.labels[name]
    subjects, sizes = np.unique(unit, return_counts=True)
    if not columns:
        return by_size(np.zeros(len(subjects), dtype=np.int64), sizes), []
    return by_size(of_subjects(list(columns.values()), unit, subjects, " or ".join(columns)), sizes), list(columns)


def _determines(labels: Sequence[str | None], target: Sequence[int]) -> bool:
    """Whether each label comes with one target alone, as a diagnosis does where it is the target."""
    pairs = {pair for pair in zip(labels, target, strict=True) if pair[0] is not None}
    return len({label for label, _ in pairs}) == len(pairs)


def draw_relabellings(labels: np.ndarray, strata: np.ndarray, refits: int, seed: int) -> Relabellings:
    """Permute labels within strata at random, or list all that differ where there are no more than asked for.

    Parameters
    ----------
    labels, strata : ndarray of int, shape (subjects,)
        Number of each subject's labels, and of its stratum.
    refits : int
        How many, beside the labels as they are.
    seed : int
        Refit b depends on this and on b alone.

    Raises
    ------
    UserError
        If all subjects of each stratum have the same labels.
    """
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    distinct = math.prod(_arrangements(labels[units]) for units in members)
    if distinct == 1:
        raise UserError(NOTHING_TO_PERMUTE)
    identity = np.arange(len(labels))
    if distinct <= refits + 1:
        rows = [identity]
        for arrangement in itertools.product(*(_every_arrangement(labels[units]) for units in members)):
            giver = identity.copy()
            for units, wanted in zip(members, arrangement, strict=True):
                giver[units] = units[_givers(labels[units], wanted)]
            if not np.array_equal(labels[giver], labels):
                rows.append(giver)
        message = f"only {distinct} labellings are possible, no more than the {refits} refits asked for: all were used"
        return Relabellings(np.stack(rows), True, message)
    giver = np.tile(identity, (refits + 1, 1))
    for b in range(1, refits + 1):
        generator = np.random.default_rng([seed, b])
        for units in members:
            giver[b, units] = generator.permutation(units)
    possible = distinct if distinct < 1e6 else f"about {distinct:.1e}"
    return Relabellings(giver, False, f"{refits} of {possible} possible labellings were drawn with seed {seed}")


def confounders_of(prepared: Prepared, dataset: str, names: Sequence[str], unit: np.ndarray) -> pd.DataFrame | None:
    """Covariates of each subject that labels are drawn conditionally on; None where there are none."""
    if not names:
        return None
    trained = samples_with(open_labelled(dataset), set(prepared.training.ids))
    return means_of_units(numbers_of(trained, names, "statistics.conditional_on"), unit, np.bincount(unit))


def draw_conditional_relabellings(
    target: np.ndarray, classes: Sequence[str], strata: np.ndarray, confounders: pd.DataFrame, refits: int, seed: int
) -> Relabellings:
    """Draw whose labels each subject gets so that targets depend on confounders as the observed ones do.

    Parameters
    ----------
    target, strata : ndarray of int, shape (subjects,)
        Number of each subject's target, and of its stratum.
    classes : sequence of str
        Names of the targets.
    confounders : DataFrame, shape (subjects, confounders)
        One column each.
    refits : int
        How many, beside the labels as they are.
    seed : int
        Refit b depends on this and on b alone.

    Notes
    -----
    As `autospec.statistics.permutations.draw_conditional_labellings`, with the log odds of each target against the first
    from a logistic model of these two (Begg and Gray 1984, "Calculation of polychotomous logistic regression parameters
    using individualized regressions", Biometrika 71).
    """
    values = confounders.to_numpy()
    logits = np.zeros((len(target), len(classes)))
    for k in range(1, len(classes)):
        logits[:, k] = propensity_logits(values, target == k, among=(target == 0) | (target == k))
    giver = conditional_givers(target, logits, strata, refits, seed)
    drawn = target[giver]
    if (drawn == target).all():
        raise UserError(NOTHING_TO_PERMUTE)
    balance: list[dict[str, Any]] = []
    imbalance = ""
    for a, b in itertools.combinations(range(len(classes)), 2):
        of_pair = balance_of(drawn == a, confounders, drawn == b)
        name = comparison_name(classes[a], classes[b])
        balance += [
            {"comparison": name, **{str(key): value for key, value in row.items()}}
            for row in of_pair.to_dict("records")
        ]
        imbalance = imbalance or remaining_imbalance(of_pair)
    moved = (drawn[1:] != target).mean()
    message = (
        f"{refits} labellings were drawn conditionally on {', '.join(confounders.columns)} with seed {seed}; on average "
        f"{moved:.0%} of the subjects have another target than the observed one"
    )
    return Relabellings(giver, False, message, balance, imbalance)


def _arrangements(labels: np.ndarray) -> int:
    """Number of different orders of some labels."""
    counts = np.unique(labels, return_counts=True)[1].tolist()
    return math.factorial(sum(counts)) // math.prod(map(math.factorial, counts))


def _every_arrangement(labels: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Every different order of some labels."""

    def orders(left: Counter[int], length: int) -> Iterator[tuple[int, ...]]:
        if not length:
            yield ()
        for label in sorted(left):
            if left[label]:
                rest = left.copy()
                rest[label] -= 1
                for order in orders(rest, length - 1):
                    yield (label, *order)

    return orders(Counter(labels.tolist()), len(labels))


def _givers(labels: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """For each place the number of a subject that has the label wanted there, each subject once."""
    order, places = np.argsort(labels, kind="stable"), np.argsort(np.array(wanted), kind="stable")
    givers = np.empty(len(labels), dtype=np.int64)
    givers[places] = order
    return givers


def with_labels_of(prepared: Prepared, giver: np.ndarray, unit: np.ndarray) -> Prepared:
    """Give each subject the target and the groups of another, and the network its initial weights again.

    Parameters
    ----------
    prepared : Prepared
        The training as it was.
    giver : ndarray of int, shape (subjects,)
        Whose labels each subject gets.
    unit : ndarray of int, shape (samples,)
        Number of each sample's subject.
    """
    first_row = np.unique(unit, return_index=True)[1]
    source = first_row[giver[unit]]  # any sample of the giver: all have the same labels
    target = prepared.target[torch.from_numpy(source).to(prepared.target.device)]
    answer = prepared.answer if prepared.settings["task"] == "autoencoder" else target
    labels = {name: [column[row] for row in source] for name, column in prepared.labels.items()}
    relabelled = replace(prepared, training=replace(prepared.training, target=target, answer=answer), labels=labels)
    return relabelled.with_initial_weights()


def testable(prepared: Prepared, unit: np.ndarray, minimum: int) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Pairs of groups that refits test, and for each other pair one sentence that says why not."""
    task, target = prepared.settings["task"], np.array(prepared.target.tolist(), dtype=object)
    pairs, refused = [], {}
    for grouping in grouped(prepared.groups(), prepared.crossed):
        for a, b in grouping.pairs:
            sizes = {group: len(set(unit[grouping.labels == group])) for group in (a, b)}
            smallest = min(sizes, key=lambda group: sizes[group])
            if sizes[smallest] < minimum:
                refused[comparison_name(a, b)] = (
                    f"The group '{smallest}' has {sizes[smallest]} subject{'s' if sizes[smallest] != 1 else ''}, fewer than "
                    f"the {minimum} that a test needs: leave it out or merge it with another."
                )
            elif task == "classifier" and not exchangeable(task, target, grouping.labels, a, b):
                refused[comparison_name(a, b)] = (
                    f"The groups '{a}' and '{b}' share a target, within which labels can be exchanged after training: see "
                    "the permutation test."
                )
            else:
                pairs.append((a, b))
    return pairs, refused


# ---------------------------------------------------------------------- is it just motion?


@dataclass(frozen=True)
class Matched:
    """A comparison of matched subjects, whose labels are exchanged within matched pairs before training.

    Everybody else keeps the true labels, and the network is trained on all.

    Attributes
    ----------
    pair : (str, str)
        The two groups.
    prepared : Prepared
        The training, with groups for the matched subjects alone.
    drawn : Relabellings
        Whose labels each subject gets.
    about : dict
        Who is compared.
    """

    pair: tuple[str, str]
    prepared: Prepared
    drawn: Relabellings
    about: About

    @property
    def name(self) -> str:
        """Both groups."""
        return comparison_name(*self.pair)


@dataclass(frozen=True)
class Checks:
    """What refits say beside each comparison of the targets that were learned.

    Attributes
    ----------
    diagnoses : dict
        Who is compared, for each comparison of targets.
    matched : list of Matched
        The same comparisons among matched subjects.
    unmatched : dict of str to str
        Why there is none, by comparison.
    """

    diagnoses: dict[str, About] = field(default_factory=dict)
    matched: list[Matched] = field(default_factory=list)
    unmatched: dict[str, str] = field(default_factory=dict)

    def statistics(
        self, number: int, steps: Sequence[int], updates: int, unit: np.ndarray
    ) -> Iterator[dict[str, np.ndarray]]:
        """Train once more for each matched comparison; NaN where there are no more labellings."""
        for each in self.matched:
            possible = number < len(each.drawn.giver)
            relabelled = with_labels_of(each.prepared, each.drawn.giver[number if possible else 0], unit)
            found = statistics_of(retrained(relabelled, steps, updates), [each.pair], "matched")
            kept = np.isin(found["statistic"], CHECKED)
            found = {name: values[kept] for name, values in found.items()}
            yield found if possible else {**found, "value": np.full(len(found["value"]), np.nan)}


CHECKED = ("contrast", "distance")


def checks_of(
    prepared: Prepared,
    dataset: str,
    settings: RefitPartSettings,
    pairs: Sequence[tuple[str, str]],
    unit: np.ndarray,
    labels: np.ndarray,
    strata: np.ndarray,
) -> Checks:
    """Match the subjects of each comparison of targets, where the data set has covariates.

    Parameters
    ----------
    prepared : Prepared
        The training.
    dataset : str
        The labelled data set.
    settings : RefitPartSettings
        How many refits, from which seed.
    pairs : sequence of (str, str)
        The comparisons that refits test.
    unit : ndarray of int, shape (samples,)
        Number of each sample's subject.
    labels, strata : ndarray of int, shape (subjects,)
        Number of each subject's labels, and of its stratum.
    """
    trained = samples_with(open_labelled(dataset), set(prepared.training.ids))
    checks = Checks()
    if not matched_for(trained):
        return checks
    described, subjects = described_by(trained), list(prepared.training.subjects)
    target = prepared.target.numpy(force=True)
    for grouping in grouped(prepared.groups(), prepared.crossed):
        for pair in grouping.pairs:
            if pair not in pairs or not compares_targets(grouping.labels, pair, target):
                continue
            name = comparison_name(*pair)
            checks.diagnoses[name] = _about(grouping.labels, pair, described, subjects, unit)[0]
            partner = matched_samples(grouping.labels, pair, trained, subjects)
            of_matched = np.where(partner >= 0, grouping.labels, np.array(None, dtype=object))
            about, worst = _about(of_matched, pair, described, subjects, unit)
            smallest, wanted = about["n_a"], settings["minimum_group_size"]
            if smallest < wanted:
                checks.unmatched[name] = (
                    f"{smallest} matched pairs of subjects, fewer than the {wanted} that a test needs"
                )
                continue
            # Whoever has no partner is a stratum alone, and so is each of two partners of different strata.
            of_unit = np.full(len(labels), -1)
            of_unit[unit] = partner
            alone = np.where(of_unit >= 0, of_unit, len(labels) + np.arange(len(labels)))
            within = np.unique(np.stack([alone, strata]), axis=1, return_inverse=True)[1].reshape(-1)
            try:
                drawn = draw_relabellings(labels, within, settings["refits"], settings["seed"])
            except UserError:
                checks.unmatched[name] = "no matched pair shares a stratum, so no labels can be exchanged"
                continue
            moved = f"labels exchanged within pairs before training: {drawn.message}"
            about["note"] = imbalance_after_matching(worst) or moved
            groups = replace(prepared, labels={"matched": list(of_matched)}, crossed=[])
            checks.matched.append(Matched(pair, groups, drawn, about))
    return checks


def _about(
    labels: np.ndarray,
    pair: tuple[str, str],
    described: dict[str, np.ndarray],
    subjects: Sequence[str],
    unit: np.ndarray,
) -> tuple[About, float]:
    balance, worst = balance_in_words(labels, pair, described, subjects)
    n_a, n_b = (len(set(unit[labels == group])) for group in pair)
    return About(n_a=n_a, n_b=n_b, balance=balance, note=""), worst


# ---------------------------------------------------------------------- trainings


def retrained(prepared: Prepared, steps: Sequence[int], updates: int) -> xr.DataTree:
    """Train once more, and record what compares the groups at some updates.

    Parameters
    ----------
    prepared : Prepared
        What to train on, with the initial weights.
    steps : sequence of int
        The updates to record.
    updates : int
        How many to make.
    """
    trainer = Trainer(prepared)
    with watch(
        prepared.model,
        prepared.groups(),
        crossed=prepared.crossed,
        statistics=("gradient", "contrast", "cosine"),
        steps=steps,
        layers=prepared.settings["introspection"]["layers"],
        quiet=True,
    ) as watcher:
        for update in range(updates):
            trainer.gradient(update, watcher)
            watcher.step()
            trainer.step()
    return watcher.trajectories


def statistics_of(tree: xr.DataTree | None, pairs: Sequence[tuple[str, str]], check: str = "") -> dict[str, np.ndarray]:
    """Every statistic of a training, as flat arrays of one length.

    Parameters
    ----------
    tree : DataTree or None
        What was recorded; None of nothing.
    pairs : sequence of (str, str)
        The comparisons.
    check : str
        Which check beside them it is for, if any.

    Returns
    -------
    dict of str to ndarray
        ``value``; ``above``, whether it lies above the noise floor; and what each belongs to: ``layer``, ``statistic``,
        ``step``, ``index`` (0 for the whole layer), ``group_a``, ``group_b``, ``comparison``, ``check``.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*PLACES, "value", "above")}
    for a, b in pairs:
        assert tree is not None
        steps = tree["step"].values
        sizes = tree["group_size"].sel(group=[a, b]).values
        for layer, node in tree["layers"].children.items():
            contrast = tree[f"contrasts/{comparison_name(a, b)}/{layer}"]
            values = _of_layer(node.to_dataset(), contrast.to_dataset(), (a, b), sizes)
            for statistic in STATISTICS:
                value, above = values[statistic]
                count = value.shape[1]
                index = np.arange(1, count + 1) if statistic in SPECTRAL else np.zeros(1, dtype=np.int64)
                parts["step"].append(np.repeat(steps, count))
                parts["index"].append(np.tile(index, len(steps)))
                parts["value"].append(value.ravel())
                parts["above"].append(above.ravel())
                words = {"layer": layer, "statistic": statistic, "group_a": a, "group_b": b}
                for name, word in {**words, "comparison": comparison_name(a, b), "check": check}.items():
                    parts[name].append(np.full(value.size, word, dtype=object))
    empty = {name: np.zeros(0, dtype=object if name in WORDS else np.int64) for name in parts}
    return {name: np.concatenate(arrays) if arrays else empty[name] for name, arrays in parts.items()}


def joined_statistics(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Statistics of several trainings, one after the other."""
    return {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}


WORDS = ("layer", "statistic", "group_a", "group_b", "comparison", "check")
PLACES = (*WORDS, "step", "index")


def _of_layer(
    node: xr.Dataset, contrast: xr.Dataset, pair: tuple[str, str], sizes: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Statistics of one layer and pair, and whether each is above the noise floor, shape (steps, values) each.

    They are those of `autospec.statistics.measures`, from recorded spectra.
    """
    a, b = (node["gradient"].sel(group=group).values.astype(np.float64) for group in pair)
    floor_a, floor_b = (node["gradient_noise_floor"].sel(group=group).values[:, None] for group in pair)
    limits = node["rank_limit"].sel(group=list(pair)).values
    above = (a > floor_a) & (b > floor_b)
    with np.errstate(invalid="ignore", divide="ignore"):
        ranks = [effective_rank(np.nan_to_num(each))[:, None] for each in (a, b)]
    of_contrast = contrast["gradient"].values.astype(np.float64)
    contrast_above = of_contrast > contrast["gradient_noise_floor"].values[:, None]
    count, both = int(min(a.shape[1], limits.min())), int(min(a.shape[1], limits.sum()))
    return {
        "contrast": (of_contrast[:, :both], contrast_above[:, :both]),
        "difference": ((a / sizes[:, :1] - b / sizes[:, 1:])[:, :count], above[:, :count]),
        "cosine": (contrast["cosine"].values.astype(np.float64)[:, None], above[:, :1]),
        "effective_rank": (ranks[0] - ranks[1], above[:, deciding("effective_rank", above.shape[1])]),
        "distance": (np.sqrt(np.nansum(np.square(of_contrast), axis=1, keepdims=True)), contrast_above[:, :1]),
    }


def _as_tree(
    found: Sequence[dict[str, np.ndarray]],
    family: dict[str, np.ndarray],
    numbers: Sequence[int],
    attributes: dict[str, Any],
) -> xr.DataTree:
    size = len(family["value"])
    coordinates: dict[str, Any] = {
        name: ("test", family[name].astype(np.dtypes.StringDType()) if name in WORDS else family[name])
        for name in PLACES
    }
    value = np.array([each["value"] for each in found], dtype=np.float32).reshape(len(numbers), size)
    above = np.array([each["above"] for each in found], dtype=bool).reshape(len(numbers), size)
    dataset = xr.Dataset(
        {
            "value": (("refit", "test"), value, {"description": "of each refit; refit 0 has the true labels"}),
            "above": (("refit", "test"), above, {"description": "whether it lies above the noise floor"}),
        },
        coords={"refit": ("refit", np.array(numbers, dtype=np.int64)), **coordinates},
        attrs=attributes,
    )
    return xr.DataTree(dataset)
