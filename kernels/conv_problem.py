"""What a convolution is, and the tensors as its kernels read and write them: what plans and configs both need.

Tensors lie channels last here (the launchers re-lay what does not), weights as [K*GROUPS, T, R, S, C].
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
    """Depth, height and width, from one to three of them."""
    return (*(missing for _ in range(3 - len(values))), *values)  # type: ignore[return-value]


class Geometry(NamedTuple):
    """The window, in depth, height and width: what the kernels take as constants."""

    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
        return cls(triple(stride), triple(padding, 0), triple(dilation), groups)

    @property
    def parities(self) -> int:
        """Classes of input pixels that a window's taps tell apart."""
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
        image, window, output: depth, height and width; the transpose goes from ``output`` to ``image``.
        precision: "16", "ieee", "tf32" or "tf32x3".
        channels_last: is what the kernel writes laid out so?
        tail: how many of the C channels, the last, belong to no tap; see :func:`pad_problem`.
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
        """|x| + |w| + |y|: what must cross the memory bus at least once."""
        elements = self.image_pixels * self.C + self.K * self.taps * self.C + self.pixels * self.K
        return float(elements * self.geometry.groups * self.itemsize)

    def sizes(self) -> dict[str, int]:
        return dict(zip("DHWZPQ", (*self.image, *self.output), strict=True))


def problem_of(
    x_shape: Sequence[int], w_shape: Sequence[int], output: Sequence[int], geometry: Geometry,
    dtype: torch.dtype, precision: str, channels_last: bool,
) -> ConvProblem:  # fmt: skip
    n, _, *image = x_shape
    k, c, *window = w_shape
    precision = precision if dtype == torch.float32 else "16"
    return ConvProblem(
        3 if len(image) == 3 else 2, n, c, k // geometry.groups, triple(image), triple(window), triple(output),
        geometry, dtype, precision, channels_last,
    )  # fmt: skip


def merged_groups(p: ConvProblem) -> int:
    """How many groups share a product of the weight gradient: as many as fill 64 rows of the tensor cores."""
    merged = 1
    while 2 * merged * max(p.C, p.K) <= 64 and p.geometry.groups % (2 * merged) == 0:
        merged *= 2
    return merged


def is_one_line(p: ConvProblem) -> bool:
    """Do windows see one pixel each, so that rows and images may follow one another?"""
    return p.taps == 1 and not any(p.geometry.padding) and p.image == p.output


def line_sizes(p: ConvProblem, turned: bool) -> tuple[int, int]:
    """How many lines the result has, and their length in pixels."""
    if is_one_line(p):
        return 1, p.pixels
    output = p.image if turned else p.output
    return p.N * output[0] * output[1], output[2]


def line_tiles(p: ConvProblem, block_m: int, turned: bool) -> int:
    """Tiles of the product's rows, none of which spans lines."""
    lines, length = line_sizes(p, turned)
    return lines * cost.cdiv(length, block_m)


def dot_precision(p: ConvProblem) -> str:
    return "ieee" if p.precision == "16" else p.precision


# --- tensors as the kernels read them --------------------------------------------------------------------------------


