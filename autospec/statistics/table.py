"""The table of tests, as it is written and read: labels of groups stay text, whatever they look like."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from autospec.storage import written_whole

TEXT = ("layer", "statistic", "group_a", "group_b", "test")
NUMBERS = ("t_student", "p_student", "t_welch", "p_welch")


def write_tests(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table of tests, tab-separated; it appears whole or not at all."""
    with written_whole(path) as temporary:
        table.to_csv(temporary, sep="\t", index=False, float_format="%.8g")


def read_tests(path: str | Path) -> pd.DataFrame:
    """Read a table of tests; labels such as "0" and "NA" stay text."""
    missing = {column: [""] for column in NUMBERS}
    return pd.read_csv(path, sep="\t", dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=missing)
