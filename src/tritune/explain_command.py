"""``tritune explain``: what a call would run on a device, here or not, and why.

An operator is one entry of OPS: what its shapes are, its options, and how both become a call.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from . import ops
from .autotune.device import named
from .autotune.layout import empty
from .autotune.recorded import Recorded, read
from .autotune.shapes import Option, Shape, parse
from .autotune.workload import PRECISIONS
from .ops import (
    Decision,
    attention,
    attention_pool,
    conv1d,
    conv2d,
    conv2d_max_pool2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    elman_step,
    explain,
    gru,
    lstm,
    record,
    rnn,
    scaled_dot_product_attention,
    use_backend,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


Options = dict[str, Option]  # by flag, such as "--padding"
Values = Mapping[str, Any]  # the options' values, by name, such as "padding"
Call = tuple[Sequence[Any], dict[str, Any]]  # positional arguments and keywords


class Op(NamedTuple):
    """How the command line spells a call.

    Attributes:
        shapes: what the shapes are, in order; those in brackets may be left out. One example of them.
        arguments: from the tensors of those shapes and the options' values to what the function is called with.
    """

    function: Callable[..., Any]
    shapes: str
    example: str
    options: Options
    arguments: Callable[[list[Tensor], Values], Call]


def _conv(tensors: list[Tensor], o: Values) -> Call:
    names = ("stride", "padding", "output_padding", "dilation", "groups", "activation", "precision")
    return tensors, {name: o[name] for name in names if name in o}


def _pool(tensors: list[Tensor], o: Values) -> Call:
    named_as = {"kernel": "kernel_size", "size": "output_size", "norm": "norm_type"}
    return tensors, {named_as.get(name, name): value for name, value in o.items() if name in _POOLING}


def _unpool(tensors: list[Tensor], o: Values) -> Call:
    (x,) = tensors
    return [x, torch.empty_like(x, dtype=torch.int64)], _pool([], o)[1]


def _conv_pool(tensors: list[Tensor], o: Values) -> Call:
    _, keywords = _conv(tensors, o)
    pooling = {"pool_kernel_size": o["kernel"], "pool_stride": o["pool_stride"], "pool_padding": o["pool_padding"]}
    return tensors, {**keywords, **pooling}


def _recurrent(gates: int) -> Callable[[list[Tensor], Values], Call]:
    def arguments(tensors: list[Tensor], o: Values) -> Call:
        (x,) = tensors
        rows = ([2] if o["bidirectional"] else []) + [gates * o["hidden"]]
        weights = [x.new_empty(*rows, *columns) for columns in ((x.shape[-1],), (o["hidden"],), (), ())]
        names = ("batch_first", "precision", "nonlinearity")
        return [x, *weights], {name: o[name] for name in names if name in o}

    return arguments


def _elman(tensors: list[Tensor], o: Values) -> Call:
    (x,) = tensors
    h = x.new_empty(*x.shape[:-1], o["hidden"])
    return [x, h, x.new_empty(o["hidden"], x.shape[-1]), x.new_empty(o["hidden"], o["hidden"])], {}


def _attention(tensors: list[Tensor], o: Values) -> Call:
    named_as = {"causal": "is_causal", "gqa": "enable_gqa"}
    values = {named_as.get(name, name): value for name, value in o.items() if name in _SCORES}
    q, k, v, *rest = tensors
    return [q, k, v], {**values, **({"bias" if "score" in o else "attn_mask": rest[0]} if rest else {})}


# Options of the attention functions, by the names that the command line has for them.
_SCORES = ("score", "scale", "causal", "gqa", "causal_alignment", "return_lse", "precision")
_LAYOUT: Options = {"--layout": Option(str, "nhwc", "Of images", ("nhwc", "nchw"))}
_PRECISION: Options = {"--precision": Option(str, None, "How fp32 is multiplied", ("ieee", "tf32", "tf32x3"))}
_WINDOW: Options = {"--padding": Option(int, 0), "--dilation": Option(int, 1)}
_CONV: Options = {
    "--stride": Option(int, 1), **_WINDOW, "--groups": Option(int, 1),
    "--activation": Option(str, None, "Such as relu"), **_PRECISION, **_LAYOUT,
}  # fmt: skip
_CONV_TRANSPOSE: Options = {**_CONV, "--output-padding": Option(int, 0)}
_POOL: Options = {
    "--kernel": Option(int, 2), "--stride": Option(int, None, "Default: that of the kernel"), **_WINDOW,
    "--ceil-mode": Option(bool, False), **_LAYOUT,
}  # fmt: skip
# Options of the pooling functions, by the names that the command line has for them.
_POOLING = ("kernel", "stride", "padding", "dilation", "ceil_mode", "size", "norm")
_AVERAGE: Options = {name: option for name, option in _POOL.items() if name != "--dilation"}
_NORM: Options = {
    "--norm": Option(float, 2.0),
    **{name: option for name, option in _AVERAGE.items() if name != "--padding"},
}
_UNPOOL: Options = {name: option for name, option in _AVERAGE.items() if name != "--ceil-mode"}
_ADAPTIVE: Options = {"--size": Option(int, 7, "Of the result"), **_LAYOUT}
_AT_RANDOM: Options = {"--kernel": Option(int, 2), **_ADAPTIVE}
_CONV_POOL: Options = {
    **_CONV, "--kernel": Option(int, 2, "Of the pooling"), "--pool-stride": Option(int),
    "--pool-padding": Option(int, 0),
}  # fmt: skip
_HIDDEN: Options = {"--hidden": Option(int, None, "Units of the state; needed", required=True)}
_LAYER: Options = {
    **_HIDDEN,
    "--bidirectional": Option(bool, False),
    "--batch-first": Option(bool, False),
    **_PRECISION,
}
_NONLINEARITY: Options = {"--nonlinearity": Option(str, "tanh", "", ("tanh", "relu"))}
_SDPA: Options = {
    "--causal": Option(bool, False), "--scale": Option(float),
    "--gqa": Option(bool, False, "Key and value have fewer heads"),
}  # fmt: skip
_POOLED: Options = {"--score": Option(str, "dot", "", ("dot", "cosine")), "--scale": Option(float), **_PRECISION}
_ATTENTION: Options = {
    **_SDPA, **_POOLED, "--causal-alignment": Option(str, "top_left", "", ("top_left", "bottom_right")),
    "--return-lse": Option(bool, False),
}  # fmt: skip
_HEADS = "8x16x1024x64 8x16x1024x64 8x16x1024x64"

OPS = {
    "attention": Op(attention, "query key value [bias]", _HEADS, _ATTENTION, _attention),
    "attention_pool": Op(attention_pool, "query key value", "16x1x64 8x16x197x64 8x16x197x64", _POOLED, _attention),
    "conv1d": Op(conv1d, "input weight [bias]", "8x64x4096 64x64x3", _CONV, _conv),
    "conv2d": Op(conv2d, "input weight [bias]", "32x64x56x56 64x64x3x3", _CONV, _conv),
    "conv2d_max_pool2d": Op(conv2d_max_pool2d, "input weight [bias]", "32x3x224x224 64x3x7x7", _CONV_POOL, _conv_pool),
    "conv3d": Op(conv3d, "input weight [bias]", "1x128x9x128x128 128x128x3x3x3", _CONV, _conv),
    "conv_transpose1d": Op(conv_transpose1d, "input weight [bias]", "8x64x1024 64x32x4", _CONV_TRANSPOSE, _conv),
    "conv_transpose2d": Op(
        conv_transpose2d, "input weight [bias]", "8x1024x32x32 1024x512x2x2", _CONV_TRANSPOSE, _conv
    ),
    "conv_transpose3d": Op(conv_transpose3d, "input weight [bias]", "1x64x8x16x16 64x32x2x2x2", _CONV_TRANSPOSE, _conv),
    **{
        f"{name}{rank}d": Op(getattr(ops, f"{name}{rank}d"), "input", example, options, arguments)
        for name, options, arguments in (
            ("max_pool", _POOL, _pool),
            ("avg_pool", _AVERAGE, _pool),
            ("adaptive_max_pool", _ADAPTIVE, _pool),
            ("adaptive_avg_pool", _ADAPTIVE, _pool),
            ("lp_pool", _NORM, _pool),
            ("max_unpool", _UNPOOL, _unpool),
        )
        for rank, example in enumerate(("32x128x16000", "32x64x112x112", "4x64x16x56x56"), 1)
    },
    **{
        f"fractional_max_pool{rank}d": Op(
            getattr(ops, f"fractional_max_pool{rank}d"), "input", example, _AT_RANDOM, _pool
        )
        for rank, example in ((2, "32x64x112x112"), (3, "4x64x16x56x56"))
    },
    "global_avg_pool": Op(ops.global_avg_pool, "input", "32x2048x7x7", _LAYOUT, _pool),
    "global_max_pool": Op(ops.global_max_pool, "input", "32x2048x7x7", _LAYOUT, _pool),
    "rnn": Op(rnn, "input", "512x64x128", {**_LAYER, **_NONLINEARITY}, _recurrent(1)),
    "gru": Op(gru, "input", "512x64x128", _LAYER, _recurrent(3)),
    "lstm": Op(lstm, "input", "512x64x128", _LAYER, _recurrent(4)),
    "elman_step": Op(elman_step, "input", "64x128", _HIDDEN, _elman),
    "scaled_dot_product_attention": Op(
        scaled_dot_product_attention, "query key value [attn_mask]", _HEADS, _SDPA, _attention
    ),
}


def named_options(op: Op) -> Options:
    """By name, such as ``"padding"``."""
    return {flag[2:].replace("-", "_"): option for flag, option in op.options.items()}


class Request(NamedTuple):
    """A call as the command line spells it.

    Attributes:
        op: an operator of OPS.
        words: shapes and options, as :mod:`.autotune.shapes` reads them.
        given: the values of more options, by name.
        device: ``None`` is this machine.
    """

    op: str
    words: Sequence[str]
    given: Values
    dtype: str = "bf16"
    device: str | None = None
    backend: str = "auto"
    json: bool = False


def main(request: Request) -> int:
    op = OPS[request.op]
    try:
        with _device_named(request.device):
            # Some functions are another one with more arguments: what was asked about is named.
            decision = replace(_decide(op, request), op=request.op)
    except NotImplementedError as error:
        return _fail(str(error), 1)
    except (RuntimeError, TypeError, ValueError) as error:
        return _fail(str(error), 2)
    if request.json:
        print(json.dumps(_document(decision), indent=1))
    else:
        print(decision)
        if request.device is None and _is_on_cpu(request.device):
            print("  on a GPU: --device h200 says what would run there")
    return 0


def explain_file(path: Path, device: str | None, backend: str, as_json: bool) -> int:
    """The decisions of recorded calls on a device, each with the number of calls. Status 1: one of them raises."""
    rows, failed = [], False
    try:
        calls = read(path)
        with _device_named(device):
            for call in calls:
                try:
                    rows.append((call, replace(_decide_recorded(call, device, backend), op=call.op)))
                except NotImplementedError as error:
                    failed = True
                    _fail(f"{call.op}: {error}", 1)
    except (RuntimeError, TypeError, ValueError) as error:
        return _fail(str(error), 2)
    if as_json:
        print(json.dumps([{**_document(decision), "call": asdict(call)} for call, decision in rows], indent=1))
    for call, decision in () if as_json else rows:
        shapes = " ".join("x".join(map(str, shape)) for shape in call.shapes.values())
        print(f"{call.count} x {shapes} {call.dtype} {decision.summary()}")
    return int(failed)


def _decide_recorded(call: Recorded, device: str | None, backend: str) -> Decision:
    from torch._subclasses.fake_tensor import FakeTensorMode

    function = getattr(ops, call.op, None) if call.op in OPS else None
    if function is None:
        raise ValueError(f"{call.op!r} is no function that can be explained: known are {', '.join(OPS)}")
    dtype = DTYPES[call.dtype] if call.dtype in DTYPES else getattr(torch, call.dtype, torch.float32)
    where = "cpu" if _is_on_cpu(device) else "cuda"
    keywords = dict(call.kwargs)
    if call.dtype in PRECISIONS and dtype is torch.float32 and "precision" in inspect.signature(function).parameters:
        keywords["precision"] = call.dtype
    with FakeTensorMode(), torch.no_grad(), use_backend(backend):  # of CUDA tensors that are not there, no graph can be
        tensors = {}
        for name, shape in call.shapes.items():
            kind = getattr(torch, call.dtypes[name]) if name in call.dtypes else dtype
            like = torch.empty(0, dtype=kind, device=where)
            tensors[name] = empty(like, shape, call.layout == "nhwc" and len(shape) > 2)
        return _first_decision(function, (), {**tensors, **keywords})


def explain_model(place: str, shapes: Sequence[Shape], dtype: str, backend: str, as_json: bool) -> int:
    """The decisions of a model on this machine, one a line. ``place`` is ``package.module:name`` of a module, or of a
    class or function that makes one without arguments."""
    module, _, name = place.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _only_the_answer_on_stdout() as answer:
        try:
            found = getattr(importlib.import_module(module), name)
            model = found if isinstance(found, torch.nn.Module) else found()
            model = model.to(device, DTYPES[dtype]).eval()
            tensors = [torch.zeros(shape, dtype=DTYPES[dtype], device=device) for shape in shapes]
            with torch.no_grad(), use_backend(backend):
                decisions = explain(model, *tensors)
        except (Exception, SystemExit) as error:  # whatever somebody else's model raises
            return _fail(f"{place}: {type(error).__name__}: {error}", 2)
        assert isinstance(decisions, list)
        if as_json:
            print(json.dumps([_document(decision) for decision in decisions], indent=1), file=answer)
        else:
            print(decisions or f"{place} calls no function of tritune", file=answer)
    return 0


@contextmanager
def _only_the_answer_on_stdout() -> Iterator[TextIO]:
    """What is written to the result goes to standard output when the block ends; what Python, C code and child
    processes print meanwhile goes to standard error.

    That lasts until the process ends, since a model may print until then. But whoever has replaced ``sys.stdout``, as
    a test does, goes on with the process and gets its standard output back.
    """
    answer, stdout = io.StringIO(), sys.stdout
    stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield answer
    finally:
        if stdout is not sys.__stdout__:
            stdout.flush()  # of those who kept it, as a handler of logging does
            ctypes.CDLL(None).fflush(None)  # what C has printed into its buffers
            os.dup2(kept, 1)
            os.close(kept)
            stdout.write(answer.getvalue())
        else:
            with os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as out:
                out.write(answer.getvalue())


def _document(decision: Decision) -> dict[str, Any]:
    kernels, instead = (
        [{"kernel": name, **choice._asdict()} for name, choice in choices]
        for choices in (decision.kernels, decision.instead)
    )
    return {**asdict(decision), "kernels": kernels, "instead": instead}


def _is_on_cpu(device: str | None) -> bool:
    return device == "cpu" or (device is None and not torch.cuda.is_available())


@contextmanager
def _device_named(device: str | None) -> Iterator[None]:
    """The GPU of this name is the one that configs are looked up for."""
    before = os.environ.get("TRITUNE_DEVICE")
    try:
        if device not in (None, "cpu"):
            os.environ["TRITUNE_DEVICE"] = named(device).slug
        yield
    finally:
        os.environ.pop("TRITUNE_DEVICE", None)
        if before is not None:
            os.environ["TRITUNE_DEVICE"] = before


def _decide(op: Op, request: Request) -> Decision:
    """The decision for fake tensors, which may be on a GPU that is not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes, options = parse(request.words, op.shapes, named_options(op), request.given)
    device = "cpu" if _is_on_cpu(request.device) else "cuda"
    is_image = options.get("layout") == "nhwc"
    with FakeTensorMode(), torch.no_grad(), use_backend(request.backend):
        like = torch.empty(0, dtype=DTYPES[request.dtype], device=device)
        tensors = [empty(like, shape, is_image and len(shape) > 2) for shape in shapes]
        return _first_decision(op.function, *op.arguments(tensors, options))


def _first_decision(function: Callable[..., Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> Decision:
    with record() as decisions:
        try:
            function(*arguments, **keywords)
        except (RuntimeError, AssertionError):
            # A CPU build of torch refuses much of what is done with GPU tensors, even with fake ones; the choice
            # has been made by then.
            if not decisions:
                raise
    return decisions[0]


def _fail(message: str, status: int) -> int:
    print(f"tritune explain: {message.splitlines()[0]}", file=sys.stderr)
    return status
