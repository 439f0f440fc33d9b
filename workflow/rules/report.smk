# One HTML file that opens offline and holds every figure and table.


def results_to_report(wildcards):
    """Everything that the report shows."""
    paths = []
    for name, experiment in CONFIG.experiments.items():
        paths.append(result("dataset", dataset=experiment.dataset))
        paths.append(result("figure", figure=experiment.figure, extension="png"))
        for panel in experiment.panels:
            paths.append(result("panel", experiment=name, panel=specs.panel_name(panel), extension="png"))
        for run in experiment.runs:
            paths += [result(kind, experiment=name, run=run) for kind in ("run", "run_resources", "paper_tests")]
    return list(dict.fromkeys(paths))


rule report:
    """Write the report."""
    input:
        results_to_report,
    output:
        page=result("report"),
        resources=result("report_resources"),
    params:
        spec=specs.spec("report", specs.report_settings(CONFIG)),
    log:
        result("log", stage="report", job="report"),
    message:
        "Writing the report"
    conda:
        "../../envs/autospec.yaml"
    shell:
        "python -m autospec report --spec {params.spec:q} --inputs {input:q}"
        " --output {output.page:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
