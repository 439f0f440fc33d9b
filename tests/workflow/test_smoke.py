"""The smallest config that ships: every stage runs, its tables agree with each other, and edits reach what depends on them."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from autospec import open_trajectories
from autospec.config import load_config
from autospec.statistics.table import read_tests
from tests.conftest import ROOT
from tests.workflow.conftest import Analysis

pytestmark = pytest.mark.workflow

CONFIG = ROOT / "configs/smoke.yaml"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Analysis:
    """The config after one complete run."""
    analysis = Analysis(tmp_path_factory.mktemp("smoke"))
    analysis.copy_code()
    analysis.folder.mkdir()
    shutil.copy(CONFIG, analysis.folder / "config.yaml")
    done = analysis.snakemake()
    assert done.returncode == 0, done.stdout
    return analysis


def results(analysis: Analysis, path: str) -> Path:
    return analysis.folder / "results" / path


def test_everything_is_there_and_nothing_is_left_to_do(smoke):
    for figure in ("1", "s1", "3", "s3", "4", "s4", "timeseries_bert", "s_timeseries_bert"):
        assert results(smoke, f"figures/figure-{figure}.pdf").stat().st_size > 2000, figure
    page = results(smoke, "report.html").read_text()
    assert "imulated" in page
    assert smoke.planned() == set()


def test_each_run_is_tested_by_the_test_that_is_valid_for_it(smoke):
    coder = read_tests(results(smoke, "statistics/mnist_mlp/autoencoder_8_relu.tsv"))
    judge = read_tests(results(smoke, "statistics/freesurfer_mlp/classifier_8_relu.tsv"))
    assert set(coder["test"]) == {"paper_student", "paper_welch", "permutation"}
    assert set(judge["test"]) == {"paper_student", "paper_welch", "refit"}
    p = pd.concat([coder, judge]).query("test in ('permutation', 'refit')")["p"].dropna()
    assert len(p) > 0
    assert p.between(1 / 20, 1).all()  # 19 permutations: never 0
    described = json.loads(results(smoke, "statistics/freesurfer_mlp/classifier_8_relu.json").read_text())
    # labels are permuted within the target as well, but only to ask about motion and the like: of no pair of groups
    assert set(described["tests"]) == {"paper", "permutation", "refit"}
    assert "The test 'permutation' applied to no pair of groups." in described["which_test_applies"]
    assert set(described["columns"]) == set(judge.columns)


def test_the_summary_has_a_row_for_each_run_layer_and_pair(smoke):
    summary = pd.read_csv(results(smoke, "summary.tsv"), sep="\t")
    for name, experiment in load_config(CONFIG).experiments.items():
        for run in experiment.runs:
            tree = open_trajectories(results(smoke, f"runs/{name}/{run}.zarr.zip"))
            rows = summary[(summary["experiment"] == name) & (summary["run"] == run)]
            tests = read_tests(results(smoke, f"statistics/{name}/{run}.tsv"))
            assert set(rows["layer"]) == set(tree["layers"].children)
            pairs = tests[["group_a", "group_b"]].drop_duplicates()
            assert len(rows) == len(tree["layers"].children) * len(pairs)


def test_another_number_of_permutations_trains_nothing_again(smoke):
    config = yaml.safe_load((smoke.folder / "config.yaml").read_text())
    config["statistics"]["permutations"] = 29
    other = smoke.folder / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    planned = smoke.planned("--configfile", str(other))
    assert not [job for job in planned if job.startswith(("Training", "Finding", "Building", "Making", "Refitting"))]
    assert [job for job in planned if job.startswith("Permuting")], planned
