"""What the stage reads from the configuration."""

from __future__ import annotations

from typing import Any, TypedDict


class TrainingSettings(TypedDict):
    """How a network is trained; `autospec.config.Training` describes each."""

    epochs: int
    optimizer: str
    learning_rate: float
    seed: int
    batch: int | str
    microbatch: int | str
    precision: str
    held_out: float
    split_seed: int
    snapshots: int | list[int]


class RunSettings(TypedDict):
    """One training."""

    name: str
    model: str
    model_code: str | None
    task: str
    hidden: list[int]
    activation: str
    groupings: list[str]
    training: TrainingSettings
    introspection: dict[str, Any]
