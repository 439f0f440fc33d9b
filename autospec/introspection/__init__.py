"""Spectral introspection of training: hooks, spectra, groups.  Imports nothing else of autospec."""

from .errors import WatchError
from .ranks import rank_bound
from .watcher import SPECTRA, STATISTICS, Watcher

__all__ = ["SPECTRA", "STATISTICS", "WatchError", "Watcher", "rank_bound"]
