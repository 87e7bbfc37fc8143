"""Kernels compiled in processes of their own, for commands that compile hundreds: an interrupt ends them at once, and
what the compiler prints as it dies stays with them.

What was read of a binary is kept in the user's cache folder, so that a run goes on where an earlier one ended.

    python -m tritune.autotune.compilers --families tritune.perf.families

is such a process; the module registers what is compiled. One JSON line a request on standard input, one an answer on
standard output::

    {"target": "sm_90", "kernel": "conv", "layer": "vgg-c3-bf16-nhwc", "config": {...}, "index": 0}
                                                   {"event": "profile", "registers": 96, ...}
                                                   {"event": "error", "error": "..."}

A layer that no family lists comes with the case and kind of kernel that it is of.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from . import store
from .bench import Target
from .child import Child, child_environment, next_event, private_stdout, requests
from .config import Config
from .environment import in_words, without_paths
from .static_profile import TRITON, Row, StaticProfile, profile
from .workload import Case, layers

COMPILE_SECONDS = 600.0  # after which a compilation counts as hung
MOST = 8  # processes; each takes about a gigabyte


class Compilers:
    """A pool of processes that compile, each started when it is first needed. A context manager, whose end kills them.

    :meth:`attempt` may be called from as many threads as there are processes, ``count``.

    Args:
        families: name of the module that registers the families whose layers are compiled.
        unlisted: by kernel and layer, where the layers are from that the families do not list.
    """

    def __init__(self, families: str, unlisted: Mapping[tuple[str, str], Target] | None = None) -> None:
        self.families, self.unlisted = families, unlisted or {}
        self.count = min(MOST, max(2, (os.cpu_count() or 1) // 2))
        self.idle: list[Child] = []
        self.children: set[Child] = set()
        self.lock = threading.Lock()
        self.ended = False
        self.profiles = Profiles()

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.ended = True
            for child in self.children:
                child.kill()

    def attempt(self, row: Row) -> StaticProfile | str:
        """What :func:`.static_profile.profile` says of the row, or in a line why it does not compile."""
        known = self.profiles.find(row.binary)
        if known is None:
            answer = self._ask(row)
            if answer.pop("event") == "error":
                return f"does not compile: {answer['error']}"
            known = StaticProfile(**answer)
            self.profiles.keep(row.binary, known)
        return known

    def _ask(self, row: Row) -> dict[str, Any]:
        with self.lock:
            if self.ended:
                return {"event": "error", "error": "interrupted"}
            child = self.idle.pop() if self.idle else self._start()
        kernel = row.tunable.name
        work: dict[str, Any] = {"target": row.target, "kernel": kernel, "layer": row.layer, "config": row.config}
        if one := self.unlisted.get((kernel, row.layer)):
            work |= {"case": one.case.to_json(), "kind": one.kind}
        child.send(json.dumps({**work, "index": row.index}))
        try:
            answer = next_event(child, COMPILE_SECONDS)
        except TimeoutError:
            return self._lost(child, f"hung: nothing for {COMPILE_SECONDS:.0f} s")
        if answer is None:
            return self._lost(child, without_paths(child.how_it_ended()))
        with self.lock:
            self.idle.append(child)
        return answer

    def _start(self) -> Child:
        command = [sys.executable, "-m", f"{__package__}.compilers", "--families", self.families]
        child = Child(command, child_environment(rehearse=False))
        self.children.add(child)
        return child

    def _lost(self, child: Child, how: str) -> dict[str, Any]:
        child.kill()
        with self.lock:
            self.children.discard(child)
        return {"event": "error", "error": f"the compiler {how}"}


class Profiles:
    """What earlier runs read of binaries: one JSON line each, in a file for this Triton and this way of reading."""

    def __init__(self) -> None:
        reader = hashlib.sha256(Path(__file__).with_name("static_profile.py").read_bytes()).hexdigest()[:12]
        self.path = store.cache_dir() / "static" / f"triton-{TRITON}-{reader}.jsonl"
        self.known: dict[str, StaticProfile] = {}
        self.lock = threading.Lock()
        with contextlib.suppress(OSError):  # there is none yet, or none can be had: then all is compiled
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # the last one of a run that was killed
                    found = json.loads(line)
                    binary = found.pop("binary")
                    self.known[binary] = StaticProfile(**found)

    def find(self, binary: str) -> StaticProfile | None:
        return self.known.get(binary)

    def keep(self, binary: str, one: StaticProfile) -> None:
        line = json.dumps({"binary": binary, **asdict(one)})
        with self.lock, contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for other in self.path.parent.glob(f"triton-{TRITON}-*.jsonl"):
                if other != self.path:  # read in a way that is no longer ours
                    other.unlink()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}")  # in front, in case a line before it was cut
            self.known[binary] = one


# --- the process -----------------------------------------------------------------------------------------------------


@cache
def _problems(target: str) -> dict[tuple[str, str], tuple[Any, Any]]:
    return {(tunable.name, layer): (tunable, problem) for layer, tunable, problem in layers(target)}


def compile_one(request: dict[str, Any]) -> dict[str, Any]:
    if "case" in request:
        tunable, problem = Target(Case.from_json(request["case"]), request["kind"]).identity()
    else:
        tunable, problem = _problems(request["target"])[request["kernel"], request["layer"]]
    launch = tunable.launches(problem, Config(request["config"]))[request["index"]]
    try:
        return {"event": "profile", **asdict(profile(launch, request["target"]))}
    except Exception as error:
        return {"event": "error", "error": in_words(error)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", required=True, help="module that registers them")
    importlib.import_module(parser.parse_args().families)
    with private_stdout() as out:
        for request in requests():
            print(json.dumps(compile_one(request)), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
