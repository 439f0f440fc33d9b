"""Figures, by the data that their artists hold."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import rc_context
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from autospec import specs
from autospec.config import parse_config
from autospec.describe import data_words, performance_words
from autospec.errors import UserError
from autospec.figures import page, panel
from autospec.figures.differences import GREYS, draw_cells, draw_differences, edges, log_ratio, marks, of_pair
from autospec.figures.layout import place_axes, size_of
from autospec.figures.page import build_page, compose, paginate
from autospec.figures.panel import build_panels, draw_panel, key_text
from autospec.figures.positions import draw_positions, largest_by_position, tied_layers
from autospec.figures.selection import shown_groups, shown_layers
from autospec.figures.spectra import draw_spectra, label_decades, legend
from autospec.figures.style import BATCH_COLOUR, GROUP_COLOURS, STYLE, colours, dashes
from autospec.report.words import spectra_caption
from autospec.statistics.build import paper_tests
from autospec.statistics.table import tidy
from tests.study import SETTINGS

GROUPS = ["all", "0", "1", "3"]
LAYERS = {"z.weight": 6, "a.weight": 3}  # in the model's order, which is not the alphabet's
NAMES = list(LAYERS)
STATISTICS = ["gradient", "activation", "adjoint"]
FLOOR = 1e-4
SPECTRA = {
    "letter": "A", "name": "net", "run": "net", "compare": None, "test": "paper", "by_position": False, "pair": None,
    "architecture": "mlp", "task": "autoencoder", "hidden": [6, 4], "activation": "tanh",
}  # fmt: skip
DRAWING = {"singular_values": [1, 2], "variance": "student", "alpha": 0.05, "scale": "raw"}


def figure() -> Figure:
    """An empty figure with room for two rows of axes."""
    return Figure(figsize=(7, 5))


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
        variables["rank_limit"] = ("group", np.array([24, 8, 8, 8]))
        gradient = variables["gradient"][1]
        gradient[2, 1, -1] = 0.0
        gradient[3:5, 3, 1:] = FLOOR / 2
        gradient[:, 2, -1] = np.nan
        nodes[f"/layers/{layer}"] = xr.Dataset(variables, coords={"index": np.arange(1, width + 1)})
    return xr.DataTree.from_dict(nodes)


@pytest.fixture
def tests(tree):
    """The paper's tests of those trajectories."""
    return paper_tests(tree, "raw", 0.05)


def test_there_are_axes_for_every_layer_and_statistic_in_the_models_order(tree):
    axes = draw_spectra(figure(), tree, [1, 2], NAMES)
    assert axes.shape == (2, 3)
    assert [row[0].get_ylabel() for row in axes] == ["singular value"] * 2
    assert [ax.texts[-2 if ax is axes[0, 0] else -1].get_text() for ax in axes[0]] == STATISTICS
    assert [row[0].texts[-1].get_text() for row in axes] == NAMES
    assert [ax.get_xlabel() for ax in axes[-1]] == ["step"] * 3
    assert all(ax.get_yscale() == "log" for ax in axes.flat)


def test_only_recorded_statistics_have_a_column(tree):
    for layer in LAYERS:
        tree["layers"][layer] = tree["layers"][layer].to_dataset().drop_vars(["activation", "activation_noise_floor"])
    axes = draw_spectra(figure(), tree, [1], NAMES)
    assert [ax.texts[-2 if ax is axes[0, 0] else -1].get_text() for ax in axes[0]] == ["gradient", "adjoint"]


def test_lines_hold_exactly_the_recorded_values(tree):
    asked = [1, 3, 5, 12]
    axes = draw_spectra(figure(), tree, asked, NAMES)
    for row, (layer, width) in zip(axes, LAYERS.items(), strict=True):
        for ax, statistic in zip(row, STATISTICS, strict=True):
            lines = iter(ax.get_lines())
            wanted = [(group, k) for group in GROUPS for k in asked if k <= width]
            if statistic == "gradient":  # that of the whole batch is the limit of resolution, and comes last
                wanted = [*wanted[1:], wanted[0]]
            for group, k in wanted:
                line = next(lines)
                recorded = tree[f"layers/{layer}/{statistic}"].sel(group=group, index=k).values.copy()
                recorded[recorded == 0] = np.nan
                np.testing.assert_array_equal(line.get_xdata(), tree["step"].values)
                np.testing.assert_array_equal(line.get_ydata(), recorded)
                limit = statistic == "gradient" and (group, k) == ("all", 1)
                assert (
                    line.get_label() == "limit of resolution" if limit else line.get_color() == colours(GROUPS)[group]
                )
            assert next(lines, None) is None


