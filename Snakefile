# The workflow: rules are in workflow/rules, one file a stage; what they call is `python -m autospec STAGE`.
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version, validate

min_version("9.13")

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))
# Jobs run with Snakemake's own Python, activated or not (a conda environment goes before it), and import the package
# beside this Snakefile.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

from autospec import specs
from autospec.config import json_safe, parse_config
from autospec.errors import UserError
from autospec.paths import EXTENSIONS, result


configfile: "config.yaml"


try:
    CONFIG = parse_config(config, ", ".join(map(str, workflow.configfiles)) or "the config")
except UserError as error:
    raise WorkflowError(str(error)) from None
validate(json_safe(config), str(ROOT / "workflow/schemas/config.schema.json"), set_default=False)


wildcard_constraints:
    dataset="[a-z][a-z0-9_]*",
    experiment="[a-z][a-z0-9_]*",
    run="[a-z][a-z0-9_]*",
    panel="[a-z][A-Za-z0-9_-]*",
    figure="[1-9][0-9]*",
    extension="pdf|png|svg",


include: "workflow/rules/datasets.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/statistics.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/report.smk"


rule all:
    """Everything: every figure and the report."""
    default_target: True
    input:
        result("report"),
        [
            result("figure", figure=experiment.figure, extension=extension)
            for experiment in CONFIG.experiments.values()
            for extension in EXTENSIONS
        ],
        [
            result("panel", experiment=name, panel=specs.panel_name(panel), extension=extension)
            for name, experiment in CONFIG.experiments.items()
            for panel in experiment.panels
            for extension in EXTENSIONS
        ],
