"""Figures, by the data that their artists hold."""

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex

from autospec import specs
from autospec.figures.differences import draw_differences, edges, log_ratio
from autospec.figures.page import build_page
from autospec.figures.panel import build_panel, difference_key
from autospec.figures.spectra import draw_spectra, legend
from autospec.figures.style import BATCH_COLOUR, GROUP_COLOURS, STYLE, colours, dashes
from autospec.statistics.build import paper_tests

GROUPS = ["all", "0", "1", "3"]
LAYERS = {"z.weight": 6, "a.weight": 3}  # in the model's order, which is not the alphabet's
STATISTICS = ["gradient", "activation", "adjoint"]
FLOOR = 1e-4


@pytest.fixture(autouse=True)
def close_figures():
    """Forget every figure."""
    yield
    plt.close("all")


@pytest.fixture
def tree():
    """Trajectories with known values: some exactly zero, some below the noise floor, one group without a value."""
    generator = np.random.default_rng(3)
    steps = np.arange(0, 40, 4)
    nodes = {
        "/": xr.Dataset(
            {"group_size": (("step", "group"), np.tile([24, 8, 8, 8], (len(steps), 1)))},
            coords={"step": steps, "group": GROUPS, "grouping": ("group", ["", "target", "target", "target"])},
        )
    }
    for layer, width in LAYERS.items():
        variables = {}
        for number, statistic in enumerate(STATISTICS):
            shape = (len(steps), len(GROUPS), width)
            values = np.sort(generator.lognormal(number, 1.0, shape), axis=2)[:, :, ::-1].astype(np.float32)
            variables[statistic] = (("step", "group", "index"), values)
            variables[f"{statistic}_noise_floor"] = (("step", "group"), np.full(shape[:2], FLOOR, np.float32))
        gradient = variables["gradient"][1]
        gradient[2, 1, -1] = 0.0
        gradient[3:5, 3, 1:] = FLOOR / 2
        gradient[:, 2, -1] = np.nan
        nodes[f"/layers/{layer}"] = xr.Dataset(variables, coords={"index": np.arange(1, width + 1)})
    return xr.DataTree.from_dict(nodes)


@pytest.fixture
def tests(tree):
    """The paper's tests of those trajectories."""
    return paper_tests(tree, "raw")


def test_there_are_axes_for_every_layer_and_statistic_in_the_models_order(tree):
    axes = draw_spectra(plt.figure(), tree, [1, 2])
    assert axes.shape == (2, 3)
    assert [row[0].get_ylabel() for row in axes] == ["z.weight\nsingular value", "a.weight\nsingular value"]
    assert [ax.get_title() for ax in axes[0]] == STATISTICS
    assert [ax.get_xlabel() for ax in axes[-1]] == ["step"] * 3
    assert all(ax.get_yscale() == "log" for ax in axes.flat)


def test_only_recorded_statistics_have_a_column(tree):
    for layer in LAYERS:
        tree["layers"][layer] = tree["layers"][layer].to_dataset().drop_vars(["activation", "activation_noise_floor"])
    axes = draw_spectra(plt.figure(), tree, [1])
    assert [ax.get_title() for ax in axes[0]] == ["gradient", "adjoint"]


def test_lines_hold_exactly_the_recorded_values(tree):
    asked = [1, 3, 5, 12]
    axes = draw_spectra(plt.figure(), tree, asked)
    for row, (layer, width) in zip(axes, LAYERS.items(), strict=True):
        for ax, statistic in zip(row, STATISTICS, strict=True):
            there = [k for k in asked if k <= width]
            lines = iter(ax.get_lines())
            for group in GROUPS:
                for k in there:
                    line = next(lines)
                    recorded = tree[f"layers/{layer}/{statistic}"].sel(group=group, index=k).values.copy()
                    recorded[recorded == 0] = np.nan
                    np.testing.assert_array_equal(line.get_xdata(), tree["step"].values)
                    np.testing.assert_array_equal(line.get_ydata(), recorded)
                    assert line.get_color() == colours(GROUPS)[group]
            assert next(lines, None) is None


def test_the_whole_batch_is_dashed_and_groups_are_solid(tree):
    ax = draw_spectra(plt.figure(), tree, [1])[0, 0]
    whole, *groups = ax.get_lines()
    assert whole.get_color() == BATCH_COLOUR
    assert whole.is_dashed()
    assert not any(line.is_dashed() for line in groups)


def test_lines_get_thinner_with_the_number_of_the_singular_value(tree):
    ax = draw_spectra(plt.figure(), tree, [1, 2, 3])[0, 0]
    widths = [line.get_linewidth() for line in ax.get_lines()[:3]]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3


def test_the_grey_band_reaches_the_noise_floor_and_limits_show_what_lies_above(tree):
    for ax in draw_spectra(plt.figure(), tree, [1, 3]).flat:
        (band,) = [artist for artist in ax.collections if isinstance(artist, PolyCollection)]
        assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(FLOOR)
        low, high = ax.get_ylim()
        drawn = np.concatenate([line.get_ydata() for line in ax.get_lines()])
        drawn = drawn[np.isfinite(drawn) & (drawn > np.float32(FLOOR))]
        assert low < drawn.min()
        assert drawn.max() < high
        assert low > drawn.min() / 2  # what is below the floor does not stretch the axis
        assert ax.get_xlim() == (0, 36)


