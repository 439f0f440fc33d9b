"""The workflow on a cluster: a real Slurm, its one node this machine, its one GPU not a real one."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import run_command
from tests.workflow.conftest import STUDY, Analysis

pytestmark = [pytest.mark.slurm, pytest.mark.workflow]

STORES = [f"results/runs/small/{run}.zarr.zip" for run in ("autoencoder", "classifier")]


@pytest.fixture
def studies(tmp_path):
    """Two empty analyses of the same study and code, one to run here and one on the cluster."""
    here, there = Analysis(tmp_path), Analysis(tmp_path)
    here.folder, there.folder = tmp_path / "here", tmp_path / "there"
    here.copy_code()
    here.write(STUDY)
    # What must not be merged into the config given with --configfile, on the cluster's nodes either.
    there.write({**STUDY, "training": {"learning_rate": 0.5}})
    (there.folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return here, there


def fill_in(analysis: Analysis, cluster) -> None:
    """Edit the profile as its comments ask of a lab."""
    profile = "profiles/slurm/config.yaml"
    analysis.edit(profile, "# slurm_partition: cpu", f"slurm_partition: {cluster.partition}")
    analysis.edit(profile, "# slurm_partition: gpu", f"slurm_partition: {cluster.partition}\n    device: cpu")
    analysis.edit(profile, "# slurm-status-command: squeue", "slurm-status-command: squeue")
    analysis.edit(
        profile, "# slurm-init-seconds-before-status-checks: 40", "slurm-init-seconds-before-status-checks: 5"
    )


def test_grouped_trainings_in_one_slurm_job_give_the_bytes_of_a_local_run(studies, cluster, slurm_plugin):
    here, there = studies
    done = here.snakemake("--set-resources", "train:device=cpu", "--", *STORES)
    assert done.returncode == 0, done.stdout

    fill_in(there, cluster)
    done = run_command(
        "snakemake", "--profile", "profiles/slurm", "--directory", str(there.folder),
        "--configfile", str(there.folder / "study.yaml"),
        "--groups", "train=training", "--group-components", "training=2", "--", *STORES,
        folder=there.code,
        PATH=os.pathsep.join([str(cluster.commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
        PYTHONPATH=slurm_plugin,
    )  # fmt: skip
    jobs = cluster.jobs()
    assert done.returncode == 0, f"{done.stdout}\n{jobs}\n{cluster.log()}"

    for store in STORES:
        assert (there.folder / store).read_bytes() == (here.folder / store).read_bytes(), store

    # Slurm's own word on what ran: the data set by itself, both trainings as one job, one GPU for that job alone.
    assert [job["JobState"] for job in jobs] == ["COMPLETED", "COMPLETED"], jobs
    dataset, trainings = jobs
    assert dataset["Comment"].startswith("rule_dataset")
    assert trainings["Comment"].startswith("rule_training")
    assert (dataset["JOB_GRES"], trainings["JOB_GRES"]) == ("(null)", "gpu:1")
    assert (dataset["TimeLimit"], trainings["TimeLimit"]) == ("00:30:00", "08:00:00")
    assert dataset["JobName"] == trainings["JobName"]
    assert f"SLURM run ID: {trainings['JobName']}" in done.stdout
    assert f"submitted with SLURM jobid {trainings['JobId']}" in done.stdout
