# Panels on their own, and the pages composed of them.


# All panels of an experiment are one job: most of a panel's time would be its Python's start.
for name in CONFIG.experiments:

    rule:
        """Draw each panel of an experiment on its own."""
        name:
            f"panels_{name}"
        input:
            runs=inputs.of_panels(CONFIG, "run", name),
            tests=inputs.of_panels(CONFIG, "tests", name),
        output:
            pictures=[
                report(
                    result("panel", experiment=name, panel=panel, extension=extension),
                    caption="../report/panel.rst",
                    category=name,
                    subcategory="panels",
                    labels={"panel": panel, "format": extension},
                )
                for panel in specs.panel_names(CONFIG, name)
                for extension in EXTENSIONS
            ],
            resources=result("panels_resources", experiment=name),
        log:
            result("log", stage="panels", job=name),
        conda:
            "../../envs/autospec.yaml"
        params:
            spec=specs.spec("panels", specs.panels_settings(CONFIG, name)),
        message:
            f"Drawing the panels of {name}"
        shell:
            "python -m autospec panels --spec {params.spec:q} --runs {input.runs:q} --tests {input.tests:q}"
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
