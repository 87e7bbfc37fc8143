"""Numbers and sizes at the edge: every public operator, forward and backward, against float64 and torch's own.

Of each element the class counts (finite, an infinity, NaN). It has to be that of float64 rounded to the dtype, or that
of torch's operator in the same dtype: where the two differ a sum has overflowed, and either is a right answer. Elements
that are finite in both ours and float64 have the tolerance of all tests.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import test_attention
import test_conv
import test_conv_pool
import test_pool
import test_rnn
import torch
import torch.nn.functional as F
from harness import EPSILON, TORCH_SAMPLES, Errors, backend_of, poisoned, without_onednn
from torch import Tensor

import tritune

pytestmark = [
    pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes in numpy, which tells of overflows
]  # fmt: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """A call of a public function.

    Attributes:
        reference: the same function by torch's own operators.
        shapes: of the tensor arguments, all of which get a gradient.
        kwargs: the other arguments.
        stacked: how many such calls are made at once without having to do with each other: as the "batch" of all
            tensors, as "groups" of a convolution, or "" not at all.
        definition: the same function where docs/differences.md has a row for its extremes; either is right.
        sizes: a letter for each dimension that may be any, the same letter where they belong together; "." for others.
        cancels: gradients whose terms, products of the other tensors, may cancel: their error is one of the terms.
        known: patterns of what the kernels do differently, each a row of docs/differences.md.
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    stacked: str = ""
    definition: Callable[..., Any] | None = None
    sizes: dict[str, str] = field(default_factory=dict)
    cancels: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: torch.randn(shape).div(max(1, shape[-1]) ** 0.5).to(dtype) for name, shape in self.shapes.items()}


def conv(op: str, x: tuple[int, ...], w: tuple[int, ...], stacked: str = "groups", **kwargs: Any) -> Call:
    bias = w[1] if "transpose" in op else w[0]
    shapes = {"input": x, "weight": w, "bias": (bias,)}
    reference = test_conv_pool.pooled_reference if op == "conv2d_max_pool2d" else test_conv.reference_of(op)
    sizes = {"input": "n." + "xyz"[: len(x) - 2]}
    # Outputs of the transpose that lie outside count as 0, and 0 times infinity is NaN.
    known = (rf"of weight (-?inf|nan): {'out 0' if 'transpose' in op else 'grad input'}.*: nan, ",)
    return Call(getattr(tritune, op), reference, shapes, kwargs, stacked, sizes=sizes, known=known)


def pool(op: str, rank: int | None, *args: Any) -> Call:
    name = op if rank is None else f"{op}{rank}d"
    one = test_pool.case(name, "", (1, 2, *(5, 4, 6)[-(rank or 2) :]), *args)
    sizes = {"input": "nc" + "xyz"[: rank or 2]}
    if "avg_pool" in op and (rank is None or "adaptive" in op):
        sizes = {"input": "n." + "..."[: rank or 2]}  # averages of nothing are rejected: docs/differences.md
    return Call(one.op, one.reference, one.shapes, one.kwargs, stacked="batch", sizes=sizes)


def unpool(rank: int) -> Call:
    places = torch.arange(0, 2 * 2**rank, 2).view(1, 1, *(2,) * rank)

    def by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda input: function(input, places.to(input.device).expand(input.shape), 2)

    name = f"max_unpool{rank}d"
    shapes = {"input": (1, 1, *(2,) * rank)}
    sizes = {"input": "nc" + "." * rank}
    return Call(by(getattr(tritune, name)), by(getattr(F, name)), shapes, stacked="batch", sizes=sizes)


def fractional(rank: int) -> Call:
    samples = torch.full((1, 1, rank), 0.3)

    def by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(input: Tensor) -> Tensor:
            return function(input, 2, 2, _random_samples=samples.to(input).expand(*input.shape[:2], rank))

        return run

    name = f"fractional_max_pool{rank}d"
    sizes = {"input": "n." + "." * rank}
    return Call(
        by(getattr(tritune, name)), by(getattr(F, name)), {"input": (1, 1, *(4,) * rank)}, stacked="batch", sizes=sizes
    )  # fmt: skip


def recurrent(cell: str) -> Call:
    one = test_rnn.case("", cell, 2, 2, 3, 4)
    ours = lambda **arguments: test_rnn.ours(cell, **arguments)  # noqa: E731
    # dh - dh * z is NaN of an infinity, dh * (1 - z) is not.
    known = (r"of d out \d -?inf: grad .*: -?inf, float64 nan, torch nan",) if cell == "gru" else ()
    return Call(ours, one.reference, one.shapes, sizes={"input": "tb.", "h0": ".b.", "c0": ".b."}, known=known)


