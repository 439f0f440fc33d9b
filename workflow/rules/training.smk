# One job a training; it uses the GPU where there is one.

# Where a GPU is, trainings take turns on it (the profile allows gpu=1); elsewhere they share the cores.  A cluster's
# profile asks for one with set-resources, since its login node may have none.
GPU_HERE = int(any(Path("/dev").glob("nvidia[0-9]*")))


def dataset_of(wildcards):
    """The labelled data set that an experiment trains on."""
    return result("dataset", dataset=CONFIG.experiments[wildcards.experiment].dataset)


rule train:
    """Train one network, watched, and pack its trajectories."""
    input:
        dataset=dataset_of,
    output:
        store=result("run"),
        resources=result("run_resources"),
    params:
        spec=lambda wildcards: specs.spec("train", specs.run_settings(CONFIG, wildcards.experiment, wildcards.run)),
    log:
        result("log", stage="train", job="{experiment}-{run}"),
    message:
        "Training {wildcards.experiment}/{wildcards.run}"
    threads: 1
    resources:
        gpu=GPU_HERE,
        device="auto",
    conda:
        "../../envs/autospec.yaml"
    shell:
        "OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}"
        " python -m autospec train --spec {params.spec:q} --dataset {input.dataset:q}"
        " --work work --device {resources.device}"
        " --output {output.store:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
