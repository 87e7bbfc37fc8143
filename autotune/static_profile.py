"""What the compiler made of one launch, with no GPU: registers, spills, shared memory, tensor cores, loads; and whether
that is good enough to run (:func:`faults`). The tuner drops what is at fault before it costs a trial."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from .config import Config, Tunable
from .device import DeviceSpec, named
from .store import sweep

TRITON = metadata.version("triton")
LEFTOVERS = re.compile(r"tritune-\w{8}\.cubin")
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
        # Without its analysis of the data flow, which nothing here reads and which takes a third of the time.
        sass = _run(tools / "nvdisasm", "-c", "-ndf", file.name)
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
