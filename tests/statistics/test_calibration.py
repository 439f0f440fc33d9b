"""The calibration: batched training against PyTorch's own, families against the tests' own, intervals against scipy."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib import pyplot as plt
from scipy import stats
from torch import nn

import autospec
from autospec.cli import main
from autospec.cohort.typical_volumes import EFFECTS, SEGMENT_NUMBERS
from autospec.errors import UserError
from autospec.figures import calibration as figure
from autospec.statistics import measures
from autospec.statistics.calibration import build, design, networks, repetitions, samples, tables
from autospec.statistics.calibration.repetitions import Family
from autospec.statistics.paper import compare_spectra
from autospec.statistics.permutation_test import NullDistributions, evaluate
from autospec.statistics.permutations import compare, draw_labellings
from autospec.statistics.refit import evaluate_refits

N, FEATURES, HIDDEN, STEPS = 20, 7, 4, (0, 5, 12)
RATE = 0.02


@pytest.fixture(scope="module")
def studies():
    """Three repetitions: samples, labels, and labellings."""
    generator = np.random.default_rng(3)
    x = torch.from_numpy(generator.standard_normal((3, FEATURES, N)).astype(np.float32))
    in_first = np.stack([generator.permutation(np.arange(N) < 8) for _ in range(3)])
    labels = np.where(in_first, "first", "second")
    comparisons = [compare(each, "first", "second") for each in labels]
    labellings = [draw_labellings(each, 19, seed) for seed, each in enumerate(comparisons)]
    return x, torch.from_numpy(in_first)[:, None], comparisons, labellings


def trained(x: torch.Tensor, in_first: np.ndarray, seed: int, task: str):
    """PyTorch's own training of one repetition, watched by autospec."""
    classifier = task == "classifier"
    outputs = 2 if classifier else FEATURES
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))
    drawn = networks.initial_parameters([seed], 1, FEATURES, HIDDEN, outputs)
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), drawn, strict=True):
            parameter.copy_(values[0, 0].reshape(parameter.shape))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    target = torch.from_numpy(~in_first).long()
    labels = np.where(in_first, "first", "second")
    with autospec.watch(model, groups=labels, statistics=("gradient", "contrast", "cosine")) as watcher:
        for _ in range(max(STEPS) + 1):
            optimizer.zero_grad()
            output = model(x.T)
            loss = nn.functional.cross_entropy(output, target) if classifier else nn.functional.mse_loss(output, x.T)
            loss.backward()
            watcher.step()
            optimizer.step()
    tree = watcher.trajectories
    names = dict(zip(networks.LAYERS, ("0.weight", "2.weight"), strict=True))
    return {
        layer: {
            "gradient": tree[f"layers/{name}"]["gradient"].sel(group=["first", "second"]).values,
            "contrast": tree[f"contrasts/first - second/{name}"]["gradient"].values,
            "cosine": tree[f"contrasts/first - second/{name}"]["cosine"].values,
        }
        for layer, name in names.items()
    }


def near(found, wanted):
    """Within 1e-5 of the largest value of each spectrum; NaN where torch has no such value."""
    wanted = np.nan_to_num(np.asarray(wanted, dtype=float))
    scale = np.abs(wanted).max(-1, keepdims=True)
    assert (np.abs(found - wanted) <= 1e-5 * scale).all(), np.abs((found - wanted) / scale).max()


@pytest.mark.parametrize("task", ["autoencoder", "classifier"])
def test_batched_training_is_the_watched_training_of_one_network(studies, task):
    x, in_first, comparisons, labellings = studies
    recorded = repetitions.record(x, in_first, [5, 6, 7], task, HIDDEN, STEPS, RATE)
    for i in (0, 2):
        truth = trained(x[i], in_first[i, 0].numpy(), 5 + i, task)
        found = repetitions.permuted(recorded.factors, i, comparisons[i], labellings[i])
        for layer in networks.LAYERS:
            for group in (0, 1):
                near(recorded.spectra[layer][group, i], truth[layer]["gradient"][:, group])
            for step in STEPS:
                observed = found[step][layer, "contrast"].values[0]
                near(observed, truth[layer]["contrast"][step, : len(observed)])
                assert found[step][layer, "cosine"].values[0, 0] == pytest.approx(
                    truth[layer]["cosine"][step], abs=1e-5
                )


