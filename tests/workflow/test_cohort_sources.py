"""Cohorts that bring time courses, an atlas in place of a template, several images of a participant: the whole workflow."""

import h5py
import nibabel
import numpy as np
import pytest
import scipy.stats
import xarray as xr
import zarr

from autospec.cohort.simulated import simulate_cohort
from autospec.ica.images import write_image
from autospec.ica.template import mni_brain
from tests.cohort.trees import participants, write
from tests.workflow.conftest import Analysis, jobs_in
from tests.workflow.test_cohort import NETWORKS, write_template

pytestmark = pytest.mark.workflow

PEOPLE = [("7", "SZ", "M", "30"), ("9", "HC", "F", "n/a"), ("3", "HC", "n/a", "25")]
FIGURES = {"dots_per_inch": 60}
SIMULATION = {
    "subjects": 4,
    "seed": 0,
    "volumes": 30,
    "voxel_mm": 12,
    "connectivity_effect": 0.3,
    "volume_effect": 0.8,
    "null": False,
}
AFFINE = np.diag([12.0, 12, 12, 1])
AFFINE[:3, 3] = -78, -112, -70
SHAPE = (14, 16, 13)


@pytest.fixture
def analysis(tmp_path) -> Analysis:
    """An empty analysis."""
    made = Analysis(tmp_path)
    made.copy_code()
    made.folder.mkdir()
    return made


def finish(analysis, config):
    """Run everything that the config asks for; return the messages of the jobs."""
    analysis.write({"title": "A small cohort", "figures": FIGURES, **config})
    planned = analysis.planned()
    done = analysis.snakemake()
    assert done.returncode == 0, done.stdout
    assert jobs_in(done.stdout) == planned
    assert analysis.planned() == set()
    assert (analysis.folder / "results/report.html").stat().st_size > 10_000
    return planned


def read(analysis, name):
    store = zarr.storage.ZipStore(analysis.folder / f"results/datasets/{name}.zarr.zip", mode="r")
    return xr.open_dataset(store, engine="zarr").load()


def write_gift(folder, people):
    """GIFT's output as .mat files of version 7.3: HDF5 with the axes of every array reversed; what was written."""
    generator = np.random.default_rng(3)
    mask = mni_brain(SHAPE, AFFINE)
    folder.mkdir()
    nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8)[..., None], AFFINE), folder / "PMask.nii")
    participants(folder / "participants.tsv", people)
    written = []
    for number in range(1, len(people) + 1):
        courses, maps = generator.normal(size=(40, 5)), generator.normal(size=(5, int(mask.sum())))
        with h5py.File(folder / f"P_ica_c{number}-1.mat", "w", userblock_size=512) as file:
            file["tc"], file["ic"] = courses.T, maps.T
        written.append((courses, maps))
    return mask, written


def scaled(courses):
    """Time courses (time, network) without GIFT's slow trends, z-scored."""
    time = np.arange(len(courses)) / (len(courses) - 1)
    waves = [np.exp(2j * np.pi * cycles * time) for cycles in (0, 1, 2)]
    trends = np.stack([time, *(part for wave in waves for part in (wave.real, wave.imag))], axis=1)
    return scipy.stats.zscore(courses - trends @ np.linalg.pinv(trends) @ courses, axis=0)


def test_gifts_mat_files_become_data_sets(analysis):
    mask, written = write_gift(analysis.folder / "gift", PEOPLE)
    planned = finish(
        analysis,
        {
            "cohort": {"kind": "folder", "folder": "gift"},
            "ica": {"timecourses": "precomputed", "repetition_time": 2.0},
            "datasets": {"courses": {"kind": "timeseries"}, "maps": {"kind": "maps"}},
        },
    )
    assert {f"Taking over the networks of sub-{name}" for name in "379"} <= planned
    courses, maps = read(analysis, "courses"), read(analysis, "maps")
    order = {"7": 0, "9": 1, "3": 2}  # GIFT knows people by the order of the table
    assert sorted(courses["id"].values) == ["3", "7", "9"]
    for i, name in enumerate(courses["id"].values):
        tc, ic = written[order[name]]
        np.testing.assert_allclose(courses["x"].values[i], scaled(tc), atol=1e-5)
        # MATLAB counts the mask's voxels with the first axis fastest.
        expected = np.zeros(mask.size)
        expected[mask.ravel(order="F")] = scipy.stats.zscore(ic, axis=1).max(0)
        np.testing.assert_allclose(maps["x"].values[i], expected.reshape(SHAPE, order="F"), atol=1e-4)
    assert courses.attrs["simulated"] == maps.attrs["simulated"] == 0
    assert dict(zip(courses["id"].values, courses["target"].values, strict=True)) == {"7": "SZ", "9": "HC", "3": "HC"}


