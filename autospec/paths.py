"""Where results stand: the one home of their paths, relative to the analysis folder."""

from __future__ import annotations

PATHS = {
    "simulated": "work/simulated",
    "simulated_resources": "work/simulated.json",
    "participants": "results/cohort/participants.tsv",
    "participants_described": "results/cohort/participants.json",
    "scans": "results/cohort/scans.tsv",
    "exclusions": "results/cohort/exclusions.tsv",
    "cohort": "results/cohort/cohort.json",
    "cohort_resources": "results/cohort/resources.json",
    "view": "results/cohort/figures/{view}.{extension}",
    "view_resources": "results/cohort/figures/{view}.json",
    "ica": "results/ica/sub-{subject}",
    "ica_resources": "results/ica/sub-{subject}.json",
    "gift_mask": "results/ica/gift_mask.nii.gz",
    "gift_mask_resources": "results/ica/gift_mask.json",
    "gift_maps": "results/ica/gift_maps",
    "gift_maps_resources": "results/ica/gift_maps.json",
    "dataset": "results/datasets/{dataset}.zarr.zip",
    "dataset_resources": "results/datasets/{dataset}.json",
    "run": "results/runs/{experiment}/{run}.zarr.zip",
    "run_resources": "results/runs/{experiment}/{run}.json",
    "weights": "results/runs/{experiment}/{run}.weights.pt",
    "permutation": "results/statistics/{experiment}/{run}.permutation.tsv",
    "permutation_described": "results/statistics/{experiment}/{run}.permutation.json",
    "permutation_null": "results/statistics/{experiment}/{run}.null.zarr.zip",
    "permutation_resources": "results/statistics/{experiment}/{run}.permutation.resources.json",
    "confounds": "results/statistics/{experiment}/{run}.confounds.tsv",
    "refits": "results/refits/{experiment}/{run}/{part}.zarr.zip",
    "refits_resources": "results/refits/{experiment}/{run}/{part}.json",
    "refit": "results/statistics/{experiment}/{run}.refit.tsv",
    "refit_confounds": "results/statistics/{experiment}/{run}.refit.confounds.tsv",
    "refit_described": "results/statistics/{experiment}/{run}.refit.json",
    "refit_resources": "results/statistics/{experiment}/{run}.refit.resources.json",
    "tests": "results/statistics/{experiment}/{run}.tsv",
    "tests_described": "results/statistics/{experiment}/{run}.json",
    "tests_resources": "results/statistics/{experiment}/{run}.resources.json",
    "summary": "results/summary.tsv",
    "summary_resources": "results/summary.json",
    "panel": "results/figures/{experiment}/{panel}.{extension}",
    "figure": "results/figures/figure-{figure}.{extension}",
    "figure_resources": "results/figures/figure-{figure}.json",
    "panels_resources": "results/figures/{experiment}.json",
    "calibration_part": "work/calibration/{setting}.tsv",
    "calibration_part_resources": "work/calibration/{setting}.json",
    "calibration": "results/calibration/calibration.tsv",
    "calibration_power": "results/calibration/power.tsv",
    "calibration_described": "results/calibration/calibration.json",
    "calibration_figure": "results/calibration/calibration.{extension}",
    "calibration_resources": "results/calibration/resources.json",
    "report": "results/report.html",
    "report_resources": "results/report.json",
    "log": "logs/{stage}/{job}.log",
}
EXTENSIONS = ("pdf", "png", "svg")
PAGE_EXTENSIONS = ("pdf", "png")


def result(kind: str, **names: str | int) -> str:
    """Path of a result; names that are not given stay as Snakemake's wildcards.

    Parameters
    ----------
    kind : str
        A key of `PATHS`.
    **names
        Values for its placeholders.
    """
    path = PATHS[kind]
    for name, value in names.items():
        path = path.replace("{" + name + "}", str(value))
    return path
