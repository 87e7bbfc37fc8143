"""Every public function and module beside what a user of torch writes for it: the calls that :mod:`.overhead` times.

Each is called small, where Python takes most of the time, and large, where computing does; channels, windows and hidden
sizes are the same in both. The peer is torch's function or module of that name. Where torch has none it is a
composition of torch's functions, and for a module a hand-written ``torch.nn.Module`` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import log, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .. import nn, ops

SIZES = ("small", "large")
DIRECTIONS = ("forward", "training")

Shapes = Sequence[tuple[int, ...]]


class Call(NamedTuple):
    """One row of the table.

    Attributes:
        name: of the function, or ``nn.`` and that of the module; behind a comma what is special about this call.
        peers: makes what is called, ours and torch's; modules hold the same values.
        small, large: shapes of the arguments whose size differs between the two.
        weights: shapes of those that follow and are the same in both.
        args: what follows the tensors.
        inputs: makes the tensor arguments of the random ones; by default they are those.
    """

    name: str
    peers: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]
    small: Shapes
    large: Shapes
    weights: Shapes = ()
    args: tuple[Any, ...] = ()
    inputs: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def public_name(self) -> str:
        return self.name.partition(",")[0]


def prepare(
    call: Call, size: str, direction: str, device: str = "cpu"
) -> tuple[Callable[[], Any], Callable[[], Any]]:  # fmt: skip
    """Our call and torch's, on random data that both share; ``"training"`` is forward and the gradients of all
    arguments and parameters. A ``"forward"`` is meant to run under ``torch.no_grad``."""
    torch.manual_seed(0)
    tensors = tuple(torch.randn(shape) for shape in getattr(call, size))
    if call.inputs is not None:
        tensors = call.inputs(*tensors)
    tensors += tuple(torch.randn(shape) * prod(shape[1:]) ** -0.5 for shape in call.weights)
    tensors = tuple(t.to(device) for t in tensors)
    ours, theirs = (_one(peer, tensors, call.args, direction, device) for peer in call.peers())
    return ours, theirs


def _one(
    peer: Callable[..., Any], tensors: tuple[Tensor, ...], args: tuple[Any, ...], direction: str, device: str
) -> Callable[[], Any]:
    parameters: list[Tensor] = []
    if isinstance(peer, torch.nn.Module):
        parameters = list(peer.to(device).parameters())
    if direction == "forward":
        return partial(peer, *tensors, *args)
    tensors = tuple(t.clone().requires_grad_(t.is_floating_point()) for t in tensors)
    leaves = [t for t in (*tensors, *parameters) if t.requires_grad]
    run = partial(peer, *tensors, *args)
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(out.shape, generator=generator).to(device) for out in differentiable(run())]
    return lambda: torch.autograd.grad(differentiable(run()), leaves, douts)


def differentiable(result: Any) -> list[Tensor]:
    """The outputs that have a gradient."""
    if isinstance(result, Tensor):
        return [result] if result.requires_grad else []
    if result is None:
        return []
    return [out for one in result for out in differentiable(one)]


class Written(torch.nn.Module):
    """A module as a user writes it on torch: ``formula(module, *inputs)`` with the Parameters of ``module``."""

    def __init__(self, module: torch.nn.Module, formula: Callable[..., Any]) -> None:
        super().__init__()
        self._parameters, self._modules = module._parameters, module._modules
        self.forward = partial(formula, module)


# --- what the rows are made of ---------------------------------------------------------------------------------------


def function(
    name: str, small: Shapes, large: Shapes, *args: Any, theirs: Callable[..., Any] | None = None, special: str = "",
    weights: Shapes = (), inputs: Callable[..., tuple[Tensor, ...]] | None = None, **ours_only: Any,
) -> Call:  # fmt: skip
    """Our function against torch's of that name, both with ``args``, or against ``theirs(*tensors)``."""
    ours = getattr(ops, name)
    if theirs is None:
        peers = (ours, getattr(F, name))
    else:
        peers = (partial(ours, **ours_only) if ours_only else ours, theirs)
    return Call(_named(name, special), lambda: peers, small, large, weights, () if theirs else args, inputs)