def test_a_refit_is_a_training_from_the_same_weights_with_the_labelling_as_target(studies):
    x, _, _, labellings = studies
    found = repetitions.refitted(x, labellings, [5, 6, 7], HIDDEN, STEPS, RATE)
    for i, b in ((0, 0), (1, 4), (2, 19)):
        truth = trained(x[i], labellings[i].in_first[b], 5 + i, "classifier")
        for step, layer in itertools.product(STEPS, networks.LAYERS):
            contrast = found[i][step][layer, "contrast"].values[b]
            near(contrast, truth[layer]["contrast"][step, : len(contrast)])
            assert found[i][step][layer, "cosine"].values[b, 0] == pytest.approx(truth[layer]["cosine"][step], abs=1e-5)
            first, second = truth[layer]["gradient"][step][:, : len(contrast)]
            near(found[i][step][layer, "difference"].values[b], first / 8 - second / 12)


def test_batched_derivatives_are_those_of_autograd_in_double_precision():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, FEATURES, N, dtype=torch.float64, generator=generator)
    target = torch.randint(0, 2, (2, 3, N), generator=generator)
    for wanted, outputs in ((None, FEATURES), (target, 2)):
        drawn = networks.initial_parameters([0, 1], 3, FEATURES, HIDDEN, outputs)
        parameters = [each.double().requires_grad_() for each in drawn]
        _, gradients = networks.derivatives([each.detach() for each in parameters], x, wanted)
        weight, bias, head, head_bias = parameters
        output = head @ (weight @ x[:, None] + bias).relu() + head_bias
        if wanted is None:
            loss = (output - x[:, None]).square().mean((2, 3)).sum()
        else:
            loss = sum(nn.functional.cross_entropy(output[i, j].T, target[i, j]) for i in range(2) for j in range(3))
        for found, truth in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)


def test_initial_weights_are_spread_as_those_of_a_linear_layer():
    weight, bias, *_ = networks.initial_parameters([1, 1, 2], 2, 100, 50, 2)
    assert torch.equal(weight[0], weight[1])
    assert torch.equal(weight[0, 0], weight[0, 1])
    assert not torch.equal(weight[0], weight[2])
    layer = nn.Linear(100, 50)
    for found, truth in ((weight, layer.weight), (bias, layer.bias)):
        assert float(found.abs().max()) == pytest.approx(float(truth.detach().abs().max()), rel=0.1)
    assert stats.kstest(weight[0, 0].flatten(), "uniform", args=(-0.1, 0.2)).pvalue > 1e-3


# ---------------------------------------------------------------------- p-values


def test_families_have_the_p_values_of_the_permutation_test(studies):
    x, in_first, comparisons, labellings = studies
    recorded = repetitions.record(x, in_first, [5, 6, 7], "autoencoder", HIDDEN, STEPS, RATE)
    for i in range(3):
        found = repetitions.permuted(recorded.factors, i, comparisons[i], labellings[i])
        p = repetitions.family_p(found)
        distributions = NullDistributions(comparisons[i], labellings[i])
        distributions.steps = dict(found)
        tests = evaluate(distributions)
        assert p[Family("all", "all", "all")] == pytest.approx(tests.table["p_adjusted"].min())
        smallest = tests.clusters["p_adjusted"].min() if len(tests.clusters) else 1.0
        assert p[Family("all", "all", "clusters of steps")] == pytest.approx(smallest)
        for statistic, step in itertools.product(measures.STATISTICS, STEPS):
            rows = tests.table[(tests.table["statistic"] == statistic) & (tests.table["step"] == step)]
            encoder = rows[rows["layer"] == networks.ENCODER]
            assert p[Family(statistic, str(step), "first of the encoder")] == pytest.approx(encoder["p"].iloc[0])
            alone = NullDistributions(comparisons[i], labellings[i])
            alone.steps = {step: {key: each for key, each in found[step].items() if key[1] == statistic}}
            assert p[Family(statistic, str(step), "all")] == pytest.approx(evaluate(alone).table["p_adjusted"].min())


