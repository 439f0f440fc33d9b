# Who takes part.  Each participant's own job (ica.smk) runs before; who is a candidate is known from names of files.


if CONFIG.cohort.kind == "simulated":

    rule simulate:
        """Write the simulated cohort, an ordinary folder of BIDS derivatives."""
        output:
            description=participants.simulated_description(),
            files=participants.simulated_files(CONFIG),
            resources=result("simulated_resources"),
        log:
            result("log", stage="simulate", job="cohort"),
        conda:
            "../../envs/autospec.yaml"
        params:
            spec=specs.spec("simulate", participants.simulation_settings(CONFIG)),
        message:
            "Simulating the cohort"
        shell:
            "python -m autospec simulate --spec {params.spec:q} --output {output.description:q}"
            " --resources {output.resources:q} 2>&1 | tee {log:q}"


rule cohort:
    """Write the table of participants, and who is left out and why."""
    input:
        files=participants.cohort_files(CONFIG, PEOPLE),
        folders=participants.folders(CONFIG, PEOPLE),
    output:
        participants=result("participants"),
        others=participants.tables()[1:],
        resources=result("cohort_resources"),
    log:
        result("log", stage="cohort", job="cohort"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=specs.spec("cohort", participants.shared_settings(CONFIG, PEOPLE)),
    message:
        "Bringing the cohort together"
    shell:
        "python -m autospec cohort --spec {params.spec:q} --folders {input.folders:q}"
        " --output {output.participants:q}"
        " --resources {output.resources:q} 2>&1 | tee {log:q}"


rule view:
    """Draw a picture of the cohort's quality."""
    input:
        participants=result("participants"),
        others=[result("scans"), result("exclusions")],
        folders=participants.folders(CONFIG, PEOPLE),
    output:
        pictures=[
            report(
                result("view", extension=extension),
                caption="../report/view.rst",
                category="cohort",
                labels={"picture": "{view}", "format": extension},
            )
            for extension in EXTENSIONS
        ],
        resources=result("view_resources"),
    log:
        result("log", stage="view", job="{view}"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec("view", participants.view_settings(CONFIG, wildcards.view)),
    message:
        "Drawing the cohort's {wildcards.view}"
    shell:
        "python -m autospec view --spec {params.spec:q} --participants {input.participants:q}"
        " --folders {input.folders:q} --output {output.pictures:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
