"""Pin what autospec runs with: `envs/constraints.txt` for pip, and from it `envs/autospec.yaml` for conda.

``python envs/pin.py`` resolves today's releases in fresh virtual environments; ``python envs/pin.py --conda`` only
writes the conda file again from the constraints.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ENVS = Path(__file__).resolve().parent
CONSTRAINTS = ENVS / "constraints.txt"
CONDA = ENVS / "autospec.yaml"
TORCH = "torch==2.13.0"
HEAD = """\
# Pins of everything that `make` installs, written by `make constraints` (envs/pin.py); Python 3.11 and newer.
"""
RUNTIME, TESTS, SLURM = "# needed to run", "# needed to test as well", "# needed for Slurm as well"
# Of these no `make` target installs anything, so they are pinned alone, without what they need.
EXAMPLES = "# needed for examples and rivals as well"
EXAMPLE_EXTRAS = "[bench,lightning,transformers]"


def resolved(extras: str, pins: tuple[str, ...] | list[str] = ()) -> list[str]:
    """Install the project into a fresh environment and list what pip chose, keeping to the pins that there are."""
    with tempfile.TemporaryDirectory() as folder:
        python, kept = Path(folder) / "bin" / "python", Path(folder) / "kept.txt"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        kept.write_text("\n".join(pins))
        project = f"{ENVS.parent}{extras}"
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", kept, TORCH, project], check=True)
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
        ).stdout
    skipped = ("pip==", "setuptools==", "wheel==", "autospec-neuro==")
    # A local version such as 2.13.0+cpu is one build of a release; the release is what is pinned.
    return sorted(line.split("+")[0] for line in listed.split() if not line.startswith(skipped))


def named(pin: str) -> bool:
    """Whether a pin is of a package that pyproject.toml names itself."""
    return f'"{pin.split("==")[0].lower()}>=' in (ENVS.parent / "pyproject.toml").read_text().lower()


def runtime_pins(constraints: str) -> list[str]:
    """Pins in the first section of the constraints file."""
    section = constraints.split(RUNTIME)[1].split(TESTS)[0]
    return [line for line in section.splitlines() if "==" in line]


def conda_file(constraints: str) -> str:
    """Text of the conda environment: python and pip, and pip's pins."""
    pins = "\n".join(f"      - {pin}" for pin in runtime_pins(constraints))
    return (
        "# Generated from envs/constraints.txt by `python envs/pin.py --conda`; used with `snakemake --sdm conda`.\n"
        "# autospec itself is taken from the folder of the Snakefile.\n"
        f"channels:\n  - conda-forge\ndependencies:\n  - python =3.11\n  - pip\n  - pip:\n{pins}\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conda", action="store_true", help="only write the conda file again")
    if not parser.parse_args().conda:
        needed = resolved("")
        lines = [HEAD, RUNTIME, *needed]
        for section, extras in ((TESTS, "[test]"), (EXAMPLES, EXAMPLE_EXTRAS), (SLURM, "[slurm]")):
            chosen = [pin for pin in resolved(extras, needed) if pin not in needed]
            lines += ["", section, *(pin for pin in chosen if section != EXAMPLES or named(pin))]
        CONSTRAINTS.write_text("\n".join([*lines, ""]))
    CONDA.write_text(conda_file(CONSTRAINTS.read_text()))
