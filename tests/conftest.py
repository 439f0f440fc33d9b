"""What several tests share: a small data set, a trained run, and the real programs that some tests need."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """Start the slowest tests first, so that two workers end together."""
    items.sort(
        key=lambda item: 0 if item.get_closest_marker("slurm") else 1 if item.get_closest_marker("workflow") else 2
    )


def pytest_ignore_collect(collection_path, config):
    """Leave out tests that give torch another device for the rest of the process, but where they are asked for by their folder."""
    device = ROOT / "tests" / "device"
    asked_for = (Path(each.split("::")[0]).resolve() for each in config.args)
    return True if collection_path == device and not any(each.is_relative_to(device) for each in asked_for) else None


def need(program: str, how: str) -> str:
    """Path of a program; without it the test is skipped, or fails where AUTOSPEC_NEED_ALL is set."""
    found = shutil.which(program)
    if found is None:
        message = f"{program} is not installed: {how}"
        if os.environ.get("AUTOSPEC_NEED_ALL"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser."""
    return need("chromium", "as root on Debian, run  apt-get update && apt-get install chromium")


@pytest.fixture
def digits():
    """Eight tiny images of each of three digits, as (images, digits)."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], 8)
    images = generator.integers(0, 256, size=(24, 28, 28), dtype=np.uint8)
    return images, labels


def run_command(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a folder with this Python first on PATH; output is text, errors included."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A small analysis with its data set, trainings and tests made; not to be changed."""
    from tests.study import Study

    made = Study(tmp_path_factory.mktemp("study"))
    made.make()
    return made
