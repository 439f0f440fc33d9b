"""What the calibration runs: its parts, sizes and names.  Imports nothing heavy, since Snakemake reads it at start-up."""

from __future__ import annotations

from typing import TypedDict

ALPHA = 0.05
GROUPS = {"equal": (32, 32), "unequal": (48, 16)}
DATA = ("volumes", "digits")
TASKS = ("autoencoder", "classifier")
CONFOUNDING = ("none", "number", "strata")
# Confounders of which the conditional test's model of the label, which is linear in the number, is wrong.
MISSPECIFIED = ("square", "threshold", "cube", "wave")
HIDDEN, LEARNING_RATE = 8, 0.01
STEPS = (0, 10, 50)
EFFECTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
POWER_STEPS = (0, 10, 20, 50, 100, 200)
POWER_REFIT_STEPS = POWER_STEPS[:4]
PAPER, PERMUTATION, REFIT = "paper", "permutation", "refit"
# How the labellings of a test meet the confounder.
CONDITIONAL = " conditional on the confounder"
MEETING = {"none": "", "number": CONDITIONAL, "strata": " within strata", **dict.fromkeys(MISSPECIFIED, CONDITIONAL)}


class CalibrationSettings(TypedDict):
    """What the stage reads from the configuration."""

    repetitions: int
    """Studies drawn of each kind of data, groups and confounder."""
    permutations: int
    refit_repetitions: int
    """How many of them the refit tests."""
    power_repetitions: int
    """Studies drawn at each size of effect."""
    seed: int


# Sizes of a calibration that shows that all of it runs, and nothing else.
QUICK: CalibrationSettings = {
    "repetitions": 4,
    "permutations": 19,
    "refit_repetitions": 2,
    "power_repetitions": 2,
    "seed": 0,
}


def parts() -> list[str]:
    """Names of the parts, each of which is a job of its own."""
    null = [f"{data}-{groups}-{kind}" for data in DATA for groups in GROUPS for kind in CONFOUNDING]
    return [*null, *(f"power-{effect:g}" for effect in EFFECTS), *(f"model-{shape}" for shape in MISSPECIFIED)]
