"""Configs for a machine that is not here: the cost model orders them, the compiler has the last word.

``tritune tune --static --target sm_90`` writes ``autotune/configs/<target>/<kernel>.json``: for each layer of
:mod:`.families` the best config by the model that also compiles clean (:func:`.static.faults`). The entries say
``"source": "model"``: a guess that measured entries replace.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..autotune import store
from ..autotune.config import Config, Tunable
from ..autotune.device import named
from ..autotune.resolve import ranked
from .case import Layers
from .families import layers
from .progress import Progress
from .static import TRITON, StaticProfile, faults, profile

CANDIDATES = 16  # of the model's order are compiled, then the layer gets no entry


Best = tuple[Config | None, StaticProfile | None, list[str]]


def rank(target: str, selected: Sequence[Layers]) -> Iterator[tuple[str, Tunable, Any, Best]]:
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
        futures = [pool.submit(best, tunable, problem) for _, tunable, problem in selected]
        try:
            for (name, tunable, problem), future in zip(selected, futures, strict=True):
                yield name, tunable, problem, future.result()
        finally:  # an interrupt does not wait for the rest
            for future in futures:
                future.cancel()


def run(args: argparse.Namespace, kernels: Set[str]) -> int:
    """The command; ``kernels`` names those to rank, all if it is empty."""
    out = sys.stderr if args.json else sys.stdout
    folder = (args.out or store.SHIPPED) / args.target
    selected = [
        (name, tunable, problem)
        for name, tunable, problem in layers(args.target)
        if args.pattern in f"{tunable.name}/{name}" and (not kernels or tunable.name in kernels)
    ]
    entries: dict[str, list[store.Entry]] = {}
    without = []
    started = time.monotonic()
    with Progress(out, len(selected)) as progress:
        for done, (name, tunable, problem, (config, one, passed_over)) in enumerate(rank(args.target, selected), 1):
            elapsed = time.monotonic() - started
            progress.update(done, elapsed * (len(selected) - done) / done, f"{tunable.name} {name}")
            for reason in passed_over:
                progress.line(f"{tunable.name} {name}: passed over {reason}")
            if config is None or one is None:
                progress.line(f"{tunable.name} {name}: no clean config among the first {CANDIDATES}")
                without.append(f"{tunable.name}/{name}")
                continue
            made_with = {"triton": TRITON, "torch": torch.__version__.split("+")[0]}
            extra = {"static": asdict(one), "env": made_with}
            entry = store.Entry(tunable.features(problem), config, "model", tunable.version, extra=extra)
            entries.setdefault(tunable.name, []).append(entry)
    for kernel, found in entries.items():
        if not args.dry_run:
            path = folder / f"{kernel}.json"
            store.write(path, kernel, found)
            Path(f"{path}.lock").unlink(missing_ok=True)  # the folder may be part of the package
        print(f"{len(found):4} entries for {kernel} on {args.target}", file=out)
    if args.json:
        documents = {kernel: [entry.to_json() for entry in found] for kernel, found in entries.items()}
        print(json.dumps({"target": args.target, "kernels": documents, "without": without}, indent=1))
    return 1 if without else 0
