"""One small analysis, run once by the real Snakemake in a copy of the repository; each test gets its own copy."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, run_command

CODE = ("autospec", "workflow", "profiles", "envs", "Snakefile")

STUDY = {
    "title": "A small study",
    "datasets": {"digits": {"kind": "mnist", "classes": ["0", "1", "3"], "samples_per_class": 12}},
    "training": {"epochs": 6, "held_out": 0.0},
    "introspection": {"every": 2},
    "experiments": {
        "small": {
            "title": "A small experiment",
            "figure": 1,
            "dataset": "digits",
            "runs": {
                "autoencoder": {"task": "autoencoder", "hidden": [6]},
                "classifier": {"task": "classifier", "hidden": [6], "activation": "tanh"},
            },
            "panels": [
                {"run": "autoencoder"},
                {"run": "classifier"},
                {"run": "classifier", "compare": ["0", "3"]},
            ],
        }
    },
    "figures": {"dots_per_inch": 60},
}
ALL_JOBS = {
    "Building the data set digits",
    "Training small/autoencoder",
    "Training small/classifier",
    "Testing groups in small/autoencoder",
    "Testing groups in small/classifier",
    "Drawing the panels of small",
    "Composing figure 1",
    "Composing figure s1",
    "Summing up",
    "Writing the report",
}


def jobs_in(output: str) -> set[str]:
    """Messages of the jobs that Snakemake lists."""
    return set(re.findall(r"^Job \d+: (.*)$", output, re.MULTILINE))


class Analysis:
    """A folder with a config, and the copy of the repository whose Snakefile runs it."""

    def __init__(self, base: Path) -> None:
        self.code, self.folder = base / "code", base / "study"

    def copy_code(self) -> None:
        """Copy what the Snakefile needs out of the repository."""
        self.code.mkdir()
        for name in CODE:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, self.code / name)

    def write(self, config: dict) -> None:
        """Write the config."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def config(self) -> dict:
        """Read the config."""
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    def snakemake(self, *arguments: str):
        """Run Snakemake from the repository's folder on the analysis."""
        return run_command("snakemake", "--directory", str(self.folder), *arguments, folder=self.code)

    def planned(self, *arguments: str) -> set[str]:
        """Messages of the jobs that ``snakemake -n`` lists."""
        done = self.snakemake("-n", *arguments)
        assert done.returncode == 0, done.stdout
        return jobs_in(done.stdout)

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace text in the code."""
        path = self.code / file
        text = path.read_text()
        assert old in text, f"{file} no longer contains {old!r}"
        path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Analysis:
    """The analysis after one complete run; not to be changed."""
    analysis = Analysis(tmp_path_factory.mktemp("finished"))
    analysis.copy_code()
    analysis.write(STUDY)
    done = analysis.snakemake()
    assert done.returncode == 0, done.stdout
    analysis.output = done.stdout
    return analysis


@pytest.fixture
def analysis(finished, tmp_path) -> Analysis:
    """A copy of the finished analysis that a test may change."""
    shutil.copytree(finished.code.parent, tmp_path / "copy")
    return Analysis(tmp_path / "copy")
