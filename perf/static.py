"""What the compiler made of every shipped config, with no GPU: registers, spills, shared memory, tensor cores, loads.

``tritune bench static`` compiles the config that each layer of :mod:`.families` gets on a target, holds the result to
absolute rules (no spill, within shared memory, tensor cores and 16-byte loads where they are due) and compares it with
the baseline in ``perf/baselines/static-<Triton minor>.json``. ``--update`` writes the file that ``--baseline`` names:
it prints what changes and refuses a regression unless ``--accept`` is given.

Exit status: 0; 1 a kernel at fault or a refused update; 2 bad usage; 130 interrupted, and the next run goes on from
there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO, TypeVar

from ..autotune.config import Config, Tunable
from ..autotune.device import TARGETS, DeviceSpec, named
from ..autotune.resolve import resolve
from ..autotune.store import sweep
from ..paths import readable_file, writable_file
from ..progress import Progress
from .families import layers

BASELINES = Path(__file__).resolve().parent / "baselines"
TRITON = metadata.version("triton")
LEFTOVERS = re.compile(r"tritune-\w{8}\.cubin")
GROWTH = 1.15  # instructions may grow this much before it counts as a regression
# A width counts as the kernel's load width if this share of the bytes in its instructions travels in it; the bias,
# loaded once outside the loop, stays below.
SHARE = 0.2


@dataclass(frozen=True)
class StaticProfile:
    """One compiled kernel.

    Attributes:
        registers: per thread.
        spill_bytes: per thread, stores to local memory.
        smem_bytes: shared memory of one program.
        mma: tensor-core instruction ("HGMMA", "HMMA", "MFMA", ...) or "".
        load_bytes, store_bytes: the narrowest access that carries a fifth of the traffic, in bytes a thread.
        instructions: of the whole kernel.
        warps: resident on one multiprocessor.
    """

    registers: int
    spill_bytes: int
    smem_bytes: int
    mma: str
    load_bytes: int
    store_bytes: int
    instructions: int
    warps: int


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def profile(launch: Any, target: str) -> StaticProfile:
    """Compiles a launch for a target and reads the result."""
    compiled = launch.compile(target)
    read = _read_nvidia if target.startswith("sm_") else _read_amd
    return read(compiled, launch.num_warps, named(target))


def _narrowest(widths: Iterable[int]) -> int:
    """The narrowest width that carries at least SHARE of the bytes; 0 without accesses."""
    counts = Counter(widths)
    total = sum(width * count for width, count in counts.items())
    return min((width for width, count in counts.items() if width * count >= SHARE * total), default=0)


_PTX_ACCESS = re.compile(r"\b(ld|st)\.global((?:\.\w+)*?)(?:\.v(\d))?\.[bfsu](\d+)\b")
_PTX_BOX = re.compile(r"cp\.async\.bulk\.tensor\.\dd\.shared")
_PTX_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global(?:\.\S+)? \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)")


@cache
def _swept_folder() -> Path:
    """The folder for binaries on their way to the disassembler, without those that killed runs left there."""
    folder = Path(tempfile.gettempdir())
    sweep(folder, LEFTOVERS)
    return folder


def _read_nvidia(compiled: Any, num_warps: int, device: DeviceSpec) -> StaticProfile:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(prefix="tritune-", suffix=".cubin", dir=_swept_folder()) as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        sass = _run(tools / "nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(\w+)", sass, re.MULTILINE))
    ptx = compiled.asm["ptx"]
    loads = [int(size, 0) for size in _PTX_COPY.findall(ptx)]
    loads += [16] * 16 * len(_PTX_BOX.findall(ptx))  # the accelerator moves boxes in bursts: never narrow
    stores: list[int] = []
    for kind, _, vector, bits in _PTX_ACCESS.findall(ptx):
        (loads if kind == "ld" else stores).append(int(vector or 1) * int(bits) // 8)
    mma = next((name for name in ("UTCHMMA", "HGMMA", "HMMA", "QGMMA") if opcodes[name]), "")
    smem = compiled.metadata.shared
    return StaticProfile(
        registers, stack, smem, mma, _narrowest(loads), _narrowest(stores), sum(opcodes.values()),
        _warps(registers * 32, 65536, smem, num_warps, device),
    )  # fmt: skip


def _read_amd(compiled: Any, num_warps: int, device: DeviceSpec) -> StaticProfile:
    asm = compiled.asm["amdgcn"]
    registers, spills = (int(re.search(rf"\.{name}:\s+(\d+)", asm)[1]) for name in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1,
             "b128": 16, "b96": 12, "b64": 8, "b32": 4, "u16": 2, "u8": 1}  # fmt: skip
    widths: dict[str, list[int]] = {"load": [], "store": []}
    for kind, size in re.findall(r"^\s+(?:global|buffer)_(load|store)_([a-z]+\d*)", asm, re.MULTILINE):
        widths[kind].append(sizes[size])
    instructions = len(re.findall(r"^\s+[a-z]+_\w+", asm, re.MULTILINE))
    smem = compiled.metadata.shared
    return StaticProfile(
        registers, 4 * spills, smem, "MFMA" if "v_mfma" in asm else "", _narrowest(widths["load"]),
        _narrowest(widths["store"]), instructions, _warps(registers * 64, 4 * 32768, smem, num_warps, device),
    )  # fmt: skip


def _warps(registers_per_warp: int, register_file: int, smem: int, num_warps: int, device: DeviceSpec) -> int:
    """Resident warps that registers and shared memory allow."""
    programs = register_file // max(1, registers_per_warp * num_warps)
    if smem:
        programs = min(programs, device.smem_kb * 1024 // smem)
    return min(64, programs * num_warps)


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


# --- rules -----------------------------------------------------------------------------------------------------------


def faults(tunable: Tunable, problem: Any, one: StaticProfile, target: str) -> list[str]:
    """What is wrong with a profile, whatever the baseline says; each names the rule."""
    found = []
    limit = named(target).smem_kb * 1024
    if one.spill_bytes:
        found.append(f"spill: {one.spill_bytes} bytes a thread")
    if one.smem_bytes > limit:
        found.append(f"shared memory: {one.smem_bytes} bytes, the target has {limit}")
    wanted = _wanted_mma(tunable, problem, target)
    if wanted and one.mma not in wanted:
        found.append(f"tensor cores: {one.mma or 'none'}, expected {wanted[0]}")
    due = tunable.due_load_bytes(problem)
    if one.load_bytes < due:
        found.append(f"loads: {one.load_bytes} bytes wide, expected {due}")
    return found


def _wanted_mma(tunable: Tunable, problem: Any, target: str) -> tuple[str, ...]:
    """Products of full tiles use the matrix units, the largest that the target has; fp32 in full precision has none on
    NVIDIA. Tiles of fewer than 64 rows are too small for the units of sm_90 and sm_100."""
    rows = tunable.product_rows(problem)
    if not rows or (problem.precision == "ieee" and not target.startswith("gfx")):
        return ()
    if target.startswith("gfx"):
        return ("MFMA",) if problem.precision == "16" else ()
    large = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(target)
    return (large,) if large and rows >= 64 else tuple(filter(None, ("HMMA", large)))


def regressions(old: StaticProfile, new: StaticProfile) -> list[str]:
    """What got worse against the baseline; each names the figure."""
    worse = []
    if new.spill_bytes > old.spill_bytes:
        worse.append(f"spill: {old.spill_bytes} -> {new.spill_bytes} bytes")
    if old.mma and new.mma != old.mma:
        worse.append(f"tensor cores: {old.mma} -> {new.mma or 'none'}")
    if new.load_bytes < old.load_bytes:
        worse.append(f"loads: {old.load_bytes} -> {new.load_bytes} bytes wide")
    if new.store_bytes < old.store_bytes:
        worse.append(f"stores: {old.store_bytes} -> {new.store_bytes} bytes wide")
    if new.instructions > GROWTH * old.instructions:
        worse.append(f"instructions: {old.instructions} -> {new.instructions}")
    if new.warps < old.warps:
        worse.append(f"occupancy: {old.warps} -> {new.warps} warps")
    return worse


# --- the suite -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One launch of one layer on one target.

    Attributes:
        index: of the launch; 0 is the kernel that the config is for, another one adds partial results.
    """

    target: str
    tunable: Tunable
    layer: str
    problem: Any
    config: Config
    index: int
    launch: Any

    @property
    def name(self) -> str:
        return f"{self.target}/{self.tunable.name}/{self.layer}/{self.index}"

    @property
    def is_main(self) -> bool:
        return self.index == 0

    @cached_property
    def binary(self) -> str:
        """What the compiler is given: rows that agree in it become the same binary."""
        return f"{self.target} {self.launch.source().hash()} {self.launch.num_warps} {self.launch.num_stages}"

    def profile(self) -> StaticProfile:
        return profile(self.launch, self.target)


