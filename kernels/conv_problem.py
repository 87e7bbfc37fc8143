"""What a convolution is, and how its kernels read and write tensors: the part of the host side that plans and configs
both need.

The kernels that multiply matrices read images channels last, and weights as [K*GROUPS, T, R, S, C]. The functions here
make a copy of a tensor that is laid out otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..autotune import cost
from ..autotune.layout import empty
from ._launch import layout_strides, readable, unit_divisor

Triple = tuple[int, int, int]


def triple(values: Sequence[int], missing: int = 1) -> Triple:
    """Depth, height and width from the last one, two or three of them; the others are ``missing``."""
    return (*(missing for _ in range(3 - len(values))), *values)  # type: ignore[return-value]


class Geometry(NamedTuple):
    """How windows lie in the image, in depth, height and width: what the kernels take as constants, and the groups."""

    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
        return cls(triple(stride), triple(padding, 0), triple(dilation), groups)

    @property
    def parities(self) -> int:
        """How many parity classes of input pixels there are: one for each combination of remainders by the strides."""
        return math.prod(self.stride)

    def constants(self) -> dict[str, int]:
        return {
            f"{name}_{axis}": value
            for name, values in (("STRIDE", self.stride), ("PAD", self.padding), ("DIL", self.dilation))
            for axis, value in zip("DHW", values, strict=True)
        }


class ConvProblem(NamedTuple):
    """One convolution, or its transpose; C and K count one group's channels.

    Attributes:
        rank: 3, or 2 for two dimensions and one.
        image, window, output: depth, height and width. The transpose computes a tensor of size ``image`` from one of
            size ``output``.
        precision: "16" for 16-bit tensors; for fp32 tensors "ieee", "tf32" or "tf32x3".
        channels_last: whether the kernel writes its result channels last.
        tail: how many of the C channels, the last ones, belong to no tap; see :func:`pad_problem`.
    """

    rank: int
    N: int
    C: int
    K: int
    image: Triple
    window: Triple
    output: Triple
    geometry: Geometry
    dtype: torch.dtype
    precision: str
    channels_last: bool = True
    tail: int = 0

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    @property
    def pixels(self) -> int:
        return self.N * math.prod(self.output)

    @property
    def image_pixels(self) -> int:
        return self.N * math.prod(self.image)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def flops(self) -> float:
        return 2.0 * self.pixels * self.K * self.taps * self.C * self.geometry.groups

    def minimal_bytes(self) -> float:
        """|x| + |w| + |y|, in bytes: what must cross the memory bus at least once."""
        elements = self.image_pixels * self.C + self.K * self.taps * self.C + self.pixels * self.K
        return float(elements * self.geometry.groups * self.itemsize)

    def sizes(self) -> dict[str, int]:
        return dict(zip("DHWZPQ", (*self.image, *self.output), strict=True))


def problem_of(
    x_shape: Sequence[int], w_shape: Sequence[int], output: Sequence[int], geometry: Geometry,
    dtype: torch.dtype, precision: str, channels_last: bool,
) -> ConvProblem:  # fmt: skip
    """The problem of x [N, C*GROUPS, *image], w [K*GROUPS, C, *window] and y [N, K*GROUPS, *output]."""
    n, _, *image = x_shape
    k, c, *window = w_shape
    precision = precision if dtype == torch.float32 else "16"
    return ConvProblem(
        3 if len(image) == 3 else 2, n, c, k // geometry.groups, triple(image), triple(window), triple(output),
        geometry, dtype, precision, channels_last,
    )  # fmt: skip


def merged_groups(p: ConvProblem) -> int:
    """How many groups the weight gradient multiplies as one: the largest power of two that divides the groups and
    leaves at most 64 channels and filters, since one instruction of the tensor cores multiplies 64 rows."""
    merged = 1
    while 2 * merged * max(p.C, p.K) <= 64 and p.geometry.groups % (2 * merged) == 0:
        merged *= 2
    return merged


def is_one_line(p: ConvProblem) -> bool:
    """Does every output read one pixel of x, the one at its own place? Then the kernel by lines takes the pixels of all
    images for one line."""
    return p.taps == 1 and not any(p.geometry.padding) and p.image == p.output


def line_sizes(p: ConvProblem, turned: bool) -> tuple[int, int]:
    """How many lines the result has, and the pixels of one line."""
    if is_one_line(p):
        return 1, p.pixels
    output = p.image if turned else p.output
    return p.N * output[0] * output[1], output[2]


def line_tiles(p: ConvProblem, block_m: int, turned: bool) -> int:
    """How many tiles of block_m pixels cover the lines of the result, where no tile holds pixels of two lines."""
    lines, length = line_sizes(p, turned)
    return lines * cost.cdiv(length, block_m)


def dot_precision(p: ConvProblem) -> str:
    """The PRECISION of :func:`._math.dot`, which ignores it for 16-bit operands."""
    return "ieee" if p.precision == "16" else p.precision


# --- how the kernels read tensors ------------------------------------------------------------------------------------


def channels_last(t: torch.Tensor) -> torch.Tensor:
    """``t`` itself where neighbouring channels are neighbours in memory, else a channels-last copy."""
    return readable(t, unit=1)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights [K, C, *window] as contiguous [K, *window, C]: a view where they are channels last already, else a
    copy."""
    return readable(weight.movedim(1, -1), dense=True)


