"""Which configs the kernels of attention have, which of them fit a problem, what they move and how long they take."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..autotune import cost
from ..autotune.config import Config, Estimate
from ..autotune.device import DeviceSpec
from ..autotune.schema import dtype_name
from ._launch import STEP
from .attention_problem import AttentionProblem, NormalizeProblem, bias_tiles

# --- configs ---------------------------------------------------------------------------------------------------------


TILES = tuple(
    Config(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)
    for m in (128, 64, 32, 16)
    for n in (128, 64, 32, 16)
    for warps in (8, 4, 2, 16)
    for stages in (2, 3, 1)
)
ROWS = tuple(
    Config(BLOCK_M=m, num_warps=warps, num_stages=1) for m in (64, 32, 16, 128, 256, 8, 4) for warps in (4, 8, 2, 1)
)
CLOCK_GHZ = 1.7
MAX_HEAD = 256  # numbers a head
SMALLEST = Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)


# --- which configs fit -----------------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """What one program of a kernel holds: operands that stay, operands that are streamed, products a step."""

    rows: int  # of the tile that the program owns
    step: int  # rows of the tiles that pass
    kept: int  # numbers a row: accumulators
    stays: int  # numbers a row: operands
    passes: int  # numbers a row: streamed operands
    tiles: int  # score tiles alive at once
    products: int  # multiply-adds for each pair of query and key


def _shape(kind: str, p: AttentionProblem, config: Config) -> _Shape:
    d, dv = p.block_d, p.block_dv
    if kind == "forward":
        return _Shape(config.BLOCK_M, config.BLOCK_N, dv, d, d + dv, 1, d + dv)
    if kind == "query_grad":
        return _Shape(config.BLOCK_M, config.BLOCK_N, d, d + dv, d + dv, 2, 2 * d + dv)
    if kind == "key_value_grad":
        return _Shape(config.BLOCK_N, config.BLOCK_M, d + dv, d + dv, d + dv, 2, 2 * (d + dv))
    return _Shape(config.BLOCK_M, config.BLOCK_N, 0, 0, 2 * (d + dv), 3, d + dv)


def _registers(shape: _Shape, p: AttentionProblem, config: Config, device: DeviceSpec) -> float:
    """Numbers that a thread holds: accumulators, score tiles, addresses of the streamed tiles, and the rest."""
    threads = config.num_warps * device.warp_size
    vector = 16 // p.dtype.itemsize
    read = 0.5 * p.masked + 3.0 * (p.bias is not None)  # values and addresses of mask and bias
    held = shape.rows * shape.kept + (shape.tiles + 0.5 + read) * shape.rows * shape.step
    held += 2 * shape.step * shape.passes / vector
    if shape.tiles > 1:
        held += shape.rows * shape.stays * p.dtype.itemsize / 8  # half of what stays, as an operand in registers
    return held / threads + 50


def _smem_bytes(shape: _Shape, p: AttentionProblem, config: Config, device: DeviceSpec) -> int:
    """Operands that stay, one set of streamed tiles a stage, scores on their way to the next product's layout."""
    stages = max(1, config.num_stages - 1) if device.is_amd else config.num_stages
    tiles = shape.rows * shape.stays + stages * shape.step * shape.passes + shape.rows * shape.step * (shape.tiles - 1)
    return tiles * p.dtype.itemsize + 1024


def fits(p: AttentionProblem, device: DeviceSpec) -> bool:
    """Is there a tile small enough for these heads?"""
    kinds = ("forward", "query_grad", "key_value_grad") if p.saves else ("forward",)
    return max(p.D, p.DV) <= MAX_HEAD and all(accepts(kind, p, SMALLEST, device) for kind in kinds)


