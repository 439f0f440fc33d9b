"""Time of every training of a config, at the sizes of COBRE: ``python benchmarks/battery.py configs/paper.yaml``.

Each run is trained twice for a few updates, watched, by the stage that the workflow calls, once for longer.  The difference
gives the time of an update by kind; what the shorter one took beyond its updates comes once.  The time of updates is
multiplied by the config's number of them, that of introspection by how many the config records, and that of files, which
are written for 64 recorded updates at a time, by how often that is.  Start-up is that of a process of its own, measured for
one run of each experiment.  On the CPU this is processor time, on other devices wall time.

``python benchmarks/battery.py config.yaml --results results`` sums up what trainings that have been made say of themselves
instead, in wall time, and multiplies nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from autospec import specs  # noqa: E402
from autospec.config import Config, parse_config, read_yaml  # noqa: E402
from autospec.datasets.build import build_dataset  # noqa: E402
from autospec.datasets.labelled import write_samples  # noqa: E402
from autospec.datasets.maps import DIMENSIONS  # noqa: E402
from autospec.datasets.sinusoids import build_sinusoids  # noqa: E402

# The shape of a sample in COBRE, by the kind of data set: noise of this shape costs as much as data.
SHAPES = {
    "freesurfer": {"region": 114},
    "timeseries": {"time": 140, "network": 53},
    "maps": dict(zip(DIMENSIONS, (53, 63, 52), strict=True)),
}
# Participants of COBRE by diagnosis and sex.
PARTICIPANTS = {("SZ", "M"): 63, ("SZ", "F"): 15, ("HC", "M"): 55, ("HC", "F"): 24}
KINDS = ("training", "introspection", "input_output", "start_up")
SHORT = 2  # updates of the shorter training; the first one does what comes once


@dataclass
class Cost:
    """Seconds of one training by kind, at its full length, and what was measured for it."""

    seconds: dict[str, float]
    updates: int
    recorded: int
    plain: float
    watching: float


def build(config: Config, dataset: str, path: str) -> None:
    """Write a data set: digits and sinusoids as the config has them, those of a cohort as noise of its shape."""
    chosen = config.datasets[dataset]
    if chosen.kind == "mnist":
        build_dataset(specs.dataset_settings(config, dataset), specs.dataset_files(config, dataset), path)
    elif chosen.kind == "sinusoids":
        build_sinusoids(specs.sinusoid_settings(config, dataset), path)
    else:
        dims = SHAPES[chosen.kind]
        shape = tuple(dims.values())
        who = [pair for pair, count in PARTICIPANTS.items() for _ in range(count)]
        noise = np.random.default_rng(0)
        diagnosis, sex = (list(labels) for labels in zip(*who, strict=True))
        volumes = chosen.kind == "freesurfer"  # a training fits their dependence on the size of the head anew
        write_samples(
            (noise.standard_normal(shape, dtype=np.float32) for _ in who),
            shape=shape,
            dims=tuple(dims),
            ids=[f"{number:03d}" for number in range(len(who))],
            target=diagnosis,
            groupings={"diagnosis": diagnosis, "sex": sex},
            attributes={"kind": chosen.kind, "source": "noise"} | ({"icv": chosen.icv} if volumes else {}),
            coordinates={},
            path=path,
            covariates={"intracranial_volume": noise.standard_normal(len(who))} if volumes else {},
        )


def trained(settings: dict[str, Any], dataset: str, updates: int, device: str) -> dict[str, float]:
    """Seconds by kind of a training of so many epochs, each update recorded."""
    from autospec.training import train_run

    chosen = copy.deepcopy(settings)
    chosen["training"]["epochs"] = updates
    chosen["introspection"].update(every=1, steps=None)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(open(os.devnull, "w")):
        outputs = {"output": f"{folder}/run.zarr.zip", "weights": f"{folder}/weights.pt", "work": f"{folder}/work"}
        record = train_run(chosen, "benchmark", dataset, device=device, **outputs).record
    seconds = record["seconds"]
    return {kind: seconds.get(kind, 0.0) for kind in KINDS} | {"updates": record["updates"]}


def start_up(settings: dict[str, Any], dataset: str, device: str) -> float:
    """Seconds that a process takes beside what a training of one update takes in a process that has begun already."""
    chosen = copy.deepcopy(settings)
    chosen["training"].update(epochs=1)
    spec = json.dumps({"code": "benchmark", "settings": chosen})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "autospec", "train", "--spec", spec, "--dataset", dataset, "--device", device]
        for name in ("work", "output", "weights", "resources"):
            command += [f"--{name}", f"{folder}/{name}{'.zarr.zip' if name == 'output' else ''}"]
        before = _of_children(), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        took = _of_children() - before[0] if device == "cpu" else time.perf_counter() - before[1]
    used = trained(settings, dataset, 1, device)
    return took - sum(seconds for kind, seconds in used.items() if kind in KINDS and kind != "start_up")


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cost(settings: dict[str, Any], dataset: str, budget: float, starting: float, device: str) -> Cost:
    """Time of a training at its full length, from two short ones.

    The longer one makes up to 62 updates more, or as many as take about the budget of seconds.
    """
    short = trained(settings, dataset, SHORT, device)
    guess = (short["training"] + short["introspection"]) / SHORT
    for _ in range(2):  # the first guess counts what comes once, so it may be of too few updates
        more = int(np.clip(budget / guess, 2, 62))
        longer = trained(settings, dataset, SHORT + more, device)
        took = sum(longer[kind] - short[kind] for kind in ("training", "introspection"))
        if more == 62 or took >= budget / 2:
            break
        guess = max(took / more, budget / 62)
    updates = int(settings["training"]["epochs"] * short["updates"] / SHORT)
    introspection = settings["introspection"]
    recorded = -(-updates // introspection["every"]) if introspection["steps"] is None else len(introspection["steps"])
    made = longer["updates"] - short["updates"]
    each = {kind: max(0.0, longer[kind] - short[kind]) / made for kind in ("training", "introspection")}
    seconds = {"start_up": starting, "input_output": longer["input_output"] * -(-recorded // 64)}
    for kind, times in (("training", updates), ("introspection", recorded)):
        once = max(0.0, short[kind] - short["updates"] * each[kind])
        seconds[kind] = once + times * each[kind]
    return Cost(seconds, updates, recorded, each["training"], each["introspection"])


def measure(config: Config, chosen: list[str], budget: float, device: str) -> Iterator[tuple[str, list[Cost]]]:
    """Costs of each experiment's runs, one experiment after the other."""
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            experiment = config.experiments[name]
            dataset = f"{folder}/{experiment.dataset}.zarr.zip"
            if not Path(dataset).exists():
                build(config, experiment.dataset, dataset)
            found: list[Cost] = []
            starting = None
            for run in experiment.runs:
                settings = specs.run_settings(config, name, run)
                starting = start_up(settings, dataset, device) if starting is None else starting
                found.append(cost(settings, dataset, budget, starting, device))
                print(f"{name}/{run}: {sum(found[-1].seconds.values()):.0f} s", file=sys.stderr, flush=True)
            yield name, found


