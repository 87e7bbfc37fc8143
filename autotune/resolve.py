"""From a problem to a config at call time: a pure function of files, features and device, so all ranks agree.

Order: an override in force (tests, the tuner) -> an exact entry -> the nearest entry -> the cost model, and where that
sees no difference the order of declaration; each time this device before its siblings before its target, and there the
user's store before the shipped one. Nothing is measured, and an entry whose config the kernel does not declare is
passed over.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import store
from .config import Config, Tunable
from .device import DeviceSpec
from .log import logger
from .variables import word

MAX_DISTANCE = 2.0  # in doublings, summed over the sizes: farther away an entry says nothing
MEMO_LIMIT = 4096  # changing sizes must not grow the memo without end

if (_mode := word("TRITUNE_AUTOTUNE")) not in ("", "cached"):
    # The call-time tuner is not written yet; saying so beats pretending.
    logger.warning("TRITUNE_AUTOTUNE=%s: only 'cached' works in this version", _mode)


class Choice(NamedTuple):
    """A config and where it came from.

    Attributes:
        place: where it was found: ``"user"`` for a file of the user's; ``"shipped"`` for one that ships for this
            device, ``"sibling"`` for another device with the same instructions, ``"target"`` for all of those; or
            ``"none"``: nothing is stored for it.
        origin: how it was chosen: ``"measured"``, ``"model"``: ranked by the cost model, now or when it was stored,
            ``"rule"``: the first that is declared, since the model predicts one time for all that serve,
            ``"rehearsed"``: timed on a CPU, or ``"override"``: told by :func:`override`.
        slug: the device or target that it was chosen for.
        distance: 0.0 for an exact entry, else doublings between the sizes asked for and those stored.
        note: one line for :func:`tritune.explain`, for example that the entry is from another Triton.
        us: time of the config in microseconds, if the entry was measured.
        torch_us: time of torch's own operator in the same measurement, if the entry has it.
    """

    config: Config
    place: str
    origin: str
    slug: str = ""
    distance: float = 0.0
    note: str = ""
    us: float | None = None
    torch_us: float | None = None

    def whence(self) -> str:
        """Origin, place and distance in words."""
        place = "nothing stored" if self.place == "none" else f"{self.place} {self.slug}"
        near = f", {self.distance:.1f} doublings away" if self.distance else ""
        return f"{self.origin}, {place}{near}"

    def __str__(self) -> str:
        return f"{self.config}  [{self.whence()}]" + (f" ({self.note})" if self.note else "")


_memo: dict[tuple[Any, ...], Choice] = {}
_overrides: dict[object, tuple[str, Config]] = {}  # of all threads, since backward runs in one of its own


@contextmanager
def override(tunable: Tunable, config: Config) -> Iterator[None]:
    """Runs a block with this config for every call of one kernel, in all threads; for tests and for the tuner. Of
    several the one that was entered last counts, whichever ends first."""
    mine = object()
    _overrides[mine] = (tunable.name, config)
    try:
        yield
    finally:
        del _overrides[mine]


def clear_memo() -> None:
    """Forgets what was looked up; call after the store's files have changed."""
    _memo.clear()
    store.clear()


def resolve(tunable: Tunable, problem: Any, device: DeviceSpec) -> Choice:
    """The config that a call runs with. A problem seen before costs one dictionary lookup."""
    if _overrides:
        for name, config in reversed(list(_overrides.values())):
            if name == tunable.name:
                return Choice(config, "none", "override")
    key = (tunable.name, problem, device.slug)
    choice = _memo.get(key)
    if choice is None:
        if len(_memo) >= MEMO_LIMIT:
            _memo.clear()
        choice = _memo[key] = _look_up(tunable, problem, device)
        logger.debug("%s %s on %s: %s", tunable.name, problem, device.slug, choice)
    return choice


def _look_up(tunable: Tunable, problem: Any, device: DeviceSpec) -> Choice:
    features = tunable.features(problem)
    choice = _stored(tunable, problem, features, device)
    tuned = choice is not None and (choice.slug, choice.origin, choice.distance) == (device.slug, "measured", 0.0)
    if os.environ.get("TRITUNE_ASSERT_TUNED") == "1" and not tuned:
        raise RuntimeError(
            f"TRITUNE_ASSERT_TUNED=1, and {tunable.name} was not measured on {device.slug} for {features}: "
            + (f"there is {choice}" if choice else "nothing is stored for it")
        )
    return choice or _unstored(tunable, problem, device)


def _stored(tunable: Tunable, problem: Any, features: dict[str, int | str], device: DeviceSpec) -> Choice | None:
    for limit in (0.0, MAX_DISTANCE):
        for place, path, entries in store.layers(tunable.name, device):
            near = [
                (distance, entry)
                for entry in entries
                if (distance := _distance(features, entry.key)) <= limit
                and _is_for(tunable, entry, path)
                and tunable.holds(problem, entry.config, device)
            ]
            if near:
                distance, entry = min(near, key=lambda pair: pair[0])
                times = (entry.us, entry.torch_us) if entry.origin == "measured" else (None, None)
                return Choice(entry.config, place, entry.origin, path.parent.name, distance, entry.staleness(), *times)
    return None


def _unstored(tunable: Tunable, problem: Any, device: DeviceSpec) -> Choice:
    predictions = ranked(tunable, problem, device)
    (best, us), (_, slowest_us) = predictions[0], predictions[-1]
    return Choice(best, "none", "rule" if us == slowest_us else "model", device.slug)


def _is_for(tunable: Tunable, entry: store.Entry, path: Path) -> bool:
    """Is the entry for the kernel as it is? An older version of the kernel is an upgrade, which ``doctor`` names; a
    config that this version does not have comes from somebody who does not know the kernel."""
    reason = entry.rejected(tunable)
    if reason and entry.version == tunable.version:
        store.warn(f"ignoring an entry in {path}, line {entry.line}: {reason}")
    return not reason


def ranked(tunable: Tunable, problem: Any, device: DeviceSpec) -> list[tuple[Config, float]]:
    """The declared configs that serve the problem with their predicted microseconds, best first."""
    accepted = [config for config in tunable.configs if tunable.accepts(problem, config, device)]
    if not accepted:
        raise RuntimeError(f"no declared config of {tunable.name} serves {problem} on {device.slug}")
    timed = [(config, tunable.estimate(problem, config, device).us) for config in accepted]
    return sorted(timed, key=lambda pair: pair[1])  # stable: the declared order breaks ties


def _distance(asked: dict[str, int | str], stored: dict[str, int | str]) -> float:
    """Sum over the sizes of |log2(asked / stored)|; infinite where an exact feature differs."""
    total = 0.0
    if asked.keys() != stored.keys():
        return math.inf
    for name, value in asked.items():
        other = stored[name]
        if isinstance(value, str) or isinstance(other, str):
            if value != other:
                return math.inf
        elif value != other:
            if value <= 0 or other <= 0:
                return math.inf
            total += abs(math.log2(value / other))
    return total
