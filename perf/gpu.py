"""Everything that a machine with a GPU is asked, within a few minutes: `make gpu`, ``python -m tritune.perf.gpu``.

    1   tier 4 of the tests; beside it processes that check every case, so that all kernels are compiled by the end
    2   each case: correctness, then our time against torch's, most important first
    3   for the kernels of the main layers the best of a few configs
    4   a table, last

Nothing here can take the run down: tests and cases run in child processes with time limits, one that crashes or hangs
is reported by name and the next begins behind it, and the files are written after every result. ``--resume`` goes on
where the run ended that wrote them. ``--rehearse`` does all of it on a CPU with tiny layers in Triton's interpreter;
the times mean nothing then.

Exit status: 0 all is right, 1 a wrong result, a failed test or a crash, 2 no GPU, no such case or bad usage, 130
interrupted.

The command line is argparse's: a machine with a GPU needs nothing but torch, triton and pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..autotune import store
from ..autotune.child import Child, child_environment, next_event, terminated_like_interrupted
from ..autotune.environment import without_paths
from ..autotune.paths import in_words, readable_file, writable_folder
from ..autotune.progress import Progress
from . import gpu_tests
from .gpu_results import Results

DEFAULT_OUT = Path("perf/results")
BUDGET_SECONDS = 460.0
TESTS_SHARE = 0.44  # of the budget, at most: tests and compiling
START_SECONDS = 120.0  # a worker's imports, on a machine that has not read torch from its disk yet
ITEM_SECONDS = 60.0
LAST_SECONDS = 8.0  # kept for the imports of this process, the files and the table
INTERRUPTED = 130  # exit status
MAX_IDLE_STARTS = 2  # workers in a row that ended before they began anything


@dataclass(frozen=True)
class Options:
    """What was asked.

    Attributes:
        out: folder for the results; with ``merge`` the store that entries are added to. Default: DEFAULT_OUT, and in it
            a folder for each GPU.
        tests: what ``pytest -m gpu`` runs; none: no tests.
        patterns: only <family>/<case> names that contain one of these; all if there are none.
        resume: go on where the run ended whose results are in ``out``; what failed there runs again.
        merge: a measured_configs.json to put into a store, instead of measuring.
        cases: module whose CASES are measured.
        item_limit: seconds after which a case counts as hung.
    """

    out: Path | None = None
    budget: float = BUDGET_SECONDS
    rehearse: bool = False
    tests: Sequence[str] = ("tests",)
    patterns: Sequence[str] = ()
    resume: bool = False
    merge: Path | None = None
    json: bool = False
    cases: str = ".families"
    item_limit: float = ITEM_SECONDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        help=f"folder for the results; default: {DEFAULT_OUT}/<GPU>; with --merge the store to add to",
    )
    add("--budget", type=float, default=BUDGET_SECONDS, help="seconds for everything")
    add("--rehearse", action="store_true", help="on the CPU, tiny layers, Triton's interpreter")
    add("--tests", nargs="*", default=["tests"], help="what pytest -m gpu runs; nothing: no tests")
    add("--cases", default=".families", help="module whose CASES are measured")
    names = 'only <family>/<case> names that contain this, or another one given so; "sweep-" begins those of sweeps'
    add("-k", dest="patterns", action="append", default=[], metavar="TEXT", help=names)
    add("--item-limit", type=float, default=ITEM_SECONDS, help="seconds after which a case counts as hung")
    add("--resume", action="store_true", help="go on where the run ended whose results are in the folder of --out")
    add("--merge", type=Path, metavar="FILE", help="only put a measured_configs.json into the store that --out names")
    add("--json", action="store_true", help="the results as one JSON document, and nothing else on standard output")


def main(args: Options) -> int:
    try:
        if args.merge:
            return merge(args.merge, args.out, as_json=args.json)
        return run(args)
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED


def run(args: Options) -> int:
    deadline = time.monotonic() + args.budget - LAST_SECONDS
    stream = sys.stderr if args.json else sys.stdout
    out = writable_folder(args.out or DEFAULT_OUT)
    hello = probe(args, deadline, stream)
    if hello is None:
        return 2
    if out == DEFAULT_OUT:
        out /= hello["env"]["slug"]
    results = Results(out, hello["env"], hello["items"])
    if args.resume:
        try:
            results.resume()
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"resumed: {results.counts()}", file=stream, flush=True)
    try:
        with Progress(stream, len(results.todo)) as progress:
            tests_and_warm_up(args, results, progress, time.monotonic() + TESTS_SHARE * args.budget)
            measure(args, results, progress, deadline)
    except KeyboardInterrupt:
        print(f"interrupted, {results.counts()}; written to {out}", file=sys.stderr)
        return INTERRUPTED
    finally:
        results.write()
    print(f"\n{results.table()}\nwritten to {out}", file=stream, flush=True)
    if args.json:
        print(json.dumps(results.to_json(), indent=1))
    return 0 if results.ok else 1


# --- children --------------------------------------------------------------------------------------------------------


def start_worker(args: Options, results: Results | None, *options: str) -> Child:
    command = [sys.executable, "-m", f"{__package__}.worker", "--child", "--cases", args.cases, *options]
    command += [f"-k={pattern}" for pattern in args.patterns]  # an empty one, too, or one that begins with "="
    if args.rehearse:
        command.append("--rehearse")
    if results:
        command += ["--done", *results.earlier]
    return Child(command, child_environment(args.rehearse))


def probe(args: Options, deadline: float, out: TextIO) -> dict[str, Any] | None:
    """What a worker finds here, or nothing and a word why."""
    child = start_worker(args, None, "--probe")
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
    print(f"{hello['env']['gpu'] or 'rehearsal'}: {len(hello['items'])} items", file=out, flush=True)
    return hello


# --- tests, and compiling beside them --------------------------------------------------------------------------------


def tests_and_warm_up(args: Options, results: Results, progress: Progress, deadline: float) -> None:
    """Tests and compiling use the processors, not much of the GPU, so they share this time; timing is alone later."""
    count = gpu_tests.warmers()
    memory = f"{0.4 / count:.3f}"  # the tests need some, too
    warmers = [
        start_worker(args, results, "--untimed", "--first", str(first), "--step", str(count), "--memory", memory)
        for first in range(count)
    ]
    try:
        if args.tests and gpu_tests.has_tests():
            run_tests(args, results, progress, deadline)
        progress.update(0, state="compiling")
        while not args.rehearse and any(child.process.poll() is None for child in warmers):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    finally:
        for child in warmers:
            child.kill()


def run_tests(args: Options, results: Results, progress: Progress, deadline: float) -> None:
    progress.update(0, deadline - time.monotonic(), "GPU tests")
    tests = gpu_tests.TierFour(child_environment(rehearse=False), list(args.tests), gpu_tests.jobs())
    try:
        tests.wait(deadline, lambda ran: progress.update(0, deadline - time.monotonic(), f"GPU tests: {ran} ran"))
    finally:
        results.write_tests(tests.to_json())
    progress.line(gpu_tests.in_words(results.tests))


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(args: Options, results: Results, progress: Progress, deadline: float) -> None:
    """All items in order, by one worker after the other, until there are none left or the time is up."""
    index = idle_starts = 0
    while index < len(results.todo) and time.monotonic() < deadline:
        reached = one_worker(args, results, progress, index, deadline)
        idle_starts = idle_starts + 1 if reached == index else 0
        index = reached
        if idle_starts == MAX_IDLE_STARTS:
            results.failures["worker"] = "ended twice before it began anything"
            break
    results.write()


def one_worker(args: Options, results: Results, progress: Progress, first: int, deadline: float) -> int:
    """Reads one worker's events until it ends or must be ended. Returns the index of the item after its last."""
    child = start_worker(args, results, "--first", str(first))
    index, running = first, False
    limit = START_SECONDS
    try:
        while True:
            event = next_event(child, min(limit, deadline - time.monotonic()))
            if event is None:
                break
            if event["event"] == "begin":
                running, limit = True, args.item_limit
                progress.update(index, deadline - time.monotonic(), results.todo[index]["id"])
            elif event["event"] == "done":
                return len(results.todo)
            else:
                results.add(results.todo[index], event)
                results.write()
                show(index, results, progress)
                index, running = event["index"] + 1, False
        how = without_paths(child.how_it_ended())
    except TimeoutError:
        if time.monotonic() >= deadline:
            return len(results.todo)
        how = f"hung: nothing for {limit:.0f} s"
    finally:
        child.kill()
    if running:
        results.fail(results.todo[index], how)
        results.write()
        show(index, results, progress)
        return index + 1
    progress.line(f"a worker {how}")
    return index


