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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO, get_args

import torch

from . import recorded, store
from .bench import Target, entry_environment, origin_of
from .child import Child, child_environment, next_event
from .config import Config, Tunable
from .device import DeviceSpec
from .environment import without_paths
from .paths import writable_folder
from .progress import Progress, clock
from .resolve import ranked
from .search import SEARCH_SHARE, Final, OutOfTime, Search, Trial, is_tuned, share
from .shapes import Option, is_spelled_out, parse, words_of
from .workload import FAMILIES, PRECISIONS, Case, family_of_op, operator_of, tiny, training_cases

BUDGET_SECONDS = 120.0
START_SECONDS = 120.0  # a worker's imports, on a machine that has not read torch from its disk yet
OPEN_SECONDS = 60.0  # tensors and references of one kernel
TRIAL_SECONDS = 30.0


@dataclass(frozen=True)
class Options:
    """What ``tritune tune`` was asked; the command line says what each means.

    Attributes:
        families: name of a module that registers families when it is imported; it may bring a TIMER.
        rehearse: for the tests: on the CPU, with tiny layers in Triton's interpreter.
        recorded: a file of calls, which are the layers.
    """

    families: str
    ops: Sequence[str] = ()
    shapes: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    direction: str | None = None
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
    recorded: Path | None = None


def operators() -> dict[str, str]:
    """What can be tuned: operator -> family."""
    return {op: name for name, family in FAMILIES.items() for op in family.OPERATORS}


def main(args: Options) -> int:
    importlib.import_module(args.families)
    if words := [word for word in args.ops if is_spelled_out(word)]:  # a layer in words, as `explain` takes it
        names = [word for word in args.ops if word not in words]
        args = replace(args, ops=names, shapes=[" ".join([*args.shapes, *words])])
    if unknown := [op for op in args.ops if op not in operators()]:
        if any(case.name == unknown[0] for family in FAMILIES.values() for case in family.CASES):
            return _usage(f"{unknown[0]!r} is a layer: give each its own --shapes")
        return _usage(f"{unknown[0]!r} cannot be tuned: known are {', '.join(operators())}")
    if unknown := [label for label in args.dtypes if label not in PRECISIONS]:
        return _usage(f"{unknown[0]!r} is not one of {', '.join(PRECISIONS)}")
    if args.out is not None:
        writable_folder(args.out)
    if args.recorded and args.shapes:
        return _usage("--from names the layers of a file: leave out --shapes")
    if args.static:
        from . import rank

        if not args.target:
            return _usage("--static needs a --target: which GPU shall the configs be for?")
        if args.shapes or args.dtypes:
            return _usage("--static ranks what ships for a target, or is in a file that --from names: choose among "
                          "that with -k")  # fmt: skip
        unlisted: dict[tuple[str, str], Target] = {}
        if args.recorded:
            try:
                unlisted = _distinct(targets(replace(args, pattern=None)))
            except ValueError as error:
                return _usage(str(error))
            layers = [(layer, *one.identity()) for (_, layer), one in unlisted.items()]
        else:
            wanted = {family_of_op(op) for op in args.ops} or set(FAMILIES)
            layers = [one for name, family in FAMILIES.items() if name in wanted for one in family.layers(args.target)]
        return rank.run(
            args.families, args.target, layers, args.pattern, args.out, dry_run=args.dry_run, as_json=args.json,
            unlisted=unlisted,
        )  # fmt: skip
    if args.target:
        return _usage("--target goes with --static; without it this machine's GPU is measured")
    try:
        chosen = targets(args)
    except (TypeError, ValueError) as error:
        return _usage(str(error))
    if not chosen:
        where = args.recorded or ", ".join(args.ops)
        return _usage(f"no kernel has {args.pattern!r} in its name <kernel>/<layer>" if args.pattern
                      else f"there is nothing to tune of {where} in this direction")  # fmt: skip
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
    found = []
    for rank, one, direction in _recorded(args, args.recorded) if args.recorded else _named(args):
        for label in args.dtypes or [one.precision]:
            case = with_precision(one, label)
            if args.rehearse:
                case = tiny(case)
            for index, kind in enumerate(FAMILIES[family_of_op(case.op)].kinds(case)):
                if ("bwd" if index else "fwd") in direction.split(","):
                    found.append((index > 0, rank, Target(case, kind)))
    chosen = [target for _, _, target in sorted(found, key=lambda row: row[:2])]
    return [target for target in chosen if (args.pattern or "") in f"{target.identity()[0].name}/{target.case.name}"]


