"""The configuration: what is refused, in which words, and what overrides what."""

import json

import jsonschema
import pytest
import yaml

from autospec.analysis import NEW_CONFIG
from autospec.config import Statistics, load_config, parse_config, read_yaml
from autospec.documentation import SCHEMA, generated
from autospec.errors import UserError
from tests.conftest import ROOT

SMALL = """
datasets:
  digits: {kind: mnist}
training: {}
introspection: {}
statistics: {}
figures: {}
experiments:
  small:
    title: A small experiment
    figure: 1
    dataset: digits
    runs:
      net: {task: classifier}
    panels:
      - run: net
"""

# Where in the YAML file, what stands there, and what the sentence must say.
MISTAKES = [
    ("training.epoch", "3", ["no setting called 'training.epoch'", "spelling"]),
    ("experiments.small.runs.net.hiden", "[3]", ["no setting called 'experiments.small.runs.net.hiden'"]),
    (
        "experiments.small.runs.net.training",
        "{lr: 0.1}",
        ["no setting called 'experiments.small.runs.net.training.lr'"],
    ),
    ("nonsense", "1", ["no setting called 'nonsense'"]),
    ("experiments.small.panels", "[{runs: net}]", ["no setting called 'experiments.small.panels (entry 1).runs'"]),
    (
        "training.learning_rate",
        "1e-3",
        ["training.learning_rate is the text '1e-3'", "YAML reads 1e-3 as text", "0.001"],
    ),
    ("training.learning_rate", '"0.1"', ["training.learning_rate is the text '0.1'", "take the quotes off"]),
    ("training.learning_rate", "true", ["training.learning_rate is the boolean true", "must be a number"]),
    ("training.learning_rate", "-0.1", ["training.learning_rate is the number -0.1", "more than 0"]),
    ("training.learning_rate", ".inf", ["finite"]),
    ("training.learning_rate", ".nan", ["finite"]),
    ("training.epochs", "1e3", ["training.epochs is the text '1e3'", "write 1000"]),
    ("training.epochs", "1.0e3", ["YAML reads 1.0e3 as text", "write 1000"]),
    ("training.epochs", "10.5", ["training.epochs is the number 10.5", "a whole number"]),
    ("training.epochs", "0", ["at least 1"]),
    ("training.seed", "-1", ["training.seed is the number -1", "at least 0"]),
    ("training", "3", ["training is the number 3", "a mapping of settings"]),
    ("training", "", ["training is empty", "a mapping of settings"]),
    (
        "datasets.digits.classes",
        "[0, 1]",
        ["classes (entry 1) is the number 0", "put quotes around it", "1 more mistake)"],
    ),
    ("datasets.digits.classes", "[No, Yes]", ["classes (entry 1) is the boolean false", "put quotes around it"]),
    ("datasets.digits.classes", '[2020-01-01, "1"]', ["is the date 2020-01-01", "put quotes around it"]),
    ("datasets.digits.classes", '"0"', ["must be a list"]),
    ("datasets.digits.classes", "[]", ["classes is an empty list", "2 or more"]),
    ("datasets.digits.classes", '["0", "0"]', ["classes names '0' twice"]),
    ("datasets.digits.classes", '["0", ""]', ["classes (entry 2)", "not empty"]),
    ("datasets.digits.kind", "cobre", ["datasets.digits.kind is the text 'cobre'", "'mnist'"]),
    ("datasets.digits.images", "images.gz", ["labels must name the file of labels"]),
    ("datasets.digits.labels", "labels.gz", ["images must name the file of images"]),
    ("datasets.digits.samples_per_class", "-5", ["samples_per_class is the number -5", "at least 1"]),
    ("datasets", "{}", ["datasets is an empty mapping"]),
    ("datasets", "{Digits: {kind: mnist}}", ["the text 'Digits'", "small letters", "begins with a letter"]),
    ("datasets", "{yes: {kind: mnist}}", ["a name in datasets is the boolean true"]),
    ("experiments.small.dataset", "faces", ["experiments.small.dataset is 'faces'", "the data sets are 'digits'"]),
    ("experiments.small.title", "3", ["experiments.small.title is the number 3", "put quotes around it"]),
    ("experiments.small.figure", '"1"', ["experiments.small.figure is the text '1'", "take the quotes off"]),
    ("experiments.small.model", "transformer", ["experiments.small.model is 'transformer'", "'mlp'", "under models"]),
    ("models", '{mine: "net.py"}', ["models.mine is the text 'net.py'", "package.module:Class"]),
    ("training.held_out", "0.9", ["training.held_out is the number 0.9", "at most 0.5"]),
    ("training.further_seeds", "[0]", ["the seed 0 stands twice"]),
    ("experiments.small.panels", "[{run: net, by_position: true}]", ["not recorded", "per_position"]),
    ("experiments.small.panels", '[{run: net, compare: ["0", "1"], test: refit}]', ["has none: set refit to true"]),
    ("experiments.small.panels", "[{run: net, test: refit}]", ["compares no groups"]),
    ("experiments.small.runs", "{}", ["experiments.small.runs is an empty mapping"]),
    ("experiments.small.runs.net.task", "regression", ["'autoencoder' or 'classifier'"]),
    ("experiments.small.runs.net.activation", "gelu", ["'relu', 'sigmoid' or 'tanh'"]),
    ("experiments.small.runs.net.hidden", "[]", ["hidden is an empty list"]),
    ("experiments.small.runs.net.hidden", "32", ["hidden is the number 32", "must be a list"]),
    ("experiments.small.runs.net.hidden", "[8, -3]", ["hidden (entry 2) is the number -3"]),
    ("experiments.small.runs.net.hidden", "[0]", ["hidden (entry 1) is the number 0", "at least 1"]),
    ("experiments.small.panels", "[]", ["panels is an empty list"]),
    ("experiments.small.panels", "[{run: knot}]", ["a panel names the run 'knot'", "the runs are 'net'"]),
    ("experiments.small.panels", "[{run: net}, {run: net}]", ["stands twice"]),
    ("experiments.small.panels", '[{run: net, compare: ["0", "7"]}]', ["the group '7'", "'0', '1', '2', '3'"]),
    ("experiments.small.panels", '[{run: net, compare: ["0", "0"]}]', ["the group '0' with itself"]),
    ("experiments.small.panels", '[{run: net, compare: ["0"]}]', ["compare is a list of 1", "2 or more"]),
    ("experiments.small.panels", "[{run: net, compare: [0, 3]}]", ["compare (entry 1) is the number 0", "quotes"]),
    ("introspection.steps", "[]", ["introspection.steps is an empty list"]),
    ("introspection.steps", "[-1]", ["at least 0"]),
    ("introspection.steps", "[5000]", ["small/net would record nothing", "begins at 5000"]),
    ("training.snapshots", "[0, 5000]", ["small/net has no update 5000, which training.snapshots names"]),
    ("introspection.layers", "[]", ["introspection.layers is an empty list"]),
    (
        "introspection.layers",
        '["nolayer*"]',
        ["names 'nolayer*', but the weights of small/net are 'encoder.0.weight', 'classifier.weight'", "or run"],
    ),
    (
        "experiments.small.runs.net.introspection",
        '{layers: ["encoder.*", decoder.0.weight]}',
        ["introspection.layers names 'decoder.0.weight', but the weights of small/net are"],
    ),
    ("introspection.statistics", "[gradients]", ["'gradient', 'activation', 'adjoint'"]),
    (
        "introspection.singular_values",
        "some",
        ["introspection.singular_values is the text 'some'", "a whole number or 'all'"],
    ),
    ("introspection.singular_values", "0", ["at least 1 or 'all'"]),
    ("statistics.alpha", "5", ["statistics.alpha is the number 5", "less than 1"]),
    ("statistics.scale", "No", ["statistics.scale is the boolean false", "'raw' or 'log'"]),
    ("figures.dots_per_inch", "10", ["at least 50"]),
    ("cohort", "3", ["cohort is the number 3", "a mapping of settings"]),
    ("cohort", "{subjects: 8}", ["the setting 'cohort.kind' is missing"]),
    ("cohort", "{kind: real}", ["cohort.kind is the text 'real'", "'simulated' or 'folder'"]),
    ("cohort", "{kind: simulated, subject: 8}", ["no setting called 'cohort.subject'"]),
    ("cohort", "{kind: simulated, volumes: 2}", ["cohort.volumes is the number 2", "at least 20"]),
    ("cohort", "{kind: simulated, no_effect: 1}", ["cohort.no_effect is the number 1", "true or false"]),
    ("cohort", "{kind: folder}", ["the setting 'cohort.folder' is missing"]),
    ("cohort", "{kind: folder, folder: x, run: 1}", ["cohort.run is the number 1", "put quotes around it"]),
    (
        "cohort",
        "{kind: folder, folder: x, scans: every}",
        ["cohort.scans is the text 'every'", "'one', 'first' or 'all'"],
    ),
    ("cohort", "{kind: folder, folder: x, columns: {dx: y}}", ["no setting called 'cohort.columns.dx'", "'diagnosis'"]),
    (
        "cohort",
        "{kind: folder, folder: x, sex_labels: {1: M}}",
        ["a name in cohort.sex_labels is the number 1", "quotes"],
    ),
    ("ica", "{grid: coarse}", ["ica.grid is the text 'coarse'", "'template' or 'data' or a number"]),
    (
        "ica",
        "{timecourses: precomputed, confounds: motion, smoothing_fwhm_mm: 8}",
        ["ica: smoothing_fwhm_mm, confounds have no effect where timecourses is precomputed: leave them out"],
    ),
    (
        "ica",
        "{timecourses: atlas, atlas: a.nii, scaling: gift}",
        ["ica: scaling: gift has no effect where timecourses is atlas: leave it out"],
    ),
    ("ica", "{timecourses: atlas, atlas: a.nii, converged: true}", ["ica: converged has no effect"]),
    ("ica", "{timecourses: atlas}", ["atlas names the image of an atlas exactly where timecourses is atlas"]),
    ("datasets.courses", "{kind: timeseries}", ["datasets.courses is made from a cohort: name one under cohort"]),
    (
        "datasets.digits",
        "{kind: maps, aggregate: min}",
        ["datasets.digits.aggregate is the text 'min'", "'max' or 'absmax'"],
    ),
    ("datasets.digits", "7", ["datasets.digits is the number 7", "a mapping of settings"]),
]


