"""Data sets of a cohort: time series, aggregated maps, volumes; each a labelled store that plain xarray opens."""

import json
import tracemalloc

import nibabel
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import xarray as xr
import zarr

import autospec
from autospec.cohort.tables import build_cohort
from autospec.datasets import labelled as labelled_module
from autospec.datasets.freesurfer import build_volumes, make_features
from autospec.datasets.intracranial import adjust
from autospec.datasets.labelled import (
    covariates_of,
    group_labels,
    labelled,
    open_labelled,
    subjects_of,
    write_labelled,
    write_samples,
)
from autospec.datasets.maps import averaged, build_maps, coarser_grid, strongest, z_scores
from autospec.datasets.timeseries import build_timeseries
from autospec.errors import UserError
from tests.cohort.trees import fmriprep, participants, recon, settings, write

PEOPLE = [
    ("sub-01", "SZ", "M", "30"),
    ("sub-02", "HC", "F", "31"),
    ("sub-03", "HC", "M", "32"),
    ("sub-10", "SZ", "F", "9"),
]
IDS = ["01", "02", "03", "10"]
NETWORKS = ["Caudate 1", "Thalamus 5", "STG 6"]
AFFINE = np.array([[-3.0, 0, 0, 30], [0, 3, 0, -40], [0, 0, 3, -20], [0, 0, 0, 1]])


@pytest.fixture
def cohort(tmp_path):
    """Path of a cohort's table; sub-02 has no volumes."""
    data = tmp_path / "data"
    participants(data / "participants.tsv", PEOPLE)
    fmriprep(data, IDS)
    for i, name in enumerate(["01", "03", "10"]):
        recon(
            data / "sourcedata/freesurfer" / f"sub-{name}",
            etiv=1.4e6 + 1e5 * i,
            thalamus=7000 + 130.5 * i * i,
            first=2500 - i,
        )
    build_cohort(settings(data, freesurfer=["auto"]), None, str(tmp_path / "cohort"))
    return str(tmp_path / "cohort" / "participants.tsv")


def described(path, **more):
    """Write the JSON file beside a result."""
    content = {"Simulated": False, "RepetitionTime": 2.0, "Template": {"Kind": "stand-in template"}, **more}
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    write(path.with_name(f"{name}.json"), json.dumps(content))


def course_files(folder, lengths, networks=NETWORKS, **more):
    """Write tables of time courses of given lengths, by id."""
    files = {}
    for i, (name, length) in enumerate(zip(IDS, lengths, strict=True)):
        table = pd.DataFrame(np.random.default_rng(i).normal(i, 1 + i, (length, len(networks))), columns=networks)
        path = folder / f"sub-{name}" / f"sub-{name}_timeseries.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, sep="\t", index=False)
        described(path, **more)
        files[name] = str(path)
    return files


def plain(path):
    """Open a store with xarray alone."""
    with zarr.storage.ZipStore(path, mode="r") as store, xr.open_dataset(store, engine="zarr") as opened:
        return opened.load()


# Time series


def test_time_series_are_cut_to_the_shortest_and_scaled(cohort, tmp_path):
    files = course_files(tmp_path / "ica", [20, 17, 20, 25])
    target = tmp_path / "series.zarr.zip"
    said = build_timeseries({"name": "series", "length": None}, cohort, files, str(target))
    assert said == "series: 4 participants, 17 time points, cut from up to 25, 3 networks"
    dataset = plain(target)
    assert dataset["x"].dims == ("sample", "time", "network")
    assert dataset["x"].dtype == np.float32
    assert dataset["id"].values.tolist() == IDS
    assert dataset["network"].values.tolist() == NETWORKS
    assert dataset["target"].values.tolist() == ["SZ", "HC", "HC", "SZ"]
    assert dataset["grouping_diagnosis"].values.tolist() == dataset["target"].values.tolist()
    assert dataset["grouping_sex"].values.tolist() == ["M", "F", "M", "F"]
    assert dataset["grouping_diagnosis_sex"].values.tolist() == ["SZ M", "HC F", "HC M", "SZ F"]
    for i, name in enumerate(IDS):
        expected = scipy.stats.zscore(pd.read_csv(files[name], sep="\t").to_numpy()[:17], axis=0)
        np.testing.assert_allclose(dataset["x"].values[i], expected, atol=1e-6)
    assert dataset.attrs["time_points"] == 17
    assert (dataset.attrs["fewest_time_points"], dataset.attrs["most_time_points"]) == (17, 25)
    assert dataset.attrs["simulated"] is False
    assert dataset.attrs["stand_in_template"] is True
    assert dataset.attrs["repetition_time"] == 2.0
    opened = open_labelled(target)
    assert group_labels(opened, "diagnosis_sex") == ["SZ M", "HC F", "HC M", "SZ F"]