def test_trends_file_becomes_a_data_set(analysis):
    folder = analysis.folder / "trends"
    folder.mkdir()
    values = np.random.default_rng(4).normal(size=(4, 100, 30))
    with h5py.File(folder / "COBRE_AllData.h5", "w") as file:
        file["COBRE_dataset"] = values.reshape(4, -1)
    write(folder / "labels_COBRE.csv", "1\n2\n2\n1\n")
    write(folder / "correct_indices_GSP.csv", "2\n69\n100\n")  # counted from one
    config = {
        "cohort": {"kind": "folder", "folder": "trends"},
        "ica": {"timecourses": "precomputed"},
        "datasets": {"courses": {"kind": "timeseries"}},
    }
    analysis.write(config)
    said = analysis.snakemake("-n").stdout
    assert "no patient counts as strict schizophrenia" in said  # its labels have no codes
    finish(analysis, {**config, "cohort": {**config["cohort"], "diagnosis": "Patient as labelled"}})
    courses = read(analysis, "courses")
    assert courses["id"].values.tolist() == ["001", "002", "003", "004"]
    assert courses["target"].values.tolist() == ["HC", "SZ", "SZ", "HC"]
    for found, wanted in zip(courses["x"].values, values[:, [1, 68, 99]], strict=True):
        np.testing.assert_allclose(found, scaled(wanted.T), atol=1e-5)
    assert np.isnan(courses["covariate_mean_fd"].values).all()


def test_an_atlas_takes_the_place_of_a_template(analysis):
    simulate_cohort(SIMULATION, str(analysis.folder / "data"))
    regions = np.zeros(SHAPE, dtype=np.float32)
    regions[mni_brain(SHAPE, AFFINE)] = 1
    regions[SHAPE[0] // 2 :] *= 2
    write_image(regions, AFFINE, analysis.folder / "halves.nii.gz")
    planned = finish(
        analysis,
        {
            "cohort": {"kind": "folder", "folder": "data"},
            "ica": {"timecourses": "atlas", "atlas": "halves.nii.gz", "smoothing_fwhm_mm": 0},
            "datasets": {"courses": {"kind": "timeseries"}, "volumes": {"kind": "freesurfer", "icv": "proportional"}},
        },
    )
    assert "Drawing the cohort's networks" not in planned
    courses, volumes = read(analysis, "courses"), read(analysis, "volumes")
    assert courses["x"].shape == (4, 30, 2)
    assert courses["network"].values.tolist() == ["region-001", "region-002"]
    assert courses.attrs["simulated"] == 1
    assert (volumes["covariate_intracranial_volume"].values > 1e6).all()
    np.testing.assert_array_equal(volumes["covariate_mean_fd"].values, courses["covariate_mean_fd"].values)


def test_every_image_of_a_participant_is_a_job_and_a_sample(analysis):
    data = analysis.folder / "data"
    simulate_cohort(SIMULATION, str(data))
    for number in (1, 2, 3, 4):
        name = f"sub-sim{number:04d}"
        target = data / name / ("ses-b/func" if number == 2 else "ses-a/func")
        target.parent.mkdir()
        (data / name / "func").rename(target)
        for path in target.iterdir():
            path.rename(path.with_name(path.name.replace("_task", f"_{target.parent.name}_task")))
    # The first participant has a second session: the second's images under its name.
    (data / "sub-sim0001/ses-b").mkdir()
    (data / "sub-sim0002/ses-b/func").rename(data / "sub-sim0001/ses-b/func")
    for path in (data / "sub-sim0001/ses-b/func").iterdir():
        path.rename(path.with_name(path.name.replace("sim0002", "sim0001")))
    write_template(analysis.folder / "template.nii.gz")
    names = ["sim0001_ses-a", "sim0001_ses-b", "sim0003_ses-a", "sim0004_ses-a"]
    planned = finish(
        analysis,
        {
            "cohort": {"kind": "folder", "folder": "data", "scans": "all"},
            "ica": {"template": "template.nii.gz", "grid": 12, "smoothing_fwhm_mm": 0, "scaling": "gift"},
            "datasets": {
                "courses": {"kind": "timeseries"},
                "maps": {"kind": "maps"},
                "volumes": {"kind": "freesurfer"},
            },
        },
    )
    assert {name for name in planned if name.startswith("Finding")} == {
        f"Finding the networks of sub-{n}" for n in names
    }
    for kind in ("courses", "maps"):
        found = read(analysis, kind)
        assert found["id"].values.tolist() == names
        assert found["subject"].values.tolist() == ["sim0001", "sim0001", "sim0003", "sim0004"]
    assert read(analysis, "courses")["x"].shape == (4, 30, NETWORKS)
    assert read(analysis, "volumes")["id"].values.tolist() == [f"sim{number:04d}" for number in (1, 2, 3, 4)]
    # Another session of somebody finds the networks of that image alone.
    for path in list((data / "sub-sim0003/ses-a/func").iterdir()):
        copy = data / "sub-sim0003/ses-c/func" / path.name.replace("ses-a", "ses-c")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    finding = {name for name in analysis.planned() if name.startswith("Finding")}
    assert finding == {"Finding the networks of sub-sim0003_ses-c"}
