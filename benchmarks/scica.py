"""What spatially constrained ICA of one subject costs: autospec.ica.moo_icar, and what one would use instead.

``python benchmarks/scica.py`` prints one markdown table for a subject of COBRE's size: 60,304 voxels, 150 volumes, 53
references.  What counts is processor time of one thread, or with ``--device cuda`` wall time between
synchronisations, copies to and from the device included.  The column "lowest r" is the smallest signed correlation,
over the 53 networks, with moo_icar's own result in float64: 1 for another route to the same result, less for another
method.  The subject is simulated from a seed: blobs at NeuroMark's peaks, displaced by some millimetres, sparse
sources that no reference knows, and as little noise as smoothed data have, so that the line search has steps to take.

``--subject`` measures a participant's whole job instead, from the start of Python to the last file: reading a gzipped
image, smoothing, networks, and all that is written, as the workflow's command reports it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from autospec.ica import moo_icar
from autospec.ica.template import BLOB_SIGMA_MM, STAND_IN_AFFINE, STAND_IN_SHAPE, mni_brain, neuromark_peaks

VOXELS, VOLUMES = 60_304, 150
HIDDEN_SOURCES = 60
Result = tuple[np.ndarray, np.ndarray]  # maps (networks, voxels), time courses (volumes, networks)


def simulate(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw intensities (volumes, voxels) and references (networks, voxels), float32."""
    generator = np.random.default_rng(seed)
    places = np.argwhere(mni_brain(STAND_IN_SHAPE, STAND_IN_AFFINE))[:VOXELS]
    millimetres = places @ STAND_IN_AFFINE[:3, :3].T + STAND_IN_AFFINE[:3, 3]

    def blobs(peaks: np.ndarray, sigma: float) -> np.ndarray:
        distances = np.array([((millimetres - peak) ** 2).sum(axis=1) for peak in peaks])
        return np.exp(-distances / (2 * sigma**2)).astype(np.float32)

    peaks = neuromark_peaks()
    references = blobs(peaks, BLOB_SIGMA_MM)
    own = blobs(peaks + generator.normal(scale=8, size=peaks.shape), 7.0)
    hidden = blobs(millimetres[generator.choice(VOXELS, HIDDEN_SOURCES)], 9.0)
    sources = np.concatenate([own, hidden])
    courses = generator.normal(size=(VOLUMES, len(sources)))
    for t in range(1, VOLUMES):
        courses[t] += 0.7 * courses[t - 1]
    anatomy = 8000 + 800 * np.sin(millimetres[:, 0] / 17) * np.cos(millimetres[:, 1] / 23)
    bold = anatomy + 60 * courses @ sources + 5 * generator.normal(size=(VOLUMES, VOXELS))
    return bold.astype(np.float32), references


def ours(**options: object) -> Callable[[np.ndarray, np.ndarray], Result]:
    def run(bold: np.ndarray, references: np.ndarray) -> Result:
        found = moo_icar(bold, references, **options)  # type: ignore[arg-type]
        return found.maps, found.timecourses

    return run


