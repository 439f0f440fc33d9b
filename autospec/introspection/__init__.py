"""Spectral introspection of training: hooks, spectra, groups.  Imports torch, numpy and xarray alone."""

from .errors import WatchError
from .watcher import STATISTICS, Watcher

__all__ = ["STATISTICS", "WatchError", "Watcher"]
