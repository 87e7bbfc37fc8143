"""Pooling's layers: what is compiled without a GPU, measured with one, and the bytes each kernel should move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autotune.config import Config
from ..autotune.device import DeviceSpec
from ..ops import max_pool2d
from .case import ALL_LAYERS, DTYPES, IMAGES, PRECISIONS, Case, Kernel, Layers, Operator, Shape, random_tensors


class Layer(NamedTuple):
    """One pooling of a model."""

    input: Shape
    window: int
    stride: int
    padding: int = 0

    @property
    def output(self) -> Shape:
        n, c, *sizes = self.input
        return (n, c, *((size + 2 * self.padding - self.window) // self.stride + 1 for size in sizes))


LAYERS = {
    "resnet50-maxpool": Layer((32, 64, 112, 112), 3, 2, 1),
    "vgg-maxpool": Layer((32, 64, 224, 224), 2, 2),
    "vgg-maxpool-deep": Layer((32, 512, 14, 14), 2, 2),
    "small-maxpool": Layer((8, 16, 24, 24), 2, 2),
}
HEADLINE = ("resnet50-maxpool",)


def _window(layer: Layer) -> Any:
    """The layer's window as the kernels take it."""
    from ..kernels.pool import Window

    size, stride, padding = layer.window, layer.stride, layer.padding
    return Window(size, size, stride, stride, padding, padding, 1, 1)


def problem_of(layer: Layer, dtype: torch.dtype, index_bytes: int, channels_last: bool) -> Any:
    from ..kernels import pool

    p, q = layer.output[2:]
    return pool.problem_of(layer.input, (p, q), _window(layer), dtype, index_bytes, channels_last)


def layers(target: str) -> Iterator[Layers]:
    from ..kernels import pool

    for name, layer in LAYERS.items():
        if target not in ALL_LAYERS and name not in HEADLINE:
            continue
        for label in ("bf16", "fp16", "ieee") if name in HEADLINE else ("bf16",):
            for layout in ("nhwc", "nchw") if name in HEADLINE and label == "bf16" else ("nhwc",):
                problem = problem_of(layer, PRECISIONS[label][0], 1, layout == "nhwc")
                yield f"{name}-{label}-{layout}", pool.FORWARD, problem
                yield f"{name}-{label}-{layout}", pool.BACKWARD, problem


# --- what the compiler must make of them -----------------------------------------------------------------------------


def wgmma_rows(kernel: str, problem: Any) -> int:
    return 0


def due_load_bytes(kernel: str, problem: Any) -> int:
    """16 bytes a load for 16-bit channels last with channels in eights; with offsets of one byte, eight of them."""
    if problem.dtype.itemsize != 2 or not problem.channels_last or problem.C % 8:
        return 0
    return 8 if kernel == "max_pool2d_backward" else 16


# --- bytes that load and store instructions move: the formulas at the kernels' heads ----------------------------------


def _forward_bytes(p: Any, config: Config) -> float:
    outputs = p.N * p.C * p.P * p.Q
    return float(outputs * (p.window.r * p.window.s * p.dtype.itemsize + p.dtype.itemsize + p.index_bytes))


def _backward_bytes(p: Any, config: Config) -> float:
    inputs, e = p.N * p.C * p.H * p.W, p.dtype.itemsize
    return float(inputs * (p.window.windows_over_a_pixel() * (e + p.index_bytes) + e))


TRAFFIC: dict[str, Callable[[Any, Config], float]] = {
    "max_pool2d": _forward_bytes,
    "max_pool2d_backward": _backward_bytes,
}


# --- calls that are compared -----------------------------------------------------------------------------------------


def case(name: str, *, dtype: str = "bf16", layout: str = "nhwc", direction: str = "fwd", rank: int = 1) -> Case:
    layer = LAYERS[name]
    kwargs = {"kernel_size": layer.window, "stride": layer.stride, "padding": layer.padding}
    return Case(name, "max_pool2d", {"input": layer.input}, kwargs, dtype, layout, direction, rank)


