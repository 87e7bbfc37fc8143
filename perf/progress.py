"""Progress of a long command: lines that stay, and on a terminal with rich a bar below them.

Without rich, or when the output is a file or a pipe, only the lines appear, unabridged.
"""

from __future__ import annotations

import contextlib
import shutil
from types import TracebackType
from typing import Any, TextIO

BESIDE_STATE = 42  # columns of the bar, the count and the time left: what follows is cut, not they


class Progress:
    """A context manager.

    Args:
        total: units of work.
    """

    def __init__(self, stream: TextIO, total: int) -> None:
        self.stream, self.total = stream, total
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            with contextlib.suppress(ModuleNotFoundError):
                self.bar = _bar(self.stream)
        if self.bar is not None:
            self.task = self.bar.add_task("", total=self.total, count="", state="", left="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

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
        if self.bar is not None:
            left = "" if seconds_left is None else f"{clock(seconds_left)} left"
            state = state[: max(0, shutil.get_terminal_size().columns - BESIDE_STATE)]
            self.bar.update(self.task, completed=done, count=f"{int(done)}/{self.total}", left=left, state=state)


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