def loop(bold: np.ndarray, references: np.ndarray) -> Result:
    """The tests' second implementation: all 100 loops, one network after the other."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.ica.loop import plain_moo_icar

    return plain_moo_icar(bold, references)[:2]


def dual_regression() -> Callable[[np.ndarray, np.ndarray], Result]:
    """Dual regression with nilearn: time courses of the references, then a map of each time course."""
    import nibabel
    from nilearn.glm.first_level import run_glm
    from nilearn.regions import img_to_signals_maps

    brain = mni_brain(STAND_IN_SHAPE, STAND_IN_AFFINE)
    brain.flat[np.flatnonzero(brain)[VOXELS:]] = False
    mask = nibabel.Nifti1Image(brain.astype(np.uint8), STAND_IN_AFFINE)
    images: dict[int, nibabel.Nifti1Image] = {}

    def image(rows: np.ndarray) -> nibabel.Nifti1Image:
        """Rows (volumes, voxels) as an image, made once: reading is no part of what is compared."""
        if id(rows) not in images:
            values = np.zeros((*brain.shape, len(rows)), dtype=np.float32)
            values[brain] = rows.T
            images[id(rows)] = nibabel.Nifti1Image(values, STAND_IN_AFFINE)
        return images[id(rows)]

    def run(bold: np.ndarray, references: np.ndarray) -> Result:
        timecourses, _ = img_to_signals_maps(image(bold), image(references), mask_img=mask)
        design = timecourses - timecourses.mean(axis=0)
        _, results = run_glm(bold - bold.mean(axis=0), design, noise_model="ols")
        return results[0.0].theta, timecourses

    return run


def measure(run: Callable[[np.ndarray, np.ndarray], Result], data: Result, rounds: int, cuda: bool) -> tuple:
    """The result, and the median of the seconds that it took; where it is run several times, a first time without."""
    if rounds > 1:
        run(*data)
    clock = time.perf_counter if cuda else time.process_time
    seconds, result = [], None
    for _ in range(rounds):
        started = clock()
        result = run(*data)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return result, statistics.median(seconds)


def lowest(found: np.ndarray, expected: np.ndarray) -> str:
    rows = (np.corrcoef(a, b)[0, 1] for a, b in zip(found, expected, strict=True))
    r = min(rows)
    return f"1 - {1 - r:.0e}" if r > 0.999 else f"{r:.3f}"


def write_image(path: Path, shape: tuple[int, ...], affine: np.ndarray, seed: int) -> int:
    """Write a gzipped int16 image of brain and noise, 150 volumes; return its bytes on the disk."""
    import nibabel

    brain = mni_brain(shape, affine)
    generator = np.random.default_rng(seed)
    values = np.zeros((*shape, VOLUMES), dtype=np.int16)
    smooth = generator.normal(size=(VOLUMES, 20)).cumsum(axis=0) @ generator.normal(size=(20, int(brain.sum())))
    values[brain] = (8000 + 20 * smooth + 40 * generator.normal(size=smooth.shape)).T
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms((*image.header.get_zooms()[:3], 2.0))
    nibabel.save(image, path)
    return path.stat().st_size


def measure_subject(seed: int) -> None:
    """Print what a participant's job costs for images of 3 mm and of 2 mm, as fMRIPrep writes them."""
    ica = {"drop_volumes": 0, "smoothing_fwhm_mm": 6.0, "confounds": "none", "repetition_time": None, "min_volumes": 0}
    ica |= {"max_mean_fd_mm": None, "despike": True, "low_pass_hz": 0.15, "already_done": {}, "grid": "template"}
    ica |= {"confounds_on": "image", "preprocessing": 1, "dtype": "float32", "converged": False, "scaling": "z-score"}
    ica |= {"min_coverage": 0.1, "gift_number": None}
    spec = json.dumps({"settings": {"subject": "01", "stand_in": True, "ica": ica}, "code": ""})
    fine = np.diag([2.0, 2, 2, 1])
    fine[:3, 3] = -96, -132, -78
    print("| image | MB gzipped | CPU seconds | peak memory, GiB | MB written |")
    print("|---|---|---|---|---|")
    for shape, affine in ((STAND_IN_SHAPE, STAND_IN_AFFINE), ((97, 115, 97), fine)):
        with tempfile.TemporaryDirectory() as place:
            image, output, used = (Path(place) / name for name in ("bold.nii.gz", "sub-01", "used.json"))
            size = write_image(image, shape, affine, seed)
            command = ["-m", "autospec", "subject", "--spec", spec, "--device", "cpu", "--bold", str(image)]
            command += ["--output", str(output), "--resources", str(used)]
            alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            before = os.times()
            subprocess.run([sys.executable, *command], check=True, env=alone, capture_output=True)
            after = os.times()
            seconds = after.children_user - before.children_user + after.children_system - before.children_system
            memory = json.loads(used.read_text())["peak_memory_mib"] / 1024
            written = sum(file.stat().st_size for file in output.iterdir()) / 1e6
        edge = f"{' x '.join(map(str, shape))} voxels of {affine[0, 0]:g} mm"
        print(f"| {edge} | {size / 1e6:.0f} | {seconds:.1f} | {memory:.2f} | {written:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is shown; the loop runs once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subject", action="store_true", help="measure a participant's whole job")
    options = parser.parse_args()
    if options.subject:
        measure_subject(options.seed)
        return
    cuda = options.device == "cuda"
    torch.set_num_threads(1)
    threadpool_limits(1)
    data = simulate(options.seed)
    on = {"device": options.device}
    contestants = {
        "**moo_icar**, float32": (ours(dtype="float32", **on), options.rounds),
        "moo_icar, float64": (ours(dtype="float64", **on), options.rounds),
        "moo_icar, float32, converged=True": (ours(dtype="float32", converged=True, **on), options.rounds),
        "plain numpy loop, float64": (loop, 1),
        "dual regression (nilearn), float32": (dual_regression(), options.rounds),
    }
    if cuda:
        contestants = {name: each for name, each in contestants.items() if "moo_icar" in name}
        ours(**on)(*data)  # the first call loads kernels
    expected = moo_icar(*data, dtype="float64")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy"))
    where = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()}, one thread"
    print(f"{VOXELS} voxels, {VOLUMES} volumes, {len(data[1])} references, seed {options.seed}; {where}; {versions}.")
    print(f"Weightings visited by the line search: {expected.accepted_steps.mean():.1f} a network.\n")
    print(f"| what | {'wall' if cuda else 'CPU'} seconds | lowest r of maps | lowest r of time courses |")
    print("|---|---|---|---|")
    for name, (run, rounds) in contestants.items():
        (maps, timecourses), seconds = measure(run, data, rounds, cuda)
        likeness = lowest(maps, expected.maps), lowest(timecourses.T, expected.timecourses.T)
        print(f"| {name} | {seconds:.2f} | {likeness[0]} | {likeness[1]} |", flush=True)


if __name__ == "__main__":
    main()
