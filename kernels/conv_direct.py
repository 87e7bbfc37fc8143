r"""Convolution without matrix products, for groups of 1, 2, 4 or 8 channels: depthwise, multipliers, small groups.

    y[n,k,z,p,q] = act(scale[k] * sum_{c,t,r,s} x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H,
                                                  q*STRIDE_W - PAD_W + s*DIL_W] * w[k,c,t,r,s]
                       + bias[k] + residual[n,k,z,p,q])

The letters are those of :mod:`.conv`: C and K count one group's channels. So few channels meet in a sum that tensor
cores would multiply mostly zeros; here every product is an fp32 FMA.

This file is the door of the family: it plans the launches, registers the kernels with the tuner and calls them, and has
their configs. The forms and the bytes of each pass stand at the head of the file that computes it:

    conv_direct_tiles.py          tiles in registers, and what the geometry decides
    conv_direct_forward.py        forward, channels last and by rows
    conv_direct_transpose.py      transpose with a stride
    conv_direct_weight_grad.py    gradient of the weights, for groups of one channel

Problems, results and epilogue are those of :mod:`.conv_problem` and :mod:`.conv_epilogue`, strides those of
:mod:`.conv_windows`. Deterministic: gathers only; the weight gradient adds its partial sums in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..autotune import cost
from ..autotune.config import Config, Estimate, Tunable, register
from ..autotune.device import DeviceSpec
from ..autotune.layout import empty
from ._launch import Launch, launch, layout_strides, raw_strides, readable, row_alignment, unit_divisor
from .conv import prepare, sum_splits
from .conv_direct_forward import direct_kernel, direct_rows_kernel
from .conv_direct_tiles import MAX_ROWS, equal_block, first_run, last_run, reads_row, reads_run
from .conv_direct_transpose import block_input, direct_transpose_kernel
from .conv_direct_weight_grad import direct_rows_weight_grad_kernel, direct_weight_grad_kernel
from .conv_problem import ConvProblem, Epilogue, Geometry, channels_last, meta_tensors, problem_of
from .conv_space import due_load_bytes, features
from .conv_windows import X_STRIDES, Y_STRIDES

CHANNELS = (1, 2, 4, 8)  # of a group, and filters of a group, that the kernels know
MAX_BLOCK, MAX_PRODUCTS = 16, 256  # outputs and products of one position that the transpose writes out


# --- launchers -------------------------------------------------------------------------------------------------------


def takes(weight_shape: Sequence[int], stride: Sequence[int], groups: int) -> bool:
    """Which convolutions, and transposes of them, are for these kernels: those where few channels meet in a group."""
    filters, channels, *window = weight_shape
    filters //= groups
    outputs, products = _block(stride, window, filters)
    fits = math.prod(stride) == 1 or (outputs <= MAX_BLOCK and products <= MAX_PRODUCTS)
    return groups > 1 and channels in CHANNELS and filters in CHANNELS and fits


def _block(stride: Sequence[int], window: Sequence[int], filters: int) -> tuple[int, int]:
    """Outputs of a block of the transpose, and products that a channel sums in it: its code is that long."""
    return math.prod(stride[-2:]), math.prod(window[-2:]) * filters


def _turned(p: ConvProblem) -> ConvProblem:
    """The convolution that a transpose without stride is; its window is turned over in every dimension."""
    g = p.geometry
    padding = tuple(dil * (taps - 1) - pad for dil, taps, pad in zip(g.dilation, p.window, g.padding, strict=True))
    return p._replace(C=p.K, K=p.C, image=p.output, output=p.image, geometry=g._replace(padding=padding))


def _upright(p: ConvProblem) -> ConvProblem:
    """Width and height exchanged: so outputs of one dimension lie below one another, and ROWS of them share loads."""
    sizes = (p.image, p.window, p.output, *p.geometry[:3])
    image, window, output, *geometry = ((depth, width, height) for depth, height, width in sizes)
    return p._replace(image=image, window=window, output=output, geometry=Geometry(*geometry, p.geometry.groups))


def _is_flat(p: ConvProblem) -> bool:
    return p.image[1] == p.window[1] == p.output[1] == 1 and p.geometry.stride[1] == 1


def _run(itemsize: int, *alignments: int) -> int:
    """RUN: as many outputs as the rows are aligned to. Where they are not at all, 16 bytes: such rows are loaded an
    element a thread and exchanged through shared memory, half the instructions of a load for every tap."""
    alignment = min(alignments)
    return 16 // itemsize if alignment == 1 else max(1, alignment)


def _window(p: ConvProblem) -> dict[str, int]:
    return {"GROUPS": p.geometry.groups, **dict(zip("TRS", p.window, strict=True)), **p.geometry.constants()}


def plan_forward(
    p: ConvProblem, config: Config, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, epilogue: Epilogue,
    turned: bool = False,
) -> list[Launch]:  # fmt: skip
    """x laid out as y, w dense fp32 [T, R, S, C, K * GROUPS]; ``turned``: its taps come in reverse."""
    operands = {
        "x_ptr": x, "w_ptr": w, "scale_ptr": epilogue.scale, "bias_ptr": epilogue.bias,
        "residual_ptr": epilogue.residual, "y_ptr": y, "saved_ptr": epilogue.saved,
    }  # fmt: skip
    constants = {"C": p.C, "K": p.K, "TURNED": turned, "ACTIVATION": epilogue.activation}
    if "BLOCK_Q" in config:
        xs, ys = raw_strides(x), raw_strides(y)
        run = _run(p.itemsize, row_alignment(x))
        x_vec, y_vec = (unit_divisor(run, max(1, row_alignment(t))) for t in (x, y))
        xs = [*(stride // x_vec for stride in xs[:4]), xs[4]]
        ys = [stride // y_vec for stride in ys[:4]]
        tiles = cost.cdiv(p.output[2], run * config.BLOCK_Q) * cost.cdiv(p.output[1], config.BLOCK_P)
        sizes = {**p.sizes(), "rows": p.window[0] * p.window[1] * p.C}
        args = {**operands, **sizes, **_named(X_STRIDES, xs), **_named(Y_STRIDES[:4], ys)}
        constants |= {**_window(p), "X_VEC": x_vec, "Y_VEC": y_vec, "RUN": run, **config.constants()}
        grid = p.N * p.K * p.geometry.groups * p.output[0] * tiles
        return [Launch(direct_rows_kernel, grid, args, constants, config.num_warps, config.num_stages)]
    x_vec, _, xs = layout_strides(x, p.C * p.geometry.groups)
    y_vec, _, ys = layout_strides(y)
    if _is_flat(p):
        p, xs, ys = _upright(p), [*xs[:3], xs[4], xs[3]], [*ys[:3], ys[4], ys[3]]
    positions = p.N * p.output[0] * cost.cdiv(p.output[1], config.ROWS) * p.output[2]
    args = {
        **operands, "M": positions, **p.sizes(), "columns": p.window[0] * p.window[2],
        **_named(X_STRIDES, xs), **_named(Y_STRIDES, ys),
    }  # fmt: skip
    del args["stride_xc"], args["stride_yk"]
    constants |= {**_window(p), "RANK": p.rank, "X_VEC": x_vec, "Y_VEC": y_vec, **config.constants()}
    grid = cost.cdiv(positions, config.BLOCK_M) * cost.cdiv(p.K * p.geometry.groups, config.BLOCK_C)
    return [Launch(direct_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def plan_transpose(
    p: ConvProblem, config: Config, g: torch.Tensor, w: torch.Tensor, x: torch.Tensor, epilogue: Epilogue
) -> list[Launch]:
    """g laid out as x, w dense fp32 [T, R, S, K, C * GROUPS]; x is the result."""
    if p.geometry.parities == 1:
        return plan_forward(_turned(p), config, g, w, x, epilogue, turned=True)
    unit_c = "BLOCK_Q" not in config
    block_m, block_c = (config.BLOCK_M, config.BLOCK_C) if unit_c else (config.BLOCK_P * config.BLOCK_Q, 1)
    if unit_c:
        g_vec, _, gs = layout_strides(g, p.K * p.geometry.groups)
        x_vec, _, xs = layout_strides(x)
    else:
        g_vec, gs, x_vec, xs = 1, raw_strides(g), 1, raw_strides(x)
    blocks = _blocks(p)
    args = {
        "g_ptr": g, "w_ptr": w, "scale_ptr": epilogue.scale, "bias_ptr": epilogue.bias,
        "residual_ptr": epilogue.residual, "x_ptr": x, "saved_ptr": epilogue.saved,
        "M": blocks, **p.sizes(), **_named(Y_STRIDES, gs), **_named(X_STRIDES, xs),
    }  # fmt: skip
    constants = {
        "C": p.C, "K": p.K, **_window(p), "RANK": p.rank, "G_VEC": g_vec, "X_VEC": x_vec, "UNIT_C": unit_c,
        "ACTIVATION": epilogue.activation, "BLOCK_M": block_m, "BLOCK_C": block_c,
    }  # fmt: skip
    grid = cost.cdiv(blocks, block_m) * cost.cdiv(p.C * p.geometry.groups, block_c)
    return [Launch(direct_transpose_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def plan_weight_grad(
    p: ConvProblem, config: Config, x: torch.Tensor, g: torch.Tensor, dw: torch.Tensor
) -> list[Launch]:
    """x and g laid out alike; dw dense [K * GROUPS, 1, T, R, S]."""
    filters = p.K * p.geometry.groups
    operands = {"x_ptr": x, "g_ptr": g}
    constants = {"K": p.K, **_window(p)}
    if "BLOCK_Q" in config:
        xs, gs = raw_strides(x), raw_strides(g)
        run = _run(p.itemsize, row_alignment(x), row_alignment(g))
        x_vec, g_vec = (unit_divisor(run, max(1, row_alignment(t))) for t in (x, g))
        xs = [*(stride // x_vec for stride in xs[:4]), xs[4]]
        gs = [*(stride // g_vec for stride in gs[:4]), gs[4]]
        splits = _rows_splits(p, config, run)
        partial = torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
        args = {
            **operands, "partial_ptr": partial, "N": p.N, **p.sizes(), "splits": splits,
            **_named(X_STRIDES, xs), **_named(Y_STRIDES, gs),
        }  # fmt: skip
        constants |= {"X_VEC": x_vec, "G_VEC": g_vec, "RUN": run, "BLOCK_P": config.BLOCK_P, "BLOCK_Q": config.BLOCK_Q}
        grid = p.window[0] * p.window[1] * filters * splits
        main = Launch(direct_rows_weight_grad_kernel, grid, args, constants, config.num_warps, config.num_stages)
        return [main, sum_splits(partial, dw)]
    x_vec, _, xs = layout_strides(x, p.geometry.groups)
    y_vec, _, gs = layout_strides(g)
    splits, run = _splits(p, config)
    parts = splits * cost.cdiv(p.output[2], run)
    partial = torch.empty((parts, dw.numel()), dtype=torch.float32, device=x.device)
    args = {
        **operands, "partial_ptr": partial, "M": p.N * p.output[0] * p.output[1], **p.sizes(), "splits": splits,
        "run": run, **_named(X_STRIDES, xs), **_named(Y_STRIDES, gs),
    }  # fmt: skip
    del args["stride_xc"], args["stride_yk"]
    constants |= {
        "RANK": p.rank, "X_VEC": x_vec, "Y_VEC": y_vec, "BLOCK_M": config.BLOCK_M, "BLOCK_C": config.BLOCK_C,
    }  # fmt: skip
    rows = p.window[0] * p.window[1] * cost.cdiv(p.window[2], MAX_ROWS.value)
    grid = rows * cost.cdiv(filters, config.BLOCK_C) * parts
    main = Launch(direct_weight_grad_kernel, grid, args, constants, config.num_warps, config.num_stages)
    return [main, sum_splits(partial, dw)]


def _rows_splits(p: ConvProblem, config: Config, run: int) -> int:
    tiles = cost.cdiv(p.output[2], run * config.BLOCK_Q) * cost.cdiv(p.output[1], config.BLOCK_P)
    return max(1, min(config.SPLIT_M, p.N * p.output[0] * tiles // 4))  # less would not repay a program's last step


def _splits(p: ConvProblem, config: Config) -> tuple[int, int]:
    """Shares of the rows of outputs, and if those are too few for SPLIT_M shares, the columns of a run of each row."""
    splits = max(1, min(config.SPLIT_M, cost.cdiv(p.N * p.output[0] * p.output[1], config.BLOCK_M)))
    runs = min(cost.cdiv(config.SPLIT_M, splits), cost.cdiv(p.output[2], 4 * p.window[2]))
    return splits, cost.cdiv(p.output[2], max(1, runs))


def _named(names: Sequence[str], values: Sequence[int]) -> dict[str, int]:
    return dict(zip(names, values, strict=True))


# --- configs ---------------------------------------------------------------------------------------------------------

_TILES = (
    # BLOCK_M, BLOCK_C, warps: channels last, 16 bytes of 16-bit channels a thread of 32 a warp
    (16, 64, 4),
    (32, 32, 4),
    (8, 128, 4),
    (64, 16, 4),
    (128, 8, 4),
    (4, 64, 1),
    (8, 32, 1),
    (32, 8, 1),
    # of 64 a warp
    (16, 64, 2),
    (32, 32, 2),
    (8, 128, 2),
    (64, 16, 2),
    (128, 8, 2),
    (8, 64, 1),
    (16, 32, 1),
    (64, 8, 1),
    # less, for 32-bit channels and for groups and blocks that hold more beside it
    (8, 64, 4),
    (16, 32, 4),
    (32, 16, 4),
    (64, 8, 4),
    (8, 32, 4),
    (32, 8, 4),
    (16, 8, 1),
)

# BLOCK_P, BLOCK_Q, warps: NCHW, in runs of outputs
_ROW_TILES = tuple(
    (size // block_q, block_q, warps)
    for size, warps in ((512, 4), (256, 4), (128, 4), (128, 2), (64, 1), (32, 1))
    for block_q in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
    if size // 64 <= block_q <= size
)


def _config(block_m: int, block_c: int, warps: int, **more: int) -> Config:
    return Config(BLOCK_M=block_m, BLOCK_C=block_c, **more, num_warps=warps, num_stages=1)


def _row_config(block_p: int, block_q: int, warps: int, **more: int) -> Config:
    return Config(BLOCK_P=block_p, BLOCK_Q=block_q, **more, num_warps=warps, num_stages=1)


CONFIGS = (
    *(_config(*tile, ROWS=rows) for rows in (4, 2, 1) for tile in _TILES),
    *(_row_config(*tile) for tile in _ROW_TILES),
)
_NARROW_TILES = ((2, 128, 1), (1, 256, 1), (1, 512, 1))  # few rows of outputs, as one dimension has
WEIGHT_GRAD_CONFIGS = tuple(
    config(*tile, SPLIT_M=splits)
    for splits in (16, 64, 256, 1)
    for config, tiles in ((_config, (*_TILES, *_NARROW_TILES)), (_row_config, _ROW_TILES))
    for tile in tiles
)


def _dense_run(p: ConvProblem, *others: int) -> int:
    """RUN for dense tensors of x's and other widths."""
    return _run(p.itemsize, unit_divisor(16 // p.itemsize, p.image[2], *others))


def _tile_fits(p: ConvProblem, config: Config, device: DeviceSpec, results: int, most: int = 16) -> bool:
    """Has a thread 16 bytes to load, and registers for its sums? ``results``: outputs at one position of the tile;
    ``most``: sums of a thread for one of them."""
    read, written = p.C * p.geometry.groups, p.K * p.geometry.groups
    sums = config.BLOCK_M * config.BLOCK_C / (device.warp_size * config.num_warps)
    widest = sums * max(1.0, p.C / p.K)
    enough = widest >= min(unit_divisor(16 // p.itemsize, read, written), max(1, 16 // results), most)
    return (
        config.BLOCK_C % p.K == 0
        and (config.BLOCK_C <= 8 or config.BLOCK_C < 2 * written)
        and sums <= min(most, 32 // results)
        and widest <= 16
        and enough
    )


def _row_tile_fits(p: ConvProblem, config: Config, device: DeviceSpec, run: int) -> bool:
    """At least a run a thread, and but for the smallest tiles none twice as large as a plane in a direction."""
    size, runs = config.BLOCK_P * config.BLOCK_Q, cost.cdiv(p.output[2], run)
    fits = config.BLOCK_P == 1 or config.BLOCK_P < 2 * p.output[1] or size <= device.warp_size
    return size >= device.warp_size * config.num_warps and config.BLOCK_Q < 2 * runs and fits


def _forward_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if p.channels_last == ("BLOCK_Q" in config):
        return False
    if not p.channels_last:
        return _row_tile_fits(p, config, device, _dense_run(p))
    rows = (_upright(p) if _is_flat(p) else p).output[1]
    return (config.ROWS == 1 or config.ROWS <= rows) and _tile_fits(p, config, device, config.ROWS)


def _transpose_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if p.geometry.parities == 1:
        return _forward_accepts(_turned(p), config, device)
    if p.channels_last == ("BLOCK_Q" in config):
        return False
    blocks, products = _block(p.geometry.stride, p.window, p.K)
    if not p.channels_last:
        threads = device.warp_size * config.num_warps
        return config.BLOCK_P == 1 and config.BLOCK_Q <= max(1, 32 // blocks) * threads
    swapped = p._replace(C=p.K, K=p.C)
    most = 8 if products <= 40 else 4 if products <= 100 else 2  # the compiler loads many weights ahead
    return config.ROWS == 1 and _tile_fits(swapped, config, device, blocks, most)


def _weight_grad_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if p.channels_last == ("BLOCK_Q" in config):
        return False
    if not p.channels_last:
        held = config.BLOCK_P * config.BLOCK_Q / (device.warp_size * config.num_warps)  # runs of a thread, S sums each
        few = held <= min(2, max(1, 32 // p.window[2]))
        return few and _row_tile_fits(p, config, device, _dense_run(p, p.output[2]))
    rows = p.N * p.output[0] * p.output[1]
    return (config.num_warps == 1 or config.BLOCK_M < 2 * rows) and _tile_fits(p, config, device, 1, most=8)


# --- bytes moved: by the formulas at the heads of the kernels, less what lies outside the image -----------------------


def _moved_forward(p: ConvProblem, config: Config) -> float:
    filters = p.K * p.geometry.groups
    weights = _programs(p, config) * p.taps * p.C
    if "BLOCK_Q" in config:
        run = _dense_run(p)
        read = p.N * _hits(p, 0) * _hits(p, 1) * _columns(p, run) * p.C * filters
    else:
        if _is_flat(p):
            p = _upright(p)
        weights *= min(config.BLOCK_C, filters)
        read = p.N * _hits(p, 0) * _rows(p, config.ROWS) * _hits(p, 2) * p.C * p.geometry.groups
    return float((read + p.pixels * filters) * p.itemsize + 4 * weights)


def _moved_transpose(p: ConvProblem, config: Config) -> float:
    if p.geometry.parities == 1:
        return _moved_forward(_turned(p), config)
    channels, unit_c = p.C * p.geometry.groups, "BLOCK_Q" not in config
    inputs = math.prod(
        sum(_inside(size, -i, 1, blocks) for i in {block_input(tap, *shape) for tap in range(taps)})
        for size, blocks, taps, shape in (
            (p.output[axis], cost.cdiv(p.image[axis], p.geometry.stride[axis]), p.window[axis], _axis(p, axis))
            for axis in (1, 2)
        )
    )
    read = p.N * _hits(p, 0) * inputs * p.K * p.geometry.groups * (1 if unit_c else p.C)
    tiles = cost.cdiv(_blocks(p), config.BLOCK_M if unit_c else config.BLOCK_P * config.BLOCK_Q)
    return float((read + p.image_pixels * channels) * p.itemsize + 4 * tiles * p.taps * p.K * channels)


def _moved_weight_grad(p: ConvProblem, config: Config) -> float:
    filters, (t, r, s) = p.K * p.geometry.groups, p.window
    weights = filters * p.taps
    if "BLOCK_Q" in config:
        run = _dense_run(p, p.output[2])
        splits = _rows_splits(p, config, run)
        read = p.N * _hits(p, 0) * _hits(p, 1) * _columns(p, run) * filters + p.pixels * filters * t * r
    else:
        splits, columns = _splits(p, config)
        parts = cost.cdiv(p.output[2], columns)
        stride, _, dil = _axis(p, 2)
        taps = equal_block(s, MAX_ROWS.value)
        new = min(taps, stride // dil if stride % dil == 0 else taps)
        seen = parts * (taps - new) + p.output[2] * new
        blocks = cost.cdiv(s, taps)
        x = p.N * _hits(p, 0) * _hits(p, 1) * min(blocks * seen, _hits(p, 2)) * p.geometry.groups
        read = x + p.pixels * filters * t * r * blocks
        splits *= parts
    return float(read * p.itemsize + 8 * splits * weights + weights * p.itemsize)


def _axis(p: ConvProblem, axis: int) -> tuple[int, int, int]:
    """Stride, padding and dilation of depth (0), height (1) or width (2)."""
    return p.geometry.stride[axis], p.geometry.padding[axis], p.geometry.dilation[axis]


def _inside(size: int, start: int, stride: int, count: int) -> int:
    """How many of the ``count`` places ``-start + i * stride`` lie in [0, size)."""
    first = max(0, cost.cdiv(start, stride))
    last = min(count - 1, (size - 1 + start) // stride)
    return max(0, last - first + 1)


def _hits(p: ConvProblem, axis: int) -> int:
    """Pairs of an output and a tap that meet inside the image, along an axis."""
    stride, pad, dil = _axis(p, axis)
    return sum(_inside(p.image[axis], pad - tap * dil, stride, p.output[axis]) for tap in range(p.window[axis]))


def _rows(p: ConvProblem, rows: int) -> int:
    """Rows of x that are loaded for all rows of outputs."""
    stride, pad, dil = _axis(p, 1)
    window, blocks = p.window[1], cost.cdiv(p.output[1], rows)
    block = equal_block(window, MAX_ROWS.value)
    return sum(
        _inside(p.image[1], pad - j, rows * stride, blocks)
        for first in range(0, window, block)
        for j in range((rows - 1) * stride + (window - 1) * dil + 1)
        if reads_row(j, rows, first, block, window, stride, dil)
    )


def _columns(p: ConvProblem, run: int) -> int:
    """Columns of x that are loaded for all runs of a row of outputs."""
    stride, pad, dil = _axis(p, 2)
    window, runs = p.window[2], cost.cdiv(p.output[2], run)
    return sum(
        _inside(p.image[2], -(i * run + lane), stride * run, runs)
        for i in range(first_run(run, pad), last_run(run, window, stride, pad, dil) + 1)
        for lane in range(run)
        if reads_run(i, run, window, stride, pad, dil)
    )


def _blocks(p: ConvProblem) -> int:
    """Blocks of pixels that the transpose writes."""
    _, stride_h, stride_w = p.geometry.stride
    return p.N * p.image[0] * cost.cdiv(p.image[1], stride_h) * cost.cdiv(p.image[2], stride_w)


def _programs(p: ConvProblem, config: Config) -> int:
    """Of the forward pass."""
    filters = p.K * p.geometry.groups
    if "BLOCK_Q" in config:
        tiles = cost.cdiv(p.output[2], _dense_run(p) * config.BLOCK_Q) * cost.cdiv(p.output[1], config.BLOCK_P)
        return p.N * filters * p.output[0] * tiles
    if _is_flat(p):
        p = _upright(p)
    positions = p.N * p.output[0] * cost.cdiv(p.output[1], config.ROWS) * p.output[2]
    return cost.cdiv(positions, config.BLOCK_M) * cost.cdiv(filters, config.BLOCK_C)


def _stream(
    p: ConvProblem, config: Config, device: DeviceSpec, *, programs: int, results: int, tile: int, issued: float,
    partial: float = 0.0,
) -> Estimate:  # fmt: skip
    """``results``: elements that the grid sums at a time, ``tile`` of them in a program."""
    if "BLOCK_C" in config:
        issued *= max(1.0, 32 / (config.BLOCK_C * p.itemsize))  # the cache hands out 32 bytes at least
    return cost.stream(
        device,
        programs=programs,
        issued_bytes=issued,
        dram_bytes=p.minimal_bytes() + partial,
        config=config,
        tile_bytes=tile * p.itemsize,
        waste=max(1.0, programs * tile / max(1, results)),
        flops=p.flops,
    )


def _tile(p: ConvProblem, config: Config, run: int) -> int:
    return config.BLOCK_P * config.BLOCK_Q * run if "BLOCK_Q" in config else config.BLOCK_M * config.BLOCK_C


def _forward_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    results = p.pixels * p.K * p.geometry.groups
    rows = config.get("ROWS", 1)
    return _stream(
        p, config, device, programs=_programs(p, config), results=cost.cdiv(results, rows),
        tile=_tile(p, config, _dense_run(p)), issued=_moved_forward(p, config),
    )  # fmt: skip


def _transpose_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    if p.geometry.parities == 1:
        return _forward_estimate(_turned(p), config, device)
    channels, tile = p.C * p.geometry.groups, _tile(p, config, 1)
    block_c = config.get("BLOCK_C", 1)
    programs = cost.cdiv(_blocks(p), tile // block_c) * cost.cdiv(channels, block_c)
    return _stream(
        p, config, device, programs=programs, results=_blocks(p) * channels, tile=tile,
        issued=_moved_transpose(p, config),
    )  # fmt: skip


def _weight_grad_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    filters, (t, r, s) = p.K * p.geometry.groups, p.window
    run = _dense_run(p, p.output[2])
    if "BLOCK_Q" in config:
        splits, columns = _rows_splits(p, config, run), filters
        sides = ((p.output[1], config.BLOCK_P), (cost.cdiv(p.output[2], run), config.BLOCK_Q))
    else:
        splits, width = _splits(p, config)
        splits *= cost.cdiv(p.output[2], width)
        columns = cost.cdiv(filters, config.BLOCK_C)
        sides = ((p.N * p.output[0] * p.output[1], config.BLOCK_M),)
    programs = splits * columns * t * r * (1 if "BLOCK_Q" in config else cost.cdiv(s, MAX_ROWS.value))
    waste = math.prod(cost.cdiv(size, lanes) * lanes / max(1, size) for size, lanes in sides)
    return cost.stream(
        device,
        programs=programs,
        issued_bytes=_moved_weight_grad(p, config),
        dram_bytes=p.minimal_bytes() + 8.0 * splits * filters * p.taps,
        config=config,
        tile_bytes=_tile(p, config, run) * p.itemsize,
        waste=waste * (columns * config.get("BLOCK_C", 1)) / filters,
        flops=p.flops,
    )


def _due_load_bytes(p: ConvProblem) -> int:
    """A load goes over the channels of neighbouring groups."""
    return due_load_bytes(p, p.geometry.groups)


def _forward_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_forward(p, config, x, w.float(), y, Epilogue(bias=w.new_empty(y.shape[1]), activation="relu"))


def _transpose_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_transpose(p, config, y, w.float(), x, Epilogue(bias=w.new_empty(x.shape[1])))


def _weight_grad_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_weight_grad(p, config, x, y, w)


FORWARD = register(
    Tunable(
        "conv_direct", CONFIGS, features, _forward_accepts, _forward_estimate, _forward_launches,
        moved_bytes=_moved_forward, due_load_bytes=_due_load_bytes,
    )
)  # fmt: skip
TRANSPOSE = register(
    Tunable(
        "conv_direct_transpose", CONFIGS, features, _transpose_accepts, _transpose_estimate, _transpose_launches,
        moved_bytes=_moved_transpose, due_load_bytes=_due_load_bytes,
    )
)  # fmt: skip
WEIGHT_GRAD = register(
    Tunable(
        "conv_direct_weight_grad", WEIGHT_GRAD_CONFIGS, features, _weight_grad_accepts, _weight_grad_estimate,
        _weight_grad_launches, moved_bytes=_moved_weight_grad, due_load_bytes=_due_load_bytes,
    )
)  # fmt: skip


# --- calls -----------------------------------------------------------------------------------------------------------


def _laid_as(t: torch.Tensor, is_channels_last: bool) -> torch.Tensor:
    """The tensor itself if it can be read in place beside a result of that layout, else a copy."""
    if is_channels_last:
        return channels_last(t)
    return readable(t, dense=t.stride(1) == 1 and t.stride(-1) != 1)


def _widened(weight: torch.Tensor) -> torch.Tensor:
    """The weights dense, in fp32: converting them once here spares every program that."""
    return torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(weight)


def run_forward(
    x: torch.Tensor, weight: torch.Tensor, output: Sequence[int], geometry: Geometry, *, precision: str = "ieee",
    is_channels_last: bool = False, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, activation: str = "none", save_input: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """y, and with ``save_input`` also what the activation was applied to."""
    y, epilogue = prepare(
        x, (x.shape[0], weight.shape[0], *output), is_channels_last, bias=bias, scale=scale, residual=residual,
        activation=activation, save_input=save_input,
    )  # fmt: skip
    problem = problem_of(x.shape, weight.shape, output, geometry, x.dtype, precision, is_channels_last)
    packed = _widened(weight.movedim((1, 0), (-2, -1)))  # [*window, C, K * GROUPS]
    launch(FORWARD, plan_forward, problem, _laid_as(x, is_channels_last), packed, y, epilogue)
    return y, epilogue.saved


def run_transpose(
    g: torch.Tensor, weight: torch.Tensor, image: Sequence[int], geometry: Geometry, *, precision: str = "ieee",
    is_channels_last: bool = False, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, activation: str = "none", save_input: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """x [N, C, *image] from g [N, K, *output], and with ``save_input`` also what the activation was applied to."""
    x, epilogue = prepare(
        g, (g.shape[0], weight.shape[1] * geometry.groups, *image), is_channels_last, bias=bias, scale=scale,
        residual=residual, activation=activation, save_input=save_input,
    )  # fmt: skip
    problem = problem_of(x.shape, weight.shape, g.shape[2:], geometry, g.dtype, precision, is_channels_last)
    grouped = weight.unflatten(0, (geometry.groups, problem.K))
    packed = _widened(grouped.movedim((1, 0, 2), (-3, -2, -1)))  # [*window, K, GROUPS, C]
    launch(TRANSPOSE, plan_transpose, problem, _laid_as(g, is_channels_last), packed, x, epilogue)
    return x, epilogue.saved


def run_weight_grad(
    x: torch.Tensor, g: torch.Tensor, weight_shape: Sequence[int], geometry: Geometry, *,
    precision: str = "ieee", is_channels_last: bool = False,
) -> torch.Tensor:  # fmt: skip
    """dw; with one channel a group it has one layout, and the kernel's is that of x."""
    dw = empty(x, weight_shape, is_channels_last)
    unit_channels = x.stride(1) == 1
    problem = problem_of(x.shape, weight_shape, g.shape[2:], geometry, x.dtype, precision, unit_channels)
    launch(WEIGHT_GRAD, plan_weight_grad, problem, x, _laid_as(g, unit_channels), dw)
    return dw
