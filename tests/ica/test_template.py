"""Templates: what is recognised, its digest, its grids, and networks that a mask leaves out."""

import gzip
import hashlib
import subprocess
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from autospec.errors import UserError
from autospec.ica import template as module
from autospec.ica.template import (
    DOMAINS,
    analysis_grid,
    coverage,
    fixed_mask,
    load_template,
    mni_brain,
    mni_brain_volume,
    neuromark_networks,
    neuromark_peaks,
    on_grid,
    require_networks,
    stand_in_template,
    template_digest,
)
from tests.conftest import need
from tests.ica.conftest import AFFINE, SHAPE, save


@pytest.fixture(scope="module")
def stand_in():
    return stand_in_template()


def test_the_published_table_has_53_networks_in_seven_domains():
    networks = neuromark_networks()
    assert [n.number for n in networks] == list(range(1, 54))
    assert len({n.label for n in networks}) == 53
    counts = {domain: sum(n.domain == domain for n in networks) for domain in DOMAINS}
    assert counts == {"SC": 5, "AUD": 2, "SM": 9, "VIS": 9, "CC": 17, "DM": 7, "CB": 4}
    assert all(n.region for n in networks)
    # Where a region's name has a side, its peak is there.
    for network, peak in zip(networks, neuromark_peaks(), strict=True):
        assert not (network.region.startswith("Left") and peak[0] > 0)
        assert not (network.region.startswith("Right") and peak[0] < 0)


def test_the_stand_in_has_a_blob_at_every_peak_within_the_brain(stand_in):
    assert stand_in.kind == "stand-in template"
    assert stand_in.maps.shape == (53, 63, 52, 53)
    assert stand_in.maps.dtype == np.float32
    brain = mni_brain(stand_in.shape, stand_in.affine)
    assert not stand_in.maps[~brain].any()
    for k, peak in enumerate(neuromark_peaks()):
        voxel = np.unravel_index(stand_in.maps[..., k].argmax(), stand_in.shape)
        assert np.abs(stand_in.affine[:3, :3] @ voxel + stand_in.affine[:3, 3] - peak).max() <= 1.5
    inside = stand_in.maps[brain].astype("f8")
    assert 4 < np.linalg.cond(inside) < 7
    pairs = np.corrcoef(inside.T) - np.eye(53)
    assert pairs.max() == pytest.approx(0.92, abs=0.01)


def test_the_stand_in_is_known_again_from_a_file(tmp_path, stand_in):
    path = save(tmp_path / "whatever.nii.gz", stand_in.maps[::2, ::2, ::2], stand_in.affine @ np.diag([2, 2, 2, 1]))
    again = load_template(path)
    assert again.kind == "stand-in template"
    assert again.labels == stand_in.labels
    assert again.source == "whatever.nii.gz"
    assert load_template("stand-in").digest == stand_in.digest


def test_any_maps_are_a_custom_template_and_never_neuromark(tmp_path, template):
    for count in (5, 53, 2):
        maps = np.random.default_rng(0).normal(size=(6, 6, 6, count)).astype("f4")
        loaded = load_template(save(tmp_path / "Neuromark_fMRI_1.0.nii", maps))
        assert loaded.kind == "custom template"
        assert loaded.labels == [f"network-{k:03d}" for k in range(1, count + 1)]