def test_subjects_and_covariates_stand_beside_the_samples(cohort, tmp_path):
    target = tmp_path / "series.zarr.zip"
    build_timeseries({"name": "series", "length": None}, cohort, course_files(tmp_path / "ica", [20] * 4), str(target))
    opened = open_labelled(target)
    assert subjects_of(opened) == plain(target)["subject"].values.tolist() == IDS
    found = covariates_of(opened)
    assert sorted(found) == ["age", "mean_fd"]
    assert found["age"].tolist() == [30, 31, 32, 9]
    assert found["mean_fd"].tolist() == [0.1] * 4  # what the tables of confounds say
    assert plain(target)["covariate_age"].dtype == np.float64
    volumes = tmp_path / "volumes.zarr.zip"
    build_volumes(
        {"name": "volumes", "icv": "none", "training": None, "sources": []},
        cohort,
        [str(tmp_path / "data/sourcedata/freesurfer")],
        str(volumes),
    )
    found = covariates_of(open_labelled(volumes))
    assert found["age"].tolist() == [30, 32, 9]
    assert found["intracranial_volume"].tolist() == [1.4e6, 1.5e6, 1.6e6]


def test_several_images_of_somebody_are_samples_of_one_subject(tmp_path):
    data, out = tmp_path / "data", tmp_path / "cohort"
    participants(data / "participants.tsv", PEOPLE)
    for session in "12":
        fmriprep(data, IDS[:2], session=session, moved=0.1 * int(session))
    fmriprep(data, ["03"], session="2")
    chosen = settings(data, scans="all", max_mean_fd=0.3)
    names = ["01_ses-1", "01_ses-2", "02_ses-1", "02_ses-2", "03_ses-2"]
    statuses = {name: write(tmp_path / name / "status.json", '{"status": "included", "volumes": 8}') for name in names}
    write(statuses["02_ses-1"], '{"status": "excluded", "reason": "it is dark"}')
    build_cohort(chosen, {name: str(path) for name, path in statuses.items()}, str(out))
    excluded = (out / "exclusions.tsv").read_text()
    assert "sub-02\tfunctional\tses-1: it is dark\n" in excluded
    table = pd.read_csv(out / "participants.tsv", sep="\t", dtype=str)
    assert table["participant_id"].tolist() == ["sub-01", "sub-02", "sub-03"]
    assert table["mean_fd"].tolist() == ["0.15", "0.2", "0.1"]  # over the images that are used
    files = {}
    for i, name in enumerate(names):
        frame = pd.DataFrame(np.random.default_rng(i).normal(size=(20, 3)), columns=NETWORKS)
        path = tmp_path / "ica" / f"sub-{name}_timeseries.tsv"
        path.parent.mkdir(exist_ok=True)
        frame.to_csv(path, sep="\t", index=False)
        described(path)
        files[name] = str(path)
    target = tmp_path / "series.zarr.zip"
    said = build_timeseries({"name": "series", "length": None}, str(out / "participants.tsv"), files, str(target))
    assert said.startswith("series: 3 participants (4 images), 20 time points")
    opened = open_labelled(target)
    assert opened["id"].values.tolist() == ["01_ses-1", "01_ses-2", "02_ses-2", "03_ses-2"]
    assert subjects_of(opened) == ["01", "01", "02", "03"]
    assert opened["target"].values.tolist() == ["SZ", "SZ", "HC", "HC"]
    assert covariates_of(opened)["mean_fd"].tolist() == [0.1, 0.2, 0.2, 0.1]  # of each image


