"""Small files as text: tables without any guessing of types, and what can be said of a file without opening an image."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autospec.errors import UserError

# A pointer that git-annex or git-lfs leaves in the place of a file is a few lines of text.
LONGEST_POINTER = 2048
BLOCK = 1 << 20
DELIMITERS = ("\t", ",", ";")


@dataclass(frozen=True)
class TextTable:
    """A table as text: column names and rows, without white space around the cells."""

    path: str
    columns: list[str]
    rows: list[list[str]]


def read_text(path: str | Path) -> str:
    """Read a text file, gzipped or not.

    Raises
    ------
    UserError
        If it is missing, damaged, no text, or a pointer to content that was not fetched.
    """
    if problem := file_problem(path):
        raise UserError(f"{problem}.")
    try:
        data = Path(path).read_bytes()
        if data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
            raise UserError(
                f"{path} is a workbook, as of Excel, and no text: save its sheet as CSV, and name that file."
            )
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"the gzipped file {path} is damaged or cut short: copy it again.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8: save it again with that encoding.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def read_table(path: str | Path) -> TextTable:
    """Read a table of values separated by tabs, commas, semicolons or, failing these, spaces, all as text.

    Nothing is guessed: ``0040000`` keeps its zeros and ``None`` stays a word.

    Raises
    ------
    UserError
        If the file cannot be read, is empty, or a row has another number of cells than the header.
    """
    text = io.StringIO(read_text(path), newline=None).read()  # a line may end as on an old Mac
    header = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=header.count) if any(each in header for each in DELIMITERS) else " "
    parsed = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=delimiter == " ")
    lines, begin = [], 1
    try:
        for line in parsed:
            lines.append([cell.strip() for cell in line])
            begin = parsed.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"the table {path} cannot be read from line {begin} on ({error}): is a quotation mark not closed?"
        ) from None
    lines = [line for line in lines if any(line)]
    if not lines:
        raise UserError(f"the table {path} is empty: it should have a line of column names and a line for each row.")
    columns = lines[0]
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(columns):
            raise UserError(
                f"row {number} of the table {path} has {len(line)} cells, but the header names {len(columns)} columns: "
                "is a cell with a comma or tab not quoted?"
            )
    return TextTable(str(path), columns, lines[1:])


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; raises UserError if it does not."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): correct it, or remove it.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold names with values, in braces, and holds a {type(content).__name__}.")
    return content


def file_problem(path: str | Path) -> str:
    """Say why a file cannot be read, or nothing; looks at no more than a pointer's few bytes.

    Returns
    -------
    str
        Words without a full stop, or an empty string where the file is there.
    """
    path = Path(path)
    fetch = "its content was not fetched (run  datalad get  or  git annex get  on it)"
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        if path.is_symlink():
            target = os.readlink(path)
            return f"{path} is a git-annex pointer; {fetch}" if "annex/objects" in target else f"{path} is a dead link"
        return f"{path} does not exist"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if path.is_dir():
        return f"{path} is a folder, not a file"
    if size == 0:
        return f"{path} is empty"
    if size <= LONGEST_POINTER:
        beginning = path.read_bytes()[:200]
        if b"/annex/objects/" in beginning:
            return f"{path} is a git-annex pointer; {fetch}"
        if beginning.startswith(b"version https://git-lfs"):
            return f"{path} is a git-lfs pointer; its content was not fetched (run  git lfs pull)"
    return ""


def digest_of(paths: Iterable[str]) -> str:
    """Beginning of the SHA-256 of some files' content, one after the other; empty where there are no files."""
    state, any_file = hashlib.sha256(), False
    for path in paths:
        any_file = True
        try:
            with Path(path).open("rb") as file:
                while block := file.read(BLOCK):
                    state.update(block)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return state.hexdigest()[:16] if any_file else ""


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Key that sorts numbers within text by size: run-2 before run-10."""
    parts = re.split(r"(\d+)", text)
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]


def existing(*paths: str | Path) -> str:
    """The first of some files that is there, or an empty string; a pointer counts, so that it is reported as one."""
    return next((str(path) for path in paths if os.path.lexists(path)), "")


def listed(names: list[str], most: int = 6) -> str:
    """Names in a sentence, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
