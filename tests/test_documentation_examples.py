"""Every piece of code in the pages for users of `autospec.watch` runs, and every formula that code can check holds."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import autospec
from autospec.introspection import STATISTICS
from autospec.introspection.layers.convolution import CONVOLUTIONS, TRANSPOSED
from autospec.introspection.layers.recurrent import CELLS
from tests.conftest import ROOT, run_command

WATCH, MATHEMATICS = ROOT / "docs/watch.md", ROOT / "docs/mathematics.md"


@dataclass(frozen=True)
class Block:
    """A piece of Python in a page."""

    page: Path
    heading: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line} {self.heading}"

    def run(self, names: dict) -> None:
        """Execute it; a traceback shows the page's own line."""
        exec(compile("\n" * (self.line - 1) + self.code, str(self.page), "exec"), names)


def blocks_of(page: Path) -> list[Block]:
    blocks, lines = [], page.read_text().splitlines()
    heading, language, start = "", "", None
    for number, line in enumerate(lines, start=1):
        if start is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("```"):
            if start is not None:
                if language == "python":
                    blocks.append(Block(page, heading, start, "\n".join(lines[start - 1 : number - 1])))
                start = None
            else:
                start, language = number + 1, line[3:].strip()
    assert start is None, f"{page}: a block of code has no end"
    return blocks


BLOCKS = blocks_of(WATCH)
FIRST = BLOCKS[0]
LIBRARIES = {"lightning": "Lightning", "transformers": "Hugging Face Trainer"}
NEEDED = {"lightning": ("lightning",), "transformers": ("transformers", "accelerate")}
IN_PROCESSES = [block for block in BLOCKS if "init_process_group" in block.code]
WITH_LIBRARIES = [block for block in BLOCKS if block.heading in LIBRARIES.values()]
HERE = [block for block in BLOCKS if block not in (*IN_PROCESSES, *WITH_LIBRARIES)]


