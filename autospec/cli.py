"""The command line: one command a stage, called by the workflow's rules and useful alone.

It parses arguments, hands them to the stage's module, and puts errors into one sentence.  Stages are imported
when they run, so that a figure never waits for torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autospec.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Command-line arguments; those of the process by default.

    Returns
    -------
    int
        0, or 1 after a mistake that one sentence on standard error explains, or where nobody reads what is printed.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    started, cpu_started = time.monotonic(), time.process_time()
    try:
        message, host = options.run(options)
        if getattr(options, "resources", None):
            write_resources(options.resources, time.monotonic() - started, time.process_time() - cpu_started, host)
    except (UserError, OSError) as error:
        print(f"autospec: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        if type(error).__name__ != "WatchError":
            raise
        print(f"autospec: {error}", file=sys.stderr)
        return 1
    try:
        print(message, file=sys.stderr if getattr(options, "spec", None) else sys.stdout, flush=True)
    except BrokenPipeError:  # whoever reads has enough, such as head; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def write_resources(path: str, wall_seconds: float, cpu_seconds: float, host: dict[str, Any]) -> None:
    """Record what a stage used, beside its output.

    Parameters
    ----------
    path : str
        JSON file to write.
    wall_seconds, cpu_seconds : float
        Time taken; processor time counts all threads.
    host : dict
        Where it ran, for a training.
    """
    import resource

    from autospec.storage import written_whole

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mebibytes = peak / (1024 if sys.platform != "darwin" else 1024**2)
    record = {
        "wall_seconds": round(wall_seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_memory_mib": round(mebibytes, 1),
        **host,
    }
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """Describe every command."""
    parser = argparse.ArgumentParser(prog="autospec", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], tuple[str, dict[str, Any]]], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    def stage(name: str, run: Callable[[Any], tuple[str, dict[str, Any]]], help: str) -> argparse.ArgumentParser:
        sub = command(name, run, help)
        sub.add_argument("--spec", required=True, help="JSON text with the settings, as the Snakefile writes it")
        sub.add_argument("--resources", help="JSON file that records time and memory used")
        return sub

    sub = stage("dataset", _dataset, "build a labelled data set")
    sub.add_argument("--files", nargs="*", default=[], help="images and labels, where they come from files")
    sub.add_argument("--output", required=True)

    sub = stage("sinusoids", _sinusoids, "make a labelled data set of sinusoids")
    sub.add_argument("--output", required=True)

    sub = stage("simulate", _simulate, "write the simulated cohort")
    sub.add_argument("--output", required=True, help="its dataset_description.json; all else stands beside it")

    sub = stage("subject", _subject, "find one participant's networks")
    for name, help in {
        "bold": "4-D image",
        "sidecar": "JSON file of the image",
        "confounds": "table of confounds",
        "description": "dataset_description.json of the cohort",
        "mask": "mask in place of the template's",
        "template": "4-D image with a network a volume",
        "atlas": "image of regions instead of a template",
    }.items():
        sub.add_argument(f"--{name}", nargs="?", const="", default="", required=name == "bold", help=help)
    _add_bad_subject(sub)
    _add_networks_device(sub)
    sub.add_argument("--output", required=True, help="the participant's folder")

    sub = stage("precomputed", _precomputed, "take one participant's networks as GIFT or TReNDS computed them")
    for name, help in {
        "timecourses": "file of time courses",
        "maps": "file of maps",
        "mask": "mask whose voxels the maps list",
        "components": "table of the components to keep",
        "description": "dataset_description.json of the cohort",
    }.items():
        sub.add_argument(f"--{name}", nargs="?", const="", default="", required=name == "timecourses", help=help)
    _add_bad_subject(sub)
    sub.add_argument("--output", required=True, help="the participant's folder")

    sub = stage("gift-mask", _gift_mask, "make GIFT's mask of a cohort")
    sub.add_argument("--output", required=True)

    sub = stage("cohort", _cohort, "write the cohort's tables")
    sub.add_argument("--folders", nargs="*", default=[], help="folder of each functional participant")
    sub.add_argument("--output", required=True, help="participants.tsv; the other tables stand beside it")

    sub = stage("gift-scaling", _gift_scaling, "scale maps as GIFT does, by the mean maps of a cohort")
    _add_participants(sub)

    sub = stage("timeseries", _timeseries, "build a data set of networks' time courses")
    _add_participants(sub)

    sub = stage("maps", _maps, "build a data set of aggregated maps")
    _add_participants(sub)
    sub.add_argument("--scaled", nargs="?", help="folder of maps in GIFT's scaling, to be used instead")

    sub = stage("volumes", _volumes, "build a data set of FreeSurfer's volumes")
    sub.add_argument("--participants", required=True, help="the cohort's participants.tsv")
    sub.add_argument("--output", required=True)

    sub = stage("view", _view, "draw one picture of the cohort's quality")
    sub.add_argument("--participants", required=True, help="the cohort's participants.tsv")
    sub.add_argument("--folders", nargs="*", default=[], help="folder of each functional participant")
    sub.add_argument("--output", required=True, nargs="+")

    sub = stage("train", _train, "train a network and record its spectra")
    sub.add_argument("--dataset", required=True)
    sub.add_argument("--work", required=True, help="folder in which trajectories grow meanwhile")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    sub.add_argument("--checkpoint-minutes", type=float, default=2.0, help="minutes between checkpoints")
    sub.add_argument("--checkpoint-updates", type=int, help="updates between checkpoints, instead of minutes")
    sub.add_argument("--weights", help="file for the weights at some updates")
    sub.add_argument("--output", required=True)

    sub = stage("permute", _permute, "test groups by permuting labels of what has not seen them")
    sub.add_argument("--dataset", required=True)
    sub.add_argument("--weights", required=True, nargs="+", help="weights of the run, one file a seed")
    sub.add_argument("--work", required=True, help="folder in which finished steps are kept meanwhile")
    sub.add_argument("--output", required=True)
    sub.add_argument("--described", required=True, help="JSON file that describes the test")
    sub.add_argument("--confounds", required=True, help="table that asks whether it is just motion")
    sub.add_argument("--null", nargs="?", help="store of the statistics under every labelling, where they are kept")
    sub.add_argument("--refit", nargs="?", help="table of what the run's refits say on motion and the like, if any")

    sub = stage("refit-part", _refit_part, "train again and again with permuted labels")
    sub.add_argument("--dataset", required=True)
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    sub.add_argument("--output", required=True)

    sub = stage("refit", _refit, "test groups by comparing a run with its refits")
    sub.add_argument("--parts", required=True, nargs="+", help="refits, in one folder a seed")
    sub.add_argument("--output", required=True)
    sub.add_argument("--described", required=True, help="JSON file that describes the test")
    sub.add_argument("--confounds", required=True, help="table that asks whether it is just motion")

    sub = stage("test", _test, "put all tests of a run's groups into one table")
    sub.add_argument("--run", required=True, dest="trajectories")
    sub.add_argument("--further", nargs="*", default=[], help="trajectories of the run from further seeds")
    for test in ("permutation", "refit"):
        sub.add_argument(f"--{test}", nargs="*", default=[], help=f"table and description of the {test} test")
    sub.add_argument("--output", required=True)
    sub.add_argument("--described", help="JSON file that describes columns and tests; beside the table by default")

    sub = stage("summary", _summary, "write one row for each run, layer and comparison")
    sub.add_argument("--inputs", required=True, nargs="+", help="trajectories and tests, at their usual paths")
    sub.add_argument("--output", required=True)

    sub = stage("calibrate", _calibrate, "find the rates at which tests reject, in one part of the calibration")
    sub.add_argument("--output", required=True)

    sub = command("calibration", _calibration, "find the rates at which tests reject: tables and a figure")
    sub.add_argument("--spec", help="JSON text with the settings, as the Snakefile writes it")
    sub.add_argument("--parts", nargs="+", default=[], help="the parts' tables; without them all parts are carried out")
    sub.add_argument("--quick", action="store_true", help="a few repetitions, to see that it runs")
    sub.add_argument("--output", required=True, help="calibration.tsv; all else stands beside it")
    sub.add_argument("--resources", help="JSON file that records time and memory used")

    sub = stage("panels", _panels, "draw panels, each on its own")
    _add_runs_and_tests(sub)
    sub.add_argument("--output", required=True, nargs="+", help="files, each named by its panel")

    sub = stage("figure", _figure, "compose a page of panels")
    _add_runs_and_tests(sub)
    sub.add_argument("--output", required=True, nargs="+")

    sub = stage("report", _report, "write the report")
    sub.add_argument(
        "--inputs", required=True, nargs="+", help="figures, tables and trajectories, at their usual paths"
    )
    sub.add_argument("--output", required=True)

    sub = command("init", _init, "start an analysis: a folder with a commented config.yaml")
    sub.add_argument("folder")
    sub.add_argument("--cohort", metavar="PATH", help="a cohort's folder: write the config for it")

    sub = command("check", _check, "say before any job what an analysis would use of its cohort")
    sub.add_argument("folder", nargs="?", default=".")

    sub = command("bidsify", _bidsify, "turn NITRC's layout of COBRE into a BIDS tree of links, for fMRIPrep")
    sub.add_argument("folder")
    sub.add_argument("target", help="the folder to make")

    sub = command("fetch-template", _fetch_template, "download NeuroMark 1.0 and verify it; nothing else downloads")
    sub.add_argument("target", help="where the file shall stand, such as Neuromark_fMRI_1.0.nii")
    sub.add_argument("--certificates", help="PEM file of the authorities to trust instead of the system's")

    sub = command("ica", _ica, "find networks in fMRIPrep's derivatives, with a BIDS App's arguments")
    sub.add_argument("derivatives", help="fMRIPrep's output")
    sub.add_argument("output", help="folder for the results")
    sub.add_argument("level", choices=["participant"], help="participants are analysed one by one")
    sub.add_argument(
        "--participant-label", "--participant_label", nargs="+", metavar="LABEL", help="with or without sub-"
    )
    sub.add_argument("--template", required=True, help="4-D image with a network a volume, or stand-in")
    for name in ("task", "session", "run"):
        sub.add_argument(
            f"--{name}-id", f"--{name}_id", dest=f"{name}_id", help=f"the {name} of the images, where there are several"
        )
    sub.add_argument("--space", help="the space of the images, where there are several")
    sub.add_argument("--grid", help="template, data, or a voxel size in mm")
    sub.add_argument("--confounds", help="none, motion, or one of nilearn's strategies")
    sub.add_argument("--smoothing-fwhm-mm", type=float, help="6 by default, since fMRIPrep does not smooth")
    sub.add_argument("--drop-volumes", type=int, help="volumes to leave out at the start")
    sub.add_argument("--converged", action="store_true", help="iterate to convergence, not as GIFT does")
    sub.add_argument("--gift-files", action="store_true", help="write results under GIFT's names as well")
    _add_bad_subject(sub)
    _add_networks_device(sub)

    sub = command("schema", _schema, "write the JSON schema and the table of settings from the typed config")
    sub.add_argument("--root", default=str(Path(__file__).resolve().parent.parent))
    return parser


def _add_bad_subject(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--on-bad-subject", choices=["fail", "exclude"], default="fail", help="what to do with data that cannot be used"
    )


def _add_networks_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu or cuda")


def _add_runs_and_tests(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--runs", required=True, nargs="+")
    sub.add_argument("--tests", nargs="*", default=[], help="tests of the runs in which two groups are compared")


def _add_participants(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--participants", required=True, help="the cohort's participants.tsv")
    sub.add_argument("--folders", nargs="*", default=[], help="folder of each functional participant")
    sub.add_argument("--output", required=True)


def _spec(options: Any, wanted: type) -> tuple[Any, str]:
    """Settings and code of ``--spec``; ``wanted`` is the stage's TypedDict of settings."""
    try:
        spec = json.loads(options.spec)
        settings, code = spec["settings"], spec["code"]
        missing = [key for key in wanted.__annotations__ if key not in settings]
    except (ValueError, KeyError, TypeError):
        raise UserError("--spec is no JSON text with 'settings' and 'code', as the Snakefile writes it.") from None
    if missing:
        raise UserError(f"--spec lacks the settings {', '.join(missing)}, which the Snakefile would write.")
    return settings, code


