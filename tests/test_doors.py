"""The commands for users of cohorts: check, init --cohort, bidsify, fetch-template, and the BIDS App's door."""

import json
import re
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest
import yaml

from autospec.cli import main
from autospec.cohort.simulated import simulate_cohort
from autospec.config import load_config
from autospec.ica.derivative import subject_files
from autospec.ica.images import write_image
from autospec.ica.template import analysis_grid, on_grid, stand_in_template
from autospec.participants import read_cohort
from tests.cohort.trees import COBRE_HEADER, fmriprep, image, participants, recon, write
from tests.conftest import ROOT

SIMULATION = {
    "subjects": 4, "seed": 0, "volumes": 40, "voxel_mm": 10, "connectivity_effect": 0.3, "volume_effect": 0.8, "null": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A folder with a cohort in ``data`` and a template of eleven networks; not to be changed."""
    folder = tmp_path_factory.mktemp("lab")
    simulate_cohort(SIMULATION, str(folder / "data"))
    template = stand_in_template()
    shape, affine = analysis_grid(10.0, template, None)
    write_image(on_grid(template, shape, affine)[..., ::5], affine, folder / "template.nii.gz")
    return folder


def write_config(folder, **parts):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(parts))


def test_check_says_what_would_be_used(lab, tmp_path, capsys):
    write_config(
        tmp_path / "study",
        cohort={"kind": "folder", "folder": str(lab / "data"), "groupings": ["Handedness"]},
        ica={"template": str(lab / "template.nii.gz"), "grid": 10},
        datasets={"courses": {"kind": "timeseries"}},
    )
    assert main(["check", str(tmp_path / "study")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "layout: bids (simulated data)"
    assert said[1].startswith("participants: HC: 2, SZ: 2 (")
    rows = (lab / "data/participants.tsv").read_text().splitlines()
    hands = {hand: sum(row.split("\t")[3] == hand for row in rows[1:]) for hand in ("Left", "Right")}
    assert said[2] == "Handedness: " + ", ".join(f"{hand}: {count}" for hand, count in hands.items() if count)
    assert said[3] == "functional: 4, structural: 4"
    assert any(line.startswith("grid: 21 x 25 x 20 voxels of 10 x 10 x 10 mm") for line in said)
    assert "repetition time: 2 s (4 images)" in said
    assert "volumes: 40 in every image" in said
    assert any(line.startswith("time and disk: about ") for line in said)
    assert "left out: sub-simleft01 (all): Disenrolled" in said
    assert "template: template.nii.gz, custom template, 11 networks" in said
    assert any(line.startswith("analysis grid: 16 x 19 x 16 voxels of 10 x 10 x 10 mm") for line in said)
    assert any(line.startswith("template coverage of 21 x 25 x 20") and "at least 100 %" in line for line in said)
    assert said[-1] == "data sets: courses (timeseries)"
    assert not (tmp_path / "study/results").exists()


def test_check_of_a_simulated_cohort_before_it_is_written(tmp_path, capsys):
    write_config(tmp_path, cohort={"kind": "simulated", "subjects": 10})
    assert main(["check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "simulated data, which the workflow will write" in said
    assert "functional: 10, structural: 10" in said
    assert "template: stand-in, stand-in template, 53 networks" in said
    assert "(10 images)\nrepetition time: 2 s (10 images)\nvolumes: 150 in every image\n" in said
    assert re.search(r"time and disk: about \d+ (s|minutes) of one core, [\d,]+ MB\n", said)
    assert "template coverage of " in said


def test_check_warns_of_images_that_cut_networks(tmp_path, capsys):
    participants(tmp_path / "data/participants.tsv", [("1", "HC", "M", "20"), ("2", "SZ", "F", "30")])
    fmriprep(tmp_path / "data", ["1", "2"], volumes=60)
    write_config(tmp_path, cohort={"kind": "folder", "folder": "data", "diagnosis": "Patient as labelled"}, ica={"template": "stand-in"})  # fmt: skip
    for name in ("1", "2"):
        path = next((tmp_path / f"data/sub-{name}").rglob("*_bold.nii.gz"))
        old = nibabel.load(path)
        affine = old.affine.copy()
        affine[2, 3] = -28  # the cerebellum is not in the field of view
        image(path, volumes=60, affine=affine)
    assert main(["check", str(tmp_path)]) == 0
    assert "warning: such images cover less than min_coverage of " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"datasets": {"d": {"kind": "mnist"}}, "experiments": {"e": {"title": "t", "figure": 1, "dataset": "d", "runs": {"r": {"task": "autoencoder"}}, "panels": [{"run": "r"}]}}}, "names no cohort"),
        ({"cohort": {"kind": "folder", "folder": "nowhere"}, "ica": {"template": "stand-in"}}, "the cohort's folder nowhere does not exist"),
        ({"cohort": {"kind": "folder", "folder": "."}, "ica": {"template": "gone.nii"}}, "gone.nii, which does not exist"),
        ({"cohort": {"kind": "simulated"}, "ica": {"timecourses": "precomputed"}}, "precomputed, but the layout bids brings images"),
    ],
)  # fmt: skip
def test_check_refuses_in_one_sentence(tmp_path, capsys, parts, words):
    write_config(tmp_path, **parts)
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_check_of_a_cohort_of_cobres_size_is_quick(tmp_path):
    names = [f"{40000 + i:07d}" for i in range(157)]
    participants(tmp_path / "data/participants.tsv", [(name, "SZ" if i % 2 else "HC", "M", "20") for i, name in enumerate(names)])  # fmt: skip
    fmriprep(tmp_path / "data", names, volumes=60)
    write_config(tmp_path, cohort={"kind": "folder", "folder": "data", "diagnosis": "Patient as labelled"}, ica={"template": "stand-in"})  # fmt: skip
    started = time.perf_counter()
    assert main(["check", str(tmp_path)]) == 0
    assert time.perf_counter() - started < 30


def test_init_writes_a_config_for_a_cohort(lab, tmp_path, capsys):
    folder = tmp_path / "new"
    assert main(["init", str(folder), "--cohort", str(lab / "data")]) == 0
    assert "autospec check" in capsys.readouterr().out
    config = load_config(folder / "config.yaml")
    assert config.cohort.folder == str(lab / "data")
    assert config.cohort.layout == "bids"
    assert set(config.datasets) == {"courses", "maps", "volumes"}
    assert "# found: HC: 2, SZ: 2; 4 with functional, 4 with structural data" in (folder / "config.yaml").read_text()


def test_every_line_that_init_comments_out_can_be_used(tmp_path):
    data = tmp_path / "data: of é"
    participants(data / "participants.tsv", [("1", "HC", "M", "20"), ("2", "SZ", "M", "20")])
    fmriprep(data, ["1", "2"])
    recon(data / "freesurfer/sub-1")
    assert main(["init", str(tmp_path / "new"), "--cohort", str(data)]) == 0
    path = tmp_path / "new/config.yaml"
    text = path.read_text()
    lines = text.splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r" +# (?!found)[a-z_]+: ", line)]
    assert len(settings) >= 10
    for i in settings:
        path.write_text("\n".join([*lines[:i], lines[i].replace("# ", "", 1), *lines[i + 1 :]]))
        config = load_config(path)
        assert config.cohort.folder == str(data)
        assert config.cohort.freesurfer in (["auto"], [f"{data}/freesurfer"])
    assert "diagnosis: strict schizophrenia   # or Patient as labelled\n" in text


def test_init_of_what_is_no_cohort_is_refused(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert main(["init", str(tmp_path / "new"), "--cohort", str(tmp_path / "data")]) == 1
    assert "has no layout that is known" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_init_of_raw_images_says_what_to_do_first(tmp_path, capsys):
    data = tmp_path / "data"
    write(data / "COBRE_phenotypic_data.csv", f"{COBRE_HEADER}\n0040000,20,Female,Right,Patient,295.3\n")
    image(data / "0040000/session_1/rest_1/rest.nii.gz")
    assert main(["init", str(tmp_path / "new"), "--cohort", str(data)]) == 0
    assert "not usable yet: " in capsys.readouterr().out
    text = (tmp_path / "new/config.yaml").read_text()
    assert "# Not usable yet: " in text
    assert "autospec bidsify" in text or "fmriprep" in text
    load_config(tmp_path / "new/config.yaml")
    assert main(["bidsify", str(data), str(tmp_path / "bids")]) == 0
    assert (tmp_path / "bids/sub-0040000/ses-1/func").is_dir() or list((tmp_path / "bids").rglob("*_bold.nii.gz"))


def test_init_of_gifts_sessions_keeps_the_maps_and_says_what_to_choose(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    participants(data / "participants.tsv", [("1", "HC", "M", "20"), ("2", "SZ", "M", "20")])
    for name in [
        f"A_sub00{i}_{kind}_ica_s{j}_.nii" for i in "12" for j in "12" for kind in ("timecourses", "component")
    ]:
        write(data / name, "not opened")
    assert main(["init", str(tmp_path / "new"), "--cohort", str(data)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\nnot usable yet: 1 has several sessions: .*; choose with session, or set scans to first", said)
    text = (tmp_path / "new/config.yaml").read_text()
    assert "# Not usable yet: 1 has several sessions" in text
    assert set(load_config(tmp_path / "new/config.yaml").datasets) == {"courses", "maps"}
    (tmp_path / "new/config.yaml").write_text(text.replace("  # task: rest", "  session: '1'\n  # task: rest"))
    assert len(read_cohort(load_config(tmp_path / "new/config.yaml")).functional) == 2


def test_a_template_is_not_downloaded_to_a_place_that_cannot_be(tmp_path, capsys):
    assert main(["fetch-template", str(tmp_path / "t.nii"), "--certificates", str(tmp_path / "none.pem")]) == 1
    assert "holds no certificates that can be read" in capsys.readouterr().err


def test_the_bids_app_finds_networks_without_anything_of_training(lab, tmp_path):
    arguments = [
        "ica", str(lab / "data"), str(tmp_path / "out"), "participant", "--participant-label", "sub-sim0001", "sim0003",
        "--template", str(lab / "template.nii.gz"), "--grid", "10", "--smoothing-fwhm-mm", "0", "--gift-files",
    ]  # fmt: skip
    code = (
        "import sys; from autospec.cli import main; done = main(sys.argv[1:]); "
        "bad = [name for name in sys.modules if name.startswith(('autospec.training', 'autospec.introspection', "
        "'autospec.models', 'autospec.watching', 'snakemake'))]; sys.exit(str(bad) if bad else done)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sub-sim0003: 11 networks (2 of 2)" in done.stderr
    assert "networks of 2 participants, 0 left out" in done.stdout
    description = json.loads((tmp_path / "out/dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["Simulated"] is True
    for name in ("sim0001", "sim0003"):
        files = subject_files(name)
        maps = nibabel.load(tmp_path / "out" / f"sub-{name}" / files["maps"])
        assert maps.shape[3] == 11
        assert np.isfinite(maps.get_fdata()).all()
    assert sorted((tmp_path / "out/sub-sim0003/gift").iterdir())[1].name == "autospec_sub002_component_ica_s1_.nii"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--participant-label", "99"], "has no sub-99: check --participant-label"),
        (["--grid", "huge"], "the command line: ica.grid is the text 'huge'"),
        (["--task-id", "nback"], "sub-sim0001 cannot be used: none of its images has task-nback"),
    ],
)
def test_the_bids_app_refuses_in_one_sentence(lab, tmp_path, capsys, more, words):
    arguments = ["ica", str(lab / "data"), str(tmp_path / "out"), "participant", "--template", "stand-in", *more]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
