"""Which configs the kernels of convolution have, which of them fit a problem, what they move and how long they take."""

from __future__ import annotations

import itertools
import math

from ..autotune import cost
from ..autotune.config import Config, Estimate
from ..autotune.device import DeviceSpec
from ..autotune.schema import dtype_name
from .conv_problem import ConvProblem, EpilogueProblem, line_sizes, line_tiles, merged_groups

# --- configs: which tile for which shape -----------------------------------------------------------------------------


def _gemm_config(m: int, n: int, k: int, warps: int, stages: int, **more: int) -> Config:
    return Config(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **more, num_warps=warps, num_stages=stages)


_TILES = (
    # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages. Large tiles load fewer bytes, for layers of many pixels and channels;
    # small ones make enough programs for all multiprocessors where there are fewer.
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (256, 64, 64, 8, 3),
    (128, 32, 64, 4, 3),
    (128, 64, 32, 4, 4),
    (128, 32, 32, 4, 4),
    (64, 32, 32, 4, 4),
    (128, 16, 32, 4, 3),
    (64, 16, 32, 4, 3),
    (128, 128, 32, 8, 2),
    (64, 64, 32, 4, 2),
    (32, 32, 32, 4, 2),
    (64, 64, 16, 4, 2),
    (128, 16, 16, 4, 3),
    (32, 16, 16, 4, 2),  # fits every problem
)
_SPLIT_TILES = tuple(
    (tile, split) for split in (1, 2, 4, 8) for tile in _TILES
    if split == 1 or tile[:2] in ((128, 128), (64, 64), (64, 32))
)  # fmt: skip
_LINE_TILES = tuple(
    _gemm_config(*tile, GROUP_M=8, TMA=1) for tile in _TILES if tile[2] == 64 and tile[0] * tile[1] >= 64 * 64
)
_SWAPPED_TILES = ((256, 64, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 32, 4, 4))
FORWARD_CONFIGS = (
    *(_gemm_config(*tile, GROUP_M=8, SPLIT_K=split, SWAP=0) for tile, split in _SPLIT_TILES),
    *(_gemm_config(*tile, GROUP_M=8, SPLIT_K=1, SWAP=1) for tile in _SWAPPED_TILES),
    *_LINE_TILES,
)
TRANSPOSE_CONFIGS = (
    *(_gemm_config(*tile, GROUP_M=8, SPLIT_K=split) for tile, split in _SPLIT_TILES),
    *_LINE_TILES,
)
WEIGHT_GRAD_CONFIGS = tuple(
    _gemm_config(*tile, SPLIT_K=split) for tile in _TILES if tile[0] <= 128 for split in (1, 4, 16, 64)
)
EPILOGUE_CONFIGS = tuple(
    Config(BLOCK_M=m, BLOCK_N=n, SPLIT_M=split, num_warps=4, num_stages=2)
    for m, n in ((32, 64), (64, 32), (16, 128), (128, 16), (64, 64))
    for split in (64, 256, 1024)
)


# --- which configs fit -----------------------------------------------------------------------------------------------


def tile_fits(p: ConvProblem, config: Config, device: DeviceSpec, rows: int, columns: int, reduction: int) -> bool:
    """Does the tile fit the matrix product of ``rows`` x ``columns`` x ``reduction``, the shared memory and the
    registers?"""
    stages = config.num_stages - 1 if device.is_amd else config.num_stages
    smem = cost.gemm_smem_bytes(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, p.itemsize, max(1, stages))
    tile = config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    if tile > {"ieee": 64 * 32 * 32, "tf32x3": 64 * 64 * 32}.get(p.precision, tile):
        return False  # without tensor cores a thread holds whole rows of the operands; larger tiles spill registers
    return (
        smem <= device.smem_kb * 1024
        and max(32, cost.next_power_of_2(rows)) >= config.BLOCK_M
        and max(16, cost.next_power_of_2(columns)) >= config.BLOCK_N
        and max(16, cost.next_power_of_2(reduction)) >= config.BLOCK_K
    )


