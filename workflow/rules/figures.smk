# Panels on their own, and the pages composed of them.


rule panel:
    """Draw one panel on its own."""
    input:
        run=lambda wildcards: inputs.of_panel(CONFIG, "run", wildcards.experiment, wildcards.panel),
        tests=lambda wildcards: inputs.of_panel(CONFIG, "tests", wildcards.experiment, wildcards.panel),
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
    log:
        result("log", stage="panel", job="{experiment}-{panel}"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec(
            "panel",
            specs.panel_settings(CONFIG, wildcards.experiment, wildcards.panel),
        ),
    message:
        "Drawing {wildcards.experiment}/{wildcards.panel}"
    shell:
        "python -m autospec panel --spec {params.spec:q} --run {input.run:q} --tests {input.tests:q}"
        " --output {output.pictures:q} --resources {output.resources:q} 2>&1 | tee {log:q}"


rule figure:
    """Compose the page of a figure, or of a supplement."""
    input:
        runs=lambda wildcards: inputs.of_figure(CONFIG, "run", wildcards.figure),
        tests=lambda wildcards: inputs.of_figure(CONFIG, "tests", wildcards.figure),
    output:
        pictures=[
            report(
                result("figure", extension=extension),
                caption="../report/figure.rst",
                category="figures",
                labels={"figure": "{figure}", "format": extension},
            )
            for extension in PAGE_EXTENSIONS
        ],
        resources=result("figure_resources"),
    log:
        result("log", stage="figure", job="{figure}"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec("figure", inputs.figure_settings(CONFIG, wildcards.figure)),
    message:
        "Composing figure {wildcards.figure}"
    shell:
        "python -m autospec figure --spec {params.spec:q} --runs {input.runs:q} --tests {input.tests:q}"
        " --output {output.pictures:q} --resources {output.resources:q} 2>&1 | tee {log:q}"


# `snakemake figure_1`, `snakemake figure_s1` and `snakemake experiment_mnist_mlp`: one page alone, one experiment alone.
for figure in inputs.figures(CONFIG):

    rule:
        """One page."""
        name:
            f"figure_{figure}"
        input:
            [result("figure", figure=figure, extension=extension) for extension in PAGE_EXTENSIONS],


for name in CONFIG.experiments:

    rule:
        """Every page, panel and test of one experiment."""
        name:
            f"experiment_{name}"
        input:
            inputs.of_experiment(CONFIG, name),
