"""Convolution's layers: what is compiled without a GPU, measured with one, and the bytes each kernel should move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autotune.config import Config
from ..autotune.cost import cdiv
from ..autotune.device import DeviceSpec
from ..ops import conv2d
from ..ops.conv import activate
from .case import (
    ALL_LAYERS,
    DTYPES,
    IMAGES,
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


class Layer(NamedTuple):
    """One convolution of a model: images and input channels, filters, window."""

    input: Shape
    k: int
    window: int
    stride: int = 1
    padding: int | None = None  # None keeps the size
    dilation: int = 1
    groups: int = 1

    @property
    def pad(self) -> int:
        return self.dilation * (self.window // 2) if self.padding is None else self.padding

    @property
    def weight(self) -> Shape:
        return (self.k, self.input[1] // self.groups, self.window, self.window)

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, _, *sizes = self.input
        reach = self.dilation * (self.window - 1) + 1
        p, q = ((size + 2 * self.pad - reach) // self.stride + 1 for size in sizes)
        return n, self.k, p, q


LAYERS = {
    "resnet50-stem": Layer((32, 3, 224, 224), 64, 7, stride=2),
    "resnet50-s1-3x3": Layer((32, 64, 56, 56), 64, 3),
    "resnet50-s1-1x1": Layer((32, 64, 56, 56), 256, 1),
    "resnet50-s2-3x3": Layer((32, 128, 56, 56), 128, 3, stride=2),
    "resnet50-s2-1x1": Layer((32, 128, 28, 28), 512, 1),
    "resnet50-s2-shortcut": Layer((32, 256, 56, 56), 512, 1, stride=2),
    "resnet50-s3-3x3": Layer((32, 256, 14, 14), 256, 3),
    "resnet50-s4-3x3": Layer((32, 512, 7, 7), 512, 3),
    "resnet50-s4-1x1": Layer((32, 512, 7, 7), 2048, 1),
    "batch1-s4-3x3": Layer((1, 512, 7, 7), 512, 3),
    "vgg-c1": Layer((32, 64, 224, 224), 64, 3),
    "vgg-c3": Layer((32, 256, 56, 56), 256, 3),
    "vgg-c4": Layer((32, 512, 28, 28), 512, 3),
    "convnext-stem": Layer((64, 3, 224, 224), 96, 4, stride=4, padding=0),
    "resnext50-g32": Layer((32, 128, 56, 56), 128, 3, groups=32),
    "unet-320": Layer((2, 320, 64, 64), 320, 3),
    "unet-1280": Layer((2, 1280, 16, 16), 1280, 3),
    "vae-128": Layer((1, 128, 512, 512), 128, 3),
    "deeplab-aspp": Layer((8, 2048, 33, 33), 256, 3, dilation=12),
    "convnext-dw-s1": Layer((64, 96, 56, 56), 96, 7, groups=96),
    "convnext-dw-s3": Layer((64, 384, 14, 14), 384, 7, groups=384),
    "mobilenetv3-dw": Layer((64, 72, 56, 56), 72, 5, stride=2, groups=72),
    "efficientnet-dw": Layer((64, 96, 112, 112), 96, 3, stride=2, groups=96),
    "batch1-dw": Layer((1, 16, 14, 14), 16, 3, groups=16),
}
# Compiled in every precision and layout, and for every target.
HEADLINE = ("resnet50-s1-3x3", "resnet50-s1-1x1", "convnext-dw-s1")


def _is_depthwise(layer: Layer) -> bool:
    return layer.groups > 1 and layer.weight[1] == 1


def _geometry(stride: int, padding: int, dilation: int, groups: int) -> Any:
    from ..kernels.conv import Geometry

    return Geometry(stride, stride, padding, padding, dilation, dilation, groups)


def problem_of(layer: Layer, label: str, channels_last: bool = True) -> Any:
    """The layer as the kernels know it; an image's three channels are padded, as the launcher does."""
    from ..kernels import conv

    dtype, precision = PRECISIONS[label]
    geometry = _geometry(layer.stride, layer.pad, layer.dilation, layer.groups)
    pq = (layer.output[2], layer.output[3])
    problem = conv.problem_of(layer.input, layer.weight, pq, geometry, dtype, precision, channels_last)
    return conv.pad_problem(problem)


