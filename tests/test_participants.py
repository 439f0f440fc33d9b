"""What the jobs on a cohort depend on: files and settings, from names of files alone."""

import json

import nibabel
import numpy as np
import pandas as pd
import pytest
import yaml

from autospec import participants, specs
from autospec.check import check_analysis
from autospec.cohort.simulated import simulate_cohort
from autospec.cohort.tables import write_cohort
from autospec.config import parse_config
from autospec.errors import UserError
from autospec.ica.derivative import read_table, subject_files
from autospec.networks.precomputed import build_precomputed
from tests.cohort.trees import AFFINE, SHAPE, fmriprep, image, write
from tests.cohort.trees import participants as write_people


def simulated(**settings):
    return parse_config({"cohort": {"kind": "simulated", "subjects": 6, "volumes": 20, "voxel_mm": 12, **settings}})


def test_a_simulated_cohort_is_known_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = simulated()
    before = participants.read_cohort(config)
    files = participants.simulated_files(config)
    simulate_cohort(participants.simulation_settings(config), "work/simulated")
    assert all((tmp_path / file).is_file() for file in files)
    needed = [
        file
        for each in before.functional
        for kind in participants.subject_files(config, before, each.id).values()
        for file in kind
    ]
    assert set(needed) | set(participants.cohort_files(config, before)) <= {
        *files,
        participants.simulated_description(),
    }
    # Read again as a folder, by the readers that a lab's data go through.
    folder = {"kind": "folder", "folder": "work/simulated"}
    after = participants.read_cohort(parse_config({"cohort": folder, "ica": {"template": "stand-in"}}))
    assert after.participants == before.participants
    assert after.kind == "simulated"


def test_what_the_simulation_leaves_may_be_replaced(tmp_path):
    settings = participants.simulation_settings(simulated())
    simulate_cohort(settings, str(tmp_path / "work"))
    # Snakemake removes a job's outputs, and makes their folders, before the job runs again.
    (tmp_path / "work/dataset_description.json").unlink()
    simulate_cohort({**settings, "subjects": 4}, str(tmp_path / "work"))
    assert not (tmp_path / "work/sub-sim0006").exists()
    (tmp_path / "work/dataset_description.json").unlink()
    (tmp_path / "work/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no simulated cohort"):
        simulate_cohort(settings, str(tmp_path / "work"))


def test_every_table_of_volumes_is_an_input_and_in_the_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fmriprep(tmp_path / "data", ["1", "2"])
    write_people(tmp_path / "data/participants.tsv", [("1", "HC", "M", "20"), ("2", "SZ", "F", "30")])
    tables = {
        name: write(tmp_path / name, f"id\t{region}\n1\t7000\n2\t7100\n")
        for name, region in (("aseg.tsv", "Left-Thalamus"), ("lh.tsv", "lh_insula_volume"), ("rh", "rh_insula_volume"))
    }
    config = parse_config(
        {
            "cohort": {"kind": "folder", "folder": "data", "freesurfer": list(tables)},
            "ica": {"template": "stand-in"},
            "datasets": {"v": {"kind": "freesurfer"}},
        }
    )

    def digests():
        cohort = participants.read_cohort(config)
        assert participants.volume_files(cohort) == list(tables)
        assert set(tables) < set(participants.cohort_files(config, cohort))
        write_cohort(cohort, participants.cohort_settings(config), None, str(tmp_path / "out"))
        rows = pd.read_csv(tmp_path / "out/participants.tsv", sep="\t")
        assert rows["freesurfer"].tolist() == [";".join(tables)] * 2
        return rows["structural_digest"].tolist()

    before = digests()
    tables["rh"].write_text(tables["rh"].read_text().replace("7100", "7200"))
    assert set(before).isdisjoint(digests())


def subject_spec(config, name="sim0001"):
    cohort = participants.read_cohort(config)
    return specs.spec("subject", participants.subject_settings(config, cohort, name))


def test_a_participants_job_depends_on_nobody_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = subject_spec(simulated())
    assert subject_spec(simulated(subjects=9)) == plain
    for other in ({"max_mean_fd": 0.2}, {"min_volumes": 5}, {"on_bad_subject": "exclude"}, {"seed": 4}):
        assert subject_spec(simulated(**other)) == plain
    changed = parse_config({"cohort": {"kind": "simulated", "subjects": 6}, "ica": {"drop_volumes": 1}})
    assert subject_spec(changed) != plain
    assert json.loads(plain)["settings"]["ica"]["smoothing_fwhm_mm"] == 6.0  # fMRIPrep does not smooth
    names = json.loads(plain)["settings"]
    assert names["stand_in"] is True