def test_families_of_refits_have_the_p_values_of_the_workflows_refits(studies):
    x, _, _, labellings = studies
    for found in repetitions.refitted(x, labellings, [5, 6, 7], HIDDEN, STEPS, RATE):
        columns, values, above = [], [], []
        for step, layers in found.items():
            for (layer, statistic), each in layers.items():
                for k in range(each.values.shape[1]):
                    columns.append((layer, statistic, step, k + 1 if statistic in measures.SPECTRAL else 0))
                    values.append(each.values[:, k])
                    # `evaluate_refits` looks at each refit; here those that count are known already.
                    above.append(np.r_[each.above[k], np.full(len(each.values) - 1, each.tested[k])])
        names = pd.DataFrame(columns, columns=["layer", "statistic", "step", "index"])
        refits = xr.Dataset(
            {"value": (("refit", "test"), np.array(values).T), "above": (("refit", "test"), np.array(above).T)},
            {name: ("test", names[name]) for name in names}
            | {name: ("test", ["first"] * len(names)) for name in ("group_a", "group_b", "comparison")},
        )
        table = evaluate_refits(refits, 0.05)
        p = repetitions.family_p(found, repetitions.BOTH_SIDES)
        assert p[Family("all", "all", "all")] == pytest.approx(table["p_adjusted"].min())
        single = table[
            (table["layer"] == networks.ENCODER) & (table["statistic"] == "cosine") & (table["step"] == STEPS[1])
        ]
        assert p[Family("cosine", str(STEPS[1]), "first of the encoder")] == pytest.approx(single["p"].item())


def test_the_papers_tests_are_those_of_a_single_run(studies):
    x, in_first, *_ = studies
    recorded = repetitions.record(x, in_first, [5, 6, 7], "classifier", HIDDEN, STEPS, RATE)
    p = repetitions.paper_p(recorded)
    steps = np.arange(max(STEPS) + 1)
    for i in range(3):
        of_values, of_steps = [], []
        for layer in networks.LAYERS:
            a, b = recorded.spectra[layer][:, i]
            floors = recorded.floors[layer][:, i]
            index = np.arange(1, a.shape[1] + 1)
            resolved = ~compare_resolved(a, b, floors, steps, index)
            by_step, by_value = resolved[: len(steps)], resolved[len(steps) :]
            of_steps.append(np.where(by_step, np.nan, stats.ttest_ind(a, b, axis=1).pvalue))
            of_values.append(np.where(by_value, np.nan, stats.ttest_ind(a, b, axis=0).pvalue))
        smallest = np.nanmin(np.concatenate(of_values))
        count = np.isfinite(np.concatenate(of_values)).sum()
        for values, wanted in {
            tables.OVER_STEPS: of_values[0][0],
            tables.ANY_OVER_STEPS: smallest,
            tables.HOLM_OVER_STEPS: min(1, smallest * count),
            tables.ANY_OVER_VALUES: np.nanmin(np.concatenate(of_steps)),
        }.items():
            assert p[Family("gradient", "all", values)][i] == pytest.approx(wanted)
        assert p[Family("gradient", str(max(STEPS)), tables.OVER_VALUES)][i] == pytest.approx(of_steps[0][-1])


def test_the_papers_tests_reject_nothing_where_nothing_is_resolved():
    constant = {layer: np.ones((2, 1, 5, 3)) for layer in networks.LAYERS}
    floors = {layer: np.full((2, 1, 5), 1e-6) for layer in networks.LAYERS}
    p = repetitions.paper_p(repetitions.Recorded(constant, floors, {}))
    assert {float(np.nan_to_num(each, nan=1.0)[0]) for each in p.values()} == {1.0}


def compare_resolved(a, b, floors, steps, index) -> np.ndarray:
    """Which tests of `compare_spectra` are resolved: of each step, then of each singular value."""
    table = compare_spectra(a, b, *floors, steps, index)
    student = table[table["test"].str.endswith("student")]
    parts = student[student["step"].notna()], student[student["step"].isna()]
    return ~np.concatenate([part["below_floor"].to_numpy(dtype=bool) for part in parts])


# ---------------------------------------------------------------------- samples


def test_labels_follow_the_model_given_their_number():
    logits = np.array([0.0, 1.0, -0.5, 2.0, 0.3])
    generator = np.random.default_rng(0)
    drawn = np.array([samples.draw_labels(generator, logits, 2) for _ in range(4000)])
    assert (drawn.sum(1) == 2).all()
    pairs = list(itertools.combinations(range(5), 2))
    weights = np.array([np.exp(logits[list(pair)].sum()) for pair in pairs])
    counts = [(drawn[:, pair[0]] & drawn[:, pair[1]]).sum() for pair in pairs]
    assert stats.chisquare(counts, 4000 * weights / weights.sum()).pvalue > 1e-3


