"""Data sets: every source becomes the same labelled store of x, target and groupings."""
