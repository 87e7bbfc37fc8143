"""``tritune configs``: the tuned configs in files, listed, shown, compared and merged.

A store is a folder of ``<device or target>/<kernel>.json``; one of its folders or files will do as well. Exit status:
0; 1 if ``diff`` finds a difference or ``show`` nothing to show; 2 for what cannot be read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .autotune import store
from .autotune.config import Tunable
from .autotune.device import DEVICES, named
from .autotune.log import one_line, warnings
from .autotune.paths import writable_file, writable_folder
from .autotune.store import Entry, File

Store = dict[str, File]  # by its name there: "sm_90/conv.json"


class Unreadable(ValueError):
    """Nothing there, or nothing that these commands may silently leave out."""


def main(args: argparse.Namespace) -> int:
    store.clear()  # a file that was read before would not be complained of again
    try:
        return {"list": _list, "show": _show, "diff": _diff, "merge": _merge}[args.action](args)
    except BrokenPipeError:
        raise  # a reader that has seen enough
    except (Unreadable, OSError) as error:
        print(f"tritune configs {args.action}: {printable(str(error))}", file=sys.stderr)
        return 2


def printable(text: str) -> str:
    """One line that any terminal takes."""
    encoding = sys.stdout.encoding or "utf-8"
    return one_line(text).encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    for line in text.split("\n"):
        print(printable(line))


# --- reading ---------------------------------------------------------------------------------------------------------


def kernels_here() -> Mapping[str, Tunable]:
    """The kernels that entries are for; none where triton is missing, and then nothing is held against an entry."""
    try:
        from .kernels import registered

        return registered()
    except ModuleNotFoundError:
        return {}


def ignored(kernel: str, entries: Iterable[Entry], kernels: Mapping[str, Tunable]) -> list[str]:
    """Why lookups take no notice of some of a file's entries, each reason with their number."""
    if not kernels:
        return []
    if kernel not in kernels:
        return [f"no kernel is called {kernel}"]
    reasons = Counter(reason for entry in entries if (reason := entry.rejected(kernels[kernel])))
    return [f"{count} ignored, {reason}" for reason, count in reasons.items()]


def read(path: Path) -> Store:
    """A store, one of its folders, or one file. Raises Unreadable also for a part of it."""
    files = _files_of(path)
    with warnings() as messages:
        for file in files.values():
            store.load(file)
    if messages:
        raise Unreadable(messages[0])
    return {name: store.contents(file) for name, file in files.items()}


def _files_of(path: Path) -> dict[str, Path]:
    """The files of a store, of one of its folders, or this one file, each with its name there."""
    if path.is_dir():
        files = {str(one.relative_to(path)): one for one in sorted([*path.glob("*.json"), *path.glob("*/*.json")])}
        if not files:
            raise Unreadable(f"{path} holds no configs")
        return files
    if not path.exists():
        raise Unreadable(f"{path} does not exist")
    return {path.name: path}


def _pair(args: argparse.Namespace) -> tuple[Store, Store]:
    """Both sides; two files are compared whatever they are called."""
    left, right = read(args.left), read(args.right)
    if args.left.is_file() and args.right.is_file():
        right = dict(zip(left, right.values(), strict=True))
    elif {Path(name).parent == Path() for name in left}.isdisjoint(Path(name).parent == Path() for name in right):
        raise Unreadable(f"{args.left} and {args.right} are not alike: give two stores, two folders or two files")
    return left, right


