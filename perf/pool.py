"""Pooling's layers: what is compiled without a GPU, measured with one, and the bytes each kernel should move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..autotune.device import DeviceSpec
from ..autotune.layout import empty
from ..autotune.recorded import Recorded, spelled
from ..autotune.resolve import resolve
from ..autotune.workload import ALL_LAYERS, DTYPES, PRECISIONS, Case, Kernel, Layers, Operator, Shape, random_tensors
from ..ops.pool_operators import kernel_window, offset_dtype
from .providers import IMAGES


class Layer(NamedTuple):
    """One pooling of a model; fixed windows have the same size in every dimension."""

    op: str
    input: Shape
    window: int = 0
    stride: int = 0
    padding: int = 0
    size: int = 1
    """Of the result, where windows are adaptive."""

    @property
    def rank(self) -> int:
        return len(self.input) - 2

    @property
    def is_adaptive(self) -> bool:
        return self.window == 0

    @property
    def output(self) -> Shape:
        n, c, *space = self.input
        if self.is_adaptive:
            return (n, c, *(self.size for _ in space))
        return (n, c, *((size + 2 * self.padding - self.window) // self.stride + 1 for size in space))

    @property
    def reduce(self) -> str:
        return "norm2" if "lp" in self.op else "mean" if "avg" in self.op else "max"

    def kwargs(self) -> dict[str, Any]:
        if self.is_adaptive:
            return {} if "global" in self.op else {"output_size": self.size}
        fixed = {"kernel_size": self.window, "stride": self.stride}
        return {"norm_type": 2, **fixed} if "lp" in self.op else {**fixed, "padding": self.padding}


LAYERS = {
    "resnet50-maxpool": Layer("max_pool2d", (32, 64, 112, 112), 3, 2, 1),
    "vgg-maxpool": Layer("max_pool2d", (32, 64, 224, 224), 2, 2),
    "vgg-maxpool-deep": Layer("max_pool2d", (32, 512, 14, 14), 2, 2),
    "small-maxpool": Layer("max_pool2d", (8, 16, 24, 24), 2, 2),
    "yolo-spp": Layer("max_pool2d", (16, 256, 20, 20), 5, 1, 2),
    "video-maxpool": Layer("max_pool3d", (4, 64, 16, 56, 56), 3, 2, 1),
    "wave-maxpool": Layer("max_pool1d", (32, 128, 16000), 4, 4),
    "resnet50d-avgpool": Layer("avg_pool2d", (32, 256, 56, 56), 2, 2),
    "inception-avgpool": Layer("avg_pool2d", (32, 288, 35, 35), 3, 1, 1),
    "video-avgpool": Layer("avg_pool3d", (4, 256, 8, 28, 28), 2, 2),
    "pspnet-adaptive": Layer("adaptive_avg_pool2d", (8, 2048, 60, 60), size=6),
    "roi-adaptive": Layer("adaptive_max_pool2d", (256, 256, 28, 28), size=7),
    "detector-adaptive": Layer("adaptive_max_pool2d", (64, 256, 25, 25), size=7),
    "resnet50-global": Layer("global_avg_pool", (32, 2048, 7, 7)),
    "efficientnet-global": Layer("global_avg_pool", (64, 1280, 7, 7)),
    "large-global": Layer("global_max_pool", (1, 64, 512, 512)),
    "blur-lp": Layer("lp_pool2d", (32, 128, 56, 56), 2, 2),
}
HEADLINE = ("resnet50-maxpool", "resnet50-global")
UNPOOLED = ("resnet50-maxpool", "vgg-maxpool", "vgg-maxpool-deep")
# Compiled in both layouts.
BOTH_LAYOUTS = (*HEADLINE, *UNPOOLED, "large-global")
# Compiled in NCHW only; what is in neither list in channels last only.
IN_ROWS = ("wave-maxpool", "inception-avgpool", "video-maxpool", "roi-adaptive", "pspnet-adaptive")


def _window(layer: Layer) -> Any:
    """The layer's windows as the kernels take them."""
    sizes: tuple[tuple[int, ...], ...] = ((), (), (), ())
    if not layer.is_adaptive:
        values = (layer.window, layer.stride, layer.padding, 1)
        sizes = tuple((value,) * layer.rank for value in values)
    return kernel_window(layer.input[2:], layer.output[2:], sizes)


