"""Tier 4 of the tests as a child process: what passed, what failed, and what never ran."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..autotune.child import END, Child
from ..autotune.environment import ROOT, without_paths

OUTCOME = r"PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# "tests/test_a.py::test_b[c] PASSED [ 5%]", and with pytest-xdist "[gw1] [ 5%] PASSED tests/test_a.py::test_b[c]".
ALONE = re.compile(rf"(?P<test>\S+\.py::.+?) (?P<outcome>{OUTCOME})\b.*")
PARALLEL = re.compile(rf"\[gw\d+\] \[ *\d+%\] (?P<outcome>{OUTCOME}) (?P<test>.+)")
SELECTED = re.compile(r"collected (\d+) items?(?:.*?/ (\d+) selected)?|\[(\d+) items?\]")
MESSAGE = re.compile(r"(?:FAILED|ERROR) (\S+\.py(?:::.+?)?) - (.*)")
MAX_LOG = 4 << 20


class TierFour:
    """One run of ``pytest -m gpu`` and what is known of it so far.

    Args:
        env: of the child.
        tests: files and folders, relative to the root of the checkout.
        jobs: processes, if pytest-xdist is there.
    """

    def __init__(self, env: dict[str, str], tests: list[str], jobs: int) -> None:
        self.outcomes: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.selected: int | None = None
        self.log: list[str] = []
        self.ended = ""
        self.started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--durations=20", "-p", "no:cacheprovider"]
        command += tests
        # Other people's plugins have no part in our results.
        env = {**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "200"}
        if jobs > 1 and importlib.util.find_spec("xdist"):
            command += ["-p", "xdist.plugin", "-n", str(jobs)]
            env["OMP_NUM_THREADS"] = "1"
        self.child = Child(command, env, ROOT, merge_errors=True)

    def wait(self, deadline: float, watch: Callable[[int], None] = lambda ran: None) -> None:
        """Reads until the end, or until ``deadline`` (of time.monotonic): then the run is interrupted and killed.

        Args:
            watch: told after every line how many tests have ended.
        """
        try:
            while (line := self.child.line(deadline - time.monotonic())) is not END:
                self.read(line)
                watch(len(self.outcomes))
            self.ended = self.child.how_it_ended()
        except TimeoutError:
            self.child.interrupt()
            self._drain(10)
            self.ended = "out of time"
        finally:
            self.child.kill()

    def _drain(self, seconds: float) -> None:
        """Reads what an interrupted run still says."""
        end = time.monotonic() + seconds
        try:
            while (line := self.child.line(end - time.monotonic())) is not END:
                self.read(line)
        except TimeoutError:
            return

    def read(self, line: str) -> None:
        line = line.rstrip()
        self.log.append(line)
        if found := ALONE.fullmatch(line) or PARALLEL.fullmatch(line):
            self.outcomes[found["test"]] = found["outcome"]
        elif found := MESSAGE.fullmatch(line):
            self.messages[found[1]] = without_paths(found[2])[:300]
        elif self.selected is None and (found := SELECTED.search(line)):
            self.selected = int(found[2] or found[1] or found[3])

    def to_json(self) -> dict[str, Any]:
        counts = {name: list(self.outcomes.values()).count(name) for name in OUTCOME.split("|")}
        failed = [test for test, outcome in self.outcomes.items() if outcome in ("FAILED", "ERROR", "XPASS")]
        failed += [test for test in self.messages if test not in self.outcomes]  # a file that could not be imported
        return {
            "ended": without_paths(self.ended) or "interrupted",
            "seconds": round(time.monotonic() - self.started, 1),
            "selected": self.selected,
            **{name.lower(): count for name, count in counts.items() if count},
            "not_run": None if self.selected is None else max(0, self.selected - len(self.outcomes)),
            "failures": [{"test": test, "message": self.messages.get(test, "")} for test in failed],
            "log": without_paths("\n".join(self.log))[-MAX_LOG:].splitlines(),
        }


def has_tests(root: Path = ROOT) -> bool:
    """Is this a checkout? An installed package brings no tests."""
    return (root / "tests/conftest.py").is_file() and importlib.util.find_spec("pytest") is not None


def in_words(tests: dict[str, Any] | None) -> str:
    """One line for people."""
    if tests is None:
        return "GPU tests: not run"
    names = ("passed", "failed", "error", "xpass", "skipped", "xfail", "not_run")
    counts = ", ".join(f"{tests[name]} {name.replace('_', ' ')}" for name in names if tests.get(name))
    return f"GPU tests: {counts or 'none ran'} in {tests['seconds']:.0f} s ({tests['ended']})"


def warmers() -> int:
    """Processes that compile the kernels of cases while the tests run."""
    return max(1, (os.cpu_count() or 1) // 4)


def jobs() -> int:
    """Processes of the tests, which compile, too, for most of their time."""
    return max(1, min(16, (os.cpu_count() or 1) - warmers()))