def _files(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """``(layer, file)`` of these stores, or of all that a lookup reads."""
    if not paths:
        return list(store.files())
    found = []
    for path in paths:
        read(path)  # complains of what cannot be read
        found += [(str(path), file) for file in _files_of(path).values()]
    return found


def by_key(entries: Iterable[Entry]) -> dict[str, Entry]:
    return {json.dumps(entry.key, sort_keys=True): entry for entry in entries}


# --- list and show ---------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    kernels = kernels_here()
    rows: list[dict[str, Any]] = []
    with warnings() as messages:
        for layer, path in _files(args.stores):
            kinds: dict[tuple[str, str], list[Entry]] = {}
            for entry in store.load(path, path.stem):
                kinds.setdefault((entry.origin, entry.triton() or "-"), []).append(entry)
            for (origin, version), entries in sorted(kinds.items()):
                unused = [one for one in entries if ignored(path.stem, [one], kernels)]
                rows.append({
                    "store": layer, "device": path.parent.name, "kernel": path.stem, "entries": len(entries),
                    "origin": origin, "triton": version, "stale": sum(bool(one.staleness()) for one in entries),
                    "ignored": len(unused),
                })  # fmt: skip
    if args.json:
        print(json.dumps({"files": rows, "problems": messages}, indent=1))
        return 2 if messages else 0
    names = ("kernel", "entries", "origin", "triton", "stale", "ignored")
    lines = table(names, [[str(row[name] or "-") for name in names] for row in rows], right={1, 4, 5})
    place = ""
    for line, row in zip(lines[1:], rows, strict=True):
        if place != f"{row['store']} {row['device']}":
            place = f"{row['store']} {row['device']}"
            say(f"{place}\n  {lines[0]}")
        say(f"  {line}")
    for message in messages:
        say(f"PROBLEM: {message}")
    return 2 if messages else 0


def _show(args: argparse.Namespace) -> int:
    slugs = _serving(args.device) if args.device else None
    found = []
    for layer, path in _files([args.store] if args.store else []):
        slug = path.parent.name
        if path.stem == args.kernel and (slugs is None or slug in slugs):
            found.append((layer, path, store.load(path, path.stem)))
    if slugs is not None:
        found.sort(key=lambda one: (slugs.index(one[1].parent.name), one[0] != "user"))
    if not any(entries for _, _, entries in found):
        where = f" for {args.device}" if args.device else ""
        print(f"tritune configs show: no entries of {printable(args.kernel + where)}", file=sys.stderr)
        if args.json:
            print("[]")
        return 1
    if args.json:
        print(json.dumps([
            {"store": layer, "device": path.parent.name, "entries": [entry.to_json() for entry in entries]}
            for layer, path, entries in found
        ], indent=1))  # fmt: skip
        return 0
    for layer, path, entries in found:
        say(f"{args.kernel} for {path.parent.name}, {layer}: {len(entries)} entries")
        say("      us  torch us  origin     key -> config")
        for entry in entries:
            lead = f"{_us(entry.us):>8}  {_us(entry.torch_us):>8}  {entry.origin:9}  "
            note = f"  ({entry.staleness()})" if entry.staleness() else ""
            say(_wrapped(lead, f"{in_words(entry.key)} -> {entry.config}{note}"))
    return 0


def _serving(device: str) -> list[str]:
    """Folders in the order in which a lookup for the device reads those that ship, as :func:`.store.layers` says; this
    user's are read for the device alone. A target stands for itself. Raises Unreadable for an unknown device."""
    try:
        spec = named(device)
    except ValueError as error:
        raise Unreadable(str(error)) from None
    if device.lower() == spec.target:
        return [spec.target]
    siblings = [one.slug for one in DEVICES.values() if one.target == spec.target and one.slug != spec.slug]
    return [spec.slug, *siblings, spec.target]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Lines of columns as wide as they must be; those in ``right`` are numbers."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def in_words(key: Mapping[str, int | str]) -> str:
    return " ".join(f"{name}={value}" for name, value in key.items())


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _wrapped(lead: str, text: str) -> str:
    """For a terminal in as many lines as it takes, for a program in one."""
    if not sys.stdout.isatty():
        return lead + text
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent=lead, subsequent_indent=" " * len(lead), break_long_words=False)


# --- diff and merge --------------------------------------------------------------------------------------------------


