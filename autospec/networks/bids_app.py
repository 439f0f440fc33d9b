"""Networks of fMRIPrep's derivatives without a workflow, with the arguments of a BIDS App."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from autospec.cohort.bids import find_scans
from autospec.cohort.files import listed, natural_key
from autospec.cohort.layouts import DESCRIPTION, description_of, is_simulated
from autospec.cohort.mixed import differences, require_one_task
from autospec.cohort.subjects import Done, Scan
from autospec.config import Ica, parse_config
from autospec.errors import UserError
from autospec.ica.moo_icar import device_of
from autospec.ica.template import load_template
from autospec.networks.subject import NetworksFiles, build_networks
from autospec.participants import cohort_settings, network_settings
from autospec.storage import written_whole


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    labels: list[str] | None
    """Participants, with or without ``sub-``; None for all."""
    images: dict[str, str | None]
    """Task, session, run and space of the images."""
    ica: dict[str, Any]
    """Settings that differ from the defaults, as under ``ica`` in a config."""
    on_bad_subject: Literal["fail", "exclude"] = "fail"
    device: str = "auto"
    """Where components are computed."""


def analyse_derivatives(derivatives: str, output: str, request: Request) -> str:
    """Find the networks of some participants, one after the other.

    Parameters
    ----------
    derivatives : str
        fMRIPrep's output.
    output : str
        Folder of a data set of derivatives: a description, and a folder a participant.
    request : Request

    Returns
    -------
    str
        One line that says what was made.

    Raises
    ------
    UserError
        If an argument, the template or, unless bad subjects are excluded, a participant's files cannot be used; or if
        images are of different tasks.
    """
    chosen = {name: value for name, value in request.images.items() if value is not None}
    device_of(request.device)
    config = parse_config(
        {"cohort": {"kind": "folder", "folder": derivatives, **chosen}, "ica": request.ica}, "the command line"
    )
    if not Path(derivatives).is_dir():
        raise UserError(f"there is no folder {derivatives}: give fMRIPrep's output.")
    template = str(config.ica.template)
    load_template(template)  # before any participant, so that a mistake there is found at once
    root, scans, problems = find_scans(derivatives, cohort_settings(config))
    wanted = _wanted(request.labels, list(scans), str(root))
    images = {name: scans[name] for name in wanted}
    require_one_task(images)
    for difference in differences(images):
        print(f"warning: {difference}", file=sys.stderr, flush=True)
    _describe(output, derivatives)
    excluded = 0
    for number, name in enumerate(wanted, start=1):
        problem = problems[name] or ("" if scans[name] else "it has no preprocessed image")
        if problem and request.on_bad_subject == "fail":
            raise UserError(f"sub-{name} cannot be used: {problem}; correct the data, or use --on-bad-subject exclude.")
        if problem:
            excluded += 1
            said = f"sub-{name}: excluded, {problem}"
        else:
            said = _analyse(name, number, scans[name][0], template, config.ica, request, output)
            excluded += ": excluded, " in said
        print(f"{said} ({number} of {len(wanted)})", file=sys.stderr, flush=True)
    return f"{output}: networks of {len(wanted) - excluded} participants, {excluded} left out"


def _analyse(name: str, number: int, scan: Scan, template: str, ica: Ica, request: Request, output: str) -> str:
    done = Done(smoothing_mm=0.0, confounds="none")
    files: NetworksFiles = {
        "bold": scan.bold,
        "sidecar": scan.sidecar or None,
        "confounds": scan.confounds or None,
        "description": description_of(scan.bold) or None,
        "mask": None,
        "template": None if template == "stand-in" else template,
        "atlas": None,
    }
    chosen: Any = network_settings(ica, done, number if ica.gift_files else None)
    settings: Any = {"subject": name, "stand_in": template == "stand-in", "ica": chosen}
    return build_networks(settings, files, request.on_bad_subject, str(Path(output) / f"sub-{name}"), request.device)


def _wanted(labels: list[str] | None, there: list[str], root: str) -> list[str]:
    if labels is None:
        return sorted(there, key=natural_key)
    names = [label.removeprefix("sub-") for label in labels]
    if missing := [name for name in names if name not in there]:
        raise UserError(f"{root} has no {listed([f'sub-{name}' for name in missing])}: check --participant-label.")
    return list(dict.fromkeys(names))


def _describe(output: str, derivatives: str) -> None:
    """Write what the folder of results is."""
    content: dict[str, Any] = {
        "Name": "Networks found by spatially constrained ICA",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "autospec", "Version": metadata.version("autospec-neuro")}],
    }
    if is_simulated(derivatives):
        content["Simulated"] = True
    with written_whole(Path(output) / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