def elman() -> Call:
    def reference(x: Tensor, h: Tensor, W_xh: Tensor, W_hh: Tensor, b_h: Tensor, W_ho: Tensor, b_o: Tensor,
                  W_yh: Tensor) -> Any:  # fmt: skip
        state = torch.tanh(F.linear(x, W_xh, b_h) + F.linear(h, W_hh))
        o = F.linear(state, W_ho, b_o)
        return state, o, torch.tanh(F.linear(o, W_yh))

    shapes = {"x": (2, 3), "h": (2, 4), "W_xh": (4, 3), "W_hh": (4, 4), "b_h": (4,), "W_ho": (3, 4), "b_o": (3,),
              "W_yh": (2, 3)}  # fmt: skip
    return Call(tritune.elman_step, reference, shapes, sizes={"x": "b.", "h": "b."})


def visible_only(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, score: str = "dot",
    scale: float | None = None, is_causal: bool = False, return_lse: bool = False,
) -> Any:  # fmt: skip
    """Attention as docs/differences.md has it: what is hidden takes no part, and a row whose scores are all -inf sees
    no key, whatever hides them."""
    dtype = query.dtype
    query, key, value = (t.to(torch.promote_types(dtype, torch.float32)) for t in (query, key, value))
    if score == "cosine":
        query, key = (F.normalize(t, dim=-1, eps=1e-6) for t in (query, key))
    s = query @ key.transpose(-1, -2) * (max(1, query.shape[-1]) ** -0.5 if scale is None else scale)
    s = s if bias is None else s + bias
    s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -math.inf) if is_causal else s
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = torch.where(empty, 0.0, s)
    out = (torch.where(empty, 0.0, torch.softmax(s, -1)) @ value).to(dtype)
    return (out, torch.where(empty.squeeze(-1), -math.inf, torch.logsumexp(s, -1))) if return_lse else out


def attention(function: Callable[..., Any], reference: Callable[..., Any], bias: bool = False, **kwargs: Any) -> Call:
    shapes = {"query": (1, 1, 3, 4), "key": (1, 1, 5, 4), "value": (1, 1, 5, 3)}
    if bias:
        shapes["bias"] = (1, 1, 3, 5)
    sizes = {"query": "bhm.", "key": "bhn.", "value": "bhnv", "bias": "bhmn"}
    return Call(
        function, reference, shapes, kwargs, stacked="batch", definition=visible_only, sizes=sizes,
        cancels=("grad query", "grad key", "grad bias"), known=OF_ATTENTION,
    )  # fmt: skip


OF_ATTENTION = (
    r"all of value -?max: ",  # the sum of the values is divided last
    r"of (query|key) -?max: grad (query|key): .* (-?inf|nan), ",  # and that of the gradients scaled last
    r": out 1.*: nan, float64 inf",  # lse of a score of +inf
    r"of d out 1 .*: grad",  # what its gradient has reaches the keys that causality hides
    r"of d out 0 -?inf: grad (query|key|bias): .*: -?inf, float64 nan, torch nan",  # delta is summed over the values
    r"of key -?inf: grad (key|value): .*: nan, float64 0, torch 0",  # 0 times infinity, of rows behind the last query
)
SDPA = (tritune.scaled_dot_product_attention, F.scaled_dot_product_attention)
ATTENTION = (tritune.attention, test_attention.reference)
CALLS: dict[str, Call] = {
    "conv1d": conv("conv1d", (1, 3, 4), (2, 3, 3), padding=1),
    "conv2d": conv("conv2d", (1, 3, 3, 2), (2, 3, 2, 2), padding=1),
    "conv2d one group": conv("conv2d", (2, 3, 3, 2), (4, 3, 2, 2), padding=1, stacked=""),
    "conv2d depthwise": conv("conv2d", (1, 1, 3, 3), (1, 1, 2, 2)),
    **{f"conv2d {name}": conv("conv2d", (1, 2, 3, 2), (3, 2, 1, 1), activation=name) for name in test_conv.ACTIVATIONS},
    "conv3d": conv("conv3d", (1, 2, 2, 2, 3), (2, 2, 2, 2, 2)),
    "conv_transpose1d": conv("conv_transpose1d", (1, 3, 3), (3, 2, 3), stride=2),
    "conv_transpose2d": conv("conv_transpose2d", (1, 3, 2, 2), (3, 2, 2, 2), stride=2),
    "conv_transpose3d": conv("conv_transpose3d", (1, 2, 2, 1, 2), (2, 2, 2, 2, 2), stride=2),
    "conv2d_max_pool2d": conv("conv2d_max_pool2d", (1, 2, 4, 4), (2, 2, 3, 3), padding=1),
    **{f"max_pool{rank}d": pool("max_pool", rank, 3, 2, 1) for rank in (1, 2, 3)},
    **{f"avg_pool{rank}d": pool("avg_pool", rank, 3, 2, 1) for rank in (1, 2, 3)},
    **{f"adaptive_max_pool{rank}d": pool("adaptive_max_pool", rank, 2) for rank in (1, 2, 3)},
    **{f"adaptive_avg_pool{rank}d": pool("adaptive_avg_pool", rank, 2) for rank in (1, 2, 3)},
    **{f"lp_pool{rank}d norm {norm}": pool("lp_pool", rank, norm, 2) for rank in (1, 2, 3) for norm in (1, 2)},
    "global_max_pool": pool("global_max_pool", None),
    "global_avg_pool": pool("global_avg_pool", None),
    **{f"max_unpool{rank}d": unpool(rank) for rank in (1, 2, 3)},
    **{f"fractional_max_pool{rank}d": fractional(rank) for rank in (2, 3)},
    "rnn tanh": recurrent("tanh"),
    "rnn relu": recurrent("relu"),
    "gru": recurrent("gru"),
    "lstm": recurrent("lstm"),
    "elman_step": elman(),
    "attention": attention(*ATTENTION),
    "attention lse": attention(*ATTENTION, return_lse=True),
    "attention causal": attention(*ATTENTION, is_causal=True, return_lse=True),
    "attention bias": attention(*ATTENTION, bias=True),
    "attention cosine": attention(*ATTENTION, score="cosine", scale=3.0),
    "attention_pool": attention(tritune.attention_pool, test_attention.reference),
    "scaled_dot_product_attention": attention(*SDPA),
}


