"""Time of a call on the device and on the host: competitors in turn, cold data, medians with their spread.

On a GPU a short call is captured N times in one CUDA graph, over argument sets that together exceed the last-level
cache, so each finds its data cold without a flush and no launch gap is measured. A long call is timed by events, after
a flush of the cache and a pause that lets the host queue the whole call first: neither lies between the events, and
nothing waits in between. On the CPU a wall clock stands in.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, inf
from typing import Any, NamedTuple, Protocol

import torch

GRAPH_BELOW_US = 100.0
GRAPH_US = 1000.0  # one replay takes at least this long, so that its start and end do not count
MAX_UNROLL = 256
CLOCK_MHZ = 2500  # at least any GPU's: a pause counted in cycles is then never too short by much
HEAT_SECONDS = 0.05
FEW = 3  # samples that tell whether a competitor is in the race at all


class Timing(NamedTuple):
    """Microseconds per call.

    Attributes:
        p50, p20, p80: of the device time (on the CPU: wall time) over ``n`` samples.
        host_us: time until the call returns to Python, with an idle device; ``None`` on the CPU, where it is the same.
        method: ``"graph"``, ``"events"`` or ``"wall"``.
    """

    p50: float
    p20: float
    p80: float
    n: int
    host_us: float | None
    method: str


class Competitor(NamedTuple):
    """One call on several argument sets, to be used in turn; ``before`` runs before each sample, untimed."""

    calls: Sequence[Callable[[], Any]]
    before: Callable[[], None] = lambda: None


class Timer(Protocol):
    def measure(
        self, competitors: Mapping[str, Competitor], seconds: float, give_up_us: float = inf
    ) -> dict[str, Timing | str]:
        """The time of each competitor, sampled in turn for about ``seconds``; a string says why one could not run.
        One that takes longer than ``give_up_us`` gets FEW samples and no more."""


def timer_for(device: str) -> Timer:
    return CudaTimer(Cuda()) if device == "cuda" else WallTimer()


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def interleaved(
    names: Sequence[str],
    sample: Callable[[str], float],
    seconds: float,
    least: int,
    most: int,
    give_up_us: float = inf,
) -> dict[str, list[float]]:
    """Samples of all competitors, round by round. Every other round starts with another one, and the round behind it
    runs backwards, so nobody always follows the same neighbour. Who is slower than ``give_up_us`` leaves after FEW."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for round_ in range(most):
        if round_ >= least and time.perf_counter() > end:
            break
        if round_ == FEW:
            names = [name for name in names if percentile(samples[name], 0.5) <= give_up_us]
        start = round_ // 2 % len(names) if names else 0
        order = [*names[start:], *names[:start]]
        for name in reversed(order) if round_ % 2 else order:
            samples[name].append(sample(name))
    return samples


def summarise(samples: Sequence[float], host_us: float | None, method: str) -> Timing:
    p50, p20, p80 = (percentile(samples, fraction) for fraction in (0.5, 0.2, 0.8))
    return Timing(p50, p20, p80, len(samples), host_us, method)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# --- on the CPU ------------------------------------------------------------------------------------------------------


class WallTimer:
    """A wall clock; a sample is as many calls as fill ``sample_us``.

    Args:
        least, most: rounds of samples, whatever ``seconds`` says.
    """

    def __init__(self, least: int = 1, most: int = 1000, sample_us: float = 200.0) -> None:
        self.least, self.most, self.sample_us = least, most, sample_us

    def measure(
        self, competitors: Mapping[str, Competitor], seconds: float, give_up_us: float = inf
    ) -> dict[str, Timing | str]:
        results: dict[str, Timing | str] = {}
        counts: dict[str, int] = {}
        for name, competitor in competitors.items():
            try:
                counts[name] = ceil(self.sample_us / max(mean_us(competitor, 1), 0.1))
            except RuntimeError as error:
                results[name] = str(error)
        with no_garbage_collection():
            samples = interleaved(
                list(counts),
                lambda name: mean_us(competitors[name], counts[name]),
                seconds,
                self.least,
                self.most,
                give_up_us,
            )
        return results | {name: summarise(times, None, "wall") for name, times in samples.items()}


def mean_us(competitor: Competitor, count: int, clock_ns: Callable[[], int] = time.perf_counter_ns) -> float:
    """The mean of ``count`` calls."""
    competitor.before()
    calls = [competitor.calls[i % len(competitor.calls)] for i in range(count)]
    start = clock_ns()
    for call in calls:
        call()
    return (clock_ns() - start) / 1e3 / count


# --- on a GPU --------------------------------------------------------------------------------------------------------