def test_volumes_differ_by_the_effect_and_with_the_confounder_alone():
    generator = np.random.default_rng(1)
    names = list(SEGMENT_NUMBERS)
    altered = [names.index(name) for name in EFFECTS]
    signs = np.array([EFFECTS[name] for name in EFFECTS])

    def differences(drawn):
        return drawn.x[drawn.in_first].mean(0) - drawn.x[~drawn.in_first].mean(0)

    strong = differences(samples.Volumes(1.2)(generator, 400, 400, "none"))
    assert (signs * strong[altered] > 0.4).all()
    others = np.delete(strong, altered)
    assert np.abs(others).max() < 0.35  # 4.9 standard errors
    assert np.abs(differences(samples.Volumes()(generator, 400, 400, "none"))).max() < 0.35
    for kind, sign in (("number", -1), ("strata", 1)):
        drawn = samples.Volumes()(generator, 600, 200, kind)
        assert drawn.in_first.sum() == 600
        assert drawn.x.shape == (800, 39)
        # Everything differs, and nothing does once the confounder is taken into account.
        assert (sign * differences(drawn) > 0).mean() > 0.9
        design_matrix = np.column_stack([np.ones(800), drawn.confounder, drawn.in_first])
        coefficients = np.linalg.lstsq(design_matrix, drawn.x, rcond=None)[0]
        assert np.abs(coefficients[2]).max() < 0.4
        assert (sign * coefficients[1] > 0.2).all()


@pytest.mark.parametrize("shape", design.MISSPECIFIED)
def test_labels_and_volumes_depend_on_a_function_of_motion_that_is_no_line(shape):
    drawn = samples.Volumes()(np.random.default_rng(4), 300, 300, shape)
    z = drawn.confounder
    assert (z.mean(), z.std()) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    acting = {"square": z**2, "threshold": z > 1, "cube": z**3 - 3 * z, "wave": np.sin(3 * z)}[shape].astype(float)
    acting = (acting - acting.mean()) / acting.std()
    beside = np.column_stack([np.ones(600), z, acting])
    assert np.linalg.lstsq(beside, drawn.in_first.astype(float), rcond=None)[0][2] > 0.12
    slopes = np.linalg.lstsq(beside, drawn.x, rcond=None)[0]
    assert slopes[2].mean() < -0.25
    assert abs(slopes[1].mean()) < 0.15


def test_digits_are_means_of_squares_and_ink_decides_the_label():
    generator = np.random.default_rng(2)
    images = generator.integers(0, 256, size=(300, 28, 28)) * generator.random((300, 1, 1))
    source = samples.Digits(images)
    np.testing.assert_allclose(source.x[7].reshape(7, 7)[2, 5], images[7, 8:12, 20:24].mean() / 255, rtol=1e-5)
    for kind in ("number", "strata"):
        drawn = source(generator, 150, 50, kind)
        assert drawn.in_first.sum() == 150
        assert drawn.x.shape == (200, 49)
        ink = drawn.x.mean(1)
        assert ink[drawn.in_first].mean() > ink[~drawn.in_first].mean()
        assert np.corrcoef(ink, drawn.confounder)[0, 1] > 0.7
    plain = source(generator, 150, 50, "none")
    assert not plain.confounder.any()
    assert len(np.unique(plain.x, axis=0)) == 200  # no image twice


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize(("rejections", "trials"), [(0, 30), (3, 30), (30, 30), (51, 1000)])
def test_intervals_are_exact(rejections, trials):
    low, high = tables.exact_interval(rejections, trials)
    truth = stats.binomtest(rejections, trials).proportion_ci(method="exact")
    assert (low, high) == (pytest.approx(truth.low), pytest.approx(truth.high))


def test_a_refused_repetition_counts_as_no_trial():
    blank = dict.fromkeys(tables.COLUMNS, "")
    table = tables.tally([blank, blank], [[0.05, np.nan, 0.06, 0.01], [np.nan, np.nan]])
    assert table[["repetitions", "refusals", "rejections"]].to_numpy().tolist() == [[4, 1, 2], [2, 2, 0]]
    assert table["rate"][0] == pytest.approx(2 / 3)
    assert np.isnan(table["rate"][1])
    assert table[["low", "high"]].to_numpy()[1].tolist() == [0, 1]


def test_what_theory_promises():
    assert tables.expectation("autoencoder", "permutation", "none")["expected"] == "alpha"
    assert tables.expectation("classifier", "refit within strata", "strata")["expected"] == "alpha"
    assert tables.expectation("autoencoder", "permutation", "strata")["expected"] == "above"
    refused = tables.expectation("classifier", "permutation", "none")
    assert (refused["expected"], refused["offered"]) == ("above", "no")
    assert tables.expectation("autoencoder", "paper", "none")["offered"] == "no"
    wrong = tables.expectation("autoencoder", "permutation conditional on the confounder", "wave")
    assert (wrong["expected"], wrong["why"]) == ("above", "the model of the label is wrong")


