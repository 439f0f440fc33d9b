"""A cohort in the workflow: exact plans, participants as independent jobs, exclusions, kinds."""

import json
import re
import shutil

import nibabel
import numpy as np
import pytest
import xarray as xr
import yaml
import zarr

from autospec.ica.images import write_image
from autospec.ica.template import analysis_grid, on_grid, stand_in_template
from tests.conftest import ROOT
from tests.workflow.conftest import Analysis, jobs_in

pytestmark = pytest.mark.workflow

NETWORKS = 11
COHORT = {
    "title": "A small cohort",
    "cohort": {"kind": "folder", "folder": "data", "on_bad_subject": "exclude"},
    "ica": {"template": "template.nii.gz", "grid": 10, "smoothing_fwhm_mm": 0},
    "datasets": {
        "courses": {"kind": "timeseries"},
        "maps": {"kind": "maps", "voxel_mm": 20},
        "volumes": {"kind": "freesurfer"},
    },
    "figures": {"dots_per_inch": 60},
}
IDS = [f"sim{number:04d}" for number in range(1, 5)]
OWN = {f"Finding the networks of sub-{name}" for name in IDS}
PICTURES = {f"Drawing the cohort's {view}" for view in ("connectivity", "quality", "networks")}
TOGETHER = {"Bringing the cohort together"}
SETS = {f"Building the data set {name}" for name in COHORT["datasets"]}
REPORT = {"Writing the report"}
AFTER = TOGETHER | PICTURES | SETS | REPORT


def write_template(path):
    """Eleven networks on the grid of the simulated images."""
    template = stand_in_template()
    shape, affine = analysis_grid(10.0, template, None)
    write_image(on_grid(template, shape, affine)[..., ::5], affine, path)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Analysis:
    """Four simulated participants, with one file cut short, as a lab's own folder; the whole workflow run once."""
    analysis = Analysis(tmp_path_factory.mktemp("cohort"))
    analysis.copy_code()
    analysis.write({**COHORT, "cohort": {"kind": "simulated", "subjects": 6, "volumes": 40, "voxel_mm": 10}})
    write_template(analysis.folder / "template.nii.gz")
    planned = analysis.planned()
    done = analysis.snakemake("work/simulated/dataset_description.json")
    assert done.returncode == 0, done.stdout
    # What was planned without the files is what is planned with them.
    analysis.first_plan, analysis.second_plan = planned, analysis.planned()
    (analysis.folder / "work/simulated").rename(analysis.folder / "data")
    shutil.rmtree(analysis.folder / ".snakemake")
    for number in (5, 6):
        hide(analysis, f"sim{number:04d}")
    analysis.write(COHORT)
    done = analysis.snakemake()
    assert done.returncode == 0, done.stdout
    analysis.output = done.stdout
    return analysis


def hide(analysis, name):
    """Take a participant's images, volumes and row away; `show` brings them back."""
    data, store = analysis.folder / "data", analysis.folder / "hidden"
    store.mkdir(exist_ok=True)
    (data / f"sub-{name}").rename(store / f"sub-{name}")
    (data / f"sourcedata/freesurfer/sub-{name}").rename(store / f"volumes-{name}")
    table = data / "participants.tsv"
    lines = table.read_text().splitlines(keepends=True)
    (store / f"{name}.tsv").write_text("".join(line for line in lines if name in line))
    table.write_text("".join(line for line in lines if name not in line))


def show(analysis, name):
    data, store = analysis.folder / "data", analysis.folder / "hidden"
    (store / f"sub-{name}").rename(data / f"sub-{name}")
    (store / f"volumes-{name}").rename(data / f"sourcedata/freesurfer/sub-{name}")
    table = data / "participants.tsv"
    table.write_text(table.read_text() + (store / f"{name}.tsv").read_text())


def bold(analysis, name):
    return analysis.folder / f"data/sub-{name}/func/sub-{name}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"


@pytest.fixture
def cohort(made, tmp_path) -> Analysis:
    """A copy of the finished analysis that a test may change."""
    shutil.copytree(made.code.parent, tmp_path / "copy")
    return Analysis(tmp_path / "copy")


