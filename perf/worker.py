"""The process that measures: one case after the other, each checked before it is timed, one JSON line for each.

    python -m tritune.perf.worker --probe          what there is to measure, and where
    python -m tritune.perf.worker --first 12       from the twelfth item on

It is a process of its own because a fault on a GPU ends the process that caused it: :mod:`.gpu` starts the next one
behind the case that failed. Lines on standard output::

    {"event": "hello", "env": {...}, "items": ["<id>", ...]}
    {"event": "begin", "index": 0, "id": ..., "op": ..., "shape": ..., ...}
    {"event": "case", "index": 0, "records": [...]}            or {"event": "sweep", ...}, or {"event": "error", ...}
    {"event": "done"}
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autotune import environment
from ..autotune.check import (
    EPSILON,
    Machine,
    argument_sets,
    compare,
    device_alive,
    poisoned,
    set_cudnn,
    without_cudnn,
)
from ..autotune.child import end_with_parent, private_stdout
from ..autotune.device import detect
from ..autotune.timer import Competitor, Timing, timer_for
from ..autotune.workload import Case, random_tensors
from ..ops import record, use_backend
from .families import header, operator_of, tiny
from .providers import prepare
from .sweep import sweep, sweep_header, sweep_targets

CONTEXT_LOST = 3  # exit status: nothing more can run in this process


# --- one case --------------------------------------------------------------------------------------------------------


def measure_case(case: Case, machine: Machine) -> dict[str, Any]:
    operator = operator_of(case)
    tensors = random_tensors(operator, case, machine.device, seed=0)
    exact = in_float64(case, tensors)
    set_cudnn(operator.yardstick)()
    torchs = prepare(operator, case, operator.yardstick, tensors)()
    call = prepare(operator, case, "tritune", tensors)
    with use_backend("triton"), record() as decisions:
        with poisoned():
            ours = call()
        verdict = compare(ours, exact, torchs, EPSILON[case.dtype])
        again = call()
    if verdict.correct and not all(torch.equal(ours[name], again[name]) for name in ours):
        verdict = verdict._replace(correct=False, where="two runs differ")
    kernels = decisions[0].kernels if decisions else ()
    ours_record = {
        "provider": "tritune", "correct": verdict.correct, "err": verdict.to_json(),
        "config": {name: dict(choice.config) for name, choice in kernels},
        "origin": {name: choice.whence() for name, choice in kernels},
    }  # fmt: skip
    del exact, torchs, ours, again, call
    return {"event": "case", "records": _timed(case, machine, tensors, ours_record)}


def in_float64(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference."""
    with without_cudnn():
        return prepare(operator_of(case), case, "torch", {name: t.double() for name, t in tensors.items()})()


def _timed(case: Case, machine: Machine, tensors: dict[str, Tensor], ours: dict[str, Any]) -> list[dict[str, Any]]:
    operator = operator_of(case)
    floor_us = operator.floor_us(case, machine.spec)
    head = {**header(case), "floor_us": round(floor_us, 3)}
    if operator.traffic is not None:
        needed, moved = operator.traffic(case, machine.spec)
        ours["bytes"] = {"needed": round(needed), "moved": round(moved)}
    records = [{**head, **ours}]
    if machine.timer is None:
        if "torch_compile" in operator.providers_of(case):  # takes longer than ours; what it compiled is kept on disk
            prepare(operator, case, "torch_compile", tensors)()
        return records
    more = range(1, argument_sets(tensors, machine.spec))
    sets = [tensors, *(random_tensors(operator, case, machine.device, seed) for seed in more)]
    competitors = {
        provider: Competitor([prepare(operator, case, provider, one) for one in sets], set_cudnn(provider))
        for provider in operator.providers_of(case)
        if provider != "tritune" or ours["correct"]
    }
    with use_backend("triton"):
        timings = machine.timer.measure(competitors, machine.seconds)
    for provider, timing in timings.items():
        if provider != "tritune":
            records.append({**head, "provider": provider, "correct": None, "err": None, "origin": "torch"})
        (one,) = (found for found in records if found["provider"] == provider)
        one.update(timing_fields(timing, floor_us))
    return records