def test_a_layer_that_has_none_of_the_singular_values_still_has_axes(tree):
    axes = draw_spectra(plt.figure(), tree, [5])
    assert len(axes[0, 0].get_lines()) == len(GROUPS)
    assert len(axes[1, 0].get_lines()) == 0


def test_the_legend_names_every_group_with_its_size(tree):
    figure = plt.figure()
    legend(figure, tree, 180.0, [1, 4])
    *texts, widths = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["whole batch (N = 24)", "0 (N = 8)", "1 (N = 8)", "3 (N = 8)", "below the noise floor"]
    assert widths == r"thick to thin: $\sigma_{1}$, $\sigma_{4}$"


@pytest.mark.parametrize("width", [80.0, 120.0, 180.0])
@pytest.mark.parametrize("compare", [None, ["0", "3"]])
def test_nothing_written_below_a_panel_is_cut_off(tree, width, compare):
    settings = {"alpha": 0.05, "variance": "student"}
    figure = plt.figure(figsize=(width / 25.4, 2))
    with plt.rc_context(STYLE):
        if compare is None:
            legend(figure, tree, width, [1, 2, 4, 12], loc="center")
            drawn = figure.legends[0]
        else:
            drawn = figure.text(0.5, 0.5, difference_key(settings, width), ha="center", va="center", fontsize=6)
        box = drawn.get_window_extent(figure.canvas.get_renderer())
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_a_colour_that_comes_again_is_dotted():
    names = ["all", *"abcdefghij"]
    looks = [(colours(names)[name], str(dashes(names)[name])) for name in names]
    assert len(set(looks)) == 11
    assert [look[1] for look in looks[1:7]] == ["-"] * 6