def _named(args: Options) -> Iterator[tuple[int, Case, str]]:
    """The layers that ``--shapes`` names, or else those that ship: ``(rank, case, direction)``."""
    ops = args.ops or list(operators())
    known = {case.name for op in ops for case in FAMILIES[family_of_op(op)].CASES if case.op == op}
    explicit = [layer for layer in args.shapes if is_spelled_out(layer)]
    if unknown := [layer for layer in args.shapes if layer not in known and layer not in explicit]:
        raise ValueError(f"{' and '.join(ops)} have no layer {unknown[0]!r}: known are {', '.join(sorted(known))}")
    if explicit and len(ops) != 1:
        raise ValueError(f"{explicit[0]}: shapes belong to one operator, name it")
    for op in ops:
        family = FAMILIES[family_of_op(op)]
        for place, one in enumerate(_cases(op, args.shapes)):
            yield place if args.shapes else family.TUNED.index(one.name), one, args.direction or "fwd"


def _recorded(args: Options, path: Path) -> Iterator[tuple[int, Case, str]]:
    """The calls in a file, most frequent first; those that no layer is like are named, and left out."""
    calls = recorded.read(path)
    left_out = 0
    for rank, call in enumerate(calls):
        try:
            one = _case_of(call)
        except ValueError as error:
            left_out += 1
            print(f"tritune tune: left out, {call.count} x {call.op}: {error}", file=sys.stderr)
            continue
        if not args.ops or one.op in args.ops:
            yield rank, one, args.direction or ("fwd" if call.direction == "fwd" else "fwd,bwd")
    if left_out == len(calls):
        raise ValueError(f"{path} has no call that can be tuned")


def _case_of(call: recorded.Recorded) -> Case:
    """Raises ValueError, which says why no layer is like this call."""
    spelled = [family.recorded(call) for family in FAMILIES.values() if hasattr(family, "recorded")]
    found = [one for one in spelled if one is not None]
    if not found:
        raise ValueError("no family has layers of it")
    if call.dtype != "fp32" and call.dtype not in PRECISIONS:
        raise ValueError(f"dtype {call.dtype} has no kernel")
    case = with_precision(_explicit(*found[0]), call.dtype)
    return replace(case, layout=call.layout) if case.layout and call.layout else case


def _distinct(chosen: Sequence[Target]) -> dict[tuple[str, str], Target]:
    """By kernel and layer, one target of those with the same key in the store."""
    found: dict[str, tuple[tuple[str, str], Target]] = {}
    for target in chosen:
        (tunable, problem), case = target.identity(), target.case
        layer = "-".join(filter(None, (case.name, case.precision, case.layout, target.kind)))
        key = f"{tunable.name} {json.dumps(tunable.features(problem))}"
        found.setdefault(key, ((tunable.name, layer), target))
    return dict(found.values())


def _cases(op: str, layers: Sequence[str]) -> list[Case]:
    """Training cases of an operator's layers; by default those that its family lists as TUNED. Names that belong to
    another operator are passed over."""
    family = FAMILIES[family_of_op(op)]
    known = {name: case for name, case in training_cases(family).items() if case.op == op}
    if not layers:
        return [known[name] for name in family.TUNED if name in known]
    return [
        _explicit(op, one) if is_spelled_out(one) else known[one]
        for one in layers if is_spelled_out(one) or one in known
    ]  # fmt: skip


def _explicit(op: str, text: str) -> Case:
    """The layer that a text such as ``"32x64x56x56,64x64x3x3,padding=1"`` spells out. What its family makes layers from
    says which shapes and options there are, and the operator itself what does not fit."""
    explicit = partial(FAMILIES[family_of_op(op)].explicit, op)
    shape_names, options = [], {}
    for one in inspect.signature(explicit, eval_str=True).parameters.values():
        has_default = one.default is not one.empty
        if one.kind is one.KEYWORD_ONLY:
            kind = int if int in (one.annotation, *get_args(one.annotation)) else str
            options[one.name] = Option(kind, one.default if has_default else None, required=not has_default)
        else:
            shape_names.append(f"[{one.name}]" if has_default else one.name)
    try:
        shapes, values = parse([text], " ".join(shape_names), options)
        if any(0 in shape for shape in shapes):
            raise ValueError("a size is a whole number from 1 on, not '0'")
        case = replace(explicit(*shapes, **values), name=",".join(words_of([text])))
        if case.op != op:
            raise ValueError(f"this is a layer of {case.op}")
        operator_of(case).output_shape(case)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{op} {text}: {reason}") from None
    return case


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
    """The bench of :mod:`.search` in a worker process that is started again whenever it was lost.

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
        command = [sys.executable, "-m", f"{__package__}.tune_worker", "--families", self.args.families, *options]
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