# ---------------------------------------------------------------------- the stage


def test_a_small_calibration_finds_what_the_tests_are_worth():
    sizes = {"repetitions": 60, "permutations": 19, "refit_repetitions": 24, "power_repetitions": 1, "seed": 1}
    table = build.run_part({**sizes, "part": "volumes-unequal-none"})
    of_run = table[(table["step"] == "all") & (table["statistic"].isin(["all", "gradient"]))]
    rates = of_run.set_index(["task", "test", "values"])[["low", "high"]]
    for task, test in (("autoencoder", "permutation"), ("classifier", "refit")):
        low, high = rates.loc[(task, test, "all")]
        assert low < 0.05 < high
    for task, test, values in (
        ("autoencoder", "paper", tables.HOLM_OVER_STEPS),
        ("autoencoder", "paper", tables.OVER_STEPS),
        ("classifier", "permutation", "all"),
    ):
        assert rates.loc[(task, test, values), "low"] > 0.3, (task, test, values)
    again = build.run_part({**sizes, "part": "volumes-unequal-none"})
    pd.testing.assert_frame_equal(table, again)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Folder of a quick calibration, made by the command."""
    folder = tmp_path_factory.mktemp("calibration")
    assert main(["calibration", "--quick", "--output", str(folder / "calibration.tsv")]) == 0
    return folder


def test_the_quick_calibration_carries_out_every_part(quick):
    null, power = (pd.read_csv(quick / f"{name}.tsv", sep="\t") for name in ("calibration", "power"))
    names = {path.name for path in quick.iterdir()}
    assert {"calibration.json", "calibration.pdf", "calibration.png", "calibration.svg"} <= names
    settings = null[["data", "task", "groups", "confounding"]].drop_duplicates()
    assert len(settings) == 2 * 2 * 2 * 3 + len(design.MISSPECIFIED)
    wrong = null[null["confounding"].isin(design.MISSPECIFIED)]
    assert set(wrong["test"]) == {"permutation", "permutation conditional on the confounder"}
    assert (null["repetitions"] == np.where(null["test"].str.startswith("refit"), 2, 4)).all()
    assert (null["rejections"] <= null["repetitions"] - null["refusals"]).all()
    assert sorted(power["effect"].unique()) == list(design.EFFECTS)
    assert set(power["test"]) == {"permutation", "refit"}
    described = json.loads((quick / "calibration.json").read_text())
    assert list(described["columns"]) == list(null.columns)
    assert "19 permutations" in described["method"]
    assert described["settings"]["repetitions"] == 4


def test_the_figure_draws_the_tables(quick, tmp_path, monkeypatch):
    null, power = tables.gather([str(path) for path in sorted((quick / "parts").iterdir())])
    monkeypatch.setattr(plt, "close", lambda figure: None)
    figure.draw(null, power, [str(tmp_path / "figure.svg")])
    drawn = plt.gcf()
    monkeypatch.undo()
    try:
        upper, lower = drawn.subfigs
        markers = [line for line in upper.axes[0].lines if line.get_marker() != "None"]
        # Paper's two, permutation (refused for classifiers) and refit: 3 for an autoencoder, 4 for a classifier.
        assert len(markers) == 4 * 3 + 4 * 4
        row = null[(null["confounding"] == "none") & (null["values"] == tables.OVER_STEPS)].iloc[0]
        assert markers[0].get_xdata()[0] == pytest.approx(max(100 * row["rate"], figure.LEAST))
        line = lower.axes[0].lines[0]
        wanted = power[
            (power["statistic"] == "contrast")
            & (power["step"] == figure.POWER_STEP)
            & (power["values"] == "all")
            & (power["task"] == "autoencoder")
        ]
        assert line.get_ydata().tolist() == (100 * wanted.sort_values("effect")["rate"]).tolist()
    finally:
        plt.close(drawn)


def test_a_file_that_is_no_part_is_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "digits.tsv").write_text("a\tb\n1\t2\n")
    output = tmp_path / "calibration.tsv"
    assert main(["calibration", "--parts", str(tmp_path / "digits.tsv"), "--output", str(output)]) == 1
    assert "has other columns than a table of a calibration" in capsys.readouterr().err
    assert not output.exists()
    with pytest.raises(UserError, match="no readable table"):
        tables.read_part(tmp_path / "missing.tsv")