def layers(target: str) -> Iterator[Layers]:
    from ..kernels import conv, conv_depthwise

    for name, layer in LAYERS.items():
        if target not in ALL_LAYERS and name not in HEADLINE:
            continue
        depthwise = _is_depthwise(layer)
        module = conv_depthwise if depthwise else conv
        for label in precisions_for(target) if name in HEADLINE else ["bf16"]:
            if depthwise and label in ("tf32", "tf32x3"):
                continue  # no products of tiles, so no precision to choose
            for layout in ("nhwc", "nchw") if name in HEADLINE and label == "bf16" else ("nhwc",):
                problem = problem_of(layer, label, layout == "nhwc")
                for tunable in (module.FORWARD, module.INPUT_GRAD, module.WEIGHT_GRAD):
                    yield f"{name}-{label}-{layout}", tunable, problem
        if not depthwise:
            n, k, p, q = layer.output
            epilogue = conv.EpilogueProblem(n * p * q, k, torch.bfloat16, has_saved=True, writes_g=True, has_bias=True)
            yield f"{name}-bf16-nhwc", conv.EPILOGUE_GRAD, epilogue


# --- what the compiler must make of them -----------------------------------------------------------------------------

PRODUCTS = ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")


def wgmma_rows(kernel: str, problem: Any) -> int:
    """Rows of the tiles that the tensor cores multiply; 0 for kernels without products. WGMMA takes 64."""
    if kernel not in PRODUCTS:
        return 0
    return int(problem.K if kernel == "conv2d_weight_grad" else problem.pixels)


def due_load_bytes(kernel: str, problem: Any) -> int:
    """How wide every load has to be: 16 bytes for 16-bit channels last with channels in eights, else 0 for any."""
    if problem.dtype.itemsize != 2 or not getattr(problem, "channels_last", True):
        return 0
    if kernel.startswith("conv2d_depthwise"):
        return 16 if problem.geometry.groups % 8 == 0 and problem.K == 1 else 0
    if kernel in PRODUCTS and problem.C % 8:
        return 0
    return 0 if problem.K % 8 else 16


# --- bytes that load and store instructions move: the formulas at the kernels' heads ----------------------------------


def _forward_bytes(p: Any, config: Config) -> float:
    tiles_m, tiles_n = cdiv(p.pixels, config.BLOCK_M), cdiv(p.K, config.BLOCK_N)
    taps = p.R * p.S * p.C
    output = p.pixels * p.K
    partial = 8 * config.SPLIT_K * output if config.SPLIT_K > 1 else 0
    bytes_a_group = (tiles_n * p.pixels * taps + tiles_m * p.K * taps + output) * p.itemsize + partial
    return float(p.geometry.groups * bytes_a_group)


def _input_grad_bytes(p: Any, config: Config) -> float:
    g = p.geometry
    tiles_n = cdiv(p.C, config.BLOCK_N)
    weights = 0
    for row in range(g.stride_h):
        for column in range(g.stride_w):
            taps = sum((r * g.dil_h) % g.stride_h == row for r in range(p.R))
            taps *= sum((s * g.dil_w) % g.stride_w == column for s in range(p.S))
            pixels = p.N * cdiv(p.H, g.stride_h) * cdiv(p.W, g.stride_w)
            weights += cdiv(pixels, config.BLOCK_M) * taps * p.K * p.C
    gathered = tiles_n * p.pixels * p.R * p.S * p.K
    return float(g.groups * (gathered + weights + p.N * p.H * p.W * p.C) * p.itemsize)


def _weight_grad_bytes(p: Any, config: Config) -> float:
    columns = p.R * p.S * p.C
    tiles_m, tiles_n = cdiv(p.K, config.BLOCK_M), cdiv(columns, config.BLOCK_N)
    partial = 8 * config.SPLIT_K * columns * p.K if config.SPLIT_K > 1 else 0
    operands = tiles_m * p.pixels * columns + tiles_n * p.pixels * p.K + columns * p.K
    return float(p.geometry.groups * (operands * p.itemsize + partial))


def _epilogue_grad_bytes(p: Any, config: Config) -> float:
    splits = max(1, min(config.SPLIT_M, cdiv(p.M, config.BLOCK_M)))
    return p.minimal_bytes() + p.has_bias * p.K * (8 * splits + p.dtype.itemsize)


