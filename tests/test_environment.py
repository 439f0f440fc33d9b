"""What autospec runs with: pins that agree with each other, with pyproject.toml, and with what is installed."""

import importlib.util
import re
import tomllib
from importlib import metadata
from itertools import chain

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

CONSTRAINTS = (ROOT / "envs/constraints.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.MULTILINE)
}


@pytest.fixture(scope="module")
def pin():
    """The module envs/pin.py."""
    spec = importlib.util.spec_from_file_location("pin", ROOT / "envs/pin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_conda_file_is_generated_from_the_constraints(pin):
    text = (ROOT / "envs/autospec.yaml").read_text()
    assert text == pin.conda_file(CONSTRAINTS), "run  python envs/pin.py --conda"
    *_, pip = yaml.safe_load(text)["dependencies"]
    assert len(pip["pip"]) == len(pin.runtime_pins(CONSTRAINTS)) > 10


def test_the_conda_file_holds_what_running_needs_and_not_what_testing_needs(pin):
    names = {canonicalize_name(line.split("==")[0]) for line in pin.runtime_pins(CONSTRAINTS)}
    assert {Requirement(line).name for line in PROJECT["dependencies"]} <= names
    assert not {"pytest", "mypy", "playwright", "ruff"} & names


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())])
def test_every_dependency_is_pinned_to_a_release_that_the_project_allows(line):
    needed = Requirement(line)
    name = canonicalize_name(needed.name)
    assert name in PINS, "run  make constraints"
    assert needed.specifier.contains(PINS[name])


def test_what_is_installed_is_what_is_pinned():
    for line in PROJECT["dependencies"]:
        name = Requirement(line).name
        assert metadata.version(name).split("+")[0] == PINS[canonicalize_name(name)]


def test_no_pin_names_a_local_build():
    assert PINS["torch"] == PINS["torch"].split("+")[0]
    assert not [line for line in CONSTRAINTS.splitlines() if "+" in line or "@" in line]