WITHOUT_KERNELS = ("fractional_max_pool2d", "fractional_max_pool3d")


def extremes(dtype: torch.dtype) -> dict[str, float]:
    info = torch.finfo(dtype)
    return {
        "inf": math.inf, "-inf": -math.inf, "nan": math.nan, "max": info.max, "-max": info.min,
        "root": info.max**0.5 * 2, "denormal": info.smallest_normal / 4, "1e-30": 1e-30, "0": 0.0, "-0": -0.0,
    }  # fmt: skip


def planted(tensors: dict[str, Tensor], is_brief: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors with one element of one of them at an extreme, or all of them near it: not equal, for what cancels
    has no relative error, and not so near that the order decides whether their sum overflows."""
    for name, tensor in tensors.items():
        for label, value in extremes(tensor.dtype).items():
            if is_brief and label in ("-inf", "-max", "1e-30", "0", "-0"):
                continue
            one = tensor.clone()
            one.view(-1)[tensor.numel() // 2] = value
            yield f"one of {name} {label}", {**tensors, name: one}
            if not is_brief or label == "max":
                shrink = 4 * tensor.numel() if "max" in label else 1
                near = (torch.rand(tensor.shape) / 2 + 0.5).to(tensor.dtype) * (value / shrink)
                yield f"all of {name} {label}", {**tensors, name: near}


def results(fn: Callable[..., Any], tensors: dict[str, Tensor], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients by name; the output gradients are among the tensors."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if not name.startswith("d out")}
    outs = outputs(fn, leaves, kwargs)
    douts = [tensors[f"d {name}"].to(out.dtype) for name, out in outs.items()]
    grads = torch.autograd.grad(
        list(outs.values()), list(leaves.values()), douts, allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():  # where other kernels may serve
        alone = {f"{name} alone": out for name, out in outputs(fn, leaves, kwargs).items()}
    results = {**outs, **alone, **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}}
    return {name: result.detach().cpu() for name, result in results.items()}


def outputs(fn: Callable[..., Any], tensors: dict[str, Tensor], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    outs = fn(**tensors, **kwargs)
    return {f"out {place}": out for place, out in enumerate(outs if isinstance(outs, tuple) else (outs,))}


def classes(t: Tensor) -> Tensor:
    """0 for finite elements, 1 and -1 for infinities, 2 for NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), 0.0))


def named(element: Tensor) -> str:
    """The class of an element, and of the finite ones whether it is 0."""
    value = float(element)
    return str(value) if not math.isfinite(value) else "finite" if value else "0"


