"""What can be typed after ``tritune``: every command with its options, as typer reads them.

A command imports its module when it runs, so ``tritune --help`` loads neither Triton nor an extra. What reports has
``--json``: one document on standard output, and nothing else there.
"""

from __future__ import annotations

import inspect
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import explain_command
from ._version import __version__
from .autotune.device import TARGETS
from .autotune.shapes import Option, Shape, shape

# What is wrong with the arguments. Each version of typer keeps this class of click's in another place.
UsageError = typer.BadParameter.__base__


class Root(TyperGroup):
    """The ``tritune`` command itself."""

    def invoke(self, ctx: Any) -> Any:
        try:
            status = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that has gone is no error
        except KeyboardInterrupt:
            print("tritune: interrupted", file=sys.stderr)
            return 130
        return status


def _app(**options: Any) -> typer.Typer:
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, **options)


app = _app(cls=Root, help="Convolution, pooling, recurrence and attention for PyTorch, from Triton kernels.")
explain = _app(help="What a call would run on a device, here or not, and why.")
configs = _app(help="The tuned configs in files: list, show, compare and merge them.")
bench = _app(help="Measure this GPU, or what the compiler makes of kernels.")


def run(arguments: Sequence[str]) -> int:
    """The exit status; a usage error is one line."""
    try:
        status = typer.main.get_command(app).main(arguments or ["--help"], prog_name="tritune", standalone_mode=False)
    except UsageError as error:  # type: ignore[misc]  # mypy cannot know what __base__ is
        where = error.ctx.command_path if error.ctx else "tritune"
        print(f"{where}: {' '.join(error.format_message().split())}  ({where} --help)", file=sys.stderr)
        return 2
    return int(status or 0)


# --- kinds of options ------------------------------------------------------------------------------------------------


def _one_of(words: Iterable[str]) -> dict[str, Any]:
    """Of an option or argument whose value is one of a few words."""
    known = tuple(words)

    def parse(text: str) -> str:
        if text not in known:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(known)}")
        return text

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return {"parser": parse, "autocompletion": complete, "metavar": "|".join(known)}


def _seconds(text: str | float) -> float:
    """From a word, or from a default."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(text))
    if not match:
        raise typer.BadParameter(f"{text!r} is not a time such as 120s, 5m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _shape(text: str) -> Shape:
    try:
        return shape(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _time(help: str) -> Any:
    """Of an option that is a length of time, in seconds as a number."""
    return typer.Option(parser=_seconds, show_default=False, metavar="TIME", help=help)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else on standard output.")]
Pattern = Annotated[
    str | None, typer.Option("-k", metavar="TEXT", help="Only <kernel>/<layer> names that contain this.")
]
Rehearse = Annotated[bool, typer.Option(hidden=True)]  # on the CPU, tiny layers, Triton's interpreter
Cases = Annotated[str, typer.Option(hidden=True)]  # a module of cases, for the tests
Families = Annotated[str, typer.Option(hidden=True)]  # a module that registers families, for the tests


# --- tritune ---------------------------------------------------------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tritune {__version__}")
        raise typer.Exit


@app.callback()
def tritune(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Typer takes the options of the command itself from here."""


@app.command()
def demo(
    model: Annotated[
        list[str], typer.Option(help="Only this one; may be repeated.", **_one_of(("cnn", "rnn", "attention")))
    ] = [],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For demo.png.")] = Path("tritune-demo"),
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Json = False,
) -> int:
    """Train three models, and compare with torch.

    Accuracy, time, and the difference of a training step, tensor by tensor; one picture.

    Exit status 1: an accuracy or a difference is not as it should be.
    """
    from . import demo as command

    return command.main(command.Options(model, out, epochs, seed, as_json))


@app.command()
def doctor(as_json: Json = False) -> int:
    """The environment, and what is wrong with it.

    Exit status 1: there is a problem.
    """
    from . import doctor as command

    return command.main(as_json=as_json)