def test_code_that_reads_tables_is_not_in_a_participants_fingerprint():
    from autospec.provenance import import_closure

    modules, _ = import_closure((specs.STAGES["subject"],))
    assert "autospec.ica.moo_icar" in modules
    for name in ("cohort.phenotypes", "cohort.selection", "cohort.layouts", "cohort.tables", "config", "participants"):
        assert f"autospec.{name}" not in modules


def test_settings_that_do_not_fit_the_layout_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_people(tmp_path / "data/participants.tsv", [("1", "HC", "M", "20"), ("2", "SZ", "F", "30")])
    fmriprep(tmp_path / "data", ["1", "2"])
    folder = {"kind": "folder", "folder": "data", "diagnosis": "Patient as labelled"}
    for more, said in (
        ({"ica": {"timecourses": "precomputed"}}, "the layout bids brings images"),
        ({"datasets": {"v": {"kind": "freesurfer"}}}, "needs FreeSurfer's volumes, and nobody"),
    ):
        with pytest.raises(UserError, match=said):
            participants.read_cohort(parse_config({"cohort": folder, **more}))


RUN = {"task": "autoencoder", "hidden": [4]}
EXPERIMENT = {"title": "T", "dataset": "v", "runs": {"ae": RUN}, "panels": [{"run": "ae", "compare": ["HC", "SZ"]}]}


