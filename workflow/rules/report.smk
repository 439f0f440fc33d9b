# One HTML file that opens offline and holds every figure and table.


rule report:
    """Write the report."""
    input:
        inputs.of_report(CONFIG),
    output:
        page=result("report"),
        resources=result("report_resources"),
    log:
        result("log", stage="report", job="report"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=specs.spec("report", specs.report_settings(CONFIG)),
    message:
        "Writing the report"
    shell:
        "python -m autospec report --spec {params.spec:q} --inputs {input:q}"
        " --output {output.page:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
