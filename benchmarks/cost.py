"""What it costs to record spectra at every training step: autospec.watch and the ways to do it by hand.

``python benchmarks/cost.py`` prints one markdown table; ``--write`` puts it into benchmarks/README.md as
well.  README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- cost table: begin -->", "<!-- cost table: end -->"
STATISTICS = {"gradient": ("gradient",), "all three": ("gradient", "activation", "adjoint")}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
WARM_UP_STEPS = 3
CHECKED_STEPS = 3
MEMORY_STEPS = 10
# Makes the C library hand freed matrices back at once, so that a peak is what was in use and not what lay idle.
PROMPT_RELEASE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Largest deviation from float64, in units of the batch's or group's own sigma_1.  These models have ReLU,
# whose signs differ between float32 and float64 for a few samples: 1.3e-5 and more is rounding.
CHECK_TOLERANCE = 1e-4


# ---------------------------------------------------------------------- in the child processes


def load_batch(path: str, device: str):
    """Load the batch that `make_data` saved."""
    import numpy as np
    import torch
    from models import Batch

    with np.load(path) as arrays:
        x = torch.from_numpy(arrays["x"]).to(device)
        target = torch.from_numpy(arrays["target"]).to(device) if "target" in arrays else x
        return Batch(x, target, [str(label) for label in arrays["labels"]])


def start(job: dict, contestant: str):
    """Make a contestant with its own copy of the model, the same weights every time."""
    import torch
    from contestants import CONTESTANTS
    from models import CASES

    case = CASES[job["model"]]
    torch.manual_seed(0)
    model = case.make_model().to(job["device"])
    batch = load_batch(job["data"], job["device"])
    return CONTESTANTS[contestant](case, model, batch, STATISTICS[job["statistics"]])


def make_data(job: dict) -> dict:
    """Make the data in a process of its own, so that making them counts in nobody's peak memory."""
    import numpy as np
    from models import CASES

    x, target, labels = CASES[job["model"]].make_data()
    np.savez(job["data"], x=x, labels=labels, **({} if target is None else {"target": target}))
    return {}


def check(job: dict) -> dict:
    """Compare what a contestant records, and the weights it leaves, with float64 and with the plain step."""
    import numpy as np
    import torch
    from oracle import exact_spectra

    plain, contestant = start(job, "plain"), start(job, job["contestant"])
    contestant.open()
    exact = []
    for _ in range(CHECKED_STEPS):
        batch = contestant.batch
        handles_off = start(job, "plain").model
        handles_off.load_state_dict(contestant.model.state_dict())
        exact.append(exact_spectra(handles_off, batch.x, batch.target, contestant.rows, contestant.case.loss))
        contestant.step()
        plain.step()
    recorded = contestant.close()
    largest = 0.0
    groups = len(contestant.rows) + 1 if contestant.groups_recorded else 1
    wanted = itertools.product(contestant.layers, contestant.wanted)
    for layer, statistic in wanted:
        values = recorded[layer, statistic]
        assert len(values) == CHECKED_STEPS, f"{job['contestant']}: {len(values)} steps recorded"
        for step, group in np.ndindex(CHECKED_STEPS, groups):
            right = exact[step][layer, statistic][group].cpu().numpy()[: values.shape[2]]
            found = values[step, group, : len(right)]
            error = float(np.max(np.abs(found - right)) / right[0])
            assert error <= CHECK_TOLERANCE, (
                f"{job['contestant']}: the {statistic} of '{layer}' (step {step}, group {group}) "
                f"is {error:.2g} from float64."
            )
            largest = max(largest, error)
    for mine, plains in zip(contestant.model.parameters(), plain.model.parameters(), strict=True):
        if contestant.training_unchanged:
            assert torch.equal(mine, plains), f"{job['contestant']}: it changed the training"
        else:
            assert torch.allclose(mine, plains, atol=1e-3), f"{job['contestant']}: it trained another model"
    return {"error": largest}


def serve(job: dict) -> dict:
    """Time a contestant alone in its process, a block of steps each time the parent asks for one."""
    import torch

    from autospec import watch  # noqa: F401  (in every child, so that all processes are alike)

    cuda = job["device"] != "cpu"
    torch.set_num_threads(torch.get_num_threads() if cuda else 1)

    def timed(work) -> float:
        if cuda:
            torch.cuda.synchronize()
        clock = time.perf_counter if cuda else time.process_time
        begin = clock()
        work()
        if cuda:
            torch.cuda.synchronize()
        return clock() - begin

    def steps(trainer, count: int) -> None:
        for _ in range(count):
            trainer.step()

    warm_up = start(job, job["contestant"])
    warm_up.open()
    steps(warm_up, WARM_UP_STEPS)
    warm_up.close()
    del warm_up
    contestant = start(job, job["contestant"])
    work = {
        # The first step is apart: it is where a row map is probed and where index tables are built.
        "open": lambda: (contestant.open(), contestant.step()),
        "block": lambda: steps(contestant, job["block"]),
        "close": contestant.close,
    }
    print("ready", flush=True)
    for line in sys.stdin:
        print(timed(work[line.strip()]), flush=True)
    return {"device_name": torch.cuda.get_device_name() if cuda else ""}


