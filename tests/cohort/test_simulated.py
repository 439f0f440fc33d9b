"""The simulated cohort: the files of an ordinary one, with a truth that can be found in them, or none under the null."""

import json
import time

import nibabel
import numpy as np
import pandas as pd
import pytest
import scipy.signal
import scipy.stats

from autospec.cohort import simulation as model
from autospec.cohort.check import check_cohort
from autospec.cohort.displacement import PARAMETERS
from autospec.cohort.layouts import description_of
from autospec.cohort.selection import candidates
from autospec.cohort.simulated import (
    coarse_brain,
    read_networks,
    simulate_cohort,
    simulated_candidates,
    subject_name,
    write_subject,
)
from autospec.cohort.tables import build_cohort
from autospec.datasets.labelled import open_labelled
from autospec.datasets.maps import build_maps
from autospec.datasets.timeseries import build_timeseries
from autospec.errors import UserError
from autospec.freesurfer import read_volumes
from autospec.ica.derivative import subject_files
from autospec.ica.subject import build_subject
from autospec.ica.template import load_template
from tests.cohort.trees import settings

GENERAL = {
    "subjects": 24,
    "seed": 3,
    "volumes": 120,
    "voxel_mm": 10,
    "connectivity_effect": 0.3,
    "volume_effect": 2.0,
    "null": False,
}

