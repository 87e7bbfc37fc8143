r"""Convolution without matrix products, for groups of 1, 2, 4 or 8 channels: depthwise, multipliers, small groups.

    y[n,k,z,p,q] = act(scale[k] * sum_{c,t,r,s} x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H,
                                                  q*STRIDE_W - PAD_W + s*DIL_W] * w[k,c,t,r,s]
                       + bias[k] + residual[n,k,z,p,q])

The letters are those of :mod:`.conv`: C and K count the channels and the filters of one group. A group has so few
channels that tensor cores would multiply mostly padding, so here every product is one fp32 multiply-add (FMA).

This file plans the launches, registers the kernels with the tuner and, for the operators, calls them; it also holds
their configs. The formula and the bytes of each pass are at the head of the file that computes it:

    conv_direct_tiles.py          tiles in registers, and what follows from the window
    conv_direct_forward.py        forward, and the transpose with strides of 1
    conv_direct_transpose.py      transpose with a stride above 1
    conv_direct_weight_grad.py    gradient of the weights, for groups of one channel

Problems, results and the epilogue are those of :mod:`.conv_problem` and :mod:`.conv_epilogue`, strides those of
:mod:`.conv_windows`. The same call gives the same bits: each element is written by one program, and a second kernel
adds the partial sums of the weight gradient in order. No atomics.
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
from .conv import result_and_epilogue, sum_splits_launch
from .conv_direct_forward import direct_kernel, direct_rows_kernel
from .conv_direct_tiles import MAX_ROWS, equal_block, first_run, last_run, reads_row, reads_run
from .conv_direct_transpose import cell_input, direct_transpose_kernel
from .conv_direct_weight_grad import direct_rows_weight_grad_kernel, direct_weight_grad_kernel
from .conv_problem import ConvProblem, Epilogue, Geometry, channels_last, meta_tensors, problem_of
from .conv_space import due_load_bytes, features
from .conv_windows import X_STRIDES, Y_STRIDES

CHANNELS = (1, 2, 4, 8)  # channels of a group, and filters of a group, for which the kernels are written
# The transpose is unrolled over the pixels of a cell and over the products that a channel sums in it. More of them than
# this would take long to compile.
MAX_CELL, MAX_PRODUCTS = 16, 256


# --- launchers -------------------------------------------------------------------------------------------------------


def takes(weight_shape: Sequence[int], stride: Sequence[int], groups: int) -> bool:
    """Do these kernels compute this convolution, and its transpose? They take those where few channels meet in a
    group."""
    filters, channels, *window = weight_shape
    filters //= groups
    outputs, products = _cell_outputs_and_products(stride, window, filters)
    fits = math.prod(stride) == 1 or (outputs <= MAX_CELL and products <= MAX_PRODUCTS)
    return groups > 1 and channels in CHANNELS and filters in CHANNELS and fits


def _cell_outputs_and_products(stride: Sequence[int], window: Sequence[int], filters: int) -> tuple[int, int]:
    """The pixels of a cell of the transpose, and the products that one channel sums in a cell. The kernel is unrolled
    over both."""
    return math.prod(stride[-2:]), math.prod(window[-2:]) * filters


def _turned_problem(p: ConvProblem) -> ConvProblem:
    """The convolution that equals the transpose of ``p`` where every stride is 1. Its taps are those of ``p`` in
    reverse order."""
    g = p.geometry
    padding = tuple(dil * (taps - 1) - pad for dil, taps, pad in zip(g.dilation, p.window, g.padding, strict=True))
    return p._replace(C=p.K, K=p.C, image=p.output, output=p.image, geometry=g._replace(padding=padding))


def _exchanged_axes(p: ConvProblem) -> ConvProblem:
    """The same problem with height and width exchanged. So the outputs of a one-dimensional convolution lie below one
    another, and the kernel computes ROWS of them together, which share their loads."""
    sizes = (p.image, p.window, p.output, *p.geometry[:3])
    image, window, output, *geometry = ((depth, width, height) for depth, height, width in sizes)
    return p._replace(image=image, window=window, output=output, geometry=Geometry(*geometry, p.geometry.groups))


def _has_one_row(p: ConvProblem) -> bool:
    """Have image, window and output a height of 1, as in one dimension?"""
    return p.image[1] == p.window[1] == p.output[1] == 1 and p.geometry.stride[1] == 1


def _run_length(itemsize: int, *alignments: int) -> int:
    """RUN, how many neighbouring outputs a thread sums: as many elements as every row starts on a multiple of. Where
    the rows are not aligned at all it is 16 bytes all the same. Then each thread loads single elements, and threads
    exchange them through shared memory, which takes half the instructions of a load for every tap."""
    alignment = min(alignments)
    return 16 // itemsize if alignment == 1 else max(1, alignment)


def _window_constants(p: ConvProblem) -> dict[str, int]:
    """The constexpr arguments that describe the window and the groups."""
    return {"GROUPS": p.geometry.groups, **dict(zip("TRS", p.window, strict=True)), **p.geometry.constants()}


def plan_forward(
    p: ConvProblem, config: Config, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, epilogue: Epilogue,
    turned: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launch of y from x, in the layout of y, and w, dense fp32 [T, R, S, C, K * GROUPS]. With ``turned`` the taps
    of w come in reverse order."""
    operands = {
        "x_ptr": x, "w_ptr": w, "scale_ptr": epilogue.scale, "bias_ptr": epilogue.bias,
        "residual_ptr": epilogue.residual, "y_ptr": y, "saved_ptr": epilogue.saved,
    }  # fmt: skip
    constants = {"C": p.C, "K": p.K, "TURNED": turned, "ACTIVATION": epilogue.activation}
    if "BLOCK_Q" in config:
        xs, ys = raw_strides(x), raw_strides(y)
        run = _run_length(p.itemsize, row_alignment(x))
        x_vec, y_vec = (unit_divisor(run, max(1, row_alignment(t))) for t in (x, y))
        xs = [*(stride // x_vec for stride in xs[:4]), xs[4]]
        ys = [stride // y_vec for stride in ys[:4]]
        tiles = cost.cdiv(p.output[2], run * config.BLOCK_Q) * cost.cdiv(p.output[1], config.BLOCK_P)
        sizes = {**p.sizes(), "rows": p.window[0] * p.window[1] * p.C}
        args = {**operands, **sizes, **_by_name(X_STRIDES, xs), **_by_name(Y_STRIDES[:4], ys)}
        constants |= {**_window_constants(p), "X_VEC": x_vec, "Y_VEC": y_vec, "RUN": run, **config.constants()}
        grid = p.N * p.K * p.geometry.groups * p.output[0] * tiles
        return [Launch(direct_rows_kernel, grid, args, constants, config.num_warps, config.num_stages)]
    x_vec, _, xs = layout_strides(x, p.C * p.geometry.groups)
    y_vec, _, ys = layout_strides(y)
    if _has_one_row(p):
        p, xs, ys = _exchanged_axes(p), [*xs[:3], xs[4], xs[3]], [*ys[:3], ys[4], ys[3]]
    positions = p.N * p.output[0] * cost.cdiv(p.output[1], config.ROWS) * p.output[2]
    args = {
        **operands, "M": positions, **p.sizes(), "columns": p.window[0] * p.window[2],
        **_by_name(X_STRIDES, xs), **_by_name(Y_STRIDES, ys),
    }  # fmt: skip
    del args["stride_xc"], args["stride_yk"]
    constants |= {**_window_constants(p), "RANK": p.rank, "X_VEC": x_vec, "Y_VEC": y_vec, **config.constants()}
    grid = cost.cdiv(positions, config.BLOCK_M) * cost.cdiv(p.K * p.geometry.groups, config.BLOCK_C)
    return [Launch(direct_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def plan_transpose(
    p: ConvProblem, config: Config, g: torch.Tensor, w: torch.Tensor, x: torch.Tensor, epilogue: Epilogue
) -> list[Launch]:
    """The launch of x, the result, from g, in the layout of x, and w, dense fp32 [T, R, S, K, C * GROUPS]."""
    if p.geometry.parities == 1:
        return plan_forward(_turned_problem(p), config, g, w, x, epilogue, turned=True)
    unit_c = "BLOCK_Q" not in config
    block_m, block_c = (config.BLOCK_M, config.BLOCK_C) if unit_c else (config.BLOCK_P * config.BLOCK_Q, 1)
    if unit_c:
        g_vec, _, gs = layout_strides(g, p.K * p.geometry.groups)
        x_vec, _, xs = layout_strides(x)
    else:
        g_vec, gs, x_vec, xs = 1, raw_strides(g), 1, raw_strides(x)
    cells = _cell_count(p)
    args = {
        "g_ptr": g, "w_ptr": w, "scale_ptr": epilogue.scale, "bias_ptr": epilogue.bias,
        "residual_ptr": epilogue.residual, "x_ptr": x, "saved_ptr": epilogue.saved,
        "M": cells, **p.sizes(), **_by_name(Y_STRIDES, gs), **_by_name(X_STRIDES, xs),
    }  # fmt: skip
    constants = {
        "C": p.C, "K": p.K, **_window_constants(p), "RANK": p.rank, "G_VEC": g_vec, "X_VEC": x_vec, "UNIT_C": unit_c,
        "ACTIVATION": epilogue.activation, "BLOCK_M": block_m, "BLOCK_C": block_c,
    }  # fmt: skip
    grid = cost.cdiv(cells, block_m) * cost.cdiv(p.C * p.geometry.groups, block_c)
    return [Launch(direct_transpose_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def plan_weight_grad(
    p: ConvProblem, config: Config, x: torch.Tensor, g: torch.Tensor, dw: torch.Tensor
) -> list[Launch]:
    """The launches of dw, dense [K * GROUPS, 1, T, R, S], from x and g, both in one layout."""
    filters = p.K * p.geometry.groups
    operands = {"x_ptr": x, "g_ptr": g}
    constants = {"K": p.K, **_window_constants(p)}
    if "BLOCK_Q" in config:
        xs, gs = raw_strides(x), raw_strides(g)
        run = _run_length(p.itemsize, row_alignment(x), row_alignment(g))
        x_vec, g_vec = (unit_divisor(run, max(1, row_alignment(t))) for t in (x, g))
        xs = [*(stride // x_vec for stride in xs[:4]), xs[4]]
        gs = [*(stride // g_vec for stride in gs[:4]), gs[4]]
        splits = _row_split_count(p, config, run)
        partial = torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
        args = {
            **operands, "partial_ptr": partial, "N": p.N, **p.sizes(), "splits": splits,
            **_by_name(X_STRIDES, xs), **_by_name(Y_STRIDES, gs),
        }  # fmt: skip
        constants |= {"X_VEC": x_vec, "G_VEC": g_vec, "RUN": run, "BLOCK_P": config.BLOCK_P, "BLOCK_Q": config.BLOCK_Q}
        grid = p.window[0] * p.window[1] * filters * splits
        main = Launch(direct_rows_weight_grad_kernel, grid, args, constants, config.num_warps, config.num_stages)
        return [main, sum_splits_launch(partial, dw)]
    x_vec, _, xs = layout_strides(x, p.geometry.groups)
    y_vec, _, gs = layout_strides(g)
    splits, run = _split_count_and_columns(p, config)
    parts = splits * cost.cdiv(p.output[2], run)
    partial = torch.empty((parts, dw.numel()), dtype=torch.float32, device=x.device)
    args = {
        **operands, "partial_ptr": partial, "M": p.N * p.output[0] * p.output[1], **p.sizes(), "splits": splits,
        "run": run, **_by_name(X_STRIDES, xs), **_by_name(Y_STRIDES, gs),
    }  # fmt: skip
    del args["stride_xc"], args["stride_yk"]
    constants |= {
        "RANK": p.rank, "X_VEC": x_vec, "Y_VEC": y_vec, "BLOCK_M": config.BLOCK_M, "BLOCK_C": config.BLOCK_C,
    }  # fmt: skip
    rows = p.window[0] * p.window[1] * cost.cdiv(p.window[2], MAX_ROWS.value)
    grid = rows * cost.cdiv(filters, config.BLOCK_C) * parts
    main = Launch(direct_weight_grad_kernel, grid, args, constants, config.num_warps, config.num_stages)
    return [main, sum_splits_launch(partial, dw)]


def _row_split_count(p: ConvProblem, config: Config, run: int) -> int:
    """How many programs share the tiles of one weight gradient in NCHW; ``run`` is RUN."""
    tiles = cost.cdiv(p.output[2], run * config.BLOCK_Q) * cost.cdiv(p.output[1], config.BLOCK_P)
    # A program has at least 4 tiles, since at its end it must reduce its sums over the threads and store them.
    return max(1, min(config.SPLIT_M, p.N * p.output[0] * tiles // 4))


def _split_count_and_columns(p: ConvProblem, config: Config) -> tuple[int, int]:
    """Into how many splits the rows of outputs are cut, and into stretches of how many columns each row is cut. Rows
    are cut where there are too few of them for SPLIT_M splits; a stretch has at least four times as many columns as the
    window."""
    splits = max(1, min(config.SPLIT_M, cost.cdiv(p.N * p.output[0] * p.output[1], config.BLOCK_M)))
    runs = min(cost.cdiv(config.SPLIT_M, splits), cost.cdiv(p.output[2], 4 * p.window[2]))
    return splits, cost.cdiv(p.output[2], max(1, runs))


def _by_name(names: Sequence[str], values: Sequence[int]) -> dict[str, int]:
    """Run-time arguments by their names."""
    return dict(zip(names, values, strict=True))


# --- configs ---------------------------------------------------------------------------------------------------------

_TILES = (
    # BLOCK_M, BLOCK_C, warps. Channels last, a thread holds 8 elements of the tile, 16 bytes of 16-bit channels, with
    # warps of 32 threads;
    (16, 64, 4),
    (32, 32, 4),
    (8, 128, 4),
    (64, 16, 4),
    (128, 8, 4),
    (4, 64, 1),
    (8, 32, 1),
    (32, 8, 1),
    # the same with warps of 64 threads;
    (16, 64, 2),
    (32, 32, 2),
    (8, 128, 2),
    (64, 16, 2),
    (128, 8, 2),
    (8, 64, 1),
    (16, 32, 1),
    (64, 8, 1),
    # fewer elements: for 32-bit channels, and where a thread holds several channels of a group or a cell for each.
    (8, 64, 4),
    (16, 32, 4),
    (32, 16, 4),
    (64, 8, 4),
    (8, 32, 4),
    (32, 8, 4),
    (16, 8, 1),
)

# BLOCK_P, BLOCK_Q, warps. In NCHW a tile is BLOCK_P rows by BLOCK_Q runs of outputs.
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
_NARROW_TILES = ((2, 128, 1), (1, 256, 1), (1, 512, 1))  # for few rows of outputs, as in one dimension
WEIGHT_GRAD_CONFIGS = tuple(
    config(*tile, SPLIT_M=splits)
    for splits in (16, 64, 256, 1)
    for config, tiles in ((_config, (*_TILES, *_NARROW_TILES)), (_row_config, _ROW_TILES))
    for tile in tiles
)


def _dense_run_length(p: ConvProblem, *others: int) -> int:
    """RUN where x, and tensors of the widths ``others``, are dense."""
    return _run_length(p.itemsize, unit_divisor(16 // p.itemsize, p.image[2], *others))


def _tile_fits(p: ConvProblem, config: Config, device: DeviceSpec, results: int, most: int = 16) -> bool:
    """Does each thread load at least 16 bytes, and has it registers for its sums? An element of the tile stands for
    ``results`` outputs, and a thread may hold at most ``most`` elements of the tile."""
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
    """Has each thread at least one run, and is the tile, unless it is a smallest one, less than twice as large as a
    plane of outputs in both dimensions?"""
    size, runs = config.BLOCK_P * config.BLOCK_Q, cost.cdiv(p.output[2], run)
    fits = config.BLOCK_P == 1 or config.BLOCK_P < 2 * p.output[1] or size <= device.warp_size
    return size >= device.warp_size * config.num_warps and config.BLOCK_Q < 2 * runs and fits


def _forward_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if p.channels_last == ("BLOCK_Q" in config):
        return False
    if not p.channels_last:
        return _row_tile_fits(p, config, device, _dense_run_length(p))
    rows = (_exchanged_axes(p) if _has_one_row(p) else p).output[1]
    return (config.ROWS == 1 or config.ROWS <= rows) and _tile_fits(p, config, device, config.ROWS)


def _transpose_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if p.geometry.parities == 1:
        return _forward_accepts(_turned_problem(p), config, device)
    if p.channels_last == ("BLOCK_Q" in config):
        return False
    outputs, products = _cell_outputs_and_products(p.geometry.stride, p.window, p.K)
    if not p.channels_last:
        threads = device.warp_size * config.num_warps
        return config.BLOCK_P == 1 and config.BLOCK_Q <= max(1, 32 // outputs) * threads
    swapped = p._replace(C=p.K, K=p.C)
    # The more products are unrolled, the more weights the compiler loads ahead into registers.
    most = 8 if products <= 40 else 4 if products <= 100 else 2
    return config.ROWS == 1 and _tile_fits(swapped, config, device, outputs, most)


def _weight_grad_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if p.channels_last == ("BLOCK_Q" in config):
        return False
    if not p.channels_last:
        held = config.BLOCK_P * config.BLOCK_Q / (device.warp_size * config.num_warps)  # runs of a thread
        few = held <= min(2, max(1, 32 // p.window[2]))  # because each run takes S sums
        return few and _row_tile_fits(p, config, device, _dense_run_length(p, p.output[2]))
    rows = p.N * p.output[0] * p.output[1]
    return (config.num_warps == 1 or config.BLOCK_M < 2 * rows) and _tile_fits(p, config, device, 1, most=8)


# --- bytes moved, by the formulas at the heads of the kernels, less what lies outside the image ----------------------


def _moved_forward(p: ConvProblem, config: Config) -> float:
    filters = p.K * p.geometry.groups
    weights = _program_count(p, config) * p.taps * p.C
    if "BLOCK_Q" in config:
        run = _dense_run_length(p)
        read = p.N * _pairs(p, 0) * _pairs(p, 1) * _loaded_columns(p, run) * p.C * filters
    else:
        if _has_one_row(p):
            p = _exchanged_axes(p)
        weights *= min(config.BLOCK_C, filters)
        read = p.N * _pairs(p, 0) * _loaded_rows(p, config.ROWS) * _pairs(p, 2) * p.C * p.geometry.groups
    return float((read + p.pixels * filters) * p.itemsize + 4 * weights)


def _moved_transpose(p: ConvProblem, config: Config) -> float:
    if p.geometry.parities == 1:
        return _moved_forward(_turned_problem(p), config)
    channels, unit_c = p.C * p.geometry.groups, "BLOCK_Q" not in config
    inputs = math.prod(
        sum(_count_inside(size, -i, 1, blocks) for i in {cell_input(tap, *shape) for tap in range(taps)})
        for size, blocks, taps, shape in (
            (p.output[axis], cost.cdiv(p.image[axis], p.geometry.stride[axis]), p.window[axis], _axis_geometry(p, axis))
            for axis in (1, 2)
        )
    )
    read = p.N * _pairs(p, 0) * inputs * p.K * p.geometry.groups * (1 if unit_c else p.C)
    tiles = cost.cdiv(_cell_count(p), config.BLOCK_M if unit_c else config.BLOCK_P * config.BLOCK_Q)
    return float((read + p.image_pixels * channels) * p.itemsize + 4 * tiles * p.taps * p.K * channels)


def _moved_weight_grad(p: ConvProblem, config: Config) -> float:
    filters, (t, r, s) = p.K * p.geometry.groups, p.window
    weights = filters * p.taps
    if "BLOCK_Q" in config:
        run = _dense_run_length(p, p.output[2])
        splits = _row_split_count(p, config, run)
        read = p.N * _pairs(p, 0) * _pairs(p, 1) * _loaded_columns(p, run) * filters + p.pixels * filters * t * r
    else:
        splits, columns = _split_count_and_columns(p, config)
        parts = cost.cdiv(p.output[2], columns)
        stride, _, dil = _axis_geometry(p, 2)
        taps = equal_block(s, MAX_ROWS.value)
        new = min(taps, stride // dil if stride % dil == 0 else taps)
        seen = parts * (taps - new) + p.output[2] * new
        blocks = cost.cdiv(s, taps)
        x = p.N * _pairs(p, 0) * _pairs(p, 1) * min(blocks * seen, _pairs(p, 2)) * p.geometry.groups
        read = x + p.pixels * filters * t * r * blocks
        splits *= parts
    return float(read * p.itemsize + 8 * splits * weights + weights * p.itemsize)


def _axis_geometry(p: ConvProblem, axis: int) -> tuple[int, int, int]:
    """The stride, padding and dilation in depth (axis 0), height (1) or width (2)."""
    return p.geometry.stride[axis], p.geometry.padding[axis], p.geometry.dilation[axis]


def _count_inside(size: int, start: int, stride: int, count: int) -> int:
    """How many of the ``count`` places ``-start + i * stride`` lie in [0, size)."""
    first = max(0, cost.cdiv(start, stride))
    last = min(count - 1, (size - 1 + start) // stride)
    return max(0, last - first + 1)


def _pairs(p: ConvProblem, axis: int) -> int:
    """How many pairs of an output and a tap read inside the image, along one axis."""
    stride, pad, dil = _axis_geometry(p, axis)
    return sum(_count_inside(p.image[axis], pad - tap * dil, stride, p.output[axis]) for tap in range(p.window[axis]))


def _loaded_rows(p: ConvProblem, rows: int) -> int:
    """How many rows of x are loaded for one plane of outputs, ``rows`` of whose rows are summed together."""
    stride, pad, dil = _axis_geometry(p, 1)
    window, blocks = p.window[1], cost.cdiv(p.output[1], rows)
    block = equal_block(window, MAX_ROWS.value)
    return sum(
        _count_inside(p.image[1], pad - j, rows * stride, blocks)
        for first in range(0, window, block)
        for j in range((rows - 1) * stride + (window - 1) * dil + 1)
        if reads_row(j, rows, first, block, window, stride, dil)
    )


def _loaded_columns(p: ConvProblem, run: int) -> int:
    """How many columns of x are loaded for one row of outputs, by runs of ``run`` columns."""
    stride, pad, dil = _axis_geometry(p, 2)
    window, runs = p.window[2], cost.cdiv(p.output[2], run)
    return sum(
        _count_inside(p.image[2], -(i * run + lane), stride * run, runs)
        for i in range(first_run(run, pad), last_run(run, window, stride, pad, dil) + 1)
        for lane in range(run)
        if reads_run(i, run, window, stride, pad, dil)
    )


def _cell_count(p: ConvProblem) -> int:
    """How many cells of pixels the transpose computes, in all images and planes."""
    _, stride_h, stride_w = p.geometry.stride
    return p.N * p.image[0] * cost.cdiv(p.image[1], stride_h) * cost.cdiv(p.image[2], stride_w)


def _program_count(p: ConvProblem, config: Config) -> int:
    """How many programs forward has."""
    filters = p.K * p.geometry.groups
    if "BLOCK_Q" in config:
        tiles = cost.cdiv(p.output[2], _dense_run_length(p) * config.BLOCK_Q) * cost.cdiv(p.output[1], config.BLOCK_P)
        return p.N * filters * p.output[0] * tiles
    if _has_one_row(p):
        p = _exchanged_axes(p)
    positions = p.N * p.output[0] * cost.cdiv(p.output[1], config.ROWS) * p.output[2]
    return cost.cdiv(positions, config.BLOCK_M) * cost.cdiv(filters, config.BLOCK_C)


def _stream(
    p: ConvProblem, config: Config, device: DeviceSpec, *, programs: int, results: int, tile: int, issued: float,
    partial: float = 0.0,
) -> Estimate:  # fmt: skip
    """The estimated time of a kernel that memory bounds. ``results`` counts the elements of all tiles that are results,
    ``tile`` the elements of one tile, ``issued`` the bytes that load and store instructions move."""
    if "BLOCK_C" in config:
        issued *= max(1.0, 32 / (config.BLOCK_C * p.itemsize))  # a cache serves at least 32 bytes
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


def _tile_elements(p: ConvProblem, config: Config, run: int) -> int:
    """How many elements a tile has."""
    return config.BLOCK_P * config.BLOCK_Q * run if "BLOCK_Q" in config else config.BLOCK_M * config.BLOCK_C


def _forward_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    results = p.pixels * p.K * p.geometry.groups
    rows = config.get("ROWS", 1)
    return _stream(
        p, config, device, programs=_program_count(p, config), results=cost.cdiv(results, rows),
        tile=_tile_elements(p, config, _dense_run_length(p)), issued=_moved_forward(p, config),
    )  # fmt: skip


def _transpose_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    if p.geometry.parities == 1:
        return _forward_estimate(_turned_problem(p), config, device)
    channels, tile = p.C * p.geometry.groups, _tile_elements(p, config, 1)
    block_c = config.get("BLOCK_C", 1)
    programs = cost.cdiv(_cell_count(p), tile // block_c) * cost.cdiv(channels, block_c)
    return _stream(
        p, config, device, programs=programs, results=_cell_count(p) * channels, tile=tile,
        issued=_moved_transpose(p, config),
    )  # fmt: skip


def _weight_grad_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    filters, (t, r, s) = p.K * p.geometry.groups, p.window
    run = _dense_run_length(p, p.output[2])
    if "BLOCK_Q" in config:
        splits, columns = _row_split_count(p, config, run), filters
        sides = ((p.output[1], config.BLOCK_P), (cost.cdiv(p.output[2], run), config.BLOCK_Q))
    else:
        splits, width = _split_count_and_columns(p, config)
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
        tile_bytes=_tile_elements(p, config, run) * p.itemsize,
        waste=waste * (columns * config.get("BLOCK_C", 1)) / filters,
        flops=p.flops,
    )


def _due_load_bytes(p: ConvProblem) -> int:
    """How many bytes each load must take; a load reads channels of neighbouring groups together."""
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


# --- calls: allocate, look up the config, launch ---------------------------------------------------------------------


def _in_layout(t: torch.Tensor, is_channels_last: bool) -> torch.Tensor:
    """``t`` itself where the kernels for results of that layout can read it in place, else a copy."""
    if is_channels_last:
        return channels_last(t)
    return readable(t, dense=t.stride(1) == 1 and t.stride(-1) != 1)


def _dense_fp32(weight: torch.Tensor) -> torch.Tensor:
    """The weights as a dense fp32 tensor. They are converted here once, so that no program converts them."""
    return torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(weight)


def run_forward(
    x: torch.Tensor, weight: torch.Tensor, output: Sequence[int], geometry: Geometry, *, precision: str = "ieee",
    is_channels_last: bool = False, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, activation: str = "none", save_input: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """y, and with ``save_input`` also what the activation was applied to."""
    y, epilogue = result_and_epilogue(
        x, (x.shape[0], weight.shape[0], *output), is_channels_last, bias=bias, scale=scale, residual=residual,
        activation=activation, save_input=save_input,
    )  # fmt: skip
    problem = problem_of(x.shape, weight.shape, output, geometry, x.dtype, precision, is_channels_last)
    packed = _dense_fp32(weight.movedim((1, 0), (-2, -1)))  # [*window, C, K * GROUPS]
    launch(FORWARD, plan_forward, problem, _in_layout(x, is_channels_last), packed, y, epilogue)
    return y, epilogue.saved


def run_transpose(
    g: torch.Tensor, weight: torch.Tensor, image: Sequence[int], geometry: Geometry, *, precision: str = "ieee",
    is_channels_last: bool = False, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, activation: str = "none", save_input: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """x [N, C, *image] from g [N, K, *output], and with ``save_input`` also what the activation was applied to."""
    x, epilogue = result_and_epilogue(
        g, (g.shape[0], weight.shape[1] * geometry.groups, *image), is_channels_last, bias=bias, scale=scale,
        residual=residual, activation=activation, save_input=save_input,
    )  # fmt: skip
    problem = problem_of(x.shape, weight.shape, g.shape[2:], geometry, g.dtype, precision, is_channels_last)
    grouped = weight.unflatten(0, (geometry.groups, problem.K))
    packed = _dense_fp32(grouped.movedim((1, 0, 2), (-3, -2, -1)))  # [*window, K, GROUPS, C]
    launch(TRANSPOSE, plan_transpose, problem, _in_layout(g, is_channels_last), packed, x, epilogue)
    return x, epilogue.saved


def run_weight_grad(
    x: torch.Tensor, g: torch.Tensor, weight_shape: Sequence[int], geometry: Geometry, *,
    precision: str = "ieee", is_channels_last: bool = False,
) -> torch.Tensor:  # fmt: skip
    """dw, of ``weight_shape``. With one channel a group both layouts of dw are the same in memory, so the kernel is
    chosen by the layout of x."""
    dw = empty(x, weight_shape, is_channels_last)
    unit_channels = x.stride(1) == 1
    problem = problem_of(x.shape, weight_shape, g.shape[2:], geometry, x.dtype, precision, unit_channels)
    launch(WEIGHT_GRAD, plan_weight_grad, problem, x, _in_layout(g, unit_channels), dw)
    return dw