def show(index: int, results: Results, progress: Progress) -> None:
    """What came of an item, in a line."""
    name = results.todo[index]["id"]
    if name in results.failures:
        result = results.failures[name][:150]
    elif name in results.sweeps:
        entry = results.sweeps[name]["entry"]
        result = f"{entry['us']:.1f} us with {entry['config']}" if entry else "no config"
    else:
        times = {one["provider"]: one.get("device_us") for one in results.records if one["id"] == name}
        result = ", ".join(f"{provider} {us['p50']:.1f}" for provider, us in times.items() if us) + " us"
    progress.line(f"[{index + 1}/{len(results.todo)}] {name}: {result}")


# --- putting what was found into the store ---------------------------------------------------------------------------


def merge(file: Path, out: Path | None, *, as_json: bool = False) -> int:
    """Adds the entries of a measured_configs.json to ``<out>/<slug>/<kernel>.json``; a key there is replaced."""
    if out is None:
        print("--merge needs --out STORE to add to; in a checkout autotune/configs", file=sys.stderr)
        return 2
    writable_folder(out)
    try:
        document = json.loads(readable_file(file).read_text(encoding="utf-8"))
        found = {kernel: [store.Entry.from_json(data) for data in raw] for kernel, raw in document["kernels"].items()}
        folder = out / document["slug"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{file} is no measured_configs.json: {type(error).__name__} {error}", file=sys.stderr)
        return 2
    if any(entry.origin != "measured" for entries in found.values() for entry in entries):
        print(f"{file.name} is from a rehearsal: nothing in it was measured on a GPU", file=sys.stderr)
        return 1
    for kernel, entries in found.items():
        path = folder / f"{kernel}.json"
        store.write(path, kernel, entries)
        Path(f"{path}.lock").unlink(missing_ok=True)  # the store may be part of a checkout
        if not as_json:
            print(f"{kernel}: {len(entries)} entries for {folder.name}")
    if as_json:
        counts = {kernel: len(entries) for kernel, entries in found.items()}
        print(json.dumps({"folder": str(folder), "entries": counts}, indent=1))
    return 0


if __name__ == "__main__":
    command_line = argparse.ArgumentParser(prog=f"python -m {__package__}.gpu", description=__doc__.split("\n")[0])
    add_arguments(command_line)
    options = Options(**vars(command_line.parse_args()))
    try:
        with terminated_like_interrupted():
            status = main(options)
    except OSError as error:
        print(f"{command_line.prog}: {in_words(error)}", file=sys.stderr)
        status = 2
    if status == INTERRUPTED:  # all is written: whoever interrupts does not wait a second for torch to be unloaded
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
