"""Child processes that cannot harm their parent: each leads its own group, is read with a time limit, and is killed.

Also what their parents share: the children's environment, their events, and an end by signal that keeps what is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

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
            stdin=subprocess.PIPE,  # its end tells the child that we are gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge_errors else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=self._read_lines, args=(self.process.stdout,), daemon=True).start()
        threading.Thread(target=self._read_errors, args=(self.process.stderr,), daemon=True).start()

    def _read_lines(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(END)

    def _read_errors(self, stream: IO[str] | None) -> None:
        if stream is not None:
            with stream:
                self.errors.extend(line.rstrip("\n") for line in stream)

    def line(self, timeout: float) -> str | None:
        """The next line, or END. Raises TimeoutError after ``timeout`` seconds."""
        try:
            return self._lines.get(timeout=max(0.0, timeout))
        except queue.Empty:
            raise TimeoutError from None

    def send(self, line: str) -> None:
        """Writes a line to the child's standard input. To a child that has ended nothing is said: `line` tells."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

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
                with contextlib.suppress(BrokenPipeError):  # what it never read
                    self.process.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def next_event(child: Child, seconds: float) -> dict[str, Any] | None:
    """What the worker says next; ``None`` if it has ended. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while (line := child.line(end - time.monotonic())) is not END:
        with contextlib.suppress(ValueError):  # what some library printed while it was imported
            event = json.loads(line)
            if isinstance(event, dict) and "event" in event:
                return event
    return None


def child_environment(rehearse: bool) -> dict[str, str]:
    """Ours, and a search path on which children find this very package from any folder."""
    package = sys.modules[str(__package__).split(".", 1)[0]]
    source = str(Path(str(package.__file__)).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))}
    env.pop("TRITON_INTERPRET", None)
    env.pop("TRITUNE_DEVICE", None)  # what is measured here is of the device that is here
    if rehearse:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return env


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """A time limit around us sends SIGTERM: what is there by then shall be written and shown."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- in the child ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def private_stdout() -> Iterator[TextIO]:
    """Standard output for the events alone: what others print goes to standard error."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


def end_with_parent(take: Callable[[bytes], None] = lambda line: None) -> None:
    """Starts a thread that hands on each line of standard input, and ends this process when there are no more: a parent
    that is killed cannot end us, and a kernel that hangs would hold the GPU for ever."""

    def read() -> None:
        rest = b""
        while chunk := os.read(0, 1 << 16):  # not sys.stdin, whose lock would be held when the interpreter ends
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                take(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()


def requests() -> Iterator[dict[str, Any]]:
    """What the parent asks, one JSON line each, for as long as it lives."""
    lines: queue.Queue[bytes] = queue.Queue()
    end_with_parent(lines.put)
    while True:
        yield json.loads(lines.get())