def _index_dtype(layer: Layer) -> torch.dtype:
    return offset_dtype(layer.input[2:], layer.output[2:], (layer.window,) * layer.rank if layer.window else ())


def _index_bytes(layer: Layer) -> int:
    """Of what a maximum keeps for its backward."""
    return _index_dtype(layer).itemsize if layer.reduce == "max" else 0


def problem_of(
    layer: Layer, dtype: torch.dtype, index_bytes: int, channels_last: bool, reduce: str = ""
) -> Any:  # fmt: skip
    from ..kernels import pool

    x = torch.empty(layer.input, dtype=dtype, device="meta")
    layout = "nhwc" if channels_last else "nchw"
    return pool.problem_of(
        x, layer.output[2:], _window(layer), reduce or layer.reduce, index_bytes=index_bytes, layout=layout
    )  # fmt: skip


def layers(target: str) -> Iterator[Layers]:
    from ..kernels import pool

    for name, layer in LAYERS.items():
        if target not in ALL_LAYERS and name not in HEADLINE:
            continue
        for label in ("bf16", "fp16", "ieee") if name in HEADLINE else ("bf16",):
            layouts = ("nchw",) if name in IN_ROWS else ("nhwc",)
            for layout in ("nhwc", "nchw") if name in BOTH_LAYOUTS and label == "bf16" else layouts:
                dtype, last = PRECISIONS[label][0], layout == "nhwc"
                problem = problem_of(layer, dtype, _index_bytes(layer), last)
                row = f"{name}-{label}-{layout}"
                yield row, pool.GLOBAL if problem.is_global() else pool.FORWARD, problem
                yield row, pool.BACKWARD, problem
                if problem.index_bytes and name in HEADLINE:
                    yield f"{row}-values", pool.FORWARD, problem_of(layer, dtype, 0, last)
                if name in UNPOOLED:
                    yield row, pool.GATHER, problem
                    yield row, pool.UNPOOL, problem_of(layer, dtype, 8, last, "last")


# --- calls that are compared -----------------------------------------------------------------------------------------


def case(name: str, *, dtype: str = "bf16", layout: str = "nhwc", direction: str = "fwd", rank: int = 1) -> Case:
    layer = LAYERS[name]
    return Case(name, layer.op, {"input": layer.input}, layer.kwargs(), dtype, layout, direction, rank)


def layer_of(case: Case) -> Layer:
    kw = case.kwargs
    if "kernel_size" not in kw:
        return Layer(case.op, case.shapes["input"], size=kw.get("output_size", 1))
    return Layer(case.op, case.shapes["input"], kw["kernel_size"], kw["stride"], kw.get("padding", 0))


def _describe(case: Case) -> str:
    layer = layer_of(case)
    kind = case.op.removesuffix("d").rstrip("123").removesuffix("_pool").removeprefix("global_")
    kind = kind.removeprefix("adaptive_")
    window = "x".join([str(layer.window)] * layer.rank) + f" s{layer.stride}"
    if layer.is_adaptive:
        window = "to " + "x".join(map(str, layer.output[2:]))
    return f"{'x'.join(map(str, layer.input))} {kind} {window}"


def _traffic(case: Case, device: DeviceSpec) -> tuple[float, float]:
    """x read and y written; with a backward also the winners' places, or what a norm keeps, and both gradients."""
    from ..kernels import pool

    trains, layer = case.direction != "fwd", layer_of(case)
    problem = problem_of(layer, DTYPES[case.dtype], _index_bytes(layer) if trains else 0, case.layout == "nhwc")
    passes = [(pool.GLOBAL if problem.is_global() else pool.FORWARD, problem.forward_bytes())]
    if trains:
        passes.append((pool.BACKWARD, problem.backward_bytes()))
    moved = sum(one.moved_bytes(problem, resolve(one, problem, device).config) for one, _ in passes)
    return sum(needed for _, needed in passes), moved


