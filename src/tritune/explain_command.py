"""``tritune explain``: what a call would run on a device, here or not, and why.

An operator is one entry of OPS: what its shapes are, its options, and how both become a call.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autotune.device import named
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
    gru,
    lstm,
    record,
    rnn,
    scaled_dot_product_attention,
    use_backend,
)
from .ops._layout import empty

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


Options = dict[str, dict[str, Any]]


class Op(NamedTuple):
    """How the command line spells a call.

    Attributes:
        shapes: what the shapes are, in order; those in brackets may be left out. One example of them.
        options: flag -> arguments of ``add_argument``.
        arguments: from the tensors of those shapes and the options' values to what the function is called with.
    """

    function: Callable[..., Any]
    shapes: str
    example: str
    options: Options
    arguments: Callable[[list[Tensor], argparse.Namespace], tuple[Sequence[Any], dict[str, Any]]]

    def counts(self) -> range:
        names = self.shapes.split()
        return range(sum(name[0] != "[" for name in names), len(names) + 1)


def _conv(tensors: list[Tensor], o: argparse.Namespace) -> tuple[Sequence[Any], dict[str, Any]]:
    names = ("stride", "padding", "output_padding", "dilation", "groups", "activation", "precision")
    return tensors, {name: getattr(o, name) for name in names if name in o}


def _pool(tensors: list[Tensor], o: argparse.Namespace) -> tuple[Sequence[Any], dict[str, Any]]:
    named_as = {"kernel": "kernel_size", "size": "output_size", "norm": "norm_type"}
    return tensors, {named_as.get(name, name): value for name, value in vars(o).items() if name in _POOLING}


def _unpool(tensors: list[Tensor], o: argparse.Namespace) -> tuple[Sequence[Any], dict[str, Any]]:
    (x,) = tensors
    return [x, torch.empty_like(x, dtype=torch.int64)], _pool([], o)[1]


def _conv_pool(tensors: list[Tensor], o: argparse.Namespace) -> tuple[Sequence[Any], dict[str, Any]]:
    _, keywords = _conv(tensors, o)
    pooling = {"pool_kernel_size": o.kernel, "pool_stride": o.pool_stride, "pool_padding": o.pool_padding}
    return tensors, {**keywords, **pooling}


def _recurrent(gates: int) -> Callable[[list[Tensor], argparse.Namespace], tuple[Sequence[Any], dict[str, Any]]]:
    def arguments(tensors: list[Tensor], o: argparse.Namespace) -> tuple[Sequence[Any], dict[str, Any]]:
        (x,) = tensors
        rows = ([2] if o.bidirectional else []) + [gates * o.hidden]
        weights = [x.new_empty(*rows, *columns) for columns in ((x.shape[-1],), (o.hidden,), (), ())]
        names = ("batch_first", "precision", "nonlinearity")
        return [x, *weights], {name: getattr(o, name) for name in names if name in o}

    return arguments


def _elman(tensors: list[Tensor], o: argparse.Namespace) -> tuple[Sequence[Any], dict[str, Any]]:
    (x,) = tensors
    h = x.new_empty(*x.shape[:-1], o.hidden)
    return [x, h, x.new_empty(o.hidden, x.shape[-1]), x.new_empty(o.hidden, o.hidden)], {}


def _attention(tensors: list[Tensor], o: argparse.Namespace) -> tuple[Sequence[Any], dict[str, Any]]:
    named_as = {"causal": "is_causal", "gqa": "enable_gqa"}
    values = {named_as.get(name, name): value for name, value in vars(o).items() if name in _SCORES}
    q, k, v, *rest = tensors
    return [q, k, v], {**values, **({"bias" if "score" in o else "attn_mask": rest[0]} if rest else {})}


# Options of the attention functions, by the names that the command line has for them.
_SCORES = ("score", "scale", "causal", "gqa", "causal_alignment", "return_lse", "precision")
_LAYOUT: Options = {"--layout": {"choices": ("nhwc", "nchw"), "default": "nhwc", "help": "of images; default: nhwc"}}
_PRECISION: Options = {"--precision": {"choices": ("ieee", "tf32", "tf32x3"), "help": "how fp32 is multiplied"}}
_WINDOW: Options = {"--padding": {"type": int, "default": 0}, "--dilation": {"type": int, "default": 1}}
_CONV: Options = {
    "--stride": {"type": int, "default": 1}, **_WINDOW, "--groups": {"type": int, "default": 1},
    "--activation": {"metavar": "NAME"}, **_PRECISION, **_LAYOUT,
}  # fmt: skip
_CONV_TRANSPOSE: Options = {**_CONV, "--output-padding": {"type": int, "default": 0}}
_POOL: Options = {
    "--kernel": {"type": int, "default": 2, "help": "default: 2"}, "--stride": {"type": int}, **_WINDOW,
    "--ceil-mode": {"action": "store_true"}, **_LAYOUT,
}  # fmt: skip
# Options of the pooling functions, by the names that the command line has for them.
_POOLING = ("kernel", "stride", "padding", "dilation", "ceil_mode", "size", "norm")
_AVERAGE: Options = {name: option for name, option in _POOL.items() if name != "--dilation"}
_NORM: Options = {
    "--norm": {"type": float, "default": 2.0, "help": "default: 2"},
    **{name: option for name, option in _AVERAGE.items() if name != "--padding"},
}
_UNPOOL: Options = {name: option for name, option in _AVERAGE.items() if name != "--ceil-mode"}
_ADAPTIVE: Options = {"--size": {"type": int, "default": 7, "help": "of the result; default: 7"}, **_LAYOUT}
_CONV_POOL: Options = {
    **_CONV, "--kernel": {"type": int, "default": 2, "help": "of the pooling; default: 2"},
    "--pool-stride": {"type": int}, "--pool-padding": {"type": int, "default": 0},
}  # fmt: skip
_HIDDEN: Options = {"--hidden": {"type": int, "required": True, "help": "units of the state"}}
_LAYER: Options = {
    **_HIDDEN, "--bidirectional": {"action": "store_true"}, "--batch-first": {"action": "store_true"}, **_PRECISION,
}  # fmt: skip
_NONLINEARITY: Options = {"--nonlinearity": {"choices": ("tanh", "relu"), "default": "tanh"}}
_SDPA: Options = {
    "--causal": {"action": "store_true"}, "--scale": {"type": float},
    "--gqa": {"action": "store_true", "help": "key and value have fewer heads"},
}  # fmt: skip
_POOLED: Options = {
    "--score": {"choices": ("dot", "cosine"), "default": "dot"}, "--scale": {"type": float}, **_PRECISION
}  # fmt: skip
_ATTENTION: Options = {
    **_SDPA, **_POOLED, "--causal-alignment": {"choices": ("top_left", "bottom_right"), "default": "top_left"},
    "--return-lse": {"action": "store_true"},
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


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 32x64x56x56")
    return tuple(int(part) for part in text.split("x"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    operators = parser.add_subparsers(dest="op", required=True, metavar="OP", help=", ".join(OPS))
    for name, op in OPS.items():
        one = operators.add_parser(name, description=f"what {name} would run, and why")
        one.add_argument("shapes", nargs="+", type=_shape, metavar="SHAPE", help=f"{op.shapes}: {op.example}")
        one.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
        one.add_argument("--device", default="h200", help="a device or target such as h200 or sm_90, or cpu")
        one.add_argument("--backend", choices=("auto", "triton", "torch"), default="triton", help="default: triton")
        one.add_argument("--json", action="store_true")
        for flag, settings in op.options.items():
            one.add_argument(flag, **settings)


def main(args: argparse.Namespace) -> int:
    op = OPS[args.op]
    if len(args.shapes) not in op.counts():
        return _fail(f"{args.op} takes {op.shapes}: {op.example}")
    before = os.environ.get("TRITUNE_DEVICE")
    try:
        if args.device != "cpu":
            os.environ["TRITUNE_DEVICE"] = named(args.device).slug
        decision = _decide(op, args)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return _fail(str(error))
    finally:
        os.environ.pop("TRITUNE_DEVICE", None)
        if before is not None:
            os.environ["TRITUNE_DEVICE"] = before
    if args.json:
        document = asdict(decision)
        document["kernels"] = [{"kernel": name, **choice._asdict()} for name, choice in decision.kernels]
        print(json.dumps(document, indent=1))
    else:
        print(decision)
    return 0


def _decide(op: Op, args: argparse.Namespace) -> Decision:
    """The decision for fake tensors, which may be on a GPU that is not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = "cpu" if args.device == "cpu" else "cuda"
    is_image = "--layout" in op.options and args.layout == "nhwc"
    with FakeTensorMode(), torch.no_grad(), use_backend(args.backend):
        like = torch.empty(0, dtype=DTYPES[args.dtype], device=device)
        tensors = [empty(like, shape, is_image and len(shape) > 2) for shape in args.shapes]
        arguments, keywords = op.arguments(tensors, args)
        with record() as decisions:
            try:
                op.function(*arguments, **keywords)
            except RuntimeError:
                # A CPU build of torch cannot index GPU tensors, not even fake ones; the choice has been made by then.
                if not decisions:
                    raise
        return decisions[0]


def _fail(message: str) -> int:
    print(f"tritune explain: {message.splitlines()[0]}", file=sys.stderr)
    return 1
