"""``tritune tune``: the best config of each kernel, measured on this GPU; ``--static``: ranked where there is none.

Walks the declared space of the kernels behind the given operators and layers, most important first, under a budget of
seconds. What is found is in the store as soon as a key is done; an interrupt keeps it and the best so far of the key at
hand, and the next run goes on where this one ended. Trials run in a worker process (:mod:`.tune_worker`), so a config
that crashes or hangs costs one trial.

Exit status: 0 done, or the budget is used up; 1 a kernel without a config that works; 2 no GPU, bad usage;
130 interrupted.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO, get_args

import torch

from ..autotune import store
from ..autotune.config import Config, Tunable
from ..autotune.device import DeviceSpec
from ..autotune.resolve import ranked
from ..autotune.tuner import SEARCH_SHARE, Final, OutOfTime, Search, Trial, is_tuned, share
from ..paths import writable_folder
from ..progress import Progress, clock
from .case import PRECISIONS, Case
from .child import Child, child_environment, next_event
from .environment import without_paths
from .families import FAMILIES, family_of_op, operator_of, tiny, training_cases
from .sweep import Target, entry_environment, origin_of

BUDGET_SECONDS = 120.0
START_SECONDS = 120.0  # a worker's imports, on a machine that has not read torch from its disk yet
OPEN_SECONDS = 60.0  # tensors and references of one kernel
TRIAL_SECONDS = 30.0


@dataclass(frozen=True)
class Options:
    """What ``tritune tune`` was asked; the command line says what each means.

    Attributes:
        rehearse, cases: for the tests: on the CPU with tiny layers in Triton's interpreter, and a module to import
            first, which may add a family and bring a TIMER.
    """

    ops: Sequence[str] = ()
    shapes: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    direction: str = "fwd"
    budget: float = BUDGET_SECONDS
    trial_limit: float = TRIAL_SECONDS
    force: bool = False
    out: Path | None = None
    dry_run: bool = False
    json: bool = False
    static: bool = False
    target: str | None = None
    pattern: str | None = None
    rehearse: bool = False
    cases: str = ".families"


def operators() -> dict[str, str]:
    """What can be tuned: operator -> family."""
    return {op: name for name, family in FAMILIES.items() for op in family.OPERATORS}


def main(args: Options) -> int:
    if args.cases != ".families":
        importlib.import_module(args.cases)
    if unknown := [op for op in args.ops if op not in operators()]:
        if any(case.name == unknown[0] for family in FAMILIES.values() for case in family.CASES):
            return _usage(f"{unknown[0]!r} is a layer: give each its own --shapes")
        return _usage(f"{unknown[0]!r} cannot be tuned: known are {', '.join(operators())}")
    if unknown := [label for label in args.dtypes if label not in PRECISIONS]:
        return _usage(f"{unknown[0]!r} is not one of {', '.join(PRECISIONS)}")
    if args.out is not None:
        writable_folder(args.out)
    if args.static:
        from . import rank

        if not args.target:
            return _usage("--static needs a --target: which GPU shall the configs be for?")
        if args.shapes or args.dtypes:
            return _usage("--static ranks what ships for a target: choose among that with -k")
        kernels = {tunable.name for op in args.ops for _, tunable, _ in FAMILIES[family_of_op(op)].layers(args.target)}
        return rank.run(args.target, kernels, args.pattern, args.out, dry_run=args.dry_run, as_json=args.json)
    if args.target:
        return _usage("--target goes with --static; without it this machine's GPU is measured")
    try:
        chosen = targets(args)
    except (TypeError, ValueError) as error:
        return _usage(str(error))
    if not chosen:
        return _usage(f"no kernel has {args.pattern!r} in its name <kernel>/<layer>" if args.pattern
                      else f"there is nothing to tune of {', '.join(args.ops)} in this direction")  # fmt: skip
    if not args.rehearse and not torch.cuda.is_available():
        return _usage(
            "torch finds no GPU here, so nothing can be measured; "
            "--static --target sm_90 ranks configs for a GPU that is elsewhere"
        )
    return tune(args, chosen)


def _usage(message: str) -> int:
    print(f"tritune tune: {message}", file=sys.stderr)
    return 2


# --- what to tune ----------------------------------------------------------------------------------------------------


def targets(args: Options) -> list[Target]:
    """The kernels, the forward of every layer first. Raises TypeError or ValueError for layers that make no sense."""
    ops = args.ops or list(operators())
    known = {case.name for op in ops for case in FAMILIES[family_of_op(op)].CASES if case.op == op}
    explicit = [layer for layer in args.shapes if _is_explicit(layer)]
    if unknown := [layer for layer in args.shapes if layer not in known and layer not in explicit]:
        raise ValueError(f"{' and '.join(ops)} have no layer {unknown[0]!r}: known are {', '.join(sorted(known))}")
    if explicit and len(ops) != 1:
        raise ValueError(f"{explicit[0]}: shapes belong to one operator, name it")
    found = []
    for op in ops:
        family = FAMILIES[family_of_op(op)]
        for place, one in enumerate(_cases(op, args.shapes)):
            for label in args.dtypes or [one.precision]:
                case = with_precision(one, label)
                if args.rehearse:
                    case = tiny(case)
                for index, kind in enumerate(family.kinds(case)):
                    if ("bwd" if index else "fwd") in args.direction.split(","):
                        rank = place if args.shapes else family.TUNED.index(one.name)
                        found.append((index > 0, rank, Target(case, kind)))
    chosen = [target for _, _, target in sorted(found, key=lambda row: row[:2])]
    return [target for target in chosen if (args.pattern or "") in f"{target.identity()[0].name}/{target.case.name}"]


def _cases(op: str, layers: Sequence[str]) -> list[Case]:
    """Training cases of an operator's layers; by default those that its family lists as TUNED. Names that belong to
    another operator are passed over."""
    family = FAMILIES[family_of_op(op)]
    known = {name: case for name, case in training_cases(family).items() if case.op == op}
    if not layers:
        return [known[name] for name in family.TUNED if name in known]
    return [
        _explicit(op, one) if _is_explicit(one) else known[one] for one in layers if _is_explicit(one) or one in known
    ]


def _is_explicit(layer: str) -> bool:
    """Shapes, not a name: it starts with a size."""
    return layer[:1].isdigit()


def _explicit(op: str, text: str) -> Case:
    """``"32x64x56x56,64x64x3x3,padding=1"``: shapes first, then options. The operator itself says what does not fit."""
    explicit = FAMILIES[family_of_op(op)].explicit
    known = inspect.signature(explicit, eval_str=True).parameters
    parts = text.split(",")
    options = dict(part.split("=", 1) for part in parts if "=" in part)
    try:
        shapes = [tuple(_size("a size", size, 1) for size in part.split("x")) for part in parts if "=" not in part]
        values: dict[str, Any] = dict(options)
        for name in options.keys() & known.keys():
            if int in (known[name].annotation, *get_args(known[name].annotation)):
                values[name] = _size(name, options[name], 0 if known[name].default == 0 else 1)
        case = replace(explicit(*shapes, **values), name=text)
        operator_of(case).output_shape(case)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].removeprefix("explicit() ")
        raise ValueError(f"{op} {text}: {reason}") from None
    return case


def _size(name: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ValueError(f"{name} is a whole number from {least} on, not {text!r}")
    return int(text)


def with_precision(case: Case, label: str) -> Case:
    """The case in another dtype; an operator that multiplies is told how, for fp32."""
    if label == case.precision:
        return case
    dtype = next(name for name in ("bf16", "fp16", "fp32") if label == name or name == "fp32")
    kwargs = {name: value for name, value in case.kwargs.items() if name != "precision"}
    if dtype == "fp32" and "precision" in inspect.signature(operator_of(case).torch).parameters:
        kwargs["precision"] = label
    return replace(case, dtype=dtype, kwargs=kwargs)


@dataclass
class Key:
    """One line of the work: a kernel on a problem, and what became of it.

    Attributes:
        status: ``"left"`` (not begun), ``"kept"`` (was in the store), ``"tuned"``, ``"cut"`` (interrupted, the best so
            far is kept) or ``"failed"``.
    """

    target: Target
    tunable: Tunable
    problem: Any
    features: dict[str, int | str]
    candidates: list[Config]
    status: str = "left"
    why: str = ""
    entry: store.Entry | None = None
    trials: list[Trial] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.tunable.name} {self.target.case.name} {self.target.case.precision}"

    def to_json(self) -> dict[str, Any]:
        return {
            "kernel": self.tunable.name, "layer": self.target.case.name, "dtype": self.target.case.precision,
            "key": self.features, "status": self.status, "why": self.why,
            "entry": self.entry.to_json() if self.entry else None,
            "trials": [
                {"config": dict(one.config), "us": one.us, "samples": one.samples, "fault": one.fault}
                for one in self.trials
            ],
        }  # fmt: skip


def keys_of(chosen: Sequence[Target], device: DeviceSpec) -> list[Key]:
    """Targets with the same key in the store are one."""
    keys: dict[str, Key] = {}
    for target in chosen:
        tunable, problem = target.identity()
        features = tunable.features(problem)
        try:
            candidates = [config for config, _ in ranked(tunable, problem, device)]
        except RuntimeError:  # no config serves it
            candidates = []
        keys.setdefault(f"{tunable.name} {json.dumps(features)}", Key(target, tunable, problem, features, candidates))
    return list(keys.values())


# --- the worker ------------------------------------------------------------------------------------------------------


class Broken(RuntimeError):
    """The worker could not start, or not prepare a kernel: no config is to blame."""


class Lost(RuntimeError):
    """The worker crashed or hung and was ended; the message says which."""


class Remote:
    """The bench of :mod:`..autotune.tuner` in a worker process that is started again whenever it was lost.

    Args:
        deadline: of the whole run, on the monotonic clock.
    """

    def __init__(self, args: Options, deadline: float) -> None:
        self.args, self.deadline = args, deadline
        self.child: Child | None = None
        self.compiler: Child | None = None
        self.target: Target | None = None
        self.opened: Target | None = None

    def start(self) -> dict[str, Any]:
        """The worker's hello."""
        self.child, self.opened = self._worker(*(["--rehearse"] if self.args.rehearse else [])), None
        try:
            return self._answer(START_SECONDS)
        except Lost as lost:
            raise Broken(f"the worker {lost}") from None

    def compile_ahead(self, keys: Sequence[Key], device: DeviceSpec) -> None:
        """Has another process compile the candidates; the interpreter has nothing to compile."""
        if keys and not self.args.rehearse:
            work = [{"case": key.target.case.to_json(), "kind": key.target.kind} for key in keys]
            self.compiler = self._worker("--compile")
            self.compiler.send(json.dumps({"do": "compile", "device": asdict(device), "work": work}))

    def _worker(self, *options: str) -> Child:
        command = [sys.executable, "-m", f"{__package__}.tune_worker", "--cases", self.args.cases, *options]
        return Child(command, child_environment(self.args.rehearse))

    def open(self, target: Target) -> None:
        """What the next trials are of."""
        self.target = target

    def _ready(self) -> None:
        if self.child is None:
            self.start()
        if self.opened is not self.target:
            assert self.target is not None
            try:
                answer = self._ask(OPEN_SECONDS, do="open", case=self.target.case.to_json(), kind=self.target.kind)
            except Lost as lost:
                raise Broken(f"preparing it {lost}") from None
            if answer["event"] == "error":
                raise Broken(f"preparing it raised {answer['error']}")
            self.opened = self.target

    def attempt(self, config: Config, give_up_us: float) -> Trial:
        self._ready()
        limit_us = give_up_us if give_up_us < float("inf") else None
        try:
            answer = self._ask(self.args.trial_limit, do="attempt", config=config, give_up_us=limit_us)
        except Lost as lost:
            return Trial(config, fault=str(lost))
        if answer["event"] == "error":
            return Trial(config, fault=f"raised: {answer['error']}")
        return Trial(config, answer["us"], answer["samples"], answer["fault"], answer["facts"])

    def final(self, configs: Sequence[Config]) -> Final:
        """Nothing if that breaks the worker: then the trials decide."""
        try:
            self._ready()
            answer = self._ask(2 * self.args.trial_limit, do="final", configs=configs)
        except (Broken, Lost):
            return Final({}, None)
        if answer["event"] == "error":
            return Final({}, None)
        times = zip(configs, answer["us"], strict=True)
        return Final({config: us for config, us in times if us is not None}, answer["torch_us"])

    def _ask(self, limit: float, **request: Any) -> dict[str, Any]:
        assert self.child is not None
        self.child.send(json.dumps(request))
        return self._answer(limit)

    def _answer(self, limit: float) -> dict[str, Any]:
        """The next event. Raises Lost after a crash or ``limit`` seconds, OutOfTime at the deadline."""
        assert self.child is not None
        left = self.deadline - time.monotonic()
        try:
            answer = next_event(self.child, min(limit, left))
        except TimeoutError:
            self.close()
            if left < limit:
                raise OutOfTime from None
            raise Lost(f"hung: nothing for {limit:.0f} s") from None
        if answer is None:
            how = without_paths(self.child.how_it_ended())
            self.close()
            raise Lost(f"crashed: {how}")
        if not answer.get("alive", True):
            self.close()
        return answer

    def close(self) -> None:
        """Ends the worker; the next trial starts another."""
        if self.child is not None:
            self.child.kill()
        self.child = None

    def end(self) -> None:
        self.close()
        if self.compiler is not None:
            self.compiler.kill()


