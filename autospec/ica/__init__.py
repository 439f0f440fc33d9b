"""Spatially constrained ICA: from one subject's images to networks' maps, time courses and connectivity."""

from autospec.ica.moo_icar import MooIcar, moo_icar

__all__ = ["MooIcar", "moo_icar"]
