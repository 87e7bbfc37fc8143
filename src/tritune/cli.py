"""The ``tritune`` command.

Each subcommand is a module with ``add_arguments(parser)`` and ``main(args) -> int``, imported only when it is asked
for: ``tritune --help`` needs neither Triton nor the extras.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

# words -> module, what it does, the extra that brings its dependencies
COMMANDS = {
    ("demo",): (".demo", "train three models with tritune and torch: accuracy, parity", "demo"),
    ("doctor",): (".doctor", "the environment, and what is wrong with it", "cli"),
    ("explain",): (".explain_command", "what a call would run on a device, and why", "cli"),
    ("tune",): (".perf.tune", "the best configs: measured on this GPU, or ranked without one", "triton"),
    ("configs",): (".configs", "list, show, diff and merge tuned configs", "cli"),
    ("bench", "static"): (".perf.static", "compile every shipped config; compare with the baseline", "triton"),
    ("bench", "run"): (".perf.gpu", "tests and timings on this machine's GPU", "triton"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    for words, (module, summary, extra) in COMMANDS.items():
        if tuple(arguments[: len(words)]) == words:
            return _run(words, module, summary, extra, arguments[len(words) :])
    parser = argparse.ArgumentParser(prog="tritune", usage="tritune COMMAND [OPTIONS]", description=_listing(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--version", action="version", version=_version())
    if arguments and not arguments[0].startswith("-"):
        parser.error(f"unknown command {' '.join(arguments[:2])!r}\n\n{_listing()}")
    parser.parse_args(arguments or ["--help"])
    return 0


EXTRAS = {"triton", "rich", "matplotlib", "sklearn"}


def _run(words: tuple[str, ...], module: str, summary: str, extra: str, arguments: list[str]) -> int:
    try:
        command = importlib.import_module(module, __package__)
        parser = argparse.ArgumentParser(prog=f"tritune {' '.join(words)}", description=summary)
        command.add_arguments(parser)
        return int(command.main(parser.parse_args(arguments)))
    except (ModuleNotFoundError, metadata.PackageNotFoundError) as error:
        missing = str(error.name).partition(".")[0]
        if missing not in EXTRAS:
            raise
        print(f"tritune {' '.join(words)} needs {missing}: pip install 'tritune[{extra}]'", file=sys.stderr)
        return 2


def _listing() -> str:
    width = max(len(" ".join(words)) for words in COMMANDS)
    lines = [f"  {' '.join(words):{width}}  {summary}" for words, (_, summary, _) in COMMANDS.items()]
    return "\n".join(["commands:", *lines, "", "tritune COMMAND --help says more about each."])


def _version() -> str:
    from ._version import __version__

    return f"tritune {__version__}"