def with_value(where: str, text: str) -> str:
    """YAML text of the small config with a value, as a user would write it, in one place."""
    data = yaml.safe_load(SMALL)
    *parents, last = where.split(".")
    at = data
    for name in parents:
        at = at[name]
    at[last] = "PLACEHOLDER"
    return yaml.safe_dump(data).replace("PLACEHOLDER", text)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("datasets: {maps: {kind: maps}}\nica: {template: stand-in, grid: data}", "needs one grid for all maps"),
        ("datasets: {maps: {kind: maps}}\nica: {timecourses: atlas, atlas: a.nii}", "needs maps of networks"),
        (
            "datasets: {maps: {kind: maps, voxel_mm: 2}}\nica: {template: stand-in, grid: 3}",
            "datasets.maps.voxel_mm is 2, but ica.grid makes maps of voxels of 3 mm: give a larger number",
        ),
        ("datasets: {series: {kind: timeseries}}", "ica.template is missing"),
        ("", "ica.template is missing"),
    ],
)
def test_settings_of_a_cohort_that_do_not_fit_are_one_clear_sentence(tmp_path, more, said):
    file = tmp_path / "config.yaml"
    file.write_text(f"cohort: {{kind: folder, folder: data}}\n{more}\n")
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_are_the_default_may_stand_beside_any_time_courses():
    chosen = {"timecourses": "precomputed", "scaling": "none", "confounds": "none", "smoothing_fwhm_mm": 0}
    assert parse_config({"cohort": {"kind": "folder", "folder": "data"}, "ica": chosen}).ica.scaling == "none"