class Gpu(Protocol):
    """What the timer needs of a GPU; the tests have one that only keeps a log."""

    def synchronize(self) -> None: ...
    def event(self) -> Any:
        """Records a point on the stream."""

    def elapsed_us(self, start: Any, end: Any) -> float: ...
    def flush(self) -> None:
        """Queues a write of more than the last-level cache holds."""

    def busy(self, us: float) -> None:
        """Queues a pause, so that the host gets ahead."""

    def capture(self, run: Callable[[], Any]) -> Callable[[], None]:
        """What ``run`` launches, as a graph to replay. Raises RuntimeError where that is impossible."""


class Cuda:
    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.scratch = torch.empty(max(2 * cache, 128 << 20), dtype=torch.uint8, device="cuda")
        self.synchronize = torch.cuda.synchronize

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) * 1e3

    def flush(self) -> None:
        self.scratch.zero_()

    def busy(self, us: float) -> None:
        torch.cuda._sleep(int(us * CLOCK_MHZ))

    def capture(self, run: Callable[[], Any]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()

        def replay() -> None:
            graph.replay()
            _ = kept  # the outputs' memory belongs to the graph for as long as it may be replayed

        return replay


class _Runner(NamedTuple):
    """One sample of a competitor: ``run`` makes as many calls as ``repeats``."""

    run: Callable[[], None]
    repeats: int
    before: Callable[[], None]
    flush: bool
    lead_us: float
    host_us: float
    method: str


class CudaTimer:
    """See the module. ``least`` and ``most`` bound the rounds of samples, whatever ``seconds`` says."""

    def __init__(self, gpu: Gpu, least: int = 7, most: int = 100) -> None:
        self.gpu, self.least, self.most = gpu, least, most

    def measure(
        self, competitors: Mapping[str, Competitor], seconds: float, give_up_us: float = inf
    ) -> dict[str, Timing | str]:
        results: dict[str, Timing | str] = {}
        runners: dict[str, _Runner] = {}
        for name, competitor in competitors.items():
            try:
                runners[name] = self._prepare(competitor)
            except RuntimeError as error:
                results[name] = str(error)
        with no_garbage_collection():
            interleaved(list(runners), lambda name: self._sample(runners[name]), HEAT_SECONDS, 1, self.most)
            samples = interleaved(
                list(runners), lambda name: self._sample(runners[name]), seconds, self.least, self.most, give_up_us
            )
        for name, times in samples.items():
            results[name] = summarise(times, runners[name].host_us, runners[name].method)
        return results

    def _prepare(self, competitor: Competitor) -> _Runner:
        competitor.before()
        for call in competitor.calls:  # compiles, chooses algorithms, fills the allocator
            call()
        self.gpu.synchronize()
        host_us = self._host_us(competitor)
        events = _Runner(_once(competitor.calls), 1, competitor.before, True, 1.5 * host_us + 20, host_us, "events")
        estimate_us = percentile([self._sample(events) for _ in range(3)], 0.5)
        if estimate_us >= GRAPH_BELOW_US:
            return events
        # An estimate of 0 is below the clock's resolution.
        count = min(MAX_UNROLL, max(len(competitor.calls), ceil(GRAPH_US / max(estimate_us, 1.0))))
        try:
            replay = self.gpu.capture(lambda: _unrolled(competitor.calls, count))
            self.gpu.synchronize()
        except RuntimeError:
            self.gpu.synchronize()  # raises if the failed capture took the device with it
            return events
        return _Runner(replay, count, competitor.before, False, 30.0, host_us, "graph")

    def _host_us(self, competitor: Competitor, count: int = 10, repeats: int = 3) -> float:
        """The queue of launches holds about 1000: a few calls never wait for the device."""
        best = float("inf")
        for _ in range(repeats):
            best = min(best, mean_us(competitor, count))
            self.gpu.synchronize()
        return best

    def _sample(self, runner: _Runner) -> float:
        runner.before()
        if runner.flush:
            self.gpu.flush()
        self.gpu.busy(runner.lead_us)
        start = self.gpu.event()
        runner.run()
        end = self.gpu.event()
        self.gpu.synchronize()
        return self.gpu.elapsed_us(start, end) / runner.repeats


def _once(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """One call at a time, with the argument sets in turn."""
    turn = 0

    def run() -> None:
        nonlocal turn
        calls[turn % len(calls)]()
        turn += 1

    return run


def _unrolled(calls: Sequence[Callable[[], Any]], count: int) -> deque[Any]:
    """``count`` calls. As many results as argument sets stay alive: the outputs' memory is as cold as the inputs'."""
    kept: deque[Any] = deque(maxlen=len(calls))
    for i in range(count):
        kept.append(calls[i % len(calls)]())
    return kept
