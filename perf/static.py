"""What the compiler made of every shipped config, with no GPU: registers, spills, shared memory, tensor cores, loads.

``tritune bench static`` compiles the config that each layer of :mod:`.families` gets on a target, holds the result to
absolute rules (no spill, within shared memory, tensor cores and 16-byte loads where they are due) and compares it with
the baseline in ``perf/baselines/static-<Triton minor>.json``. ``--update`` writes the file that ``--baseline`` names:
it prints what changes and refuses a regression unless ``--accept`` is given.

Exit status: 0; 1 a kernel at fault or a refused update; 2 bad usage; 130 interrupted, and the next run goes on from
there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO, TypeVar

from ..autotune.device import TARGETS, named
from ..autotune.paths import readable_file, writable_file
from ..autotune.progress import Progress
from ..autotune.resolve import resolve
from ..autotune.static_profile import TRITON, Row, StaticProfile, faults
from . import families
from .families import layers

BASELINES = Path(__file__).resolve().parent / "baselines"
GROWTH = 1.15  # instructions may grow this much before it counts as a regression


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def regressions(old: StaticProfile, new: StaticProfile) -> list[str]:
    """What got worse against the baseline; each names the figure."""
    worse = []
    if new.spill_bytes > old.spill_bytes:
        worse.append(f"spill: {old.spill_bytes} -> {new.spill_bytes} bytes")
    if old.mma and new.mma != old.mma:
        worse.append(f"tensor cores: {old.mma} -> {new.mma or 'none'}")
    if new.load_bytes < old.load_bytes:
        worse.append(f"loads: {old.load_bytes} -> {new.load_bytes} bytes wide")
    if new.store_bytes < old.store_bytes:
        worse.append(f"stores: {old.store_bytes} -> {new.store_bytes} bytes wide")
    if new.instructions > GROWTH * old.instructions:
        worse.append(f"instructions: {old.instructions} -> {new.instructions}")
    if new.warps < old.warps:
        worse.append(f"occupancy: {old.warps} -> {new.warps} warps")
    return worse


# --- the suite -------------------------------------------------------------------------------------------------------


def rows(targets: Iterable[str] = TARGETS, pattern: str = "") -> Iterator[Row]:
    for target in targets:
        for name, tunable, problem in layers(target):
            config = resolve(tunable, problem, named(target)).config
            for index, launch in enumerate(tunable.launches(problem, config)):
                row = Row(target, tunable, name, problem, config, index, launch)
                if pattern in row.name:
                    yield row


Made = TypeVar("Made")


def measure(selected: Sequence[Row], compiled: Callable[[Row], Made], jobs: int = 2) -> Iterator[tuple[Row, Made]]:
    """Each row with what became of it, in order, as soon as that is known; what several rows need is made once.

    Args:
        compiled: makes it, in one of ``jobs`` threads.
    """
    pool = ThreadPoolExecutor(jobs)
    try:
        made: dict[str, Future[Made]] = {}
        for row in selected:
            if row.binary not in made:
                made[row.binary] = pool.submit(compiled, row)
        for row in selected:
            yield row, made[row.binary].result()
    finally:  # an interrupt does not wait for what is under way: who gave `compiled` ends that
        pool.shutdown(wait=False, cancel_futures=True)


def load_baseline(path: Path) -> dict[str, StaticProfile]:
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return {name: StaticProfile(**figures) for name, figures in document["profiles"].items()}


def save_baseline(path: Path, profiles: dict[str, StaticProfile]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(asdict(profiles[name]))}" for name in sorted(profiles))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"triton": "{TRITON}", "profiles": {{\n{lines}\n}}}}\n', encoding="utf-8")


def update(path: Path, profiles: dict[str, StaticProfile], accept: bool, out: TextIO | None = None) -> bool:
    """Merges profiles into a baseline and prints what changes; refuses a regression unless accepted."""
    old = load_baseline(path)
    refused = False
    for name, new in profiles.items():
        if name not in old:
            print(f"{'new':8} {name}", file=out)
        elif old[name] != new:
            worse = regressions(old[name], new)
            refused |= bool(worse)
            changes = ", ".join(worse) or ", ".join(
                f"{field}: {value} -> {getattr(new, field)}"
                for field, value in asdict(old[name]).items()
                if value != getattr(new, field)
            )
            print(f"{'WORSE' if worse else 'changed':8} {name}: {changes}", file=out)
    if refused and not accept:
        print("refused: the profiles got worse; --accept takes them all the same", file=out)
        return False
    save_baseline(path, {**old, **profiles})
    return True


# --- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What ``tritune bench static`` was asked."""

    targets: Sequence[str] = ()
    pattern: str | None = None
    baseline: Path | None = None
    update: bool = False
    accept: bool = False
    json: bool = False


def main(options: Options) -> int:
    from ..autotune.compilers import Compilers

    shipped = BASELINES / f"static-{minor(TRITON)}.json"
    if options.update:
        if options.baseline is None:
            return _usage(f"--update needs --baseline FILE to write to; in a checkout perf/baselines/{shipped.name}")
        writable_file(options.baseline)
    elif options.baseline is not None:
        readable_file(options.baseline)
    try:
        old = load_baseline(options.baseline or shipped)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _usage(f"{options.baseline or shipped} is not a baseline: {type(error).__name__} {error}")
    selected = list(rows(options.targets or TARGETS, options.pattern or ""))
    if not selected:
        return _usage(f"no kernel has {options.pattern!r} in its name <target>/<kernel>/<layer>/<launch>")

    profiles: dict[str, StaticProfile] = {}
    bad: dict[str, list[str]] = {}
    started = time.monotonic()
    out = sys.stderr if options.json else sys.stdout
    try:
        with Progress(out, len(selected)) as progress, Compilers(families.__name__) as compilers:
            progress.update(0, state="the compilers start")
            for done, (row, one) in enumerate(measure(selected, compilers.attempt, compilers.count), 1):
                if isinstance(one, StaticProfile):
                    profiles[row.name] = one
                    reasons = faults(row.tunable, row.problem, one, row.target) if row.is_main else []
                    reasons += regressions(old[row.name], one) if row.name in old and not options.update else []
                else:
                    reasons = [one]
                if reasons:
                    bad[row.name] = reasons
                elapsed = time.monotonic() - started
                progress.update(done, elapsed * (len(selected) - done) / done, row.name)
    except KeyboardInterrupt:
        print(f"tritune bench static: interrupted after {len(profiles)} of {len(selected)} kernels; "
              "the next run goes on from there", file=sys.stderr)  # fmt: skip
        return 130
    missing = [name for name in profiles if name not in old]
    if options.json:
        found = {name: asdict(one) for name, one in profiles.items()}
        print(json.dumps({"triton": TRITON, "profiles": found, "faults": bad, "new": missing}, indent=1))
    for name, reasons in bad.items():
        print(f"FAULT {name}: {'; '.join(reasons)}", file=out)
    print(f"{len(selected)} kernels compiled with Triton {TRITON}, {len(bad)} at fault, "
          f"{len(missing)} not in the baseline", file=out)  # fmt: skip
    if options.update:
        assert options.baseline is not None
        if not update(options.baseline, profiles, options.accept, out):
            return 1
    return 1 if bad else 0


def _usage(message: str) -> int:
    print(f"tritune bench static: {message}", file=sys.stderr)
    return 2
