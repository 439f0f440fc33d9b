"""The permutation test of two groups over the recorded steps of a run.

It is exact where neither the weights nor the adjoints have seen the labels under test: in an autoencoder, or for a
grouping that is independent of the target within strata that the training kept too.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autospec.errors import UserError
from autospec.introspection.sample_shares import SampleShares
from autospec.statistics import measures, null
from autospec.statistics.permutations import Comparison, Labellings, group_sizes
from autospec.statistics.table import COLUMNS, tidy
from autospec.storage import written_whole

CLUSTER_COLUMNS = (
    "layer",
    "statistic",
    "index",
    "group_a",
    "group_b",
    "comparison",
    "test",
    "first_step",
    "last_step",
    "mass",
    "effect_size",
    "effect_low",
    "effect_high",
    "p_adjusted",
)

Key = tuple[str, str]
"""A layer and a statistic."""


@dataclass(frozen=True)
class Values:
    """One statistic of one layer at one step.

    Attributes
    ----------
    values : ndarray of float32, shape (labellings, singular values) or (labellings, 1)
        Under each labelling, the observed one first.
    tested : ndarray of bool, shape (singular values,) or (1,)
        Whether it lies above the noise floor under at least half of the labellings; a rule that looked at the observed
        labelling alone would choose by the labels under test.
    above : ndarray of bool, shape (singular values,) or (1,)
        Whether it does so under the observed labelling.
    """

    values: np.ndarray
    tested: np.ndarray
    above: np.ndarray


class NullDistributions:
    """Statistics of one comparison under every labelling, gathered step by step.

    Parameters
    ----------
    comparison : Comparison
        The two groups.
    labellings : Labellings
        One set for the whole run: all its steps, layers, statistics and seeds.
    statistics : sequence of str
        Out of `autospec.statistics.measures.STATISTICS`.
    checkpoint : path-like, optional
        Folder with one file a step; steps that it holds already are taken from there.  It knows the comparison, the
        labellings and the statistics, but not the network: each training needs a folder of its own.

    Raises
    ------
    UserError
        If a statistic is not known, the labellings are those of another comparison, or the folder holds another test
        or what cannot be read.
    """

    def __init__(
        self,
        comparison: Comparison,
        labellings: Labellings,
        statistics: Sequence[str] = measures.STATISTICS,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.comparison, self.labellings = comparison, labellings
        if not np.array_equal(labellings.in_first[0], comparison.in_first):
            raise UserError(
                f"the labellings are those of another comparison than '{comparison.name}': draw them for this one."
            )
        self.statistics = measures.checked(statistics)
        self.steps: dict[int, dict[Key, Values]] = {}
        self.averaged = 1
        self._folder = None if checkpoint is None else Path(checkpoint)
        if self._folder is not None:
            for file in sorted(self._folder.glob("step-*.npz")):
                step, found = self._load(file)
                self.steps[step] = found

    def add(self, step: int, shares: Mapping[str, SampleShares]) -> None:
        """Compute one step's statistics under every labelling.

        Parameters
        ----------
        step : int
            Number of the step; one that is there already stays as it is.
        shares : mapping of str to SampleShares
            One share a sample, of every layer.
        """
        if not isinstance(step, int | np.integer):
            raise UserError(f"step={step!r}: give the number of the step, as an integer.")
        if step in self.steps:
            return
        if not shares:
            raise UserError(f"there is no layer's share at step {step}: give those of at least one layer.")
        found: dict[Key, Values] = {}
        for layer, of_samples in shares.items():
            count, labels = of_samples.samples, len(self.comparison.unit)
            if count != labels:
                raise UserError(
                    f"'{layer}' has shares of {count} samples, but there are {labels} labels: give the batch's."
                )
            found |= {(layer, name): values for name, values in self._layer(of_samples).items()}
        self.steps[step] = found
        if self._folder is not None:
            self._save(step, found)

    def _layer(self, of_samples: SampleShares) -> dict[str, Values]:
        shares = of_samples.of_units(self.comparison.unit)
        sizes = group_sizes(self.labellings, self.comparison.sizes)
        rows, ranks = (group_sizes(self.labellings, each) for each in (shares.rows, shares.ranks))
        spectra = measures.labelled_spectra(shares, self.labellings.in_first, *sizes)
        found = {}
        for name in self.statistics:
            possible = measures.values_possible(name, shares.shape, ranks)
            values = measures.measure(spectra, name, *sizes)[:, :possible].astype(np.float32)
            above = measures.resolved(spectra, name, *sizes, shares.shape, rows, shares.dtype)[:, :possible]
            finite = np.isfinite(values).all(0)
            found[name] = Values(values, (above.mean(0) >= 0.5) & finite, above[0] & finite)
        return found

    # ------------------------------------------------------------------ files

    def _identity(self) -> str:
        return json.dumps([self.comparison.name, list(self.statistics), self.labellings.digest])

    def _save(self, step: int, found: Mapping[Key, Values]) -> None:
        assert self._folder is not None
        arrays: dict[str, np.ndarray] = {"identity": np.array(self._identity()), "step": np.array(step)}
        arrays["keys"] = np.array(json.dumps(list(found)))
        for number, each in enumerate(found.values()):
            arrays |= {f"{number}.values": each.values, f"{number}.tested": each.tested, f"{number}.above": each.above}
        with written_whole(self._folder / f"step-{step:09d}.npz") as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]

    def _load(self, file: Path) -> tuple[int, dict[Key, Values]]:
        try:
            opened = np.load(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} cannot be read ({error}): remove it, and its step is computed again.") from error
        with opened as arrays:
            if str(arrays["identity"]) != self._identity():
                raise UserError(
                    f"{file} belongs to another comparison, other statistics or labellings: remove its folder."
                )
            keys = [(str(layer), str(name)) for layer, name in json.loads(str(arrays["keys"]))]
            return int(arrays["step"]), {
                key: Values(arrays[f"{i}.values"], arrays[f"{i}.tested"], arrays[f"{i}.above"])
                for i, key in enumerate(keys)
            }


def average_over_seeds(distributions: Sequence[NullDistributions]) -> NullDistributions:
    """Average the statistics of runs that differ in their seed alone, labelling by labelling.

    Seeds are no subjects: the same permutation of subjects is applied to every seed, and the mean is compared with its
    own distribution over labellings.

    Raises
    ------
    UserError
        If there is no run, or the runs' labellings, steps, layers, their shapes or statistics are not the same.
    """
    if not distributions:
        raise UserError("there is no seed to average over: give the distributions of at least one.")
    first = distributions[0]
    result = NullDistributions(first.comparison, first.labellings, first.statistics)
    result.averaged = len(distributions)
    for other in distributions[1:]:
        if other._identity() != first._identity():
            raise UserError("the seeds' labellings or statistics differ: draw one set of labellings for all of them.")
        if {step: set(found) for step, found in other.steps.items()} != {
            step: set(found) for step, found in first.steps.items()
        }:
            raise UserError(
                "the seeds were tested at different steps or in different layers: test all at the same ones."
            )
    for step, found in first.steps.items():
        result.steps[step] = {}
        for key in found:
            each = [other.steps[step][key] for other in distributions]
            if len({part.values.shape for part in each}) > 1:
                raise UserError(
                    f"'{key[0]}' does not have as many singular values for each seed: average over networks of one size."
                )
            values = np.stack([part.values for part in each]).mean(0, dtype=np.float64).astype(np.float32)
            tested, above = (np.all([getattr(part, name) for part in each], axis=0) for name in ("tested", "above"))
            result.steps[step][key] = Values(values, tested, above)
    return result


@dataclass(frozen=True)
class Tests:
    """What a permutation test found.

    Attributes
    ----------
    table : DataFrame
        One row for each value of each statistic, layer and step, with the columns of `table.COLUMNS`.  The intervals of
        the statistic and of its effect size are those of `null.standardised_effect`.
    clusters : DataFrame
        One row for each run of steps above the threshold, with its family-wise p; the columns are `CLUSTER_COLUMNS`.  Its
        effect size is that of the standardised statistic's mean over the run's steps.
    family : str
        To which tests a corrected p refers.
    messages : list of str
        How the labellings came about, and what a reader should know.
    """

    __test__ = False  # pytest takes the name for a class of tests

    table: pd.DataFrame
    clusters: pd.DataFrame
    family: str
    messages: list[str] = field(default_factory=list)


def evaluate(
    distributions: NullDistributions,
    *,
    alpha: float = 0.05,
    singular_values: int | None = None,
    comparisons: int = 1,
    cluster_quantile: float = 0.95,
    test: str = "permutation",
) -> Tests:
    """Test every value of every statistic, layer and step, with corrections for their number.

    Parameters
    ----------
    distributions : NullDistributions
        Statistics under every labelling.
    alpha : float
        Level of significance of the family-wise p.
    singular_values : int, optional
        Test the leading ones alone; by default all.
    comparisons : int
        Number of comparisons in the family: family-wise p, Holm's too, are multiplied by it (Bonferroni).  The false
        discovery rate is that within this comparison.
    cluster_quantile : float
        Quantile over labellings above which a value belongs to a cluster.
    test : str
        Name of the test in the tables: whether labels were permuted after the training or before it.

    Raises
    ------
    UserError
        If there is no step, alpha is no probability, or a number is not positive.
    """
    if not 0 < alpha < 1 or not 0 < cluster_quantile < 1:
        raise UserError(f"alpha={alpha} and cluster_quantile={cluster_quantile}: both are between 0 and 1.")
    for name, number in (("singular_values", singular_values), ("comparisons", comparisons)):
        if number is not None and number < 1:
            raise UserError(f"{name}={number}: give at least 1.")
    if not distributions.steps:
        raise UserError("no step was recorded for the permutation test: give it at least one.")
    labellings = distributions.labellings
    largest = np.full(len(labellings), -math.inf)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*COLUMNS, "z", "tie", "tested")}
    for step, layer, statistic, each in _in_order(distributions):
        each = _leading(each, singular_values)
        count = each.values.shape[1]
        finite = np.nan_to_num(each.values)  # what is not finite is not tested
        z, tie = null.standardised(finite, measures.ALTERNATIVES[statistic])
        largest = np.maximum(largest, null.maxima(z[:, each.tested]))
        effect = null.standardised_effect(finite)
        columns["layer"].append(np.full(count, layer, dtype=object))
        columns["statistic"].append(np.full(count, statistic, dtype=object))
        columns["step"].append(np.full(count, step))
        columns["index"].append(np.arange(1, count + 1) if statistic in measures.SPECTRAL else np.zeros(1, dtype=int))
        columns["estimate"].append(each.values[0].astype(np.float64))
        for end, size in (("low", effect.low), ("high", effect.high)):
            columns[f"interval_{end}"].append(np.where(each.tested, effect.around(each.values[0], size), np.nan))
            columns[f"effect_{end}"].append(np.where(each.tested, size, np.nan))
        columns["effect_size"].append(np.where(each.tested, effect.estimate, np.nan))
        columns["p"].append(null.p_values(z, tie))
        columns["z"].append(z[0])
        columns["tie"].append(tie)
        columns["tested"].append(each.tested)
        columns["below_floor"].append(~each.above)
    table = pd.DataFrame({name: np.concatenate(parts) for name, parts in columns.items() if parts})
    tested = table["tested"].to_numpy(dtype=bool)
    p = table["p"].to_numpy()[tested]
    adjusted = np.full((3, len(table)), np.nan)
    if len(p):
        corrected = null.familywise_p(table["z"].to_numpy()[tested], largest, table["tie"].to_numpy()[tested])
        adjusted[0, tested] = np.minimum(corrected * comparisons, 1)
        adjusted[1, tested] = null.benjamini_hochberg(p)
        adjusted[2, tested] = np.minimum(null.holm(p) * comparisons, 1)
    table["p_adjusted"], table["p_bh"], table["p_holm"] = adjusted
    # Without a p: outside of the family, below the noise floor as observed, or where an imbalance remains.
    no_p = ~tested | table["below_floor"].to_numpy(dtype=bool) | bool(labellings.refused)
    table.loc[no_p, ["p", "p_adjusted", "p_bh", "p_holm"]] = np.nan
    table["significant"] = (table["p_adjusted"] <= alpha).to_numpy()
    found = _clusters(distributions, singular_values, cluster_quantile, comparisons)
    return Tests(
        tidy(_labelled(table, distributions.comparison, test)),
        _labelled(found, distributions.comparison, test)[list(CLUSTER_COLUMNS)],
        _family(table[tested], len(labellings), comparisons),
        _messages(distributions, int(tested.sum()), alpha, comparisons),
    )


def _labelled(table: pd.DataFrame, comparison: Comparison, test: str) -> pd.DataFrame:
    """Name the groups and the test, and give the whole layer no index."""
    names = {"group_a": comparison.first, "group_b": comparison.second, "comparison": comparison.name, "test": test}
    index = table["index"].astype("Int64")
    return table.assign(index=index.mask(index == 0), **names)


def _in_order(distributions: NullDistributions) -> Iterable[tuple[int, str, str, Values]]:
    for step in sorted(distributions.steps):
        for (layer, statistic), each in distributions.steps[step].items():
            yield step, layer, statistic, each


def _leading(each: Values, count: int | None) -> Values:
    return Values(each.values[:, :count], each.tested[:count], each.above[:count])


def _clusters(
    distributions: NullDistributions, singular_values: int | None, quantile: float, comparisons: int
) -> pd.DataFrame:
    """Runs of steps that are above their threshold, each value of each layer and statistic by itself."""
    steps = sorted(distributions.steps)
    keys = dict.fromkeys(key for step in steps for key in distributions.steps[step])
    largest = np.zeros(len(distributions.labellings))
    rows: list[tuple[Any, ...]] = []
    for layer, statistic in keys:
        found = [distributions.steps[step].get((layer, statistic)) for step in steps]
        width = max(each.values.shape[1] for each in found if each is not None)
        width = width if singular_values is None else min(width, singular_values)
        z = np.full((len(largest), len(steps), width), -math.inf)
        above = np.zeros((len(steps), width), dtype=bool)
        for i, each in enumerate(found):
            if each is None:
                continue
            each = _leading(each, singular_values)
            count = each.values.shape[1]
            scaled, _ = null.standardised(np.nan_to_num(each.values), measures.ALTERNATIVES[statistic])
            z[:, i, :count] = np.where(each.tested, scaled, -math.inf)
            above[i, :count] = each.above
        # What is not tested ends a cluster.
        threshold = np.where(np.isinf(z[0]), math.inf, null.cluster_threshold(np.maximum(z, -1e300), quantile))
        largest = np.maximum(largest, null.largest_cluster(z, threshold))
        for k in range(width):
            observed = np.where(above[:, k], z[0, :, k], -math.inf)
            for first, last, mass in null.clusters(observed, threshold[:, k]):
                index = k + 1 if statistic in measures.SPECTRAL else 0
                effect = null.standardised_effect(z[:, first : last + 1, k].mean(1))
                rows.append((layer, statistic, index, steps[first], steps[last], mass, *map(float, effect[:3])))
    names = [
        "layer",
        "statistic",
        "index",
        "first_step",
        "last_step",
        "mass",
        "effect_size",
        "effect_low",
        "effect_high",
    ]
    table = pd.DataFrame(rows, columns=names)
    masses = table["mass"].to_numpy(dtype=float)
    p = np.minimum(null.familywise_p(masses, largest, null.TIE * np.abs(masses)) * comparisons, 1)
    table["p_adjusted"] = np.full(len(table), np.nan) if distributions.labellings.refused else p
    return table


def _family(tested: pd.DataFrame, labellings: int, comparisons: int) -> str:
    """The family in words, with its numbers."""
    parts = []
    for statistic, rows in tested.groupby("statistic", sort=False):
        counts = [f"{rows[name].nunique()} {word}" for name, word in (("layer", "layers"), ("step", "steps"))]
        parts.append(f"{statistic} ({len(rows)} values in {' and '.join(counts)})")
    return (
        f"{len(tested)} tests: {', '.join(parts) or 'nothing above the noise floor'}; maximum over all of them, "
        f"{labellings} labellings; {comparisons} comparison{'s, by Bonferroni' if comparisons > 1 else ''}"
    )


def _messages(distributions: NullDistributions, tests: int, alpha: float, comparisons: int) -> list[str]:
    labellings = distributions.labellings
    messages = [labellings.message, *distributions.comparison.warnings]
    if distributions.averaged > 1:
        messages.append(f"statistics are means over {distributions.averaged} seeds, under the same labellings")
    diverged = {
        (step, layer)
        for step, layer, statistic, each in _in_order(distributions)
        if statistic in (*measures.SPECTRAL, "distance") and not np.isfinite(each.values).all()
    }
    if diverged:
        steps, layers = ({key[place] for key in diverged} for place in (0, 1))
        some = [
            f"{len(each)} {word}{'s' if len(each) > 1 else ''}" for each, word in ((layers, "layer"), (steps, "step"))
        ]
        messages.append(
            f"the gradients of {some[0]} were not finite at {some[1]}, first at {min(steps)}, as those of a network that diverged are "
            "not: these were not tested"
        )
    for message in (labellings.refused, null.too_few_labellings(len(labellings), tests, alpha, comparisons)):
        if message:
            messages.append(message)
    return messages


def permutation_test(
    steps: Iterable[int],
    shares_at: Callable[[int], Mapping[str, SampleShares]],
    comparison: Comparison,
    labellings: Labellings,
    *,
    statistics: Sequence[str] = measures.STATISTICS,
    checkpoint: str | Path | None = None,
    alpha: float = 0.05,
    singular_values: int | None = None,
    comparisons: int = 1,
    cluster_quantile: float = 0.95,
) -> Tests:
    """Test one comparison over the scheduled steps of a run.

    Parameters
    ----------
    steps : iterable of int
        The scheduled steps.
    shares_at : callable
        Returns each sample's share of every layer at a step, from `sample_shares`; it is called once a step, in order,
        and not for steps that the checkpoint holds.
    comparison : Comparison
        The two groups, from `autospec.statistics.permutations.compare`.
    labellings : Labellings
        From `draw_labellings` or `draw_conditional_labellings`, once for the run.
    statistics, checkpoint
        As for `NullDistributions`.
    alpha, singular_values, comparisons, cluster_quantile
        As for `evaluate`.

    Returns
    -------
    Tests
    """
    distributions = NullDistributions(comparison, labellings, statistics, checkpoint)
    steps = list(steps)
    for step in steps:
        if step not in distributions.steps:
            distributions.add(step, shares_at(step))
    # The checkpoint may hold more.
    distributions.steps = {step: found for step, found in distributions.steps.items() if step in steps}
    return evaluate(
        distributions,
        alpha=alpha,
        singular_values=singular_values,
        comparisons=comparisons,
        cluster_quantile=cluster_quantile,
    )
