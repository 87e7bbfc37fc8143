r"""Convolution of 1, 2 and 3 dimensions as implicit matrix products: forward, transpose, weight gradient.

    y[n,k,z,p,q] = act(scale[k] * sum_{c,t,r,s} x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H,
                                                  q*STRIDE_W - PAD_W + s*DIL_W] * w[k,c,t,r,s]
                       + bias[k] + residual[n,k,z,p,q])

The letters are those of the literature: N images, C input channels and K filters (output channels) *of one group*,
D x H x W input, T x R x S window, Z x P x Q output. Dimensions that a lower rank lacks have size 1. All sums are in
fp32, and each result is rounded once.

The transpose computes a tensor of x's shape from one of y's: the gradient of the input, and with the epilogue the
transposed convolution. The gradients of a convolution and of a transposed convolution are these three passes again. In
each pass a matrix product is computed by tiles, and each tile of an operand is gathered from the image when it is
needed, so the matrix of all windows is never in memory.

This file plans the launches, registers the kernels with the tuner and, for the operators, calls them. The matrix
product and the bytes of each pass are at the head of the file that computes it:

    conv_windows.py        where the taps of a window lie, and in which units strides are passed
    conv_forward.py        forward, with addresses that threads compute, or by lines
    conv_transpose.py      transpose, one matrix product for each parity class
    conv_weight_grad.py    gradient of the weights
    conv_epilogue.py       epilogue and its gradient, sums of split reductions
    conv_problem.py        what a convolution is, and how its kernels read tensors
    conv_space.py          configs: which there are, which fit, what they move, how long they take

The same call gives the same bits: a split reduction writes partial sums, which a second kernel adds in order. No
atomics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..autotune import cost
from ..autotune.config import Config, Tunable, register
from ..autotune.layout import empty
from ._launch import Launch, descriptor, launch, layout_strides, readable, unit_divisor
from .conv_epilogue import epilogue_grad_kernel, reduce_splits_kernel, sum_splits_kernel
from .conv_forward import conv_kernel, conv_lines_kernel
from .conv_problem import (
    ConvProblem,
    Epilogue,
    EpilogueProblem,
    Geometry,
    channels_last,
    dense_layout,
    dot_precision,
    is_one_line,
    line_sizes,
    line_tiles,
    merged_groups,
    meta_tensors,
    pack_transposed_weight,
    pad_image,
    pad_problem,
    pad_weight,
    problem_of,
    transposed_weight_strides,
    triple,
    unpad_weight_grad,
)
from .conv_space import (
    EPILOGUE_CONFIGS,
    FORWARD_CONFIGS,
    TRANSPOSE_CONFIGS,
    WEIGHT_GRAD_CONFIGS,
    accepts_epilogue_grad,
    accepts_forward,
    accepts_transpose,
    accepts_weight_grad,
    due_load_bytes,
    due_load_bytes_epilogue_grad,
    due_load_bytes_weight_grad,
    epilogue_features,
    estimate_epilogue_grad,
    estimate_forward,
    estimate_transpose,
    estimate_weight_grad,
    features,
    moved_epilogue_grad,
    moved_forward,
    moved_transpose,
    moved_weight_grad,
    product_rows_forward,
    product_rows_transpose,
    product_rows_weight_grad,
)
from .conv_transpose import conv_transpose_kernel
from .conv_weight_grad import conv_weight_grad_kernel
from .conv_windows import SAVED_STRIDES, Y_STRIDES

# --- launchers -------------------------------------------------------------------------------------------------------


def plan_forward(
    p: ConvProblem, config: Config, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, epilogue: Epilogue
) -> list[Launch]:
    """The launches of y from x, channels last, and w, dense [K*GROUPS, T, R, S, C]."""
    if "TMA" in config:
        if _can_copy_boxes(x, w):
            return [_lines_launch(p, config, x, w, epilogue.arguments(y), turned=False)]
        config = _pointer_config(config, SWAP=0)
    groups, split = p.geometry.groups, config.SPLIT_K
    x_vec, _, (xn, _, xd, xh, xw) = layout_strides(x, p.C)
    tiles = cost.cdiv(p.pixels, config.BLOCK_M) * cost.cdiv(p.K, config.BLOCK_N)
    partial = None
    if split > 1:
        partial = torch.empty((split, p.pixels, p.K * groups), dtype=torch.float32, device=x.device)
    operands, constants = epilogue.arguments(y)
    main = Launch(
        conv_kernel,
        tiles * groups * split,
        {
            "x_ptr": x, "w_ptr": w, **operands, "partial_ptr": partial, "M": p.pixels, **p.sizes(), "splits": split,
            "stride_xn": xn, "stride_xd": xd, "stride_xh": xh, "stride_xw": xw,
        },
        {
            "C": p.C, "TAIL": p.tail, "K": p.K, "R": p.window[1], "S": p.window[2], "TAPS": p.taps, "GROUPS": groups,
            **p.geometry.constants(), "RANK": p.rank, "X_VEC": x_vec, **constants, "PRECISION": dot_precision(p),
            **_config_constants(config),
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return [main] if partial is None else [main, _reduce_launch(partial, epilogue, y)]


def _lines_launch(
    p: ConvProblem, config: Config, x: torch.Tensor, w: torch.Tensor, target: tuple[dict[str, Any], dict[str, Any]],
    turned: bool,
) -> Launch:  # fmt: skip
    """The launch of the kernel by lines. ``target`` holds the arguments and the constants of
    :meth:`Epilogue.arguments`."""
    groups, (m, n, k) = p.geometry.groups, (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    images, channels, *space = x.shape
    image = [images, *triple(space), channels]
    lines, length = line_sizes(p, turned)
    if is_one_line(p):
        image = [1, 1, 1, math.prod(image[:-1]), channels]
    weights = [w.shape[0], p.taps, w.shape[-1]]
    operands, constants = target
    constants["RUN"] = unit_divisor(constants["RUN"], length)
    c, columns, output = (p.K, p.C, p.image) if turned else (p.C, p.K, p.output)
    return Launch(
        conv_lines_kernel,
        line_tiles(p, m, turned) * cost.cdiv(columns, n) * groups,
        {
            "x_desc": descriptor(x, image, [1, 1, 1, m, k]),
            "w_desc": descriptor(w, weights, [k, 1, n] if turned else [n, 1, k]),
            **operands, "L": length, "lines": lines, **dict(zip("ZPQ", output, strict=True)),
        },
        {
            "C": c, "K": columns, "R": p.window[1], "S": p.window[2], "TAPS": p.taps, "GROUPS": groups,
            **{name: value for name, value in p.geometry.constants().items() if not name.startswith("STRIDE")},
            "RANK": p.rank, "TURNED": turned, **constants, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k,
            "GROUP_M": config.GROUP_M,
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip


def _can_copy_boxes(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Can the tensor memory accelerator copy from x and w? x must be channels last without gaps, w contiguous, and both
    must start at a multiple of 16 bytes."""
    return x.movedim(1, -1).is_contiguous() and x.data_ptr() % 16 == w.data_ptr() % 16 == 0


