"""What a participant's own job tells the jobs that bring a cohort together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from autospec.cohort.files import digest_of, read_json
from autospec.ica.derivative import STATUS, subject_files, write_json
from autospec.storage import written_whole


def complete_status(folder: str, subject: str, files: Iterable[str]) -> None:
    """Add the digest of what was read, and the volumes that were used, to a participant's status.

    Parameters
    ----------
    folder : str
        The participant's folder, finished.
    subject : str
        Id, without ``sub-``.
    files : iterable of str
        What was read, in the order of the cohort's table; missing ones are left out.
    """
    path = Path(folder) / STATUS
    status = read_json(path)
    if status["status"] == "included":
        status["volumes"] = read_json(Path(folder) / subject_files(subject)["quality"])["Volumes"]
        status["digest"] = digest_of(file for file in dict.fromkeys(files) if file)
    with written_whole(path) as temporary:
        write_json(status, temporary)
