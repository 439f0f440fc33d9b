# Every data set becomes the same labelled store of x, target and groupings.


rule dataset:
    """Build a labelled data set."""
    input:
        files=lambda wildcards: specs.dataset_files(CONFIG, wildcards.dataset),
    output:
        store=result("dataset"),
        resources=result("dataset_resources"),
    log:
        result("log", stage="dataset", job="{dataset}"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec("dataset", specs.dataset_settings(CONFIG, wildcards.dataset)),
    message:
        "Building the data set {wildcards.dataset}"
    shell:
        "python -m autospec dataset --spec {params.spec:q} --files {input.files:q}"
        " --output {output.store:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
