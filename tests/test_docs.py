"""Examples in the pages run, links lead somewhere, and what pages promise is there."""

import ast
import doctest
import re
import sys

import numpy as np
import pytest

from autospec.provenance import _module
from tests.conftest import ROOT, run_command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]


def test_the_ten_line_example_runs(capsys):
    text = (ROOT / "docs/watch.md").read_text()
    example = re.search(r"```python\n(import torch.*?)```", text, re.DOTALL).group(1)
    names: dict = {}
    exec(compile(example, "docs/watch.md", "exec"), names)
    assert names["tree"]["layers/0.weight/gradient"].sizes == {"step": 50, "group": 3, "index": 8}
    printed = [float(number) for number in capsys.readouterr().out.split()]
    assert len(printed) == 2
    assert np.isfinite(printed).all()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_code_ends_and_what_is_called_python_is(page):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert page.read_text().count("```") == 2 * len(blocks)
    for language, code in blocks:
        if language == "python":
            ast.parse(doctest.script_from_examples(code) if code.startswith(">>>") else code, page.name)


def test_the_architecture_names_every_module():
    text = (ROOT / "docs/architecture.md").read_text()
    for file in (ROOT / "autospec").iterdir():
        if file.suffix == ".py" and file.name not in ("__init__.py", "__main__.py"):
            assert f"`{file.name}`" in text or f"{file.name}`" in text, file.name
    for folder in (
        "introspection",
        "introspection/layers",
        "introspection/rows",
        "statistics",
        "statistics/calibration",
        "training",
    ):
        for file in (ROOT / "autospec" / folder).glob("*.py"):
            assert file.name == "__init__.py" or f"`{file.name}`" in text, file


def test_imports_go_up_the_architectures_list():
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (`autospec/.*?) \|", text.split("## Inside introspection")[0], re.MULTILINE)
    places = {}
    for i, row in enumerate(rows):
        for place in re.findall(r"`(?:autospec/)?([\w/]+)(?:/|\.py)`", row):
            places["autospec." + place.replace("/", ".")] = i

    def place_of(module):
        while module not in places and "." in module:
            module = module.rpartition(".")[0]
        return module

    each_other = re.compile(r"autospec\.(cohort|ica|freesurfer)\b")
    imports = [
        (module, imported)
        for file in (ROOT / "autospec").rglob("*.py")
        for module in [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")]
        for imported in _module(module, ROOT).imports
        if place_of(module) in places and place_of(imported) in places
    ]
    modules = {path.stem for path in (ROOT / "autospec").iterdir() if not path.stem.startswith("__")}
    assert modules >= {place.split(".")[1] for place in places}
    assert imports
    for module, imported in imports:
        upwards = places[place_of(imported)] <= places[place_of(module)]
        assert upwards or (each_other.match(module) and each_other.match(imported)), f"{module} imports {imported}"


def test_no_page_is_left_with_a_blank_to_fill_in():
    for page in PAGES:
        assert not re.search(r"@[A-Z]+@|TODO|FIXME", page.read_text()), page


def test_the_benchmark_runs():
    done = run_command(sys.executable, "benchmarks/cost.py", "--quick", "--statistics", "gradient", folder=ROOT)
    assert done.returncode == 0, done.stdout
    assert "| **autospec.watch** |" in done.stdout
