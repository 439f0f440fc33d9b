"""Cleaning of time courses against scipy, nilearn and the formulas."""

import numpy as np
import pytest
from scipy import signal

from autospec.errors import UserError
from autospec.ica.cleaning import (
    clean_timecourses,
    connectivity,
    low_pass,
    regress,
    remove_spikes,
    remove_trends,
    spectral_summary,
)

STEP = 2.0


@pytest.fixture
def courses():
    return np.random.default_rng(8).normal(size=(150, 4)).cumsum(axis=0)


def slow_trends(volumes):
    """The six slow trends, one a column, as a formula of their own."""
    t = np.arange(volumes) / (volumes - 1)
    return np.column_stack([np.ones(volumes), t, *(f(2 * np.pi * n * t) for f in (np.sin, np.cos) for n in (1, 2))])


def least_squares(design, values):
    return np.linalg.lstsq(design, values, rcond=None)[0]


def test_slow_trends_are_removed_and_nothing_else(courses):
    t = np.arange(150) / 149
    trends = [np.ones(150), 3 * t, *(f(2 * np.pi * n * t) for f in (np.sin, np.cos) for n in (1, 2))]
    for trend in trends:
        assert np.abs(remove_trends(trend[:, None])).max() < 1e-10
    cleaned = remove_trends(courses)
    assert np.abs(np.array(trends) @ cleaned).max() < 1e-8
    assert np.allclose(remove_trends(cleaned), cleaned)
    # What was removed is a combination of these six.
    rest = (courses - cleaned) - np.array(trends).T @ np.linalg.lstsq(np.array(trends).T, courses - cleaned)[0]
    assert np.abs(rest).max() < 1e-9
    faster = np.cos(2 * np.pi * 8 * t)[:, None]
    assert remove_trends(faster).std() > 0.9 * faster.std()


def test_regression_removes_what_a_common_fit_with_trends_gives_to_confounds():
    generator = np.random.default_rng(2)
    x = 800 + generator.normal(scale=20, size=(40, 300)).cumsum(axis=0)
    confounds = generator.normal(size=(40, 6)).cumsum(axis=0) + 5
    trends = slow_trends(40)
    weights = least_squares(np.column_stack([trends, confounds]), x)[6:]
    expected = x - (confounds - trends @ least_squares(trends, confounds)) @ weights
    assert np.allclose(regress(x, confounds), expected, atol=1e-8)
    assert np.allclose(regress(x, confounds).mean(axis=0), x.mean(axis=0))
    assert np.allclose(regress(x.astype("f4"), confounds), expected, atol=0.1)
    assert regress(x.astype("f4"), confounds).dtype == np.float32
    # Confounds that are trends themselves change nothing.
    more = np.column_stack([confounds, np.full(40, 7.0), np.zeros(40), np.linspace(1, 2, 40)])
    assert np.allclose(regress(x, more), expected, atol=1e-8)
    assert np.array_equal(regress(x, trends), x)


def test_confounds_that_drift_bring_neither_trends_back_nor_themselves_in():
    generator = np.random.default_rng(4)
    # Motion drifts and jitters; the scanner drifts, too, and nothing follows the jitter.
    motion = np.linspace(-1, 1, 120)[:, None] + generator.normal(scale=0.3, size=(120, 1))
    x = generator.normal(size=(120, 50)) + 4 * np.linspace(-1, 1, 120)[:, None]
    design = np.column_stack([slow_trends(120), motion])
    expected = x - design @ least_squares(design, x)
    assert np.allclose(remove_trends(regress(x, motion)), expected)
    assert np.allclose(regress(remove_trends(x), motion), expected)


def test_more_confounds_than_volumes_allow_are_refused():
    x = np.random.default_rng(0).normal(size=(40, 5))
    confounds = np.random.default_rng(1).normal(size=(40, 34))
    assert regress(x, confounds[:, :33]).std() > 0
    with pytest.raises(UserError, match="34 confounds and 6 slow trends leave nothing of 40 volumes"):
        regress(x, confounds)


def test_spikes_become_the_mean_of_three():
    generator = np.random.default_rng(0)
    quiet = np.sin(np.arange(60) / 6)[:, None] + 0.01 * generator.normal(size=(60, 1))
    spiky = quiet.copy()
    spiky[20] += 9
    cleaned = remove_spikes(spiky)
    assert cleaned[20] == pytest.approx(spiky[19:22].mean())
    far = np.abs(np.arange(60) - 20) > 1
    assert np.array_equal(cleaned[far], spiky[far])
    first = quiet.copy()
    first[0] -= 9
    assert remove_spikes(first)[0] == pytest.approx(first[:2].mean())
    assert np.array_equal(remove_spikes(np.zeros((10, 1))), np.zeros((10, 1)))


