"""What it costs to record spectra at every training step: autospec.watch and the ways to do it by hand.

``python benchmarks/cost.py`` prints two markdown tables, autospec.watch beside what it may cost and then every
contestant; ``--write`` puts them into benchmarks/README.md as well.  README.md says what is measured and how.
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
PROFILED_STEPS = 4
# Makes the C library hand freed matrices back at once, so that a peak is what was in use and not what lay idle.
PROMPT_RELEASE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Makes it keep them.  Left to itself, it hands large matrices back and fetches them again, at every step or never, as chance has
# it, which lengthens the same plain step by up to a half.
NO_RELEASE = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
# Where rounding differs from the plain training's, Adam moves weights without a gradient (an attention's key bias) at random.
MOVEMENT_TOLERANCE = 0.1


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
    torch.set_num_threads(1 if job["device"] == "cpu" else torch.get_num_threads())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
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
    import torch

    contestant = start(job, job["contestant"])
    if not contestant.installed():
        return {"verdict": "not installed"}
    if not contestant.able():
        return {"verdict": "cannot"}
    plain, again, initial = (start(job, "plain") for _ in range(3))
    contestant.open()
    exact = []
    for step in range(CHECKED_STEPS):
        exact.append(exact_at(contestant, plain, start(job, "plain").model, Path(f"{job['data']}.exact-{step}")))
        for trainer in (contestant, plain, again):
            trainer.step()
    error = largest_deviation(contestant, contestant.close(), exact)
    verdict = {} if error <= contestant.tolerance else {"verdict": f"wrong, off by {error:.0e}"}
    mine, plains, agains, starts = (flat(trainer) for trainer in (contestant, plain, again, initial))
    if contestant.training_unchanged and torch.equal(plains, agains) and not torch.equal(mine, plains):
        verdict = verdict or {"verdict": "wrong, changes the training"}
    if float((mine - plains).norm()) > MOVEMENT_TOLERANCE * float((plains - starts).norm()):
        verdict = verdict or {"verdict": "wrong, trains another model"}
    return {"error": error, **verdict}


def flat(trainer):
    """All weights in one row."""
    import torch

    return torch.cat([weights.flatten() for _, weights in sorted(trainer.state().items())])


def exact_at(contestant, plain, twin, path: Path) -> dict:
    """Spectra in float64 at the contestant's weights; those at the plain training's are computed once for all."""
    import torch
    from oracle import exact_spectra

    shared = torch.equal(flat(contestant), flat(plain))
    if shared and path.exists():
        return torch.load(path)
    twin.load_state_dict(contestant.state())
    batch, factors = contestant.batch, shared or contestant.wanted != ("gradient",)
    found = exact_spectra(twin, batch.x, batch.target, contestant.rows, contestant.case.loss, factors)
    if shared:
        torch.save(found, path)
    return found


def largest_deviation(contestant, recorded: dict, exact: list[dict]) -> float:
    """Largest deviation from float64 in units of the spectrum's own first value; infinite where a value is missing."""
    import numpy as np

    largest = 0.0
    groups = len(contestant.rows) + 1 if contestant.groups_recorded else 1
    for name, statistic in itertools.product(contestant.matrices, contestant.wanted):
        values = recorded[name, statistic]
        if len(values) != len(exact):
            return float("inf")
        for step, group in np.ndindex(len(exact), groups):
            right = exact[step][name, statistic][group].cpu().numpy()[: values.shape[2]]
            error = float(np.max(np.abs(values[step, group, : len(right)] - right)) / right[0])
            largest = max(largest, error if np.isfinite(error) else float("inf"))
    return largest


def serve(job: dict) -> dict:
    """Time a contestant alone in its process, a block of steps each time the parent asks for one."""
    import torch

    from autospec import watch  # noqa: F401  (in every child, so that all processes are alike)

    cuda = job["device"] != "cpu"

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


def measure_tensors(job: dict) -> dict:
    """Peak of what tensors take in any step after the first, and C + 1 copies of the largest gradient."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    contestant = start(job, job["contestant"])
    bound = (1 + len(contestant.rows)) * max(parameter.nbytes for parameter in contestant.matrices.values())
    if job["device"] != "cpu":
        contestant.open()
        contestant.step()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(PROFILED_STEPS):
            contestant.step()
        return {"tensors": torch.cuda.max_memory_allocated(), "bound": bound}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contestant.open()
        contestant.step()
        with record_function("later steps"):
            for _ in range(PROFILED_STEPS):
                contestant.step()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    begin = next(event["ts"] for event in events if event.get("name") == "later steps")
    allocated = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]" and e["ts"] >= begin]
    return {"tensors": max(allocated), "bound": bound}


JOBS = {"data": make_data, "check": check, "serve": serve, "memory": measure_memory, "tensors": measure_tensors}


# ---------------------------------------------------------------------- in the parent process


def child(job: dict, **pipes) -> subprocess.Popen:
    """Start one job in a fresh process with one thread."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    if job["job"] == "memory":
        environment.update(PROMPT_RELEASE)
    elif job.get("freed") == "kept":
        environment.update(NO_RELEASE)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **pipes
    )