def rows(targets: Iterable[str] = TARGETS, pattern: str = "") -> Iterator[Row]:
    for target in targets:
        for name, tunable, problem in layers(target):
            config = resolve(tunable, problem, named(target)).config
            for index, launch in enumerate(tunable.launches(problem, config)):
                row = Row(target, tunable, name, problem, config, index, launch)
                if pattern in row.name:
                    yield row


Made = TypeVar("Made")


def measure(selected: Sequence[Row], compiled: Callable[[Row], Made], jobs: int = 2) -> Iterator[tuple[Row, Made]]:
    """Each row with what became of it, in order, as soon as that is known; what several rows need is made once.

    Args:
        compiled: makes it, in one of ``jobs`` threads.
    """
    pool = ThreadPoolExecutor(jobs)
    try:
        made: dict[str, Future[Made]] = {}
        for row in selected:
            if row.binary not in made:
                made[row.binary] = pool.submit(compiled, row)
        for row in selected:
            yield row, made[row.binary].result()
    finally:  # an interrupt does not wait for what is under way: who gave `compiled` ends that
        pool.shutdown(wait=False, cancel_futures=True)


def load_baseline(path: Path) -> dict[str, StaticProfile]:
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return {name: StaticProfile(**figures) for name, figures in document["profiles"].items()}