def test_spikes_follow_the_formula_one_by_one(courses):
    cleaned = remove_spikes(courses)
    for k in range(courses.shape[1]):
        x = courses[:, k]
        smooth = np.array([np.mean(x[max(t - 1, 0) : t + 2]) for t in range(len(x))])
        limit = 2.5 * np.std(x - smooth, ddof=1)
        expected = [s if abs(v - s) > limit else v for v, s in zip(x, smooth, strict=True)]
        assert np.allclose(cleaned[:, k], expected)


def test_the_low_pass_filter_is_nilearns_away_from_the_ends(courses):
    from nilearn.signal import clean

    ours = low_pass(courses, STEP, 0.15)
    theirs = clean(
        courses, detrend=False, standardize=None, filter="butterworth", low_pass=0.15, t_r=STEP, ensure_finite=False
    )
    assert np.allclose(ours[30:-30], theirs[30:-30], atol=1e-6)
    numerator, denominator = signal.butter(5, 0.15 / (0.5 / STEP))
    assert np.allclose(ours, signal.filtfilt(numerator, denominator, courses, axis=0, padtype="odd", padlen=15))


def test_the_low_pass_filter_keeps_slow_waves_and_stops_fast_ones():
    t = STEP * np.arange(300)[:, None]
    slow, fast = np.sin(2 * np.pi * 0.05 * t), np.sin(2 * np.pi * 0.22 * t)
    filtered = low_pass(slow + fast, STEP, 0.15)
    assert np.abs(filtered - slow)[30:-30].max() < 0.02
    assert np.array_equal(low_pass(slow, 4.0, 0.15), slow)  # nothing that fast can be in it


def test_cleaning_is_its_parts_in_this_order(courses):
    motion = np.random.default_rng(1).normal(size=(150, 6)).cumsum(axis=0)
    cleaned = clean_timecourses(courses, STEP, motion, True, 0.15)
    design = np.column_stack([slow_trends(150), motion])
    step = courses - design @ least_squares(design, courses)  # trends and motion, in one fit
    assert np.allclose(cleaned, low_pass(remove_spikes(step), STEP, 0.15))
    assert np.allclose(clean_timecourses(courses, STEP, None, False, None), remove_trends(courses))


def test_connectivity_is_fishers_z_of_pearsons_r(courses):
    z = connectivity(courses)
    for i in range(4):
        for j in range(4):
            r = 0 if i == j else np.corrcoef(courses[:, i], courses[:, j])[0, 1]
            assert z[i, j] == pytest.approx(0.5 * np.log((1 + r) / (1 - r)))
    assert np.array_equal(z, z.T)
    assert np.isfinite(connectivity(courses[:, [0, 0, 1]])).all()
    assert connectivity(courses[:, :1]).tolist() == [[0.0]]


def test_spectra_tell_slow_courses_from_noise():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(400, 1))
    slow = low_pass(noise, STEP, 0.05)
    summary = spectral_summary(np.hstack([slow, noise]), STEP)
    assert summary["low_to_high_power"][0] > 100
    assert 0.5 < summary["low_to_high_power"][1] < 2
    assert (summary["dynamic_range"] <= 1).all()
    wave = np.sin(2 * np.pi * 0.0625 * STEP * np.arange(400))[:, None]
    assert spectral_summary(wave, STEP)["peak_hz"][0] == pytest.approx(0.0625, abs=1e-3)
    assert np.isnan(spectral_summary(noise, 4.0)["low_to_high_power"][0])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda c: remove_trends(c[:7]), "from 7 volumes"),
        (lambda c: low_pass(c[:15], STEP, 0.15), "15 volumes are too few"),
        (lambda c: connectivity(np.column_stack([c, np.ones(150)])), "network 5 is constant"),
    ],
)
def test_time_courses_that_cannot_be_cleaned_are_refused(courses, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(courses)


@pytest.mark.parametrize("of", ["a trend", "an offset", "the mean of the others"])
def test_confounds_that_say_the_same_but_for_a_trend_count_once(of):
    generator = np.random.default_rng(3)
    x = 100 + generator.normal(size=(150, 20))
    confounds = generator.normal(size=(150, 2)) + 1e4
    t = np.arange(150.0)
    also = {
        "a trend": confounds[:, 0] + 0.3 * t,
        "an offset": confounds[:, 0] + 1000,
        "the mean of the others": confounds.mean(1),
    }
    found = regress(x, np.column_stack([confounds, also[of]]))
    np.testing.assert_allclose(found, regress(x, confounds), atol=1e-6)
    np.testing.assert_allclose(found.mean(0), x.mean(0), atol=1e-6)
