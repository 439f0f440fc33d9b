"""The calibration as a target of the workflow."""

import pandas as pd
import pytest

from autospec.paths import result
from autospec.statistics.calibration.design import parts

pytestmark = pytest.mark.workflow
JOBS = {f"Calibrating the tests of groups: {part}" for part in parts()}
DRAWING = "Drawing the calibration of the tests of groups"
SIZES = {"repetitions": 2, "permutations": 19, "refit_repetitions": 1, "power_repetitions": 1}


def test_the_calibration_is_a_target_of_its_own(analysis):
    assert analysis.planned("calibration") == {*JOBS, DRAWING}
    assert not any("alibrat" in job for job in analysis.planned())


def test_a_part_is_made_once_and_again_after_an_edit_of_the_calibration_alone(analysis):
    config = analysis.config()
    analysis.write({**config, "calibration": SIZES})
    part = result("calibration_part", setting="power-0.4")
    done = analysis.snakemake(part)
    assert done.returncode == 0, done.stdout
    table = pd.read_csv(analysis.folder / part, sep="\t")
    assert set(table["effect"]) == {0.4}
    assert set(table["repetitions"]) == {1}
    assert analysis.planned("calibration") == {*JOBS, DRAWING} - {"Calibrating the tests of groups: power-0.4"}
    analysis.write({**config, "calibration": SIZES, "statistics": {"alpha": 0.01}})
    assert not analysis.planned(part)
    analysis.write({**config, "calibration": {**SIZES, "seed": 1}})
    assert analysis.planned(part) == {"Calibrating the tests of groups: power-0.4"}
