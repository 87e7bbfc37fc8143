"""The process in which ``tritune tune`` runs its trials: what crashes or hangs here costs the search one trial.

    python -m tritune.autotune.tune_worker

One JSON line a request on standard input, one JSON line an answer on standard output; the end of standard input ends
the process, whatever it does::

                                                       {"event": "hello", "env": {...}, "device": {...} or null}
    {"do": "open", "case": {...}, "kind": "fwd"}       {"event": "opened"}
    {"do": "attempt", "config": {...}, "give_up_us": 9.5 or null}
                                                       {"event": "trial", "us": ..., "fault": "", ...}
    {"do": "final", "configs": [{...}, ...]}
                                                       {"event": "final", "us": [...], "torch_us": ...}

    {"do": "compile", "device": {...}, "work": [{"case": {...}, "kind": "fwd"}, ...]}

The last is for a process of its own, which fills Triton's cache ahead of the one that measures. It answers nothing and
may fail as it likes: a config whose binary is not in the cache is compiled by its trial.

An answer may also be ``{"event": "error", "error": ...}``. ``"alive": false`` in one says that the GPU serves this
process no longer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from . import environment
from .bench import Bench, Target
from .check import Machine, device_alive
from .child import private_stdout, requests
from .config import Config
from .device import DeviceSpec, detect
from .resolve import ranked
from .timer import Timer, timer_for
from .workload import Case


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name if __spec__ else __name__}")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter")
    parser.add_argument("--families", required=True, help="module that registers them, and may bring a TIMER")
    parser.add_argument("--compile", action="store_true", help="only compile what is asked for first, then end")
    args = parser.parse_args(argv)
    module = importlib.import_module(args.families)
    with private_stdout() as out:
        if args.compile:
            compile_ahead(next(requests()))
        else:
            timer = getattr(module, "TIMER", None) if args.rehearse else None
            serve(args.rehearse, timer, requests(), lambda answer: print(json.dumps(answer), file=out, flush=True))
    return 0


def serve(
    rehearse: bool, timer: Timer | None, asked: Iterator[dict[str, Any]], answer: Callable[[dict[str, Any]], None]
) -> None:  # fmt: skip
    device = "cpu" if rehearse else "cuda"
    machine = Machine(device, detect(torch.device(device)), timer or timer_for(device), 0.0 if rehearse else 0.6)
    answer({"event": "hello", "env": environment.fingerprint(device), "device": asdict(machine.spec)})
    bench: Bench | None = None
    for request in asked:
        try:
            if request["do"] == "open":
                bench = None  # frees the memory of the last one first
                bench = Bench(Target(Case.from_json(request["case"]), request["kind"]), machine)
                found = {"event": "opened"}
            else:
                assert bench is not None, "nothing is open"
                found = attempt(bench, request) if request["do"] == "attempt" else final(bench, request)
        except Exception as error:
            found = {"event": "error", "error": environment.in_words(error)}
        answer({**found, "alive": device_alive(device)})


def compile_ahead(request: dict[str, Any]) -> None:
    """The candidates in the order of their trials, with half of the processors: the others measure."""
    device = DeviceSpec(**request["device"])

    def one(launch: Any) -> None:
        with contextlib.suppress(Exception):
            launch.compile(device.target)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for work in request["work"]:
            tunable, problem = Target(Case.from_json(work["case"]), work["kind"]).identity()
            with contextlib.suppress(RuntimeError):  # no config serves it
                for config, _ in ranked(tunable, problem, device):
                    pool.submit(one, tunable.launches(problem, config)[0])


def attempt(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    limit = request["give_up_us"]
    trial = bench.attempt(Config(request["config"]), math.inf if limit is None else limit)
    return {"event": "trial", **{name: getattr(trial, name) for name in ("us", "samples", "fault", "facts")}}


def final(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    configs = [Config(config) for config in request["configs"]]
    us, torch_us = bench.final(configs)
    return {"event": "final", "us": [us.get(config) for config in configs], "torch_us": torch_us}


if __name__ == "__main__":
    sys.exit(main())
