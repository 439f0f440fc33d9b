# Each participant's networks, a job of its own: it depends on that participant's files and settings alone.


if CONFIG.ica.timecourses == "precomputed":

    rule precomputed:
        """Take one participant's networks as they were computed before."""
        input:
            unpack(lambda wildcards: participants.subject_files(CONFIG, PEOPLE, wildcards.subject)),
        output:
            folder=directory(result("ica")),
            resources=result("ica_resources"),
        log:
            result("log", stage="precomputed", job="sub-{subject}"),
        wildcard_constraints:
            subject=participants.names_of_images(PEOPLE),
        conda:
            "../../envs/autospec.yaml"
        resources:
            on_bad_subject=CONFIG.cohort.on_bad_subject,
        params:
            spec=lambda wildcards: specs.spec(
                "precomputed",
                participants.subject_settings(CONFIG, PEOPLE, wildcards.subject),
            ),
        message:
            "Taking over the networks of sub-{wildcards.subject}"
        shell:
            "python -m autospec precomputed --spec {params.spec:q} --timecourses {input.timecourses:q}"
            " --maps {input.maps:q} --mask {input.mask:q} --components {input.components:q}"
            " --description {input.description:q} --on-bad-subject {resources.on_bad_subject}"
            " --output {output.folder:q} --resources {output.resources:q} 2>&1 | tee {log:q}"

else:

    rule networks:
        """Find one participant's networks, their time courses and their connectivity."""
        input:
            unpack(lambda wildcards: participants.subject_files(CONFIG, PEOPLE, wildcards.subject)),
        output:
            folder=directory(result("ica")),
            resources=result("ica_resources"),
        log:
            result("log", stage="subject", job="sub-{subject}"),
        wildcard_constraints:
            subject=participants.names_of_images(PEOPLE),
        conda:
            "../../envs/autospec.yaml"
        threads: 1
        resources:
            # No gpu=1: of its seconds a job needs the GPU for a part of one, so jobs share it instead of taking turns.
            device="auto",
            on_bad_subject=CONFIG.cohort.on_bad_subject,
        params:
            spec=lambda wildcards: specs.spec(
                "subject",
                participants.subject_settings(CONFIG, PEOPLE, wildcards.subject),
            ),
        message:
            "Finding the networks of sub-{wildcards.subject}"
        shell:
            "OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}"
            " python -m autospec subject --spec {params.spec:q} --bold {input.bold:q} --sidecar {input.sidecar:q}"
            " --confounds {input.confounds:q} --description {input.description:q} --mask {input.mask:q}"
            " --template {input.template:q} --atlas {input.atlas:q} --on-bad-subject {resources.on_bad_subject}"
            " --device {resources.device} --output {output.folder:q}"
            " --resources {output.resources:q} 2>&1 | tee {log:q}"


if CONFIG.ica.mask == "gift":

    rule gift_mask:
        """Make GIFT's mask, which reads everybody's image."""
        input:
            participants.images(PEOPLE),
        output:
            mask=result("gift_mask"),
            resources=result("gift_mask_resources"),
        log:
            result("log", stage="gift-mask", job="cohort"),
        conda:
            "../../envs/autospec.yaml"
        params:
            spec=specs.spec("gift-mask", participants.gift_mask_settings(CONFIG, PEOPLE)),
        message:
            "Making GIFT's mask of the cohort"
        shell:
            "python -m autospec gift-mask --spec {params.spec:q} --output {output.mask:q}"
            " --resources {output.resources:q} 2>&1 | tee {log:q}"


if CONFIG.ica.scaling == "gift":

    rule gift_scaling:
        """Scale everybody's maps as GIFT does, by the mean maps of the cohort."""
        input:
            participants=result("participants"),
            scans=result("scans"),
            folders=participants.folders(CONFIG, PEOPLE),
        output:
            folder=directory(result("gift_maps")),
            resources=result("gift_maps_resources"),
        log:
            result("log", stage="gift-scaling", job="cohort"),
        conda:
            "../../envs/autospec.yaml"
        params:
            spec=specs.spec("gift-scaling", {}),
        message:
            "Scaling maps as GIFT does"
        shell:
            "python -m autospec gift-scaling --spec {params.spec:q} --participants {input.participants:q}"
            " --folders {input.folders:q} --output {output.folder:q}"
            " --resources {output.resources:q} 2>&1 | tee {log:q}"