@app.command()
def tune(
    ops: Annotated[
        list[str], typer.Argument(metavar="OPERATOR", help="What to tune, such as conv2d; default: all.")
    ] = [],
    shapes: Annotated[
        list[str],
        typer.Option(
            metavar="LAYER",
            help="The name of a layer in perf/, or shapes with options: 32x64x56x56,64x64x3x3,padding=1, which may "
            "also be words behind the operator. May be repeated.",
        ),
    ] = [],
    dtype: Annotated[
        str, typer.Option(metavar="NAME[,NAME]", help="bf16, fp16, ieee, tf32 or tf32x3; default: the layer's.")
    ] = "",
    recorded: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="The layers are the calls that tritune.record_shapes has written."),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(help="Which kernels; default: fwd, or as it was recorded.", **_one_of(("fwd", "bwd", "fwd,bwd"))),
    ] = None,
    budget: Annotated[float, _time("For everything, such as 120s or 5m; default: 120s.")] = 120.0,
    trial_limit: Annotated[float, _time("After this a config counts as hung; default: 30s.")] = 30.0,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is in the store already.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="STORE", help="To write to; default: this user's, with --static none.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be tuned.")] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Rank by model and compiler for a --target, without a GPU.")
    ] = False,
    target: Annotated[str | None, typer.Option(help="With --static: the target.", **_one_of(TARGETS))] = None,
    pattern: Pattern = None,
    as_json: Json = False,
    rehearse: Rehearse = False,
    families: Families = f"{__package__}.perf.families",
) -> int:
    """Find the best configs, on this GPU or without one.

    An interrupt keeps what was found, and the next run goes on from there. Exit status 1: a kernel without a config
    that works.
    """
    from .autotune import tune as command

    dtypes = dtype.split(",") if dtype else []
    return command.main(
        command.Options(
            families, ops, shapes, dtypes, direction, budget, trial_limit, force, out, dry_run, as_json, static, target,
            pattern, rehearse, recorded,
        )
    )  # fmt: skip


# --- tritune explain -------------------------------------------------------------------------------------------------


Device = Annotated[str | None, typer.Option(metavar="NAME", help="Such as h200, sm_90 or cpu; default: this machine.")]
Backend = Annotated[str, typer.Option(help="As of use_backend.", **_one_of(("auto", "triton", "torch")))]


def _explain(name: str, op: explain_command.Op) -> None:
    """Adds the command for one operator, whose options are those of the operator."""
    words = Annotated[
        list[str],
        typer.Argument(metavar="SHAPE", help=f"{op.shapes}: {op.example}; with commas, and options as NAME=VALUE, too"),
    ]
    dtype = Annotated[str, typer.Option(help="Of the tensors.", **_one_of(explain_command.DTYPES))]
    parameters = [
        _parameter("words", words),
        *(_parameter(flag[2:].replace("-", "_"), *_option(flag, one)) for flag, one in op.options.items()),
        _parameter("dtype", dtype, "bf16"),
        _parameter("device", Device, None),
        _parameter("backend", Backend, "auto"),
        _parameter("as_json", Json, False),
    ]

    def command(
        words: Sequence[str], dtype: str, device: str | None, backend: str, as_json: bool, **options: Any
    ) -> int:
        given = {name: value for name, value in options.items() if value is not None}
        return explain_command.main(explain_command.Request(name, words, given, dtype, device, backend, as_json))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    explain.command(name, help=f"What {name} would run, and why.")(command)


def _option(flag: str, one: Option) -> tuple[Any, Any]:
    """The annotation and the default of one option of an operator; ``None``: it was not given."""
    more = _one_of(one.choices) if one.choices else {}
    default = "" if one.default is None or one.kind is bool else f"default: {one.default}"
    help = "; ".join(filter(None, (one.help, default)))
    return Annotated[one.kind | None, typer.Option(flag, help=help, **more)], None


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


for _name, _op in explain_command.OPS.items():
    _explain(_name, _op)


@explain.command("model", help="What each call of a model would run on this machine, one a line.")
def _model(
    place: Annotated[str, typer.Argument(metavar="PACKAGE.MODULE:NAME", help="A module, or what makes one.")],
    shapes: Annotated[list[Any], typer.Argument(parser=_shape, metavar="SHAPE", help="Of the inputs: 1x3x224x224")],
    dtype: Annotated[str, typer.Option(help="Of model and inputs.", **_one_of(explain_command.DTYPES))] = "fp32",
    backend: Backend = "auto",
    as_json: Json = False,
) -> int:
    return explain_command.explain_model(place, shapes, dtype, backend, as_json)


