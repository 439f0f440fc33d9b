r"""How two groups' shares of a gradient differ, measured for many labellings at once.

The shares of the two groups add up to the same matrix S under every labelling, so that of the second group is never
formed: with :math:`P = G_a G_a^\top` and :math:`Q = G_a S^\top` on the smaller side,
:math:`G_b G_b^\top = S S^\top - Q - Q^\top + P`, and that of the contrast likewise.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autospec.errors import UserError
from autospec.introspection.sample_shares import SampleShares
from autospec.introspection.spectra import noise_floor, singular_values

# For each measure: which values speak for a difference.  The first is the headline.
ALTERNATIVES = {
    "contrast": "greater",
    "difference": "two-sided",
    "cosine": "less",
    "effective_rank": "two-sided",
    "distance": "greater",
}
STATISTICS = tuple(ALTERNATIVES)
# Measures with one value for each singular value; the others have one for the whole layer.
SPECTRAL = ("contrast", "difference")


@dataclass(frozen=True)
class LabelledSpectra:
    """Spectra of two groups' shares and of their contrast under many labellings.

    Attributes
    ----------
    first, second, contrast : ndarray, shape (labellings, singular values)
        Descending; the contrast is :math:`G_a / N_a - G_b / N_b`.
    cosine : ndarray, shape (labellings,)
        Between the two groups' shares; NaN where one has none.
    """

    first: np.ndarray
    second: np.ndarray
    contrast: np.ndarray
    cosine: np.ndarray


def labelled_spectra(
    shares: SampleShares, in_first: np.ndarray, size_first: np.ndarray, size_second: np.ndarray
) -> LabelledSpectra:
    """Compute the spectra under every labelling.

    Parameters
    ----------
    shares : SampleShares
        One share for each subject compared.
    in_first : ndarray of bool, shape (labellings, subjects)
        Who is in the first group.
    size_first, size_second : ndarray, shape (labellings,)
        Samples in each group.
    """
    count = min(shares.shape)
    shares = shares.reduced()
    total = shares.total()
    whole = total @ total.mT if total.shape[0] <= total.shape[1] else total.mT @ total
    spectra = np.zeros((3, len(in_first), count))  # what the reduction left out is zero
    cosine = np.empty(len(in_first))
    for part, own, cross in shares.group_grams(in_first):
        sizes = (torch.from_numpy(size[part].astype(np.float64)).to(own.device) for size in (size_first, size_second))
        grams = gram_matrices(own, cross, whole, *sizes)
        spectra[:, part, : len(whole)] = torch.stack([singular_values([gram])[0] for gram in grams]).cpu().numpy()
        first, second, twice = (each.diagonal(dim1=1, dim2=2).sum(1) for each in (*grams[:2], cross))
        cosine[part] = ((twice / 2 - first) / (first * second).sqrt()).clamp(-1, 1).cpu().numpy()
    ranks, everyone = in_first @ shares.ranks, np.full(len(in_first), shares.ranks.sum())
    cosine[(ranks == 0) | (ranks == everyone)] = np.nan
    for each, rank in zip(spectra, (ranks, everyone - ranks, everyone), strict=True):
        each[np.arange(count) >= rank[:, None]] = 0  # roots of rounding, which would count in the effective rank
    return LabelledSpectra(spectra[0], spectra[1], spectra[2], cosine)


def gram_matrices(
    own: Tensor, cross: Tensor, whole: Tensor, size_first: Tensor, size_second: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrices of the first group's share, of the second's, and of their contrast.

    Parameters
    ----------
    own, cross : Tensor
        Of the first group's share under each labelling, as `SampleShares.group_grams` gives them, shape (B, s, s).
    whole : Tensor
        Gram matrix of the sum of both groups' shares, shape (s, s).
    size_first, size_second : Tensor
        Samples in each group, shape (B,), float64.

    Returns
    -------
    tuple of Tensor
        Three of shape (B, s, s), of which the lower triangles are valid.
    """
    second = torch.sub(whole, cross).add_(own)
    # The contrast is G_a (1 / N_a + 1 / N_b) - S / N_b.
    of_first, of_whole = ((1 / size)[:, None, None] for size in (size_first, size_second))
    of_first = of_first + of_whole
    contrast = (own * of_first.square()).addcmul_(cross, of_first * of_whole, value=-1)
    return own, second, contrast.addcmul_(whole, of_whole.square())


