# The workflow: rules are in workflow/rules, one file a stage; what they call is `python -m autospec STAGE`.
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version, validate

min_version("9.13")

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))

from autospec import inputs, specs
from autospec.config import json_safe, parse_config, read_yaml
from autospec.errors import UserError
from autospec.machine import gpu_here, use_this_python
from autospec.paths import EXTENSIONS, PAGE_EXTENSIONS, result
from autospec.statistics.calibration.design import parts as calibration_parts

use_this_python(ROOT)


# A config given with --configfile stands alone.  A job on a cluster reads this file again and reads no profile, so the
# profile's replace-workflow-config would not keep config.yaml from being merged into it there.
try:
    for path in map(str, workflow.overwrite_configfiles or ["config.yaml"]):
        if path.endswith((".yaml", ".yml")):
            read_yaml(path)  # says in one sentence, with its line, what cannot be read or stands twice
except UserError as error:
    raise WorkflowError(str(error)) from None
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


try:
    CONFIG = parse_config(config, ", ".join(map(str, workflow.configfiles)) or "the config")
    inputs.require_files(CONFIG)
    PEOPLE = None  # who is in the cohort, from names of files and tables
    if CONFIG.cohort is not None:
        from autospec import participants

        PEOPLE = participants.read_cohort(CONFIG)
except UserError as error:
    raise WorkflowError(str(error)) from None
validate(json_safe(config), str(ROOT / "workflow/schemas/config.schema.json"), set_default=False)


wildcard_constraints:
    dataset="[a-z][a-z0-9_]*",
    experiment="[a-z][a-z0-9_]*",
    run="[a-z][a-z0-9_]*(-seed-[0-9]+)?",
    part="(matched-)?[0-9]+",
    setting="[a-z]+-[a-z0-9.-]+",
    subject="[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*",
    view="[a-z]+",
    figure="[a-z0-9_]+",
    extension="pdf|png|svg",


if PEOPLE is not None:

    include: "workflow/rules/cohort.smk"
    include: "workflow/rules/ica.smk"


include: "workflow/rules/datasets.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/statistics.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/calibration.smk"


rule all:
    """Everything: every figure and the report."""
    default_target: True
    input:
        result("report"),
        result("summary") if CONFIG.experiments else [],
        inputs.pages(CONFIG),
        [inputs.panels(CONFIG, name) for name in CONFIG.experiments],
        participants.everything(CONFIG) if PEOPLE is not None else [],


# Of a target that the config does not name, Snakemake says only that no rule makes it.  A Snakefile is not told the targets:
# Snakemake's parser knows them, but takes a while, so it is asked about suspicious words alone, which may be an option's.
unknown = {word: reason for word in sys.argv[1:] if (reason := inputs.unknown_target(CONFIG, word))}
if unknown:
    from snakemake.cli import get_argument_parser

    for target in get_argument_parser().parse_known_args(sys.argv[1:])[0].targets:
        if target in unknown:
            raise WorkflowError(unknown[target])
