# Tests between every pair of groups of a run.


rule test:
    """Test every pair of groups of one run with the paper's t-tests."""
    input:
        run=result("run"),
    output:
        table=result("tests"),
        resources=result("tests_resources"),
    log:
        result("log", stage="test", job="{experiment}-{run}"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec("test", specs.test_settings(CONFIG, wildcards.experiment, wildcards.run)),
    message:
        "Testing groups in {wildcards.experiment}/{wildcards.run}"
    shell:
        "python -m autospec test --spec {params.spec:q} --run {input.run:q}"
        " --output {output.table:q} --resources {output.resources:q} 2>&1 | tee {log:q}"


rule summary:
    """Write one row for each run, layer and comparison."""
    input:
        inputs.of_summary(CONFIG),
    output:
        table=result("summary"),
        resources=result("summary_resources"),
    log:
        result("log", stage="summary", job="summary"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=specs.spec("summary", specs.summary_settings(CONFIG)),
    message:
        "Summing up"
    shell:
        "python -m autospec summary --spec {params.spec:q} --inputs {input:q}"
        " --output {output.table:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