def test_a_label_that_is_not_known_belongs_to_no_group(tmp_path):
    people = [
        ("sub-01", "SZ", "M", "n/a"),
        ("sub-02", "HC", "n/a", "31"),
        ("sub-03", "HC", "F", "32"),
        ("sub-10", "SZ", "", ""),
    ]
    data = tmp_path / "data"
    participants(data / "participants.tsv", people)
    fmriprep(data, IDS)
    build_cohort(settings(data), None, str(tmp_path / "cohort"))
    target = tmp_path / "series.zarr.zip"
    table = str(tmp_path / "cohort/participants.tsv")
    build_timeseries({"name": "series", "length": None}, table, course_files(tmp_path / "ica", [20] * 4), str(target))
    opened = open_labelled(target)
    assert plain(target)["grouping_sex"].values.tolist() == ["M", "n/a", "F", "n/a"]
    assert group_labels(opened, "sex") == ["M", None, "F", None]
    assert group_labels(opened, "diagnosis_sex") == ["SZ M", None, "HC F", None]
    assert group_labels(opened, None) == ["SZ", "HC", "HC", "SZ"]
    np.testing.assert_array_equal(covariates_of(opened)["age"], [np.nan, 31, 32, np.nan])
    # The watcher takes such labels: nobody's group, but counted in "all".
    model = torch.nn.Linear(3, 2)
    with autospec.watch(model, group_labels(opened, "sex")) as watcher:
        model(torch.from_numpy(opened["x"].values[:, 0])).square().mean().backward()
        watcher.step()
    tree = watcher.trajectories
    assert tree["group"].values.tolist() == ["all", "F", "M"]
    assert tree["group_size"].values[0].tolist() == [4, 1, 1]


def test_a_data_set_without_subjects_has_its_ids(tmp_path):
    dataset = labelled(np.ones((2, 3)), ("feature",), ["a", "b"], ["x", "y"], {}, {})
    assert subjects_of(dataset) == ["a", "b"]
    assert covariates_of(dataset) == {}


def test_a_length_may_be_named_and_must_be_there(cohort, tmp_path):
    files = course_files(tmp_path / "ica", [20, 17, 20, 25])
    target = str(tmp_path / "series.zarr.zip")
    build_timeseries({"name": "series", "length": 10}, cohort, files, target)
    assert plain(target).sizes["time"] == 10
    with pytest.raises(UserError, match=r"sub-02_timeseries\.tsv has 17 time points, fewer than length \(18\)"):
        build_timeseries({"name": "series", "length": 18}, cohort, files, target)


