"""Rough volumes of an adult's brain structures, for the simulated cohort: mean in mm^3 and spread between people.

They are round numbers of the right size, not measurements, and nothing should be concluded from them.
"""

from __future__ import annotations

# Names are FreeSurfer's.  A spread is a standard deviation as a share of the mean.
_SIDED = {
    "Lateral-Ventricle": (8000, 0.30),
    "Inf-Lat-Vent": (350, 0.30),
    "Cerebellum-White-Matter": (14500, 0.10),
    "Cerebellum-Cortex": (54000, 0.08),
    "Thalamus": (7300, 0.08),
    "Caudate": (3600, 0.10),
    "Putamen": (5200, 0.10),
    "Pallidum": (1900, 0.10),
    "Hippocampus": (4100, 0.09),
    "Amygdala": (1650, 0.10),
    "Accumbens-area": (560, 0.14),
    "VentralDC": (4000, 0.08),
    "vessel": (40, 0.30),
    "choroid-plexus": (520, 0.25),
}
_UNSIDED = {
    "3rd-Ventricle": (900, 0.25),
    "4th-Ventricle": (1700, 0.22),
    "Brain-Stem": (21000, 0.08),
    "CSF": (1000, 0.15),
    "WM-hypointensities": (1200, 0.30),
    "Optic-Chiasm": (220, 0.20),
    "CC_Posterior": (950, 0.13),
    "CC_Mid_Posterior": (480, 0.18),
    "CC_Central": (500, 0.18),
    "CC_Mid_Anterior": (520, 0.18),
    "CC_Anterior": (900, 0.14),
}
_CORTICAL = {
    **{"bankssts": 2500, "caudalanteriorcingulate": 1900, "caudalmiddlefrontal": 6200, "cuneus": 3100},
    **{"entorhinal": 1800, "frontalpole": 950, "fusiform": 9700, "inferiorparietal": 13500, "inferiortemporal": 10700},
    **{"insula": 6900, "isthmuscingulate": 2500, "lateraloccipital": 11500, "lateralorbitofrontal": 7300},
    **{"lingual": 6600, "medialorbitofrontal": 5100, "middletemporal": 11200, "paracentral": 3600},
    **{"parahippocampal": 2100, "parsopercularis": 4500, "parsorbitalis": 2500, "parstriangularis": 4000},
    **{"pericalcarine": 2100, "postcentral": 9300, "posteriorcingulate": 3200, "precentral": 13200, "precuneus": 9800},
    **{"rostralanteriorcingulate": 2300, "rostralmiddlefrontal": 15800, "superiorfrontal": 22000},
    **{"superiorparietal": 13200, "superiortemporal": 11800, "supramarginal": 10500, "temporalpole": 2400},
    "transversetemporal": 1050,
}
REGIONS: dict[str, tuple[float, float]] = {
    **{f"{side}-{name}": value for side in ("Left", "Right") for name, value in _SIDED.items()},
    **_UNSIDED,
    **{f"{side}_{name}": (mean, 0.12) for side in ("lh", "rh") for name, mean in _CORTICAL.items()},
}
# Structures in which simulated patients differ, and in which direction.
EFFECTS: dict[str, int] = {
    f"{side}-{name}": sign
    for side in ("Left", "Right")
    for name, sign in (("Hippocampus", -1), ("Amygdala", -1), ("Thalamus", -1), ("Lateral-Ventricle", 1))
}
# FreeSurfer's number of each structure in its table of colours.
SEGMENT_NUMBERS = {
    **dict(zip((f"Left-{name}" for name in _SIDED), (4, 5, 7, 8, 10, 11, 12, 13, 17, 18, 26, 28, 30, 31), strict=True)),
    **dict(
        zip((f"Right-{name}" for name in _SIDED), (43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60, 62, 63), strict=True)
    ),
    **dict(zip(_UNSIDED, (14, 15, 16, 24, 77, 85, 251, 252, 253, 254, 255), strict=True)),
}
# Rows that FreeSurfer always writes and that are empty in almost everybody.
EMPTY_SEGMENTS = {"5th-Ventricle": 72, "Left-WM-hypointensities": 78, "Right-WM-hypointensities": 79}
