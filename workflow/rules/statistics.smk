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
