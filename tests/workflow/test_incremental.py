"""What reruns after an edit, by Snakemake's own list of jobs."""

import zipfile

import pytest

from tests.workflow.conftest import ALL_JOBS, STUDY, jobs_in

pytestmark = pytest.mark.workflow

# What follows from other tests of the same trajectories.
COMPARED = {
    "Testing groups in small/autoencoder",
    "Testing groups in small/classifier",
    "Summing up",
    "Drawing the panels of small",
    "Composing figure 1",
    "Composing figure s1",
    "Writing the report",
}
DRAWN = {name for name in ALL_JOBS if name.startswith(("Drawing", "Composing", "Writing"))}


def test_first_run_makes_everything(finished):
    assert jobs_in(finished.output) == ALL_JOBS
    assert (finished.folder / "results/report.html").stat().st_size > 10_000
    for figure in ("1", "s1"):
        for extension in ("pdf", "png"):
            assert (finished.folder / f"results/figures/figure-{figure}.{extension}").stat().st_size > 1000
    assert len((finished.folder / "results/summary.tsv").read_text().splitlines()) == 1 + 2 * 2 * 3  # pairs of groups


def test_second_run_has_nothing_to_do(analysis):
    assert "Nothing to be done" in analysis.snakemake().stdout
    assert analysis.planned() == set()


def test_touching_the_config_reruns_nothing(analysis):
    analysis.write(STUDY)
    assert analysis.planned() == set()


def test_one_runs_activation_redoes_that_run_and_what_shows_it(analysis):
    config = analysis.config()
    config["experiments"]["small"]["runs"]["classifier"]["activation"] = "sigmoid"
    analysis.write(config)
    assert analysis.planned() == {
        "Training small/classifier",
        "Testing groups in small/classifier",
        "Summing up",
        "Drawing the panels of small",
        "Composing figure 1",
        "Composing figure s1",
        "Writing the report",
    }


def test_how_often_checkpoints_are_written_reruns_nothing(analysis):
    config = analysis.config()
    config.setdefault("training", {})["checkpoint_minutes"] = 7.0
    analysis.write(config)
    assert analysis.planned() == set()


def test_a_page_size_redraws_the_page_alone(analysis):
    config = analysis.config()
    config["figures"]["page_height_mm"] = 250.0
    analysis.write(config)
    assert analysis.planned() == {"Composing figure 1", "Composing figure s1", "Writing the report"}


def test_a_panel_size_retrains_nothing(analysis):
    config = analysis.config()
    config["figures"]["panel_width_mm"] = 150.0
    analysis.write(config)
    assert analysis.planned() == DRAWN - {"Composing figure 1", "Composing figure s1"}


def test_swapped_values_of_two_settings_are_noticed(analysis):
    config = analysis.config()
    config["training"], config["introspection"] = {**config["training"], "epochs": 2}, {"every": 6}
    analysis.write(config)
    assert {"Training small/autoencoder", "Training small/classifier"} <= analysis.planned()


def test_another_level_of_significance_redraws_what_shows_it(analysis):
    config = analysis.config()
    config["statistics"] = {"alpha": 0.01}
    analysis.write(config)
    assert analysis.planned() == COMPARED


def test_other_singular_values_redraw_what_shows_them(analysis):
    config = analysis.config()
    config["figures"]["singular_values"] = [1, 3]
    analysis.write(config)
    assert analysis.planned() == DRAWN - {"Composing figure s1"}


def test_statistics_of_permutations_are_kept_from_when_that_is_asked_for(analysis):
    config = analysis.config()
    config["statistics"] = {"permutation": "all", "permutations": 19}
    analysis.write(config)
    done = analysis.snakemake()
    assert done.returncode == 0, done.stdout
    assert analysis.planned() == set()
    permuted = {
        *("Permuting labels in small/autoencoder", "Testing groups in small/autoencoder", "Composing figure s1"),
        *("Summing up", "Writing the report"),
    }
    for more in ({}, {"permutations": 29}, {"seed": 9}):
        config["statistics"] |= {"keep_null": True, **more}
        analysis.write(config)
        assert analysis.planned() == permuted
    done = analysis.snakemake()
    assert done.returncode == 0, done.stdout
    assert zipfile.is_zipfile(analysis.folder / "results/statistics/small/autoencoder.null.zarr.zip")
    assert analysis.planned() == set()
    for change in ({"permutations": 19}, {"keep_null": False}):
        analysis.write({**config, "statistics": config["statistics"] | change})
        assert analysis.planned() == permuted


def test_tests_of_logarithms_redraw_comparisons_alone(analysis):
    config = analysis.config()
    config["statistics"] = {"scale": "log"}
    analysis.write(config)
    assert analysis.planned() == COMPARED


@pytest.mark.parametrize(
    "file", ["autospec/introspection/spectra.py", "autospec/figures/style.py", "autospec/config.py"]
)
def test_a_comment_reruns_nothing(analysis, file):
    analysis.edit(file, '"""', '"""Reworded: ')
    (analysis.code / file).write_text((analysis.code / file).read_text() + "\n# a remark\n")
    assert analysis.planned() == set()


def test_an_edit_of_the_figures_code_redraws_alone(analysis):
    analysis.edit("autospec/figures/style.py", '"font.size": 7', '"font.size": 8')
    assert analysis.planned() == DRAWN


def test_an_edit_of_the_introspection_retrains(analysis):
    analysis.edit("autospec/introspection/spectra.py", "clamp_min(0)", "clamp_min(0.0)")
    assert analysis.planned() == ALL_JOBS - {"Building the data set digits"}


def test_an_edit_of_the_tests_code_retrains_nothing(analysis):
    analysis.edit("autospec/statistics/paper.py", ".sum(1) >= 2", ".sum(1) >= 3")
    assert not any(name.startswith(("Training", "Building")) for name in analysis.planned())
    assert {"Testing groups in small/autoencoder", "Testing groups in small/classifier"} <= analysis.planned()


def test_a_missing_panel_is_a_target_and_is_drawn_with_the_others_of_its_experiment(analysis):
    config = analysis.config()
    config["experiments"]["second"] = {**config["experiments"]["small"], "figure": 2}
    analysis.write(config)
    panel = analysis.folder / "results/figures/small/autoencoder.svg"
    before = panel.read_bytes()
    panel.unlink()
    target = "results/figures/small/autoencoder.svg"
    assert analysis.planned(target) == {"Drawing the panels of small"}
    assert "Drawing the panels of second" in analysis.planned()
    done = analysis.snakemake(target)
    assert done.returncode == 0, done.stdout
    assert panel.read_bytes() == before
    assert not (analysis.folder / "results/figures/second").exists()


def test_runs_are_reproducible_to_the_byte(analysis):
    store = analysis.folder / "results/runs/small/classifier.zarr.zip"
    before = store.read_bytes()
    store.unlink()
    done = analysis.snakemake("results/runs/small/classifier.zarr.zip")
    assert done.returncode == 0, done.stdout
    assert store.read_bytes() == before