def _pointer_config(config: Config, **more: int) -> Config:
    """The config of the kernel with the same tile whose threads compute addresses; ``more`` are further constants."""
    return Config(**{name: value for name, value in config.items() if name != "TMA"}, SPLIT_K=1, **more)


def _reduce_launch(partial: torch.Tensor, epilogue: Epilogue, out: torch.Tensor) -> Launch:
    """The launch that adds partial [splits, pixels, channels] in order and stores the result, with its epilogue."""
    splits, pixels, channels = partial.shape
    operands, constants = epilogue.arguments(out)
    block_m, block_n = 16, 64
    return Launch(
        reduce_splits_kernel,
        cost.cdiv(pixels, block_m) * cost.cdiv(channels, block_n),
        {"partial_ptr": partial, **operands, "M": pixels, "image": math.prod(out.shape[2:]), "splits": splits},
        {"K": channels, **constants, "BLOCK_M": block_m, "BLOCK_N": block_n},
        num_warps=4,
        num_stages=1,
    )


def plan_transpose(
    p: ConvProblem, config: Config, g: torch.Tensor, w: torch.Tensor, x: torch.Tensor, epilogue: Epilogue
) -> list[Launch]:
    """The launches of x, the result, from g, channels last, and w of :func:`pack_transposed_weight`."""
    if "TMA" in config:
        if _can_copy_boxes(g, w):
            return [_lines_launch(p, config, g, w, epilogue.arguments(x), turned=True)]
        config = _pointer_config(config)
    geometry, split = p.geometry, config.SPLIT_K
    g_vec, _, (gn, _, gz, gp, gq) = layout_strides(g, p.K)
    classes = (cost.cdiv(size, step) for size, step in zip(p.image, geometry.stride, strict=True))
    tiles = cost.cdiv(p.N * math.prod(classes), config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_N)
    partial = None
    if split > 1:
        shape = (split, p.image_pixels, p.C * geometry.groups)
        partial = torch.empty(shape, dtype=torch.float32, device=g.device)
    operands, constants = epilogue.arguments(x, run=geometry.parities == 1)
    steps = (step // math.gcd(step, dil) for step, dil in zip(geometry.stride, geometry.dilation, strict=True))
    main = Launch(
        conv_transpose_kernel,
        tiles * geometry.groups * geometry.parities * split,
        {
            "g_ptr": g, "w_ptr": w, **operands, "partial_ptr": partial, "N": p.N, **p.sizes(), "splits": split,
            "stride_gn": gn, "stride_gz": gz, "stride_gp": gp, "stride_gq": gq,
        },
        {
            "C": p.C, "K": p.K, **dict(zip("TRS", p.window, strict=True)), "GROUPS": geometry.groups,
            **geometry.constants(), "RANK": p.rank,
            **dict(zip(("STEP_D", "STEP_H", "STEP_W"), steps, strict=True)),
            **dict(zip(("STRIDE_WK", "STRIDE_WT", "STRIDE_WC"), transposed_weight_strides(p), strict=True)),
            "G_VEC": g_vec, **constants, "PRECISION": dot_precision(p), **_config_constants(config),
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return [main] if partial is None else [main, _reduce_launch(partial, epilogue, x)]


def plan_weight_grad(
    p: ConvProblem, config: Config, x: torch.Tensor, g: torch.Tensor, dw: torch.Tensor
) -> list[Launch]:
    """The launches of dw [K*GROUPS, C, *window], contiguous or channels last (``p.channels_last``), from x and g,
    both channels last."""
    merged = merged_groups(p)
    groups, c, k = p.geometry.groups // merged, p.C * merged, p.K * merged
    x_vec, _, (xn, _, xd, xh, xw) = layout_strides(x, c)
    g_vec, _, (gn, _, gz, gp, gq) = layout_strides(g, k)
    split = config.SPLIT_K
    tiles = cost.cdiv(k, config.BLOCK_M) * cost.cdiv(p.taps * c, config.BLOCK_N)
    out = dw
    if split > 1:
        out = torch.empty((split, dw.numel()), dtype=torch.float32, device=x.device)
    main = Launch(
        conv_weight_grad_kernel,
        tiles * groups * split,
        {
            "x_ptr": x, "g_ptr": g, "dw_ptr": out, "M": p.pixels, **p.sizes(), "splits": split,
            "stride_xn": xn, "stride_xd": xd, "stride_xh": xh, "stride_xw": xw,
            "stride_gn": gn, "stride_gz": gz, "stride_gp": gp, "stride_gq": gq,
        },
        {
            "C": c, "K": k, "R": p.window[1], "S": p.window[2], "TAPS": p.taps, "GROUPS": groups, "MERGED": merged,
            **p.geometry.constants(), "RANK": p.rank,
            "STRIDE_WT": p.C if p.channels_last else 1, "STRIDE_WC": 1 if p.channels_last else p.taps,
            "X_VEC": x_vec, "G_VEC": g_vec, "PRECISION": dot_precision(p), **_config_constants(config),
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return [main] if split == 1 else [main, sum_splits_launch(out, dw)]


def sum_splits_launch(partial: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that stores in out the sum of partial [splits, out.numel()] over the splits, added in order."""
    block = 1024
    return Launch(
        sum_splits_kernel,
        cost.cdiv(out.numel(), block),
        {"partial_ptr": partial, "out_ptr": out, "L": out.numel(), "splits": partial.shape[0]},
        {"BLOCK": block},
        num_warps=4,
        num_stages=1,
    )


def plan_epilogue_grad(
    p: EpilogueProblem, config: Config, dy: torch.Tensor, saved: torch.Tensor | None, g: torch.Tensor | None,
    bias_grad: torch.Tensor | None, activation: str,
) -> list[Launch]:  # fmt: skip
    """The launches of g and bias_grad, where they are given, from dy and saved, of any strides. Without saved, dy is
    already the gradient at the activation's input."""
    dy, saved, g = _with_flat_space(dy, saved, g)
    y_vec, y_unit, y_strides = layout_strides(dy, runs=True)
    saved_vec, saved_unit, saved_strides = layout_strides(dy if saved is None else saved, runs=True)
    layout = {"CHANNELS_LAST": True, "RUN": 1} if g is None else dense_layout(g)
    split = max(1, min(config.SPLIT_M, cost.cdiv(p.M, config.BLOCK_M)))
    partial = None
    if bias_grad is not None:
        partial = torch.empty((split, p.K), dtype=torch.float32, device=dy.device)
    main = Launch(
        epilogue_grad_kernel,
        split * cost.cdiv(p.K, config.BLOCK_N),
        {
            "dy_ptr": dy, "saved_ptr": saved, "g_ptr": g, "partial_ptr": partial,
            "M": p.M, **dict(zip("ZPQ", triple(dy.shape[2:]), strict=True)), "splits": split,
            **dict(zip(Y_STRIDES, y_strides, strict=True)), **dict(zip(SAVED_STRIDES, saved_strides, strict=True)),
        },
        {
            "K": p.K, "RANK": 3 if dy.dim() == 5 else 2, "Y_UNIT_C": y_unit, "SAVED_UNIT_C": saved_unit,
            "Y_VEC": y_vec, "SAVED_VEC": saved_vec, "G_CHANNELS_LAST": layout["CHANNELS_LAST"], "G_RUN": layout["RUN"],
            "ACTIVATION": activation,
            "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N,
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return [main] if bias_grad is None or partial is None else [main, sum_splits_launch(partial, bias_grad)]


def _with_flat_space(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors [N, K, *space] as [N, K, pixels] where that is a view of each of them, else as they are. Longer rows
    may allow wider loads, and the kernel makes fewer divisions."""
    for t in tensors:
        if t is None or t.dim() == 3:
            continue
        steps = [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size != 1]
        if any(outer[1] != inner[0] * inner[1] for outer, inner in itertools.pairwise(steps)):
            return list(tensors)
    return [t if t is None else t.flatten(2) for t in tensors]


def _config_constants(config: Config) -> dict[str, int]:
    """The constexpr arguments of a config. SPLIT_K and SPLIT_M are not among them: the number of splits is a run-time
    argument, so that changing it compiles nothing anew."""
    return {name: value for name, value in config.constants().items() if not name.startswith("SPLIT_")}


# --- what the tuner knows --------------------------------------------------------------------------------------------


def _forward_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    epilogue = Epilogue(bias=w.new_empty(y.shape[1]), activation="relu")
    return plan_forward(p, config, empty(x, x.shape, True), w, y, epilogue)


def _transpose_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_transpose(p, config, empty(y, y.shape, True), w, x, Epilogue(bias=w.new_empty(x.shape[1])))


def _weight_grad_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_weight_grad(p, config, empty(x, x.shape, True), empty(y, y.shape, True), w)


def _epilogue_launches(p: EpilogueProblem, config: Config) -> list[Launch]:
    y = empty(torch.empty(0, dtype=p.dtype, device="meta"), (1, p.K, p.M, 1), True)
    saved = torch.empty_like(y) if p.has_saved else None
    g = torch.empty_like(y) if p.writes_g else None
    bias_grad = y.new_empty(p.K) if p.has_bias else None
    return plan_epilogue_grad(p, config, y, saved, g, bias_grad, "relu" if p.has_saved else "none")


FORWARD = register(
    Tunable(
        "conv", FORWARD_CONFIGS, features, accepts_forward, estimate_forward, _forward_launches,
        moved_bytes=moved_forward, product_rows=product_rows_forward, due_load_bytes=due_load_bytes,
    )
)  # fmt: skip
TRANSPOSE = register(
    Tunable(
        "conv_transpose", TRANSPOSE_CONFIGS, features, accepts_transpose, estimate_transpose, _transpose_launches,
        moved_bytes=moved_transpose, product_rows=product_rows_transpose, due_load_bytes=due_load_bytes,
    )
)  # fmt: skip
WEIGHT_GRAD = register(
    Tunable(
        "conv_weight_grad", WEIGHT_GRAD_CONFIGS, features, accepts_weight_grad, estimate_weight_grad,
        _weight_grad_launches, moved_bytes=moved_weight_grad, product_rows=product_rows_weight_grad,
        due_load_bytes=due_load_bytes_weight_grad,
    )
)  # fmt: skip
EPILOGUE_GRAD = register(
    Tunable(
        "conv_epilogue_grad", EPILOGUE_CONFIGS, epilogue_features, accepts_epilogue_grad, estimate_epilogue_grad,
        _epilogue_launches, moved_bytes=moved_epilogue_grad, due_load_bytes=due_load_bytes_epilogue_grad,
    )
)  # fmt: skip


# --- calls: allocate, look up the config, launch ---------------------------------------------------------------------


def result_and_epilogue(
    like: torch.Tensor, shape: Sequence[int], is_channels_last: bool, *, bias: torch.Tensor | None,
    scale: torch.Tensor | None, residual: torch.Tensor | None, activation: str, save_input: bool,
) -> tuple[torch.Tensor, Epilogue]:  # fmt: skip
    """The result, allocated but not computed, and the epilogue that its kernel applies."""
    y = empty(like, shape, is_channels_last)
    scale, bias = (None if vector is None else readable(vector, dense=True) for vector in (scale, bias))
    residual = None if residual is None else readable(residual, like=y)
    saved = torch.empty_like(y) if save_input else None
    return y, Epilogue(scale, bias, residual, saved, activation)


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
    padded = pad_problem(problem)
    x, weight = pad_image(x, problem, padded), pad_weight(weight, problem, padded)
    launch(FORWARD, plan_forward, padded, x, weight, y, epilogue)
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
    launch(TRANSPOSE, plan_transpose, problem, channels_last(g), pack_transposed_weight(problem, weight), x, epilogue)
    return x, epilogue.saved


def run_weight_grad(
    x: torch.Tensor, g: torch.Tensor, weight_shape: Sequence[int], geometry: Geometry, *,
    precision: str = "ieee", is_channels_last: bool = False,
) -> torch.Tensor:  # fmt: skip
    """dw, of ``weight_shape``."""
    problem = problem_of(x.shape, weight_shape, g.shape[2:], geometry, x.dtype, precision, is_channels_last)
    padded = pad_problem(problem)
    window = padded.window[3 - len(weight_shape[2:]) :]
    dw = empty(x, (weight_shape[0], padded.C, *window), is_channels_last)
    launch(WEIGHT_GRAD, plan_weight_grad, padded, pad_image(x, problem, padded), channels_last(g), dw)
    if padded == problem:
        return dw
    return empty(x, weight_shape, is_channels_last).copy_(unpad_weight_grad(dw, problem, weight_shape))


def run_epilogue_grad(
    dy: torch.Tensor, saved: torch.Tensor | None, activation: str, *, need_bias: bool, is_channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """g, the gradient at the activation's input, in the layout that is asked for, and with ``need_bias`` the gradient
    of the bias."""
    channels = dy.shape[1]
    g = empty(dy, dy.shape, is_channels_last)
    bias_grad = dy.new_empty(channels) if need_bias else None
    problem = EpilogueProblem(_pixel_count(dy), channels, dy.dtype, saved is not None, True, need_bias)
    launch(EPILOGUE_GRAD, plan_epilogue_grad, problem, dy, saved, g, bias_grad, activation)
    return g, bias_grad


def run_bias_grad(g: torch.Tensor) -> torch.Tensor:
    """The gradient of the bias [K]: the sums of g [N, K, *space] over images and pixels."""
    channels = g.shape[1]
    bias_grad = g.new_empty(channels)
    problem = EpilogueProblem(_pixel_count(g), channels, g.dtype, has_saved=False, writes_g=False, has_bias=True)
    launch(EPILOGUE_GRAD, plan_epilogue_grad, problem, g, None, None, bias_grad, "none")
    return bias_grad


def _pixel_count(t: torch.Tensor) -> int:
    """Pixels of all images of a [N, K, *space] tensor."""
    return t.shape[0] * math.prod(t.shape[2:])
