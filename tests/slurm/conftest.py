"""Slurm for the tests, where this machine can have it."""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import need
from tests.slurm.cluster import DAEMONS, SYSTEM_PATH, Cluster

GET_SLURM = "as root on Debian, run  apt-get update && apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"


@pytest.fixture(scope="session")
def slurm_plugin() -> str:
    """Folder to put on PYTHONPATH for Snakemake's Slurm executor; empty if it is in the environment."""
    if importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        return ""
    folder = Path(sys.prefix) / "slurm-plugin"
    need(str(folder / "bin/generate-slurm-partition-config"), "run  make setup-slurm")
    return str(folder)


@pytest.fixture(scope="module")
def cluster():
    """A Slurm with one node, on this machine alone."""
    if os.geteuid() != 0:
        message = "Slurm's daemons run as root: run the tests as root"
        (pytest.fail if os.environ.get("AUTOSPEC_NEED_ALL") else pytest.skip)(message)
    for program in (*DAEMONS, "sbatch"):
        need(shutil.which(program, path=SYSTEM_PATH) or program, GET_SLURM)
    # Not below pytest's folder, whose parents are closed to other users and whose path may be long for a socket.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)
        with Cluster(Path(folder)) as running:
            yield running
