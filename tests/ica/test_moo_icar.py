"""MOO-ICAR against GIFT's output, against a second implementation, and against bad input."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import autospec.ica
from autospec.errors import UserError
from autospec.ica.moo_icar import device_of
from autospec.ica.preprocessing import preprocess
from tests.ica.conftest import correlations
from tests.ica.loop import mean_log_cosh, plain_moo_icar

module = importlib.import_module("autospec.ica.moo_icar")  # the package's attribute of that name is the function


@pytest.mark.parametrize(("dtype", "gate"), [("float64", 0.999999), ("float32", 0.9999)])
def test_every_map_and_time_course_is_that_of_gift(gift, dtype, gate):
    bold = preprocess(gift["bold"].astype(dtype), 1)
    found = autospec.ica.moo_icar(bold, gift["template"], dtype=dtype)
    assert found.maps.dtype == found.timecourses.dtype == dtype
    assert found.maps.shape == gift["gift_maps"].shape
    assert found.timecourses.shape == gift["gift_timecourses"].shape
    assert correlations(found.maps, gift["gift_maps"]).min() >= gate
    assert correlations(found.timecourses.T, gift["gift_timecourses"].T).min() >= gate
    assert np.array_equal(found.accepted_steps, gift["gift_accepted_steps"])
    # Not only alike: the same scale.
    ratio = found.timecourses.std(axis=0) / gift["gift_timecourses"].std(axis=0)
    assert np.abs(ratio - 1).max() < 1e-3


def heavy_tailed(volumes=30, voxels=1200, networks=6, seed=3):
    """Volumes that mix non-Gaussian maps, and references that are those maps with noise."""
    generator = np.random.default_rng(seed)
    maps = generator.laplace(size=(networks, voxels))
    mixed = generator.normal(size=(volumes, networks)) @ maps + 0.7 * generator.normal(size=(volumes, voxels))
    return mixed, maps + generator.normal(scale=1.5, size=maps.shape)


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_batch_agrees_with_a_plain_loop_for_every_preprocessing(kind, seed):
    bold, references = heavy_tailed(seed=seed)
    x = preprocess(bold + 500, kind)
    maps, timecourses, steps = plain_moo_icar(x, references)
    for dtype, gate in (("float64", 1 - 1e-9), ("float32", 0.9999)):
        found = autospec.ica.moo_icar(x.astype(dtype), references, dtype=dtype)
        assert correlations(found.maps, maps).min() >= gate
        assert correlations(found.timecourses.T, timecourses.T).min() >= gate
        assert np.abs(found.maps - maps).max() < 2e-4
        assert np.array_equal(found.accepted_steps, steps)
        assert found.rank == len(bold) - {1: 0, 2: 1, 3: 1, 4: 2}[kind]


def test_a_network_of_little_variance_is_found_beside_a_strong_mean_image():
    """Raw intensities, as NeuroMark is run: their mean image has 10,000,000 times the variance of a network."""
    bold, references = heavy_tailed()
    anatomy = np.random.default_rng(9).normal(scale=1e4, size=bold.shape[1])
    found = autospec.ica.moo_icar((bold + anatomy).astype("f4"), references)
    expected, _, _ = plain_moo_icar(bold + anatomy, references)
    assert found.rank == len(bold)
    assert correlations(found.maps, expected).min() > 0.9999


def test_networks_do_not_see_each_other(gift):
    whole = autospec.ica.moo_icar(gift["bold"], gift["template"], dtype="float64")
    for k in (0, 17, 52):
        alone = autospec.ica.moo_icar(gift["bold"], gift["template"][k : k + 1], dtype="float64")
        assert np.abs(alone.maps[0] - whole.maps[k]).max() < 1e-9


def test_the_sign_follows_the_reference_and_units_do_not_matter(gift):
    plain = autospec.ica.moo_icar(gift["bold"], gift["template"][:4], dtype="float64")
    turned = autospec.ica.moo_icar(1e-4 * gift["bold"].astype("f8"), -50 * gift["template"][:4] + 3, dtype="float64")
    assert correlations(plain.maps, -turned.maps).min() > 0.999999
    assert np.array_equal(plain.accepted_steps, turned.accepted_steps)


def test_maps_have_mean_0_and_variance_1_and_time_courses_are_projections(gift):
    found = autospec.ica.moo_icar(gift["bold"], gift["template"], dtype="float64")
    assert np.abs(found.maps.mean(axis=1)).max() < 1e-9
    assert np.abs(found.maps.var(axis=1) - 1).max() < 1e-9
    centred = gift["bold"].astype("f8") - gift["bold"].astype("f8").mean(axis=1, keepdims=True)
    assert np.abs(found.timecourses - centred @ found.maps.T / centred.shape[1]).max() < 1e-7


def test_it_is_deterministic_and_leaves_its_input_and_the_random_numbers_alone(gift):
    bold, template = gift["bold"].copy(), gift["template"].copy()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = autospec.ica.moo_icar(bold, template)
    second = autospec.ica.moo_icar(bold, template)
    assert np.array_equal(first.maps, second.maps)
    assert np.array_equal(bold, gift["bold"])
    assert np.array_equal(template, gift["template"])
    assert torch.equal(before, torch.get_rng_state())


def test_every_kind_of_array_that_people_hold_is_taken(gift):
    bold, template = gift["bold"], gift["template"][:3]
    expected = autospec.ica.moo_icar(bold, template).maps
    read_only = bold.copy()
    read_only.setflags(write=False)
    for other in (bold.astype(">f4"), np.asfortranarray(bold), bold[:, ::-1][:, ::-1], read_only, torch.tensor(bold)):
        assert np.allclose(autospec.ica.moo_icar(other, template).maps, expected, atol=1e-4)
    whole_numbers = autospec.ica.moo_icar(np.round(bold).astype(np.int16), template).maps
    assert correlations(whole_numbers, expected).min() > 0.999


def objective(white, reference, w):
    """F of a weighting of any length, by the equations."""
    w = w / np.linalg.norm(w)
    r = (reference - reference.mean()) / reference.std(ddof=1)
    b = white @ r / white.shape[1]
    start = b / np.linalg.norm(b)
    excess = [(mean_log_cosh(v @ white) - 0.3745672075) ** 2 for v in (start, w)]
    return np.arctan(np.tan(np.pi / 2 * (start @ b)) / excess[0] * excess[1]) / np.pi + w @ b / 2


def whitened(bold):
    centred = bold - bold.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(centred @ centred.T / centred.shape[1])
    return (vectors / np.sqrt(values)).T @ centred


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_converged_variant_ends_where_scipy_finds_nothing_better_near_by(dtype):
    bold, references = heavy_tailed()
    white = whitened(bold)
    found = autospec.ica.moo_icar(bold, references, dtype=dtype, converged=True)
    stopped = autospec.ica.moo_icar(bold, references, dtype="float64")
    for k, reference in enumerate(references):
        w = found.maps[k].astype("f8") @ white.T / white.shape[1]
        better = minimize(lambda v, r=reference: -objective(white, r, v), w, method="BFGS", options={"gtol": 1e-8})
        assert np.corrcoef(better.x @ white, found.maps[k])[0, 1] > 1 - 1e-5
        line = stopped.maps[k] @ white.T / white.shape[1]
        assert objective(white, reference, w) >= objective(white, reference, line) - 1e-7


def test_the_converged_variant_is_another_answer(gift):
    parity = autospec.ica.moo_icar(gift["bold"], gift["template"], dtype="float64")
    converged = autospec.ica.moo_icar(gift["bold"], gift["template"], dtype="float64", converged=True)
    assert correlations(parity.maps, converged.maps).min() < 0.999
    assert not np.array_equal(parity.accepted_steps, converged.accepted_steps)


def with_value(array, where, value):
    changed = array.copy()
    changed[where] = value
    return changed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, r: (x[:4], r), "4 volumes for 6 networks"),
        (lambda x, r: (x, r[:, :-1]), "bold has 1200 voxels and references has 1199"),
        (lambda x, r: (x.T, r), "bold has 30 voxels"),
        (lambda x, r: (x[0], r), "bold must be a matrix with one volume a row"),
        (lambda x, r: (x, r[:0]), "references must be a matrix with one reference a row"),
        (lambda x, r: (with_value(x, (2, 7), np.nan), r), "bold has NaN or infinity in volume 3"),
        (lambda x, r: (with_value(x, (0, 0), -np.inf), r), "bold has NaN or infinity in volume 1"),
        (lambda x, r: (x, with_value(r, (5, 3), np.nan)), "references has NaN or infinity in reference 6"),
        (lambda x, r: (with_value(x, 4, 7.5), r), "volume 5 is constant"),
        (lambda x, r: (x, with_value(r, 1, 0.0)), "reference 2 is constant"),
        (lambda x, r: (np.repeat(x[:3], 4, axis=0), r), "only 3 independent dimensions for 6 networks"),
        (lambda x, r: (x + 1j, r), "real numbers"),
        (lambda x, r: (np.array([["a", "b"]]), r), "real numbers"),
    ],
)
def test_bad_arrays_are_refused_in_one_sentence(change, sentence):
    with pytest.raises(UserError, match=sentence):
        autospec.ica.moo_icar(*change(*heavy_tailed()))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "float16"}, "not in 'float16'"),
        ({"device": "tpu9"}, "no device 'tpu9'"),
        ({"device": "mps"}, "not on 'mps'"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        autospec.ica.moo_icar(*heavy_tailed(), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_graphics_card_is_said():
    with pytest.raises(UserError, match="no CUDA device"):
        autospec.ica.moo_icar(*heavy_tailed(), device="cuda")


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    """Which device is chosen; the computation on it is the next test's, where there is a GPU."""
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device_of("auto").type == kind
        assert device_of(None).type == "cpu"


def test_a_graphics_card_without_room_leaves_the_work_to_the_processor(monkeypatch):
    data = heavy_tailed()
    expected = autospec.ica.moo_icar(*data, device="cpu")
    carried_out = module._found

    def found(bold, references, dtype, converged, place):
        if place.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return carried_out(bold, references, dtype, converged, place)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "_found", found)
    there = autospec.ica.moo_icar(*data, device="auto")
    assert there.device == "cpu"
    np.testing.assert_array_equal(there.maps, expected.maps)
    with pytest.raises(torch.OutOfMemoryError):  # whoever asks for CUDA by name is told
        autospec.ica.moo_icar(*data, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "gate"), [("float64", 0.999999), ("float32", 0.9999)])
def test_a_graphics_card_gives_the_same(gift, dtype, gate):
    found = autospec.ica.moo_icar(gift["bold"], gift["template"], dtype=dtype, device="cuda")
    assert correlations(found.maps, gift["gift_maps"]).min() >= gate
    assert correlations(found.timecourses.T, gift["gift_timecourses"].T).min() >= gate


def test_importing_loads_no_torch():
    code = "import sys, autospec.ica; sys.exit(bool({'torch', 'nilearn', 'nibabel'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