def _dataset(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.datasets.build import DatasetSettings, build_dataset

    return build_dataset(_spec(options, DatasetSettings)[0], options.files, options.output), {}


def _sinusoids(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.datasets.sinusoids import SinusoidSettings, build_sinusoids

    return build_sinusoids(_spec(options, SinusoidSettings)[0], options.output), {}


def _simulate(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.cohort.simulated import simulate_cohort
    from autospec.cohort.simulation import SimulationSettings

    return simulate_cohort(_spec(options, SimulationSettings)[0], str(Path(options.output).parent)), {}


def _subject(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.networks.subject import NetworksSettings, build_networks

    kinds = ("bold", "sidecar", "confounds", "description", "mask", "template", "atlas")
    files: Any = {kind: getattr(options, kind) or None for kind in kinds}
    settings = _spec(options, NetworksSettings)[0]
    return build_networks(settings, files, options.on_bad_subject, options.output, options.device), {}


def _precomputed(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.networks.precomputed import PrecomputedSettings, build_precomputed

    kinds = ("timecourses", "maps", "mask", "components", "description")
    files: Any = {kind: getattr(options, kind) or "" for kind in kinds}
    return build_precomputed(_spec(options, PrecomputedSettings)[0], files, options.on_bad_subject, options.output), {}


def _gift_mask(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.networks.cohort_wide import GiftMaskSettings, build_mask

    return build_mask(_spec(options, GiftMaskSettings)[0], options.output), {}


def _gift_scaling(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.networks.cohort_wide import GiftScalingSettings, build_scaling

    folders = {Path(folder).name.removeprefix("sub-"): folder for folder in options.folders}
    return build_scaling(_spec(options, GiftScalingSettings)[0], options.participants, folders, options.output), {}


def _cohort(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.cohort.stage import TablesSettings, build_tables

    return build_tables(_spec(options, TablesSettings)[0], options.folders, str(Path(options.output).parent)), {}


def _timeseries(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.datasets.participants import files_in
    from autospec.datasets.timeseries import TimeseriesSettings, build_timeseries

    settings = _spec(options, TimeseriesSettings)[0]
    files = files_in(options.folders, settings["courses"])
    return build_timeseries(settings, options.participants, files, options.output), {}


def _maps(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.datasets.maps import MapsSettings, build_maps
    from autospec.datasets.participants import files_in

    settings = _spec(options, MapsSettings)[0]
    files, masks = (files_in(options.folders, kind) for kind in ("maps", "mask"))
    if options.scaled:
        files = {name: str(Path(options.scaled) / Path(path).name) for name, path in files.items()}
    masks = {name: path for name, path in masks.items() if Path(path).is_file()}
    return build_maps(settings, options.participants, files, masks, options.output), {}


def _volumes(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.datasets.freesurfer import VolumesSettings, build_volumes

    settings = _spec(options, VolumesSettings)[0]
    return build_volumes(settings, options.participants, settings["sources"], options.output), {}


def _view(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.figures.cohort import ViewSettings, build_view

    return build_view(_spec(options, ViewSettings)[0], options.participants, options.folders, options.output), {}


def _train(options: Any) -> tuple[str, dict[str, Any]]:
    began = time.perf_counter()
    from autospec.training import Frequency, RunSettings, train_run

    imported = time.perf_counter() - began
    settings, code = _spec(options, RunSettings)
    frequency = Frequency(options.checkpoint_minutes, options.checkpoint_updates)
    message, record = train_run(
        settings, code, options.dataset, options.output, options.work, options.device, options.weights, frequency
    )
    record["seconds"]["start_up"] = round(record["seconds"]["start_up"] + imported, 3)
    return message, record


def _permute(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.statistics.permute import Outputs, PermutationSettings, build_permutation

    settings, code = _spec(options, PermutationSettings)
    outputs = Outputs(
        table=options.output, described=options.described, confounds=options.confounds, null=options.null or None
    )
    message = build_permutation(
        settings, code, options.dataset, options.weights, outputs, options.work, options.refit or None
    )
    return message, {}


def _refit_part(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.statistics.refit_part import RefitPartSettings, build_refit_part

    settings = _spec(options, RefitPartSettings)[0]
    return build_refit_part(settings, options.dataset, options.output, options.device), {}


def _refit(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.statistics.refit import RefitSettings, build_refit

    of_seeds: dict[Path, list[str]] = {}
    for path in options.parts:
        of_seeds.setdefault(Path(path).parent, []).append(path)
    parts = list(of_seeds.values())
    settings = _spec(options, RefitSettings)[0]
    return build_refit(settings, parts, options.output, options.described, options.confounds), {}


def _test(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.statistics.build import Found, TestSettings, build_tests

    found: dict[str, Any] = {
        name: Found(table=two[0], described=two[1])
        for name, two in (("permutation", options.permutation), ("refit", options.refit))
        if two
    }
    settings = _spec(options, TestSettings)[0]
    described = options.described or str(Path(options.output).with_suffix(".json"))
    further = options.further
    return build_tests(settings, options.trajectories, options.output, described, further=further, **found), {}


def _summary(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.statistics.summary import SummarySettings, build_summary

    return build_summary(_spec(options, SummarySettings)[0], options.inputs, options.output), {}


def _calibrate(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.statistics.calibration.build import PartSettings, build_part

    return build_part(_spec(options, PartSettings)[0], options.output), {}


def _calibration(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.config import Calibration
    from autospec.figures.calibration import build_calibration
    from autospec.statistics.calibration.design import QUICK, CalibrationSettings

    settings: Any = QUICK if options.quick else Calibration().model_dump(exclude={"in_report"})
    if options.spec:
        settings = _spec(options, CalibrationSettings)[0]
    parts = options.parts
    if not parts:
        from autospec.statistics.calibration.build import build_parts

        parts = build_parts(settings, Path(options.output).parent / "parts")
    return build_calibration(settings, parts, options.output), {}


def _panels(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.figures.panel import PanelsSettings, build_panels

    runs, tests = _runs_and_tests(options)
    return build_panels(_spec(options, PanelsSettings)[0], runs, tests, options.output), {}


def _figure(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.figures.page import PageSettings, build_page

    runs, tests = _runs_and_tests(options)
    return build_page(_spec(options, PageSettings)[0], runs, tests, options.output), {}


def _report(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.report.build import ReportSettings, build_report

    return build_report(_spec(options, ReportSettings)[0], options.inputs, options.output), {}


def _init(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.analysis import start_analysis

    return start_analysis(options.folder, options.cohort), {}


def _check(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.check import check_analysis

    return check_analysis(options.folder), {}


def _bidsify(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.cohort.nitrc import bidsify

    return bidsify(options.folder, options.target), {}


def _fetch_template(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.ica.fetch import fetch_template

    return fetch_template(options.target, certificates=options.certificates), {}


def _ica(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.networks.bids_app import Request, analyse_derivatives

    chosen = {
        "grid": options.grid if options.grid in ("template", "data", None) else _number(options.grid),
        "confounds": options.confounds,
        "smoothing_fwhm_mm": options.smoothing_fwhm_mm,
        "drop_volumes": options.drop_volumes,
        "converged": options.converged or None,
        "gift_files": options.gift_files or None,
        "template": options.template,
    }
    request = Request(
        labels=options.participant_label,
        images={
            "task": options.task_id,
            "session": options.session_id,
            "run": options.run_id,
            "space": options.space,
        },
        ica={name: value for name, value in chosen.items() if value is not None},
        on_bad_subject=options.on_bad_subject,
        device=options.device,
    )
    return analyse_derivatives(options.derivatives, options.output, request), {}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _schema(options: Any) -> tuple[str, dict[str, Any]]:
    from autospec.documentation import write_generated

    return f"wrote {', '.join(write_generated(Path(options.root)))}", {}


def _runs_and_tests(options: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Paths of trajectories and of tests, by the name of the run."""
    runs, tests = ({_run_name(path): path for path in paths} for paths in (options.runs, options.tests))
    return runs, tests


def _run_name(path: str) -> str:
    """Name of a run, from the path of its trajectories or its tests."""
    return Path(path).name.split(".", 1)[0]
