"""The stage that tests groups by refits: labels permuted before training, and the whole training repeated.

It is the test for whatever has seen the labels, such as a classifier that learned them.  Here the finished refits are
compared; `autospec.statistics.refit_part` carries them out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import xarray as xr

from autospec.errors import UserError
from autospec.statistics import confounds as checks
from autospec.statistics import null
from autospec.statistics.table import COLUMNS, NO_P, tidy, write_description, write_tests
from autospec.storage import open_store

TEST = "refit"


class RefitSettings(TypedDict):
    """What the stage reads from the configuration."""

    name: str
    alpha: float
    refits: int


def build_refit(
    settings: RefitSettings, parts: Sequence[Sequence[str]], output: str, described: str, confounds: str
) -> str:
    """Compare a run with its refits, and write the table and its description.

    Parameters
    ----------
    settings : RefitSettings
        How many refits there should be, and the level of significance.
    parts : sequence of sequence of str
        Files of refits, of each seed of the run; the statistics are averaged over seeds.
    output : str
        The tab-separated table to write.
    described : str
        The JSON file to write.
    confounds : str
        The table to write that asks whether it is just motion, as far as refits can say.

    Returns
    -------
    str
        One line that says what was tested.

    Raises
    ------
    UserError
        If parts are missing, or do not belong together.
    """
    refits = average([joined([open_store(path, "refits").to_dataset() for path in files]) for files in parts])
    table = evaluate_refits(main_of(refits), settings["alpha"])
    write_tests(table, output)
    write_description(describe(refits, table, settings, len(parts)), described)
    checks.write_table(check_rows(refits, settings["alpha"]), confounds)
    pairs = refits.attrs["pairs"]
    return f"{settings['name']}: {pairs} {'pair' if pairs == 1 else 'pairs'} of groups tested by refits"


def joined(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """All refits of one seed, and beside them those of matched subjects, if there are any.

    Raises
    ------
    UserError
        If one is missing or there twice.
    """
    whole = _in_order([part for part in parts if not part.attrs["of_matched"]])
    of_matched = [part for part in parts if part.attrs["of_matched"]]
    if not of_matched:
        return whole
    beside = _in_order(of_matched)
    attributes = {name: beside.attrs[name] for name in ("diagnoses", "matched", "unmatched")}
    attributes["digest"] = whole.attrs["digest"] + beside.attrs["digest"]
    if beside.attrs["pairs"]:
        whole = xr.concat([whole, beside], "test", data_vars="minimal", coords="minimal", combine_attrs="override")
    return whole.assign_attrs(attributes)


def _in_order(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Refits in the order of their numbers, refit 0 with the labels as they are."""
    if not parts[0].attrs["pairs"]:
        return parts[0]
    whole = xr.concat([part for part in parts if part.sizes["refit"]], "refit", data_vars="minimal", coords="minimal")
    whole = whole.sortby("refit")
    wanted = np.arange(parts[0].attrs["labellings"])
    if not np.array_equal(whole["refit"].values, wanted):
        raise UserError(
            f"the parts hold the refits {whole['refit'].values.tolist()}, but 0 to {wanted[-1]} are needed: make the parts "
            "again."
        )
    return whole.assign_attrs(parts[0].attrs)


def average(of_seeds: Sequence[xr.Dataset]) -> xr.Dataset:
    """Mean over seeds of each refit's statistics; the same labellings were given to every seed.

    Raises
    ------
    UserError
        If the seeds' labellings differ.
    """
    first = of_seeds[0]
    for other in of_seeds[1:]:
        if other.attrs["digest"] != first.attrs["digest"] or other.sizes != first.sizes:
            raise UserError("the seeds' refits have other labellings or values: make all parts again.")
    value = np.mean([each["value"].values for each in of_seeds], axis=0, dtype=np.float64)
    above = np.all([each["above"].values for each in of_seeds], axis=0)
    return first.assign(value=(first["value"].dims, value), above=(first["above"].dims, above))


