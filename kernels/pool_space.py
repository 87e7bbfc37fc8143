"""Which configs the kernels of pooling have, which of them fit a problem, what they move and how long they take."""

from __future__ import annotations

import math

from ..autotune import cost
from ..autotune.config import Config, Estimate
from ..autotune.device import DeviceSpec
from ..autotune.schema import dtype_name
from ._launch import unit_divisor
from .pool_problem import (
    GATHER_RATIO,
    Ints,
    PoolProblem,
    backward_span,
    band_columns,
    forward_span,
    has_cells,
    plane_parts,
    row_phases,
)

SCALAR_LOADS = 4.0  # cost of a byte that is loaded element by element, in bytes loaded 16 at a time


# --- configs ---------------------------------------------------------------------------------------------------------


def _pixel_tiles(*sizes: tuple[int, int, int]) -> tuple[Config, ...]:
    return tuple(Config(BLOCK_M=m, BLOCK_C=c, num_warps=warps, num_stages=1) for m, c, warps in sizes)


def _row_tiles(elements: int, warps: int) -> tuple[Config, ...]:
    """By the columns of a band of x."""
    columns = (8, 16, 32, 64, 128, 256)
    return tuple(
        Config(BLOCK_R=elements // one, BLOCK_W=one, num_warps=warps, num_stages=1) for one in columns
    )  # fmt: skip


# A forward shares the work of a pixel's address among more elements of a thread; a backward by cells has several
# pixels a thread as it is.
LARGE = (*_pixel_tiles((32, 64, 4), (16, 128, 4), (64, 32, 4), (128, 16, 4), (256, 8, 4)), *_row_tiles(2048, 4))
SMALL = (*_pixel_tiles((16, 64, 4), (8, 128, 4), (32, 32, 4), (64, 16, 4), (128, 8, 4)), *_row_tiles(1024, 4))
OTHERS = (
    *_pixel_tiles((8, 64, 2), (8, 128, 2), (64, 16, 2), (128, 8, 2)), *_row_tiles(512, 2), *_row_tiles(1024, 2),
    *_row_tiles(4096, 8),
)  # fmt: skip
STRIDED = _pixel_tiles((128, 1, 4), (256, 1, 4), (64, 1, 2))
FORWARD_CONFIGS = LARGE + SMALL + OTHERS + STRIDED
BACKWARD_CONFIGS = SMALL + LARGE + OTHERS + STRIDED
GATHER_CONFIGS = tuple(config for config in BACKWARD_CONFIGS if "BLOCK_M" in config)
GLOBAL_CONFIGS = tuple(
    Config(BLOCK_L=l, BLOCK_C=c, SPLIT=split, num_warps=warps, num_stages=1)
    for l, c, warps in (
        # channels last
        (16, 64, 4), (8, 128, 4), (32, 32, 4), (64, 16, 4), (32, 64, 4), (128, 8, 4), (8, 64, 2),
        # NCHW
        (1024, 1, 4), (512, 2, 4), (256, 4, 4), (64, 16, 4), (2048, 1, 4), (512, 1, 2), (64, 32, 4), (1024, 4, 8),
    )
    for split in (1, 4, 16, 64)
)  # fmt: skip


def _name(values: Ints, rank: int) -> str:
    return "x".join(str(value) for value in values[3 - rank :])


def features(p: PoolProblem) -> dict[str, int | str]:
    window = p.window
    return {
        "pixels": p.N * math.prod(p.out), "C": p.C, "width": p.space[2] if p.layout == "nchw" else 0,
        "taps": window.taps, "window": "adaptive" if window.adaptive else _name(window.kernel, p.rank),
        "stride": "" if window.adaptive else _name(window.stride, p.rank), "reduce": p.reduce,
        "dtype": dtype_name(p.dtype), "index": str(p.index_bytes), "layout": p.layout,
    }  # fmt: skip


# --- which configs fit -----------------------------------------------------------------------------------------------


def accepts_pixels(p: PoolProblem, config: Config, device: DeviceSpec) -> bool:
    """Channels last loads want a run of channels, and 16 bytes a thread; else pixels lie side by side."""
    if p.layout != "nhwc":
        return config.BLOCK_C == 1
    vec = unit_divisor(16 // p.dtype.itemsize, p.C)
    fills = config.BLOCK_M * config.BLOCK_C >= vec * device.warp_size * config.num_warps
    return fills and config.BLOCK_C > 1 and (config.BLOCK_C <= 8 or config.BLOCK_C < 2 * p.C)


def _accepts_rows(p: PoolProblem, config: Config, device: DeviceSpec, width: int) -> bool:
    """Bands as wide as the rows, or the widest; each thread loads 16 bytes, as far as rows allow it."""
    vec = unit_divisor(16 // p.dtype.itemsize, width)
    fits = config.BLOCK_W == min(256, max(8, 2 * row_phases(p), cost.next_power_of_2(width)))
    fills = config.BLOCK_R * config.BLOCK_W >= vec * device.warp_size * config.num_warps
    rows = p.N * p.C * max(math.prod(p.space[:2]), math.prod(p.out[:2]))
    return p.layout == "nchw" and fits and fills and rows < 2**31


def _row_vectors(p: PoolProblem) -> tuple[int, int]:
    """Elements of a load along the rows of dense x and y."""
    x, y = (unit_divisor(16 // p.dtype.itemsize, size) for size in (p.space[2], p.out[2]))
    return x, y


def _row_width(p: PoolProblem) -> int:
    """Columns of x that a row needs, counted for the outputs over them too."""
    return max(p.space[2], p.out[2] * row_phases(p))


def accepts_forward(p: PoolProblem, config: Config, device: DeviceSpec) -> bool:
    if "BLOCK_W" not in config:
        return accepts_pixels(p, config, device)
    span = forward_span(p, config, *_row_vectors(p))
    fits = span.written > 0 and span.columns <= GATHER_RATIO * config.BLOCK_W
    return fits and _accepts_rows(p, config, device, _row_width(p))


def accepts_backward(p: PoolProblem, config: Config, device: DeviceSpec) -> bool:
    if "BLOCK_W" not in config:
        return accepts_pixels(p, config, device)
    if not has_cells(p, rows=True):
        return (
            _accepts_rows(p, config, device, p.space[2])
            and config.BLOCK_R * band_columns(p, config.BLOCK_W, 16) <= 8192
        )
    return _accepts_rows(p, config, device, _row_width(p)) and backward_span(p, config).written > 0


def accepts_global(p: PoolProblem, config: Config, device: DeviceSpec) -> bool:
    L = math.prod(p.space)
    along, across, size = (config.BLOCK_L, config.BLOCK_C, L)
    if p.layout == "nhwc":
        along, across, size = (config.BLOCK_C, config.BLOCK_L, p.C)
    vec = unit_divisor(16 // p.dtype.itemsize, size)
    fills = along * across >= vec * device.warp_size * config.num_warps
    wide = along >= min(8, cost.next_power_of_2(size)) and (along <= 64 or along < 2 * size)
    return fills and wide and (config.SPLIT == 1 or config.SPLIT * config.BLOCK_L <= L)


# --- bytes moved -----------------------------------------------------------------------------------------------------


def moved_forward(p: PoolProblem, config: Config) -> float:
    """Bytes that loads and stores move, if every tap lies in the image: the formulas at the head of the kernels."""
    _, y = p.elements()
    stored = y * (p.dtype.itemsize + p.index_bytes)
    if "BLOCK_W" not in config:
        return float(y * p.window.taps * p.dtype.itemsize + stored)
    tiles = cost.cdiv(p.out[2], forward_span(p, config, *_row_vectors(p)).written)
    band = p.space[2] if tiles == 1 else tiles * config.BLOCK_W
    rows = p.N * p.C * p.out[0] * p.out[1] * p.window.kernel[0] * p.window.kernel[1]
    return float(rows * band * p.dtype.itemsize + stored)


def moved_backward(p: PoolProblem, config: Config) -> float:
    """Bytes that loads and stores move, if every tap and every window lies in the image."""
    x, y = p.elements()
    e, most = p.dtype.itemsize, p.most_windows()
    saved = p.index_bytes + (e if p.reduce.startswith("norm") else 0)
    stored = x * e * (1 + (p.reduce == "norm2"))
    if "BLOCK_W" not in config:
        return float(y * p.window.taps * (e + saved) + stored)
    if has_cells(p, rows=True):
        span = backward_span(p, config)
        tiles = cost.cdiv(cost.cdiv(p.space[2], p.window.stride[2]), span.written)
        band, rows = (tiles * span.columns), p.N * p.C * p.out[0] * p.out[1] * p.window.kernel[0] * p.window.kernel[1]
    else:
        tiles = cost.cdiv(p.space[2], config.BLOCK_W)
        band, rows = (
            tiles * band_columns(p, config.BLOCK_W, 16),
            p.N * p.C * p.space[0] * p.space[1] * most[0] * most[1],
        )
    return float(rows * (p.out[2] if tiles == 1 else band) * (e + saved) + stored)


def moved_global(p: PoolProblem, config: Config) -> float:
    rows, split = p.N * p.C, plane_parts(p, config)
    parts = 0 if split == 1 else 2 * split * rows * (4 + 4 * (p.index_bytes > 0))
    return p.forward_bytes() + parts


def moved_gather(p: PoolProblem, config: Config) -> float:
    _, y = p.elements()
    return float(y * (2 * p.dtype.itemsize + p.index_bytes))


def moved_unpool(p: PoolProblem, config: Config) -> float:
    """What the gather moves, and each index once more to see that it lies in its own window."""
    _, y = p.elements()
    return moved_backward(p, config) + y * p.index_bytes


def due_load_bytes(p: PoolProblem) -> int:
    """16 bytes a load for 16-bit channels last with channels in eights."""
    return 16 if p.dtype.itemsize == 2 and p.layout == "nhwc" and p.C % 8 == 0 else 0


def due_load_bytes_backward(p: PoolProblem) -> int:
    """The same, but taps of one byte come eight at a time."""
    return min(due_load_bytes(p), 8 if p.index_bytes else 16)


# --- estimated time --------------------------------------------------------------------------------------------------


def _stream(
    p: PoolProblem, config: Config, device: DeviceSpec, side: Ints, issued: float, dram: float
) -> Estimate:  # fmt: skip
    """Time of a pass whose programs walk ``side``, the output's or the input's pixels."""
    e = p.dtype.itemsize
    if "BLOCK_W" in config:
        rows, columns = p.N * p.C * side[0] * side[1], p.space[2]
        tiles, vec = cost.cdiv(columns, config.BLOCK_W), unit_divisor(16 // e, columns)
        programs = cost.cdiv(rows, config.BLOCK_R) * tiles
        waste = cost.cdiv(rows, config.BLOCK_R) * config.BLOCK_R * tiles * config.BLOCK_W / max(1, rows * columns)
        width = config.BLOCK_R * config.BLOCK_W * e * vec * e // 16
    else:
        pixels, columns = p.N * math.prod(side), cost.cdiv(p.C, config.BLOCK_C)
        programs = cost.cdiv(pixels, config.BLOCK_M) * columns
        waste = programs * config.BLOCK_M * config.BLOCK_C / max(1, p.C * pixels)
        width = config.BLOCK_M * config.BLOCK_C * e
        if config.BLOCK_C == 1:  # a load of one element takes as long as one of eight
            issued *= SCALAR_LOADS
    return cost.stream(
        device, programs=programs, issued_bytes=issued, dram_bytes=dram, config=config, tile_bytes=width, waste=waste
    )


def estimate_forward(p: PoolProblem, config: Config, device: DeviceSpec) -> Estimate:
    return _stream(p, config, device, p.out, moved_forward(p, config), p.forward_bytes())


def estimate_backward(p: PoolProblem, config: Config, device: DeviceSpec) -> Estimate:
    return _stream(p, config, device, p.space, moved_backward(p, config), p.backward_bytes())


def estimate_gather(p: PoolProblem, config: Config, device: DeviceSpec) -> Estimate:
    moved = moved_gather(p, config)
    return _stream(p, config, device, p.out, moved, moved)


def estimate_global(p: PoolProblem, config: Config, device: DeviceSpec) -> Estimate:
    L, rows = math.prod(p.space), p.N * p.C
    tiles = p.N * cost.cdiv(p.C, config.BLOCK_C) if p.layout == "nhwc" else cost.cdiv(rows, config.BLOCK_C)
    covered = tiles * config.BLOCK_C * cost.cdiv(L, config.BLOCK_L * config.SPLIT) * config.BLOCK_L * config.SPLIT
    moved = moved_global(p, config)
    estimate = cost.stream(
        device, programs=tiles * config.SPLIT, issued_bytes=moved, dram_bytes=moved, config=config,
        tile_bytes=config.BLOCK_L * config.BLOCK_C * p.dtype.itemsize, waste=covered / max(1, L * rows),
    )  # fmt: skip
    # A program waits for its own loads, one tile after the other.
    steps = cost.cdiv(L, config.BLOCK_L * config.SPLIT)
    extra = cost.LAUNCH_US * (config.SPLIT > 1)
    return Estimate(max(estimate.us, cost.LAUNCH_US + steps * cost.ITERATION_LATENCY_US) + extra, estimate.bound)
