"""MOO-ICAR written from the equations a second time: NumPy, float64, one network after the other, nothing left out."""

import numpy as np


def mean_log_cosh(y: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(y, -y) - np.log(2)))


def plain_moo_icar(bold: np.ndarray, references: np.ndarray, relative: float = 1e-10):
    """Maps (networks, voxels), time courses (volumes, networks) and accepted steps (networks,)."""
    bold, references = bold.astype(np.float64), references.astype(np.float64)
    voxels = bold.shape[1]
    centred = bold - bold.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(centred @ centred.T / voxels)
    order = [k for k in np.argsort(-values) if values[k] > relative * values.max()]
    white = np.diag(values[order] ** -0.5) @ vectors[:, order].T @ centred
    if len(order) < len(bold):
        white = white / white.std(axis=1, ddof=1, keepdims=True)
    maps, steps = [], []
    for reference in references:
        r = (reference - reference.mean()) / reference.std(ddof=1)
        found, count = one_component(white, r)
        maps.append(found @ white)
        steps.append(count)
    return np.array(maps), centred @ np.array(maps).T / voxels, np.array(steps)


def one_component(white: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, int]:
    voxels = white.shape[1]
    b = white @ r / voxels
    w = np.linalg.lstsq(white.T, r, rcond=None)[0]
    w = w / np.linalg.norm(w)
    j0 = (mean_log_cosh(w @ white) - 0.3745672075) ** 2
    c = np.tan(np.pi / 2 * (w @ b)) / j0

    def value(w):
        return np.arctan(c * (mean_log_cosh(w @ white) - 0.3745672075) ** 2) / np.pi + w @ b / 2

    def gradient(w):
        y = w @ white
        contrast = mean_log_cosh(y) - 0.3745672075
        inner = 2 * contrast * (white @ np.tanh(y)) / voxels
        return c / (1 + (c * contrast**2) ** 2) * inner / np.pi + b / 2

    here, slope, step, visited, trial = value(w), gradient(w), 1.0, 1, w
    for _ in range(100):
        length = np.linalg.norm(slope)
        trial = w + step * slope / length
        trial = trial / np.linalg.norm(trial)
        there = value(trial)
        if there - here < 0.02 * step * length:
            step = step / 2
        elif np.sum((w - trial) ** 2) < 1e-5:
            break
        else:
            w, here, slope, visited = trial, there, gradient(trial), visited + 1
    return trial, visited