def edited(analysis, part, **settings):
    config = analysis.config()
    config[part] = {**config[part], **settings}
    analysis.write(config)
    return analysis.planned()


def test_the_plan_of_a_simulated_cohort_is_exact_before_its_files_are_there(made):
    everybody = OWN | {"Finding the networks of sub-sim0005", "Finding the networks of sub-sim0006"}
    assert made.first_plan == {"Simulating the cohort"} | everybody | AFTER
    assert made.second_plan == everybody | AFTER


def test_one_run_makes_everything(made):
    assert jobs_in(made.output) == OWN | AFTER
    assert made.planned() == set()
    record = json.loads((made.folder / "results/cohort/cohort.json").read_text())
    assert record["kind"] == "simulated"  # by the data's own description, although the config names a folder
    assert record["functional"] == record["structural"] == len(IDS)
    assert (made.folder / "results/cohort/exclusions.tsv").read_text().splitlines()[1:]  # who had left the study
    status = json.loads((made.folder / "results/ica/sub-sim0001/status.json").read_text())
    assert status["status"] == "included"
    assert status["volumes"] == 40
    table = (made.folder / "results/cohort/participants.tsv").read_text()
    assert status["digest"] in table
    for view in ("connectivity", "networks", "quality"):
        for extension in ("pdf", "png", "svg"):
            assert (made.folder / f"results/cohort/figures/{view}.{extension}").stat().st_size > 1000


def test_plain_xarray_reads_the_data_sets(made):
    found = {}
    for name in COHORT["datasets"]:
        store = zarr.storage.ZipStore(made.folder / f"results/datasets/{name}.zarr.zip", mode="r")
        found[name] = xr.open_dataset(store, engine="zarr").load()
        assert found[name]["id"].values.tolist() == IDS
        assert found[name].attrs["simulated"] is True or found[name].attrs["simulated"] == 1
        groups = found[name]["grouping_diagnosis_sex"].values.tolist()
        assert groups[0].startswith(found[name]["target"].values[0])
    assert found["courses"]["x"].dims == ("sample", "time", "network")
    assert found["courses"]["x"].shape == (4, 40, NETWORKS)
    assert found["maps"]["x"].shape[0] == 4
    assert found["maps"].attrs["voxel_mm"] == [20, 20, 20]
    assert found["volumes"]["x"].shape[1] > 50
    assert np.isfinite(found["maps"]["x"].values).all()


def test_another_participant_is_one_job_and_what_brings_all_together(cohort):
    show(cohort, "sim0005")
    assert cohort.planned() == {"Finding the networks of sub-sim0005"} | AFTER


def test_another_image_redoes_that_participant(cohort):
    path = bold(cohort, "sim0002")
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine, image.header), path)
    assert cohort.planned() == {"Finding the networks of sub-sim0002"} | AFTER


def test_a_word_in_the_table_finds_nobodys_networks_again(cohort):
    table = cohort.folder / "data/participants.tsv"
    table.write_text(table.read_text().replace("Right", "Left", 1))
    assert cohort.planned() == AFTER


@pytest.mark.parametrize(
    ("part", "settings", "jobs"),
    [
        ("cohort", {"layout": "bids"}, set()),  # as was found
        ("cohort", {"max_mean_fd": 5.0}, AFTER),
        ("cohort", {"on_bad_subject": "fail"}, AFTER),
        ("cohort", {"diagnosis": "Patient as labelled"}, AFTER),
        ("ica", {"low_pass_hz": 0.1}, OWN | AFTER),
        ("ica", {"drop_volumes": 2}, OWN | AFTER),
        ("figures", {"dots_per_inch": 61}, PICTURES | REPORT),
    ],
)
def test_a_setting_redoes_what_depends_on_it(cohort, part, settings, jobs):
    assert edited(cohort, part, **settings) == jobs


def test_a_setting_of_one_data_set_rebuilds_it_alone(cohort):
    assert (
        edited(cohort, "datasets", volumes={"kind": "freesurfer", "icv": "residual"})
        == {"Building the data set volumes"} | REPORT
    )
    assert (
        edited(cohort, "datasets", courses={"kind": "timeseries", "length": 30})
        == {
            "Building the data set courses",
            "Building the data set volumes",
        }
        | REPORT
    )