def _store_fits(p: ConvProblem, config: Config, device: DeviceSpec, run: int) -> bool:
    """Has a thread registers for the addresses of its results? In NCHW each element of a tile has an address of its
    own, which takes two registers, unless the pixels of the tile are neighbours in memory in stretches of ``run``
    pixels, a multiple of 16 bytes. So in NCHW larger tiles would spill."""
    runs = p.channels_last or run % (16 // p.itemsize) == 0
    return runs or config.BLOCK_M * config.BLOCK_N <= 32 * device.warp_size * config.num_warps


def _split_fits(p: ConvProblem, config: Config, steps: int, least: int, outputs: int) -> bool:
    """May SPLIT_K programs share the ``steps`` of a reduction? Each must get at least ``least`` steps. The partial sums
    must be no larger than the input and the weights together, or than 1 MiB, which is what a call may allocate beside
    its result."""
    if config.SPLIT_K == 1:
        return True
    room = (p.image_pixels + p.K * p.taps) * p.C * p.geometry.groups * p.itemsize
    return steps >= least * config.SPLIT_K and 4 * config.SPLIT_K * outputs <= max(room, 2**20)


def _accepts_lines(p: ConvProblem, config: Config, device: DeviceSpec, turned: bool) -> bool:
    """Has the device a tensor memory accelerator, can it copy the boxes of this problem, and does the box of no group
    hold channels of the next group?"""
    reduction, columns = (p.K, p.C) if turned else (p.C, p.K)
    whole = all(size * p.itemsize % 16 == 0 for size in (p.C, reduction * p.geometry.groups))
    return (
        device.has_tma
        and p.precision == "16"
        and p.geometry.parities == 1
        and p.tail == 0
        and whole
        and (p.geometry.groups == 1 or reduction % config.BLOCK_K == 0)
        and _store_fits(p, config, device, math.prod(p.image if turned else p.output))
        and tile_fits(p, config, device, line_sizes(p, turned)[1], columns, reduction)
    )


def accepts_forward(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if "TMA" in config:
        return _accepts_lines(p, config, device, turned=False)
    reduction = p.taps * p.C
    outputs = p.pixels * p.K * p.geometry.groups
    enough = _split_fits(p, config, cost.cdiv(reduction, config.BLOCK_K), 4, outputs)
    if config.SWAP and (p.K > config.BLOCK_N or p.K <= config.BLOCK_N // 2 or p.precision == "ieee"):
        return False
    stores = _store_fits(p, config, device, math.prod(p.output))
    return enough and stores and tile_fits(p, config, device, p.pixels, p.K, reduction)


def _transpose_steps(p: ConvProblem, config: Config) -> int:
    return cost.cdiv(p.taps, p.geometry.parities) * cost.cdiv(p.K, config.BLOCK_K)


def accepts_transpose(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if "TMA" in config:
        return _accepts_lines(p, config, device, turned=True)
    rows = cost.cdiv(p.image_pixels, p.geometry.parities)
    enough = _split_fits(p, config, _transpose_steps(p, config), 4, p.image_pixels * p.C * p.geometry.groups)
    stores = _store_fits(p, config, device, math.prod(p.image) if p.geometry.parities == 1 else 1)
    return enough and stores and tile_fits(p, config, device, rows, p.C, p.K)


def accepts_weight_grad(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    merged = merged_groups(p)
    enough = _split_fits(p, config, cost.cdiv(p.pixels, config.BLOCK_K), 2, p.K * p.taps * p.C * p.geometry.groups)
    return enough and tile_fits(p, config, device, p.K * merged, p.taps * p.C * merged, p.pixels)


def accepts_epilogue_grad(p: EpilogueProblem, config: Config, device: DeviceSpec) -> bool:
    return max(16, cost.next_power_of_2(p.K)) >= config.BLOCK_N


# --- estimated time --------------------------------------------------------------------------------------------------


def _estimate_lines(p: ConvProblem, config: Config, device: DeviceSpec, turned: bool) -> Estimate:
    reduction, columns = (p.K, p.C) if turned else (p.C, p.K)
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=line_tiles(p, config.BLOCK_M, turned) * cost.cdiv(columns, config.BLOCK_N) * p.geometry.groups,
        steps=p.taps * cost.cdiv(reduction, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        columns=config.BLOCK_N,
    )


def estimate_forward(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    if "TMA" in config:
        return _estimate_lines(p, config, device, turned=False)
    groups, split = p.geometry.groups, config.SPLIT_K
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=cost.cdiv(p.pixels, config.BLOCK_M) * cost.cdiv(p.K, config.BLOCK_N) * groups,
        steps=cost.cdiv(p.taps * p.C, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        split=split,
        partial_bytes=8.0 * split * p.pixels * p.K * groups if split > 1 else 0.0,
        columns=min(256, config.BLOCK_M if config.SWAP else config.BLOCK_N),
    )


def estimate_transpose(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    if "TMA" in config:
        return _estimate_lines(p, config, device, turned=True)
    groups, split = p.geometry.groups, config.SPLIT_K
    rows = cost.cdiv(p.image_pixels, p.geometry.parities)
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=cost.cdiv(rows, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_N) * groups * p.geometry.parities,
        steps=_transpose_steps(p, config),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        split=split,
        partial_bytes=8.0 * split * p.image_pixels * p.C * groups if split > 1 else 0.0,
        columns=config.BLOCK_N,
    )


def estimate_weight_grad(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    merged, split = merged_groups(p), config.SPLIT_K
    columns = p.taps * p.C * merged
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=cost.cdiv(p.K * merged, config.BLOCK_M)
        * cost.cdiv(columns, config.BLOCK_N)
        * (p.geometry.groups // merged),
        steps=cost.cdiv(p.pixels, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        split=split,
        partial_bytes=8.0 * split * p.K * p.taps * p.C * p.geometry.groups if split > 1 else 0.0,
        columns=config.BLOCK_N,
    )


def estimate_epilogue_grad(p: EpilogueProblem, config: Config, device: DeviceSpec) -> Estimate:
    splits = max(1, min(config.SPLIT_M, cost.cdiv(p.M, config.BLOCK_M)))
    columns = cost.cdiv(p.K, config.BLOCK_N)
    return cost.stream(
        device,
        programs=splits * columns,
        issued_bytes=p.minimal_bytes() + 8.0 * splits * p.K,
        dram_bytes=p.minimal_bytes(),
        config=config,
        tile_bytes=config.BLOCK_M * config.BLOCK_N * p.dtype.itemsize,
        waste=columns * config.BLOCK_N / max(1, p.K),
    )


# --- bytes moved, by the formulas at the heads of the kernels --------------------------------------------------------


def moved_forward(p: ConvProblem, config: Config) -> float:
    tiles_m, tiles_n = _row_tiles(p, config, p.pixels, turned=False), cost.cdiv(p.K, config.BLOCK_N)
    output = p.pixels * p.K
    split = config.get("SPLIT_K", 1)
    partial = 8 * split * output if split > 1 else 0
    reduction = p.taps * p.C
    bytes_a_group = (tiles_n * p.pixels * reduction + tiles_m * p.K * reduction + output) * p.itemsize + partial
    return float(p.geometry.groups * bytes_a_group)


def moved_transpose(p: ConvProblem, config: Config) -> float:
    g = p.geometry
    tiles_n = cost.cdiv(p.C, config.BLOCK_N)
    weights = 0
    rows = p.N * math.prod(cost.cdiv(size, step) for size, step in zip(p.image, g.stride, strict=True))
    for parity in itertools.product(*(range(step) for step in g.stride)):
        taps = math.prod(
            sum((tap * dil) % step == place for tap in range(window))
            for place, window, step, dil in zip(parity, p.window, g.stride, g.dilation, strict=True)
        )
        weights += _row_tiles(p, config, rows, turned=True) * taps * p.K * p.C
    output = p.image_pixels * p.C
    split = config.get("SPLIT_K", 1)
    partial = 8 * split * output if split > 1 else 0
    gathered = tiles_n * p.pixels * p.taps * p.K
    return float(g.groups * ((gathered + weights + output) * p.itemsize + partial))


def moved_weight_grad(p: ConvProblem, config: Config) -> float:
    merged = merged_groups(p)
    columns, rows = p.taps * p.C * merged, p.K * merged
    tiles_m, tiles_n = cost.cdiv(rows, config.BLOCK_M), cost.cdiv(columns, config.BLOCK_N)
    stored = p.taps * p.C * p.K * p.geometry.groups
    partial = 8 * config.SPLIT_K * stored if config.SPLIT_K > 1 else 0
    operands = (tiles_m * p.pixels * columns + tiles_n * p.pixels * rows) * (p.geometry.groups // merged)
    return float((operands + stored) * p.itemsize + partial)


def moved_epilogue_grad(p: EpilogueProblem, config: Config) -> float:
    splits = max(1, min(config.SPLIT_M, cost.cdiv(p.M, config.BLOCK_M)))
    return p.minimal_bytes() + p.has_bias * p.K * (8 * splits + p.dtype.itemsize)


def _row_tiles(p: ConvProblem, config: Config, rows: int, turned: bool) -> int:
    """How many tiles cover the rows of the matrix product; by lines, how many cover the lines of the result."""
    return line_tiles(p, config.BLOCK_M, turned) if "TMA" in config else cost.cdiv(rows, config.BLOCK_M)


# --- what the static suite asks of the compiled kernels --------------------------------------------------------------


def product_rows_forward(p: ConvProblem) -> int:
    return p.pixels


def product_rows_transpose(p: ConvProblem) -> int:
    return p.image_pixels // p.geometry.parities


def product_rows_weight_grad(p: ConvProblem) -> int:
    return p.K * merged_groups(p)


def due_load_bytes(p: ConvProblem, groups: int = 1) -> int:
    """How many bytes each load must take: 16 for 16-bit tensors that are channels last, where ``groups`` groups, which
    one load may read together, have a multiple of 8 channels and of 8 filters. 0 means any width."""
    is_wide = p.C * groups % 8 == 0 and p.K * groups % 8 == 0
    return 16 if p.itemsize == 2 and p.channels_last and is_wide else 0


def due_load_bytes_weight_grad(p: ConvProblem) -> int:
    return due_load_bytes(p, merged_groups(p))


def due_load_bytes_epilogue_grad(p: EpilogueProblem) -> int:
    return 16 if p.dtype.itemsize == 2 and p.K % 8 == 0 else 0


# --- keys of the store -----------------------------------------------------------------------------------------------


def features(p: ConvProblem) -> dict[str, int | str]:
    """The key of the store: sizes, which are compared by their ratio, and strings, which must be equal."""
    return {
        "pixels": p.pixels, "C": p.C, "K": p.K, "taps": p.taps, "groups": p.geometry.groups,
        "stride": "x".join(map(str, p.geometry.stride)), "dtype": dtype_name(p.dtype), "precision": p.precision,
        "layout": "nhwc" if p.channels_last else "nchw",
    }  # fmt: skip


def epilogue_features(p: EpilogueProblem) -> dict[str, int | str]:
    return {
        "M": p.M, "K": p.K, "dtype": dtype_name(p.dtype),
        "passes": f"{int(p.has_saved)}{int(p.writes_g)}{int(p.has_bias)}",
    }  # fmt: skip