def effective_rank(spectrum: np.ndarray) -> np.ndarray:
    """Exponential of the entropy of the singular values, taken as parts of their sum, over the last axis.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.  NaN for a zero matrix.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = spectrum / spectrum.sum(-1, keepdims=True)
        terms = np.where(parts > 0, parts * np.log(parts), np.where(np.isnan(parts), np.nan, 0.0))
    return np.exp(-terms.sum(-1))


def measure(spectra: LabelledSpectra, statistic: str, size_first: np.ndarray, size_second: np.ndarray) -> np.ndarray:
    """One measure under every labelling.

    Parameters
    ----------
    spectra : LabelledSpectra
        The spectra.
    statistic : str
        ``contrast``: spectrum of the contrast.  ``difference``: of the two groups' spectra, each divided by the group's
        samples.  ``cosine``: between the shares.  ``effective_rank``: difference of the shares' effective ranks.
        ``distance``: Frobenius norm of the contrast.
    size_first, size_second : ndarray, shape (labellings,)
        Samples in each group.

    Returns
    -------
    ndarray, shape (labellings, values)
        One value, or one for each singular value.
    """
    if statistic == "contrast":
        return spectra.contrast
    if statistic == "difference":
        return spectra.first / size_first[:, None] - spectra.second / size_second[:, None]
    if statistic == "cosine":
        return spectra.cosine[:, None]
    if statistic == "effective_rank":
        return (effective_rank(spectra.first) - effective_rank(spectra.second))[:, None]
    if statistic == "distance":
        return np.sqrt(np.square(spectra.contrast).sum(1, keepdims=True))
    raise ValueError(f"unknown statistic {statistic!r}")


def resolved(
    spectra: LabelledSpectra,
    statistic: str,
    size_first: np.ndarray,
    size_second: np.ndarray,
    shape: tuple[int, int],
    rows: tuple[np.ndarray, np.ndarray],
    dtype: torch.dtype,
) -> np.ndarray:
    """Whether each value lies above the noise floor under each labelling.

    A difference needs both groups' values above their own floors; the whole layer's measures need the largest value, and
    effective ranks the second as well: every share of a head of two classes has rank one, and what rounding makes of the
    second value is no difference.

    Parameters
    ----------
    spectra : LabelledSpectra
        The spectra.
    statistic : str
        The measure.
    size_first, size_second : ndarray, shape (labellings,)
        Samples in each group.
    shape : (int, int)
        Shape of the parameter's matrix.
    rows : (ndarray, ndarray), each of shape (labellings,)
        Rows of each group.
    dtype : torch.dtype
        The type in which the model computed.

    Returns
    -------
    ndarray of bool, shape (labellings, values)
    """
    floors = [
        noise_floor(spectrum[:, 0], shape, count, dtype, "gradient")
        for spectrum, count in zip((spectra.first, spectra.second), rows, strict=True)
    ]
    if statistic in ("contrast", "distance"):
        above = spectra.contrast > (floors[0] / size_first + floors[1] / size_second)[:, None]
    else:
        above = (spectra.first > floors[0][:, None]) & (spectra.second > floors[1][:, None])
    return above if statistic in SPECTRAL else above[:, deciding(statistic, above.shape[1])]


def deciding(statistic: str, values: int) -> slice:
    """Which singular value must be resolved for a measure of the whole layer, of so many."""
    return slice(1, 2) if statistic == "effective_rank" and values > 1 else slice(0, 1)


def values_possible(statistic: str, shape: tuple[int, int], ranks: tuple[np.ndarray, np.ndarray]) -> int:
    """How many values of a measure the ranks of the groups' shares allow under every labelling to differ from zero."""
    if statistic not in SPECTRAL:
        return 1
    if statistic == "contrast":
        return int(min(*shape, ranks[0][0] + ranks[1][0]))
    return int(min(*shape, ranks[0].min(), ranks[1].min()))


def checked(statistics: Collection[str]) -> tuple[str, ...]:
    """Statistics in a fixed order.

    Raises
    ------
    UserError
        If there is none, or one is not known.
    """
    unknown = [name for name in statistics if name not in STATISTICS]
    if unknown or not statistics or isinstance(statistics, str):
        raise UserError(f"statistics={statistics!r}: choose one or more of {list(STATISTICS)} in a list.")
    return tuple(name for name in STATISTICS if name in statistics)
