"""The search for the best config of one kernel on one problem: what is tried, when it is enough, and who wins.

Nothing here runs a kernel or knows one. A :class:`Bench` runs the trials: in this process, in another one that may
crash or hang, or in a test where time is made up. One after the other, best by the model first, each config is checked
and timed with a few samples; then the best few run in turn, together with torch's operator, and that decides.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from .config import Config, Tunable
from .store import Entry

GIVE_UP = 1.5  # times the best so far: a config this slow after its first samples gets no more of them
KEEP_DEFAULT_WITHIN = 0.98  # a config must beat the model's choice by 2 %, or noise would decide
FINALISTS = 5
SEARCH_SHARE = 0.85  # of the time of a key; the rest is for the final
SHORTEST_SECONDS = 8.0  # a key gets at least this long while there is any: better some keys well than all badly


class OutOfTime(Exception):
    """Raised by a bench that may not wait any longer; what was found until then counts."""


class Trial(NamedTuple):
    """What became of one config.

    Attributes:
        us: median of its time in microseconds; ``None`` if it was not timed.
        samples: how many there were.
        fault: why it cannot win, in words that begin with the kind and a colon: ``"spill: 64 bytes a thread"``,
            ``"wrong: result: max 2.1e-01"``, ``"hung: nothing for 30 s"``. Empty if nothing is wrong with it.
        facts: what else the entry of a winner should hold.
    """

    config: Config
    us: float | None = None
    samples: int = 0
    fault: str = ""
    facts: dict[str, Any] = {}  # noqa: RUF012  never written to


class Final(NamedTuple):
    """Medians in microseconds of configs that ran in turn, and of torch's operator among them."""

    us: dict[Config, float]
    torch_us: float | None


class Bench(Protocol):
    """Runs trials of one kernel on one problem."""

    def attempt(self, config: Config, give_up_us: float) -> Trial:
        """Checks a config and times it; stops early if it takes longer than ``give_up_us``. Raises OutOfTime."""

    def final(self, configs: Sequence[Config]) -> Final:
        """Times these in turn, and torch's operator with them. Raises OutOfTime."""


class Search:
    """One kernel on one problem. Interrupted at any time, it knows the best config so far: :attr:`best`.

    Args:
        candidates: configs in the order to try them, the model's choice first.
        watch: called after each trial.
    """

    def __init__(
        self, candidates: Sequence[Config], bench: Bench, watch: Callable[[Search], None] = lambda search: None
    ) -> None:
        self.candidates, self.bench, self.watch = candidates, bench, watch
        self.trials: list[Trial] = []
        self.decided = Final({}, None)

    def run(self, until: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        """Tries configs until none is left or the clock says ``until``, then runs the final."""
        try:
            for config in self.candidates:
                if clock() >= until:
                    break
                best = self.best
                self.trials.append(self.bench.attempt(config, GIVE_UP * best[1] if best else math.inf))
                self.watch(self)
            finalists = self._finalists()
            if finalists:
                self.decided = self.bench.final(finalists)
        except OutOfTime:
            return

    @property
    def default(self) -> Config | None:
        """The first config in the model's order that worked in this search. A call may have run another one before: a
        shipped entry, or a near one."""
        return next((trial.config for trial in self.trials if trial.us is not None), None)

    @property
    def best(self) -> tuple[Config, float] | None:
        """The winner: of the final if there was one, else of the trials."""
        times = list(self.times.items())
        return winner(times, self.default) if times else None

    @property
    def times(self) -> dict[Config, float]:
        return self.decided.us or {trial.config: trial.us for trial in self.trials if trial.us is not None}

    def _finalists(self) -> list[Config]:
        """The best few; the default is always among them."""
        timed = sorted((trial for trial in self.trials if trial.us is not None), key=lambda trial: trial.us or 0.0)
        chosen = [trial.config for trial in timed[:FINALISTS]]
        if self.default is not None and self.default not in chosen:
            chosen.append(self.default)
        return chosen

    def slow(self) -> list[Trial]:
        """Those that were given up early."""
        best = self.best
        return [trial for trial in self.trials if trial.us and best and trial.us > GIVE_UP * best[1]]

    def counts(self) -> dict[str, int]:
        """How many configs failed, by kind of fault, and how many were slow."""
        kinds = Counter(trial.fault.partition(":")[0] for trial in self.trials if trial.fault)
        return {**kinds, **({"slow": len(self.slow())} if self.slow() else {})}

    def entry(self, tunable: Tunable, problem: Any, origin: str, env: dict[str, Any]) -> Entry | None:
        """What the store keeps of it; ``None`` if no config worked."""
        if self.best is None:
            return None
        config, us = self.best
        others = [other_us for other, other_us in self.times.items() if other != config]
        trial = next(trial for trial in self.trials if trial.config == config)
        broken = {str(one.config): one.fault for one in self.trials if one.fault.startswith(BREAKAGES)}
        extra = {
            "default_us": _rounded(self.times.get(self.default) if self.default else None),
            "runner_up_us": _rounded(min(others, default=None)),
            "tested": len(self.trials), "candidates": len(self.candidates), "counts": self.counts(),
            **({"broken": broken} if broken else {}), **trial.facts, "env": env,
        }  # fmt: skip
        if not self.decided.us:
            extra["unfinished"] = True
        return Entry(
            tunable.features(problem), config, origin, tunable.version, _rounded(us), _rounded(self.decided.torch_us),
            extra,
        )  # fmt: skip


BREAKAGES = ("wrong", "crashed", "hung", "raised")  # faults that somebody should look at


def _rounded(us: float | None) -> float | None:
    return None if us is None else round(us, 3)


def winner(times: Sequence[tuple[Config, float]], default: Config | None) -> tuple[Config, float]:
    """The fastest; but the default, unless the fastest is at least 2 % faster than it."""
    best = min(times, key=lambda pair: pair[1])
    for config, us in times:
        if config == default and best[1] > KEEP_DEFAULT_WITHIN * us:
            return config, us
    return best


def share(now: float, deadline: float, keys_left: int) -> float:
    """Seconds for the next of ``keys_left`` keys. What one key leaves over goes to those behind it."""
    left = max(0.0, deadline - now)
    return min(left, max(SHORTEST_SECONDS, left / keys_left))


def is_tuned(
    tunable: Tunable, key: dict[str, int | str], entries: Iterable[Entry], origin: str, env: dict[str, Any]
) -> bool:
    """Is there a finished entry for the key from this device and this minor of Triton, with a config that the kernel as
    it is declares?"""

    def made_here(entry: Entry) -> bool:
        made_with = entry.extra.get("env", {})
        return made_with.get("gpu") == env.get("gpu") and _minor(made_with) == _minor(env)

    return any(
        entry.key == key and entry.origin == origin and not entry.rejected(tunable)
        and not entry.extra.get("unfinished") and made_here(entry)
        for entry in entries
    )  # fmt: skip


def _minor(env: dict[str, Any]) -> list[str]:
    return str(env.get("triton")).split(".")[:2]
