"""The layers that the static suite compiles: rows of real models as the kernels' own problems."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..autotune.config import TUNABLES, Tunable
from ..kernels import conv, conv_depthwise, pool

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32

# name: images, input channels, height, width, output channels, window, stride, padding, groups. An image's three
# channels count four: the launcher pads them.
CONVOLUTIONS = {
    "r50-stem": (32, 4, 224, 224, 64, 7, 2, 3, 1),
    "r50-s1-3x3": (32, 64, 56, 56, 64, 3, 1, 1, 1),
    "r50-s1-1x1": (32, 64, 56, 56, 256, 1, 1, 0, 1),
    "r50-s2-3x3s2": (32, 128, 56, 56, 128, 3, 2, 1, 1),
    "r50-s2-shortcut": (32, 256, 56, 56, 512, 1, 2, 0, 1),
    "r50-s3-3x3": (32, 256, 14, 14, 256, 3, 1, 1, 1),
    "r50-s4-3x3": (32, 512, 7, 7, 512, 3, 1, 1, 1),
    "r50-s4-1x1": (32, 512, 7, 7, 2048, 1, 1, 0, 1),
    "vgg-c3": (32, 256, 56, 56, 256, 3, 1, 1, 1),
    "convnext-stem": (64, 4, 224, 224, 96, 4, 4, 0, 1),
    "resnext-g32": (32, 128, 56, 56, 128, 3, 1, 1, 32),
    "unet-320": (2, 320, 64, 64, 320, 3, 1, 1, 1),
    "batch1-s4-3x3": (1, 512, 7, 7, 512, 3, 1, 1, 1),
}
DEPTHWISE = {
    "convnext-dw-s1": (64, 96, 56, 56, 96, 7, 1, 3, 96),
    "convnext-dw-s3": (64, 384, 14, 14, 384, 7, 1, 3, 384),
    "mobilenet-dw": (64, 72, 56, 56, 72, 5, 2, 2, 72),
    "efficientnet-dw": (64, 96, 112, 112, 96, 3, 2, 1, 96),
    "batch1-dw": (1, 16, 14, 14, 16, 3, 1, 1, 16),
}
# name: images, channels, height, width, window, stride, padding
POOLS = {
    "r50-pool": (32, 64, 112, 112, 3, 2, 1),
    "vgg-pool": (32, 64, 224, 224, 2, 2, 0),
    "small-pool": (8, 16, 24, 24, 2, 2, 0),
    "deep-pool": (32, 512, 14, 14, 2, 2, 0),
}
PRECISIONS = {"bf16": (BF16, "16"), "fp16": (FP16, "16"), "tf32": (FP32, "tf32"), "tf32x3": (FP32, "tf32x3"),
              "ieee": (FP32, "ieee")}  # fmt: skip
# Every row in bf16; these rows in every precision.
WIDE = ("r50-s1-3x3", "r50-s1-1x1", "convnext-dw-s1", "r50-pool")


def _conv_problem(row: tuple[int, ...], dtype: torch.dtype, precision: str, channels_last: bool) -> Any:
    n, c, h, w, k, window, stride, pad, groups = row
    geometry = conv.Geometry(stride, stride, pad, pad, 1, 1, groups)
    p, q = ((size + 2 * pad - window) // stride + 1 for size in (h, w))
    return conv.problem_of(
        (n, c, h, w), (k, c // groups, window, window), (p, q), geometry, dtype, precision, channels_last
    )


def _pool_problem(row: tuple[int, ...], dtype: torch.dtype, index_bytes: int, channels_last: bool) -> Any:
    n, c, h, w, r, stride, pad = row
    p, q = ((size + 2 * pad - r) // stride + 1 for size in (h, w))
    window = pool.Window(r, r, stride, stride, pad, pad, 1, 1)
    return pool.problem_of((n, c, h, w), (p, q), window, dtype, index_bytes, channels_last)


def _precisions(name: str, target: str) -> list[str]:
    if name not in WIDE:
        return ["bf16"]
    # tf32x3 is NVIDIA's; the others compile for every target.
    return [one for one in PRECISIONS if one != "tf32x3" or target.startswith("sm_")]


def problems(target: str) -> Iterator[tuple[str, Tunable, Any]]:
    """``(name, kernel, problem)`` of everything that ships for a target."""
    for rows, module in ((CONVOLUTIONS, conv), (DEPTHWISE, conv_depthwise)):
        for name, row in rows.items():
            for label in _precisions(name, target):
                dtype, precision = PRECISIONS[label]
                if module is conv_depthwise and label in ("tf32", "tf32x3"):
                    continue  # no products of tiles, so no precision to choose
                for layout in ("nhwc", "nchw") if name in WIDE and label == "bf16" else ("nhwc",):
                    problem = _conv_problem(row, dtype, precision, layout == "nhwc")
                    for tunable in (module.FORWARD, module.INPUT_GRAD, module.WEIGHT_GRAD):
                        yield f"{name}-{label}-{layout}", tunable, problem
    for name, row in CONVOLUTIONS.items():
        n, _, h, w, k, window, stride, pad, _ = row
        pixels = n * ((h + 2 * pad - window) // stride + 1) * ((w + 2 * pad - window) // stride + 1)
        problem = conv.EpilogueProblem(pixels, k, BF16, has_saved=True, writes_g=True, has_bias=True)
        yield f"{name}-bf16-nhwc", conv.EPILOGUE_GRAD, problem
    for name, size in POOLS.items():
        for label in ("bf16", "fp16", "ieee") if name in WIDE else ("bf16",):
            for layout in ("nhwc", "nchw") if name in WIDE and label == "bf16" else ("nhwc",):
                problem = _pool_problem(size, PRECISIONS[label][0], 1, layout == "nhwc")
                yield f"{name}-{label}-{layout}", pool.FORWARD, problem
                yield f"{name}-{label}-{layout}", pool.BACKWARD, problem


assert set(TUNABLES) == {tunable.name for _, tunable, _ in problems("sm_90")}, "a kernel has no problem here"