def recorded(config: Config, chosen: list[str], results: Path) -> Iterator[tuple[str, list[Cost]]]:
    """What trainings that were made say of themselves."""
    for name in chosen:
        found = []
        for run in config.experiments[name].runs:
            used = json.loads((results / "runs" / name / f"{run}.json").read_text())
            seconds = {kind: used["seconds"].get(kind, 0.0) for kind in KINDS}
            steps = specs.run_settings(config, name, run)["introspection"]
            count = len(steps["steps"]) if steps["steps"] else -(-used["updates"] // steps["every"])
            each = (seconds["training"] / used["updates"], seconds["introspection"] / count)
            found.append(Cost(seconds, used["updates"], count, *each))
        yield name, found


HEAD = """\
| experiment | trainings | updates | recorded | ms an update | ms of introspection a recorded update | \
minutes, all its trainings | training | introspection | I/O | start-up |
|---|---|---|---|---|---|---|---|---|---|---|"""


def row(title: str, costs: list[Cost]) -> str:
    """The table's row of some trainings."""
    sums = {kind: sum(cost.seconds[kind] for cost in costs) for kind in KINDS}
    total = sum(sums.values())

    def range_of(values: list[float]) -> str:
        return " to ".join(dict.fromkeys(_three_digits(value) for value in (min(values), max(values))))

    cells = [
        title,
        str(len(costs)),
        range_of([cost.updates for cost in costs]),
        range_of([cost.recorded for cost in costs]),
        range_of([1000 * cost.plain for cost in costs]),
        range_of([1000 * cost.watching for cost in costs]),
        _three_digits(total / 60),
        *(f"{100 * sums[kind] / total:.0f} %" for kind in KINDS),
    ]
    return f"| {' | '.join(cells)} |"


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"


def machine(device: str) -> str:
    """Where this was measured, and with which versions."""
    import torch

    place = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        if device != "cuda":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            place = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    return f"{place}, {threads}; Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configs/paper.yaml, say")
    parser.add_argument("--experiments", nargs="+", help="some of them alone")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds that the longer training may take, about")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="sum up the trainings of a results folder, and train nothing")
    options = parser.parse_args()
    config = parse_config(read_yaml(options.config), options.config)
    chosen = options.experiments or list(config.experiments)
    if options.results is None:
        import torch

        if options.device == "cpu":  # what else the machine does moves wall time more
            time.perf_counter = time.process_time
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
        found = measure(config, chosen, options.budget, options.device)
        print(machine(options.device) + "\n")
    else:
        found = recorded(config, chosen, options.results)
    print(HEAD, flush=True)
    costs: list[Cost] = []
    for name, its_costs in found:  # a run that is stopped has printed what it has measured
        print(row(name, its_costs), flush=True)
        costs += its_costs
    print(row("**all**", costs))


if __name__ == "__main__":
    main()