@explain.command("file", help="What each call of a file that tritune.record_shapes has written would run.")
def _file(
    path: Annotated[Path, typer.Argument(metavar="FILE")],
    device: Device = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> int:
    return explain_command.explain_file(path, device, backend, as_json)


app.add_typer(explain, name="explain")


# --- tritune configs -------------------------------------------------------------------------------------------------


Left = Annotated[Path, typer.Argument(metavar="LEFT", help="A store, one of its folders, or one file.")]
Right = Annotated[Path, typer.Argument(metavar="RIGHT", help="Another one.")]


def _configs(action: str, **values: Any) -> int:
    from . import configs as command

    return command.main(Namespace(action=action, **values))


@configs.command("list")
def list_configs(
    stores: Annotated[
        list[Path], typer.Argument(metavar="STORE", help="Default: this user's and the shipped one.")
    ] = [],
    as_json: Json = False,
) -> int:
    """Files with their entries by origin and Triton version."""
    return _configs("list", stores=stores, json=as_json)


@configs.command()
def show(
    kernel: Annotated[str, typer.Argument(help="Such as conv.")],
    device: Annotated[
        str,
        typer.Option(
            help="Only what would serve this device, such as h200, in the order in which it is looked up; "
            "or what is for a target, such as sm_90."
        ),
    ] = "",
    store: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Default: this user's and the shipped one.")
    ] = None,
    as_json: Json = False,
) -> int:
    """The entries of a kernel.

    Exit status 1: there are none.
    """
    return _configs("show", kernel=kernel, device=device, store=store, json=as_json)


@configs.command()
def diff(left: Left, right: Right, as_json: Json = False) -> int:
    """What one store adds, removes and changes against another.

    Exit status 1: anything.
    """
    return _configs("diff", left=left, right=right, json=as_json)


@configs.command()
def merge(
    left: Left,
    right: Right,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="STORE", help="A new store, or LEFT to add to it.")],
    keep: Annotated[
        str,
        typer.Option(
            help="Which of two entries for one key; the best is the faster.", **_one_of(("best", "newest", "left"))
        ),
    ] = "best",
    as_json: Json = False,
) -> int:
    """Make one store of two."""
    return _configs("merge", left=left, right=right, out=out, keep=keep, json=as_json)


app.add_typer(configs, name="configs")


# --- tritune bench ---------------------------------------------------------------------------------------------------


@bench.command("static")
def bench_static(
    target: Annotated[list[str], typer.Option(help="Only this target; may be repeated.", **_one_of(TARGETS))] = [],
    pattern: Annotated[str | None, typer.Option("-k", metavar="TEXT", help="Only names that contain this.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="To compare with; default: the one that ships for this Triton.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Write the profiles into --baseline; prints what changes.")
    ] = False,
    accept: Annotated[bool, typer.Option("--accept", help="With --update: even if something got worse.")] = False,
    as_json: Json = False,
) -> int:
    """Compile every shipped config for its target, without a GPU, and compare with the baseline.

    An interrupt keeps what was compiled. Exit status 1: a kernel is at fault, or an update was refused.
    """
    from .perf import static as command

    return command.main(command.Options(target, pattern, baseline, update, accept, as_json))


@bench.command("run")
def bench_run(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="For the results; default: perf/results/<GPU>; with --merge the store to add to."
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(parser=_seconds, show_default=False, metavar="TIME", help="For everything; default: 460s.")
    ] = 460.0,
    tests: Annotated[bool, typer.Option(help="Run the tests that need a GPU as well.")] = True,
    patterns: Annotated[
        list[str],
        typer.Option("-k", metavar="TEXT", help="Only <family>/<case> names that contain this; may be repeated."),
    ] = [],
    item_limit: Annotated[
        float,
        typer.Option(
            parser=_seconds, show_default=False, metavar="TIME", help="After this a case counts as hung; default: 60s."
        ),
    ] = 60.0,
    merge: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only put a measured_configs.json into the store that --out names."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run ended whose results are in the folder of --out.")
    ] = False,
    as_json: Json = False,
    rehearse: Rehearse = False,
    cases: Cases = ".families",
) -> int:
    """Tests and timings on this machine's GPU (make gpu).

    Exit status 1: a wrong result, a failed test or a crash.
    """
    from .perf import gpu as command

    chosen = ["tests"] if tests else []
    return command.main(
        command.Options(out, budget, rehearse, chosen, patterns, resume, merge, as_json, cases, item_limit)
    )  # fmt: skip


app.add_typer(bench, name="bench")