def _depthwise_bytes(p: Any, config: Config) -> float:
    filters, taps = p.K * p.geometry.groups, p.R * p.S
    weights = cdiv(p.pixels, config.BLOCK_M) * taps * filters
    return float((taps * p.pixels * filters + weights + p.pixels * filters) * p.itemsize)


def _depthwise_input_grad_bytes(p: Any, config: Config) -> float:
    filters, taps, pixels = p.K * p.geometry.groups, p.R * p.S, p.N * p.H * p.W
    weights = cdiv(pixels, config.BLOCK_M) * taps * filters
    return float((taps * p.pixels * filters + weights + pixels * p.geometry.groups) * p.itemsize)


def _depthwise_weight_grad_bytes(p: Any, config: Config) -> float:
    filters, taps = p.K * p.geometry.groups, p.R * p.S
    splits = max(1, min(config.SPLIT_M, cdiv(p.pixels, config.BLOCK_M)))
    return float(taps * filters * (2 * p.pixels * p.itemsize + 8 * splits + p.itemsize))


TRAFFIC: dict[str, Callable[[Any, Config], float]] = {
    "conv2d": _forward_bytes,
    "conv2d_input_grad": _input_grad_bytes,
    "conv2d_weight_grad": _weight_grad_bytes,
    "conv2d_epilogue_grad": _epilogue_grad_bytes,
    "conv2d_depthwise": _depthwise_bytes,
    "conv2d_depthwise_input_grad": _depthwise_input_grad_bytes,
    "conv2d_depthwise_weight_grad": _depthwise_weight_grad_bytes,
}


# --- calls that are compared -----------------------------------------------------------------------------------------


def _torch_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *,
    activation: str = "none", precision: str | None = None, **geometry: Any,
) -> Tensor:  # fmt: skip
    z = F.conv2d(input, weight, bias, **geometry)
    if residual is not None:
        z = z + residual
    return activate(z, activation)


def _bare_conv2d(input: Tensor, weight: Tensor, **others: Any) -> Tensor:
    geometry = {name: others[name] for name in ("stride", "padding", "dilation", "groups")}
    return F.conv2d(input, weight, None, **geometry)


def case(
    name: str, epilogue: str = "", *, layer: Layer | None = None, dtype: str = "bf16", layout: str = "nhwc",
    direction: str = "fwd", rank: int = 1,
) -> Case:  # fmt: skip
    """``epilogue`` lists the steps after the convolution: bias, residual, an activation. dtype ``"tf32"`` is fp32
    multiplied in tf32."""
    layer = LAYERS[name] if layer is None else layer
    steps = epilogue.split()
    shapes: dict[str, Shape] = {"input": layer.input, "weight": layer.weight}
    if "bias" in steps:
        shapes["bias"] = (layer.k,)
    if "residual" in steps:
        shapes["residual"] = layer.output
    kwargs: dict[str, Any] = {
        "stride": layer.stride, "padding": layer.pad, "dilation": layer.dilation, "groups": layer.groups
    }  # fmt: skip
    for step in steps:
        if step not in ("bias", "residual"):
            kwargs["activation"] = step
    if dtype == "tf32":
        dtype, kwargs["precision"] = "fp32", "tf32"
    return Case(name, "conv2d", shapes, kwargs, dtype, layout, direction, rank)


def layer_of(case: Case) -> Layer:
    kw = case.kwargs
    k, _, window, _ = case.shapes["weight"]
    return Layer(case.shapes["input"], k, window, kw["stride"], kw["padding"], kw["dilation"], kw["groups"])


def _describe(case: Case) -> str:
    n, c, h, w = case.shapes["input"]
    k, _, r, s = case.shapes["weight"]
    options = "".join(
        f" {letter}{case.kwargs[name]}"
        for letter, name, default in (("s", "stride", 1), ("d", "dilation", 1), ("g", "groups", 1))
        if case.kwargs[name] != default
    )
    epilogue = f" +{case.epilogue}" if case.epilogue else ""
    return f"{n}x{c}x{h}x{w} -> {k} {r}x{s}{options}{epilogue}"


