"""Figures: panels of spectra and of group differences, and the pages composed of them."""