@pytest.mark.parametrize(
    ("experiment", "statistics", "said"),
    [
        ({}, {}, ""),
        (
            {"groupings": ["diagnosis x sex"], "panels": [{"run": "ae", "compare": ["diagnosis=HC & sex=F", "sex=M"]}]},
            {},
            "",
        ),
        ({"groupings": ["medication"]}, {}, "experiments.e.groupings names 'medication', but there is 'diagnosis'"),
        ({"groupings": ["diagnosis x sexx"]}, {}, "experiments.e.groupings names 'sexx'.*cohort.groupings"),
        (
            {"panels": [{"run": "ae", "compare": ["HC", "CTRL"]}]},
            {},
            "a panel of 'e' compares the group 'CTRL', but.*'HC', 'SZ'",
        ),
        ({"groupings": ["sex"]}, {}, "a panel of 'e' compares the group 'HC', but the groups are 'F', 'M'"),
        ({}, {"within": ["centre"]}, "statistics.within names 'centre'"),
        ({}, {"within": ["sex"], "conditional_on": ["age", "intracranial_volume"]}, ""),
        ({}, {"conditional_on": ["ages"]}, "statistics.conditional_on names 'ages', but there is 'age'"),
        ({}, {"within": ["centre"], "permutation": "none"}, ""),
    ],
)
def test_groups_that_the_cohort_does_not_have_are_refused_before_any_job(
    experiment, statistics, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = parse_config(
        {
            "cohort": {"kind": "simulated", "subjects": 12},
            "datasets": {"v": {"kind": "freesurfer"}},
            "experiments": {"e": EXPERIMENT | experiment},
            "statistics": statistics,
        }
    )
    if not said:
        participants.read_cohort(config)
        return
    with pytest.raises(UserError, match=said):
        participants.read_cohort(config)


def test_labels_of_digits_are_permuted_without_what_only_participants_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {"within": ["sex"], "conditional_on": ["age"]}
    config = parse_config(
        {
            "cohort": {"kind": "simulated", "subjects": 12},
            "datasets": {"v": {"kind": "freesurfer"}, "d": {"kind": "mnist"}},
            "experiments": {"e": EXPERIMENT, "digits": EXPERIMENT | {"dataset": "d", "panels": [{"run": "ae"}]}},
            "statistics": asked,
        }
    )
    participants.read_cohort(config)
    for settings in (specs.permutation_settings, lambda *names: specs.refit_part_settings(*names, "0")):
        assert asked.items() <= settings(config, "e", "ae").items()
        assert {"within": [], "conditional_on": []}.items() <= settings(config, "digits", "ae").items()


@pytest.mark.parametrize(
    ("task", "said"), [("autoencoder", ""), ("classifier", r"experiments\.e\.runs\.net is a .*'SZ'")]
)
def test_a_classifier_of_one_diagnosis_is_refused_before_any_job(task, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_people(tmp_path / "data/participants.tsv", [("1", "HC", "M", "20"), ("2", "SZ", "F", "30")])
    fmriprep(tmp_path / "data", ["1", "2"])
    config = {
        "cohort": {
            "kind": "folder",
            "folder": "data",
            "diagnosis": "Patient as labelled",
            "labels": {"HC": "SZ", "SZ": "SZ"},
        },
        "ica": {"template": "stand-in"},
        "datasets": {"c": {"kind": "timeseries"}},
        "experiments": {
            "e": {"title": "T", "dataset": "c", "runs": {"net": {"task": task}}, "panels": [{"run": "net"}]}
        },
    }
    if not said:
        participants.read_cohort(parse_config(config))
        return
    with pytest.raises(UserError, match=said):
        participants.read_cohort(parse_config(config))


@pytest.mark.parametrize("permutation", ["compared", "none"])
def test_check_warns_of_groups_too_small_to_be_tested(permutation, tmp_path):
    config = {
        "cohort": {"kind": "simulated", "subjects": 12},
        "datasets": {"v": {"kind": "freesurfer"}},
        "experiments": {"e": EXPERIMENT},
        "statistics": {"minimum_group_size": 9, "permutation": permutation},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    said = check_analysis(str(tmp_path))
    warned = [f"warning: 'e' compares '{label}', of whom there are 6" in said for label in ("HC", "SZ")]
    assert any(warned) == (permutation == "compared"), said


def test_check_says_that_the_templates_affines_disagree(tmp_path):
    write_people(tmp_path / "participants.tsv", [("1", "HC", "1.nii"), ("2", "SZ", "2.nii")], ("id", "dx", "bold"))
    for name in "12":
        image(tmp_path / f"{name}.nii", volumes=20)
    template = nibabel.Nifti1Image(np.random.default_rng(0).uniform(size=(*SHAPE, 3)).astype("f4"), AFFINE)
    template.set_sform(AFFINE, 4)
    template.set_qform(np.diag([-1.0, 1, 1, 1]) @ AFFINE, 4)
    nibabel.save(template, tmp_path / "template.nii")
    config = {
        "cohort": {"kind": "folder", "folder": "."},
        "ica": {"template": "template.nii"},
        "datasets": {"t": {"kind": "timeseries"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    said = check_analysis(str(tmp_path)).splitlines()
    assert "warning: the sform and the qform of template.nii do not agree within 1 mm; the sform is used" in said


def test_check_counts_those_whom_a_network_is_trained_on(tmp_path):
    config = {
        "cohort": {"kind": "simulated", "subjects": 12},
        "datasets": {"v": {"kind": "freesurfer"}},
        "experiments": {"e": EXPERIMENT},
        "statistics": {"minimum_group_size": 6},
        "training": {"held_out": 0.2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    kept = "(5 without those whom training.held_out keeps from training)"
    for label in ("HC", "SZ"):
        assert f"'e' compares '{label}', of whom there are 6 {kept}: groups of fewer" in check_analysis(str(tmp_path))
    config["training"]["held_out"] = 0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "warning" not in check_analysis(str(tmp_path))


def test_check_counts_those_whose_images_can_be_used(tmp_path):
    people = [(str(i), ("HC", "SZ")[i % 2], f"{i}.nii") for i in range(12)]
    write_people(tmp_path / "participants.tsv", people, ("id", "dx", "bold"))
    for name, _, file in people:
        image(tmp_path / file, volumes=20 if name != "2" else 4, description=name.encode())
    image(tmp_path / "atlas.nii", volumes=1)
    config = {
        "cohort": {"kind": "folder", "folder": ".", "on_bad_subject": "exclude"},
        "ica": {"timecourses": "atlas", "atlas": "atlas.nii"},
        "datasets": {"v": {"kind": "timeseries"}},
        "experiments": {"e": EXPERIMENT},
        "statistics": {"minimum_group_size": 6},
        "training": {"held_out": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    said = [line for line in check_analysis(str(tmp_path)).split("\n") if line.startswith("warning")]
    assert said == [
        "warning: 'e' compares 'HC', of whom there are 5: groups of fewer than statistics.minimum_group_size (6) are not tested"
    ]


@pytest.mark.parametrize(
    ("stated", "header", "said"),
    [
        (None, 0.0, "nobody is left of 2 participants.*repetition time .* neither in its header"),
        (2.0, 0.0, ""),
        (2.0, 2.0, ""),
        (2.0, 1.5, "header says 1.5 s, repetition_time says 2 s"),
    ],
)
def test_check_knows_the_repetition_time_of_the_config(stated, header, said, tmp_path):
    write_people(tmp_path / "participants.tsv", [("1", "HC", "1.nii"), ("2", "SZ", "2.nii")], ("id", "dx", "bold"))
    for name in "12":
        image(tmp_path / f"{name}.nii", volumes=20, time=header)
    image(tmp_path / "atlas.nii", volumes=1)
    config = {
        "cohort": {"kind": "folder", "folder": ".", "on_bad_subject": "exclude"},
        "ica": {"timecourses": "atlas", "atlas": "atlas.nii", "repetition_time": stated},
        "datasets": {"t": {"kind": "timeseries"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    if said:
        with pytest.raises(UserError, match=said):
            check_analysis(str(tmp_path))
    else:
        assert "repetition time: 2 s (2 images)" in check_analysis(str(tmp_path))


def check_two(folder, cohort, ica):
    """The config for two people's images and an atlas, and what `autospec check` says of it."""
    write_people(folder / "participants.tsv", [("1", "HC", "1.nii"), ("2", "SZ", "2.nii")], ("id", "dx", "bold"))
    for name in "12":
        image(folder / f"{name}.nii", volumes=20, description=name.encode())
    image(folder / "atlas.nii", volumes=1)
    config = {
        "cohort": {"kind": "folder", "folder": ".", **cohort},
        "ica": {"timecourses": "atlas", "atlas": "atlas.nii", **ica},
        "datasets": {"t": {"kind": "timeseries"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    try:
        return config, check_analysis(str(folder))
    except UserError as error:
        return config, str(error)


@pytest.mark.parametrize(
    ("ica", "said"),
    [
        ({"drop_volumes": 4}, "volumes: 16 in every image, without the first 4 of each"),
        (
            {"drop_volumes": 5},
            "20 volumes, of which drop_volumes = 5 leaves 15, too few to clean time courses: at least 16",
        ),
        ({"drop_volumes": 5, "low_pass_hz": None}, "volumes: 15 in every image"),
        ({"drop_volumes": 13, "low_pass_hz": 0.5}, "at least 8 are needed"),
    ],
)
def test_check_knows_how_many_volumes_are_left_and_needed(ica, said, tmp_path, monkeypatch):
    config, found = check_two(tmp_path, {}, ica)
    assert said in found
    monkeypatch.chdir(tmp_path)
    config = parse_config(config)
    cohort = participants.candidates(participants.cohort_settings(config))
    assert participants.shared_settings(config, cohort)["drop_volumes"] == ica["drop_volumes"]


def test_jobs_on_the_whole_cohort_know_the_layout_whether_it_was_named_or_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_people(tmp_path / "data/participants.tsv", [("1", "HC", "M", "20"), ("2", "SZ", "F", "30")])
    fmriprep(tmp_path / "data", ["1", "2"])
    found = []
    for layout in ("auto", "bids"):
        folder = {"kind": "folder", "folder": "data", "layout": layout, "diagnosis": "Patient as labelled"}
        config = parse_config({"cohort": folder, "ica": {"template": "stand-in"}})
        cohort = participants.read_cohort(config)
        found.append([make(config, cohort) for make in (participants.shared_settings, participants.gift_mask_settings)])
    assert found[0] == found[1]
    assert {each["cohort"]["layout"] for each in found[0]} == {"bids"}


def test_check_reads_the_volumes(tmp_path):
    write_people(tmp_path / "data/participants.tsv", [("1", "HC", "M", "20"), ("2", "SZ", "F", "30")])
    fmriprep(tmp_path / "data", ["1", "2"])
    config = {
        "cohort": {"kind": "folder", "folder": "data", "freesurfer": ["volumes.tsv"]},
        "datasets": {"v": {"kind": "freesurfer"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    table = write(tmp_path / "volumes.tsv", "id\tLeft-Caudate\n1\t3500\n2\t3600\n")
    assert "data sets: v (freesurfer)" in check_analysis(str(tmp_path))
    table.write_text(table.read_text().replace("3600", "-999"))
    with pytest.raises(UserError, match=r"volumes\.tsv has '-999' in the column Left-Caudate"):
        check_analysis(str(tmp_path))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, ""),
        ({"courses": {"kind": "timeseries", "length": 18}, "maps": {"kind": "maps", "voxel_mm": 3.0}}, ""),
        (
            {"courses": {"kind": "timeseries", "length": 19}},
            "datasets.courses.length is 19, but the shortest series has 18 time points: lower it",
        ),
        (
            {"maps": {"kind": "maps", "voxel_mm": 2.0}},
            "datasets.maps cannot be made: voxel_mm is 2, but the maps have voxels of 3 mm",
        ),
    ],
)
def test_check_refuses_data_sets_that_cannot_be_made(more, said, tmp_path):
    config = {
        "cohort": {"kind": "simulated", "subjects": 4, "volumes": 20, "voxel_mm": 12},
        "ica": {"drop_volumes": 2},
        "datasets": {"courses": {"kind": "timeseries"}, **more},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    if not said:
        assert "volumes: 18 in every image" in check_analysis(str(tmp_path))
        return
    with pytest.raises(UserError, match=said):
        check_analysis(str(tmp_path))


@pytest.mark.parametrize(("confounds", "said"), [("none", "left out: nobody"), ("motion", "nobody is left of 2")])
def test_check_looks_for_the_confounds_that_are_asked_for(confounds, said, tmp_path):
    _, found = check_two(tmp_path, {"on_bad_subject": "exclude"}, {"confounds": confounds})
    assert said in found


@pytest.mark.parametrize("grid", ["template", "data"])
def test_check_tells_grids_apart_and_asks_for_one_only_where_there_is_none(grid, tmp_path):
    write_people(tmp_path / "participants.tsv", [("1", "HC", "1.nii"), ("2", "SZ", "2.nii")], ("id", "dx", "bold"))
    left = AFFINE * [[-1], [1], [1], [1]]
    for name, affine in (("1", AFFINE), ("2", left)):
        image(tmp_path / f"{name}.nii", volumes=60, affine=affine)
    config = {
        "cohort": {"kind": "folder", "folder": "."},
        "ica": {"template": "stand-in", "grid": grid},
        "datasets": {"t": {"kind": "timeseries"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    said = check_analysis(str(tmp_path)).split("\n")
    covered = [line.split(" mm: ")[0] for line in said if line.startswith("template coverage")]
    assert [line.split(" from ")[1] for line in covered] == ["(-90, -126, -72)", "(90, -126, -72)"]
    assert any("set ica.grid to template" in line for line in said) == (grid == "data")
    assert any("warning: images lie on several grids" in line for line in said)


def test_gifts_time_courses_need_a_repetition_time_before_any_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_people(tmp_path / "participants.tsv", [("1", "HC"), ("2", "SZ")], ("id", "dx"))
    for number in (1, 2):
        (tmp_path / f"A_sub00{number}_timecourses_ica_s1_.nii").write_bytes(b"not opened")
    config = {
        "cohort": {"kind": "folder", "folder": "."},
        "ica": {"timecourses": "precomputed"},
        "datasets": {"t": {"kind": "timeseries"}},
    }
    with pytest.raises(UserError, match=r"in the layout gift: set ica.repetition_time"):
        participants.read_cohort(parse_config(config))
    config["ica"]["repetition_time"] = 2.0
    assert len(participants.read_cohort(parse_config(config)).functional) == 2


def test_networks_of_gift_are_taken_over(tmp_path):
    import nibabel

    generator = np.random.default_rng(0)
    courses, maps = generator.normal(size=(40, 3)), generator.normal(size=(4, 5, 4, 3))
    for name, values in (("timecourses", courses), ("component", maps)):
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.diag([30.0, 30, 30, 1])), tmp_path / f"A_sub001_{name}_ica_s1_.nii")  # fmt: skip
    config = parse_config(
        {"cohort": {"kind": "folder", "folder": "."}, "ica": {"timecourses": "precomputed", "repetition_time": 2.0}}
    )
    chosen = participants.timecourse_settings(config.ica, participants.Done(), image=False)
    settings = {"subject": "7", "position": 0, "ica": chosen}
    files = {
        "timecourses": str(tmp_path / "A_sub001_timecourses_ica_s1_.nii"),
        "maps": str(tmp_path / "A_sub001_component_ica_s1_.nii"),
        "mask": "",
        "components": "",
        "description": "",
    }
    said = build_precomputed(settings, files, "fail", str(tmp_path / "sub-7"))
    assert said == "sub-7: networks computed before"
    names = subject_files("7")
    found, labels = read_table(tmp_path / "sub-7" / names["timecourses"])
    assert labels == ["network-001", "network-002", "network-003"]
    assert np.corrcoef(found[:, 1], courses[:, 1])[0, 1] > 0.9
    assert np.allclose(nibabel.load(tmp_path / "sub-7" / names["maps"]).get_fdata(), maps, atol=1e-6)
    status = json.loads((tmp_path / "sub-7/status.json").read_text())
    assert status["volumes"] == 40
    assert len(status["digest"]) == 16
    bad = {**files, "timecourses": files["maps"]}
    with pytest.raises(UserError, match="an image of time courses is time x network"):
        build_precomputed(settings, bad, "fail", str(tmp_path / "sub-8"))
    assert not (tmp_path / "sub-8").exists()
    assert "excluded" in build_precomputed(settings, bad, "exclude", str(tmp_path / "sub-8"))
    assert [path.name for path in (tmp_path / "sub-8").iterdir()] == ["status.json"]