def module(
    name: str, small: Shapes, large: Shapes, *args: Any, formula: Callable[..., Any] | None = None, special: str = "",
    inputs: Callable[..., tuple[Tensor, ...]] | None = None, **options: Any,
) -> Call:  # fmt: skip
    """Our module against torch's of that name, or against the ``formula`` in a hand-written one."""

    def peers() -> tuple[Callable[..., Any], Callable[..., Any]]:
        ours = getattr(nn, name)(*args, **options)
        if name.startswith("Lazy"):
            ours(torch.zeros(small[0]))
        if formula is not None:
            return ours, Written(ours, formula)
        theirs = getattr(torch.nn, name)(*args, **options)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    return Call(_named(f"nn.{name}", special), peers, small, large, inputs=inputs)


def _named(name: str, special: str) -> str:
    return f"{name}, {special}" if special else name


# --- convolution -----------------------------------------------------------------------------------------------------

CONV_SMALL = {1: (1, 8, 8), 2: (1, 8, 6, 6), 3: (1, 8, 3, 3, 3)}
CONV_LARGE = {1: (8, 8, 8192), 2: (4, 8, 80, 80), 3: (1, 8, 24, 24, 24)}


def _convolutions() -> Iterator[Call]:
    for rank in (1, 2, 3):
        small, large, weights = [CONV_SMALL[rank]], [CONV_LARGE[rank]], [(8, 8, *(3,) * rank), (8,)]
        for kind in ("conv", "conv_transpose"):
            yield function(f"{kind}{rank}d", small, large, 1, 1, weights=weights)
        for kind in ("Conv", "ConvTranspose"):
            theirs = getattr(F, f"{'conv' if kind == 'Conv' else 'conv_transpose'}{rank}d")
            yield module(f"{kind}{rank}d", small, large, 8, 8, 3, padding=1)
            yield module(f"Lazy{kind}{rank}d", small, large, 8, 3, padding=1)
            yield module(f"{kind}Activation{rank}d", small, large, 8, 8, 3, padding=1, activation="relu",
                         formula=partial(_activated, theirs))  # fmt: skip
    small, large, weights = [CONV_SMALL[2]], [CONV_LARGE[2]], [(8, 8, 3, 3), (8,)]
    yield function("conv2d", small, [(16, 8, 80, 80)], None, 1, 1, 1, 8, weights=[(8, 1, 3, 3)], special="depthwise")
    yield function("conv2d", small, [(8, 8, 80, 80)], 1, 1, weights=weights, special="channels last",
                   inputs=lambda x: (x.contiguous(memory_format=torch.channels_last),))  # fmt: skip
    yield function("conv2d", small, large, weights=weights, padding=1, activation="relu", special="relu",
                   theirs=lambda x, w, b: F.relu(F.conv2d(x, w, b, 1, 1)))  # fmt: skip
    yield Call("conv2d, scale and residual",
               lambda: (
                   lambda x, r, w, b, s: ops.conv2d(x, w, b, 1, 1, scale=s, residual=r, activation="relu"),
                   lambda x, r, w, b, s: F.relu(F.conv2d(x, w, None, 1, 1) * s[:, None, None] + b[:, None, None] + r),
               ),
               small * 2, large * 2, [*weights, (8,)])  # fmt: skip
    yield function("conv2d_max_pool2d", small, large, weights=weights, padding=1,
                   theirs=lambda x, w, b: F.max_pool2d(F.relu(F.conv2d(x, w, b, 1, 1)), 2))  # fmt: skip
    yield Call("fold_bn", _folded, small, large)


def _activated(theirs: Callable[..., Tensor], m: Any, x: Tensor) -> Tensor:
    return F.relu(theirs(x, m.weight, m.bias, m.stride, m.padding))