def _is_reduction_first(p: ConvProblem) -> bool:
    """Must neighbours along the reduction be neighbours in memory? Tensor cores take tf32 operands only so; the
    reduction of the transpose goes over K."""
    return p.precision in ("tf32", "tf32x3")


def pack_transposed_weight(p: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
    """The weights as the transpose reads them, contiguous: [K*GROUPS, *window, C], or for tf32 [GROUPS, C, *window,
    K]."""
    if not _is_reduction_first(p):
        return pack_weight(weight)
    return readable(weight.unflatten(0, (p.geometry.groups, p.K)).movedim(1, -1), dense=True)


def transposed_weight_strides(p: ConvProblem) -> Triple:
    """The strides of K, tap and C, in elements, of what :func:`pack_transposed_weight` returns, within a group."""
    return (1, p.K, p.taps * p.K) if _is_reduction_first(p) else (p.taps * p.C, p.C, 1)


# --- images of few channels ------------------------------------------------------------------------------------------


def _is_unfolded(p: ConvProblem) -> bool:
    """Are the pixels of a row of a window read as channels of one tap? That is done for up to four channels, without
    groups, where those pixels are neighbours in memory."""
    return p.geometry.groups == 1 and p.C <= 4 and p.window[2] > 1 and p.geometry.dilation[2] == 1


def pad_problem(p: ConvProblem) -> ConvProblem:
    """The problem that forward and the weight gradient solve in place of ``p``, because they read x: the same one, or
    where an image without groups has few channels, one with more channels.

    One to three channels become four, and five to seven become eight, so that one aligned load reads a pixel. With four
    channels, the pixels of a row of a window are neighbours in memory, so the whole row counts as one tap, of four
    channels for each pixel. Their number is rounded up to 16 or to a multiple of 32, so that some BLOCK_K divides it.
    The channels beyond those of the row, the ``tail``, lie in the pixels that follow the row; they belong to no tap.
    Along W the new image has one such row for each output, so its window moves by one and has no padding.
    """
    if p.geometry.groups > 1 or p.C >= 8:
        return p
    if not _is_unfolded(p):
        return p._replace(C=4 if p.C <= 4 else 8)
    used = 4 * p.window[2]
    channels = 16 if used <= 16 else -(-used // 32) * 32
    geometry = p.geometry._replace(
        stride=(*p.geometry.stride[:2], 1), padding=(*p.geometry.padding[:2], 0)
    )  # fmt: skip
    image, window = (*p.image[:2], p.output[2]), (*p.window[:2], 1)
    return p._replace(C=channels, tail=channels - used, image=image, window=window, geometry=geometry)


def pad_image(x: torch.Tensor, p: ConvProblem, padded: ConvProblem) -> torch.Tensor:
    """The image that ``padded`` reads, made of x, that of ``p``: x itself where the problems are the same and x is
    channels last."""
    n, c, *space = x.shape
    if p == padded:
        return channels_last(x)
    if not _is_unfolded(p):
        out = x.new_zeros(n, *space, padded.C)
        out[..., :c].copy_(x.movedim(1, -1))
        return out.movedim(-1, 1)
    step, left, columns = p.geometry.stride[2], p.geometry.padding[2], p.output[2]
    width = (columns - 1) * step + padded.C // 4
    kept = max(0, min(space[-1], width - left))
    out = x.new_zeros(n, *space[:-1], width, 4)
    out[..., left : left + kept, :c].copy_(x.movedim(1, -1)[..., :kept, :])
    windows = out.as_strided((n, *space[:-1], columns, padded.C), (*out.stride()[:-2], 4 * step, 1))
    return windows.movedim(-1, 1)


def pad_weight(weight: torch.Tensor, p: ConvProblem, padded: ConvProblem) -> torch.Tensor:
    """The weights of ``padded``, contiguous [K, *window, C], made of those of ``p``; 0 for the channels that ``p``
    lacks."""
    if p == padded:
        return pack_weight(weight)
    k, c, *window = weight.shape
    out = weight.new_zeros(
        k, *window[:-1], padded.C // 4 if _is_unfolded(p) else window[-1], 4 if _is_unfolded(p) else padded.C
    )
    out[..., : window[-1], :c].copy_(weight.movedim(1, -1))
    return out


def unpad_weight_grad(dw: torch.Tensor, p: ConvProblem, shape: Sequence[int]) -> torch.Tensor:
    """The part of dw, a weight gradient of ``pad_problem(p)``, that belongs to ``p``: a view of ``shape``."""
    dw = dw.movedim(1, -1)
    if _is_unfolded(p):
        dw = dw.squeeze(-2).unflatten(-1, (-1, 4))[..., : shape[-1], :]
    return dw[..., : shape[1]].movedim(-1, 1)


# --- results ---------------------------------------------------------------------------------------------------------


def dense_layout(out: torch.Tensor, run: bool = True) -> dict[str, Any]:
    """The constants CHANNELS_LAST and RUN by which a kernel addresses the dense result ``out``; without ``run`` RUN is
    1."""
    last = layout_strides(out)[1]
    pixels = math.prod(out.shape[2:])
    return {"CHANNELS_LAST": last, "RUN": unit_divisor(16 // out.dtype.itemsize, pixels) if run and not last else 1}


class Epilogue(NamedTuple):
    """What a kernel applies to its sums before it stores them. ``residual``, and ``saved``, into which the kernel
    stores the input of the activation, have the strides of the result."""

    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    saved: torch.Tensor | None = None
    activation: str = "none"

    def arguments(self, out: torch.Tensor, run: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """The run-time arguments and the constants of a kernel that stores the dense ``out``. Without ``run`` the
        neighbours of a tile are not neighbours in memory, so the kernel stores single elements."""
        arguments = {
            "scale_ptr": self.scale, "bias_ptr": self.bias, "residual_ptr": self.residual, "out_ptr": out,
            "saved_ptr": self.saved,
        }  # fmt: skip
        return arguments, {**dense_layout(out, run), "ACTIVATION": self.activation}


class EpilogueProblem(NamedTuple):
    """The gradient of an epilogue over M pixels and K channels (of all groups), and which tensors it reads and
    writes."""

    M: int
    K: int
    dtype: torch.dtype
    has_saved: bool
    writes_g: bool
    has_bias: bool

    def minimal_bytes(self) -> float:
        return float(self.M * self.K * self.dtype.itemsize * (1 + self.has_saved + self.writes_g))


def meta_tensors(p: ConvProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights [K*GROUPS, *window, C] and y of a problem, on the meta device; x and y in the layout of the
    problem."""
    groups, skip = p.geometry.groups, 3 - p.rank
    like = torch.empty(0, dtype=p.dtype, device="meta")
    x = empty(like, (p.N, p.C * groups, *p.image[skip:]), p.channels_last)
    w = like.new_empty(p.K * groups, *p.window[skip:], p.C)
    return x, w, empty(like, (p.N, p.K * groups, *p.output[skip:]), p.channels_last)