class Failed(Exception):
    """A child process ended with an error."""


def run_child(job: dict) -> dict:
    """Run one job and return what it printed last."""
    process = child(job)
    out, errors = process.communicate()
    if process.returncode:
        last = (errors.strip().splitlines() or [f"it ended with {process.returncode}"])[-1]
        raise Failed(f"{job['job']} of {job['contestant']} on {job['model']} failed: {last}")
    return json.loads(out.strip().splitlines()[-1])


def measure(job: dict) -> dict:
    """Time a contestant several times, each time in fresh processes."""
    found = [measure_once(job) for _ in range(job["repeats"])]
    medians = {name: statistics.median(one[name] for one in found) for name in ("further", "plain_ms", "once_ms")}
    return found[0] | medians | {"ratios": [ratio for one in found for ratio in one["ratios"]]}


def measure_once(job: dict) -> dict:
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
            raise Failed(f"{job['contestant']} on {job['model']} failed: {process.communicate()[1][-300:]}")
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
        "further": statistics.median(own / base for base, own in blocks),
        "plain_ms": 1e3 * statistics.median(base for base, _ in blocks) / block,
        "once_ms": 1e3 * (once - statistics.median(own for _, own in blocks) / block),
        **ended[0],
    }


def measure_all(options: argparse.Namespace) -> list[dict]:
    """Check and time every contestant that is meant to record what is asked for."""
    from contestants import CONTESTANTS
    from models import CASES

    kept = Path(options.keep) if options.keep else None
    known = json.loads(kept.read_text()) if kept and kept.exists() else []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            job = {"model": model, "device": options.device, "data": str(Path(folder) / f"{model}.npz")}
            job |= {"rounds": options.rounds, "block": options.block or CASES[model].block}
            job |= {"repeats": options.repeats, "freed": options.freed}
            run_child(job | {"job": "data", "contestant": "nobody"})
            for name in options.statistics:
                for contestant in dict.fromkeys(["plain", *options.contestants]):
                    if not CONTESTANTS[contestant].takes_part(STATISTICS[name]):
                        continue
                    mine = job | {"statistics": name, "contestant": contestant}
                    before = [result for result in known if same_job(result, mine)]
                    if before:
                        results.append(before[0])
                        continue
                    print(f"{model}, {name}: {contestant}", file=sys.stderr, flush=True)
                    results.append(judge(mine))
                    if kept:
                        known.append(results[-1])
                        kept.write_text(json.dumps(known))
    return results


def same_job(result: dict, job: dict) -> bool:
    """Whether a result is of that job; where its data lay does not matter."""
    return all(result[key] == value for key, value in job.items() if key != "data")


def judge(job: dict) -> dict:
    """Check a contestant, and measure it if it is right."""
    from contestants import CONTESTANTS

    try:
        checked = run_child(job | {"job": "check"}) if job["contestant"] != "plain" else {}
        if "verdict" in checked:
            return job | checked
        return job | checked | measure(job) | run_child(job | {"job": "memory"}) | run_child(job | {"job": "tensors"})
    except Failed as error:
        if not CONTESTANTS[job["contestant"]].may_fail:
            raise SystemExit(str(error)) from error
        print(error, file=sys.stderr, flush=True)
        return job | {"verdict": "fails"}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain_steps(results: list[dict]) -> dict[tuple[str, str], dict]:
    """Results of the plain step, by model and choice of statistics."""
    return {(r["model"], r["statistics"]): r for r in results if r["contestant"] == "plain"}


def best_rival(results: list[dict], unchanged: bool) -> str:
    """Name the cheapest of the rivals that record groups; `unchanged` leaves out those that change the training's rounding."""
    from contestants import CONTESTANTS, Watch

    found = []
    for result in results:
        rival = CONTESTANTS[result["contestant"]]
        records = result["contestant"] not in ("plain", "svdvals-repeated") and rival.groups_recorded
        if records and "ratios" in result and not issubclass(rival, Watch) and rival.training_unchanged >= unchanged:
            found.append((statistics.median(result["ratios"]), rival.title))
    return "{1}: {0:.2f}".format(*min(found)) if found else ""