NETWORKS = {
    "drop_volumes": 0,
    "smoothing_fwhm_mm": 0.0,
    "confounds": "motion",
    "repetition_time": None,
    "min_volumes": 60,
    "max_mean_fd_mm": None,
    "despike": True,
    "low_pass_hz": 0.15,
    "on_bad_subject": "fail",
    "grid": 10.0,
    "confounds_on": "image",
    "preprocessing": 1,
    "dtype": "float32",
    "converged": False,
    "scaling": "z-score",
    "min_coverage": 0.1,
    "gift_number": None,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A cohort with large effects; not to be changed."""
    folder = tmp_path_factory.mktemp("work") / "simulated"
    simulate_cohort(GENERAL, str(folder))
    return folder


def seen_connectivity(folder, domains=("SC", "SM")):
    """Mean correlation between two domains' peaks in each participant's images, motion regressed out, by group."""
    networks = pd.DataFrame({"domain": read_networks().domains, "label": read_networks().labels})
    table = pd.read_csv(folder / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    found = {"Patient": [], "Control": []}
    for _, row in table[table["Subject Type"] != "Disenrolled"].iterrows():
        func = folder / row["participant_id"] / "func"
        (path,) = func.glob("*_bold.nii.gz")
        image = nibabel.load(path)
        voxels = np.c_[read_networks().peaks, np.ones(53)] @ np.linalg.inv(image.affine).T
        x, y, z = np.rint(voxels[:, :3]).astype(int).T
        courses = image.get_fdata()[x, y, z].T
        (confounds,) = func.glob("*confounds*.tsv")
        motion = pd.read_csv(confounds, sep="\t", na_values="n/a")[
            ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z", "global_signal"]
        ]
        design = np.c_[np.ones(len(motion)), np.linspace(-1, 1, len(motion)), motion]
        courses = courses - design @ np.linalg.lstsq(design, courses, rcond=None)[0]
        correlation = np.corrcoef(courses.T)
        first, second = (np.flatnonzero(networks["domain"] == name) for name in domains)
        found[row["Subject Type"]].append(np.arctanh(correlation[np.ix_(first, second)]).mean())
    return found


def test_the_effect_on_connectivity_is_found_in_the_images(cohort):
    found = seen_connectivity(cohort)
    test = scipy.stats.ttest_ind(found["Patient"], found["Control"])
    assert test.pvalue < 1e-6
    assert np.mean(found["Patient"]) - np.mean(found["Control"]) == pytest.approx(0.3 * 0.75, abs=0.12)


def test_no_effect_is_where_none_was_built_in(cohort, tmp_path):
    other = seen_connectivity(cohort, ("VIS", "CC"))
    assert scipy.stats.ttest_ind(other["Patient"], other["Control"]).pvalue > 0.01
    simulate_cohort({**GENERAL, "null": True}, str(tmp_path / "null"))
    found = seen_connectivity(tmp_path / "null")
    assert scipy.stats.ttest_ind(found["Patient"], found["Control"]).pvalue > 0.01
    assert abs(np.mean(found["Patient"]) - np.mean(found["Control"])) < 0.1
    truth = json.loads((tmp_path / "null/truth/truth.json").read_text())
    assert truth["connectivity"]["correlation_of_altered_pairs"] == {"HC": 0.0, "SZ": 0.0}
    assert set(truth["volumes"]["cohens_d"].values()) == {0.0}


def test_the_null_rejects_as_often_as_it_should():
    """Over 200 null cohorts a 5 % test of the true time courses rejects within the exact binomial interval."""
    domains = read_networks().domains
    first, second = (np.flatnonzero(np.array(domains) == name) for name in model.ALTERED_DOMAINS)
    null = {**GENERAL, "null": True, "volumes": 40}
    effect, _ = model.effects(null)
    means = []
    for seed in range(200):
        random = np.random.default_rng(seed)
        courses = [model.time_courses(random, domains, effect, i < 6, 40) for i in range(12)]
        means.append([(each.T @ each / 40)[np.ix_(first, second)].mean() for each in courses])
    means = np.array(means)
    p = scipy.stats.ttest_ind(means[:, :6], means[:, 6:], axis=1).pvalue
    low, high = scipy.stats.binom.ppf([0.001, 0.999], len(p), 0.05)
    assert low <= (p < 0.05).sum() <= high


def test_the_effect_on_volumes_is_found_in_freesurfers_files(cohort):
    found = read_volumes([str(cohort / "sourcedata/freesurfer")])
    table = pd.read_csv(cohort / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    groups = dict(zip(table["participant_id"].str.removeprefix("sub-"), table["Subject Type"], strict=True))
    patient = np.array([groups[name] == "Patient" for name in found.ids])
    share = found.volumes / found.intracranial[:, None]
    truth = json.loads((cohort / "truth/truth.json").read_text())["volumes"]["cohens_d"]
    assert len(truth) == 8
    for region, expected in truth.items():
        values = share[:, found.regions.index(region)]
        assert scipy.stats.ttest_ind(values[patient], values[~patient]).pvalue < 0.02, region
        difference = values[patient].mean() - values[~patient].mean()
        assert np.sign(difference) == np.sign(expected)
        # d is built in; 24 people give it within about one.
        assert difference / values[~patient].std(ddof=1) == pytest.approx(expected, abs=1.5)
    others = [i for i, region in enumerate(found.regions) if region not in truth and np.ptp(found.volumes[:, i]) > 0]
    p = scipy.stats.ttest_ind(share[patient][:, others], share[~patient][:, others]).pvalue
    assert (p < 0.05).mean() < 0.15
    assert len(found.regions) == 39 + 3 + 68
    assert np.isfinite(found.volumes).all()


def test_expected_correlations_are_those_of_the_time_courses():
    domains = read_networks().domains
    random = np.random.default_rng(0)
    for patient in (True, False):
        expected = model.expected_correlation(domains, 0.25, patient)
        courses = model.time_courses(random, domains, 0.25, patient, 60_000)
        np.testing.assert_allclose(courses.T @ courses / len(courses), expected, atol=0.04)
        assert (np.linalg.eigvalsh(expected) > 0).all()
    altered = model.expected_correlation(domains, 0.25, True) - model.expected_correlation(domains, 0.25, False)
    pairs = {tuple(sorted((domains[i], domains[j]))) for i, j in np.argwhere(np.abs(altered) > 1e-12)}
    assert pairs == {("SC", "SM")}


def test_time_courses_look_haemodynamic():
    courses = model.time_courses(np.random.default_rng(1), read_networks().domains, 0.2, True, 2000)
    frequency, power = scipy.signal.welch(courses.T, fs=1 / model.REPETITION_TIME, nperseg=200)
    slow = power[:, frequency < 0.1].sum() / power.sum()
    assert slow > 0.9
    np.testing.assert_allclose(courses.mean(0), 0, atol=1e-10)
    np.testing.assert_allclose(courses.std(0), 1)


def test_noise_is_autocorrelated_and_movements_leave_artefacts():
    points = coarse_brain(12).points
    brain = coarse_brain(12)
    still, quiet = np.zeros((400, 6)), np.zeros((400, 53))
    seen = model.images(np.random.default_rng(0), quiet, brain.maps, brain.gradient, points, still)
    steps = seen - seen.mean(0)
    lag = (steps[1:] * steps[:-1]).sum() / (steps**2).sum()
    assert model.NOISE_MEMORY - 0.02 < lag < model.NOISE_MEMORY + 0.1
    moved = still.copy()
    moved[200] = [0.5, 0, 0, 0, 0.01, 0]
    jolted = model.images(np.random.default_rng(0), quiet, brain.maps, brain.gradient, points, moved)
    change = jolted - seen
    assert np.abs(change[200]).max() > 5
    assert change[200].mean() == pytest.approx(-10.0, abs=2)
    assert np.abs(change[201]).mean() > 1  # moving back darkens the next volume, too
    np.testing.assert_array_equal(change[:200], 0)


def test_framewise_displacement_by_hand():
    position = np.zeros((3, 6))
    position[1] = [0.1, -0.2, 0, 0.001, 0, 0]
    np.testing.assert_allclose(model.framewise_displacement(position), [0, 0.35, 0.35])


def test_cells_are_cobres():
    counts = pd.Series(model.cells(146)).value_counts().to_dict()
    assert counts == model.CELLS
    assert pd.Series(model.cells(40)).value_counts().tolist() == [16, 14, 6, 4]
    assert model.cells(40) == model.cells(146)[:40]


def test_a_subject_depends_on_the_seed_and_its_number_alone(cohort, tmp_path):
    (tmp_path / "one").mkdir()
    write_subject({**GENERAL, "subjects": 4}, 7, tmp_path / "one")
    made = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(made) == 7
    for path in made:
        assert (tmp_path / "one" / path).read_bytes() == (cohort / path).read_bytes(), path
    simulate_cohort({**GENERAL, "subjects": 7, "volumes": 20}, str(tmp_path / "seven"))
    table = (tmp_path / "seven/participants.tsv").read_text().splitlines()
    assert table[:8] == (cohort / "participants.tsv").read_text().splitlines()[:8]
    write_subject({**GENERAL, "seed": 4}, 7, tmp_path / "other")
    assert (tmp_path / "other" / made[0]).read_bytes() != (cohort / made[0]).read_bytes()


def test_the_files_are_those_of_fmriprep(cohort):
    func = cohort / "sub-sim0001/func"
    image = nibabel.load(func / "sub-sim0001_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    assert image.shape == (21, 25, 20, 120)
    assert image.header.get_zooms() == (10, 10, 10, 2)
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert int(image.header["sform_code"]) == 4
    assert image.header["descrip"].tobytes().rstrip(b"\0") == b"Simulated by autospec"
    assert (func / "sub-sim0001_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz").stat().st_size < 1e6
    brain = coarse_brain(10)
    data = image.get_fdata()
    assert (data[~brain.mask] == 0).all()
    assert abs(data[brain.mask].mean() - 1000) < 10
    confounds = pd.read_csv(func / "sub-sim0001_task-rest_desc-confounds_timeseries.tsv", sep="\t", na_values="n/a")
    np.testing.assert_allclose(confounds["global_signal"], data[brain.mask].mean(0), atol=0.2)
    assert confounds["framewise_displacement"].isna().tolist() == [True] + [False] * 119
    assert json.loads((cohort / "dataset_description.json").read_text())["Simulated"] is True


@pytest.mark.parametrize("strategy", ["simple", "scrubbing"])
def test_nilearn_understands_the_confounds(cohort, strategy):
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    path = cohort / "sub-sim0002/func/sub-sim0002_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
    confounds, _ = load_confounds_strategy(str(path), denoise_strategy=strategy)
    assert len(confounds) == 120
    assert {"trans_x", "rot_z_derivative1_power2", "csf"} <= set(confounds.columns)


def test_the_same_readers_take_over(cohort, tmp_path):
    chosen = settings(cohort, freesurfer=["auto"], on_bad_subject="fail")
    read = candidates(chosen)
    assert (read.layout, read.kind, len(read.participants)) == ("bids", "simulated", 24)
    assert [(each.id, each.reason) for each in read.exclusions] == [("simleft01", "Disenrolled")]
    # Snakemake must know who there will be before the files are there.
    assert simulated_candidates(GENERAL, chosen) == read
    assert simulated_candidates(GENERAL, {**chosen, "folder": str(tmp_path / "x")}).participants[3].id == "sim0004"
    report = check_cohort(chosen)
    assert report.kind == "simulated"
    assert report.warnings == []
    assert report.volumes == (120, 120)
    said = build_cohort({**chosen, "max_mean_fd": 0.3}, None, str(tmp_path / "out"))
    assert said.startswith("simulated cohort (bids): ")


def test_the_truth_beside_the_data(cohort):
    truth = json.loads((cohort / "truth/truth.json").read_text())
    assert truth["settings"] == GENERAL
    assert len(truth["connectivity"]["altered_pairs"]) == 5 * 9
    courses = pd.read_csv(cohort / f"truth/sub-{subject_name(1)}_timecourses.tsv", sep="\t")
    assert courses.shape == (120, 53)
    assert courses.columns.tolist() == read_networks().labels


def test_a_simulated_cohort_replaces_itself_and_nothing_else(tmp_path):
    small = {**GENERAL, "subjects": 4, "volumes": 20, "voxel_mm": 12}
    folder = tmp_path / "cohort"
    assert "simulated 4 participants (Control Female: 1, Control Male: 1, Patient" in simulate_cohort(
        small, str(folder)
    )
    (folder / "leftover").write_text("")
    simulate_cohort(small, str(folder))
    assert not (folder / "leftover").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="holds no simulated cohort: name another folder"):
        simulate_cohort(small, str(mine))
    assert (mine / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort", "mine"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"connectivity_effect": 0.5}, r"connectivity_effect is 0\.5: it is a correlation of 0 to 0\.35"),
        ({"subjects": 3}, "at least 4"),
        ({"voxel_mm": 3}, "voxels of 4 to 12 mm"),
        ({"volumes": 5}, "at least 20"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        simulate_cohort({**GENERAL, **change}, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_forty_participants_take_little_time(tmp_path):
    started = time.process_time()
    for number in range(1, 11):
        write_subject({**GENERAL, "volumes": 150}, number, tmp_path)
    assert (time.process_time() - started) / 10 * 40 < 20


def test_from_simulated_images_to_data_sets(tmp_path):
    """The whole way: images, networks by the stand-in template, the cohort's table, and two data sets."""
    work = tmp_path / "simulated"
    simulate_cohort({**GENERAL, "subjects": 4, "volumes": 80}, str(work))
    chosen = settings(work, freesurfer=["auto"], on_bad_subject="fail")
    template = load_template("stand-in")
    names, motion = {}, {}
    for each in candidates(chosen).functional:
        (scan,) = each.scans
        motion[each.id] = pd.read_csv(scan.confounds, sep="\t")[list(PARAMETERS)].to_numpy()
        files = {"bold": scan.bold, "sidecar": scan.sidecar, "confounds": scan.confounds}
        files |= {"description": description_of(scan.bold), "mask": None}
        folder = tmp_path / "ica" / f"sub-{each.id}"
        build_subject({**NETWORKS, "already_done": each.done.record}, each.id, files, template, folder)
        names[each.id] = {kind: str(folder / name) for kind, name in subject_files(each.id).items()}
    statuses = {name: each["status"] for name, each in names.items()}
    build_cohort(chosen, statuses, str(tmp_path / "cohort"))
    table = str(tmp_path / "cohort/participants.tsv")
    courses = {name: each["timecourses"] for name, each in names.items()}
    build_timeseries({"name": "series", "length": None}, table, courses, str(tmp_path / "series.zarr.zip"))
    series = open_labelled(tmp_path / "series.zarr.zip")
    assert series["x"].shape == (4, 80, 53)
    assert (series.attrs["simulated"], series.attrs["stand_in_template"]) == (True, True)
    for i, name in enumerate(series["id"].values):
        truth = pd.read_csv(work / f"truth/sub-{name}_timecourses.tsv", sep="\t")
        assert series["network"].values.tolist() == truth.columns.tolist()
        # What a fit of slow trends and motion leaves of the truth is what can be found.
        t = np.linspace(0, 2 * np.pi, len(truth))
        removed = np.column_stack(
            [np.ones_like(t), t, *(wave(n * t) for wave in (np.sin, np.cos) for n in (1, 2)), motion[name]]
        )
        left = truth.to_numpy() - removed @ np.linalg.lstsq(removed, truth.to_numpy())[0]
        matches = [np.corrcoef(series["x"].values[i, :, k], left[:, k])[0, 1] for k in range(53)]
        assert np.median(matches) > 0.9
    maps = {name: each["maps"] for name, each in names.items()}
    masks = {name: each["mask"] for name, each in names.items()}
    options = {"name": "maps", "aggregate": "max", "standardise": False, "voxel_mm": 20.0}
    build_maps(options, table, maps, masks, str(tmp_path / "maps.zarr.zip"))
    aggregated = open_labelled(tmp_path / "maps.zarr.zip")
    assert aggregated["x"].shape == (4, 8, 10, 8)
    assert aggregated.attrs["simulated"] is True
    assert float(aggregated["x"].max()) > 2