def _diff(args: argparse.Namespace) -> int:
    left, right = _pair(args)
    changes = []
    for name in sorted(left.keys() | right.keys()):
        old, new = (by_key(side.get(name, File()).entries) for side in (left, right))
        for key in sorted(old.keys() | new.keys()):
            before, after = old.get(key), new.get(key)
            if before is None or after is None or _essence(before) != _essence(after):
                changes.append((name, before, after))
    counts = Counter("added" if old is None else "removed" if new is None else "changed" for _, old, new in changes)
    if args.json:
        print(json.dumps([
            {"file": name, "old": old.to_json() if old else None, "new": new.to_json() if new else None}
            for name, old, new in changes
        ], indent=1))  # fmt: skip
        return 1 if changes else 0
    last = ""
    for name, before, after in changes:
        if name != last:
            say(name)
            last = name
        sides = [(sign, entry) for sign, entry in (("-", before), ("+", after)) if entry]
        say(_wrapped("  ", in_words(sides[0][1].key)))
        for sign, entry in sides:
            times = "" if entry.us is None else f"{_us(entry.us)} us, "
            say(_wrapped(f"    {sign} ", f"{entry.config}  {times}{entry.origin}"))
    say(", ".join(f"{counts[kind]} {kind}" for kind in ("added", "removed", "changed")))
    return 1 if changes else 0


def _essence(entry: Entry) -> tuple[Any, ...]:
    """What makes a difference to a call; times vary from run to run."""
    return entry.config, entry.origin, entry.version


def _best(left: Entry, right: Entry) -> Entry:
    """The faster; a measured one before any other, and the newer version of the kernel before both."""

    def rank(entry: Entry) -> tuple[Any, ...]:
        return -entry.version, entry.origin != "measured", entry.us if entry.us is not None else float("inf")

    return min(left, right, key=rank)


def _newest(left: Entry, right: Entry) -> Entry:
    return max(left, right, key=lambda entry: (entry.version, str(entry.extra.get("env", {}).get("date", ""))))


KEEP: dict[str, Callable[[Entry, Entry], Entry]] = {
    "best": _best, "newest": _newest, "left": lambda left, right: left
}  # fmt: skip


def _merge(args: argparse.Namespace) -> int:
    left, right = _pair(args)
    if args.out.exists() and not args.out.samefile(args.left):
        raise Unreadable(f"{args.out} exists: name a new place, or {args.left} itself to add to it")
    if args.left.is_file() != args.right.is_file():
        raise Unreadable(f"{args.left} and {args.right} are a file and a folder")
    (writable_file if args.left.is_file() else writable_folder)(args.out)
    if args.left.samefile(args.right):
        raise Unreadable(f"{args.left} and {args.right} are the same")
    names = sorted(left.keys() | right.keys())
    kernels = {name: _kernel(name, left.get(name), right.get(name)) for name in names}
    kept: Counter[str] = Counter()
    files = []
    for name in names:
        ours, theirs = left.get(name, File()), right.get(name, File())
        old, new = by_key(ours.entries), by_key(theirs.entries)
        merged = {**new, **old}
        for key in old.keys() & new.keys():
            if old[key] != new[key]:
                merged[key] = KEEP[args.keep](old[key], new[key])
                kept["left" if merged[key] is old[key] else "right"] += 1
        path = args.out if args.left.is_file() else args.out / name
        store.write(path, kernels[name], merged.values(), {**theirs.fields, **ours.fields})
        Path(f"{path}.lock").unlink(missing_ok=True)  # nobody else writes here
        files.append({"file": name, "entries": len(merged), "added": len(new.keys() - old.keys())})
    conflicts = {"left": kept["left"], "right": kept["right"]}
    if args.json:
        print(json.dumps({"files": files, "conflicts": conflicts}, indent=1))
        return 0
    for one in files:
        say(f"{one['file']}: {one['entries']} entries, {one['added']} of them only on the right")
    say(f"{kept.total()} conflicts: {kept['left']} kept from the left, {kept['right']} from the right")
    say(f"written to {args.out}")
    return 0


def _kernel(name: str, *files: File | None) -> str:
    """The kernel whose configs all of these files of one name hold."""
    kernels = {file.kernel or Path(name).stem for file in files if file}
    if len(kernels) > 1:
        raise Unreadable(f"{name}: these are configs of two kernels, {' and '.join(sorted(kernels))}")
    return kernels.pop()
