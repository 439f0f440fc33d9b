# Every data set becomes the same labelled store of x, target and groupings.


rule dataset:
    """Build a labelled data set."""
    input:
        files=lambda wildcards: specs.dataset_files(CONFIG, wildcards.dataset),
    output:
        store=result("dataset"),
        resources=result("dataset_resources"),
    params:
        spec=lambda wildcards: specs.spec("dataset", specs.dataset_settings(CONFIG, wildcards.dataset)),
    log:
        result("log", stage="dataset", job="{dataset}"),
    message:
        "Building the data set {wildcards.dataset}"
    conda:
        "../../envs/autospec.yaml"
    shell:
        "python -m autospec dataset --spec {params.spec:q} --files {input.files:q}"
        " --output {output.store:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