def measure_memory(job: dict) -> dict:
    """Peak memory of a process in which a contestant alone trains for some steps."""
    import torch

    from autospec import watch  # noqa: F401  (in every child, so that imports count in nobody's extra memory)

    contestant = start(job, job["contestant"])
    contestant.open()
    for _ in range(MEMORY_STEPS):
        contestant.step()
    contestant.close()
    if job["device"] != "cpu":
        return {"memory": torch.cuda.max_memory_allocated()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory": peak if sys.platform == "darwin" else peak * 1024}


JOBS = {"data": make_data, "check": check, "serve": serve, "memory": measure_memory}


# ---------------------------------------------------------------------- in the parent process


def child(job: dict, **pipes) -> subprocess.Popen:
    """Start one job in a fresh process with one thread."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    if job["job"] == "memory":
        environment.update(PROMPT_RELEASE)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **pipes
    )


def run_child(job: dict) -> dict:
    """Run one job and return what it printed last."""
    process = child(job)
    out, errors = process.communicate()
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"{job['job']} of {job['contestant']} on {job['model']} failed: {last}")
    return json.loads(out.strip().splitlines()[-1])


def measure(job: dict) -> dict:
    """Time a contestant and the plain step, each in its own process, block by block in turn."""
    processes = {
        name: child(job | {"job": "serve", "contestant": who}, stdin=subprocess.PIPE)
        for name, who in (("plain", "plain"), ("own", job["contestant"]))
    }

    def ask(name: str, what: str) -> float:
        process = processes[name]
        process.stdin.write(what + "\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    for process in processes.values():
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{job['contestant']} on {job['model']} failed: {process.communicate()[1][-300:]}")
    rounds, block = job["rounds"], job["block"]
    total = rounds * block
    ask("plain", "open")
    once = ask("own", "open")
    blocks = [(ask("plain", "block"), ask("own", "block")) for _ in range(rounds)]
    once += ask("own", "close")
    # The last line, once standard input is closed, says which device it was.
    ended = [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in processes.values()]
    return {
        "ratios": [(once + (total - 1) * own / block) / total / (base / block) for base, own in blocks],
        "plain_ms": 1e3 * statistics.median(base for base, _ in blocks) / block,
        "once_ms": 1e3 * (once - statistics.median(own for _, own in blocks) / block),
        **ended[0],
    }


def measure_all(options: argparse.Namespace) -> list[dict]:
    """Check and time every contestant that can record what is asked for."""
    from contestants import CONTESTANTS

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            job = {"model": model, "device": options.device, "data": str(Path(folder) / f"{model}.npz")}
            job |= {"rounds": options.rounds, "block": options.block}
            run_child(job | {"job": "data", "contestant": "nobody"})
            for name in options.statistics:
                for contestant in dict.fromkeys(["plain", *options.contestants]):
                    if not set(STATISTICS[name]) <= set(CONTESTANTS[contestant].statistics):
                        continue
                    job |= {"statistics": name, "contestant": contestant}
                    print(f"{model}, {name}: {contestant}", file=sys.stderr, flush=True)
                    checked = run_child(job | {"job": "check"}) if contestant != "plain" else {"error": 0.0}
                    measured = measure(job) | run_child(job | {"job": "memory"})
                    results.append(job | checked | measured)
    return results


def table(results: list[dict]) -> str:
    """Lay out the results: one row a contestant, one block a model and choice of statistics."""
    from contestants import CONTESTANTS
    from models import CASES

    lines = [
        "| model | spectra of | contestant | times a plain step | lowest to highest | once, in plain steps "
        "| extra memory, MB | largest error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {(r["model"], r["statistics"]): r for r in results if r["contestant"] == "plain"}
    for result in results:
        base = plain[result["model"], result["statistics"]]
        ratios = result["ratios"]
        recording = result["contestant"] != "plain"
        cells = [
            CASES[result["model"]].title,
            result["statistics"],
            CONTESTANTS[result["contestant"]].title + ("" if recording else f", {result['plain_ms']:.1f} ms"),
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            str(round(result["once_ms"] / result["plain_ms"])) if recording else "",
            f"{(result['memory'] - base['memory']) / 1e6:.0f}" if recording else "",
            f"{result['error']:.0e}" if recording else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processor() -> str:
    """Name of the processor, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    name = found.group(1) if found else name
    return f"{name}, {os.cpu_count()} cores"


def report(options: argparse.Namespace, results: list[dict]) -> str:
    """Write the table with what is needed to repeat it."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "xarray"))
    clock = "Wall time, synchronised" if options.device != "cpu" else "Processor time, one thread"
    machine = processor() + (f"; {results[0]['device_name']}" if options.device != "cpu" else "")
    arguments = [argument for argument in options.command if argument != "--write"]
    return "\n".join(
        [
            f"`{' '.join(['python benchmarks/cost.py', *arguments])}` on {machine}; "
            f"Python {platform.python_version()}, {versions}.",
            f"{clock}; {options.rounds} rounds of {options.block} steps, so what is done once "
            f"is spread over {options.rounds * options.block} steps.",
            "",
            table(results),
        ]
    )


def write(text: str) -> None:
    """Replace the generated block of README.md."""
    page = README.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    from contestants import CONTESTANTS
    from models import CASES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="default: all")
    parser.add_argument("--statistics", nargs="+", choices=STATISTICS, default=list(STATISTICS))
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each (default 5)")
    parser.add_argument("--block", type=int, default=20, help="steps in a block (default 20)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps of two contestants, one model")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.block = 2, 2
        options.models = options.models or ["mlp"]
        options.contestants = options.contestants or ["hooks", "watch"]
    options.models = options.models or list(CASES)
    options.contestants = options.contestants or list(CONTESTANTS)
    options.command = arguments
    return options


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--child"]:
        job = json.loads(arguments[1])
        print(json.dumps(JOBS[job["job"]](job)))
        return
    options = parse(arguments)
    text = report(options, measure_all(options))
    print(text)
    if options.write:
        write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