def main_of(refits: xr.Dataset) -> xr.Dataset:
    """The comparisons themselves, without the checks beside them."""
    return refits.isel(test=refits["check"].values == "") if refits.sizes["refit"] else refits


def check_rows(refits: xr.Dataset, alpha: float) -> list[dict[Hashable, Any]]:
    """Rows of the table that asks whether it is just motion: labels, matched and shuffled, of each comparison of targets.

    Parameters
    ----------
    refits : xarray.Dataset
        All refits; those of matched subjects have the check ``matched``.
    alpha : float
        Level of significance.

    Notes
    -----
    Among the matched, labels are exchanged within pairs before training, and everybody else keeps the true ones, so what
    the network learned from the others is the same in all refits but for chance.  The shuffled twin is one of the refits,
    chosen by the seed, in the place of the run, among the others with permuted labels.
    """
    rows: list[dict[Hashable, Any]] = []
    attributes = refits.attrs
    for name, about in dict(attributes.get("diagnoses", {})).items():
        tests = refits.isel(
            test=(refits["comparison"].values == name) & np.isin(refits["statistic"].values, checks.STATISTICS)
        )
        labels = main_of(tests)
        pair = (str(labels["group_a"].values[0]), str(labels["group_b"].values[0]))

        def add(
            check: str, part: xr.Dataset, of: dict[str, Any], pair: tuple[str, str] = pair, name: str = name
        ) -> None:
            imbalance = NO_P in of["note"]
            given = checks.Check(name, check, pair, None, of["balance"], of["note"], imbalance)
            rows.extend(checks.rows_of(given, of["n_a"], of["n_b"], evaluate_refits(part, alpha)))

        add("labels", labels, {**about, "note": attributes.get("imbalance", "").rstrip(".")})
        matched = dict(attributes["matched"]).get(name)
        if matched is not None:
            part = tests.isel(test=tests["check"].values == "matched", refit=slice(matched["labellings"]))
            add("matched", part.assign_attrs(imbalance=""), matched)
        elif name in attributes["unmatched"]:
            rows.append(checks.row(checks.Check(name, "matched", pair, None, note=attributes["unmatched"][name])))
        permuted = np.arange(1, tests.sizes["refit"])
        twin = int(np.random.default_rng([attributes["seed"], 2**31]).choice(permuted))
        order = [twin, *permuted[permuted != twin]]
        add(
            "shuffled",
            labels.isel(refit=order),
            {**about, "balance": "", "note": f"refit {twin} in the place of the run"},
        )
    return rows


def evaluate_refits(refits: xr.Dataset, alpha: float) -> pd.DataFrame:
    """Test every value of every statistic, layer, step and comparison, with corrections for their number.

    Parameters
    ----------
    refits : xarray.Dataset
        ``value (refit, test)`` and ``above (refit, test)``, refit 0 with the labels as they are.
    alpha : float
        Level of significance of the family-wise p.

    Returns
    -------
    DataFrame
        As `autospec.statistics.table.COLUMNS` says.

    Notes
    -----
    The same labellings go to all comparisons, so one maximum over all of them controls the family-wise error.  All
    statistics are tested to both sides: in a classifier the shares of two targets oppose each other whatever the labels,
    and a network that learns from true labels may have smaller contrasts than one that learns from noise.
    """
    if not refits.sizes["refit"]:
        return tidy(pd.DataFrame(columns=list(COLUMNS)))
    family = pd.DataFrame(
        {
            name: refits[name].values
            for name in ("layer", "statistic", "step", "index", "group_a", "group_b", "comparison")
        }
    )
    values, above = refits["value"].values.astype(np.float64), refits["above"].values.astype(bool)
    finite = np.isfinite(values).all(0)
    values = np.where(finite, values, 0.0)
    z, tie = null.standardised(values, "two-sided")
    # A rule that looked at the observed labelling alone would choose by the labels under test.
    tested = (above.mean(0) >= 0.5) & finite
    effect = null.standardised_effect(values)
    p = null.p_values(z[:, tested], tie[tested])
    adjusted = np.full((4, len(family)), np.nan)
    adjusted[:, tested] = [
        p,
        null.familywise_p(z[0, tested], null.maxima(z[:, tested]), tie[tested]),
        null.benjamini_hochberg(p),
        null.holm(p),
    ]
    below_floor = ~(above[0] & finite)
    # Without a p: below the noise floor as observed, or where an imbalance of a confounder remains.
    adjusted[:, below_floor | bool(refits.attrs.get("imbalance"))] = np.nan
    size, low, high = np.where(tested, effect[:3], np.nan)
    return tidy(
        family.assign(
            index=family["index"].where(family["index"] > 0).astype("Int64"),
            test=TEST,
            estimate=values[0],
            interval_low=effect.around(values[0], low),
            interval_high=effect.around(values[0], high),
            effect_size=size,
            effect_low=low,
            effect_high=high,
            p=adjusted[0],
            p_adjusted=adjusted[1],
            p_bh=adjusted[2],
            p_holm=adjusted[3],
            significant=adjusted[1] <= alpha,
            below_floor=below_floor,
        )[list(COLUMNS)]
    )