# --- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """All keys, one after the other, into the store.

    Args:
        out: stream for people.
    """

    def __init__(self, args: Options, out: TextIO) -> None:
        self.args, self.out = args, out
        self.started = time.monotonic()
        self.deadline = self.started + args.budget
        self.remote = Remote(args, self.deadline)
        self.keys: list[Key] = []
        self.env: dict[str, Any] = {}
        self.folder = Path()

    def prepare(self, chosen: Sequence[Target]) -> None:
        """Device, keys, and which of them are in the store already. Raises Broken, OutOfTime."""
        hello = self.remote.start()
        self.env = hello["env"]
        self.origin = origin_of("cpu" if self.args.rehearse else "cuda")
        base = self.args.out or store.cache_dir() / "configs"
        self.folder = base / self.env["slug"]
        device = DeviceSpec(**hello["device"])
        self.keys = keys_of(chosen, device)
        for key in self.keys:
            entries = store.load(self.path(key))
            if not self.args.force and is_tuned(key.tunable, key.features, entries, self.origin, self.env):
                key.status = "kept"
        if not self.args.dry_run:
            self.remote.compile_ahead(self.left(), device)

    def path(self, key: Key) -> Path:
        return self.folder / f"{key.tunable.name}.json"

    def left(self) -> list[Key]:
        return [key for key in self.keys if key.status == "left"]

    def go(self, progress: Progress) -> None:
        for number, key in enumerate(self.keys, 1):
            if key.status != "left":
                continue
            now = time.monotonic()
            if now >= self.deadline:
                return
            self.remote.open(key.target)
            watch = self.watcher(progress, number - 1, key)
            search = Search(key.candidates, self.remote, watch)
            watch(search)
            try:
                search.run(now + SEARCH_SHARE * share(now, self.deadline, len(self.left())))
                self.keep(key, search)
            except Broken as broken:
                key.why = str(broken)
                self.keep(key, search)
            except KeyboardInterrupt:
                self.keep(key, search, cut=True)
                raise
            self.report(progress, number, key, search)

    def keep(self, key: Key, search: Search, *, cut: bool = False) -> None:
        """Into the store, at once. What an interrupt left is no better than an entry that was finished."""
        key.trials = search.trials
        key.entry = search.entry(key.tunable, key.problem, self.origin, entry_environment(self.env))
        if key.entry is None:
            if cut or (not key.why and len(search.trials) < len(search.candidates)):
                key.why = "interrupted" if cut else "out of time"
            else:
                key.status = "failed"
                key.why = key.why or ("no config works" if key.candidates else "no config is declared for it")
            return
        key.status = "cut" if "unfinished" in key.entry.extra else "tuned"
        if key.status == "cut":
            store.clear()
            finished = store.load(self.path(key))
            if is_tuned(key.tunable, key.features, finished, self.origin, self.env):
                return
        store.write(self.path(key), key.tunable.name, [key.entry])

    def watcher(self, progress: Progress, done: int, key: Key) -> Callable[[Search], None]:
        """Moves the bar with each trial."""

        def watch(search: Search) -> None:
            part = len(search.trials) / max(1, len(search.candidates))
            best = f"best {search.best[1]:.1f} us" if search.best else "nothing yet"
            state = f"{best}, {len(search.trials)}/{len(search.candidates)}: {key.name}"
            progress.update(done + part, self.seconds_left(done + part), state)

        return watch

    def seconds_left(self, done: float) -> float:
        """At the rate so far, but no longer than the budget."""
        now = time.monotonic()
        kept = sum(key.status == "kept" for key in self.keys)
        budget = self.deadline - now
        if done <= kept:
            return budget
        return min(budget, (now - self.started) * (len(self.keys) - done) / (done - kept))

    def report(self, progress: Progress, number: int, key: Key, search: Search) -> None:
        progress.line(f"[{number}/{len(self.keys)}] {key.name}")
        progress.line(f"    {_times(key.entry) if key.entry else key.why}")
        if key.entry is not None:
            progress.line(f"    {key.entry.config}")
        counts = ", ".join(f"{count} {kind}" for kind, count in search.counts().items())
        progress.line(f"    {len(search.trials)} of {len(search.candidates)} tried" + (f": {counts}" if counts else ""))
        for config, fault in (key.entry.extra.get("broken", {}) if key.entry else {}).items():
            progress.line(f"    {fault}  {config}")

    def summary(self) -> str:
        counts = {status: sum(key.status == status for key in self.keys) for status in STATUSES}
        words = ", ".join(f"{count} {STATUSES[status]}" for status, count in counts.items() if count)
        return f"{words or 'nothing to do'}; {clock(time.monotonic() - self.started)}"

    def to_json(self) -> dict[str, Any]:
        files = sorted({str(self.path(key)) for key in self.keys if key.status in ("tuned", "cut")})
        return {"env": self.env, "files": files, "keys": [key.to_json() for key in self.keys]}


STATUSES = {
    "tuned": "tuned", "kept": "in the store already", "cut": "cut short", "failed": "failed",
    "left": "left for the next run",
}  # fmt: skip


def _times(entry: store.Entry) -> str:
    default_us = entry.extra["default_us"]
    words = [f"{entry.us:.1f} us"]
    if entry.torch_us is not None:
        words.append(f"torch {entry.torch_us:.1f} us")
    if default_us and entry.us is not None and entry.us < default_us:
        words.append(f"{1 - entry.us / default_us:.0%} faster than the model's choice")
    elif default_us:
        words.append("the model's choice")
    if "unfinished" in entry.extra:
        words.append("unfinished")
    return ", ".join(words)


def tune(args: Options, chosen: Sequence[Target]) -> int:
    out = sys.stderr if args.json else sys.stdout
    run = Run(args, out)
    interrupted = False
    try:
        run.prepare(chosen)
        where = run.env["gpu"] or "a rehearsal, where times mean nothing"
        keys = "1 key" if len(run.keys) == 1 else f"{len(run.keys)} keys"
        print(f"{keys} on {where}, Triton {run.env['triton']}, {clock(args.budget)} at most", file=out)
        if args.dry_run:
            for key in run.keys:
                kept = ", in the store already" if key.status == "kept" else ""
                print(f"  {key.name}: {len(key.candidates)} configs{kept}", file=out)
        elif run.left():
            with Progress(out, len(run.keys)) as progress:
                run.go(progress)
    except (Broken, OutOfTime) as error:
        return _usage(str(error) or "no worker could start within the budget")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        run.remote.end()
    found = f"; written to {run.folder}" if any(key.status in ("tuned", "cut") for key in run.keys) else ""
    if interrupted:
        done = f", {run.summary()}{found}" if run.keys else " before anything was tried"
        print(f"tritune tune: interrupted{done}", file=sys.stderr)
    elif not args.dry_run:
        print(f"{run.summary()}{found}", file=out)
    if args.json:
        print(json.dumps(run.to_json(), indent=1))
    return 130 if interrupted else 1 if any(key.status == "failed" for key in run.keys) else 0