@dataclass(frozen=True)
class Answers:
    """One result of a call: ours, in float64, and torch's in the same dtype; with a definition, also that one's."""

    ours: Tensor
    exact: list[Tensor]
    torchs: list[Tensor]

    def part(self, place: int, count: int, dim: int) -> Answers:
        """Of stacked calls, the results of one."""
        one = lambda t: t.chunk(count, dim)[place] if count > 1 else t  # noqa: E731
        return Answers(one(self.ours), [one(t) for t in self.exact], [one(t) for t in self.torchs])

    def problems(self, others: Callable[[], Iterator[Errors]], cancelled: float = 0.0) -> Iterator[str]:
        """What is wrong, if anything is, each kind of wrong element once; ``cancelled`` is the size of terms that may
        cancel."""
        ours, dtype = self.ours, self.ours.dtype
        assert all(t.dtype is dtype and t.shape == ours.shape for t in self.torchs)
        right = torch.zeros_like(ours, dtype=torch.bool)
        exact = self.exact[-1]
        for answer in self.exact:
            right |= classes(ours) == classes(answer.to(dtype))
            exact = torch.where(answer.to(dtype).isfinite() & ~exact.to(dtype).isfinite(), answer, exact)
        for answer in self.torchs:
            right |= classes(ours) == classes(answer)
            right |= ~ours.isfinite() & ~answer.isfinite() & exact.isfinite()  # both have overflowed, each in its place
        kinds = Counter(
            f"{named(ours_)}, float64 {named(exact_)}, torch {named(torch_)}"
            for ours_, exact_, torch_ in zip(*(t[~right] for t in (ours, self.exact[0], self.torchs[0])), strict=True)
        )
        yield from (f"{count} of {ours.numel()}: {kind}" for kind, count in kinds.items())
        finite = exact.to(dtype).isfinite()
        if not finite.any():
            return
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # between the smallest numbers
        largest = max(float(exact[finite].abs().max()), step)

        def errors(t: Tensor) -> Errors:
            """As harness.Errors, in units of the largest element: squares of the extremes have no dtype."""
            both = finite & t.isfinite()
            error, unit = (t.double() - exact)[both] / largest, exact[both] / largest
            if not both.any():
                return Errors(0.0, 0.0)
            norm = float(unit.square().sum().sqrt())
            if norm < 1:  # all are 0, for each of which the smallest number stands
                norm = math.sqrt(unit.numel())
            return Errors(float(error.abs().max()), float(error.square().sum().sqrt()) / norm)

        got, allowed = errors(ours), Errors(0.0, 0.0)
        for sample in itertools.chain(map(errors, self.torchs), others()):
            noise = EPSILON[dtype] + (step + EPSILON[dtype] * cancelled) / largest
            allowed = Errors(*(max(was, 2 * new + noise) for was, new in zip(allowed, sample, strict=True)))
            if got.max <= allowed.max and got.rms <= allowed.rms:
                return
        yield f"max error {got.max:.2e}, allowed {allowed.max:.2e}; rms {got.rms:.2e}, {allowed.rms:.2e}"


def answers(call: Call, tensors: dict[str, Tensor], count: int, device: str, backend: str) -> dict[str, Answers]:
    """Of ``count`` calls at once."""
    kwargs = {**call.kwargs, "groups": count} if call.stacked == "groups" else call.kwargs
    references = [call.reference, *([call.definition] if call.definition else [])]
    there = {name: t.to(device) for name, t in tensors.items()}
    exact = [results(fn, {name: t.double() for name, t in tensors.items()}, kwargs) for fn in references]
    torchs = [results(fn, there, kwargs) for fn in references]
    with tritune.use_backend(backend), poisoned() if backend == "triton" else contextlib.nullcontext():
        ours = results(call.function, there, kwargs)
    return {name: Answers(ours[name], [one[name] for one in exact], [one[name] for one in torchs]) for name in ours}


def stacked_along(call: Call, name: str) -> int:
    return int(call.stacked == "groups" and ("out" in name or "input" in name))


def cancelled(call: Call, name: str, tensors: dict[str, Tensor]) -> float:
    """A bound of the sums that may cancel in a gradient of attention: dP and delta, of products with each element of a
    value, times what they are multiplied by. With cosine scores that is, for a query or key, a row of length 1, the
    scale, and the inverse of the own length."""
    if name not in call.cancels:
        return 0.0
    is_cosine = call.kwargs.get("score") == "cosine" and name != "grad bias"
    rows = ("query", "key") if is_cosine else ()
    others = [t[t.isfinite()].double().abs() for other, t in tensors.items() if other not in name and other not in rows]
    bound = tensors["value"].shape[-1] * math.prod(float(t.max()) for t in others if t.numel())
    if is_cosine:
        lengths = tensors[name.removeprefix("grad ")].double().norm(dim=-1)
        lengths = lengths[lengths.isfinite() & (lengths > 0)]
        bound *= call.kwargs["scale"] / float(lengths.min()) if lengths.numel() else 1.0
    return bound