def test_the_limit_of_resolution_is_drawn_whatever_values_are(tree):
    for asked in ([2], [1], []):
        axes = draw_spectra(figure(), tree, asked, NAMES)
        for row, layer in zip(axes, NAMES, strict=True):
            for ax, statistic in zip(row, STATISTICS, strict=True):
                limits = [line for line in ax.get_lines() if line.get_label() == "limit of resolution"]
                assert len(limits) == (statistic == "gradient")
                for line in limits:
                    expected = tree[f"layers/{layer}/gradient"].sel(group="all", index=1)
                    np.testing.assert_array_equal(line.get_ydata(), expected)
                    assert line.get_ydata().max() < ax.get_ylim()[1]


def test_no_group_differs_from_the_rest_by_more_than_the_limit_of_resolution():
    generator = np.random.default_rng(0)
    for _ in range(100):
        share, rest = generator.normal(size=(2, 5, 7)) * generator.lognormal(size=(2, 1, 1))
        values = [np.linalg.svd(matrix, compute_uv=False) for matrix in (share, rest, share + rest)]
        signs = np.linalg.svd(share - rest, compute_uv=False)
        assert np.abs(values[0] - values[1]).max() <= values[2][0] + 1e-12
        assert np.abs(values[0] - values[1]).max() <= signs[0] + 1e-12


def test_values_beyond_the_attainable_rank_are_pale_in_the_gradient_alone(tree):
    tree["layers/z.weight/rank_limit"][:] = [24, 2, 8, 0]  # 0: not recorded
    axes = draw_spectra(figure(), tree, [2, 3], NAMES)
    for ax, statistic in zip(axes[0], STATISTICS, strict=True):
        pale = [line.get_alpha() for line in ax.get_lines() if line.get_label() != "limit of resolution"]
        assert [alpha is not None for alpha in pale] == [
            statistic == "gradient" and group == "0" and k == 3 for group in GROUPS for k in (2, 3)
        ]


def test_the_whole_batch_is_dashed_and_groups_are_solid(tree):
    ax = draw_spectra(figure(), tree, [2], NAMES)[0, 1]
    whole, *groups = ax.get_lines()
    assert whole.get_color() == BATCH_COLOUR
    assert whole.is_dashed()
    assert not any(line.is_dashed() for line in groups)


def test_a_run_at_chance_is_drawn_in_greys_that_dashes_tell_apart_and_says_so(tree, tests):
    tree.attrs["performance"] = {"held_out": 9, "accuracy": 0.5, "chance": 0.55, "at_chance": True}
    place = figure()
    axes = draw_panel(place, SPECTRA, tree, None, DRAWING)
    lines = axes[0, 1].get_lines()
    for line in lines:
        red, green, blue = (int(to_hex(line.get_color())[i : i + 2], 16) for i in (1, 3, 5))
        assert red == green == blue
    styles = {str(line._unscaled_dash_pattern) for line in lines[2::2]}
    assert len(styles) == len(GROUPS) - 1
    assert "at chance on held-out data" in place.texts[1].get_text()
    axes = draw_differences(figure(), tree, tests, ["0", "3"], "paper", "student", NAMES)
    (mesh,) = [artist for artist in axes[0, 0].collections if isinstance(artist, QuadMesh)]
    assert mesh.get_cmap() is GREYS
    tree.attrs["performance"]["at_chance"] = False
    assert draw_spectra(figure(), tree, [1], NAMES)[0, 1].get_lines()[1].get_color() == GROUP_COLOURS[0]


def test_simulated_data_and_the_stand_in_are_named_by_the_data_sets_own_words(tree, tests):
    assert data_words(tree.attrs.get("dataset")) == ""
    tree.attrs["dataset"] = {"simulated": True, "stand_in_template": True, "downsampled": True, "voxel_mm": [16.0] * 3}
    words = "simulated data, stand-in template, averaged into voxels of 16 x 16 x 16 mm"
    assert data_words(tree.attrs["dataset"]) == words
    place = figure()
    draw_panel(place, SPECTRA, tree, None, DRAWING, note=words)
    assert words in place.texts[1].get_text().replace("\n", " ")


@pytest.mark.parametrize(
    ("performance", "words"),
    [
        (None, ""),
        ({"held_out": 0, "at_chance": None}, "no held-out data"),
        (
            {"held_out": 29, "accuracy": 0.62, "chance": 0.55, "p": 0.2, "at_chance": False},
            "held-out accuracy 0.62 (chance 0.55, N = 29)",
        ),
        (
            {"held_out": 3, "accuracy": 1.0, "chance": 0.67, "p": 0.3, "at_chance": True},
            "too few held out to tell from chance, hence grey: accuracy 1.00 (chance 0.67, N = 3)",
        ),
        (
            {"held_out": 9, "explained": -0.1, "chance": 0.0, "at_chance": True},
            "at chance on held-out data, hence grey: variance explained -0.10 (N = 9)",
        ),
        (
            {"held_out": 7, "explained": -0.00213, "chance": 0.0, "at_chance": True},
            "at chance on held-out data, hence grey: variance explained -0.0021 (N = 7)",
        ),
        ({"held_out": 7, "explained": 0.0049, "at_chance": False}, "held-out variance explained 0.0049 (N = 7)"),
        ({"held_out": 7, "accuracy": 0.0, "at_chance": False}, "held-out accuracy 0.00 (N = 7)"),
    ],
)
def test_performance_on_held_out_data_in_words(performance, words):
    assert performance_words(performance) == words


