"""Configs for a machine that is not here: the cost model orders them, the compiler has the last word.

``tritune tune --static --target sm_90`` writes ``autotune/configs/<target>/<kernel>.json``: for each layer of
:mod:`.families` the best config by the model that also compiles clean (:func:`.static.faults`). The entries say
``"source": "model"``: a guess that measured entries replace.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..autotune import store
from ..autotune.config import Config, Tunable
from ..autotune.device import TARGETS, named
from ..autotune.resolve import ranked
from .families import layers
from .static import TRITON, StaticProfile, faults, profile

CANDIDATES = 12  # of the model's order are compiled, then the layer gets no entry


Best = tuple[Config | None, StaticProfile | None, list[str]]


def rank(target: str, pattern: str = "") -> Iterator[tuple[str, Tunable, Any, Best]]:
    """``(layer, kernel, problem, (config, profile, passed over))``; no config if none of the first compiles clean."""

    def best(tunable: Tunable, problem: Any) -> Best:
        passed_over: list[str] = []
        for config, _ in ranked(tunable, problem, named(target))[:CANDIDATES]:
            one = profile(tunable.launches(problem, config)[0], target)
            found = faults(tunable.name, problem, one, target)
            if not found:
                return config, one, passed_over
            passed_over.append(f"{dict(config)}: {'; '.join(found)}")
        return None, None, passed_over

    with ThreadPoolExecutor(2) as pool:
        selected = [layer for layer in layers(target) if pattern in f"{layer[1].name}/{layer[0]}"]
        futures = [pool.submit(best, tunable, problem) for _, tunable, problem in selected]
        for (name, tunable, problem), future in zip(selected, futures, strict=True):
            yield name, tunable, problem, future.result()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--static", action="store_true", required=True, help="rank by model and compiler, without a GPU"
    )
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("-k", dest="pattern", default="", help="only <kernel>/<layer> names that contain this")
    parser.add_argument(
        "--out", type=Path, default=store.SHIPPED, help="folder of the configs; default: the shipped ones"
    )


def main(args: argparse.Namespace) -> int:
    entries: dict[str, list[store.Entry]] = {}
    without = 0
    for name, tunable, problem, (config, one, passed_over) in rank(args.target, args.pattern):
        for reason in passed_over:
            print(f"{tunable.name} {name}: passed over {reason}")
        if config is None or one is None:
            print(f"{tunable.name} {name}: no clean config among the first {CANDIDATES}")
            without += 1
            continue
        made_with = {"triton": TRITON, "torch": torch.__version__.split("+")[0]}
        extra = {"static": asdict(one), "env": made_with}
        entry = store.Entry(tunable.features(problem), config, "model", tunable.version, extra=extra)
        entries.setdefault(tunable.name, []).append(entry)
    for kernel, found in entries.items():
        path = args.out / args.target / f"{kernel}.json"
        store.write(path, kernel, found)
        Path(f"{path}.lock").unlink(missing_ok=True)  # the folder is part of the package
        print(f"{len(found):4} entries for {kernel} on {args.target}")
    return 1 if without else 0