def layer_of(case: Case) -> Layer:
    return Layer(case.shapes["input"], *(case.kwargs[name] for name in ("kernel_size", "stride", "padding")))


def _describe(case: Case) -> str:
    n, c, h, w = case.shapes["input"]
    window, stride = case.kwargs["kernel_size"], case.kwargs["stride"]
    return f"{n}x{c}x{h}x{w} max {window}x{window} s{stride}"


def _floor_us(case: Case, device: DeviceSpec) -> float:
    """x read and y written; with a backward also one byte of the winner's place an output, and both gradients."""
    trains = case.direction != "fwd"
    problem = problem_of(layer_of(case), DTYPES[case.dtype], int(trains), case.layout == "nhwc")
    return problem.minimal_bytes() * (1 + trains) / (device.dram_gbs * 1e3)


def _tiny(case: Case) -> Case:
    n, c, h, w = case.shapes["input"]
    return replace(case, shapes={"input": (min(n, 2), min(c, 20), min(h, 7), min(w, 7))})


OPERATORS = {"max_pool2d": Operator(max_pool2d, F.max_pool2d, None, IMAGES, _describe, _floor_us, _tiny)}


def _cases() -> Iterable[Case]:
    train = "fwd+bwd"
    yield case("resnet50-maxpool", rank=0)
    yield case("resnet50-maxpool", direction=train, rank=0)
    yield case("vgg-maxpool", rank=1)
    yield case("vgg-maxpool", direction=train, rank=2)
    yield case("resnet50-maxpool", layout="nchw", rank=3)
    yield case("resnet50-maxpool", layout="nchw", direction=train, rank=3)
    yield case("resnet50-maxpool", dtype="fp16", rank=3)


CASES = tuple(_cases())


# --- kernels by themselves -------------------------------------------------------------------------------------------

TUNED = ("resnet50-maxpool",)


def explicit(input: Shape, *, kernel: int = 2, stride: int | None = None, padding: int = 0) -> Case:
    kwargs = {"kernel_size": kernel, "stride": stride or kernel, "padding": padding}
    return Case("explicit", "max_pool2d", {"input": input}, kwargs, direction="fwd+bwd")


def kinds(one: Case) -> tuple[str, ...]:
    return ("fwd", "bwd")


def kernel_tensors(one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]:
    """For a backward also what each forward kept of the winners."""
    from ..kernels import pool

    tensors = random_tensors(OPERATORS["max_pool2d"], one, device, seed)
    if kind == "fwd":
        return tensors
    layer, x = layer_of(one), tensors["input"]
    window, pq = _window(layer), (layer.output[2], layer.output[3])
    _, places = pool.run_forward(x, pq, window, index_dtype=window.offset_dtype, is_channels_last=True)
    assert places is not None
    return {**tensors, "places": places, "indices": F.max_pool2d(x, **one.kwargs, return_indices=True)[1]}


def kernel_of(one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    from ..kernels import pool

    layer, x = layer_of(one), tensors["input"]
    window, pq, hw = _window(layer), (layer.output[2], layer.output[3]), (x.shape[2], x.shape[3])
    index_dtype = window.offset_dtype
    problem = problem_of(layer, x.dtype, index_dtype.itemsize, True)
    if kind == "fwd":
        return Kernel(
            pool.FORWARD,
            problem,
            lambda t: pool.run_forward(t["input"], pq, window, index_dtype=index_dtype, is_channels_last=True)[0],
            lambda t: F.max_pool2d(t["input"], **one.kwargs),
        )
    pairs = [[one.kwargs[name]] * 2 for name in ("kernel_size", "stride", "padding")]
    return Kernel(
        pool.BACKWARD,
        problem,
        lambda t: pool.run_backward(t["dy"], t["places"], hw, window, is_channels_last=True),
        lambda t: torch.ops.aten.max_pool2d_with_indices_backward(
            t["dy"], t["input"], *pairs, [1, 1], False, t["indices"]
        ),
    )
