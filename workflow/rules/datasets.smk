# Every data set becomes the same labelled store of x, target and groupings.


rule dataset:
    """Build a labelled data set of digits."""
    input:
        files=lambda wildcards: specs.dataset_files(CONFIG, wildcards.dataset),
    output:
        store=result("dataset"),
        resources=result("dataset_resources"),
    log:
        result("log", stage="dataset", job="{dataset}"),
    wildcard_constraints:
        dataset=inputs.names_of(CONFIG, "mnist"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec("dataset", specs.dataset_settings(CONFIG, wildcards.dataset)),
    message:
        "Building the data set {wildcards.dataset}"
    shell:
        "python -m autospec dataset --spec {params.spec:q} --files {input.files:q}"
        " --output {output.store:q} --resources {output.resources:q} 2>&1 | tee {log:q}"


rule sinusoids:
    """Make a labelled data set of sinusoids."""
    output:
        store=result("dataset"),
        resources=result("dataset_resources"),
    log:
        result("log", stage="sinusoids", job="{dataset}"),
    wildcard_constraints:
        dataset=inputs.names_of(CONFIG, "sinusoids"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec("sinusoids", specs.sinusoid_settings(CONFIG, wildcards.dataset)),
    message:
        "Making the data set {wildcards.dataset}"
    shell:
        "python -m autospec sinusoids --spec {params.spec:q} --output {output.store:q}"
        " --resources {output.resources:q} 2>&1 | tee {log:q}"


if PEOPLE is not None:

    rule timeseries:
        """Build a labelled data set of time courses."""
        input:
            participants=result("participants"),
            others=[result("scans"), result("cohort")],
            folders=participants.folders(CONFIG, PEOPLE),
        output:
            store=result("dataset"),
            resources=result("dataset_resources"),
        log:
            result("log", stage="timeseries", job="{dataset}"),
        wildcard_constraints:
            dataset=inputs.names_of(CONFIG, "timeseries"),
        conda:
            "../../envs/autospec.yaml"
        params:
            spec=lambda wildcards: specs.spec("timeseries", participants.dataset_settings(CONFIG, wildcards.dataset)),
        message:
            "Building the data set {wildcards.dataset}"
        shell:
            "python -m autospec timeseries --spec {params.spec:q} --participants {input.participants:q}"
            " --folders {input.folders:q} --output {output.store:q}"
            " --resources {output.resources:q} 2>&1 | tee {log:q}"

    rule maps:
        """Build a labelled data set of maps, aggregated by their maximum over networks."""
        input:
            participants=result("participants"),
            others=[result("scans"), result("cohort")],
            folders=participants.folders(CONFIG, PEOPLE),
            scaled=result("gift_maps") if CONFIG.ica.scaling == "gift" else [],
        output:
            store=result("dataset"),
            resources=result("dataset_resources"),
        log:
            result("log", stage="maps", job="{dataset}"),
        wildcard_constraints:
            dataset=inputs.names_of(CONFIG, "maps"),
        conda:
            "../../envs/autospec.yaml"
        params:
            spec=lambda wildcards: specs.spec("maps", participants.dataset_settings(CONFIG, wildcards.dataset)),
        message:
            "Building the data set {wildcards.dataset}"
        shell:
            "python -m autospec maps --spec {params.spec:q} --participants {input.participants:q}"
            " --folders {input.folders:q} --scaled {input.scaled:q} --output {output.store:q}"
            " --resources {output.resources:q} 2>&1 | tee {log:q}"

    rule volumes:
        """Build a labelled data set of FreeSurfer's volumes."""
        input:
            participants=result("participants"),
            others=[result("cohort")],
            files=participants.volume_files(PEOPLE),
        output:
            store=result("dataset"),
            resources=result("dataset_resources"),
        log:
            result("log", stage="volumes", job="{dataset}"),
        wildcard_constraints:
            dataset=inputs.names_of(CONFIG, "freesurfer"),
        conda:
            "../../envs/autospec.yaml"
        params:
            spec=lambda wildcards: specs.spec("volumes", participants.dataset_settings(CONFIG, wildcards.dataset)),
        message:
            "Building the data set {wildcards.dataset}"
        shell:
            "python -m autospec volumes --spec {params.spec:q} --participants {input.participants:q}"
            " --output {output.store:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
