"""A roofline-and-occupancy model that ranks configs where nothing was measured.

It predicts order, not time: every term is a floor (bytes over rate, FLOPs over rate, whole waves of programs), so two
configs are compared by how much of the machine each leaves idle. Sources of the terms: tile and wave quantisation as in
any GEMM model; shared memory of a pipelined loop = stages x operand tiles.
"""

from __future__ import annotations

import math

from .config import Config, Estimate
from .device import DeviceSpec

LAUNCH_US = 2.5  # a kernel's start and end on the device
ITERATION_LATENCY_US = 0.5  # first load to first multiply of a pipelined loop


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is at least ``n``; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def gemm_smem_bytes(block_m: int, block_n: int, block_k: int, itemsize: int, num_stages: int) -> int:
    """Shared memory of a pipelined tile loop: each stage holds one tile of either operand."""
    return num_stages * (block_m + block_n) * block_k * itemsize


def gemm(
    device: DeviceSpec,
    precision: str,
    itemsize: int,
    *,
    tiles: int,
    steps: int,
    dram_bytes: float,
    config: Config,
    blocks: tuple[int, int, int],
    split: int = 1,
    partial_bytes: float = 0.0,
    columns: int = 0,
) -> Estimate:
    """Time of a tiled matrix product: ``tiles`` output tiles, each walking ``steps`` tiles of the reduction.

    Args:
        blocks: ``(BLOCK_M, BLOCK_N, BLOCK_K)`` of one step.
        split: programs that share the reduction of one output tile.
        partial_bytes: traffic of writing and summing the partial results.
        columns: of one tensor-core instruction, if they limit it: an instruction of 64 rows reads 64 + columns operand
            rows from shared memory in the time that 2 * columns would take.
    """
    block_m, block_n, block_k = blocks
    warps = config.num_warps
    smem = gemm_smem_bytes(block_m, block_n, block_k, itemsize, config.num_stages)
    accumulator_registers = block_m * block_n // (device.warp_size * warps)
    if accumulator_registers > 192:
        return Estimate(math.inf, "registers")
    registers = min(255, accumulator_registers + 56)
    resident = max(1, min(device.smem_kb * 1024 // max(smem, 1), 65536 // (registers * 32 * warps), 64 // warps))
    programs = tiles * split
    waves = cdiv(programs, device.sms * resident)
    concurrent = min(resident, cdiv(programs, device.sms))
    # A small tile cannot keep the tensor cores fed from shared memory: both operands are read once per product.
    feed = min(1.0, (block_m * block_n) / (block_m + block_n) / 48)
    if columns:
        feed = min(feed, 0.9 * 2 * columns / (64 + columns))
    step_compute = 2 * block_m * block_n * block_k / (device.tflops(precision) * 1e6 / device.sms) / feed
    l2_rate = 2.5 * device.dram_gbs * 1e3 / device.sms
    step_load = (block_m + block_n) * block_k * itemsize / l2_rate
    overlap = 1.0 if config.num_stages > 1 else 1.6
    per_program = cdiv(steps, split) * max(step_compute, step_load) * concurrent * overlap + ITERATION_LATENCY_US
    busy = waves * per_program
    memory = (dram_bytes + partial_bytes) / (device.dram_gbs * 1e3)
    us = LAUNCH_US * (2 if split > 1 else 1) + max(busy, memory) + 0.15 * min(busy, memory)
    return Estimate(us, "memory" if memory > busy else "compute")


def stream(
    device: DeviceSpec,
    *,
    programs: int,
    issued_bytes: float,
    dram_bytes: float,
    config: Config,
    tile_bytes: int,
    waste: float = 1.0,
    flops: float = 0.0,
) -> Estimate:
    """Time of a kernel that streams tiles: limited by DRAM, by L2 and L1 traffic, by FMA, or by too few programs.

    Args:
        issued_bytes: what the load and store instructions move, re-reads included.
        tile_bytes: one load of the tile; below 16 bytes a thread the memory pipes run partly empty.
        waste: lanes issued over lanes used.
    """
    dram = dram_bytes / (device.dram_gbs * 1e3)
    width = min(1.0, tile_bytes / (config.num_warps * device.warp_size * 16))
    cached = issued_bytes * waste / (2.5 * device.dram_gbs * 1e3) / (0.5 + 0.5 * width)
    fma = flops * waste / (device.tflops_ieee * 1e6)
    filled = min(1.0, programs * config.num_warps / (device.sms * 8))
    us = LAUNCH_US + max(dram, cached, fma) / max(filled, 1e-3)
    return Estimate(us, "memory" if max(dram, cached) >= fma else "compute")