def test_of_many_layers_some_are_drawn_evenly_the_first_and_the_last_among_them(tree):
    names = [f"layer {number}" for number in range(10)]
    assert shown_layers(names, 3) == ["layer 0", "layer 4", "layer 9"]
    assert shown_layers(names, 2) == ["layer 0", "layer 9"]
    assert shown_layers(names, 10) == shown_layers(names, None) == names
    place = figure()
    assert draw_panel(place, SPECTRA, tree, None, DRAWING, most_layers=1).shape == (1, 3)
    assert "1 of 2 layers" in place.texts[1].get_text()
    place = figure()
    assert draw_panel(place, SPECTRA, tree, None, DRAWING).shape == (2, 3)
    assert "layers" not in place.texts[1].get_text()


def test_of_several_groupings_the_finest_is_drawn(tree):
    assert shown_groups(tree) == GROUPS
    names = ["all", "diagnosis=HC", "diagnosis=SZ", "sex=F", "sex=M", "HC & F", "HC & M", "SZ & F", "SZ & M"]
    groupings = ["all", "diagnosis", "diagnosis", "sex", "sex", *["diagnosis & sex"] * 4]
    several = xr.DataTree.from_dict({"/": xr.Dataset(coords={"group": names, "grouping": ("group", groupings)})})
    assert shown_groups(several) == ["all", *names[-4:]]
    assert shown_groups(several.isel(group=slice(5))) == names[:3]  # of two as fine, the first


@pytest.mark.parametrize(
    ("limits", "labels"),
    [
        ((1e-5, 3e-2), ["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²"]),
        ((1e-9, 3.0), ["10⁻⁹", "10⁻⁶", "10⁻³", "10⁰"]),
        ((0.3, 6.0), ["0.5", "1", "2", "5"]),
        ((3e-4, 9e-4), ["5e-4"]),
        ((70.0, 90.0), None),
    ],
)
def test_a_logarithmic_axis_has_ticks_that_can_be_read(limits, labels):
    ax = figure().add_subplot()
    ax.set_yscale("log")
    ax.set_ylim(*limits)
    label_decades(ax)
    shown = [label.get_text() for label in ax.get_yticklabels()]
    if labels is None or len(labels) < 2:
        assert len(shown) >= 2
    else:
        assert shown == labels
    for label, tick in zip(shown, ax.get_yticks(), strict=True):
        assert limits[0] <= tick <= limits[1]
        if not label.startswith("10"):
            assert float(label) == pytest.approx(tick)


def test_axes_keep_the_room_for_titles_and_labels_whatever_the_size():
    for width, height in ((7.0, 5.0), (4.0, 3.5)):
        place = Figure(figsize=(width, height))
        axes = place_axes(place, 2, 3, 6.0)
        size = size_of(place)
        assert (size.width, size.height) == pytest.approx((width * 25.4, height * 25.4))
        first, last = axes[0, 0].get_position(), axes[-1, -1].get_position()
        assert (1 - first.y1) * size.height == pytest.approx(17.0)
        assert last.y0 * size.height == pytest.approx(7.5)
        assert (1 - last.x1) * size.width == pytest.approx(6.0)
        gap = (axes[0, 1].get_position().x0 - first.x1) * size.width
        assert gap == pytest.approx(9.5)


def test_lines_get_thinner_with_the_number_of_the_singular_value(tree):
    ax = draw_spectra(figure(), tree, [1, 2, 3], NAMES)[0, 1]
    widths = [line.get_linewidth() for line in ax.get_lines()[:3]]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3


def test_the_grey_band_reaches_the_noise_floor_and_limits_show_what_lies_above(tree):
    for ax in draw_spectra(figure(), tree, [1, 3], NAMES).flat:
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
    axes = draw_spectra(figure(), tree, [5], NAMES)
    assert len(axes[0, 1].get_lines()) == len(GROUPS)
    assert len(axes[1, 1].get_lines()) == 0