def within_reach(p: AttentionProblem, mask: torch.Tensor | None) -> bool:
    """Do offsets within a tile stay 32-bit where no copy would help: in results, which may hold all heads of a position
    side by side, and in rows of a dense mask [B, H, M, N] or bias?"""
    has_rows = "m" in p.bias_dims or (mask is not None and mask.shape[2] > 1)
    return p.H * max(p.D, p.DV) < STEP and not (has_rows and p.N >= STEP)


def accepts(kind: str, p: AttentionProblem, config: Config, device: DeviceSpec) -> bool:
    shape = _shape(kind, p, config)
    threads = config.num_warps * device.warp_size
    if _smem_bytes(shape, p, config, device) > device.smem_kb * 1024:
        return False
    if config.BLOCK_M > max(16, 2 * p.M) or config.BLOCK_N > max(16, 2 * p.N):
        return False
    if config == SMALLEST:
        return True
    if p.precision not in ("16", "tf32") or (p.precision == "tf32" and device.is_amd):
        # Operands of the fp32 pipes come from registers.
        held = shape.rows * (shape.kept + shape.stays) + shape.step * shape.passes
        return config.num_stages == 1 and held <= 96 * threads
    if device.is_amd:
        fewest = config.num_stages < 3 and config.num_warps < 16
        return fewest and _registers(shape, p, config, device) <= 240
    if shape.rows >= 64 and (
        config.num_warps < 4 or (kind == "key_value_grad" and shape.stays * p.dtype.itemsize > 512)
    ):
        return False  # WGMMA wants four warps; with wider heads its operands leave no registers
    most = 128 if config.num_warps == 16 else 260 if p.dtype.itemsize == 2 else 200
    return _registers(shape, p, config, device) <= most


def _row_tile(p: AttentionProblem | NormalizeProblem) -> int:
    return p.block_dv if isinstance(p, AttentionProblem) else p.block_d


def accepts_rows(p: AttentionProblem | NormalizeProblem, config: Config, device: DeviceSpec) -> bool:
    """One to eight loads of 16 bytes a thread."""
    elements = config.BLOCK_M * _row_tile(p)
    once = config.num_warps * device.warp_size * 16 // p.dtype.itemsize
    return once <= elements <= 8 * once or (config.BLOCK_M == 64 and config.num_warps == 1)


# --- estimated time --------------------------------------------------------------------------------------------------


def estimate(kind: str, p: AttentionProblem, config: Config, device: DeviceSpec) -> Estimate:
    """Waves of programs; of a program the pairs it computes, in steps of a tile: products, exponentials, loads. With
    two programs on a multiprocessor one multiplies while the other takes exponentials."""
    shape = _shape(kind, p, config)
    own, walked = (p.N, p.M) if kind == "key_value_grad" else (p.M, p.N)
    heads = p.B * p.H // (p.group if kind == "key_value_grad" else 1)
    programs = heads * cost.cdiv(own, shape.rows) if kind != "bias_grad" else bias_tiles(p, config)
    pair_tiles = p.B * p.H * cost.cdiv(own, shape.rows) * cost.cdiv(walked, shape.step)
    if p.shift is not None:
        pair_tiles *= min(1.0, p.pairs / max(1, p.M * p.N) + 0.5 * max(shape.rows, shape.step) / max(1, own, walked))
    steps = pair_tiles / max(1, programs)
    area = shape.rows * shape.step
    flops_a_clock = device.tflops(p.precision) * 1e3 / device.sms / CLOCK_GHZ
    slow = 1.0 if shape.rows >= 64 and config.num_warps >= 4 else 2.0  # mma.sync, or too few warps to feed the units
    feed = min(1.0, area / (shape.rows + shape.step) / 48)  # small tiles: operands out of shared memory too often
    products = slow * 2 * area * shape.products / flops_a_clock / feed
    pointwise = area * (1 / 16 + shape.tiles * 6 / 128)
    loads = shape.step * shape.passes * p.dtype.itemsize / (2.5 * device.dram_gbs / device.sms / CLOCK_GHZ)
    registers = min(255, _registers(shape, p, config, device))
    resident = min(
        device.smem_kb * 1024 // _smem_bytes(shape, p, config, device),
        int(65536 / (registers * 32 * config.num_warps)), 32 // config.num_warps,
    )  # fmt: skip
    resident = max(1, min(resident, cost.cdiv(programs, device.sms)))
    hidden = 0.35 if resident > 1 else 1.0
    step = max(products, loads) + hidden * pointwise + (200 if config.num_stages > 1 else 700) / resident
    waves = cost.cdiv(programs, device.sms * resident)
    busy = waves * resident * steps * step / (CLOCK_GHZ * 1e3) + cost.ITERATION_LATENCY_US
    memory = _once_bytes(p) / (device.dram_gbs * 1e3)
    return Estimate(cost.LAUNCH_US + max(busy, memory), "memory" if memory > busy else "compute")


