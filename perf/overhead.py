"""``python -m tritune.perf.overhead``: what our calls cost above torch's own on the CPU, where torch serves them.

Each call of :mod:`.calls` runs small and large, forward and with all gradients, in turn with its peer in one process,
on one thread and on the same random data. The clock is the CPU time of that thread, so what other programs take does
not count. Two neighbouring rounds, of opposite order, make one pair of times, so that a drift cancels; the result is
the median of the differences and of the ratios of all pairs. What misses the yardstick is measured once more, for
longer, and that measurement counts.

``--out`` writes ``overhead.json``, the measurements, and ``overhead.md``, the same for people, which ``--readme`` puts
between the markers of a README.

Exit status: 0 all within the yardstick; 1 not all; 2 bad usage; 130 interrupted, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..autotune.environment import fingerprint
from ..autotune.progress import Progress
from ..autotune.timer import Competitor, interleaved, mean_us, no_garbage_collection, percentile
from ..demo import one_thread
from .calls import CALLS, DIRECTIONS, SIZES, Call, prepare

SCHEMA = 1
SMALL_ABOVE_US = 4.0
LARGE_RATIO = 1.02
SAMPLE_US = 60.0  # a sample of a small call is as many calls as take this long
LEAST_ROUNDS = 20
SECONDS = {"small": 0.3, "large": 1.0}  # of one measurement
LONGER = 4  # times that for what misses the yardstick
BEGIN, END = "<!-- overhead: begin -->", "<!-- overhead: end -->"

CONTROL = Call("torch's conv2d against itself", lambda: (F.conv2d, F.conv2d), [(1, 8, 6, 6)], [(4, 8, 80, 80)],
               [(8, 8, 3, 3), (8,)], (1, 1))  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Microseconds of our call and of torch's; how far above torch's ours is, in microseconds and as a ratio."""

    torch_us: float
    ours_us: float
    above_us: float
    ratio: float
    rounds: int

    def is_within(self, size: str) -> bool:
        return self.above_us <= SMALL_ABOVE_US if size == "small" else self.ratio <= LARGE_RATIO


def cost(ours: Sequence[float], torchs: Sequence[float]) -> Cost:
    """Of the samples of all rounds, see the module."""
    pairs = list(zip(_of_two_rounds(ours), _of_two_rounds(torchs), strict=True))
    return Cost(
        percentile(torchs, 0.5), percentile(ours, 0.5), percentile([one - other for one, other in pairs], 0.5),
        percentile([one / other for one, other in pairs], 0.5), len(ours),
    )  # fmt: skip


def _of_two_rounds(samples: Sequence[float]) -> list[float]:
    return [(first + second) / 2 for first, second in zip(samples[::2], samples[1::2], strict=False)]


def measure(ours: Callable[[], Any], torchs: Callable[[], Any], seconds: float) -> Cost:
    competitors = {"ours": Competitor([ours]), "torch": Competitor([torchs])}
    for one in competitors.values():
        mean_us(one, 3)  # the first calls fill caches
    count = ceil(SAMPLE_US / max(mean_us(competitors["torch"], 3), 0.1))

    def sample(name: str) -> float:
        return mean_us(competitors[name], count, time.thread_time_ns)

    samples = interleaved(list(competitors), sample, seconds, LEAST_ROUNDS, sys.maxsize)
    return cost(samples["ours"], samples["torch"])


def measure_call(call: Call) -> Iterator[dict[str, Any]]:
    """The records of one call."""
    for size in SIZES:
        for direction in DIRECTIONS:
            with no_garbage_collection(), torch.set_grad_enabled(direction == "training"):
                ours, torchs = prepare(call, size, direction)
                found = measure(ours, torchs, SECONDS[size])
                if not found.is_within(size):
                    found = measure(ours, torchs, LONGER * SECONDS[size])
            numbers = {name: round(value, 4) for name, value in found._asdict().items()}
            yield {"call": call.name, "size": size, "direction": direction, **numbers, "within": found.is_within(size)}


# --- the table -------------------------------------------------------------------------------------------------------


