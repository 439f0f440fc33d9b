# One job a training; it uses the GPU where there is one.

# Where a GPU is, trainings take turns on it (the profile allows gpu=1); elsewhere they share the cores.  A cluster's
# profile asks for one with set-resources, since its login node may have none.


rule train:
    """Train one network, watched, pack its trajectories and keep its weights at some updates."""
    input:
        dataset=lambda wildcards: inputs.dataset_of(CONFIG, wildcards.experiment),
    output:
        store=result("run"),
        weights=result("weights"),
        resources=result("run_resources"),
    log:
        result("log", stage="train", job="{experiment}-{run}"),
    conda:
        "../../envs/autospec.yaml"
    threads: 1
    resources:
        gpu=gpu_here(),
        device="auto",
        checkpoints=lambda wildcards: specs.checkpoint_options(CONFIG, wildcards.experiment, wildcards.run),
    params:
        spec=lambda wildcards: specs.spec("train", specs.run_settings(CONFIG, wildcards.experiment, wildcards.run)),
    message:
        "Training {wildcards.experiment}/{wildcards.run}"
    shell:
        "OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}"
        " python -m autospec train --spec {params.spec:q} --dataset {input.dataset:q}"
        " --work work --device {resources.device} {resources.checkpoints}"
        " --output {output.store:q} --weights {output.weights:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