def _floor_us(case: Case, device: DeviceSpec) -> float:
    """What a case needs at the rate of a copy, so a time's share of it is the share of the copy bandwidth."""
    return _traffic(case, device)[0] / (device.dram_gbs * 1e3)


def _tiny(case: Case) -> Case:
    n, c, *space = case.shapes["input"]
    smallest = {1: 40, 2: 7, 3: 5}[len(space)]
    return replace(case, shapes={"input": (min(n, 2), min(c, 20), *(min(size, smallest) for size in space))})


def _torch_global(kind: str) -> Callable[[Tensor], Tensor]:
    """As a model calls it: the mean of the planes, or an adaptive maximum."""

    def run(input: Tensor) -> Tensor:
        if kind == "avg":
            return F.adaptive_avg_pool2d(input, 1)
        y: Tensor = F.adaptive_max_pool2d(input, 1)
        return y

    return run


_TORCH: dict[str, Callable[..., Any]] = {
    "global_avg_pool": _torch_global("avg"),
    "global_max_pool": _torch_global("max"),
}
OPERATORS = {
    op: Operator(
        getattr(ops, op),
        _TORCH.get(op) or getattr(F, op),
        None,
        IMAGES,
        _describe,
        _floor_us,
        _tiny,
        compiled=True,
        traffic=_traffic,
    )
    for op in sorted({layer.op for layer in LAYERS.values()})
}


def _cases() -> Iterable[Case]:
    train = "fwd+bwd"
    yield case("resnet50-maxpool", rank=0)
    yield case("resnet50-maxpool", direction=train, rank=0)
    yield case("resnet50-maxpool", layout="nchw", rank=0)
    yield case("vgg-maxpool", rank=1)
    yield case("resnet50-maxpool", layout="nchw", direction=train, rank=1)
    yield case("resnet50-global", rank=1)
    for name in ("vgg-maxpool", "resnet50-global", "resnet50d-avgpool", "pspnet-adaptive", "roi-adaptive"):
        yield case(name, direction=train, rank=2)
    yield case("resnet50-maxpool", dtype="fp16", rank=3)
    for name in LAYERS:
        if name not in ("resnet50-maxpool", "resnet50-global", "vgg-maxpool"):
            yield case(name, layout=_layout(name), rank=3)
    for name in ("yolo-spp", "video-maxpool", "wave-maxpool", "inception-avgpool", "video-avgpool", "blur-lp"):
        yield case(name, layout=_layout(name), direction=train, rank=3)


def _layout(name: str) -> str:
    """Sequences come as [N, C, L], images channels last."""
    return "nchw" if name == "wave-maxpool" else "nhwc"


CASES = tuple(_cases())


# --- kernels by themselves -------------------------------------------------------------------------------------------

TUNED = ("resnet50-maxpool", "resnet50-global", "vgg-maxpool", "resnet50d-avgpool", "pspnet-adaptive", "roi-adaptive")


def explicit(
    op: str, input: Shape, *, kernel: int | None = None, stride: int | None = None, padding: int = 0,
    size: int | None = None,
) -> Case:  # fmt: skip
    """Fixed windows have ``kernel``, ``stride`` and ``padding``; adaptive ones the ``size`` of the output."""
    if "adaptive" in op or "global" in op:
        if (kernel, stride, padding) != (None, None, 0) or ("global" in op and size is not None):
            raise ValueError(f"{op} has no window" + ("" if "global" in op else ": give it the size of the output"))
        layer = Layer(op, input, size=size or 1)
    elif size is not None:
        raise ValueError(f"{op} has no size: give it kernel, stride and padding")
    else:
        layer = Layer(op, input, kernel or 2, stride or kernel or 2, padding)
    if layer.rank not in (1, 2, 3):
        raise ValueError(f"input {input} has no one to three dimensions of space")
    return Case("explicit", op, {"input": input}, layer.kwargs(), direction="fwd+bwd")


def recorded(call: Recorded) -> tuple[str, str] | None:
    if call.op not in OPERATORS:
        return None
    named_as = {"kernel_size": "kernel", "stride": "stride", "padding": "padding", "output_size": "size"}
    call.allow(*named_as, dilation=1, norm_type=2.0, keepdim=False)
    shape = call.shapes["input"]
    if call.op.endswith("d"):
        shape = (1,) * (int(call.op[-2]) + 2 - len(shape)) + shape
    return call.op, spelled([shape], {word: call.number(name) for name, word in named_as.items()})


