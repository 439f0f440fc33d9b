# How often each test of groups rejects, where there is a difference and where there is none: `snakemake calibration`.
# It needs nothing of the analysis; the report needs it where calibration.in_report asks for it.


rule calibrate:
    """Draw, train and test the studies of one part of the calibration."""
    output:
        table=result("calibration_part"),
        resources=result("calibration_part_resources"),
    log:
        result("log", stage="calibrate", job="{setting}"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=lambda wildcards: specs.spec("calibrate", specs.calibration_settings(CONFIG, wildcards.setting)),
    message:
        "Calibrating the tests of groups: {wildcards.setting}"
    shell:
        "python -m autospec calibrate --spec {params.spec:q}"
        " --output {output.table:q} --resources {output.resources:q} 2>&1 | tee {log:q}"


rule calibration:
    """Gather the calibration's rates and draw them."""
    input:
        [result("calibration_part", setting=name) for name in calibration_parts()],
    output:
        table=result("calibration"),
        power=result("calibration_power"),
        described=result("calibration_described"),
        figure=[result("calibration_figure", extension=extension) for extension in EXTENSIONS],
        resources=result("calibration_resources"),
    log:
        result("log", stage="calibration", job="calibration"),
    conda:
        "../../envs/autospec.yaml"
    params:
        spec=specs.spec("calibration", specs.calibration_settings(CONFIG)),
    message:
        "Drawing the calibration of the tests of groups"
    shell:
        "python -m autospec calibration --spec {params.spec:q} --parts {input:q}"
        " --output {output.table:q} --resources {output.resources:q} 2>&1 | tee {log:q}"