def _once_bytes(p: AttentionProblem) -> float:
    """Every operand once over the memory bus."""
    e = p.dtype.itemsize
    scores = (p.masked + (p.bias.itemsize if p.bias else 0)) * p.M * p.N
    return float(p.B * (p.H * p.M * (p.D + p.DV) * e + p.H // p.group * p.N * (p.D + p.DV) * e + scores))


def estimate_rows(
    p: AttentionProblem | NormalizeProblem, config: Config, device: DeviceSpec, passes: int
) -> Estimate:  # fmt: skip
    rows, size = (p.B * p.H * p.M, p.DV) if isinstance(p, AttentionProblem) else (p.rows, p.D)
    moved = float(passes * rows * size * p.dtype.itemsize)
    return cost.stream(
        device, programs=cost.cdiv(rows, config.BLOCK_M), issued_bytes=moved, dram_bytes=moved, config=config,
        tile_bytes=config.BLOCK_M * size * p.dtype.itemsize, waste=_row_tile(p) / max(1, size),
    )  # fmt: skip


# --- bytes moved: the formulas at the heads of the kernels ------------------------------------------------------------


class _Walk(NamedTuple):
    """What goes past the tiles of one head: how many rows in all, and how many pairs of query and key."""

    rows: int
    pairs: int


def _walk_keys(p: AttentionProblem, config: Config) -> _Walk:
    """The keys that go past the tiles of queries."""
    rows = pairs = 0
    for first in range(0, p.M, config.BLOCK_M):
        end = p.N if p.shift is None else min(max(first + config.BLOCK_M + p.shift, 0), p.N)
        keys = min(cost.cdiv(end, config.BLOCK_N) * config.BLOCK_N, p.N)
        rows, pairs = rows + keys, pairs + keys * min(config.BLOCK_M, p.M - first)
    return _Walk(rows, pairs)


def _walk_queries(p: AttentionProblem, config: Config) -> _Walk:
    """The queries that go past the tiles of keys."""
    rows = pairs = 0
    for first in range(0, p.N, config.BLOCK_N):
        begin = 0 if p.shift is None else max(first - p.shift, 0) // config.BLOCK_M * config.BLOCK_M
        queries = max(p.M - begin, 0)
        rows, pairs = rows + queries, pairs + queries * min(config.BLOCK_N, p.N - first)
    return _Walk(rows, pairs)


def _score_bytes(p: AttentionProblem, pairs: int) -> int:
    """Mask and bias, once a pair."""
    return pairs * (p.masked + (p.bias.itemsize if p.bias else 0))


def moved_forward(p: AttentionProblem, config: Config) -> float:
    walk, numbers = _walk_keys(p, config), (p.D + p.DV) * p.dtype.itemsize
    kept = 4 * p.parts if p.saves else 4
    return float(p.B * p.H * ((p.M + walk.rows) * numbers + kept * p.M + _score_bytes(p, walk.pairs)))


def moved_delta(p: AttentionProblem, config: Config) -> float:
    return float(p.B * p.H * p.M * (2 * p.DV * p.dtype.itemsize + 4))


def moved_key_value_grad(p: AttentionProblem, config: Config) -> float:
    walk, numbers = _walk_queries(p, config), (p.D + p.DV) * p.dtype.itemsize
    kept = 4 * p.parts + 4
    queries = walk.rows * (numbers + kept) + _score_bytes(p, walk.pairs)
    return float(p.B * p.H * (queries + 2 * p.N * numbers / p.group))


def moved_query_grad(p: AttentionProblem, config: Config) -> float:
    walk, e = _walk_keys(p, config), p.dtype.itemsize
    own = p.M * ((2 * p.D + p.DV) * e + 4 * p.parts + 4)
    return float(p.B * p.H * (own + walk.rows * (p.D + p.DV) * e + _score_bytes(p, walk.pairs)))


def moved_bias_grad(p: AttentionProblem, config: Config) -> float:
    tiles_m, tiles_n = cost.cdiv(p.M, config.BLOCK_M), cost.cdiv(p.N, config.BLOCK_N)
    numbers = (p.D + p.DV) * p.dtype.itemsize
    head = p.M * tiles_n * (numbers + 12) + p.N * tiles_m * numbers + _score_bytes(p, p.M * p.N)
    written = p.bias.itemsize if p.bias else 0
    for dim, size in (("b", p.B), ("h", p.H), ("m", p.M), ("n", p.N)):
        written *= size if dim in p.bias_dims else 1
    return float(p.B * p.H * head + written)


def moved_normalize(p: NormalizeProblem, config: Config) -> float:
    return float(p.rows * (2 * p.D * p.dtype.itemsize + 4))


def moved_normalize_grad(p: NormalizeProblem, config: Config) -> float:
    return float(p.rows * (3 * p.D * p.dtype.itemsize + 4))


# --- what the compiler must make of the kernels -----------------------------------------------------------------------


def product_rows_forward(p: AttentionProblem) -> int:
    """The large units where a tile of 64 queries fits, else mma.sync."""
    return 64 if p.M >= 64 and p.precision == "16" else 16


def product_rows_query_grad(p: AttentionProblem) -> int:
    """The same, but not for the widest heads."""
    return product_rows_forward(p) if p.D <= 128 else 16


def product_rows_key_value_grad(p: AttentionProblem) -> int:
    """The same by tiles of keys."""
    return 64 if p.N >= 64 and p.D <= 128 and p.precision == "16" else 16


def product_rows_bias_grad(p: AttentionProblem) -> int:
    """Few tiles of a bias walk all that it was broadcast to, so they are small."""
    return 16


def due_load_bytes(p: AttentionProblem | NormalizeProblem) -> int:
    """16 bytes a load for 16-bit heads of eights."""
    return 16 if p.dtype.itemsize == 2 and p.D % 8 == 0 else 0


def due_load_bytes_of_tiles(p: AttentionProblem) -> int:
    """The same, but a mask or bias is loaded as the products' layout wants it."""
    return 0 if p.masked or p.bias else due_load_bytes(p)


# --- keys of the store -----------------------------------------------------------------------------------------------


def features(p: AttentionProblem) -> dict[str, int | str]:
    return {
        "heads": p.B * p.H, "M": p.M, "N": p.N, "D": str(p.block_d), "DV": str(p.block_dv),
        "dtype": dtype_name(p.dtype), "precision": p.precision,
        "causal": str(int(p.shift is not None)), "masked": str(int(p.masked)),
        "bias": dtype_name(p.bias),
    }  # fmt: skip


def row_features(p: AttentionProblem) -> dict[str, int | str]:
    return {"rows": p.B * p.H * p.M, "D": str(p.block_dv), "dtype": dtype_name(p.dtype)}


def normalize_features(p: NormalizeProblem) -> dict[str, int | str]:
    return {"rows": p.rows, "D": str(p.block_d), "dtype": dtype_name(p.dtype)}
