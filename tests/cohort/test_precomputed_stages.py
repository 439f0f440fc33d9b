"""Results of GIFT as NIfTI images, from the layout through the workflow's stages to data sets, in one process."""

import nibabel
import numpy as np
import scipy.stats
import xarray as xr
import yaml
import zarr

from autospec import participants as people
from autospec import specs
from autospec.cli import main
from autospec.config import load_config
from autospec.paths import result
from tests.cohort.trees import AFFINE, SHAPE, participants

TIME, NETWORKS = 40, 4


def write_gift(folder):
    """Three subjects' images under GIFT's names; what was written, by id."""
    generator = np.random.default_rng(1)
    folder.mkdir()
    written = {}
    for number, name in enumerate(("007", "A2", "3"), start=1):
        courses, maps = generator.normal(size=(TIME, NETWORKS)), np.zeros((*SHAPE, NETWORKS))
        maps[3:6, 4:8, 3:6] = generator.normal(size=(3, 4, 3, NETWORKS))
        nibabel.save(nibabel.Nifti1Image(courses, np.eye(4)), folder / f"P_sub{number:02d}_timecourses_ica_s1_.nii")
        nibabel.save(nibabel.Nifti1Image(maps, AFFINE), folder / f"P_sub{number:02d}_component_ica_s1_.nii")
        written[name] = courses, maps
    participants(
        folder / "participants.tsv", [("007", "SZ"), ("A2", "HC"), ("3", "HC")], ("participant_id", "diagnosis")
    )
    return written


def read(name):
    return xr.open_dataset(zarr.storage.ZipStore(f"results/datasets/{name}.zarr.zip", mode="r"), engine="zarr").load()


def test_gifts_images_become_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = write_gift(tmp_path / "gift")
    content = {
        "title": "GIFT's images",
        "cohort": {"kind": "folder", "folder": "gift", "diagnosis": "Patient as labelled"},
        "ica": {"timecourses": "precomputed", "repetition_time": 2.0},
        "datasets": {"courses": {"kind": "timeseries"}, "maps": {"kind": "maps"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["check", "."]) == 0
    config = load_config("config.yaml")
    cohort = people.read_cohort(config)
    assert sorted(cohort.scans) == ["007", "3", "A2"]
    for name in cohort.scans:
        settings = people.subject_settings(config, cohort, name)
        files = people.subject_files(config, cohort, name)
        given = [text for kind, paths in files.items() for path in paths for text in (f"--{kind}", path)]
        output = ["--output", result("ica", subject=name)]
        assert main(["precomputed", "--spec", specs.spec("precomputed", settings), *given, *output]) == 0
    table, folders = result("participants"), people.folders(config, cohort)
    spec = specs.spec("cohort", people.shared_settings(config, cohort))
    assert main(["cohort", "--spec", spec, "--folders", *folders, "--output", table]) == 0
    for name, stage in (("courses", "timeseries"), ("maps", "maps")):
        spec = specs.spec(stage, people.dataset_settings(config, name))
        target = ["--folders", *folders, "--output", result("dataset", dataset=name)]
        assert main([stage, "--spec", spec, "--participants", table, *target]) == 0
    courses, maps = read("courses"), read("maps")
    assert courses["id"].values.tolist() == maps["id"].values.tolist() == ["3", "007", "A2"]
    assert courses["target"].values.tolist() == ["HC", "SZ", "HC"]
    time = np.linspace(0, 1, TIME)
    waves = [wave(2 * np.pi * cycles * time) for cycles in (1, 2) for wave in (np.sin, np.cos)]
    trends = np.stack([np.ones(TIME), time, *waves], axis=1)
    for i, name in enumerate(courses["id"].values):
        tc, ic = written[name]
        np.testing.assert_allclose(courses["x"].values[i], scipy.stats.zscore(tc - trends @ np.linalg.pinv(trends) @ tc), atol=1e-5)  # fmt: skip
        inside = ic.any(-1)
        expected = np.zeros(SHAPE)
        expected[inside] = scipy.stats.zscore(ic[inside]).max(-1)
        np.testing.assert_allclose(maps["x"].values[i], expected, atol=1e-5)
    assert courses.attrs["simulated"] == 0
