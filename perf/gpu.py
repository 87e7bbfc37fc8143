"""Everything that a machine with a GPU is asked, within a few minutes: `make gpu`, ``python -m tritune.perf.gpu``.

    1   tier 4 of the tests; beside it processes that check every case, so that all kernels are compiled by the end
    2   each case: correctness, then our time against torch's, most important first
    3   for the kernels of the main layers the best of a few configs
    4   a table, last

Nothing here can take the run down: tests and cases run in child processes with time limits, one that crashes or hangs
is reported by name and the next begins behind it, and the files are written after every result. ``--rehearse`` does all
of it on a CPU with tiny layers in Triton's interpreter; the times mean nothing then.

Exit status: 0 all is right, 1 a wrong result, a failed test or a crash, 2 no GPU or no such case, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..autotune import store
from . import gpu_tests
from .child import Child, child_environment, next_event, terminated_like_interrupted
from .environment import without_paths
from .gpu_results import Results

DEFAULT_OUT = Path("perf/results")
BUDGET_SECONDS = 460.0
TESTS_SHARE = 0.44  # of the budget, at most: tests and compiling
START_SECONDS = 120.0  # a worker's imports, on a machine that has not read torch from its disk yet
ITEM_SECONDS = 60.0
LAST_SECONDS = 8.0  # kept for the imports of this process, the files and the table
MAX_IDLE_STARTS = 2  # workers in a row that ended before they began anything


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default=str(DEFAULT_OUT), help=f"folder for the results; in {DEFAULT_OUT} a folder for each GPU"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for everything")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny layers, Triton's interpreter")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="what pytest -m gpu runs; nothing: no tests")
    parser.add_argument("--cases", default=".families", help="module whose CASES are measured")
    parser.add_argument(
        "-k",
        dest="patterns",
        action="append",
        default=[],
        metavar="PATTERN",
        help='only <family>/<case> names that contain this, or another one given so; "sweep-" begins those of sweeps',
    )
    parser.add_argument(
        "--item-limit", type=float, default=ITEM_SECONDS, help="seconds after which a case counts as hung"
    )
    parser.add_argument("--merge", metavar="FILE", help="only put a measured_configs.json into the shipped configs")


def main(args: argparse.Namespace) -> int:
    if args.merge:
        return merge(Path(args.merge))
    try:
        with terminated_like_interrupted():
            return run(args)
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + args.budget - LAST_SECONDS
    hello = probe(args, deadline)
    if hello is None:
        return 2
    out = Path(args.out)
    if out == DEFAULT_OUT:
        out /= hello["env"]["slug"]
    results = Results(out, hello["env"], hello["items"])
    try:
        tests_and_warm_up(args, results, time.monotonic() + TESTS_SHARE * args.budget)
        measure(args, results, deadline)
    finally:
        results.write()
        print(f"\n{results.table()}\nwritten to {out}", flush=True)
    return 0 if results.ok else 1


# --- children --------------------------------------------------------------------------------------------------------


def start_worker(args: argparse.Namespace, *options: str) -> Child:
    command = [sys.executable, "-m", f"{__package__}.worker", "--child", "--cases", args.cases, *options]
    command += [f"-k={pattern}" for pattern in args.patterns]  # an empty one, too, or one that begins with "="
    if args.rehearse:
        command.append("--rehearse")
    return Child(command, child_environment(args.rehearse))


def probe(args: argparse.Namespace, deadline: float) -> dict[str, Any] | None:
    """What a worker finds here, or nothing and a word why."""
    child = start_worker(args, "--probe")
    try:
        hello = next_event(child, min(START_SECONDS, deadline - time.monotonic()))
        if hello is None:
            print(f"the worker {without_paths(child.how_it_ended())}", file=sys.stderr)
            return None
    except TimeoutError:
        print(f"no worker could start within {START_SECONDS:.0f} s", file=sys.stderr)
        return None
    finally:
        child.kill()
    if not hello["env"]["gpu"] and not args.rehearse:
        print("torch finds no GPU here; --rehearse runs everything on the CPU", file=sys.stderr)
        return None
    if not hello["items"]:
        print(f"no case has {' or '.join(args.patterns)} in its name", file=sys.stderr)
        return None
    print(f"{hello['env']['gpu'] or 'rehearsal'}: {len(hello['items'])} items", flush=True)
    return hello


# --- tests, and compiling beside them --------------------------------------------------------------------------------


def tests_and_warm_up(args: argparse.Namespace, results: Results, deadline: float) -> None:
    """Tests and compiling use the processors, not much of the GPU, so they share this time; timing is alone later."""
    count = gpu_tests.warmers()
    memory = f"{0.4 / count:.3f}"  # the tests need some, too
    warmers = [
        start_worker(args, "--untimed", "--first", str(first), "--step", str(count), "--memory", memory)
        for first in range(count)
    ]
    try:
        if args.tests and gpu_tests.has_tests():
            run_tests(args, results, deadline)
        while not args.rehearse and any(child.process.poll() is None for child in warmers):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    finally:
        for child in warmers:
            child.kill()


def run_tests(args: argparse.Namespace, results: Results, deadline: float) -> None:
    run = gpu_tests.TierFour(child_environment(rehearse=False), args.tests, gpu_tests.jobs())
    try:
        run.wait(deadline)
    finally:
        results.write_tests(run.to_json())
    print(gpu_tests.in_words(results.tests), flush=True)


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, results: Results, deadline: float) -> None:
    """All items in order, by one worker after the other, until there are none left or the time is up."""
    index = idle_starts = 0
    while index < len(results.headers) and time.monotonic() < deadline:
        reached = one_worker(args, results, index, deadline)
        idle_starts = idle_starts + 1 if reached == index else 0
        index = reached
        if idle_starts == MAX_IDLE_STARTS:
            results.failures["worker"] = "ended twice before it began anything"
            break
    results.write()


def one_worker(args: argparse.Namespace, results: Results, first: int, deadline: float) -> int:
    """Reads one worker's events until it ends or must be ended. Returns the index of the item after its last."""
    child = start_worker(args, "--first", str(first))
    index, running = first, False
    limit = START_SECONDS
    try:
        while True:
            event = next_event(child, min(limit, deadline - time.monotonic()))
            if event is None:
                break
            if event["event"] == "begin":
                running, limit = True, args.item_limit
            elif event["event"] == "done":
                return len(results.headers)
            else:
                results.add(results.headers[index], event)
                results.write()
                show(index, results)
                index, running = event["index"] + 1, False
        how = without_paths(child.how_it_ended())
    except TimeoutError:
        if time.monotonic() >= deadline:
            return len(results.headers)
        how = f"hung: nothing for {limit:.0f} s"
    finally:
        child.kill()
    if running:
        results.fail(results.headers[index], how)
        results.write()
        show(index, results)
        return index + 1
    print(f"a worker {how}", flush=True)
    return index


