# Tests between every pair of groups of a run: the paper's, by permutation of labels, by refits with permuted labels.


rule permute:
    """Test the groups whose labels the network has not seen, by permutation."""
    input:
        dataset=lambda wildcards: inputs.dataset_of(CONFIG, wildcards.experiment),
        weights=lambda wildcards: inputs.of_every_seed(CONFIG, "weights", wildcards.experiment, wildcards.run),
        refit=lambda wildcards: inputs.refit_confounds(CONFIG, wildcards.experiment, wildcards.run),
    output:
        table=result("permutation"),
        described=result("permutation_described"),
        confounds=result("confounds"),
        resources=result("permutation_resources"),
        null=[result("permutation_null")] if CONFIG.statistics.keep_null else [],
    log:
        result("log", stage="permute", job="{experiment}-{run}"),
    wildcard_constraints:
        run="[a-z][a-z0-9_]*",
    conda:
        "../../envs/autospec.yaml"
    threads: 1
    params:
        spec=lambda wildcards: specs.spec(
            "permute",
            specs.permutation_settings(CONFIG, wildcards.experiment, wildcards.run),
        ),
    message:
        "Permuting labels in {wildcards.experiment}/{wildcards.run}"
    shell:
        "OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}"
        " python -m autospec permute --spec {params.spec:q} --dataset {input.dataset:q} --weights {input.weights:q}"
        " --work work --output {output.table:q} --described {output.described:q} --confounds {output.confounds:q}"
        " --null {output.null:q} --refit {input.refit:q} --resources {output.resources:q} 2>&1 | tee {log:q}"


rule refit_part:
    """Train a network some times more, with permuted labels."""
    input:
        dataset=lambda wildcards: inputs.dataset_of(CONFIG, wildcards.experiment),
    output:
        store=result("refits"),
        resources=result("refits_resources"),
    log:
        result("log", stage="refit", job="{experiment}-{run}-{part}"),
    conda:
        "../../envs/autospec.yaml"
    threads: 1
    resources:
        gpu=gpu_here(),
        device="auto",
    params:
        spec=lambda wildcards: specs.spec(
            "refit-part",
            specs.refit_part_settings(CONFIG, wildcards.experiment, wildcards.run, wildcards.part),
        ),
    message:
        "Training {wildcards.experiment}/{wildcards.run} with permuted labels, part {wildcards.part}"
    shell:
        "OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}"
        " python -m autospec refit-part --spec {params.spec:q} --dataset {input.dataset:q} --device {resources.device}"
        " --output {output.store:q} --resources {output.resources:q} 2>&1 | tee {log:q}"


rule refit:
    """Compare a run with its refits."""
    input:
        parts=lambda wildcards: inputs.refit_parts(CONFIG, wildcards.experiment, wildcards.run),
    output:
        table=result("refit"),
        described=result("refit_described"),
        confounds=result("refit_confounds"),
        resources=result("refit_resources"),
    log:
        result("log", stage="refit", job="{experiment}-{run}"),
    wildcard_constraints:
        run="[a-z][a-z0-9_]*",
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec("refit", specs.refit_settings(CONFIG, wildcards.experiment, wildcards.run)),
    message:
        "Comparing {wildcards.experiment}/{wildcards.run} with its refits"
    shell:
        "python -m autospec refit --spec {params.spec:q} --parts {input.parts:q}"
        " --output {output.table:q} --described {output.described:q} --confounds {output.confounds:q}"
        " --resources {output.resources:q} 2>&1 | tee {log:q}"


rule test:
    """Put every test of one run's groups into one table, and describe them."""
    input:
        run=result("run"),
        further=lambda wildcards: inputs.of_every_seed(CONFIG, "run", wildcards.experiment, wildcards.run)[1:],
        permutation=lambda wildcards: inputs.tests_found(CONFIG, "permutation", wildcards.experiment, wildcards.run),
        refit=lambda wildcards: inputs.tests_found(CONFIG, "refit", wildcards.experiment, wildcards.run),
        # Not read, but asked for: Snakemake neither makes an output that nobody needs, nor compares the settings of a job
        # that has an output without a record.
        null=lambda wildcards: inputs.null_kept(CONFIG, wildcards.experiment, wildcards.run),
    output:
        table=result("tests"),
        described=result("tests_described"),
        resources=result("tests_resources"),
    log:
        result("log", stage="test", job="{experiment}-{run}"),
    wildcard_constraints:
        run="[a-z][a-z0-9_]*",
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec("test", specs.test_settings(CONFIG, wildcards.experiment, wildcards.run)),
    message:
        "Testing groups in {wildcards.experiment}/{wildcards.run}"
    shell:
        "python -m autospec test --spec {params.spec:q} --run {input.run:q} --further {input.further:q}"
        " --permutation {input.permutation:q} --refit {input.refit:q}"
        " --output {output.table:q} --described {output.described:q}"
        " --resources {output.resources:q} 2>&1 | tee {log:q}"


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