def markdown(document: dict[str, Any]) -> str:
    """The measurements for people."""
    env, records, control = document["env"], document["records"], document["control"]
    outside = len([record for record in records if not record["within"]])
    machine = f"{env['cpu']}, one thread, torch {env['torch']}, Python {env['python']}"
    source = f"{env['date'][:10]}, commit {str(env['commit'])[:12]}{' with changes' if env['dirty'] else ''}"
    verdict = f"{len(records) - outside} of {len(records)} measurements are within it" + (
        ", and the others are in bold." if outside else "."
    )
    against_itself = ", ".join(f"{record['size']} {record['direction']} {_cell(record)}" for record in control)
    kinds = [(size, direction) for size in SIZES for direction in DIRECTIONS]
    summary = _table(["", "median of all calls", "costliest call"], [_summary(*kind, records) for kind in kinds])
    table = _table(["call", *map(", ".join, kinds), "within"], _rows(records))
    return f"""\
On the CPU, where torch serves, a small call of any function or module here is to take at most {SMALL_ABOVE_US:.0f} µs
longer than torch's own, forward and with all gradients, and a large one at most {LARGE_RATIO} times its time.
{verdict}

{summary}

<details><summary>Every call, small and large, forward and training</summary>

Small: torch's time in µs + what ours takes longer. Large: torch's time in ms × ours over torch's. Both in turn, CPU
time, medians of the differences and of the ratios. {machine}; {source}.
The same measurement of torch's conv2d against itself: {against_itself}.

{table}

</details>
"""


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _summary(size: str, direction: str, records: Sequence[dict[str, Any]]) -> list[str]:
    of_kind = [record for record in records if (record["size"], record["direction"]) == (size, direction)]
    key, text = ("above_us", "{:+.1f} µs") if size == "small" else ("ratio", "{:.3f} ×")
    costliest = max(of_kind, key=lambda record: record[key])
    middle = percentile([record[key] for record in of_kind], 0.5)
    return [f"{size}, {direction}", text.format(middle), f"{text.format(costliest[key])} (`{costliest['call']}`)"]


def _rows(records: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    by_call: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_call.setdefault(record["call"], []).append(record)
    for name, of_call in by_call.items():
        yes = all(record["within"] for record in of_call)
        yield [f"`{name}`", *map(_cell, of_call), "yes" if yes else "no"]


def _cell(record: dict[str, Any]) -> str:
    if record["size"] == "small":
        above = round(record["above_us"], 1)
        text = f"{record['torch_us']:.1f} {'−' if above < 0 else '+'} {abs(above)}"
    else:
        text = f"{record['torch_us'] / 1e3:.1f} × {record['ratio']:.3f}"
    return text if record["within"] else f"**{text}**"


def between_markers(text: str, table: str) -> str:
    """The text with the table between its markers. Raises ValueError if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"it does not hold {BEGIN} and {END}")
    return f"{before}{begin}\n{table}{end}{after}"


# --- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", metavar="PATTERN", default="", help="only calls whose names hold this")
    add("--json", action="store_true", help="print the measurements as JSON")
    add("--out", type=Path, metavar="FOLDER", help="write overhead.json and overhead.md, of all calls")
    add("--readme", type=Path, metavar="FILE", help="put the table between the markers of this file, too")


def main(args: argparse.Namespace) -> int:
    calls = [call for call in CALLS if args.only in call.name]
    if not calls:
        return _refuse(f"no call is named like {args.only!r}")
    if (args.out or args.readme) and args.only:
        return _refuse("--out and --readme take the table of all calls, not a part")
    if args.readme:
        try:
            readme = args.readme.read_text(encoding="utf-8")
            between_markers(readme, "")
        except (OSError, ValueError) as error:
            return _refuse(f"{args.readme}: {error}")
    env = {**fingerprint("cpu"), "slug": "cpu"}  # before this command writes anything: the tree is as committed
    control: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    try:
        with one_thread(), Progress(sys.stderr, len(calls)) as progress:
            control += measure_call(CONTROL)
            start = time.monotonic()
            for done, call in enumerate(calls, 1):
                found = list(measure_call(call))
                records += found
                progress.line(f"{done}/{len(calls)} {call.name}: {', '.join(map(_cell, found))}")
                progress.update(done, (time.monotonic() - start) / done * (len(calls) - done))
    except KeyboardInterrupt:
        print(f"interrupted after {len(records) // 4} of {len(calls)} calls", file=sys.stderr)
        return 130
    document = {"schema": SCHEMA, "suite": "overhead", "env": env, "control": control, "records": records}
    if args.json:
        print(_lines(document), end="")
    elif not args.out:
        print(markdown(document), end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        _replace(args.out / "overhead.json", _lines(document))
        _replace(args.out / "overhead.md", markdown(document))
    if args.readme:
        _replace(args.readme, between_markers(readme, markdown(document)))
    return 0 if all(record["within"] for record in records) else 1


def _lines(document: dict[str, Any]) -> str:
    """As JSON, one record a line."""
    head = json.dumps({name: value for name, value in document.items() if name != "records"}, ensure_ascii=False)
    records = ",\n".join(json.dumps(record, ensure_ascii=False) for record in document["records"])
    return f'{head[:-1]}, "records": [\n{records}\n]}}\n'


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _refuse(why: str) -> int:
    print(why, file=sys.stderr)
    return 2


if __name__ == "__main__":
    command_line = argparse.ArgumentParser(prog=f"python -m {__package__}.overhead", description=__doc__.split("\n")[0])
    add_arguments(command_line)
    sys.exit(main(command_line.parse_args()))