def test_an_edit_of_how_tables_are_read_finds_nobodys_networks_again(cohort):
    cohort.edit("autospec/cohort/phenotypes.py", 'return "HC" if', 'return "HC" if True and')
    assert not OWN & cohort.planned()
    assert cohort.planned() >= TOGETHER


def test_somebody_whose_image_is_bad_is_excluded_with_the_reason(cohort):
    path = bold(cohort, "sim0003")
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.int16), image.affine, image.header), path)
    target = "results/datasets/courses.zarr.zip"
    done = cohort.snakemake(target)
    assert done.returncode == 0, done.stdout
    exclusions = (cohort.folder / "results/cohort/exclusions.tsv").read_text()
    assert "sub-sim0003\tfunctional\t" in exclusions
    assert "is zero everywhere" in exclusions
    store = zarr.storage.ZipStore(cohort.folder / target, mode="r")
    assert xr.open_dataset(store, engine="zarr")["id"].values.tolist() == ["sim0001", "sim0002", "sim0004"]
    # The same under "fail" stops, although that participant's job is not done again.
    config = cohort.config()
    config["cohort"]["on_bad_subject"] = "fail"
    cohort.write(config)
    done = cohort.snakemake(target)
    assert done.returncode != 0
    assert "autospec: sub-sim0003 cannot be used" in done.stdout
    assert "set on_bad_subject: exclude" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_bad_image_stops_with_one_sentence_under_fail(cohort):
    config = cohort.config()
    config["cohort"]["on_bad_subject"] = "fail"
    cohort.write(config)
    path = bold(cohort, "sim0003")
    path.write_bytes(path.read_bytes()[:2000])
    done = cohort.snakemake("results/ica/sub-sim0003")
    assert done.returncode != 0
    name = re.escape(str(path.relative_to(cohort.folder)))
    assert len(set(re.findall(rf"^autospec: (?:the image )?{name} .*\.$", done.stdout, re.MULTILINE))) == 1
    assert "Traceback" not in done.stdout
    assert not (cohort.folder / "results/ica/sub-sim0003/status.json").exists()


def test_another_kind_of_cohort_in_the_same_results_is_refused(cohort):
    (cohort.folder / "data/dataset_description.json").write_text('{"Name": "A real one"}')
    done = cohort.snakemake("-n")
    assert done.returncode != 0
    assert "holds results of a simulated cohort, and this one is real" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_template_or_a_cohort_that_is_not_there_is_one_sentence(cohort):
    config = cohort.config()
    config["ica"]["template"] = "other.nii"
    cohort.write(config)
    said = cohort.snakemake("-n").stdout
    assert "ica.template names the file other.nii, which does not exist" in said
    config["ica"]["template"] = "template.nii.gz"
    config["cohort"]["folder"] = "elsewhere"
    cohort.write(config)
    said = cohort.snakemake("-n").stdout
    assert "the cohort's folder elsewhere does not exist" in said
    assert "Traceback" not in said


def test_gifts_mask_and_scaling_are_jobs_of_their_own(cohort):
    planned = edited(cohort, "ica", mask="gift", scaling="gift")
    assert planned == OWN | AFTER | {"Making GIFT's mask of the cohort", "Scaling maps as GIFT does"}
    done = cohort.snakemake("results/datasets/maps.zarr.zip")
    assert done.returncode == 0, done.stdout
    names = sorted(path.name for path in (cohort.folder / "results/ica/gift_maps").glob("*.nii.gz"))
    assert names == [f"sub-{name}_desc-scica_components.nii.gz" for name in IDS]


def test_snakemake_lint_finds_nothing(made):
    done = made.snakemake("--lint")
    assert done.returncode == 0, done.stdout


def test_the_demo_plus_a_cohort_plans_both(cohort):
    config = cohort.config()
    digits = yaml.safe_load((ROOT / "config.yaml").read_text())
    config["datasets"]["mnist"] = digits["datasets"]["mnist"]
    config["experiments"] = {"mnist_mlp": digits["experiments"]["mnist_mlp"]}
    cohort.write(config)
    planned = cohort.planned()
    assert "Training mnist_mlp/classifier_32_relu" in planned
    assert not OWN & planned