def timing_fields(timing: Timing | str, floor_us: float) -> dict[str, Any]:
    if isinstance(timing, str):
        return {"error": environment.without_paths(timing)[:500]}
    return {
        "device_us": {
            "p50": round(timing.p50, 3),
            "p20": round(timing.p20, 3),
            "p80": round(timing.p80, 3),
            "n": timing.n,
        },
        "host_us": None if timing.host_us is None else round(timing.host_us, 2),
        "method": timing.method,
        "pct_limit": round(100 * floor_us / max(timing.p50, 1e-3), 1),
    }


# --- the process -----------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One thing to measure: ``run`` returns its event."""

    header: dict[str, Any]
    run: Callable[[Machine], dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.header['family']}/{self.header['id']}"


def items(module: str, rehearse: bool, patterns: Sequence[str] = (), done: Sequence[str] = ()) -> list[Item]:
    """The cases of a module, then the sweeps over configs for those that have any; with patterns only those whose
    ``<family>/<id>`` contains one. What is done is left out."""
    cases: Sequence[Case] = importlib.import_module(module, __package__).CASES
    if rehearse:
        cases = [tiny(case) for case in cases]
    measured = [Item(header(case), partial(measure_case, case)) for case in cases]
    everything = measured + [Item(sweep_header(target), partial(sweep, target)) for target in sweep_targets(cases)]
    left = [item for item in everything if item.header["id"] not in done]
    return [item for item in left if not patterns or any(one in item.name for one in patterns)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name if __spec__ else __name__}")
    parser.add_argument("--probe", action="store_true", help="only say what there is to measure")
    parser.add_argument("--first", type=int, default=0, help="index of the first item")
    parser.add_argument("--step", type=int, default=1, help="take every step-th item")
    parser.add_argument("--untimed", action="store_true", help="only check, so that all kernels are compiled")
    parser.add_argument("--memory", type=float, default=1.0, help="fraction of the GPU's memory to use at most")
    parser.add_argument("--rehearse", action="store_true", help="tiny layers on the CPU, in Triton's interpreter")
    parser.add_argument("--cases", default=".families", help="module whose CASES are measured")
    parser.add_argument("-k", dest="patterns", action="append", default=[], help="only items with this in their name")
    parser.add_argument("--done", nargs="*", default=[], metavar="ID", help="leave these out, they are measured")
    parser.add_argument("--seconds", type=float, default=0.6, help="sampling time of one item")
    parser.add_argument("--child", action="store_true", help="end as soon as standard input does")
    args = parser.parse_args(argv)
    if args.child:
        end_with_parent()
    with private_stdout() as out:
        return run(args, lambda event: print(json.dumps(event), file=out, flush=True))


def run(args: argparse.Namespace, send: Callable[[dict[str, Any]], None]) -> int:
    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        send({"event": "hello", "env": environment.fingerprint("cpu"), "items": []})
        return CONTEXT_LOST
    todo = items(args.cases, args.rehearse, args.patterns, args.done)
    if args.probe:
        send({"event": "hello", "env": environment.fingerprint(device), "items": [item.header for item in todo]})
        return 0
    if device == "cuda" and args.memory < 1:
        torch.cuda.set_per_process_memory_fraction(args.memory)
    timer = None if args.untimed else timer_for(device)
    machine = Machine(device, detect(torch.device(device)), timer, 0.0 if args.rehearse else args.seconds)
    for index in range(args.first, len(todo), args.step):
        send({"event": "begin", "index": index, **todo[index].header})
        try:
            event = todo[index].run(machine)
        except Exception as error:
            lines = traceback.format_exception_only(error)
            event = {"event": "error", "error": environment.without_paths("".join(lines).strip())[:2000]}
            traceback.print_exc()
        send({"index": index, **event})
        if not device_alive(device):
            return CONTEXT_LOST
    send({"event": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
