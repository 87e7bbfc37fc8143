"""Convolution with max pooling: what is compiled without a GPU, measured with one, and the bytes the kernel should
move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..autotune.device import DeviceSpec
from ..autotune.recorded import Recorded, spelled
from ..autotune.workload import (
    ALL_LAYERS,
    PRECISIONS,
    Case,
    Kernel,
    Layers,
    Operator,
    Shape,
    precisions_for,
    random_tensors,
    stream_us,
)
from ..ops import conv2d_max_pool2d
from ..ops.conv_torch import activate
from . import conv, pool
from .providers import IMAGES


class Layer(NamedTuple):
    """A convolution, and the pooling of its output."""

    conv: conv.Layer
    window: int
    stride: int
    padding: int = 0

    @property
    def pool(self) -> pool.Layer:
        return pool.Layer("max_pool2d", self.conv.output, self.window, self.stride, self.padding)

    def arguments(self) -> dict[str, Any]:
        """Those of the call."""
        pooling = {"pool_kernel_size": self.window, "pool_stride": self.stride, "pool_padding": self.padding}
        return {**self.conv.geometry(), **pooling}


LAYERS = {
    "resnet50-stem-pool": Layer(conv.LAYERS["resnet50-stem"], 3, 2, 1),
    "vgg-c1-pool": Layer(conv.LAYERS["vgg-c1"], 2, 2),
    "vgg-c3-pool": Layer(conv.LAYERS["vgg-c3"], 2, 2),
    "alexnet-stem-pool": Layer(conv.Layer((128, 3, 224, 224), 64, 11, stride=4, padding=2), 3, 2),
}
# Compiled in every precision, and for every target.
HEADLINE = ("resnet50-stem-pool",)


def problem_of(layer: Layer, label: str) -> Any:
    """The layer as the kernel knows it, whatever the layout of the image: both are re-laid."""
    from ..kernels import conv_pool

    output = layer.pool.output[2:]
    problem = conv._problem(layer.conv, *PRECISIONS[label], channels_last=True)
    window = conv_pool.PoolWindow(*[layer.window] * 2, *[layer.stride] * 2, *[layer.padding] * 2)
    return conv_pool.conv_pool_problem(problem, window, output)


def layers(target: str) -> Iterator[Layers]:
    from ..kernels import conv_pool

    for name, layer in LAYERS.items():
        for label in precisions_for(target) if name in HEADLINE else ["bf16"]:
            if target in ALL_LAYERS or name in (*HEADLINE, "vgg-c1-pool"):
                yield f"{name}-{label}-nhwc", conv_pool.CONV_MAX_POOL, problem_of(layer, label)


# --- calls that are compared -----------------------------------------------------------------------------------------


def _torch(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None,
    precision: str | None = None, pool_kernel_size: int, pool_stride: int, pool_padding: int, **geometry: Any,
) -> Tensor:  # fmt: skip
    """The same by torch's operators, each step one of them."""
    z = activate(F.conv2d(input, weight, bias, **geometry), activation or "none")
    return F.max_pool2d(z, pool_kernel_size, pool_stride, pool_padding)


def _bare(input: Tensor, weight: Tensor, bias: Tensor | None = None, **others: Any) -> Tensor:
    return _torch(input, weight, **{**others, "activation": None})


def case(
    name: str, epilogue: str = "bias relu", *, layer: Layer | None = None, dtype: str = "bf16", layout: str = "nhwc",
    rank: int = 1,
) -> Case:  # fmt: skip
    """As a convolution's case, and the pooling's arguments."""
    layer = LAYERS[name] if layer is None else layer
    one = conv.case(name, epilogue, layer=layer.conv, dtype=dtype, layout=layout, rank=rank)
    kwargs = {"activation": None, **one.kwargs, **layer.arguments()}
    return replace(one, op="conv2d_max_pool2d", kwargs=kwargs)