def test_a_value_without_neighbours_is_a_dot(tree):
    gradient = tree["layers/z.weight/gradient"]
    gradient[:, 1, 0] = [1, 0, 1, 1, 0, 1, 1, np.nan, 1, np.nan]
    ax = draw_spectra(figure(), tree, [1], NAMES)[0, 0]
    first, *others = ax.get_lines()
    assert first.get_marker() == "o"
    assert list(first.get_markevery()) == [0, 8]
    assert not any(len(line.get_markevery()) for line in others)


def test_where_one_step_is_recorded_every_value_is_a_dot_above_the_noise_floor(tree):
    alone = tree.isel(step=[3])
    for ax in draw_spectra(figure(), alone, [1], NAMES).flat:
        assert all(list(line.get_markevery()) == [0] for line in ax.get_lines())
        assert ax.get_xlim() == (11.5, 12.5)
        assert [tick for tick in ax.get_xticks() if 11.5 <= tick <= 12.5] == [12]
        (band,) = [artist for artist in ax.collections if isinstance(artist, PolyCollection)]
        assert set(band.get_paths()[0].vertices[:, 0]) == {11.5, 12, 12.5}


def test_the_legend_names_every_group_with_its_size(tree):
    place = figure()
    legend(place, [tree], 180.0, [1, 4])
    *texts, widths = [text.get_text() for text in place.legends[0].get_texts()]
    assert texts == [
        "whole batch (N = 24)", "0 (N = 8)", "1 (N = 8)", "3 (N = 8)",
        "below the noise floor", "limit of resolution", "pale: beyond the attainable rank",
    ]  # fmt: skip
    assert widths == "thick to thin: σ₁, σ₄"


def test_the_legend_counts_the_samples_of_the_training_where_batches_hold_fewer(tree):
    def named() -> list[str]:
        legend(place := figure(), [tree], 180.0, [1])
        return [text.get_text() for text in place.legends[0].get_texts()[:4]]

    tree["group_size"][1:] = [7, 2, 0, 5]
    assert named() == ["whole batch", "0", "1", "3"]  # an older store does not tell how many there were
    tree["training"] = xr.Dataset({"loss": ("update", np.linspace(1, 0, 40))})
    tree.attrs["training_samples"] = {"all": 24, "0": 8, "1": 9, "3": 7}
    assert named() == ["whole batch (N = 24)", "0 (N = 8)", "1 (N = 9)", "3 (N = 7)"]
    assert "Groups: 0 (N = 8), 1 (N = 9), 3 (N = 7);" in spectra_caption(tree)


