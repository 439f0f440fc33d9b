"""The report, opened in a real browser."""

import html
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from autospec import specs
from autospec.cohort.tables import build_cohort
from autospec.config import parse_config
from autospec.ica.derivative import subject_files
from autospec.paths import result
from autospec.report import build
from autospec.report.build import build_report
from autospec.report.words import difference_caption, position_caption, spectra_caption, view_words
from autospec.statistics.calibration import tables
from autospec.statistics.calibration.design import QUICK
from autospec.statistics.seeds import describe_seeds
from autospec.statistics.table import CONFOUNDS_COLUMNS, read_tests, tidy
from autospec.trajectories import open_trajectories
from tests.cohort import trees

pytestmark = pytest.mark.browser

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def report(study):
    """Path of the study's report."""
    return study.draw()


@pytest.fixture(scope="module")
def browser(chromium):
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, report):
    """The report, open; what it asked for and complained about stands in ``page.asked`` and ``page.complaints``."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.asked, page.complaints = [], []

    def route(request):
        page.asked.append(request.request.url)
        if request.request.url.startswith(("file:", "data:")):
            request.continue_()
        else:
            request.abort()

    page.route("**/*", route)
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(report.as_uri())
    yield page
    page.close()


def test_the_report_asks_for_nothing_and_complains_of_nothing(page, report):
    page.wait_for_load_state("networkidle")
    assert page.asked[0] == report.as_uri()
    assert [url for url in page.asked[1:] if not url.startswith("data:")] == []
    assert page.complaints == []


def test_every_image_is_there_and_described(page):
    images = page.locator("img")
    assert images.count() == 3  # the page and two panels
    for image in images.all():
        assert image.evaluate("image => image.naturalWidth") > 200
        assert len(image.get_attribute("alt")) > 20
    assert page.locator("figure").count() == page.locator("figure > figcaption").count() == 3


def test_headings_descend_one_level_at_a_time(page):
    levels = [
        int(tag[1]) for tag in page.eval_on_selector_all("h1, h2, h3, h4, h5, h6", "all => all.map(x => x.tagName)")
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_link_leads_to_a_place_in_the_page_or_to_a_figure_beside_it(page):
    targets = page.eval_on_selector_all("a", "all => all.map(a => a.getAttribute('href'))")
    assert "#figure-7" in targets
    assert targets.count("figures/figure-s7.pdf") == 1
    for target in targets:
        assert target == "figures/figure-s7.pdf" or page.locator(target).count() == 1


def column(page, table: str, name: str) -> tuple:
    """Head of a column, and a function that reads its cells."""
    at = page.locator(f"section:has(#{table}) table[aria-labelledby={table}]")
    names = at.locator("thead th").all_inner_texts()
    number = names.index(name)
    head = at.locator("thead th").nth(number)
    return head, lambda: at.locator(f"tbody tr td:nth-child({number + 1})").all_inner_texts()


def test_clicking_a_head_sorts_numbers_as_numbers_and_again_backwards(page):
    head, cells = column(page, "tests", "resolved values")
    before = cells()
    assert len(set(before)) > 1
    assert head.get_attribute("aria-sort") == "none"
    for order, name in ((1, "ascending"), (-1, "descending")):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == name
        assert cells() == sorted(before, key=lambda text: order * float(text))
    other, _ = column(page, "tests", "paper: significant steps")
    other.locator("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert other.get_attribute("aria-sort") == "ascending"


def test_numbers_that_text_would_put_in_another_order_are_sorted_by_size(page):
    head, cells = column(page, "runs", "first loss")
    page.evaluate("""() => {
        const rows = document.querySelectorAll('table[aria-labelledby=runs] tbody tr');
        const head = [...document.querySelectorAll('table[aria-labelledby=runs] th')].findIndex(
            (th) => th.innerText === 'first loss');
        [['2.5', rows[0]], ['3e-5', rows[1]]].forEach(([text, row]) => {
            row.cells[head].textContent = text; row.cells[head].dataset.key = text; });
    }""")
    head.locator("button").click()
    assert cells() == ["3e-5", "2.5"]


def test_a_head_is_sorted_by_the_keyboard_too(page):
    head, cells = column(page, "runs", "run")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert cells() == ["judge", "coder"]


def test_the_page_fits_a_narrow_screen(page):
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.evaluate("document.body.scrollWidth") <= 400


def test_tables_hold_what_was_recorded(page, study):
    _, runs = column(page, "runs", "run")
    _, final = column(page, "runs", "final loss")
    shown = dict(zip(runs(), final(), strict=True))
    for run in ("coder", "judge"):
        loss = open_trajectories(study.run(run))["training/loss"].values[-1]
        assert float(shown[run]) == pytest.approx(loss, rel=1e-3)
    _, significant = column(page, "tests", "paper: significant values")
    of_runs = [read_tests(study.tests(run)) for run in ("coder", "judge")]
    values = [table[(table["test"] == "paper_student") & table["step"].isna()] for table in of_runs]
    values = [each[(each["statistic"] == "gradient") & ~each["below_floor"]] for each in values]
    assert sum(map(int, significant())) == sum(int((each["p"] < 0.05).sum()) for each in values) > 0
    assert set(column(page, "tests", "permutation: smallest p")[1]()) == {"–"}  # the study has none


def test_captions_say_what_the_data_say(page, study):
    tree = open_trajectories(study.run("coder"))
    captions = [" ".join(text.split()) for text in page.locator("figcaption").all_inner_texts()]
    assert captions[1] == spectra_caption(tree)
    assert "0 (N = 6), 1 (N = 6), 3 (N = 7)" in captions[1]
    assert "6 recorded steps from 0 to 10" in captions[1]
    last = tree["layers/encoder.0.weight/gradient"].sel(step=10, index=1, group=["0", "1", "3"])
    group = str(last["group"].values[last.values.argmax()])
    assert re.search(rf"group {group} in [^,]*encoder\.0\.weight", captions[1])
    tests, tree = read_tests(study.tests("judge")), open_trajectories(study.run("judge"))
    assert captions[2] == difference_caption(
        tree, tests, described(study, "judge"), ["0", "3"], "paper", "student", 0.05
    )
    assert (
        "The marks are those of the test paper. Tests: paper (describes this run, no evidence about groups)"
        in captions[2]
    )
    assert "permutation: not made for these groups; refit: not made for these groups" in captions[2]
    assert "Real data: 24 samples from images.gz and labels" in page.locator("section:has(figure)").first.inner_text()


def test_text_of_the_user_is_shown_as_text(study, report, monkeypatch, tmp_path, browser):
    monkeypatch.chdir(study.folder)
    settings = specs.report_settings(study.config)
    settings["title"] = "<script>alert(1)</script> & more"
    build_report(settings, [], str(tmp_path / "report.html"))
    page = browser.new_page()
    page.on("dialog", lambda dialog: pytest.fail("the title ran as a script"))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("h1").inner_text() == "<script>alert(1)</script> & more"
    page.close()


def test_the_caption_shows_the_paper_beside_the_valid_test_and_says_which_is_which(study):
    tree, tests = open_trajectories(study.run("coder")), read_tests(study.tests("coder"))
    rows = [
        {
            "layer": "encoder.0.weight",
            "statistic": "contrast",
            "step": 0,
            "index": k,
            "p_adjusted": p,
            "effect_size": 5.2 - k,
            "effect_low": 3.5 - k,
            "effect_high": 7.0 - k,
            "significant": p < 0.05,
            "below_floor": np.isnan(p),
        }
        for k, p in ((1, 0.01), (2, 0.31), (3, np.nan))
    ]
    valid = tidy(pd.DataFrame(rows).assign(group_a="0", group_b="3", test="permutation"))
    both = pd.concat([tests, valid], ignore_index=True)
    about = {
        "comparisons": {
            "0 - 3": {"family": "24 tests: contrast (24 values in 2 layers and 4 steps)", "messages": ["seed 0"]}
        },
        "refused": {"1 - 3": "The group '1' has 2 subjects, fewer than the 5 that a test needs."},
    }
    shown = {"tests": {"permutation": about}}
    words = difference_caption(tree, both, shown, ["3", "0"], "permutation", "student", 0.05)
    assert "The marks are those of the test permutation." in words
    assert "paper (describes this run, no evidence about groups): " in words
    assert (
        "1 of 2 singular values of the contrast that lie above the noise floor have a family-wise p of at most 0.05; the "
        "smallest is 0.01 with an effect of 4.2 (2.5 to 6) standard deviations; the family is 24 tests: contrast (24 values in "
        "2 layers and 4 steps); refit: not made for these groups." in words
    )
    assert "permutation: not made for these groups (the group '1' has 2 subjects, fewer than" in difference_caption(
        tree, both, shown, ["1", "3"], "permutation", "student", 0.05
    )
    about["comparisons"]["0 - 3"]["messages"].append("The groups differ in 'age' by 0.60, so no p is given.")
    withheld = both.assign(p_adjusted=np.nan, significant=False)
    words = difference_caption(tree, withheld, shown, ["0", "3"], "permutation", "student", 0.05)
    assert (
        "no singular value of the contrast has a p (the groups differ in 'age' by 0.60, so no p is given); the family is"
        in words
    )


def described(study, run):
    """What the stage of tests said of a run."""
    return json.loads(study.tests(run).with_suffix(".json").read_text())


def runs_of(study):
    """The runs of the study, for tables that read nothing of their trajectories."""
    experiments = specs.report_settings(study.config)["experiments"]
    return [build.Run(experiment, run, {}, xr.Dataset()) for experiment in experiments for run in experiment["runs"]]


def test_a_table_says_what_was_tested_in_which_family_and_what_was_refused(study, monkeypatch):
    monkeypatch.chdir(study.folder)
    found = described(study, "coder")
    family = found["tests"]["paper"]["family"]
    balance = [{"confounder": "age", "observed": 0.5, "low": 0.3, "high": 0.62}]
    permutation = {
        "comparisons": {
            "0 - 3": {
                "subjects": {"0": 6, "3": 7},
                "labellings": 100,
                "family": "24 tests",
                "messages": ["99 labellings were drawn", "few subjects"],
                "balance": balance,
            }
        },
        "refused": {"1 - 3": "Too few."},
    }
    refit = {"labellings": 100, "family": "7 tests.", "messages": ["99 of 1716"], "refused": {}}
    refit["balance"] = [{"comparison": "0 - 3", **balance[0]}]
    found["tests"] |= {"permutation": permutation, "refit": refit}
    monkeypatch.setattr(build, "_described", lambda experiment, run: found if run == "coder" else described(study, run))
    caption, rows = build._families_table(runs_of(study))
    assert "p_adjusted" in caption
    shown = [list(row.values())[2:] for row in rows if row["run"] == "coder"]
    assert shown == [
        ["paper", "all", "–", "–", family, "–", "–"],
        [
            *("permutation", "0 - 3", "6 and 7", "100", "24 tests", "age +0.50 (drawn +0.30 to +0.62)"),
            "99 labellings were drawn; few subjects",
        ],
        ["permutation", "1 - 3", "–", "–", "–", "–", "Refused. Too few."],
        ["refit", "all", "–", "100", "7 tests.", "0 - 3, age +0.50 (drawn +0.30 to +0.62)", "99 of 1716"],
    ]
    assert len(rows) == 4 + 1


def test_variability_over_seeds_stands_in_a_table_of_its_own_with_the_fits_warnings(study, monkeypatch):
    monkeypatch.chdir(study.folder)
    runs = runs_of(study)
    assert build._seeds_table(runs) == []
    trees = {
        seed: open_trajectories(study.run("coder")) for seed in ("seed0", "seed1")
    }  # twice the same: at the boundary
    found = described(study, "coder") | {"seeds": describe_seeds(trees, [("0", "3")])}
    interval = {"estimate": 0.25, "low": -0.5, "high": 1.0}
    layer = {
        "layer": "encoder.0.weight",
        "log2_ratio": interval,
        "cosine": {"estimate": None, "low": None, "high": None},
    }
    population = {"what_it_is": "Subjects drawn again.", "comparisons": {"0 - 3": [layer]}}
    found["tests"]["permutation"] = {"population": population}
    monkeypatch.setattr(build, "_described", lambda experiment, run: found if run == "coder" else described(study, run))
    (table,) = build._seeds_table(runs)
    assert "It is no test of groups" in table["caption"]
    assert table["caption"].endswith("Subjects drawn again.")
    rows = [dict(zip(table["columns"], (cell.text for cell in row), strict=True)) for row in table["rows"]]
    assert len(rows) == 4  # layers
    assert all(row["trainings"] == "2" for row in rows)
    (first,) = [row for row in rows if row["layer"] == "encoder.0.weight"]
    assert first["log2 ratio, subjects drawn again"] == "0.25 (-0.5 to 1)"
    assert first["cosine, subjects drawn again"] == "–"
    (model,) = [each for each in found["seeds"]["layers"] if each["layer"] == "encoder.0.weight"]
    warnings = model["mixed_model"]["warnings"]
    assert warnings
    assert first["said by the fit"] == "; ".join(warnings)


def test_captions_tell_how_the_network_did_on_held_out_data(study):
    tree = open_trajectories(study.run("coder"))
    tree.attrs["performance"] = {"held_out": 6, "explained": -0.2, "chance": 0.0, "at_chance": True}
    tests = read_tests(study.tests("coder"))
    for words in (
        spectra_caption(tree),
        difference_caption(tree, tests, described(study, "coder"), ["0", "3"], "paper", "student", 0.05),
        position_caption(tree, ["0", "3"]),
    ):
        assert words.endswith("At chance on held-out data, hence grey: variance explained -0.20 (N = 6).")


def test_the_calibration_stands_in_the_report_where_it_is_asked_for(study, report, monkeypatch, tmp_path):
    monkeypatch.chdir(study.folder)
    assert "How often the tests err" not in report.read_text()
    same = {"data": "volumes", "groups": "32 and 32", "effect": 0.0, "confounding": "none", "task": "autoencoder"}
    whole = {"statistic": "all", "step": "all", "values": "all", "expected": "alpha", "offered": "yes", "why": ""}
    rows = [
        {**same, **whole, "test": "permutation"},
        {**same, **whole, "test": "permutation", "step": "10"},  # of one step: not shown
        {**same, **whole, "test": "paper", "statistic": "gradient", "values": tables.HOLM_OVER_STEPS},
    ]
    rates = tables.tally(rows, [[0.05, np.nan, 0.5, 0.6, 0.7], [0.01] * 5, [0.001] * 3 + [0.9]])
    tables.write_table(rates, study.folder / result("calibration"))
    tables.write_described(QUICK, study.folder / result("calibration_described"))
    picture = study.folder / result("calibration_figure", extension="png")
    picture.write_bytes((study.folder / result("figure", figure=7, extension="png")).read_bytes())
    found = build.describe_calibration()["table"]
    assert found["columns"][4:9] == ["test", "values", "per cent", "95 % interval", "repetitions"]
    assert [[cell.text for cell in row][4:] for row in found["rows"]] == [
        ["permutation", "whole run, family-wise", "25", "0.6 to 80.6", "5", "1", "alpha"],
        ["paper", tables.HOLM_OVER_STEPS, "75", "19.4 to 99.4", "4", "0", "alpha"],
    ]
    assert "intervals are exact (Clopper and Pearson 1934, 95 %)" in found["caption"]
    settings = {**specs.report_settings(study.config), "calibration": True}
    build_report(settings, [], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert '<a href="#calibration">How often the tests err</a>' in page
    assert "0.6 to 80.6" in page


def test_the_caption_of_quality_speaks_of_a_template_only_where_there_is_one():
    settings = {
        "cohort": {"kind": "folder", "folder": "data"},
        "ica": {"template": "stand-in"},
        "datasets": {"courses": {"kind": "timeseries"}},
    }
    views = {
        "scica": specs.views(parse_config(settings)),
        "atlas": specs.views(parse_config({**settings, "ica": {"timecourses": "atlas", "atlas": "atlas.nii"}})),
        "precomputed": specs.views(parse_config({**settings, "ica": {"timecourses": "precomputed"}})),
    }
    said = {kind: view_words("quality", shown)[1] for kind, shown in views.items()}
    for words in ("template", "covers", "Below"):
        assert [kind for kind, caption in said.items() if words in caption] == ["scica"]


def test_the_report_says_what_differs_between_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trees.participants(tmp_path / "data/participants.tsv", [("1", "HC", "M", "20"), ("2", "SZ", "F", "30")])
    trees.fmriprep(tmp_path / "data", ["1"])
    trees.fmriprep(tmp_path / "data", ["2"], space="MNI152NLin2009cAsym", volumes=9)
    settings = {
        "title": "T",
        "alpha": 0.05,
        "variance": "welch",
        "scale": "raw",
        "calibration": False,
        "experiments": [],
    }
    settings["cohort"] = {"datasets": [], "views": []}

    def said(times):
        statuses = {}
        for name, time in times.items():
            folder = Path(result("ica", subject=name))
            content = {"status": "included", "volumes": 7 + int(name), "digest": name}
            statuses[name] = str(trees.write(folder / "status.json", json.dumps(content)))
            described = (folder / subject_files(name)["timecourses"]).with_suffix(".json")
            trees.write(described, json.dumps({"RepetitionTime": time}))
        line = build_cohort(trees.settings(tmp_path / "data"), statuses, str(Path(result("participants")).parent))
        build_report(settings, [], "report.html")
        page = html.unescape(Path("report.html").read_text())
        _, _, after = page.partition("<h3>Remarks on the data</h3>")
        found = re.findall("<li>(.*)</li>", after)
        assert line.count("; warning: ") == len(found)
        return found

    spaces, times, volumes = said({"1": 2.0, "2": 3.0})
    assert spaces.startswith("Participants' images are in different spaces: MNI152NLin6Asym (1: sub-1); ")
    assert times == "Repetition times differ (2 s: 1; 3 s: 1), so time points of participants do not match."
    assert volumes == "8 to 9 volumes of images are used; data sets are cut to the fewest."
    trees.image(next((tmp_path / "data/sub-2").rglob("*.nii.gz")), shape=(12, 12, 10))
    assert "images lie on several grids (10 x 12 x 10 voxels of" in " ".join(said({"1": 2.0, "2": 2.0})).lower()


def test_is_it_just_motion_stands_in_one_table_beside_the_panels_that_compare_diagnoses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(result("confounds", experiment="courses", run="coder"))
    path.parent.mkdir(parents=True)
    whole = {
        "comparison": "SZ - HC",
        "layer": "",
        "group_a": "SZ",
        "group_b": "HC",
        "n_a": 12,
        "n_b": 14,
        "balance": "age +0.10",
    }
    checks = [("labels", 0.04, ""), ("motion", 0.002, ""), ("matched", np.nan, "an imbalance remains")]
    rows = [
        {
            **whole,
            "check": check,
            "largest_statistic": 3.3,
            "largest_low": 1.1,
            "largest_high": 4.4,
            "p": p,
            "note": note,
        }
        for check, p, note in checks
    ]
    rows.append({**rows[0], "layer": "encoder.0.weight"})
    pd.DataFrame(rows, columns=list(CONFOUNDS_COLUMNS)).to_csv(path, sep="\t", index=False)
    panels = [
        {"letter": "A", "run": "coder", "compare": None},
        {"letter": "G", "run": "coder", "compare": ["HC", "SZ"]},
        {"letter": "H1", "run": "coder", "compare": ["A", "B"]},  # sites, which these rows do not look into
        {"letter": "I", "run": "judge", "compare": ["SZ", "HC"]},
    ]
    settings = {"experiments": [{"name": "courses", "runs": {"coder": {}, "judge": {}}, "panels": panels}]}
    (table,) = build._confounds_table(settings, [str(path)])
    assert table["title"] == "Is it just motion?"
    shown = [[cell.text for cell in row] for row in table["rows"]]
    assert len(shown) == 3  # the whole network's
    assert shown[1][:9] == ["courses", "coder", "G", "SZ - HC", "motion", "SZ", "HC", "12 and 14", "3.3 (1.1 to 4.4)"]
    assert shown[2][9] == "–"
    assert shown[2][-1] == "an imbalance remains"
    assert build._confounds_table(settings, []) == []