def show(index: int, results: Results) -> None:
    """One line of progress."""
    name = results.headers[index]["id"]
    if name in results.failures:
        result = results.failures[name][:150]
    elif name in results.sweeps:
        entry = results.sweeps[name]["entry"]
        result = f"{entry['us']:.1f} us with {entry['config']}" if entry else "no config"
    else:
        times = {one["provider"]: one.get("device_us") for one in results.records if one["id"] == name}
        result = ", ".join(f"{provider} {us['p50']:.1f}" for provider, us in times.items() if us) + " us"
    print(f"[{index + 1}/{len(results.headers)}] {name}: {result}", flush=True)


# --- putting what was found into the store ---------------------------------------------------------------------------


def merge(file: Path, folder: Path = store.SHIPPED) -> int:
    """Adds the entries of a measured_configs.json to ``<folder>/<slug>/<kernel>.json``; a key there is replaced."""
    document = json.loads(file.read_text(encoding="utf-8"))
    for kernel, raw in document["kernels"].items():
        entries = [store.Entry.from_json(data) for data in raw]
        if any(entry.source != "measured" for entry in entries):
            print(f"{file.name} is from a rehearsal: nothing in it was measured on a GPU", file=sys.stderr)
            return 1
        path = folder / document["slug"] / f"{kernel}.json"
        store.write(path, kernel, entries)
        Path(f"{path}.lock").unlink(missing_ok=True)  # the folder is part of the package
        print(f"{kernel}: {len(entries)} entries for {document['slug']}")
    return 0


if __name__ == "__main__":
    command_line = argparse.ArgumentParser(prog=f"python -m {__package__}.gpu", description=__doc__.split("\n")[0])
    add_arguments(command_line)
    sys.exit(main(command_line.parse_args()))
