"""A synthetic subject with GIFT's answer, and small images, settings and files of one subject."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from autospec.ica.template import Template, mni_brain, neuromark_peaks, numbered_networks, template_digest

DATA = Path(__file__).parent / "data"
AFFINE = np.array([[9.0, 0, 0, -78], [0, 9, 0, -112], [0, 0, 9, -70], [0, 0, 0, 1]])
SHAPE = (18, 21, 18)
NETWORKS = 5
VOLUMES = 60

SETTINGS = {
    "drop_volumes": 0,
    "smoothing_fwhm_mm": 0.0,
    "confounds": "none",
    "repetition_time": None,
    "min_volumes": 20,
    "max_mean_fd_mm": None,
    "despike": True,
    "low_pass_hz": 0.15,
    "on_bad_subject": "fail",
    "already_done": {},
    "grid": "template",
    "confounds_on": "image",
    "preprocessing": 1,
    "dtype": "float32",
    "converged": False,
    "scaling": "z-score",
    "min_coverage": 0.1,
    "gift_number": None,
}


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Signed correlation of each row with the same row."""
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])


def settings(**changes):
    return {**SETTINGS, **changes}


def files(bold, **others):
    return {"bold": str(bold), "sidecar": None, "confounds": None, "description": None, "mask": None, **others}


def save(path, values, affine=AFFINE, step=2.0, kind=nib.Nifti1Image, unit="sec"):
    """Write an image with its own type and byte order; returns the path."""
    image = kind(values, affine)
    if values.ndim > 3:
        image.header.set_xyzt_units("mm", unit)
        if step is not None:
            image.header.set_zooms((*image.header.get_zooms()[:3], step, *image.header.get_zooms()[4:]))
    nib.save(image, path)
    return path


@pytest.fixture(scope="session")
def gift():
    """One synthetic subject, and what GIFT's program made of it."""
    with np.load(DATA / "scica_synthetic.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def brain() -> np.ndarray:
    return mni_brain(SHAPE, AFFINE)


@pytest.fixture(scope="session")
def template(brain) -> Template:
    """Five blobs, on a grid of 9 mm."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    millimetres = grid @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    peaks = neuromark_peaks()[[0, 7, 17, 28, 44]]
    maps = np.exp(-((millimetres[..., None, :] - peaks) ** 2).sum(-1) / (2 * 14.0**2)).astype(np.float32)
    maps[~brain] = 0
    return Template(
        maps, AFFINE, "custom template", template_digest(maps, AFFINE), numbered_networks(NETWORKS), "blobs.nii"
    )


@pytest.fixture(scope="session")
def bold(template, brain) -> np.ndarray:
    """A subject of 60 volumes: the blobs with slow time courses, and noise."""
    generator = np.random.default_rng(11)
    courses = generator.normal(size=(VOLUMES, NETWORKS))
    for t in range(1, VOLUMES):
        courses[t] += 0.8 * courses[t - 1]
    signal = 1000 + 60 * template.maps @ courses.T + generator.normal(scale=6, size=(*SHAPE, VOLUMES))
    return (signal * brain[..., None]).astype(np.float32)


@pytest.fixture
def subject(tmp_path, bold) -> Path:
    """The subject's image."""
    return save(tmp_path / "sub-01_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz", bold)