def save_baseline(path: Path, profiles: dict[str, StaticProfile]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(asdict(profiles[name]))}" for name in sorted(profiles))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"triton": "{TRITON}", "profiles": {{\n{lines}\n}}}}\n', encoding="utf-8")


def update(path: Path, profiles: dict[str, StaticProfile], accept: bool, out: TextIO | None = None) -> bool:
    """Merges profiles into a baseline and prints what changes; refuses a regression unless accepted."""
    old = load_baseline(path)
    refused = False
    for name, new in profiles.items():
        if name not in old:
            print(f"{'new':8} {name}", file=out)
        elif old[name] != new:
            worse = regressions(old[name], new)
            refused |= bool(worse)
            changes = ", ".join(worse) or ", ".join(
                f"{field}: {value} -> {getattr(new, field)}"
                for field, value in asdict(old[name]).items()
                if value != getattr(new, field)
            )
            print(f"{'WORSE' if worse else 'changed':8} {name}: {changes}", file=out)
    if refused and not accept:
        print("refused: the profiles got worse; --accept takes them all the same", file=out)
        return False
    save_baseline(path, {**old, **profiles})
    return True


# --- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What ``tritune bench static`` was asked."""

    targets: Sequence[str] = ()
    pattern: str | None = None
    baseline: Path | None = None
    update: bool = False
    accept: bool = False
    json: bool = False


def main(options: Options) -> int:
    from .compilers import Compilers

    shipped = BASELINES / f"static-{minor(TRITON)}.json"
    if options.update:
        if options.baseline is None:
            return _usage(f"--update needs --baseline FILE to write to; in a checkout perf/baselines/{shipped.name}")
        writable_file(options.baseline)
    elif options.baseline is not None:
        readable_file(options.baseline)
    try:
        old = load_baseline(options.baseline or shipped)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _usage(f"{options.baseline or shipped} is not a baseline: {type(error).__name__} {error}")
    selected = list(rows(options.targets or TARGETS, options.pattern or ""))
    if not selected:
        return _usage(f"no kernel has {options.pattern!r} in its name <target>/<kernel>/<layer>/<launch>")

    profiles: dict[str, StaticProfile] = {}
    bad: dict[str, list[str]] = {}
    started = time.monotonic()
    out = sys.stderr if options.json else sys.stdout
    try:
        with Progress(out, len(selected)) as progress, Compilers() as compilers:
            progress.update(0, state="the compilers start")
            for done, (row, one) in enumerate(measure(selected, compilers.attempt, compilers.count), 1):
                if isinstance(one, StaticProfile):
                    profiles[row.name] = one
                    reasons = faults(row.tunable, row.problem, one, row.target) if row.is_main else []
                    reasons += regressions(old[row.name], one) if row.name in old and not options.update else []
                else:
                    reasons = [one]
                if reasons:
                    bad[row.name] = reasons
                elapsed = time.monotonic() - started
                progress.update(done, elapsed * (len(selected) - done) / done, row.name)
    except KeyboardInterrupt:
        print(f"tritune bench static: interrupted after {len(profiles)} of {len(selected)} kernels; "
              "the next run goes on from there", file=sys.stderr)  # fmt: skip
        return 130
    missing = [name for name in profiles if name not in old]
    if options.json:
        found = {name: asdict(one) for name, one in profiles.items()}
        print(json.dumps({"triton": TRITON, "profiles": found, "faults": bad, "new": missing}, indent=1))
    for name, reasons in bad.items():
        print(f"FAULT {name}: {'; '.join(reasons)}", file=out)
    print(f"{len(selected)} kernels compiled with Triton {TRITON}, {len(bad)} at fault, "
          f"{len(missing)} not in the baseline", file=out)  # fmt: skip
    if options.update:
        assert options.baseline is not None
        if not update(options.baseline, profiles, options.accept, out):
            return 1
    return 1 if bad else 0


def _usage(message: str) -> int:
    print(f"tritune bench static: {message}", file=sys.stderr)
    return 2