def summary(results: list[dict]) -> str:
    """autospec.watch beside what it may cost, and beside the best that anyone else reaches with the groups."""
    from contestants import CONTESTANTS, Watch
    from models import BAR_ON_A_GPU, BARS, CASES

    rows = []
    for result in results:
        contestant = CONTESTANTS[result["contestant"]]
        if not issubclass(contestant, Watch):
            continue
        key = (result["model"], result["statistics"])
        same = [other for other in results if (other["model"], other["statistics"]) == key]
        base = plain_steps(same)[key]
        on_a_gpu = BAR_ON_A_GPU if result["statistics"] == "all three" else None
        bar = BARS.get(key) if result["device"] == "cpu" else on_a_gpu
        row = [CASES[result["model"]].title, result["statistics"], contestant.title]
        if "verdict" in result:
            rows.append([*row, result["verdict"], "", f"{bar:g}" if bar else "", "", "", "", ""])
            continue
        rows.append(
            [
                *row,
                f"{statistics.median(result['ratios']):.2f} ({result['rounds'] * result['block']})",
                f"{result['further']:.2f}",
                f"{bar:g}" if bar else "",
                best_rival(same, unchanged=True),
                best_rival(same, unchanged=False),
                f"{(result['tensors'] - base['tensors']) / 1e6:.2f}",
                f"{result['bound'] / 1e6:.2f}",
            ]
        )
    header = ["model", "spectra of", "contestant", "times a plain step (steps)", "without what is done once", "bar"]
    header += [
        "best rival",
        "best, rounding of the training changed too",
        "extra in tensors, MB",
        "C + 1 largest gradients, MB",
    ]
    return markdown(header, rows)


def table(results: list[dict]) -> str:
    """Lay out the results: one row a contestant, one block a model and choice of statistics."""
    from contestants import CONTESTANTS
    from models import CASES

    rows = []
    for result in results:
        base = plain_steps(results)[result["model"], result["statistics"]]
        recording = result["contestant"] != "plain"
        row = [CASES[result["model"]].title, result["statistics"], CONTESTANTS[result["contestant"]].title]
        if "verdict" in result:
            rows.append([*row, result["verdict"], *[""] * 5])
            continue
        row[2] += "" if recording else f", {result['plain_ms']:.1f} ms"
        ratios = result["ratios"]
        row += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        if recording:
            row += [
                str(round(result["once_ms"] / result["plain_ms"])),
                f"{(result['memory'] - base['memory']) / 1e6:.0f}",
                f"{(result['tensors'] - base['tensors']) / 1e6:.2f}",
                f"{result['error']:.0e}",
            ]
        rows.append(row + [""] * (9 - len(row)))
    header = ["model", "spectra of", "contestant", "times a plain step", "lowest to highest", "once, in plain steps"]
    return markdown([*header, "extra memory, MB", "of it in tensors, MB", "largest error"], rows)


def processor() -> str:
    """Name of the processor, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    name = found.group(1) if found else name
    return f"{name}, {os.cpu_count()} cores"


def report(options: argparse.Namespace, results: list[dict]) -> str:
    """Write the table with what is needed to repeat it."""
    from contestants import CONTESTANTS

    libraries = {contestant.library for contestant in CONTESTANTS.values() if contestant.installed()} - {None}
    names = ("torch", "numpy", "xarray", *sorted(libraries))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    clock = "Wall time, synchronised" if options.device != "cpu" else "Processor time, one thread"
    machine = processor() + (f"; {results[0]['device_name']}" if options.device != "cpu" else "")
    arguments = shown(options.command)
    return "\n".join(
        [
            f"`{' '.join(['python benchmarks/cost.py', *arguments])}` on {machine}; "
            f"Python {platform.python_version()}, {versions}.",
            f"{clock}; fresh processes: {options.repeats}, with {options.rounds} rounds each; what is done once is spread over the "
            "steps given in brackets.",
            "",
            summary(results),
            "",
            table(results),
        ]
    )


def shown(command: list[str]) -> list[str]:
    """The options that decide what is measured."""
    keep = [i for i, argument in enumerate(command) if argument == "--keep"]
    left_out = {*keep, *(i + 1 for i in keep)}
    return [argument for i, argument in enumerate(command) if i not in left_out and argument != "--write"]


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
    parser.add_argument("--block", type=int, help="steps in a block (default: by model, 8 to 20)")
    parser.add_argument(
        "--repeats", type=int, default=1, help="fresh processes of each, one after the other (default 1)"
    )
    parser.add_argument(
        "--freed",
        choices=("system", "kept"),
        default="system",
        help="whether the C library hands freed memory back as it likes",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--keep", metavar="FILE", help="keep results there, and go on from those that it holds already")
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
    results = measure_all(options)
    text = report(options, results)
    print(text)
    if options.write:
        write(text)
    wrong = [result for result in results if "watch" in result["contestant"] and "verdict" in result]
    if wrong:
        raise SystemExit(
            "\n".join(f"{r['contestant']} on {r['model']}, {r['statistics']}: {r['verdict']}" for r in wrong)
        )


if __name__ == "__main__":
    main(sys.argv[1:])
