"""Configs for a machine that is not here: the cost model orders them, the compiler has the last word.

``tritune tune --static --target sm_90`` shows for each layer of a family the best config by the model that also
compiles clean (:func:`.static_profile.faults`). With ``--out`` it goes into ``<out>/<target>/<kernel>.json`` as soon as
it is known. The entries say ``"origin": "model"``: a guess that measured entries replace.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import store
from .bench import Target
from .compilers import Compilers
from .config import Config, Tunable
from .device import named
from .progress import Progress
from .resolve import ranked
from .static_profile import TRITON, Row, StaticProfile, faults
from .workload import Layers

CANDIDATES = 16  # of the model's order are compiled, then the layer gets no entry

Best = tuple[Config | None, StaticProfile | None, list[str]]


def rank(
    families: str, target: str, selected: Sequence[Layers], unlisted: Mapping[tuple[str, str], Target] | None = None
) -> Iterator[tuple[str, Tunable, Any, Best]]:  # fmt: skip
    """``(layer, kernel, problem, (config, profile, passed over))``; no config if none of the first compiles clean.

    Args:
        families: name of the module that registers the families of these layers.
        unlisted: as of :class:`Compilers`.
    """

    def best(compilers: Compilers, layer: str, tunable: Tunable, problem: Any) -> Best:
        passed_over: list[str] = []
        for config, _ in ranked(tunable, problem, named(target))[:CANDIDATES]:
            one = compilers.attempt(
                Row(target, tunable, layer, problem, config, 0, tunable.launches(problem, config)[0])
            )
            found = faults(tunable, problem, one, target) if isinstance(one, StaticProfile) else [one]
            if isinstance(one, StaticProfile) and not found:
                return config, one, passed_over
            passed_over.append(f"{dict(config)}: {'; '.join(found)}")
        return None, None, passed_over

    compilers = Compilers(families, unlisted)
    with ThreadPoolExecutor(compilers.count) as pool, compilers:  # the compilers end first: then no thread waits
        futures = [pool.submit(best, compilers, *one) for one in selected]
        try:
            for one, future in zip(selected, futures, strict=True):
                yield *one, future.result()
        finally:  # an interrupt does not wait for the rest
            pool.shutdown(wait=False, cancel_futures=True)


def run(
    families: str, target: str, layers: Sequence[Layers], pattern: str | None, out: Path | None, *, dry_run: bool,
    as_json: bool, unlisted: Mapping[tuple[str, str], Target] | None = None,
) -> int:  # fmt: skip
    """The command, for those of the layers whose ``<kernel>/<layer>`` contains the pattern."""
    selected = [one for one in layers if (pattern or "") in f"{one[1].name}/{one[0]}"]
    if not selected:
        wanted = f" with {pattern!r} in its name <kernel>/<layer>" if pattern else " of these operators"
        print(f"tritune tune: no layer{wanted} is ranked for {target}", file=sys.stderr)
        return 2
    if dry_run:
        return _listed(target, selected, as_json)
    stream = sys.stderr if as_json else sys.stdout
    entries: dict[str, list[store.Entry]] = {}
    without = []
    started = time.monotonic()
    try:
        with Progress(stream, len(selected)) as progress:
            progress.update(0, state="the compilers start")
            for done, (name, tunable, problem, (config, one, passed_over)) in enumerate(
                rank(families, target, selected, unlisted), 1
            ):
                for reason in passed_over:
                    progress.line(f"{tunable.name}/{name}: passed over {reason}")
                if config is None or one is None:
                    progress.line(f"{tunable.name}/{name}: no clean config among the first {CANDIDATES}")
                    without.append(f"{tunable.name}/{name}")
                else:
                    progress.line(f"{tunable.name}/{name}: {config}")
                    made_with = {"triton": TRITON, "torch": torch.__version__.split("+")[0]}
                    extra = {"static": asdict(one), "env": made_with}
                    entry = store.Entry(tunable.features(problem), config, "model", tunable.version, extra=extra)
                    entries.setdefault(tunable.name, []).append(entry)
                    if out is not None:
                        _write(out / target / f"{tunable.name}.json", tunable.name, entry)
                elapsed = time.monotonic() - started
                progress.update(done, elapsed * (len(selected) - done) / done, f"{tunable.name}/{name}")
    except KeyboardInterrupt:
        count = sum(map(len, entries.values()))
        kept = f" and written to {out / target}" if out and count else ""
        print(f"tritune tune: interrupted, {count} of {len(selected)} layers ranked{kept}; "
              "the next run goes on from there", file=sys.stderr)  # fmt: skip
        return 130
    for kernel, found in entries.items():
        print(f"{len(found):4} entries for {kernel} on {target}", file=stream)
    print(f"written to {out / target}" if out else "written nowhere: --out STORE names a place", file=stream)
    if as_json:
        documents = {kernel: [entry.to_json() for entry in found] for kernel, found in entries.items()}
        print(json.dumps({"target": target, "kernels": documents, "without": without}, indent=1))
    return 1 if without else 0


def _listed(target: str, selected: Sequence[Layers], as_json: bool) -> int:
    """What would be ranked; nothing is compiled."""
    if as_json:
        kernels: dict[str, list[str]] = {}
        for name, tunable, _ in selected:
            kernels.setdefault(tunable.name, []).append(name)
        print(json.dumps({"target": target, "layers": kernels}, indent=1))
        return 0
    for kernel, count in Counter(tunable.name for _, tunable, _ in selected).items():
        print(f"{count:4} layers of {kernel} on {target}")
    return 0


def _write(path: Path, kernel: str, entry: store.Entry) -> None:
    store.write(path, kernel, [entry])
    Path(f"{path}.lock").unlink(missing_ok=True)  # the store may be part of a checkout