def describe(refits: xr.Dataset, table: pd.DataFrame, settings: RefitSettings, seeds: int) -> dict[str, Any]:
    """The test in words that a section on methods can quote, with the numbers filled in."""
    attributes = refits.attrs
    count, pairs = attributes["labellings"], attributes["pairs"]
    within = f" within {' and '.join(attributes['strata'])}" if attributes["strata"] else ""
    if attributes.get("conditional_on"):
        within += (
            f", conditionally on {' and '.join(attributes['conditional_on'])} by a logistic model of the target (Berrett et "
            "al. 2020)"
        )
    if not within:
        within = ", restricted by no grouping or covariate,"
    averaged = f", averaged over {seeds} trainings from different seeds" if seeds > 1 else ""
    tested = int(table["p"].notna().sum())
    too_few = null.too_few_labellings(count, tested, settings["alpha"])
    refits = main_of(refits)
    family = [
        f"{statistic} ({len(rows)} values)"
        for statistic, rows in table[table["p"].notna()].groupby("statistic", sort=False)
    ]
    none = f"a confounder differs, so {NO_P}" if attributes.get("imbalance") else "nothing above the noise floor"
    steps = sorted(set(np.atleast_1d(refits["step"].values).tolist()))
    when = f"{len(steps)} updates ({steps[0]} to {steps[-1]})" if steps else "no update"
    return {
        "method": (
            f"The labels of the subjects that the network was trained on, target and groups together, were permuted{within} "
            f"before training ({attributes['message']}), and the whole training was repeated {count - 1} times from the same "
            f"initial weights with the same held-out subjects{averaged}. At {when} of each training the singular values of "
            "the difference of the groups' mean shares of the gradient (contrast), the difference of their spectra, the "
            "cosine between the shares, the difference of effective ranks and the Frobenius norm of the contrast were "
            "compared with their distribution over trainings, to both sides; p counts the training with the labels as they are (Phipson "
            "and Smyth 2010). Family-wise p-values are by the maximum of the statistics, centred and scaled over trainings "
            "(Nichols and Holmes 2002). Differences are called significant at a family-wise p of "
            f"{settings['alpha']:g} or less."
        ),
        "family": (
            f"{tested} tests: {', '.join(family) or none}, over {pairs} comparison{'' if pairs == 1 else 's'}; "
            f"maximum over all of them, {count} labellings."
        ),
        "messages": [each for each in (attributes["message"], attributes.get("imbalance"), too_few) if each],
        "balance": attributes.get("balance") or None,
        "labellings": count,
        "enumerated": bool(attributes["enumerated"]),
        "refused": dict(attributes["refused"]),
    }