@pytest.fixture
def quiet_place(tmp_path, monkeypatch):
    """A folder of its own, one thread, and random numbers as at the start."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("block", HERE, ids=str)
def test_a_piece_of_code_runs(block, quiet_place):
    names: dict = {}
    if block is not FIRST and not re.match(r"(from|import) ", block.code):
        FIRST.run(names)  # as the page says
    block.run(names)


def test_each_kind_of_example_is_there():
    assert FIRST.heading == "Plain PyTorch"
    assert [block.heading for block in WITH_LIBRARIES] == list(LIBRARIES.values())
    assert len(IN_PROCESSES) == 1
    assert len(HERE) > 9


def test_the_plain_loop_without_its_two_lines_trains_the_same_bits(quiet_place, capsys):
    watched: dict = {}
    FIRST.run(watched)
    plain: dict = {}
    without = re.sub(r"with autospec\.watch\(.*\) as watcher:", "if True:", FIRST.code.split("tree =")[0])
    exec(without.replace("watcher.step()", "pass"), plain)
    for one, other in zip(watched["model"].parameters(), plain["model"].parameters(), strict=True):
        assert torch.equal(one, other)


def run_script(code: str, folder: Path, *launcher: str) -> str:
    """Run code in a process of its own; return what it printed."""
    (folder / "example.py").write_text(code)
    done = run_command(
        sys.executable,
        *launcher,
        "example.py",
        folder=folder,
        # A folder of libraries that are not in this environment may be given by PYTHONPATH.
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


REPORT = """
audit = tree.attrs["audit"]
print("steps", tree.step.values.tolist())
print("sizes", tree.group_size.values.tolist())
print("groups", tree.group.values.tolist())
print("layers", len(tree["layers"].children))
print("finite", all(bool(node["gradient"].notnull().all()) for node in tree["layers"].children.values()))
print("exact", audit["largest_error"] < 1e-6 and not audit["outside"])
print("hooks", sum(len(module._forward_hooks) for module in {model}.modules()))
"""


def reported(library: str, model: str, folder: Path, change: tuple[str, str] = ("", "")) -> dict:
    """Run the example for a library; return what was recorded."""
    for package in NEEDED[library]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"{package} is not installed, which this example needs: pip install 'autospec-neuro[{library}]'"
            )
    block = next(block for block in WITH_LIBRARIES if block.heading == LIBRARIES[library])
    assert change[0] in block.code
    code = block.code.replace(*change) if change[0] else block.code
    printed = run_script(code + REPORT.replace("{model}", model), folder)
    lines = [re.match(r"(steps|sizes|groups|layers|finite|exact|hooks) (.*)", line) for line in printed.splitlines()]
    return {line[1]: eval(line[2]) for line in lines if line}


def test_the_example_for_lightning_runs(tmp_path):
    found = reported("lightning", "trainer.lightning_module", tmp_path)
    assert found["steps"] == list(range(0, 20, 2))
    assert found["groups"] == ["all", "HC", "SZ"]
    assert [sizes[0] for sizes in found["sizes"]] == [16] * 10
    assert sum(map(sum, found["sizes"])) == 2 * 16 * 10
    assert (found["layers"], found["finite"], found["exact"], found["hooks"]) == (2, True, True, 0)


def test_micro_batches_of_lightning_add_up_to_one_step(tmp_path):
    found = reported(
        "lightning", "trainer.lightning_module", tmp_path, ("max_epochs=5", "max_epochs=2, accumulate_grad_batches=4")
    )
    assert (found["steps"], found["sizes"]) == ([0], [[64, 40, 24]])
    assert found["exact"]


def test_the_example_for_the_trainer_runs(tmp_path):
    found = reported("transformers", "model", tmp_path)
    assert found["steps"] == list(range(6))
    assert [sizes[0] for sizes in found["sizes"]] == [16] * 6  # two micro-batches of eight
    assert np.reshape(found["sizes"], (3, 2, 3)).sum(1).tolist() == [[32, 20, 12]] * 3  # each epoch has all
    assert (found["layers"], found["finite"], found["exact"], found["hooks"]) == (17, True, True, 0)


def test_the_example_with_several_processes_runs(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo, with which processes talk to each other on a CPU")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run_script(IN_PROCESSES[0].code, tmp_path, *launcher)
    assert "[64 40 24]" in printed


def test_every_option_and_statistic_is_on_the_page():
    text = WATCH.read_text()
    for option in inspect.signature(autospec.watch).parameters:
        assert re.search(rf"\b{option}=|`{option}", text), option
    for statistic in STATISTICS:
        assert f'`"{statistic}"`' in text, statistic


def test_every_supported_layer_is_in_the_table():
    table = "\n".join(line for line in WATCH.read_text().splitlines() if line.startswith("|"))
    for layer in (
        torch.nn.Linear,
        torch.nn.Embedding,
        torch.nn.MultiheadAttention,
        *CELLS,
        torch.nn.RNN,
        torch.nn.LSTM,
    ):
        assert f"`nn.{layer.__name__}`" in table
    for layer in (*CONVOLUTIONS, *TRANSPOSED):
        assert layer.__name__.removeprefix("ConvTranspose") in table


def anchors(page: Path) -> set[str]:
    """Targets that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [WATCH, MATHEMATICS], ids=lambda page: page.name)
def test_links_within_pages_lead_to_headings(page):
    for file, anchor in re.findall(r"\]\(([^)#]*)#([^)]*)\)", page.read_text()):
        assert anchor in anchors(page.parent / file if file else page), anchor


# ---------------------------------------------------------------------- the mathematics

FORMULAS = blocks_of(MATHEMATICS)


def test_every_formula_that_code_checks_holds(quiet_place):
    """The page's examples run from top to bottom, as one reads it."""
    names: dict = {}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for block in FORMULAS:
        assert block.code.lstrip().startswith(">>>"), f"{block} shows no result"
        test = parser.get_doctest(block.code + "\n", names, str(block), str(block.page), block.line - 1)
        test.globs = names
        runner.run(test, out=said.append, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
    assert runner.tries > 40


def test_every_section_of_the_mathematics_is_checked():
    sections = re.findall(r"^## (.*)$", MATHEMATICS.read_text(), re.MULTILINE)
    checked = {block.heading for block in FORMULAS}
    assert set(sections) - checked <= {"Sources"}
