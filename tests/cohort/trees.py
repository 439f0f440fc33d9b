"""Small folders in every layout in which people hold COBRE, for tests."""

import gzip
import json

import nibabel
import numpy as np

AFFINE = np.array([[20.0, 0, 0, -90], [0, 20, 0, -126], [0, 0, 20, -72], [0, 0, 0, 1]])
SHAPE = (10, 12, 10)
COBRE_HEADER = ",Current Age,Gender,Handedness,Subject Type,Diagnosis"


def settings(folder, **more):
    """Settings of the cohort stage."""
    general = {
        "folder": str(folder),
        "layout": "auto",
        "phenotypes": None,
        "columns": {},
        "diagnosis": "Patient as labelled",
        "labels": {},
        "sex_labels": {},
        "groupings": [],
        "task": None,
        "session": None,
        "run": None,
        "space": None,
        "entities": {},
        "scans": "one",
        "freesurfer": [],
        "max_mean_fd": None,
        "min_volumes": None,
        "on_bad_subject": "exclude",
    }
    return {**general, **more}


def write(path, text):
    """Write a text file, its folders too; gzipped where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def image(path, volumes=8, time=2.0, affine=AFFINE, shape=SHAPE, dtype=np.int16, description=b""):
    """Write a functional image whose brightness counts voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.arange(np.prod(shape) * volumes, dtype=float).reshape(*shape, volumes) % 1000
    made = nibabel.Nifti1Image(data.astype(dtype), affine)
    made.header.set_xyzt_units("mm", "sec")
    made.header.set_zooms((*made.header.get_zooms()[:3], time))
    made.header["descrip"] = description
    nibabel.save(made, path)
    return path


def confounds(path, displacement, outliers=0):
    """Write a table of confounds as fMRIPrep does."""
    marks = [f"motion_outlier{i:02d}" for i in range(outliers)]
    lines = ["\t".join(["framewise_displacement", "trans_x", *marks])]
    for t, value in enumerate(displacement):
        first = "n/a" if t == 0 else str(value)
        lines.append("\t".join([first, "0.1", *("1.0" if i == t else "0.0" for i in range(outliers))]))
    return write(path, "\n".join(lines) + "\n")


def fmriprep(root, subjects, space="MNI152NLin6Asym", session="", run="", volumes=8, moved=0.1, task="rest"):
    """Write fMRIPrep's derivatives of some subjects, whose images differ in what their headers say."""
    for name in subjects:
        where = root / f"sub-{name}" / (f"ses-{session}" if session else "") / "func"
        stem = f"sub-{name}" + (f"_ses-{session}" if session else "") + f"_task-{task}" + (f"_run-{run}" if run else "")
        image(where / f"{stem}_space-{space}_desc-preproc_bold.nii.gz", volumes, description=name.encode())
        write(where / f"{stem}_space-{space}_desc-preproc_bold.json", json.dumps({"RepetitionTime": 2.0}))
        confounds(where / f"{stem}_desc-confounds_timeseries.tsv", [moved] * volumes, outliers=2)
    return root


def participants(path, rows, columns=("participant_id", "diagnosis", "sex", "age")):
    """Write a tab-separated table of participants."""
    return write(path, "\n".join("\t".join(line) for line in [columns, *rows]) + "\n")


def cobre(path, rows):
    """Write the table of phenotypes as NITRC distributes it: its first header is empty."""
    return write(path, "\n".join([COBRE_HEADER, *(",".join(row) for row in rows)]) + "\n")


ASEG = """# Title Segmentation Statistics
# Measure BrainSeg, BrainSegVol, Brain Segmentation Volume, 1100000.000000, mm^3
# Measure lhSurfaceHoles, lhSurfaceHoles, Number of defect holes in lh surfaces prior to fixing, 21, unitless
# Measure EstimatedTotalIntraCranialVol, eTIV, Estimated Total Intracranial Volume, {etiv:.6f}, mm^3
# NTableCols 10
# ColHeaders  Index SegId NVoxels Volume_mm3 StructName normMean normStdDev normMin normMax normRange
  1   4      7000     {ventricle:.1f}  Left-Lateral-Ventricle            30.0  10.0  10.0  80.0  70.0
  2  10      7300     {thalamus:.1f}  {name}                     90.0  10.0  10.0  99.0  89.0
  3  72         0        0.0  5th-Ventricle                      0.0   0.0   0.0   0.0   0.0
"""
APARC = """# Table of FreeSurfer cortical parcellation anatomical statistics
# Measure Cortex, NumVert, Number of Vertices, 140000, unitless
# ColHeaders StructName NumVert SurfArea GrayVol ThickAvg ThickStd MeanCurv GausCurv FoldInd CurvInd
bankssts                                 1500   1000   {first}  2.500 0.500     0.120     0.020       10     1.0
insula                                   3000   2100   {second}  2.900 0.700     0.110     0.030       20     2.0
"""


def recon(folder, name="Left-Thalamus", etiv=1.5e6, ventricle=8000.0, thalamus=7300.0, first=2500, second=6900):
    """Write the stats files of one subject as recon-all does."""
    text = ASEG.format(name=name, etiv=etiv, ventricle=ventricle, thalamus=thalamus)
    write(folder / "stats" / "aseg.stats", text)
    for side in ("lh", "rh"):
        write(folder / "stats" / f"{side}.aparc.stats", APARC.format(first=first, second=second))
    return folder
