"""Code fingerprints: what changes them and what does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from autospec.provenance import fingerprint, import_closure
from autospec.specs import STAGES

# Each copy of the package is a new folder, so nothing is remembered from one fingerprint to the next.
PACKAGE = {
    "__init__.py": "",
    "stage.py": '''"""A stage."""

from typing import TYPE_CHECKING

import numpy

from autospec.parts import wheel

from . import axle

if TYPE_CHECKING:
    from autospec import hints


def run(x: "hints.Hint") -> int:
    """Run."""
    from .late import value

    # a remark
    return wheel.turn(x) + axle.LENGTH + value
''',
    "parts/__init__.py": "",
    "parts/wheel.py": "from .spoke import COUNT\n\n\ndef turn(x):\n    return x * COUNT\n",
    "parts/spoke.py": "COUNT = 12\n",
    "axle.py": "LENGTH = 3\n",
    "late.py": "import scipy.stats\n\nvalue = 1\n",
    "hints.py": "import pandas\n\nHint = int\n",
    "elsewhere.py": "x = 1\n",
}


@pytest.fixture
def fingerprint_with(tmp_path):
    """Fingerprint of the stage after one file's text was replaced."""
    made = []

    def write(file: str = "", old: str = "", new: str = "") -> str:
        root = tmp_path / f"copy-{len(made)}"
        made.append(root)
        for name, text in PACKAGE.items():
            assert name != file or old in text
            path = root / "autospec" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace(old, new) if name == file else text)
        return fingerprint("autospec.stage", root=root)

    return write


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("stage.py", "# a remark", "# another remark\n"),
        ("stage.py", '"""Run."""', '"""Run the stage."""'),
        ("stage.py", '    """Run."""\n', ""),
        ("stage.py", '"""A stage."""\n', ""),
        ("parts/wheel.py", "x * COUNT", "(x\n        * COUNT)"),
        ("axle.py", "LENGTH = 3", "\n\nLENGTH    = 3  # metres"),
    ],
)
def test_comments_docstrings_and_formatting_leave_the_fingerprint(fingerprint_with, file, old, new):
    assert fingerprint_with(file, old, new) == fingerprint_with()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("stage.py", "+ value", "- value"),
        ("parts/wheel.py", "x * COUNT", "x + COUNT"),
        ("parts/spoke.py", "12", "13"),
        ("axle.py", "3", "4"),
        ("late.py", "value = 1", "value = 2"),
        ("parts/__init__.py", "", "print()"),
    ],
)
def test_an_edit_of_code_that_the_stage_imports_changes_the_fingerprint(fingerprint_with, file, old, new):
    assert fingerprint_with(file, old, new) != fingerprint_with()


@pytest.mark.parametrize(("file", "old", "new"), [("elsewhere.py", "1", "2"), ("hints.py", "int", "str")])
def test_an_edit_elsewhere_leaves_the_fingerprint(fingerprint_with, file, old, new):
    assert fingerprint_with(file, old, new) == fingerprint_with()


def test_the_closure_follows_every_kind_of_import_that_runs(fingerprint_with, tmp_path):
    fingerprint_with()
    modules, packages = import_closure(("autospec.stage",), tmp_path / "copy-0")
    names = ("autospec", "stage", "parts", "parts.wheel", "parts.spoke", "axle", "late")
    assert modules == {name if name == "autospec" else f"autospec.{name}" for name in names}
    assert packages == {"numpy", "scipy"}


@pytest.mark.parametrize("stage", ["panels", "figure", "report", "test"])
def test_stages_that_only_read_results_do_not_depend_on_torch_or_introspection(stage):
    modules, packages = import_closure((STAGES[stage],))
    assert "torch" not in packages
    assert not [name for name in modules if name.startswith(("autospec.introspection", "autospec.training"))]


def test_training_depends_on_introspection_models_and_torch_and_on_no_figure():
    modules, packages = import_closure((STAGES["train"],))
    assert {"autospec.introspection.spectra", "autospec.models.mlp", "autospec.trajectories"} <= modules
    assert {"torch", "numpy", "zarr"} <= packages
    assert not [name for name in modules if name.startswith(("autospec.figures", "autospec.report", "autospec.config"))]


def loaded_by(*arguments: str) -> set[str]:
    """Top-level modules that a fresh Python has imported at the end."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    return {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}


def test_importing_the_package_is_cheap():
    loaded = loaded_by("-c", "import autospec")
    assert "autospec" in loaded
    assert not loaded & {"torch", "xarray", "numpy", "pandas", "pydantic"}


def test_help_does_not_wait_for_torch():
    loaded = loaded_by("-m", "autospec", "--help")
    assert "argparse" in loaded
    assert not loaded & {"torch", "xarray", "matplotlib"}
