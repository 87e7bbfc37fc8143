"""Which configs the kernels of attention have, which of them fit a problem, what they move and how long they take."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..autotune import cost
from ..autotune.config import Config, Estimate
from ..autotune.device import DeviceSpec
from ..autotune.schema import dtype_name
from ._launch import STEP
from .attention_problem import AttentionProblem, NormalizeProblem, bias_tile_count

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
CLOCK_GHZ = 1.7  # of a multiprocessor, as the cost model assumes it for every GPU
MAX_HEAD = 256  # the most numbers in a row of query, key or value that the kernels take
SMALLEST = Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)


# --- which configs fit -----------------------------------------------------------------------------------------------


class _ProgramShape(NamedTuple):
    """What one program of a kernel holds. It owns a tile of queries or keys, and streams the tiles of the others."""

    rows: int  # rows of the tile that the program owns
    step: int  # rows of each tile that it streams
    kept: int  # fp32 sums for each row that it owns
    stays: int  # numbers of the operands for each row that it owns, which are loaded once
    passes: int  # numbers of the operands for each row that it streams
    tiles: int  # tiles of scores, or of their gradients, that are in registers at once
    products: int  # multiply-adds for each pair of query and key


def _program_shape(kind: str, p: AttentionProblem, config: Config) -> _ProgramShape:
    """``kind``: ``"forward"``, ``"query_grad"``, ``"key_value_grad"`` or ``"bias_grad"``."""
    d, dv = p.block_d, p.block_dv
    if kind == "forward":
        return _ProgramShape(config.BLOCK_M, config.BLOCK_N, dv, d, d + dv, 1, d + dv)
    if kind == "query_grad":
        return _ProgramShape(config.BLOCK_M, config.BLOCK_N, d, d + dv, d + dv, 2, 2 * d + dv)
    if kind == "key_value_grad":
        return _ProgramShape(config.BLOCK_N, config.BLOCK_M, d + dv, d + dv, d + dv, 2, 2 * (d + dv))
    return _ProgramShape(config.BLOCK_M, config.BLOCK_N, 0, 0, 2 * (d + dv), 3, d + dv)


def _registers_per_thread(shape: _ProgramShape, p: AttentionProblem, config: Config, device: DeviceSpec) -> float:
    """An estimate of the registers of a thread: sums, tiles of scores, addresses of the streamed tiles, and 50 for all
    else."""
    threads = config.num_warps * device.warp_size
    vector = 16 // p.dtype.itemsize
    read = 0.5 * p.masked + 3.0 * (p.bias is not None)  # values and addresses of mask and bias
    held = shape.rows * shape.kept + (shape.tiles + 0.5 + read) * shape.rows * shape.step
    held += 2 * shape.step * shape.passes / vector
    if shape.tiles > 1:
        held += shape.rows * shape.stays * p.dtype.itemsize / 8  # half of the owned operands
    return held / threads + 50


def _smem_bytes(shape: _ProgramShape, p: AttentionProblem, config: Config, device: DeviceSpec) -> int:
    """Shared memory of a program: the operands that it owns, one set of streamed tiles for each stage of the pipeline,
    and the tiles of scores that are exchanged between threads to become the operand of the next product."""
    stages = max(1, config.num_stages - 1) if device.is_amd else config.num_stages
    tiles = shape.rows * shape.stays + stages * shape.step * shape.passes + shape.rows * shape.step * (shape.tiles - 1)
    return tiles * p.dtype.itemsize + 1024


def fits(p: AttentionProblem, device: DeviceSpec) -> bool:
    """Whether the kernels cover this problem on this device: rows have at most MAX_HEAD numbers, and the smallest tiles
    fit the shared memory."""
    kinds = ("forward", "query_grad", "key_value_grad") if p.saves else ("forward",)
    return max(p.D, p.DV) <= MAX_HEAD and all(accepts(kind, p, SMALLEST, device) for kind in kinds)


def offsets_fit_32_bits(p: AttentionProblem, mask: torch.Tensor | None) -> bool:
    """Whether offsets within a tile fit 32 bits where a copy would not make them smaller: in a result whose heads are
    neighbours in memory, with H * max(D, DV) elements from row to row, and in a dense mask or bias [B, H, M, N], with N
    elements from row to row."""
    has_rows = "m" in p.bias_dims or (mask is not None and mask.shape[2] > 1)
    return p.H * max(p.D, p.DV) < STEP and not (has_rows and p.N >= STEP)


def accepts(kind: str, p: AttentionProblem, config: Config, device: DeviceSpec) -> bool:
    """Whether a config fits a problem on a device: its shared memory, its registers, and tiles that the sizes fill at
    least by half."""
    shape = _program_shape(kind, p, config)
    threads = config.num_warps * device.warp_size
    if _smem_bytes(shape, p, config, device) > device.smem_kb * 1024:
        return False
    if config.BLOCK_M > max(16, 2 * p.M) or config.BLOCK_N > max(16, 2 * p.N):
        return False
    if config == SMALLEST:
        return True
    if p.precision not in ("16", "tf32") or (p.precision == "tf32" and device.is_amd):
        # There is no tensor-core instruction for these, so all operands are in registers.
        held = shape.rows * (shape.kept + shape.stays) + shape.step * shape.passes
        return config.num_stages == 1 and held <= 96 * threads
    if device.is_amd:
        fewest = config.num_stages < 3 and config.num_warps < 16
        return fewest and _registers_per_thread(shape, p, config, device) <= 240
    if shape.rows >= 64 and (
        config.num_warps < 4 or (kind == "key_value_grad" and shape.stays * p.dtype.itemsize > 512)
    ):
        # The products of 64 rows (WGMMA) take four warps. For key and value with wide rows they leave too few
        # registers.
        return False
    most = 128 if config.num_warps == 16 else 260 if p.dtype.itemsize == 2 else 200
    return _registers_per_thread(shape, p, config, device) <= most


def _row_width(p: AttentionProblem | NormalizeProblem) -> int:
    """Numbers of a row in the kernels that walk rows, padded to a power of two."""
    return p.block_dv if isinstance(p, AttentionProblem) else p.block_d


def accepts_rows(p: AttentionProblem | NormalizeProblem, config: Config, device: DeviceSpec) -> bool:
    """Whether a tile gives each thread one to eight loads of 16 bytes. A tile of 64 rows for one warp is accepted for
    every width, so that each problem has a config."""
    elements = config.BLOCK_M * _row_width(p)
    once = config.num_warps * device.warp_size * 16 // p.dtype.itemsize
    return once <= elements <= 8 * once or (config.BLOCK_M == 64 and config.num_warps == 1)


# --- estimated time --------------------------------------------------------------------------------------------------


def estimate(kind: str, p: AttentionProblem, config: Config, device: DeviceSpec) -> Estimate:
    """The time of a launch: the waves of programs, times the steps of a program, times a step. A step computes one tile
    of scores: products, exponentials and loads. Where two programs are resident on a multiprocessor, one multiplies
    while the other computes exponentials, so most of the time of these is hidden."""
    shape = _program_shape(kind, p, config)
    own, walked = (p.N, p.M) if kind == "key_value_grad" else (p.M, p.N)
    heads = p.B * p.H // (p.group if kind == "key_value_grad" else 1)
    programs = heads * cost.cdiv(own, shape.rows) if kind != "bias_grad" else bias_tile_count(p, config)
    pair_tiles = p.B * p.H * cost.cdiv(own, shape.rows) * cost.cdiv(walked, shape.step)
    if p.shift is not None:
        pair_tiles *= min(1.0, p.pairs / max(1, p.M * p.N) + 0.5 * max(shape.rows, shape.step) / max(1, own, walked))
    steps = pair_tiles / max(1, programs)
    area = shape.rows * shape.step
    flops_a_clock = device.tflops(p.precision) * 1e3 / device.sms / CLOCK_GHZ
    slow = 1.0 if shape.rows >= 64 and config.num_warps >= 4 else 2.0  # mma.sync, or too few warps for WGMMA
    feed = min(1.0, area / (shape.rows + shape.step) / 48)  # small tiles wait for operands from shared memory
    products = slow * 2 * area * shape.products / flops_a_clock / feed
    pointwise = area * (1 / 16 + shape.tiles * 6 / 128)
    loads = shape.step * shape.passes * p.dtype.itemsize / (2.5 * device.dram_gbs / device.sms / CLOCK_GHZ)
    registers = min(255, _registers_per_thread(shape, p, config, device))
    resident = min(
        device.smem_kb * 1024 // _smem_bytes(shape, p, config, device),
        int(65536 / (registers * 32 * config.num_warps)), 32 // config.num_warps,
    )  # fmt: skip
    resident = max(1, min(resident, cost.cdiv(programs, device.sms)))
    hidden = 0.35 if resident > 1 else 1.0
    step = max(products, loads) + hidden * pointwise + (200 if config.num_stages > 1 else 700) / resident
    waves = cost.cdiv(programs, device.sms * resident)
    busy = waves * resident * steps * step / (CLOCK_GHZ * 1e3) + cost.ITERATION_LATENCY_US
    memory = _compulsory_bytes(p) / (device.dram_gbs * 1e3)
    return Estimate(cost.LAUNCH_US + max(busy, memory), "memory" if memory > busy else "compute")


def _compulsory_bytes(p: AttentionProblem) -> float:
    """Bytes that must come from or go to memory once: query, key, value, output, mask and bias."""
    e = p.dtype.itemsize
    scores = (p.masked + (p.bias.itemsize if p.bias else 0)) * p.M * p.N
    return float(p.B * (p.H * p.M * (p.D + p.DV) * e + p.H // p.group * p.N * (p.D + p.DV) * e + scores))


def estimate_rows(
    p: AttentionProblem | NormalizeProblem, config: Config, device: DeviceSpec, passes: int
) -> Estimate:  # fmt: skip
    """The time of a kernel that walks rows and loads or stores ``passes`` tensors of them."""
    rows, size = (p.B * p.H * p.M, p.DV) if isinstance(p, AttentionProblem) else (p.rows, p.D)
    moved = float(passes * rows * size * p.dtype.itemsize)
    return cost.stream(
        device, programs=cost.cdiv(rows, config.BLOCK_M), issued_bytes=moved, dram_bytes=moved, config=config,
        tile_bytes=config.BLOCK_M * size * p.dtype.itemsize, waste=_row_width(p) / max(1, size),
    )  # fmt: skip


# --- bytes moved: the formulas at the heads of the files --------------------------------------------------------------


class _Streamed(NamedTuple):
    """What the programs of one head stream, all together."""

    rows: int  # of the streamed tensor, counted once for each program that loads them
    pairs: int  # of query and key


def _streamed_keys(p: AttentionProblem, config: Config) -> _Streamed:
    """The keys that the programs of one head stream past their tiles of queries."""
    rows = pairs = 0
    for first in range(0, p.M, config.BLOCK_M):
        end = p.N if p.shift is None else min(max(first + config.BLOCK_M + p.shift, 0), p.N)
        keys = min(cost.cdiv(end, config.BLOCK_N) * config.BLOCK_N, p.N)
        rows, pairs = rows + keys, pairs + keys * min(config.BLOCK_M, p.M - first)
    return _Streamed(rows, pairs)


def _streamed_queries(p: AttentionProblem, config: Config) -> _Streamed:
    """The queries that the programs of one head stream past their tiles of keys."""
    rows = pairs = 0
    for first in range(0, p.N, config.BLOCK_N):
        begin = 0 if p.shift is None else max(first - p.shift, 0) // config.BLOCK_M * config.BLOCK_M
        queries = max(p.M - begin, 0)
        rows, pairs = rows + queries, pairs + queries * min(config.BLOCK_N, p.N - first)
    return _Streamed(rows, pairs)


def _mask_and_bias_bytes(p: AttentionProblem, pairs: int) -> int:
    """Bytes of mask and bias, which are loaded once for each pair of query and key."""
    return pairs * (p.masked + (p.bias.itemsize if p.bias else 0))


def moved_forward(p: AttentionProblem, config: Config) -> float:
    walk, numbers = _streamed_keys(p, config), (p.D + p.DV) * p.dtype.itemsize
    kept = 4 * p.parts if p.saves else 4
    return float(p.B * p.H * ((p.M + walk.rows) * numbers + kept * p.M + _mask_and_bias_bytes(p, walk.pairs)))


def moved_delta(p: AttentionProblem, config: Config) -> float:
    return float(p.B * p.H * p.M * (2 * p.DV * p.dtype.itemsize + 4))


def moved_key_value_grad(p: AttentionProblem, config: Config) -> float:
    walk, numbers = _streamed_queries(p, config), (p.D + p.DV) * p.dtype.itemsize
    kept = 4 * p.parts + 4
    queries = walk.rows * (numbers + kept) + _mask_and_bias_bytes(p, walk.pairs)
    return float(p.B * p.H * (queries + 2 * p.N * numbers / p.group))


def moved_query_grad(p: AttentionProblem, config: Config) -> float:
    walk, e = _streamed_keys(p, config), p.dtype.itemsize
    own = p.M * ((2 * p.D + p.DV) * e + 4 * p.parts + 4)
    return float(p.B * p.H * (own + walk.rows * (p.D + p.DV) * e + _mask_and_bias_bytes(p, walk.pairs)))


def moved_bias_grad(p: AttentionProblem, config: Config) -> float:
    tiles_m, tiles_n = cost.cdiv(p.M, config.BLOCK_M), cost.cdiv(p.N, config.BLOCK_N)
    numbers = (p.D + p.DV) * p.dtype.itemsize
    head = p.M * tiles_n * (numbers + 12) + p.N * tiles_m * numbers + _mask_and_bias_bytes(p, p.M * p.N)
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
    """Rows of the tiles that the matrix units multiply: 64 (WGMMA) in 16 bits where there are 64 queries, else 16
    (mma.sync)."""
    return 64 if p.M >= 64 and p.precision == "16" else 16


def product_rows_query_grad(p: AttentionProblem) -> int:
    """As in the forward, but 16 for rows of more than 128 numbers, of which 64 need not fit the registers."""
    return product_rows_forward(p) if p.D <= 128 else 16


def product_rows_key_value_grad(p: AttentionProblem) -> int:
    """As for the gradient of query, by the number of keys, since a program owns a tile of keys."""
    return 64 if p.N >= 64 and p.D <= 128 and p.precision == "16" else 16


def product_rows_bias_grad(p: AttentionProblem) -> int:
    """16: a bias that was broadcast has few tiles, each a program's, so small tiles are chosen, which give more
    programs."""
    return 16


def due_load_bytes(p: AttentionProblem | NormalizeProblem) -> int:
    """How many bytes wide every load has to be: 16 for 16-bit rows whose length is a multiple of 8, else 0, which
    allows any width."""
    return 16 if p.dtype.itemsize == 2 and p.D % 8 == 0 else 0


def due_load_bytes_of_tiles(p: AttentionProblem) -> int:
    """As :func:`due_load_bytes`, but 0 with a mask or bias: these are loaded in the layout of the products, in which a
    thread's elements are not neighbours."""
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