def test_the_legend_shows_the_lines_that_are_drawn_grey_ones_too(tree):
    grey = tree.copy()
    grey.attrs["performance"] = {"held_out": 9, "explained": -0.1, "at_chance": True}

    def looks(lines) -> list[tuple[str, str]]:
        return [(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines]

    def shown(trees, count) -> list[tuple[str, str]]:
        legend(place := figure(), trees, 180.0, [1])
        return looks(place.legends[0].findobj(Line2D)[:count])

    colour, at_chance = (looks(draw_spectra(figure(), each, [1], NAMES)[0, 1].get_lines()) for each in (tree, grey))
    assert shown([tree], len(GROUPS)) == colour
    assert shown([grey, grey], len(GROUPS)) == at_chance
    both = [look for pair in zip(colour[1:], at_chance[1:], strict=True) for look in pair]
    assert colour[0] == at_chance[0]
    assert shown([grey, tree], 2 * len(GROUPS) - 1) == [colour[0], *both]


def test_the_legend_names_the_singular_values_that_are_drawn_and_their_widths_are_its_order(tree):
    asked = [30, 4, 2]  # the second layer has three
    axes = draw_spectra(figure(), tree, asked, NAMES)
    wide, thin = (line.get_linewidth() for line in axes[0, 1].get_lines()[:2])
    assert wide > thin == axes[1, 1].get_lines()[0].get_linewidth()

    def said(**settings) -> str:
        panel.draw_key(place := figure(), [SPECTRA], {"net": tree}, DRAWING | settings, 180.0, 30.0)
        return place.legends[0].get_texts()[-1].get_text()

    assert said(singular_values=asked) == "thick to thin: σ₄, σ₂"
    assert said(singular_values=[30]) == "pale: beyond the attainable rank"
    tree["layers/z.weight"] = tree["layers/z.weight"].to_dataset().isel(index=slice(3))
    assert said(singular_values=asked) == "thick to thin: σ₂"


@pytest.mark.parametrize(("groups", "apart"), [(8, 0x40), (12, 0x11)])
def test_groups_at_chance_are_told_apart(groups, apart):
    names = ["all", *"abcdefghijkl"[:groups]]
    looks = [(str(dashes(names, True)[name]), int(colours(names, True)[name][1:3], 16)) for name in names[1:]]
    for first, second in combinations(looks, 2):
        assert first[0] != second[0] or abs(first[1] - second[1]) >= apart


@pytest.mark.parametrize("width", [80.0, 120.0, 180.0])
def test_nothing_written_below_or_above_a_panel_is_cut_off(tree, tests, width):
    place = Figure(figsize=(width / 25.4, 5))
    long = {**SPECTRA, "compare": ["0", "3"], "test": "permutation", "task": "classifier", "hidden": [8, 8, 8]}
    tree.attrs["performance"] = {"held_out": 29, "accuracy": 0.5, "chance": 0.55, "at_chance": True}
    with rc_context(STYLE):
        legend(place, [tree], width, [1, 2, 4, 12], loc="center")
        kinds = [SPECTRA, long, {**SPECTRA, "by_position": True}]
        place.text(0.5, 0.5, key_text(kinds, DRAWING, width), ha="center", fontsize=5.5)
        draw_panel(place, long, tree, tests, DRAWING)
        place.draw_without_rendering()
        boxes = [each.get_window_extent() for each in [place.legends[0], place.texts[0], place.texts[2]]]
    for box in boxes:
        assert box.x0 >= 0
        assert box.x1 <= place.bbox.x1


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
    axes = draw_differences(figure(), tree, tests, ["0", "3"], "paper", "student", NAMES)
    assert axes.shape == (2, 3)
    assert [row[0].get_ylabel() for row in axes] == ["index", "index"]
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


def test_cells_beyond_either_groups_rank_are_hatched_and_have_no_colour(tree, tests):
    tree["layers/z.weight/rank_limit"][:] = [24, 8, 2, 4]
    ratio = log_ratio(tree, "z.weight", "gradient", ["0", "3"])
    assert np.isnan(ratio[4:]).all()
    assert np.isfinite(ratio[:4, 0]).all()
    assert np.isfinite(log_ratio(tree, "z.weight", "adjoint", ["0", "3"])).all()
    axes = draw_differences(figure(), tree, tests, ["0", "3"], "paper", "student", NAMES)
    hatched = [
        [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_label().startswith("beyond")]
        for ax in axes.flat
    ]
    assert [len(each) for each in hatched] == [1, 0, 0, 0, 0, 0]
    assert (hatched[0][0].get_y(), hatched[0][0].get_hatch()) == (4.5, "/////")
    assert hatched[0][0].get_y() + hatched[0][0].get_height() >= 6.5
    assert axes[0, 0].patch.get_hatch() != "/////"  # below the noise floor looks different


def scattered(ax) -> dict[str, np.ndarray]:
    """Places of marks, by their label."""
    return {
        artist.get_label(): np.asarray(artist.get_offsets())
        for artist in ax.collections
        if isinstance(artist, PathCollection)
    }


@pytest.mark.parametrize("variance", ["student", "welch"])
@pytest.mark.parametrize("pair", [["0", "3"], ["3", "0"]])
def test_the_papers_marks_are_exactly_the_significant_rows_of_the_table(tree, tests, pair, variance):
    tests["significant"] = np.arange(len(tests)) % 3 == 0
    axes = draw_differences(figure(), tree, tests, pair, "paper", variance, NAMES)
    between = tests[(tests["group_a"] == "0") & (tests["group_b"] == "3") & (tests["test"] == f"paper_{variance}")]
    marked = 0
    for row, layer in zip(axes, LAYERS, strict=True):
        for ax, statistic in zip(row, STATISTICS, strict=True):
            drawn = scattered(ax)
            part = between[(between["layer"] == layer) & (between["statistic"] == statistic) & between["significant"]]
            assert drawn["singular values"][:, 1].tolist() == part["index"].dropna().tolist()
            assert drawn["steps"][:, 0].tolist() == part["step"].dropna().tolist()
            assert len(drawn["cells"]) == len(drawn["tested steps"]) == 0
            marked += len(part)
    assert marked


def permuted(test: str) -> pd.DataFrame:
    """Rows of a valid test: contrasts of one layer at three steps, a number for the whole layer."""
    contrasts = [
        {"layer": "z.weight", "statistic": "contrast", "step": step, "index": k, "p_adjusted": p}
        for step, k, p in [(0, 1, 0.01), (0, 2, 0.5), (8, 1, 0.2), (8, 2, 0.04), (16, 1, 0.9), (16, 2, 0.9)]
    ]
    whole = [
        {"layer": "z.weight", "statistic": "cosine", "step": step, "index": None, "p_adjusted": p}
        for step, p in [(0, 0.3), (8, 0.7), (16, 0.02)]
    ]
    table = pd.DataFrame([*contrasts, *whole])
    table["significant"] = table["p_adjusted"] < 0.05
    table["effect_size"] = np.linspace(4, 0, len(table))
    table["effect_low"], table["effect_high"] = table["effect_size"] - 1.5, table["effect_size"] + 2
    return tidy(table.assign(group_a="0", group_b="3", comparison="0 - 3", test=test, below_floor=False))


@pytest.mark.parametrize("test", ["permutation", "refit"])
def test_valid_tests_mark_contrasts_in_cells_and_whole_layers_above_tested_steps(tree, tests, test):
    table = pd.concat([tests, permuted(test)], ignore_index=True)
    axes = draw_differences(figure(), tree, table, ["3", "0"], test, "student", NAMES)
    drawn = scattered(axes[0, 0])
    assert drawn["cells"].tolist() == [[0, 1], [8, 2]]
    assert drawn["steps"][:, 0].tolist() == [16]
    assert drawn["tested steps"][:, 0].tolist() == [0, 8]
    assert len(drawn["singular values"]) == 0
    for ax in axes.flat[1:]:
        assert not any(len(places) for places in scattered(ax).values())
    place = figure()
    draw_panel(place, {**SPECTRA, "compare": ["3", "0"], "test": test}, tree, table, DRAWING)
    assert f"test: {test}, smallest p 0.01, effect 4 (2.5 to 6)" in place.texts[1].get_text().replace("\n", " ")
    refused = table.assign(p_adjusted=np.nan, significant=False)
    draw_panel(place := figure(), {**SPECTRA, "compare": ["3", "0"], "test": test}, tree, refused, DRAWING)
    assert f"test: {test}, no p" in place.texts[1].get_text()


def test_a_test_that_was_not_made_is_said_to_be_missing_and_marks_nothing(tree, tests):
    place = figure()
    axes = draw_panel(place, {**SPECTRA, "compare": ["0", "3"], "test": "refit"}, tree, tests, DRAWING)
    assert "test: refit, not made for these groups" in place.texts[1].get_text()
    assert not any(len(places) for ax in axes.flat for places in scattered(ax).values())


def test_the_key_says_what_a_test_is_and_under_paper_what_it_is_not():
    pair = {**SPECTRA, "compare": ["0", "3"]}
    paper = key_text([pair], DRAWING, 500.0)
    assert "takes dependent samples for independent: no test of groups" in paper
    assert "permuted" not in paper
    assert "Welch's" in key_text([pair], {**DRAWING, "variance": "welch"}, 500.0)
    assert "logarithms" not in paper
    assert "t-test of the values' logarithms" in key_text([pair], {**DRAWING, "scale": "log"}, 500.0)
    valid = key_text([{**pair, "test": "permutation"}, {**pair, "test": "refit"}], DRAWING, 500.0)
    assert "labels permuted with the weights as they are" in valid
    assert "labels permuted before training" in valid
    assert "no test of groups" not in valid
    assert key_text([SPECTRA], DRAWING, 500.0).startswith("Limit of resolution")


def test_a_group_that_the_run_has_not_is_one_sentence(tree, tests):
    with pytest.raises(UserError, match="compares the group '7', but the groups of the run 'net' are '0', '1', '3'"):
        draw_panel(figure(), {**SPECTRA, "compare": ["0", "7"]}, tree, tests, DRAWING)


def test_labels_that_look_like_missing_values_are_marked_too(tree, tests):
    renamed = tests.replace({"group_a": {"0": "NA"}, "group_b": {"3": "None"}}).assign(significant=True)
    found = marks(of_pair(renamed, ["NA", "None"], "paper", "student"), "z.weight", "gradient", "paper")
    assert (found.values.tolist(), len(found.steps)) == ([1, 2, 3, 4, 5, 6], 10)


@pytest.fixture
def along(tree):
    """The same trajectories with one layer by position, one value below the noise floor."""
    generator = np.random.default_rng(1)
    values = generator.lognormal(0, 1, (10, 4, 5, 6)).astype(np.float32)
    values[3, 1, 2, 0] = FLOOR / 2
    node = tree["layers/a.weight"].to_dataset().isel(index=slice(0, 3))
    node["gradient_by_position"] = (("step", "group", "position", "index"), values[..., :3])
    tree["layers/a.weight"] = node.assign_coords(position=np.arange(5))
    return tree


def test_positions_show_each_group_and_their_ratio_in_layers_that_have_them(along):
    assert tied_layers(along) == ["a.weight"]
    axes = draw_positions(figure(), along, ["0", "3"], tied_layers(along))
    assert axes.shape == (1, 3)
    meshes = [next(each for each in ax.collections if isinstance(each, QuadMesh)) for ax in axes[0]]
    recorded = along["layers/a.weight/gradient_by_position"].sel(index=1)
    shown = [np.ma.filled(mesh.get_array(), np.nan) for mesh in meshes]
    for values, group in zip(shown, ("0", "3"), strict=False):
        expected = recorded.sel(group=group).values.T.astype(float)
        expected[expected < FLOOR] = np.nan
        np.testing.assert_array_equal(values, expected)
    assert np.isnan(shown[0]).sum() == 1
    np.testing.assert_allclose(shown[2], np.log2(shown[0] / shown[1]), rtol=1e-6)
    assert meshes[0].get_clim() == meshes[1].get_clim()
    assert axes[0, 0].get_ylim() == (4.5, -0.5)
    np.testing.assert_array_equal(largest_by_position(along, "a.weight", "3"), shown[1])


def test_positions_that_no_layer_has_are_one_sentence(tree):
    with pytest.raises(UserError, match="no layer of the run has weights that are used at several"):
        draw_panel(figure(), {**SPECTRA, "by_position": True}, tree, None, DRAWING)


def test_what_stands_above_the_axes_keeps_clear_of_each_other_however_long_names_are(along, tests):
    names = {
        "0": "diagnosis=SCHIZOPHRENIA & sex=M & site=OSLO",
        "3": "diagnosis=HEALTHY & sex=M & a name of many words",
    }
    renamed = along.map_over_datasets(lambda node: node.assign_coords(group=["all", names["0"], "1", names["3"]]))
    renamed["grouping"] = along["grouping"]
    renamed.attrs["performance"] = {"held_out": 29, "accuracy": 0.5, "chance": 0.55, "at_chance": True}
    pair = {**SPECTRA, "compare": list(names.values()), "test": "permutation"}
    panels = [pair, {**SPECTRA, "by_position": True, "pair": list(names.values())}]
    table = pd.concat([tests, permuted("permutation")]).replace({"group_a": names, "group_b": names})
    size = {"width_mm": 180.0, "height_mm": 200.0, "layers_per_panel": 2}
    settings = {**DRAWING, **size, "heading": "Figure", "panels": panels}
    with rc_context(STYLE):
        (sheet,) = compose(settings, {"net": renamed}, {"net": table})
        alone = [panel._on_its_own(each, {"net": renamed}, table, {**settings, "width_mm": 80.0}) for each in panels]
        for whole, places in ((sheet, sheet.subfigs[1].subfigs), *((each, each.subfigs[:1]) for each in alone)):
            whole.draw_without_rendering()
            for place in places:
                words = [place.texts[1], *(text for ax in place.axes for text in ax.texts)]
                boxes = [text.get_window_extent() for text in words]
                assert len(boxes) >= 5
                assert not [both for both in combinations(boxes, 2) if both[0].overlaps(both[1])]
            tops = {round(place.axes[0].get_window_extent().y1) for place in places}
            assert len(tops) == 1  # beside each other


def eight_panels(study) -> dict:
    """Settings of a figure of eight panels of the study's two runs."""
    settings = specs.figure_settings(study.config, "small")
    spectra, difference = settings["panels"]
    judged = {**spectra, "run": "judge", "task": "classifier", "hidden": [6]}
    pairs = [["0", "1"], ["0", "3"], ["1", "3"], ["3", "0"], ["3", "1"]]
    panels = [spectra, judged, {**spectra, "compare": ["0", "3"]}, *({**difference, "compare": pair} for pair in pairs)]
    settings["panels"] = [{**panel, "letter": letter} for panel, letter in zip(panels, "ABCDEFGH", strict=True)]
    return settings


def test_pages_have_letters_and_titles_and_the_same_bytes_when_drawn_twice(study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(page, "compose", lambda *arguments: drawn.append(compose(*arguments)) or drawn[-1])
    runs, tests = ({run: str(path(run)) for run in ("coder", "judge")} for path in (study.run, study.tests))
    settings = eight_panels(study)
    kinds = ("pdf", "png")
    for folder in ("first", "second"):
        outputs = [str(tmp_path / folder / f"figure-7.{kind}") for kind in kinds]
        assert build_page(settings, runs, tests, outputs) == "Figure 7: 8 panels on 2 pages"
    titles = []
    for number, sheet in enumerate(drawn[0], 1):
        head, body, foot, _ = sheet.subfigs
        assert head.texts[0].get_text() == f"Figure 7.  A small experiment  ({number} of 2)"
        assert sheet.get_size_inches() * 25.4 == pytest.approx([210, 297])
        titles += [place.texts[0].get_text() for place in body.subfigs if place.texts]
        assert "p < 0.05" in foot.texts[0].get_text()
    assert titles[0] == "A   MLP autoencoder, hidden 6 x 4, Tanh"
    assert [title[0] for title in titles] == list("ABCDEFGH")
    assert titles[7] == "H   MLP classifier, hidden 6, Tanh"
    assert "3 against 1" in drawn[0][-1].subfigs[1].subfigs[1].texts[1].get_text()
    first = drawn[0][0].subfigs
    # The autoencoder has four layers, of which three are drawn; a colour bar stands beside pairs.
    assert [len(place.axes) for place in first[1].subfigs[:4]] == [9, 6, 10, 7]
    assert "0 (N = 6)" in [text.get_text() for text in first[2].legends[0].get_texts()]
    for kind in kinds:
        once, again = ((tmp_path / folder / f"figure-7.{kind}").read_bytes() for folder in ("first", "second"))
        assert once == again, kind
        assert len(once) > 10_000


def test_dollar_signs_are_drawn_as_they_are_written(study, tmp_path):
    settings = {**specs.figure_settings(study.config, "small"), "heading": r"From 5$ to \x and 6$"}
    settings["panels"] = settings["panels"][:1]
    build_page(settings, {"coder": str(study.run("coder"))}, {}, [str(tmp_path / "figure-7.png")])
    with rc_context(STYLE):
        head = figure().text(0, 0, settings["heading"])
    assert not head.get_parse_math()


def test_rows_fill_pages_from_the_top():
    assert paginate([60.0, 60.0, 60.0, 60.0], 250.0) == [0]
    assert paginate([80.0, 80.0, 80.0, 80.0, 80.0], 250.0) == [0, 3]
    assert paginate([300.0, 100.0, 300.0], 250.0) == [0, 1, 2]


def panels_of(study) -> tuple[dict, dict[str, str], dict[str, str]]:
    """Settings, trajectories and tests of the study's panels."""
    settings = specs.panels_settings(study.config, "small")
    return settings, {run: str(study.run(run)) for run in ("coder", "judge")}, {"judge": str(study.tests("judge"))}


def test_panels_drawn_on_their_own_are_whole_in_every_format_or_absent(study, tmp_path):
    names = ("coder", "judge_0_vs_3")
    outputs = [str(tmp_path / f"{name}.{kind}") for name in names for kind in ("pdf", "png", "svg")]
    assert build_panels(*panels_of(study), outputs) == "panels A, B"
    heads = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}
    assert {path.name: path.read_bytes()[:4] for path in tmp_path.iterdir()} == {
        f"{name}.{kind}": head[:4] for name in names for kind, head in heads.items()
    }
    with pytest.raises(KeyError):
        build_panels(*panels_of(study), [str(tmp_path / "coder.docx")])
    assert len(list(tmp_path.iterdir())) == 6


def test_each_panel_on_its_own_is_in_its_file_and_shows_every_layer(study, monkeypatch):
    drawn = []
    monkeypatch.setattr(panel, "save", lambda figure, outputs, _: drawn.append((figure.subfigs[0], outputs)))
    build_panels(*panels_of(study), ["a/judge_0_vs_3.png", "a/coder.svg", "a/coder.png"])
    (coder, of_coder), (judge, of_judge) = drawn
    assert (of_coder, of_judge) == (["a/coder.svg", "a/coder.png"], ["a/judge_0_vs_3.png"])
    assert coder.texts[0].get_text() == "A   MLP autoencoder, hidden 6 x 4, Tanh"
    assert judge.texts[0].get_text() == "B   MLP classifier, hidden 6, Tanh"
    assert len(coder.axes) == 4 * 3


def test_a_panel_is_drawn_alike_alone_and_after_others(study, tmp_path):
    settings, runs, tests = panels_of(study)
    alone = {**settings, "panels": settings["panels"][1:]}
    pictures = []
    for folder, chosen in (("all", settings), ("one", alone)):
        outputs = [str(tmp_path / folder / f"judge_0_vs_3.{kind}") for kind in ("pdf", "png", "svg")]
        build_panels(chosen, runs, tests, outputs)
        pictures.append([Path(path).read_bytes() for path in outputs])
    assert pictures[0] == pictures[1]


def test_a_supplement_compares_the_drawn_pairs_in_every_run():
    settings = specs.supplement_settings(parse_config(SETTINGS), "small")
    assert settings["heading"].startswith("Figure S7.  A small experiment")
    shown = [(each["letter"], each["run"], each["compare"], each["test"]) for each in settings["panels"]]
    assert shown == [("1", "coder", ["0", "3"], "paper"), ("2", "judge", ["0", "3"], "paper")]


def test_a_single_singular_value_has_a_whole_number_at_its_axis():
    ax = figure().add_subplot()
    draw_cells(ax, np.arange(3), np.array([1]), np.zeros((1, 3)), 1.0, "PuOr_r")
    low, high = sorted(ax.get_ylim())
    assert [tick for tick in ax.get_yticks() if low <= tick <= high] == [1]