def test_time_series_that_do_not_fit_are_refused(cohort, tmp_path):
    settings_, target = {"name": "series", "length": None}, str(tmp_path / "series.zarr.zip")
    files = course_files(tmp_path / "ica", [20] * 4)
    with pytest.raises(UserError, match="no time courses of sub-10: their own jobs have not run"):
        build_timeseries(settings_, cohort, {name: files[name] for name in IDS[:3]}, target)
    frame = pd.read_csv(files["03"], sep="\t")
    frame.rename(columns={"STG 6": "other"}).to_csv(files["03"], sep="\t", index=False)
    with pytest.raises(UserError, match=r"sub-03_timeseries\.tsv has other networks"):
        build_timeseries(settings_, cohort, files, target)
    frame.assign(**{"STG 6": 0.1}).to_csv(files["03"], sep="\t", index=False)
    with pytest.raises(UserError, match="the time course of STG 6 does not change"):
        build_timeseries(settings_, cohort, files, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort", "data", "ica"]


def test_results_of_different_origin_are_not_mixed(cohort, tmp_path):
    settings_, target = {"name": "series", "length": None}, str(tmp_path / "series.zarr.zip")
    files = course_files(tmp_path / "ica", [20] * 4)
    sidecar = tmp_path / "ica/sub-02/sub-02_timeseries.json"
    write(sidecar, json.dumps({"Simulated": True, "Template": {"Kind": "stand-in template"}}))
    with pytest.raises(UserError, match="results of real and of simulated data"):
        build_timeseries(settings_, cohort, files, target)
    write(sidecar, json.dumps({"Simulated": False, "Template": {"Kind": "NeuroMark 1.0"}}))
    with pytest.raises(UserError, match="results of different templates"):
        build_timeseries(settings_, cohort, files, target)
    sidecar.unlink()
    with pytest.raises(UserError, match=r"sub-02_timeseries\.json does not exist"):
        build_timeseries(settings_, cohort, files, target)
    # Everybody's results are simulated, but the cohort's table is a real one.
    files = course_files(tmp_path / "ica", [20] * 4, Simulated=True)
    with pytest.raises(UserError, match="real and of simulated"):
        build_timeseries(settings_, cohort, files, target)


# Maps


@pytest.fixture
def maps(tmp_path):
    """Images of maps by id, on one grid, 0 outside of a mask."""
    files = {}
    for i, name in enumerate(IDS):
        values = np.random.default_rng(10 + i).normal(size=(6, 5, 4, 3)).astype(np.float32)
        values[0] = 0
        path = tmp_path / "ica" / f"sub-{name}_components.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values, AFFINE), path)
        described(path, Template={"Kind": "NeuroMark 1.0", "SHA256OfGridAffineAndValues": "abc"})
        files[name] = str(path)
    return files


CHOSEN = {"name": "maps", "aggregate": "max", "standardise": False, "voxel_mm": None}


def test_maps_are_aggregated_by_their_signed_maximum(cohort, maps, tmp_path):
    target = tmp_path / "maps.zarr.zip"
    said = build_maps(CHOSEN, cohort, maps, {}, str(target))
    assert said == "maps: 4 participants, 6 x 5 x 4 voxels of 3 x 3 x 3 mm, max of 3 networks"
    dataset = plain(target)
    assert dataset["x"].dims == ("sample", "voxel_x", "voxel_y", "voxel_z")
    assert open_labelled(target)["x"].shape == (4, 6, 5, 4)
    for i, name in enumerate(IDS):
        values = nibabel.load(maps[name]).get_fdata()
        expected = values.max(-1)
        expected[0] = 0
        np.testing.assert_allclose(dataset["x"].values[i], expected, atol=1e-6)
    assert (dataset["x"].values < 0).any()
    assert dataset.attrs["stand_in_template"] is False
    assert dataset.attrs["template_digest"] == "abc"
    assert dataset["x_mm"].values.tolist() == [30, 27, 24, 21, 18, 15]
    assert dataset["z_mm"].values.tolist() == [-20, -17, -14, -11]
    build_maps({**CHOSEN, "aggregate": "absmax"}, cohort, maps, {}, str(target))
    largest = plain(target)["x"].values
    assert (largest >= 0).all()
    np.testing.assert_allclose(largest[1, 1:], np.abs(nibabel.load(maps["02"]).get_fdata()[1:]).max(-1), atol=1e-6)


def test_masks_and_scores(cohort, maps, tmp_path):
    mask = np.zeros((6, 5, 4, 1), dtype=np.uint8)  # a trailing dimension of 1
    mask[2:5] = 1
    nibabel.save(nibabel.Nifti1Image(mask, AFFINE), tmp_path / "mask.nii.gz")
    target = tmp_path / "maps.zarr.zip"
    masks = {"03": str(tmp_path / "mask.nii.gz")}
    build_maps({**CHOSEN, "standardise": True}, cohort, maps, masks, str(target))
    x = plain(target)["x"].values
    assert (x[2, :2] == 0).all()
    assert (x[2, 5] == 0).all()
    values = nibabel.load(maps["03"]).get_fdata()[2:5].reshape(-1, 3)
    np.testing.assert_allclose(x[2, 2:5].ravel(), scipy.stats.zscore(values, axis=0).max(1), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v, a: (v[:5], a), "lies on another grid than"),
        (lambda v, a: (v, a + np.array([[0, 0, 0, 1.0]] + [[0] * 4] * 3)), "lies on another grid than"),
        (lambda v, a: (v[..., :2], a), "has 2 networks, but"),
        (lambda v, a: (v[..., 0], a), "has 3 dimensions"),
        (lambda v, a: (v * 0, a), "is 0 everywhere"),
    ],
    ids=["shape", "affine", "networks", "3-D", "zero"],
)
def test_maps_that_do_not_fit_are_refused(cohort, maps, tmp_path, change, said):
    old = nibabel.load(maps["10"])
    values, affine = change(old.get_fdata().astype(np.float32), old.affine)
    nibabel.save(nibabel.Nifti1Image(values, affine), maps["10"])
    with pytest.raises(UserError, match=said):
        build_maps(CHOSEN, cohort, maps, {}, str(tmp_path / "maps.zarr.zip"))