def channels_last(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself if neighbouring channels are neighbours in memory, else a channels-last copy."""
    return readable(t, unit=1)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights [K, C, *window] as dense [K, *window, C]; a view where they are channels last already."""
    return readable(weight.movedim(1, -1), dense=True)


def _reduction_first(p: ConvProblem) -> bool:
    """Tensor cores take tf32 operands only with the reduction along memory, which for the transpose is K."""
    return p.precision in ("tf32", "tf32x3")


def pack_transposed_weight(p: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
    """What the transpose reads: [K, *window, C], or for tf32 [C, *window, K] of each group."""
    if not _reduction_first(p):
        return pack_weight(weight)
    return readable(weight.unflatten(0, (p.geometry.groups, p.K)).movedim(1, -1), dense=True)


def transposed_weight_strides(p: ConvProblem) -> Triple:
    """Strides (K, tap, C) of :func:`pack_transposed_weight` within a group."""
    return (1, p.K, p.taps * p.K) if _reduction_first(p) else (p.taps * p.C, p.C, 1)


# --- images of few channels ------------------------------------------------------------------------------------------


def _unfolds(p: ConvProblem) -> bool:
    """Is this the convolution of a narrow image, whose window rows are read as channels?"""
    return p.geometry.groups == 1 and p.C <= 4 and p.window[2] > 1 and p.geometry.dilation[2] == 1


def pad_problem(p: ConvProblem) -> ConvProblem:
    """What the kernels that read x solve, forward and weight gradient: without groups a narrow image is re-laid.

    Up to four channels become four, up to eight eight, so that a pixel is one aligned load. The pixels of a window's
    row, of four channels each, lie side by side in memory, so they count as the channels of one wide tap, 16 or a
    multiple of 32; its tail reaches into the pixels behind.
    """
    if p.geometry.groups > 1 or p.C >= 8:
        return p
    if not _unfolds(p):
        return p._replace(C=4 if p.C <= 4 else 8)
    used = 4 * p.window[2]
    channels = 16 if used <= 16 else -(-used // 32) * 32
    geometry = p.geometry._replace(
        stride=(*p.geometry.stride[:2], 1), padding=(*p.geometry.padding[:2], 0)
    )  # fmt: skip
    image, window = (*p.image[:2], p.output[2]), (*p.window[:2], 1)
    return p._replace(C=channels, tail=channels - used, image=image, window=window, geometry=geometry)


def pad_image(x: torch.Tensor, p: ConvProblem, padded: ConvProblem) -> torch.Tensor:
    """x as ``padded`` reads it, from that of ``p``; the tensor itself where nothing is to be done."""
    n, c, *space = x.shape
    if p == padded:
        return channels_last(x)
    if not _unfolds(p):
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
    """The packed weights [K, *window, C] of ``padded``, zeros where ``p`` has none."""
    if p == padded:
        return pack_weight(weight)
    k, c, *window = weight.shape
    out = weight.new_zeros(
        k, *window[:-1], padded.C // 4 if _unfolds(p) else window[-1], 4 if _unfolds(p) else padded.C
    )
    out[..., : window[-1], :c].copy_(weight.movedim(1, -1))
    return out


def unpad_weight_grad(dw: torch.Tensor, p: ConvProblem, shape: Sequence[int]) -> torch.Tensor:
    """The part of a weight gradient of :func:`pad_problem`'s that is the convolution's own, a view of ``shape``."""
    dw = dw.movedim(1, -1)
    if _unfolds(p):
        dw = dw.squeeze(-2).unflatten(-1, (-1, 4))[..., : shape[-1], :]
    return dw[..., : shape[1]].movedim(-1, 1)


# --- results ---------------------------------------------------------------------------------------------------------


def dense_layout(out: torch.Tensor, run: bool = True) -> dict[str, Any]:
    """The constants CHANNELS_LAST and RUN by which a kernel addresses a dense result."""
    last = layout_strides(out)[1]
    pixels = math.prod(out.shape[2:])
    return {"CHANNELS_LAST": last, "RUN": unit_divisor(16 // out.dtype.itemsize, pixels) if run and not last else 1}


class Epilogue(NamedTuple):
    """What is done to the sums before they are stored. ``residual`` and ``saved``, where the activation's input is
    kept, have the result's strides."""

    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    saved: torch.Tensor | None = None
    activation: str = "none"

    def arguments(self, out: torch.Tensor, run: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run-time arguments and constants of a kernel that stores the dense ``out``; without ``run`` neighbours in a
        tile are no neighbours in a row."""
        arguments = {
            "scale_ptr": self.scale, "bias_ptr": self.bias, "residual_ptr": self.residual, "out_ptr": out,
            "saved_ptr": self.saved,
        }  # fmt: skip
        return arguments, {**dense_layout(out, run), "ACTIVATION": self.activation}


class EpilogueProblem(NamedTuple):
    """Gradient of the epilogue over M pixels and K channels; what is read and written decides the traffic."""

    M: int
    K: int
    dtype: torch.dtype
    has_saved: bool
    writes_g: bool
    has_bias: bool

    def minimal_bytes(self) -> float:
        return float(self.M * self.K * self.dtype.itemsize * (1 + self.has_saved + self.writes_g))


def meta_tensors(p: ConvProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights and y of a problem on the meta device, laid out as the problem says."""
    groups, skip = p.geometry.groups, 3 - p.rank
    like = torch.empty(0, dtype=p.dtype, device="meta")
    x = empty(like, (p.N, p.C * groups, *p.image[skip:]), p.channels_last)
    w = like.new_empty(p.K * groups, *p.window[skip:], p.C)
    return x, w, empty(like, (p.N, p.K * groups, *p.output[skip:]), p.channels_last)
