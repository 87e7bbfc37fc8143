"""The ``tritune`` command: from what was typed to an exit status, and a line on standard error if something is wrong.

What can be typed stands in :mod:`.commands`. Exit status: 0 all is well; 1 what was asked for is not as it should be
(each command says what that means); 2 it could not be done: bad usage, a bad path, something not installed; 130
interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata

from .autotune.child import terminated_like_interrupted
from .autotune.paths import in_words

INTERRUPTED = 130
# What a command may find missing, and the extra that brings it.
EXTRAS = {"typer": "cli", "rich": "cli", "triton": "triton", "matplotlib": "demo", "sklearn": "demo"}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; without ``argv``, that of this process's own command line."""
    if argv is not None:
        return _run(list(argv))
    status = _run(sys.argv[1:])
    if status == INTERRUPTED:  # all is written: whoever interrupts does not wait a second for torch to be unloaded
        sys.stdout.flush()
        os._exit(status)
    return status


def _run(arguments: list[str]) -> int:
    try:
        from .commands import run

        with terminated_like_interrupted():
            return run(arguments)
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        missing = str(error.name).partition(".")[0]
        if missing not in EXTRAS:
            raise
        return _fail(f"tritune needs {missing} for this: pip install 'tritune[{EXTRAS[missing]}]'", 2)
    except OSError as error:
        return _fail(f"tritune: {in_words(error)}", 2)
    except KeyboardInterrupt:
        return _fail("tritune: interrupted", INTERRUPTED)


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