def test_layers_of_a_network_of_ones_own_are_looked_for_when_it_is_built():
    data = yaml.safe_load(SMALL)
    data["introspection"]["layers"] = ["trunk.*"]
    data["models"] = {"mine": "mynetworks:Net"}
    data["experiments"]["small"]["model"] = "mine"
    assert parse_config(data).introspection_of("small", "net").layers == ["trunk.*"]


def test_volumes_alone_need_no_template(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("cohort: {kind: folder, folder: data}\ndatasets: {volumes: {kind: freesurfer}}\n")
    assert not load_config(file).needs_networks


@pytest.mark.parametrize(("where", "text", "said"), MISTAKES, ids=[f"{where}={text}" for where, text, _ in MISTAKES])
def test_a_mistake_is_one_clear_sentence(tmp_path, where, text, said):
    file = tmp_path / "config.yaml"
    file.write_text(with_value(where, text))
    with pytest.raises(UserError) as caught:
        load_config(file)
    sentence = str(caught.value)
    assert sentence.startswith(f"{file}: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "input should" not in sentence.lower()
    for part in said:
        assert part in sentence


@pytest.mark.parametrize(
    ("number", "name", "its_number", "figure"),
    [
        (1, "other", 1, "figure-1"),
        (1, "s1", None, "figure-s1"),  # the supplement of figure 1
        (None, "s_small", None, "figure-s_small"),
    ],
)
def test_two_experiments_whose_figures_would_have_one_name_are_refused(number, name, its_number, figure):
    data = yaml.safe_load(SMALL)
    small = data["experiments"]["small"]
    comparing = [{"run": "net", "compare": ["0", "1"]}]
    data["experiments"] = {
        "small": {**small, "figure": number, "panels": comparing},
        name: {**small, "figure": its_number},
    }
    with pytest.raises(UserError, match=f"'small' and '{name}' would both write {figure}:"):
        parse_config(data)
    data["experiments"]["small"]["panels"] = small["panels"]  # compares no groups, so it has no supplement
    if its_number is None:
        parse_config(data)


@pytest.mark.parametrize(("setting", "wanted"), [("within", "site"), ("conditional_on", "age")])
def test_tests_that_ask_for_participants_are_refused_where_there_are_none(setting, wanted):
    data = yaml.safe_load(SMALL)
    data["statistics"] = {setting: [wanted]}
    with pytest.raises(
        UserError, match=f"statistics.{setting} names '{wanted}', but no experiment trains on a cohort's"
    ):
        parse_config(data)
    data["cohort"] = {"kind": "simulated"}
    data["datasets"]["volumes"] = {"kind": "freesurfer"}
    data["experiments"]["other"] = {**data["experiments"]["small"], "dataset": "volumes", "figure": 2}
    parse_config(data)


def test_two_panels_whose_files_would_have_one_name_are_refused():
    data = yaml.safe_load(SMALL)
    small = data["experiments"]["small"]
    small["runs"]["net_0_vs_3"] = {"task": "classifier"}
    small["panels"] = [{"run": "net", "compare": ["0", "3"]}, {"run": "net_0_vs_3"}]
    with pytest.raises(UserError, match="both be called 'net_0_vs_3'"):
        parse_config(data)


def test_a_missing_setting_is_named():
    data = yaml.safe_load(SMALL)
    del data["experiments"]["small"]["dataset"]
    with pytest.raises(UserError, match=r"the setting 'experiments\.small\.dataset' is missing"):
        parse_config(data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no settings"),
        (b"- a\n- b\n", "holds no settings"),
        (b"training: [1, 2\n", "is not valid YAML"),
        (b"training: {epochs: 1}\ntitle: x\ntraining: {epochs: 3}\n", "'training' stands twice, at line 1 and line 3"),
        (b"title: \xff\xfe\n", "no text in UTF-8"),
    ],
    ids=["empty", "a list", "unclosed", "twice", "other encoding"],
)
def test_a_file_that_is_no_config_is_one_sentence(tmp_path, content, said):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_may_be_merged_into_several_and_overridden(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "a: &a {k: 1, m: 0}\nb:\n  c:\n    d: &d {<<: *a, k: 2}\ne: {<<: *d}\nf: {<<: *d, k: 3}\ng: {1: x, '1': y}\n"
    )
    assert read_yaml(file)["e"] == {"k": 2, "m": 0}
    assert read_yaml(file)["f"] == {"k": 3, "m": 0}
    file.write_text("first: &first {kind: 1}\nsecond: &second {kind: 2, more: 3}\nboth: {<<: [*first, *second]}\n")
    assert read_yaml(file)["both"] == {"kind": 1, "more": 3}


def test_a_config_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


def test_a_run_overrides_its_experiment_which_overrides_the_general_settings():
    data = yaml.safe_load(SMALL)
    small = data["experiments"]["small"]
    data["training"] = {"epochs": 10, "learning_rate": 0.5, "seed": 1}
    small["training"] = {"epochs": 20, "seed": 2}
    small["runs"]["net"]["training"] = {"seed": 0}  # 0 is the default too: what is set counts, not what differs
    small["runs"]["plain"] = {"task": "autoencoder"}
    data["introspection"] = {"every": 5, "audit": 3}
    small["introspection"] = {"every": 1}
    small["runs"]["net"]["introspection"] = {"audit": 7}
    config = parse_config(data)

    def chosen(run: str) -> dict[str, object]:
        return config.training_of("small", run).model_dump(include={"epochs", "learning_rate", "seed"})

    assert chosen("net") == {"epochs": 20, "learning_rate": 0.5, "seed": 0}
    assert chosen("plain") == {"epochs": 20, "learning_rate": 0.5, "seed": 2}
    assert (config.introspection_of("small", "plain").every, config.introspection_of("small", "plain").audit) == (1, 3)
    assert (config.introspection_of("small", "net").every, config.introspection_of("small", "net").audit) == (1, 7)


def test_the_repositorys_configs_are_valid(tmp_path):
    assert load_config(ROOT / "config.yaml").experiments
    new = tmp_path / "config.yaml"
    new.write_text(NEW_CONFIG.format(folder="somewhere"))
    assert load_config(new).experiments


def test_the_papers_config_has_every_experiment_and_variant_of_the_paper():
    config = load_config(ROOT / "configs/paper.yaml")
    assert (config.training.epochs, config.training.learning_rate, config.training.held_out) == (1000, 0.001, 0.0)
    assert {(each.figure, each.dataset, each.model) for each in config.experiments.values()} == {
        *((1, "mnist", "mlp"), (2, "mnist", "cnn2d"), (3, "sinusoids", "rnn"), (4, "freesurfer", "mlp")),
        *((5, "timeseries", "lstm"), (6, "timeseries", "bert"), (7, "timeseries", "cnn1d"), (8, "maps", "cnn3d")),
        (None, "timeseries", "cnn2d"),
    }
    for name, experiment in config.experiments.items():
        runs = [(run.task, tuple(run.hidden), run.activation) for run in experiment.runs.values()]
        width, others = (8, ["sigmoid", "tanh"]) if name == "mnist_cnn2d" else (32, [])
        wanted = [
            (task, hidden, "relu") for task in ("autoencoder", "classifier") for hidden in ((width,), (128,), (8,) * 3)
        ]
        wanted += [("autoencoder", (width,), activation) for activation in ("sigmoid", "tanh")]
        wanted += [("classifier", (width,), activation) for activation in others]
        wanted += [] if others else [("autoencoder", (8,), "relu"), ("autoencoder", (64,), "relu")]
        assert sorted(runs) == sorted(wanted), name
        drawn = [(panel.run, panel.compare is not None, panel.by_position) for panel in experiment.panels]
        letters = list(dict.fromkeys(drawn))
        assert len(letters) == 8 + (experiment.model in ("rnn", "lstm")), name  # A to H, and spectra along time
        assert {run.partition("_")[0] for run, compared, _ in letters if compared} == {"autoencoder", "classifier"}, (
            name
        )


@pytest.mark.parametrize("path", list(generated()))
def test_what_is_generated_from_the_config_is_up_to_date(path):
    assert (ROOT / path).read_text(encoding="utf-8") == generated()[path], "run  make schema"


def test_the_schema_is_valid_and_judges_as_the_config_does():
    schema = json.loads((ROOT / SCHEMA).read_text())
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(yaml.safe_load((ROOT / "config.yaml").read_text()))
    assert validator.is_valid(yaml.safe_load(SMALL))
    for where, text in (("training.epoch", "3"), ("training.learning_rate", "1e-3"), ("training.epochs", "0")):
        assert not validator.is_valid(yaml.safe_load(with_value(where, text)))


def test_every_setting_is_explained_in_the_table():
    rows = [line for line in generated()["docs/configuration.md"].splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4, row
        assert all(cells), row


def test_a_first_analysis_tests_as_few_updates_and_samples_as_the_demo_with_all_permutations():
    new, demo = parse_config(yaml.safe_load(NEW_CONFIG.format(folder="new"))), load_config(ROOT / "config.yaml")
    assert new.training_of("digits_mlp", "autoencoder").snapshots == demo.training.snapshots
    assert new.datasets["digits"].samples_per_class == demo.datasets["mnist"].samples_per_class
    assert new.statistics.permutations == Statistics().permutations


def test_snapshots_are_a_number_or_a_list_that_is_not_empty():
    changed = {**yaml.safe_load(SMALL), "training": {"snapshots": 4}}
    assert parse_config(changed).training.snapshots == 4
    changed["training"]["snapshots"] = [0, 5]
    assert parse_config(changed).training.snapshots == [0, 5]
    # Of mini-batches the data decide how many updates there are.
    changed["training"] |= {"snapshots": [0, 5000], "batch": 8}
    assert parse_config(changed).training.snapshots == [0, 5000]
    changed["training"]["snapshots"] = []
    with pytest.raises(UserError, match=r"training\.snapshots.* is an empty list"):
        parse_config(changed)


def test_permutations_of_what_a_classifier_has_learned_are_refused():
    changed = yaml.safe_load(SMALL)
    experiment = next(iter(changed["experiments"].values()))
    run = next(iter(experiment["runs"]))
    experiment["runs"][run]["task"] = "classifier"
    experiment["panels"] = [{"run": run, "compare": ["0", "1"], "test": "permutation"}]
    with pytest.raises(UserError, match="which are no test: show its refits there"):
        parse_config(changed)
    experiment["runs"][run]["task"] = "autoencoder"
    assert parse_config(changed).experiments