def layer_of(case: Case) -> Layer:
    window, stride, padding = (case.kwargs[f"pool_{name}"] for name in ("kernel_size", "stride", "padding"))
    return Layer(conv.layer_of(case), window, stride, padding)


def _describe(case: Case) -> str:
    layer = layer_of(case)
    return f"{conv._describe(case)}, max {layer.window}x{layer.window} s{layer.stride}"


def _floor_us(case: Case, device: DeviceSpec) -> float:
    """x, w and the pooled output once over the memory bus, or every product once; nothing of what lies between."""
    layer = layer_of(case)
    problem = conv._problem(layer.conv, *PRECISIONS[case.precision], channels_last=True)
    elements = prod(layer.conv.input) + prod(layer.conv.weight) + prod(layer.pool.output)
    return stream_us(elements, problem.flops, problem.itemsize, device.tflops(problem.precision), device)


def _tiny(one: Case) -> Case:
    layer = layer_of(one)
    n, c, *space = layer.conv.input
    side = max(9, layer.conv.taps[0] + 4 * layer.conv.stride)
    small = layer.conv._replace(input=(min(n, 2), min(c, 16), *(min(size, side) for size in space)), k=8)
    steps = " ".join(one.epilogue.split("+"))
    tiny = case(
        one.name, steps, layer=layer._replace(conv=small), dtype=one.precision, layout=one.layout, rank=one.rank
    )
    return replace(tiny, direction=one.direction)


OPERATORS = {"conv2d_max_pool2d": Operator(conv2d_max_pool2d, _torch, _bare, IMAGES, _describe, _floor_us, _tiny)}


def _cases() -> Iterable[Case]:
    yield case("resnet50-stem-pool", rank=0)
    yield case("vgg-c1-pool", rank=1)
    yield case("vgg-c3-pool", rank=2)
    yield case("alexnet-stem-pool", rank=2)
    yield case("resnet50-stem-pool", layout="nchw", rank=3)
    yield case("resnet50-stem-pool", dtype="fp16", rank=3)
    yield case("resnet50-stem-pool", dtype="tf32", rank=3)


CASES = tuple(_cases())


# --- the kernel by itself --------------------------------------------------------------------------------------------

TUNED = ("resnet50-stem-pool", "vgg-c1-pool")


def explicit(
    op: str, input: Shape, weight: Shape, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1,
    kernel: int = 2, pool_stride: int | None = None, pool_padding: int = 0,
) -> Case:  # fmt: skip
    one = conv.explicit("conv2d", input, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return case("explicit", "", layer=Layer(conv.layer_of(one), kernel, pool_stride or kernel, pool_padding))


def recorded(call: Recorded) -> tuple[str, str] | None:
    if call.op not in OPERATORS:
        return None
    pooling = {f"pool_{name}": call.number(f"pool_{name}") for name in ("kernel_size", "stride", "padding")}
    shapes, options = conv.arguments_of(call, *conv.EPILOGUE, *pooling)
    return call.op, spelled(shapes, {**options, "kernel": pooling.pop("pool_kernel_size"), **pooling})


def kinds(one: Case) -> tuple[str, ...]:
    """Of a gradient nothing is fused."""
    return ("fwd",)


def kernel_tensors(one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]:
    return random_tensors(OPERATORS[one.op], replace(one, direction="fwd"), device, seed)


def kernel_of(one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    """Without bias and activation, of which the store's key says nothing."""
    from ..kernels import conv_pool

    layer, last = layer_of(one), one.layout == "nhwc"
    problem = problem_of(layer, one.precision)
    geometry = conv._problem(layer.conv, *PRECISIONS[one.precision], channels_last=True).geometry
    size, output = layer.conv.output[2:], layer.pool.output[2:]
    options: dict[str, Any] = {"precision": one.precision, "is_channels_last": last}
    return Kernel(
        conv_pool.CONV_MAX_POOL,
        problem,
        lambda t: conv_pool.run(t["input"], t["weight"], size, geometry, problem.window, output, **options),
        lambda t: _bare(t["input"], t["weight"], **layer.arguments()),
    )