@pytest.mark.parametrize("record", ["git blob", "size and md5"])
@pytest.mark.parametrize("packed", [False, True])
def test_neuromark_is_recognised_by_its_bytes(tmp_path, monkeypatch, record, packed):
    path = save(tmp_path / "maps.nii", np.random.default_rng(0).normal(size=(6, 6, 6, 53)).astype("f4"))
    data = path.read_bytes()
    if record == "git blob":
        monkeypatch.setattr(module, "NEUROMARK_GIT_BLOB", hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
    else:
        monkeypatch.setattr(module, "NEUROMARK_BYTES", len(data))
        monkeypatch.setattr(module, "NEUROMARK_MD5", hashlib.md5(data).hexdigest())
    if packed:
        path = tmp_path / "maps.nii.gz"
        path.write_bytes(gzip.compress(data))
    loaded = load_template(path)
    assert loaded.kind == "NeuroMark 1.0"
    assert loaded.labels == [n.label for n in neuromark_networks()]
    # One value more or less, and it is another template.
    image = nib.load(path)
    changed = np.asarray(image.dataobj).copy()
    changed[0, 0, 0, 0] += 1
    assert load_template(save(tmp_path / "other.nii", changed)).kind == "custom template"


def test_a_git_blob_is_named_as_git_names_it(tmp_path):
    (tmp_path / "file").write_bytes(b"some\0bytes")
    named = subprocess.run(
        [need("git", "install git"), "hash-object", tmp_path / "file"], capture_output=True, text=True, check=True
    )
    assert module.git_blob(b"some\0bytes") == named.stdout.strip()


def test_the_digest_is_of_grid_affine_and_values_not_of_the_file(tmp_path, template):
    plain = load_template(save(tmp_path / "a.nii", template.maps))
    packed = load_template(save(tmp_path / "b.nii.gz", template.maps))
    big = load_template(save(tmp_path / "c.nii.gz", template.maps.astype(">f4")))
    assert plain.digest == packed.digest == big.digest == template.digest
    moved, changed = AFFINE.copy(), template.maps.copy()
    moved[0, 3] += 0.5
    changed[3, 3, 3, 0] += 1e-3
    others = {template_digest(template.maps, moved), template_digest(changed, AFFINE), template_digest(template.maps.reshape(21, 18, 18, 5), AFFINE)}  # fmt: skip
    assert len(others | {template.digest}) == 4


@pytest.mark.parametrize(("unit", "factor"), [("mm", 0.1), ("meter", 1e-3), ("micron", 1e3), ("unknown", 0.1)])
def test_a_template_that_is_not_in_millimetres_is_refused(tmp_path, template, unit, factor):
    image = nib.Nifti1Image(template.maps, np.diag([factor] * 3 + [1]) @ AFFINE)
    image.header.set_xyzt_units(unit)
    path = tmp_path / "maps.nii"
    nib.save(image, path)
    size, side = f"{9 * factor:.3g}", f"{18 * 9 * factor:.3g}"
    named = f", and its header names the unit '{unit}'" if unit in ("meter", "micron") else ""
    with pytest.raises(UserError) as caught:
        load_template(path)
    assert str(caught.value) == (
        f"the template {path} has voxels of {size} x {size} x {size} mm and covers {side} x {21 * 9 * factor:.3g} x {side} mm, "
        f"which is not the size of a human brain{named}: its affine seems to be in another unit, so write it in millimetres."
    )


def test_a_unit_that_the_header_names_wrongly_does_no_harm(tmp_path, template):
    image = nib.Nifti1Image(template.maps, AFFINE)
    image.header.set_xyzt_units("micron")  # beside an affine in mm, which is what everybody reads
    nib.save(image, tmp_path / "other.nii")
    assert load_template(tmp_path / "other.nii").digest == template.digest


def test_values_that_are_not_finite_count_as_none(tmp_path, template):
    holes = template.maps.copy()
    holes[0, 0, 0] = np.nan
    assert np.array_equal(load_template(save(tmp_path / "holes.nii.gz", holes)).maps, template.maps)


def test_grids_are_the_templates_the_datas_or_cubes(tmp_path, stand_in, bold):
    shape, affine = analysis_grid("template", stand_in, None)
    assert shape == (53, 63, 52)
    assert np.array_equal(affine, stand_in.affine)
    shape, affine = analysis_grid("data", stand_in, save(tmp_path / "bold.nii.gz", bold))
    assert shape == SHAPE
    assert np.allclose(affine, AFFINE)
    shape, affine = analysis_grid(9, stand_in, None)
    assert shape == SHAPE
    assert np.allclose(affine, AFFINE)
    mirrored = replace(stand_in, maps=stand_in.maps[::-1], affine=np.diag([-3.0, 3, 3, 1]))
    mirrored.affine[:3, 3] = [78, -112, -70]
    shape, affine = analysis_grid(6.0, mirrored, None)
    assert shape == (27, 32, 26)
    assert np.allclose(affine[:3, 3], [-78, -112, -70])
    assert np.allclose(on_grid(mirrored, shape, affine), on_grid(stand_in, shape, affine), atol=1e-5)


def test_a_template_is_resampled_by_affine_even_where_dimensions_agree(template):
    assert np.array_equal(on_grid(template, SHAPE, AFFINE), template.maps)
    moved = AFFINE.copy()
    moved[0, 3] += 9
    assert np.array_equal(on_grid(template, SHAPE, moved)[:-1], template.maps[1:])
    moved[0, 3] -= 4.5
    between = (template.maps[1:] + template.maps[:-1]) / 2
    assert np.allclose(on_grid(template, SHAPE, moved)[:-1], between, atol=1e-5)


@pytest.mark.parametrize("grid", ["fine", 0.5, 30, True, None])
def test_an_unknown_grid_is_refused(stand_in, grid):
    with pytest.raises(UserError, match="it can be 'template', 'data' or a voxel size"):
        analysis_grid(grid, stand_in, None)
    with pytest.raises(UserError, match="needs an image"):
        analysis_grid("data", stand_in, None)


def test_the_mask_is_the_support_within_the_brain(template, brain):
    half = template.maps.copy()
    half[:9] = 0
    only = replace(template, maps=half[..., :2] + half[..., 2:4])
    mask = fixed_mask(replace(only, networks=template.networks[:2]), only.maps, AFFINE)
    assert np.array_equal(mask, only.maps.any(axis=3) & brain)
    assert 1.7e6 < mni_brain_volume() < 2e6


def test_a_network_outside_the_mask_is_named(template):
    outside = template.maps.copy()
    outside[..., 2] = 0
    outside[0, 0, 0, 2] = 1
    stray = replace(template, maps=outside)
    with pytest.raises(UserError, match=r"network-003 of the template blobs\.nii lies outside the mask"):
        fixed_mask(stray, stray.maps, AFFINE)


def test_coverage_is_the_share_of_squared_values(template, brain):
    assert np.allclose(coverage(template, brain, AFFINE), 1)
    lower = brain.copy()
    lower[:, :, 9:] = False
    squares = template.maps.astype("f8") ** 2
    expected = squares[:, :, :9].sum(axis=(0, 1, 2)) / squares.sum(axis=(0, 1, 2))
    assert np.allclose(coverage(template, lower, AFFINE), expected)
    # What an image's field of view cuts off is missing, though no voxel of it is left.
    assert np.allclose(coverage(template, brain[:, :, :9], AFFINE), expected)
    with pytest.raises(UserError, match="with more than 0 % of the map"):
        require_networks(template, expected, 1.0, "the mask")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda m: m[..., 0], "has one volume"),
        (lambda m: m * [1, 1, 0, 1, 1], "network 3 of the template .* is constant"),
        (lambda m: np.full_like(m, np.nan), "network 1 of the template .* is constant"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, template, make, sentence):
    path = save(tmp_path / "maps.nii", make(template.maps).astype("f4"))
    with pytest.raises(UserError, match=sentence):
        load_template(path)
    with pytest.raises(UserError, match="there is no image"):
        load_template(tmp_path / "missing.nii")