def _floor_us(case: Case, device: DeviceSpec) -> float:
    """Every tensor once over the memory bus, or every product at the rate of the unit that must do it."""
    from ..kernels import conv

    layer, shapes = layer_of(case), case.shapes
    geometry = _geometry(layer.stride, layer.pad, layer.dilation, layer.groups)
    problem = conv.problem_of(
        layer.input, layer.weight, (layer.output[2], layer.output[3]), geometry, DTYPES[case.dtype], case.precision,
        case.layout == "nhwc",
    )  # fmt: skip
    rate = device.tflops("ieee" if _is_depthwise(layer) else problem.precision)
    elements = problem.minimal_bytes() / problem.itemsize
    extra = prod(layer.output) if "residual" in shapes else 0
    floor = stream_us(elements + extra, problem.flops, problem.itemsize, rate, device)
    if case.direction == "fwd":
        return floor
    # Backward reads x, w and dy, and y for the activation's derivative; it writes each gradient.
    written = sum(prod(shapes[name]) for name in case.needs_grad)
    saved = prod(layer.output) if "activation" in case.kwargs else 0
    products = 2 if "input" in case.needs_grad else 1
    return floor + stream_us(elements + saved + written, products * problem.flops, problem.itemsize, rate, device)


def _tiny(one: Case) -> Case:
    layer = layer_of(one)
    n, _, h, w = layer.input
    per_group = layer.weight[1]
    groups = min(layer.groups, 8 if per_group == 1 else 2)
    dilation = min(layer.dilation, 2)
    side = max(7, 2 * layer.stride + 1)
    small = Layer(
        (min(n, 2), groups * min(per_group, 16), min(h, side), min(w, side)), groups * min(layer.k // layer.groups, 16),
        layer.window, layer.stride, layer.pad // layer.dilation * dilation, dilation, groups,
    )  # fmt: skip
    tiny = case(one.name, " ".join(one.epilogue.split("+")), layer=small, dtype=one.precision, layout=one.layout)
    return replace(tiny, op=one.op, direction=one.direction, rank=one.rank)


OPERATORS = {"conv2d": Operator(conv2d, _torch_conv2d, _bare_conv2d, IMAGES, _describe, _floor_us, _tiny)}


# Convolutions of a deployed network carry a folded normalisation as bias, and the activation of their block; those of
# a network in training are followed by the normalisation itself and stand alone, but where the model has none.
def _cases() -> Iterable[Case]:
    train = "fwd+bwd"
    for name, epilogue in (
        ("resnet50-s1-3x3", "bias relu"), ("resnet50-s3-3x3", "bias relu"), ("resnet50-stem", "bias relu"),
        ("resnet50-s1-1x1", "bias residual relu"), ("convnext-dw-s1", "bias"), ("vgg-c3", "bias relu"),
    ):  # fmt: skip
        yield case(name, epilogue, rank=0)
    for name, epilogue in (
        ("resnet50-s1-3x3", ""), ("convnext-dw-s1", "bias"), ("vgg-c3", "bias relu"), ("resnet50-s3-3x3", ""),
        ("resnet50-s1-1x1", ""),
    ):  # fmt: skip
        yield case(name, epilogue, direction=train, rank=0)

    for name, epilogue in (
        ("resnet50-s2-3x3", "bias relu"), ("resnet50-s2-shortcut", "bias"), ("resnet50-s4-3x3", "bias relu"),
        ("resnet50-s4-1x1", "bias residual relu"), ("convnext-stem", "bias"), ("convnext-dw-s3", "bias"),
        ("mobilenetv3-dw", "bias relu"), ("efficientnet-dw", "bias silu"), ("resnext50-g32", "bias relu"),
        ("unet-320", "bias"), ("unet-1280", "bias"), ("deeplab-aspp", "bias relu"), ("vgg-c4", "bias relu"),
        ("vae-128", "bias"), ("vgg-c1", "bias relu"),
    ):  # fmt: skip
        yield case(name, epilogue, rank=1)
    for name, epilogue in (
        ("resnet50-stem", ""), ("resnet50-s2-3x3", ""), ("resnet50-s2-shortcut", ""), ("resnet50-s4-3x3", ""),
        ("mobilenetv3-dw", ""), ("efficientnet-dw", ""), ("resnext50-g32", ""), ("unet-320", "bias"),
        ("convnext-dw-s3", "bias"),
    ):  # fmt: skip
        yield case(name, epilogue, direction=train, rank=2)

    # Other dtypes and layouts, and the convolution alone.
    yield case("resnet50-s1-3x3", "bias relu", dtype="fp16", rank=3)
    yield case("resnet50-s1-3x3", "bias relu", dtype="tf32", rank=3)
    yield case("resnet50-s3-3x3", dtype="tf32", direction=train, rank=3)
    yield case("resnet50-s1-3x3", "bias relu", layout="nchw", rank=3)
    yield case("convnext-dw-s1", "bias", layout="nchw", rank=3)
    for name in ("resnet50-s1-3x3", "resnet50-s2-1x1", "resnet50-s3-3x3"):
        yield case(name, rank=3)


CASES = tuple(_cases())


# --- kernels by themselves -------------------------------------------------------------------------------------------

TUNED = (
    "resnet50-s1-3x3", "resnet50-s3-3x3", "resnet50-s1-1x1", "vgg-c3", "convnext-dw-s1", "resnet50-s2-3x3",
    "resnet50-stem", "resnet50-s4-3x3", "vgg-c4", "efficientnet-dw",
)  # fmt: skip


def explicit(
    input: Shape, weight: Shape, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Case:  # fmt: skip
    layer = Layer(input, weight[0], weight[-1], stride, padding, dilation, groups)
    if layer.weight != weight or min(layer.output) < 1:
        raise ValueError(f"weight {weight} with {groups} groups does not fit input {input}: square windows only")
    return case("explicit", layer=layer, direction="fwd+bwd")


def kinds(one: Case) -> tuple[str, ...]:
    """The kernels of a training case, forward first."""
    return ("fwd", "input_grad", "weight_grad") if "input" in one.needs_grad else ("fwd", "weight_grad")


def kernel_tensors(one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]:
    return random_tensors(OPERATORS["conv2d"], one, device, seed)


def kernel_of(one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    """The kernel runs without bias and activation: the store's key says nothing of an epilogue, so what is stored must
    hold without one."""
    from ..kernels import conv, conv_depthwise

    layer = layer_of(one)
    x, weight = tensors["input"], tensors["weight"]
    stride, padding, dilation = ([size] * 2 for size in (layer.stride, layer.pad, layer.dilation))
    groups, geometry = layer.groups, _geometry(layer.stride, layer.pad, layer.dilation, layer.groups)
    depthwise = _is_depthwise(layer)
    module = conv_depthwise if depthwise else conv
    # Three channels become four in the launcher, which then looks up the padded problem.
    pad = conv.pad_channels if groups == 1 and kind != "input_grad" else lambda t: t
    pq = (layer.output[2], layer.output[3])
    problem = conv.problem_of(tuple(pad(x).shape), tuple(pad(weight).shape), pq, geometry, x.dtype, one.precision, True)
    options = {"precision": one.precision, "is_channels_last": True}
    shape = tuple(weight.shape)

    def gradient(mask: tuple[bool, bool, bool], place: int) -> Callable[[dict[str, Tensor]], Tensor]:
        def run(t: dict[str, Tensor]) -> Tensor:
            return torch.ops.aten.convolution_backward(
                t["dy"], t["input"], t["weight"], None, stride, padding, dilation, False, [0, 0], groups, mask
            )[place]

        return run

    if kind == "fwd":
        return Kernel(
            module.FORWARD,
            problem,
            lambda t: module.run_forward(t["input"], t["weight"], pq, geometry, **options)[0],
            lambda t: F.conv2d(t["input"], t["weight"], None, stride, padding, dilation, groups),
        )
    if kind == "input_grad":
        return Kernel(
            module.INPUT_GRAD,
            problem,
            lambda t: module.run_input_grad(t["dy"], t["weight"], (x.shape[2], x.shape[3]), geometry, **options),
            gradient((True, False, False), 0),
        )
    return Kernel(
        module.WEIGHT_GRAD,
        problem,
        lambda t: module.run_weight_grad(t["input"], t["dy"], shape, geometry, **options),
        gradient((False, True, False), 1),
    )