def _folded() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The modules that folding makes."""
    conv, bn = torch.nn.Conv2d(8, 8, 3, padding=1).eval(), torch.nn.BatchNorm2d(8).eval()
    return nn.fold_bn(conv, bn), fuse_conv_bn_eval(conv, bn)


# --- pooling ---------------------------------------------------------------------------------------------------------

POOL_SMALL = {1: (1, 4, 16), 2: (1, 4, 8, 8), 3: (1, 4, 4, 4, 4)}
PLANE = {1: (4096,), 2: (64, 64), 3: (16, 16, 16)}
# (functions, modules, arguments, channels of all large planes): torch's functions differ much in what a plane costs.
POOLS = (
    ("max_pool", "MaxPool", (2,), (512, 48, 48)),
    ("avg_pool", "AvgPool", (2,), (64, 128, 128)),
    ("lp_pool", "LPPool", (2.0, 2), (64, 128, 128)),
    ("adaptive_max_pool", "AdaptiveMaxPool", (2,), (512, 512, 256)),
    ("adaptive_avg_pool", "AdaptiveAvgPool", (2,), (512, 512, 256)),
    ("max_unpool", "MaxUnpool", (2,), (256, 512, 512)),
)


def _pools() -> Iterator[Call]:
    for rank in (1, 2, 3):
        indices = partial(getattr(F, f"max_pool{rank}d"), kernel_size=2, return_indices=True)
        for one, kind, args, channels in POOLS:
            small, large = [POOL_SMALL[rank]], [(1, channels[rank - 1], *PLANE[rank])]
            inputs = indices if one == "max_unpool" else None
            yield function(f"{one}{rank}d", small, large, *args, inputs=inputs)
            yield module(f"{kind}{rank}d", small, large, *args, inputs=inputs)
        if rank > 1:
            # As many channels in both, since the module keeps its samples.
            small, large = [POOL_SMALL[rank]], [(1, 4, *((512, 512) if rank == 2 else (64, 64, 64)))]
            one, ratio, samples = f"fractional_max_pool{rank}d", (0.5,) * rank, torch.full((1, 4, rank), 0.3)
            yield function(one, small, large, 2, None, ratio, False, samples)
            yield module(f"FractionalMaxPool{rank}d", small, large, 2, output_ratio=ratio, _random_samples=samples)
    small, large = [POOL_SMALL[2]], [(1, 48, *PLANE[2])]
    yield function("max_pool2d", small, large, 2, None, 0, 1, False, True, special="indices")
    large = [(1, 512, *PLANE[2])]
    yield function("max_pool2d", small, large, 3, 2, 1, special="channels last",
                   inputs=lambda x: (x.contiguous(memory_format=torch.channels_last),))  # fmt: skip
    yield function("global_avg_pool", small, [(4, 512, *PLANE[2])], theirs=lambda x: F.adaptive_avg_pool2d(x, 1))
    yield function("global_max_pool", small, large, theirs=lambda x: F.adaptive_max_pool2d(x, 1))


# --- recurrence ------------------------------------------------------------------------------------------------------

HIDDEN = 16
STEPS_SMALL, STEPS_LARGE = (3, 1, HIDDEN), (64, 64, HIDDEN)
STATE_SMALL, STATE_LARGE = (1, 1, HIDDEN), (1, 64, HIDDEN)


def _recurrences() -> Iterator[Call]:
    for name, gates in (("rnn", 1), ("gru", 3), ("lstm", 4)):
        states = 2 if name == "lstm" else 1
        rows = gates * HIDDEN
        small, large = [STEPS_SMALL, *[STATE_SMALL] * states], [STEPS_LARGE, *[STATE_LARGE] * states]
        weights = [(rows, HIDDEN), (rows, HIDDEN), (rows,), (rows,)]
        yield Call(name, partial(_recurrent_peers, name), small, large, weights)
        for special, options in (("", {}), ("bidirectional", {"bidirectional": True}), ("2 layers", {"num_layers": 2}),
                                 ("batch first", {"batch_first": True})):  # fmt: skip
            yield module(name.upper(), [STEPS_SMALL], [STEPS_LARGE], HIDDEN, HIDDEN, special=special, **options)
    head = [(8, HIDDEN), (8,), (8, 8)]
    yield Call("elman_step", lambda: (ops.elman_step, _elman_step), [(1, HIDDEN), (1, HIDDEN)],
               [(8192, HIDDEN), (8192, HIDDEN)], [(HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN,), *head])  # fmt: skip
    yield module("ElmanRNN", [STEPS_SMALL], [STEPS_LARGE], HIDDEN, HIDDEN, 8, formula=_elman_network)


def _recurrent_peers(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    ours = getattr(ops, name)
    theirs = getattr(torch._VF, "rnn_tanh" if name == "rnn" else name)
    # has_biases, num_layers, dropout, train, bidirectional, batch_first
    options = (True, 1, 0.0, True, False, False)
    if name == "lstm":
        return (
            lambda x, h, c, w_ih, w_hh, b_ih, b_hh: ours(x, w_ih, w_hh, b_ih, b_hh, h, c),
            lambda x, h, c, w_ih, w_hh, b_ih, b_hh: theirs(x, (h, c), (w_ih, w_hh, b_ih, b_hh), *options),
        )
    return (
        lambda x, h, w_ih, w_hh, b_ih, b_hh: ours(x, w_ih, w_hh, b_ih, b_hh, h),
        lambda x, h, w_ih, w_hh, b_ih, b_hh: theirs(x, h, (w_ih, w_hh, b_ih, b_hh), *options),
    )


def _elman_step(
    x: Tensor, h: Tensor, W_xh: Tensor, W_hh: Tensor, b_h: Tensor, W_ho: Tensor, b_o: Tensor, W_yh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.tanh(F.linear(x, W_xh, b_h) + F.linear(h, W_hh))
    o = F.linear(h, W_ho, b_o)
    return h, o, torch.tanh(F.linear(o, W_yh))


def _elman_network(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h_0, b_hh = x.new_zeros(1, x.shape[1], HIDDEN), x.new_zeros(HIDDEN)
    out, h_n = torch._VF.rnn_tanh(x, h_0, (m.W_xh, m.W_hh, m.b_h, b_hh), True, 1, 0.0, m.training, False, False)
    o = F.linear(out, m.W_ho, m.b_o)
    return torch.tanh(F.linear(o, m.W_yh)), o, h_n[0]


# --- attention -------------------------------------------------------------------------------------------------------

HEADS, FEATURES = 2, 16
Q_SMALL, Q_LARGE = (1, HEADS, 4, FEATURES), (4, HEADS, 320, FEATURES)
POOLED_SMALL, POOLED_LARGE = (1, HEADS, 8, FEATURES), (64, HEADS, 512, FEATURES)
POOL_QUERY = (HEADS, 1, FEATURES)


def _attentions() -> Iterator[Call]:
    small: Shapes = [Q_SMALL] * 3
    large: Shapes = [Q_LARGE] * 3
    sdpa = F.scaled_dot_product_attention
    yield function("scaled_dot_product_attention", small, large)
    yield function("scaled_dot_product_attention", small, large, None, 0.0, True, special="causal")
    yield function("scaled_dot_product_attention", [*small, (4, 4)], [*large, (320, 320)], special="mask",
                   inputs=lambda q, k, v, mask: (q, k, v, mask > -1))  # fmt: skip
    yield function("attention", small, large, theirs=sdpa)
    yield function("attention", small, large, score="cosine", special="cosine",
                   theirs=lambda q, k, v: sdpa(_unit(q), _unit(k), v, scale=1.0))  # fmt: skip
    yield function("attention", small, large, is_causal=True, special="causal",
                   theirs=lambda q, k, v: sdpa(q, k, v, is_causal=True))  # fmt: skip
    yield module("Attention", small, large, formula=lambda m, q, k, v: sdpa(q, k, v))
    yield module("Attention", small, large, score="cosine", scale="learnable", special="cosine",
                 formula=_cosine_attention)  # fmt: skip
    pooled_small, pooled_large = ([POOL_QUERY, shape, shape] for shape in (POOLED_SMALL, POOLED_LARGE))
    yield function("attention_pool", pooled_small, pooled_large,
                   theirs=lambda q, k, v: sdpa(_for_each(k, q), k, v))  # fmt: skip
    yield function("attention_pool", pooled_small, pooled_large, score="cosine", scale=5.0, special="cosine",
                   theirs=lambda q, k, v: sdpa(_for_each(k, _unit(q)), _unit(k), v, scale=5.0))  # fmt: skip
    width = HEADS * FEATURES
    for special, args in (("", ()), ("no weights", (None, False))):
        heads = module(
            "MultiheadAttention",
            [(1, 8, width)] * 3,
            [(4, 320, width)] * 3,
            width,
            HEADS,
            batch_first=True,
            special=special,
        )
        yield heads._replace(args=args)
    yield module("AttentionPool", [(1, 8, width)], [(32, 512, width)], width, HEADS, formula=_attention_pool)


def _unit(t: Tensor) -> Tensor:
    return F.normalize(t, dim=-1, eps=1e-6)


def _cosine_attention(m: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale = m.logit_scale.clamp(max=log(100.0)).exp()
    return F.scaled_dot_product_attention(_unit(query) * scale, _unit(key), value, scale=1.0)


def _for_each(key: Tensor, query: Tensor) -> Tensor:
    """The query, shared by the whole batch."""
    return query.expand(key.shape[0], -1, -1, -1)


def _attention_pool(m: Any, x: Tensor) -> Tensor:
    key, value = (layer(x).unflatten(-1, (HEADS, -1)).transpose(-3, -2) for layer in (m.key, m.value))
    pooled = F.scaled_dot_product_attention(_for_each(key, m.query), key, value)
    result: Tensor = m.out(pooled.transpose(-3, -2).flatten(-2)).squeeze(-2)
    return result


CALLS = (*_convolutions(), *_pools(), *_recurrences(), *_attentions())
