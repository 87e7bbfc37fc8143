"""Child processes that cannot harm their parent: each leads its own group, is read with a time limit, and is killed."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

END = None  # what `line` returns once the child has closed its standard output


class Child:
    """One process in its own group; its standard output is read line by line, the end of its errors is kept.

    Args:
        command: program and arguments.
        cwd: folder to run in; default: ours.
        merge_errors: put standard error among the lines.
    """

    def __init__(
        self, command: Sequence[str], env: dict[str, str], cwd: Path | None = None, *, merge_errors: bool = False
    ) -> None:
        self.errors: deque[str] = deque(maxlen=40)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,  # never written to: its end tells the child that we are gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge_errors else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=self._read_lines, args=(self.process.stdout,), daemon=True).start()
        threading.Thread(target=self._read_errors, args=(self.process.stderr,), daemon=True).start()

    def _read_lines(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(END)

    def _read_errors(self, stream: IO[str] | None) -> None:
        for line in stream or ():
            self.errors.append(line.rstrip("\n"))

    def line(self, timeout: float) -> str | None:
        """The next line, or END. Raises TimeoutError after ``timeout`` seconds."""
        try:
            return self._lines.get(timeout=max(0.0, timeout))
        except queue.Empty:
            raise TimeoutError from None

    def how_it_ended(self) -> str:
        """After END: the exit status in words, with the last words of the child."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its output and went on"
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        said = [line for line in self.errors if line.strip()]
        return f"{how}: {said[-1]}" if said else how

    def interrupt(self) -> None:
        """Asks politely, as Ctrl-C does."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        """Ends the whole group, whatever it does, and waits a little for it."""
        self._signal(signal.SIGKILL)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # stuck in the driver: nothing more can be done about it
            return
        finally:
            if self.process.stdin is not None:
                self.process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return
