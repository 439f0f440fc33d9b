"""A small analysis, run in this process through the command line's own functions, without Snakemake."""

import contextlib
import gzip
import struct
from pathlib import Path

import numpy as np

from autospec import specs
from autospec.cli import main
from autospec.config import Config, parse_config
from autospec.paths import result

SETTINGS = {
    "title": "A small study",
    "datasets": {
        "digits": {
            "kind": "mnist",
            "images": "images.gz",
            "labels": "labels",
            "classes": ["0", "1", "3"],
            "samples_per_class": 8,
        }
    },
    "training": {"epochs": 12, "learning_rate": 0.01},
    "introspection": {"every": 2},
    "experiments": {
        "small": {
            "title": "A small experiment",
            "figure": 7,
            "dataset": "digits",
            "runs": {
                "coder": {"task": "autoencoder", "hidden": [6, 4], "activation": "tanh"},
                "judge": {"task": "classifier", "hidden": [6], "activation": "tanh"},
            },
            "panels": [
                {"run": "coder"},
                {"run": "judge", "compare": ["0", "3"]},
            ],
        }
    },
    "figures": {"dots_per_inch": 60},
}


def idx(array: np.ndarray) -> bytes:
    """Bytes of an IDX file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


class Study:
    """The analysis folder; its stages run when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Config = parse_config(SETTINGS)
        generator = np.random.default_rng(0)
        labels = np.tile([3, 0, 1], 10)
        images = generator.integers(0, 120, size=(30, 6, 5)) + 40 * labels[:, None, None]
        (folder / "images.gz").write_bytes(gzip.compress(idx(images)))
        (folder / "labels").write_bytes(idx(labels))
        self.dataset = folder / result("dataset", dataset="digits")

    def command(self, *arguments: str) -> None:
        """Run a stage in the analysis folder."""
        with contextlib.chdir(self.folder):
            assert main(arguments) == 0

    def run(self, run: str) -> Path:
        """Path of a run's trajectories."""
        return self.folder / result("run", experiment="small", run=run)

    def tests(self, run: str) -> Path:
        """Path of a run's table of tests."""
        return self.folder / result("tests", experiment="small", run=run)

    def make(self) -> None:
        """Build the data set, train, and test groups."""
        settings = specs.dataset_settings(self.config, "digits")
        self.command(
            "dataset", "--spec", specs.spec("dataset", settings), "--files", "images.gz", "labels",
            "--output", result("dataset", dataset="digits"),
        )  # fmt: skip
        for run in ("coder", "judge"):
            settings = specs.run_settings(self.config, "small", run)
            self.command(
                "train", "--spec", specs.spec("train", settings), "--dataset", str(self.dataset), "--work", "work",
                "--device", "cpu", "--output", str(self.run(run)),
                "--weights", str(self.folder / result("weights", experiment="small", run=run)),
                "--resources", result("run_resources", experiment="small", run=run),
            )  # fmt: skip
            settings = specs.test_settings(self.config, "small", run)
            self.command(
                "test", "--spec", specs.spec("test", settings), "--run", str(self.run(run)),
                "--output", str(self.tests(run)),
            )  # fmt: skip

    def draw(self) -> Path:
        """Draw the panels and the page as PNG, write the report, and return its path."""
        read = (
            "--runs", *(str(self.run(run)) for run in ("coder", "judge")),
            "--tests", *(str(self.tests(run)) for run in ("coder", "judge")),
        )  # fmt: skip
        names = specs.panel_names(self.config, "small")
        pictures = [result("panel", experiment="small", panel=name, extension="png") for name in names]
        spec = specs.spec("panels", specs.panels_settings(self.config, "small"))
        self.command("panels", "--spec", spec, *read, "--output", *pictures)
        spec = specs.spec("figure", specs.figure_settings(self.config, "small"))
        self.command("figure", "--spec", spec, *read, "--output", result("figure", figure=7, extension="png"))
        spec = specs.spec("report", specs.report_settings(self.config))
        self.command("report", "--spec", spec, "--inputs", str(self.dataset), "--output", result("report"))
        return self.folder / result("report")
