"""The picture in a subject's folder: it shows that subject's numbers, ordered by domain, and says what the data are."""

import json

import nibabel
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.signal import periodogram

from autospec.ica import subject as module
from autospec.ica.derivative import subject_files
from autospec.ica.picture import Shown, write_picture
from autospec.ica.subject import build_subject, build_timecourses
from autospec.ica.template import Network
from tests.ica.conftest import VOLUMES, files, save, settings

NETWORKS = [Network(1, "A", "", "DM"), Network(2, "B", "", "SC"), Network(3, "C", "", "DM"), Network(4, "D", "", "VIS")]
ORDER = [1, 3, 0, 2]  # SC, VIS, DM


def shown(**changes) -> Shown:
    generator = np.random.default_rng(0)
    square = generator.normal(size=(4, 4))
    given = {
        "title": "sub-01: 4 networks",
        "note": "Simulated data: not for conclusions about brains",
        "networks": NETWORKS,
        "match": np.array([0.1, 0.2, -0.3, 0.4]),
        "connectivity": square + square.T,
        "timecourses": generator.normal(size=(50, 4)),
        "step": 2.0,
        "displacement": generator.uniform(size=50),
        "much": 0.5,
    }
    return Shown(**{**given, **changes})


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are when they are saved."""
    figures, save_figure = [], Figure.savefig

    def savefig(self, *arguments, **options):
        figures.append(self)
        save_figure(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_numbers_stand_in_the_order_of_domains(tmp_path, drawn):
    given = shown()
    write_picture(given, tmp_path / "one.png")
    write_picture(given, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").stat().st_size < 200_000
    match, square, spectra, motion = drawn[0].axes
    heights = [segment[1][1] for segment in match.collections[0].get_segments()]
    np.testing.assert_allclose(heights, given.match[ORDER])
    assert match.get_ylim()[0] == pytest.approx(-0.3)  # a network that is found upside down is seen
    image = square.images[0].get_array().filled(0)
    np.testing.assert_allclose(image + np.diag(np.diag(given.connectivity[np.ix_(ORDER, ORDER)])), given.connectivity[np.ix_(ORDER, ORDER)])  # fmt: skip
    power = periodogram(given.timecourses, fs=0.5, window="hann", axis=0)[1][1:]
    mean = (power / power.sum(axis=0))[:, [0, 2]].mean(axis=1)
    np.testing.assert_allclose(spectra.lines[2].get_ydata(), mean)  # the last domain is DM
    np.testing.assert_array_equal(motion.lines[0].get_ydata(), given.displacement)
    said = [text.get_text() for text in drawn[0].texts]
    assert said == [given.title, given.note]


def test_what_is_not_known_is_not_drawn(tmp_path, drawn):
    unnamed = [Network(k, f"region-{k}", "", "") for k in range(1, 5)]
    write_picture(shown(networks=unnamed, match=None, displacement=None, note=""), tmp_path / "one.png")
    square, spectra = drawn[0].axes
    assert len(square.images) == len(spectra.lines) == 1


def test_names_of_networks_are_drawn_as_they_are_written(tmp_path):
    named = [Network(k, rf"$region-\{k}$", "", "") for k in range(1, 5)]
    write_picture(shown(networks=named), tmp_path / "one.png")


def test_a_subjects_picture_is_of_its_own_results(tmp_path, bold, template, monkeypatch):
    pictures = []

    def write(shown, path):
        pictures.append(shown)
        write_picture(shown, path)

    monkeypatch.setattr(module, "write_picture", write)
    image = save(tmp_path / "sub-01_bold.nii.gz", bold)
    motion = np.abs(np.random.default_rng(1).normal(size=VOLUMES))
    table = tmp_path / "confounds.tsv"
    table.write_text("framewise_displacement\n" + "\n".join(["n/a", *(f"{value:.6f}" for value in motion[1:])]) + "\n")
    description = tmp_path / "dataset_description.json"
    description.write_text(json.dumps({"Simulated": True}))
    there = files(image, confounds=str(table), description=str(description))
    build_subject(settings(drop_volumes=2), "01", there, template, tmp_path / "sub-01")
    names = subject_files("01")
    quality = json.loads((tmp_path / "sub-01" / names["quality"]).read_text())
    assert nibabel.load(tmp_path / "sub-01" / names["maps"]).shape[3] == len(pictures[0].networks)
    np.testing.assert_allclose(pictures[0].match, list(quality["TemplateMatch"].values()), rtol=1e-6)
    np.testing.assert_allclose(pictures[0].displacement, motion[2:], atol=1e-6)
    assert pictures[0].note == "Simulated data: not for conclusions about brains"
    assert pictures[0].title == f"sub-01: {len(template.networks)} networks, {VOLUMES - 2} volumes, 2 s apart"
    assert quality["Device"] in ("cpu", "cuda")
    assert (tmp_path / "sub-01" / names["picture"]).read_bytes()[:4] == b"\x89PNG"


def test_time_courses_computed_before_have_a_picture_too(tmp_path):
    table = tmp_path / "courses.tsv"
    values = np.random.default_rng(2).normal(size=(40, 3))
    table.write_text("a\tb\tc\n" + "\n".join("\t".join(map(str, row)) for row in values) + "\n")
    build_timecourses(settings(repetition_time=2.0), "01", files(str(table)), None, None, tmp_path / "sub-01")
    assert (tmp_path / "sub-01" / subject_files("01")["picture"]).is_file()