def kinds(one: Case) -> tuple[str, ...]:
    return ("fwd", "bwd")


def kernel_tensors(one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]:
    """For a backward also what each forward kept: the winners, or of a norm its output."""
    tensors = random_tensors(OPERATORS[one.op], one, device, seed)
    if kind == "fwd":
        return tensors
    layer, x = layer_of(one), tensors["input"]
    if layer.reduce != "max":
        return {**tensors, "output": OPERATORS[one.op].torch(x, **one.kwargs)}
    _, places = _forward(layer, x, keeps=True)
    assert places is not None
    function = getattr(F, f"adaptive_max_pool{layer.rank}d" if layer.is_adaptive else one.op)
    kwargs = {"output_size": layer.size} if layer.is_adaptive else one.kwargs
    return {**tensors, "places": places, "indices": function(x, **kwargs, return_indices=True)[1]}


def _forward(layer: Layer, x: Tensor, keeps: bool) -> tuple[Tensor, Tensor | None]:
    """The kernel's output and, for a maximum, the winners."""
    from ..kernels import pool

    last = x.stride(1) == 1
    y = empty(x, layer.output, last)
    places = torch.empty_like(y, dtype=_index_dtype(layer)) if keeps and layer.reduce == "max" else None
    pool.run_forward(x, y, places, _window(layer), layer.reduce, is_channels_last=last)
    return y, places


def kernel_of(one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    from ..kernels import pool

    layer, x = layer_of(one), tensors["input"]
    window, last = _window(layer), one.layout == "nhwc"
    problem = problem_of(layer, x.dtype, _index_bytes(layer), last)
    function = OPERATORS[one.op].torch
    if kind == "fwd":
        tunable = pool.GLOBAL if problem.is_global() else pool.FORWARD
        return Kernel(
            tunable, problem, lambda t: _forward(layer, t["input"], keeps=True)[0],
            lambda t: function(t["input"], **one.kwargs),
        )  # fmt: skip

    def backward(t: dict[str, Tensor]) -> Tensor:
        dx = torch.empty_like(t["input"])
        y, x = (t["output"], t["input"]) if layer.reduce == "norm2" else (None, None)
        pool.run_backward(t["dy"], t.get("places"), y, x, dx, window, layer.reduce, is_channels_last=last)
        return dx

    return Kernel(pool.BACKWARD, problem, backward, lambda t: _torch_backward(one, layer, t))


def _torch_backward(one: Case, layer: Layer, t: dict[str, Tensor]) -> Tensor:
    """torch's backward kernel alone; of a norm, which has none, its own and those around it."""
    aten, rank, x, dy = torch.ops.aten, max(layer.rank, 2), t["input"], t["dy"]
    dx: Tensor
    if layer.reduce == "norm2":
        leaf = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(OPERATORS[one.op].torch(leaf, **one.kwargs), leaf, dy)
        return dx
    flat = layer.rank == 1
    x, dy = (s.unsqueeze(2) if flat else s for s in (x, dy))
    sizes = [
        [neutral, value] if flat else [value] * rank
        for neutral, value in ((1, layer.window), (1, layer.stride), (0, layer.padding))
    ]
    if layer.reduce == "mean":
        if layer.is_adaptive:
            dx = getattr(aten, f"_adaptive_avg_pool{rank}d_backward")(dy, x)
        else:
            dx = getattr(aten, f"avg_pool{rank}d_backward")(dy, x, *sizes, False, True, None)
    else:
        indices = t["indices"].unsqueeze(2) if flat else t["indices"]
        if layer.is_adaptive:
            dx = getattr(aten, f"adaptive_max_pool{rank}d_backward")(dy, x, indices)
        else:
            name = f"max_pool{rank}d_with_indices_backward"
            dx = getattr(aten, name)(dy, x, *sizes, [1] * rank, False, indices)
    return dx.squeeze(2) if flat else dx
