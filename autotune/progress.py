"""Progress of a long command: lines that stay, and where the work stands meanwhile.

On a terminal with rich that is a bar below the lines. Elsewhere (a pipe, a file, a terminal without rich) it is a line
on standard error every few seconds.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
from types import TracebackType
from typing import Any, TextIO

SECONDS = 5.0  # from one line of state to the next
BESIDE_STATE = 42  # columns of the bar, the count and the time left: what follows is cut, not they


class Progress:
    """A context manager.

    Args:
        stream: where the lines that stay go, and the bar if it is a terminal.
        total: units of work.
    """

    def __init__(self, stream: TextIO, total: int) -> None:
        self.stream, self.total = stream, total
        self.bar: Any = None
        self.state = ""
        self.ended = threading.Event()
        self.reporter = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            with contextlib.suppress(ModuleNotFoundError):
                self.bar = _bar(self.stream)
        if self.bar is not None:
            self.task = self.bar.add_task("", total=self.total, count="", state="", left="")
            self.bar.start()
        else:
            self.reporter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        else:
            self.ended.set()
            self.reporter.join()

    def line(self, text: str) -> None:
        """A line that stays; on a terminal it is cut to the width."""
        if self.stream.isatty():
            text = text[: shutil.get_terminal_size().columns - 1]
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False, no_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def update(self, done: float, seconds_left: float | None = None, state: str = "") -> None:
        """Where the work stands: units done, an estimate of what is left, and a few words."""
        count = f"{int(done)}/{self.total}"
        left = "" if seconds_left is None else f"{clock(seconds_left)} left"
        self.state = "  ".join(filter(None, [count, left, state]))
        if self.bar is not None:
            state = state[: max(0, shutil.get_terminal_size().columns - BESIDE_STATE)]
            self.bar.update(self.task, completed=done, count=count, left=left, state=state)

    def _report(self) -> None:
        """A thread, because what takes long calls nobody."""
        while not self.ended.wait(SECONDS):
            if self.state:
                print(self.state, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02}"


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    columns = (
        BarColumn(bar_width=16), TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[state]}", markup=False, table_column=Column(no_wrap=True)),
    )  # fmt: skip
    return Bar(*columns, console=Console(file=stream), transient=True)