def problems(call: Call, dtype: torch.dtype, device: str, backend: str) -> Iterator[str]:
    def draw() -> dict[str, Tensor]:
        tensors = call.inputs(dtype)
        with torch.no_grad():
            outs = outputs(call.reference, tensors, call.kwargs)
        return tensors | {f"d {name}": torch.randn(out.shape).to(dtype) for name, out in outs.items()}

    @functools.cache
    def sample(index: int) -> dict[str, Errors]:
        """torch's errors for other inputs, without extremes."""
        tensors = draw()
        exact = results(call.reference, {name: t.double() for name, t in tensors.items()}, call.kwargs)
        torchs = results(call.reference, tensors, call.kwargs)
        return {name: Errors.of(torchs[name], exact[name]) for name in exact}

    # The interpreter takes half a minute for all rows of these, whose kernels are those of conv1d and conv2d.
    is_alike = device == "cpu" and any(word in call.function.__name__ for word in ("conv3d", "conv_transpose"))
    is_slow = backend == "triton" and (bool(call.definition) or is_alike)
    table = dict(planted(draw(), is_brief=not call.stacked or is_slow))
    for labels in [list(table)] if call.stacked else [[label] for label in table]:
        tensors = {
            name: torch.cat([table[label][name] for label in labels], stacked_along(call, name))
            for name in table[labels[0]]
        }
        for name, all_answers in answers(call, tensors, len(labels), device, backend).items():
            others = lambda name=name: (sample(index)[name] for index in range(TORCH_SAMPLES))  # noqa: E731
            for place, label in enumerate(labels):
                one = all_answers.part(place, len(labels), stacked_along(call, name))
                for text in one.problems(others, cancelled(call, name, table[label])):
                    problem = f"{label}: {name}: {text}"
                    if backend != "triton" or not any(re.search(pattern, problem) for pattern in call.known):
                        yield problem


@pytest.mark.parametrize("name, dtype", [
    # Of the two of 16 bits each call has one in the short suite.
    pytest.param(
        name, dtype, id=f"{name}-{str(dtype)[6:]}",
        marks=[pytest.mark.full] if dtype is not torch.float32 and (number + (dtype is torch.float16)) % 2 else [],
    )
    for number, name in enumerate(CALLS) for dtype in DTYPES
])  # fmt: skip
def test_numbers(name, dtype, device, tier):
    if tier != "torch" and name in WITHOUT_KERNELS:
        pytest.skip("no kernel covers it")
    if tier == "interpret" and (dtype is torch.bfloat16 or (dtype is torch.float16 and "conv" in name)):
        pytest.skip("minutes of the interpreter; float32 runs the same kernels there")
    with without_onednn():
        found = list(problems(CALLS[name], dtype, device, backend_of(tier)))
    assert not found, "\n".join([f"{len(found)} problems", *found])


def resized(call: Call) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors with one of their sizes 0 or 1."""
    for letter, size in itertools.product(sorted(set("".join(call.sizes.values())) - {"."}), (0, 1)):
        shapes = {
            name: tuple(size if one == letter else old for old, one in zip(shape, call.sizes[name], strict=True))
            if name in call.sizes else shape
            for name, shape in call.shapes.items()
        }  # fmt: skip
        yield f"{letter} = {size}", {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", CALLS)
def test_sizes(name, device, tier):
    if tier != "torch" and name in WITHOUT_KERNELS:
        pytest.skip("no kernel covers it")
    call = CALLS[name]
    for label, tensors in resized(call):
        try:
            outs = outputs(call.reference, tensors, call.kwargs)
        except Exception as error:
            with tritune.use_backend(backend_of(tier)), pytest.raises(type(error)):
                call.function(**{name: t.to(device) for name, t in tensors.items()}, **call.kwargs)
            continue
        tensors |= {f"d {name}": torch.randn(out.shape) for name, out in outs.items()}
        for result, one in answers(call, tensors, 1, device, backend_of(tier)).items():
            found = list(one.problems(lambda: iter([Errors(1e-6, 1e-6)]), cancelled(call, result, tensors)))
            assert not found, f"{label}: {result}: {found}"


def test_every_public_function_is_here():
    functions = {name for name in tritune.__all__ if inspect.isfunction(getattr(tritune, name))}
    others = {"explain", "fold_bn", "record_shapes", "register_with_transformers", "replace", "restore"}
    assert {name.partition(" ")[0] for name in CALLS} == functions - others