def test_a_mask_on_another_grid_is_refused(cohort, maps, tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((6, 5, 5), dtype=np.uint8), AFFINE), tmp_path / "mask.nii.gz")
    with pytest.raises(UserError, match="give the mask that belongs to it"):
        build_maps(CHOSEN, cohort, maps, {"01": str(tmp_path / "mask.nii.gz")}, str(tmp_path / "maps.zarr.zip"))


def test_larger_voxels_are_means_over_what_they_cover(cohort, maps, tmp_path):
    target = tmp_path / "maps.zarr.zip"
    build_maps({**CHOSEN, "voxel_mm": 6.0}, cohort, maps, {}, str(target))
    dataset = plain(target)
    assert dataset["x"].shape == (4, 3, 3, 2)
    assert dataset.attrs["downsampled"] is True
    assert dataset.attrs["voxel_mm"] == [6.0, 6.0, 6.0]
    fine = nibabel.load(maps["01"]).get_fdata().max(-1)
    # The new voxel (1, 0, 0) covers eight old ones; (0, 0, 0) covers eight of which four lie in the mask.
    assert dataset["x"].values[0, 1, 0, 0] == pytest.approx(fine[2:4, 0:2, 0:2].mean(), abs=1e-6)
    assert dataset["x"].values[0, 0, 0, 0] == pytest.approx(fine[1, 0:2, 0:2].mean(), abs=1e-6)
    # The last row has half a voxel of field of view, which is just enough.
    assert dataset["x"].values[0, 1, 2, 0] == pytest.approx(fine[2:4, 4, 0:2].mean(), abs=1e-6)
    assert dataset["x_mm"].values.tolist() == [28.5, 22.5, 16.5]


@pytest.mark.parametrize("voxel_mm", [6.0, 9.0])
def test_coarser_grids_agree_with_nilearn_on_a_plane(voxel_mm):
    from nilearn.image import resample_img

    shape = (12, 10, 8)
    affine = np.diag([3.0, 3, 3, 1])
    affine[:3, 3] = [-10, 5, 7]
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    plane = 2.0 * x - y + 0.5 * z
    weights, new_affine = coarser_grid(shape, affine, voxel_mm)
    ours = averaged(plane, np.ones(shape, dtype=bool), weights)
    theirs = resample_img(
        nibabel.Nifti1Image(plane, affine),
        target_affine=new_affine,
        target_shape=ours.shape,
        interpolation="linear",
        force_resample=True,
        copy_header=True,
    ).get_fdata()
    inner = np.s_[1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-5)


def test_coarser_voxels_share_out_what_the_old_ones_hold():
    weights, _ = coarser_grid((12, 10, 8), np.diag([3.0, 3, 3, 1]), 5.0)
    assert [each.shape for each in weights] == [(8, 12), (6, 10), (5, 8)]
    for axis in weights:
        np.testing.assert_allclose(axis.sum(0), 3 / 5)
        np.testing.assert_allclose(axis.sum(1)[:-1], 1)
    # The second new voxel lies from 5 to 10 mm: 1 mm of the old one from 3 to 6, all of the next, 1 mm of the last.
    np.testing.assert_allclose(weights[0][1, :4], [0, 0.2, 0.6, 0.2])