def test_six_groups_have_six_colours_and_the_batch_another():
    names = ["all", *"abcdef"]
    assert len(set(colours(names).values())) == 7
    for colour in GROUP_COLOURS:
        red, green, blue = (int(to_hex(colour)[i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75  # dark enough for a line on white


def test_the_ratio_is_its_logarithm_and_nothing_below_the_noise_floor(tree):
    ratio = log_ratio(tree, "z.weight", "gradient", ["0", "3"])
    values = tree["layers/z.weight/gradient"]
    for step in range(10):
        for k in range(6):
            first, second = (float(values.sel(group=group)[step, k]) for group in ("0", "3"))
            if first > FLOOR * 1.001 and second > FLOOR * 1.001:
                assert ratio[k, step] == pytest.approx(np.log2(first / second), abs=1e-5)
            else:
                assert np.isnan(ratio[k, step])
    assert np.isnan(ratio).sum() == 1 + 2 * 5
    np.testing.assert_allclose(log_ratio(tree, "z.weight", "gradient", ["3", "0"]), -ratio, rtol=0, atol=1e-12)
    assert np.isnan(log_ratio(tree, "z.weight", "gradient", ["0", "1"])[-1]).all()


def test_cells_show_the_ratio_with_the_largest_value_on_top(tree, tests):
    axes = draw_differences(plt.figure(), tree, tests, ["0", "3"], "student", 0.05)
    assert axes.shape == (2, 3)
    assert [row[0].get_ylabel() for row in axes] == ["z.weight\nsingular value", "a.weight\nsingular value"]
    limits = set()
    for row, (layer, width) in zip(axes, LAYERS.items(), strict=True):
        for ax, statistic in zip(row, STATISTICS, strict=True):
            (mesh,) = [artist for artist in ax.collections if isinstance(artist, QuadMesh)]
            expected = log_ratio(tree, layer, statistic, ["0", "3"])
            np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan), expected)
            np.testing.assert_array_equal(np.ma.getmaskarray(mesh.get_array()), np.isnan(expected))
            assert ax.get_ylim() == (width + 0.5, 0.5)
            limits.add(mesh.get_clim())
    ((low, high),) = limits  # one scale for the whole panel, white in the middle
    assert low == -high


def test_cells_stand_around_their_steps():
    assert edges(np.array([0, 2, 4])).tolist() == [-1, 1, 3, 5]
    assert edges(np.array([0, 1, 10])).tolist() == [-0.5, 0.5, 5.5, 14.5]
    assert edges(np.array([3])).tolist() == [2.5, 3.5]


@pytest.mark.parametrize(("variance", "alpha"), [("student", 0.05), ("welch", 0.3)])
@pytest.mark.parametrize("pair", [["0", "3"], ["3", "0"]])
def test_marks_are_exactly_the_significant_rows_of_the_table(tree, tests, pair, variance, alpha):
    tests.loc[tests.index[::7], "resolved"] = False
    tests.loc[tests.index[::5], [f"p_{variance}"]] = alpha / 2
    axes = draw_differences(plt.figure(), tree, tests, pair, variance, alpha)
    marked = 0
    between = tests[(tests["group_a"] == "0") & (tests["group_b"] == "3")]
    for row, layer in zip(axes, LAYERS, strict=True):
        for ax, statistic in zip(row, STATISTICS, strict=True):
            dots, squares = [artist for artist in ax.collections if isinstance(artist, PathCollection)]
            part = between[(between["layer"] == layer) & (between["statistic"] == statistic)]
            part = part[part["resolved"] & (part[f"p_{variance}"] < alpha)]
            assert dots.get_offsets()[:, 1].tolist() == part.loc[part["test"] == "singular_value", "at"].tolist()
            assert squares.get_offsets()[:, 0].tolist() == part.loc[part["test"] == "step", "at"].tolist()
            assert (dots.get_offsets()[:, 0] > 1).all()  # beside the axes, in units of its width
            assert (squares.get_offsets()[:, 1] > 1).all()
            marked += len(part)
    assert marked


def test_no_significant_row_leaves_no_mark(tree, tests):
    tests["p_student"] = 0.9
    for ax in draw_differences(plt.figure(), tree, tests, ["0", "3"], "student", 0.05).flat:
        assert not any(len(artist.get_offsets()) for artist in ax.collections if isinstance(artist, PathCollection))


def eight_panels(study) -> dict:
    """Settings of a page of eight panels of the study's two runs."""
    settings = specs.figure_settings(study.config, "small")
    spectra, difference = settings["panels"]
    judged = {**spectra, "run": "judge", "task": "classifier", "hidden": [6]}
    pairs = [["0", "1"], ["0", "3"], ["1", "3"], ["3", "0"], ["3", "1"]]
    panels = [spectra, judged, {**spectra, "compare": ["0", "3"]}, *({**difference, "compare": pair} for pair in pairs)]
    settings["panels"] = [{**panel, "letter": letter} for panel, letter in zip(panels, "ABCDEFGH", strict=True)]
    return settings


def test_a_page_of_eight_panels_has_letters_and_titles_and_the_same_bytes_when_drawn_twice(
    study, tmp_path, monkeypatch
):
    drawn = []
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure=None: drawn.append(figure))
    runs, tests = ({run: str(path(run)) for run in ("coder", "judge")} for path in (study.run, study.tests))
    kinds = ("pdf", "svg")
    for folder in ("first", "second"):
        outputs = [str(tmp_path / folder / f"figure-7.{kind}") for kind in kinds]
        assert build_page(eight_panels(study), runs, tests, outputs) == "figure 7: 8 panels"
    head, body, foot = drawn[0].subfigs
    assert head.texts[0].get_text() == "Figure 7.  A small experiment"
    titles = [place.get_suptitle() for place in body.subfigs]
    assert [title[0] for title in titles] == list("ABCDEFGH")
    assert titles[0].endswith("MLP autoencoder, hidden 6 x 4, Tanh")
    assert titles[7].endswith("MLP classifier, hidden 6, Tanh: 3 against 1")
    assert [len(place.axes) for place in body.subfigs] == [12, 6, 13, 7, 7, 7, 7, 7]  # a colour bar where pairs are
    assert "0 (N = 8)" in [text.get_text() for text in foot.legends[0].get_texts()]
    assert "p < 0.05" in foot.texts[0].get_text()
    assert drawn[0].get_size_inches() * 25.4 == pytest.approx([210, 297])
    for kind in kinds:
        first, second = ((tmp_path / folder / f"figure-7.{kind}").read_bytes() for folder in ("first", "second"))
        assert first == second, kind
        assert len(first) > 10_000
    close("all")


def test_a_panel_drawn_on_its_own_is_whole_in_every_format_or_absent(study, tmp_path):
    settings = specs.panel_settings(study.config, "small", "judge_0_vs_3")
    outputs = [str(tmp_path / f"panel.{kind}") for kind in ("pdf", "png", "svg")]
    said = build_panel(settings, str(study.run("judge")), str(study.tests("judge")), outputs)
    assert said == "panel B: MLP classifier, hidden 6, Tanh: 0 against 3"
    heads = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}
    assert {path.suffix[1:]: path.read_bytes()[:4] for path in tmp_path.iterdir()} == {
        kind: head[:4] for kind, head in heads.items()
    }
    with pytest.raises(KeyError):
        build_panel(settings, str(study.run("judge")), str(study.tests("judge")), [str(tmp_path / "panel.docx")])
    assert len(list(tmp_path.iterdir())) == 3


def test_labels_that_look_like_missing_values_are_marked_too(tree, tests):
    renamed = tests.replace({"group_a": {"0": "NA"}, "group_b": {"3": "None"}}).assign(resolved=True, p_student=0.0)
    tree = tree.map_over_datasets(lambda node: node.assign_coords(group=["all", "NA", "1", "None"]))
    ax = draw_differences(plt.figure(), tree, renamed, ["NA", "None"], "student", 0.05)[0, 1]
    dots, squares = [artist for artist in ax.collections if isinstance(artist, PathCollection)]
    assert (len(dots.get_offsets()), len(squares.get_offsets())) == (6, 10)
