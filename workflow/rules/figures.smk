# Panels on their own, and the pages composed of them.

EXPERIMENT_OF_FIGURE = {str(experiment.figure): name for name, experiment in CONFIG.experiments.items()}


def run_of_panel(wildcards):
    """The run that a panel draws."""
    return specs.find_panel(CONFIG, wildcards.experiment, wildcards.panel).run


def results_of_figure(kind):
    """Trajectories, or tests, of every run that a figure's panels draw."""

    def paths(wildcards):
        name = EXPERIMENT_OF_FIGURE[wildcards.figure]
        runs = dict.fromkeys(panel.run for panel in CONFIG.experiments[name].panels)
        return [result(kind, experiment=name, run=run) for run in runs]

    return paths


rule panel:
    """Draw one panel on its own."""
    input:
        run=lambda wildcards: result("run", experiment=wildcards.experiment, run=run_of_panel(wildcards)),
        tests=lambda wildcards: result("paper_tests", experiment=wildcards.experiment, run=run_of_panel(wildcards)),
    output:
        pictures=[
            report(
                result("panel", extension=extension),
                caption="../report/panel.rst",
                category="{experiment}",
                subcategory="panels",
                labels={"panel": "{panel}", "format": extension},
            )
            for extension in EXTENSIONS
        ],
        resources=result("panel_resources"),
    params:
        spec=lambda wildcards: specs.spec(
            "panel", specs.panel_settings(CONFIG, wildcards.experiment, wildcards.panel)
        ),
    log:
        result("log", stage="panel", job="{experiment}-{panel}"),
    message:
        "Drawing {wildcards.experiment}/{wildcards.panel}"
    conda:
        "../../envs/autospec.yaml"
    shell:
        "python -m autospec panel --spec {params.spec:q} --run {input.run:q} --tests {input.tests:q}"
        " --output {output.pictures:q} --resources {output.resources:q} 2>&1 | tee {log:q}"


rule figure:
    """Compose the page of a figure."""
    input:
        runs=results_of_figure("run"),
        tests=results_of_figure("paper_tests"),
    output:
        pictures=[
            report(
                result("figure", extension=extension),
                caption="../report/figure.rst",
                category="figures",
                labels={"figure": "{figure}", "format": extension},
            )
            for extension in EXTENSIONS
        ],
        resources=result("figure_resources"),
    params:
        spec=lambda wildcards: specs.spec(
            "figure", specs.figure_settings(CONFIG, EXPERIMENT_OF_FIGURE[wildcards.figure])
        ),
    log:
        result("log", stage="figure", job="{figure}"),
    message:
        "Composing figure {wildcards.figure}"
    conda:
        "../../envs/autospec.yaml"
    shell:
        "python -m autospec figure --spec {params.spec:q} --runs {input.runs:q} --tests {input.tests:q}"
        " --output {output.pictures:q} --resources {output.resources:q} 2>&1 | tee {log:q}"


# `snakemake figure_1` and `snakemake experiment_mnist_mlp`: one figure alone, one experiment alone.
for number, name in EXPERIMENT_OF_FIGURE.items():

    rule:
        """The page of one figure."""
        name:
            f"figure_{number}"
        input:
            [result("figure", figure=number, extension=extension) for extension in EXTENSIONS],

    rule:
        """Every run, test and panel of one experiment."""
        name:
            f"experiment_{name}"
        input:
            [result("figure", figure=number, extension=extension) for extension in EXTENSIONS],
            [result("paper_tests", experiment=name, run=run) for run in CONFIG.experiments[name].runs],
            [
                result("panel", experiment=name, panel=specs.panel_name(panel), extension=extension)
                for panel in CONFIG.experiments[name].panels
                for extension in EXTENSIONS
            ],