def test_grids_that_cannot_be_coarsened_are_refused():
    with pytest.raises(UserError, match=r"voxel_mm is 2, but the maps have voxels of 3 mm"):
        coarser_grid((4, 4, 4), np.diag([3.0, 3, 3, 1]), 2.0)
    turned = np.eye(4)
    turned[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    with pytest.raises(UserError, match="axes do not run along the brain's"):
        coarser_grid((4, 4, 4), turned, 2.0)
    weights, affine = coarser_grid((4, 4, 4), np.diag([3.0, 3, 3, 1]), 3.0)
    np.testing.assert_array_equal(weights[0], np.eye(4))
    np.testing.assert_array_equal(affine, np.diag([3.0, 3, 3, 1]))


def test_a_constant_map_scores_nothing():
    maps = np.ones((2, 2, 2, 2))
    maps[..., 1] = np.arange(8).reshape(2, 2, 2)
    mask = np.ones((2, 2, 2), dtype=bool)
    scores = z_scores(maps, mask)
    assert (scores[..., 0] == 0).all()
    np.testing.assert_allclose(strongest(scores, mask, "max"), np.maximum(scores[..., 1], 0))


# Volumes


def test_volumes_are_scaled_and_useless_regions_dropped(cohort, tmp_path):
    target = tmp_path / "volumes.zarr.zip"
    sources = [str(tmp_path / "data/sourcedata/freesurfer")]
    chosen = {"name": "volumes", "icv": "none", "training": None}
    assert build_volumes(chosen, cohort, sources, str(target)) == (
        "volumes: 3 participants, 3 regions (4 dropped: constant: Left-Lateral-Ventricle, 5th-Ventricle, lh_insula, rh_insula)"
    )
    dataset = plain(target)
    assert dataset["x"].dims == ("sample", "region")
    assert dataset["id"].values.tolist() == ["01", "03", "10"]
    assert dataset["region"].values.tolist() == ["Left-Thalamus", "lh_bankssts", "rh_bankssts"]
    expected = scipy.stats.zscore(np.array([7000, 7130.5, 7522.0]))
    np.testing.assert_allclose(dataset["x"].values[:, 0], expected, atol=1e-5)
    assert dataset.attrs["notes"] == ["dropped, constant: Left-Lateral-Ventricle, 5th-Ventricle, lh_insula, rh_insula"]
    assert dataset.attrs["icv"] == "none"
    build_volumes({**chosen, "icv": "proportional"}, cohort, sources, str(target))
    shares = np.array([7000, 7130.5, 7522.0]) / np.array([1.4e6, 1.5e6, 1.6e6])
    np.testing.assert_allclose(plain(target)["x"].values[:, 0], scipy.stats.zscore(shares), atol=1e-4)


def test_scaling_is_fitted_to_training_participants_alone(cohort, tmp_path):
    target = tmp_path / "volumes.zarr.zip"
    sources = [str(tmp_path / "data/sourcedata/freesurfer")]
    chosen = {"name": "volumes", "icv": "none", "training": ["01", "03"]}
    build_volumes(chosen, cohort, sources, str(target))
    dataset = plain(target)
    np.testing.assert_allclose(dataset["x"].values[:2, 0], [-1, 1], atol=1e-5)
    assert dataset["x"].values[2, 0] == pytest.approx((7522 - 7065.25) / 65.25, abs=1e-4)
    assert dataset.attrs["fitted_to"] == 2
    with pytest.raises(UserError, match="training participants 02 are not in this data set"):
        build_volumes({**chosen, "training": ["01", "02"]}, cohort, sources, str(target))
    with pytest.raises(UserError, match="1 participants are for training"):
        build_volumes({**chosen, "training": ["01"]}, cohort, sources, str(target))


def test_residuals_are_those_of_a_straight_line():
    random = np.random.default_rng(0)
    heads = random.normal(1.5e6, 1e5, 30)
    volumes = np.c_[heads * 0.005 + random.normal(0, 100, 30), random.normal(3000, 200, 30)]
    training = np.arange(30) < 20
    adjusted = adjust(volumes, heads, "residual", training)
    for k in range(2):
        line = scipy.stats.linregress(heads[training], volumes[training, k])
        expected = volumes[:, k] - line.slope * (heads - heads[training].mean())
        np.testing.assert_allclose(adjusted[:, k], expected, rtol=1e-9)
        assert abs(np.corrcoef(adjusted[training, k], heads[training])[0, 1]) < 1e-9
    with pytest.raises(UserError, match="at least three training participants"):
        adjust(volumes[:2], heads[:2], "residual", np.ones(2, dtype=bool))
    # Held-out participants change nothing.
    volumes[25:] *= 2
    again = make_features(volumes, ["a", "b"], heads, [str(i) for i in range(30)], "residual", training)
    np.testing.assert_allclose(again.x[training].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(again.x[training].std(0), 1)
    np.testing.assert_allclose(again.x[20:25], scipy.stats.zmap(adjusted[20:25], adjusted[training]), rtol=1e-9)


def test_missing_heads_and_regions():
    volumes = np.array([[1.0, 5, 7], [2, np.nan, 7], [4, 6, 7]])
    heads, ids, everybody = np.array([1.5, np.nan, 1.6]), ["a", "b", "c"], np.ones(3, dtype=bool)
    features = make_features(volumes, ["r", "s", "t"], heads, ids, "none", everybody)
    assert features.regions == ["r"]
    assert features.notes == ["dropped, missing in b: s", "dropped, constant: t"]
    with pytest.raises(UserError, match="icv is proportional, but the intracranial volume of b is not known"):
        make_features(volumes, ["r", "s", "t"], heads, ids, "proportional", everybody)
    with pytest.raises(UserError, match="no FreeSurfer region is left"):
        make_features(volumes[:, 1:], ["s", "t"], heads, ids, "none", everybody)


def test_volumes_must_be_there(cohort, tmp_path):
    wide = write(tmp_path / "wide.csv", "id,Left-Caudate\n1,3500\n3,3600\n")
    with pytest.raises(UserError, match="no FreeSurfer volumes of 10"):
        build_volumes({"name": "v", "icv": "none", "training": None}, cohort, [str(wide)], str(tmp_path / "v.zarr.zip"))


def test_a_half_without_anybody_is_refused(tmp_path):
    participants(tmp_path / "data/participants.tsv", PEOPLE)
    fmriprep(tmp_path / "data", IDS)
    build_cohort(settings(tmp_path / "data"), None, str(tmp_path / "cohort"))
    table = str(tmp_path / "cohort/participants.tsv")
    with pytest.raises(UserError, match=r"nobody in .* has structural data"):
        build_volumes({"name": "v", "icv": "none", "training": None}, table, [], str(tmp_path / "v.zarr.zip"))


# The store


def test_writing_in_parts_gives_what_writing_at_once_gives(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    x[2] = 0
    labels = {"ids": list("abcde"), "target": list("xxyyy"), "groupings": {"g": list("ppqqq")}}
    write_labelled(labelled(x, ("time", "network"), **labels, attributes={"kind": "k"}), tmp_path / "once.zarr.zip")
    for name in ("parts", "again"):
        write_samples(
            iter(x),
            (4, 3),
            ("time", "network"),
            **labels,
            attributes={"kind": "k"},
            coordinates={},
            path=tmp_path / f"{name}.zarr.zip",
        )
    xr.testing.assert_identical(open_labelled(tmp_path / "parts.zarr.zip"), open_labelled(tmp_path / "once.zarr.zip"))
    assert (tmp_path / "parts.zarr.zip").read_bytes() == (tmp_path / "again.zarr.zip").read_bytes()


def test_memory_does_not_grow_with_the_number_of_participants(tmp_path):
    def peak(count):
        samples = (np.full((64, 64, 64), float(i), dtype=np.float32) for i in range(count))
        names = [str(i) for i in range(count)]
        tracemalloc.start()
        write_samples(samples, (64, 64, 64), ("x", "y", "z"), names, names, {}, {}, {}, tmp_path / "x.zarr.zip")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(40) - peak(4) < 2e6  # one sample has a million bytes


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_or_too_many_samples_leave_nothing_behind(tmp_path, count):
    with pytest.raises(ValueError, match=r"expected|but 2 ids"):
        write_samples(
            [np.zeros(3)] * count,
            (3,),
            ("region",),
            ["a", "b"],
            ["x", "y"],
            {},
            {},
            {},
            tmp_path / "out" / "x.zarr.zip",
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr(labelled_module, "pack", fail)
    with pytest.raises(OSError, match="no space"):
        write_samples([np.zeros(3)], (3,), ("region",), ["a"], ["x"], {}, {}, {}, tmp_path / "out" / "x.zarr.zip")
    assert list((tmp_path / "out").iterdir()) == []
