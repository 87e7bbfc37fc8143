"""TorchScript. What torch.jit.trace traces of a function at one size computes another as torch's own does, without
warnings that torch's does not give; what torch.jit.script compiles calls torch's own function."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_graphs
import test_modules
import torch
import torch.nn.functional as F

import tritune

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings(r"ignore:.torch.jit.* is deprecated:DeprecationWarning"),
]

SIZES = {1: (8,), 2: (8, 12), 3: (8, 4, 6)}
OTHER_SIZES = {1: (14,), 2: (12, 16), 3: (6, 10, 8)}


class Call(NamedTuple):
    """A call of ``function``: its arguments are computed from images [N, 3, *space], which the trace includes."""

    function: str
    rank: int
    arguments: Callable[[Any], tuple[Any, ...]]
    kwargs: dict[str, Any] = {}

    def of(self, namespace: Any, x: Any) -> Any:
        return getattr(namespace, self.function)(*self.arguments(x), **self.kwargs)


def calls(rank: int) -> Iterator[tuple[str, Call]]:
    weight, up = torch.randn(4, 3, *(3,) * rank), torch.randn(3, 4, *(3,) * rank)
    ones = (1,) * (rank - 1)
    yield "", Call(f"conv{rank}d", rank, lambda x: (x, weight))
    yield "same", Call(f"conv{rank}d", rank, lambda x: (x, weight), {"padding": "same"})
    yield "dilated", Call(f"conv{rank}d", rank, lambda x: (x, weight, None, 2, 1, 2))
    yield "", Call(f"conv_transpose{rank}d", rank, lambda x: (x, up), {"stride": 2})
    yield "dilated", Call(f"max_pool{rank}d", rank, lambda x: (x, 3, 1, 1), {"dilation": 2})
    yield "indices", Call(f"max_pool{rank}d", rank, lambda x: (x, 2), {"return_indices": True})
    yield "", Call(f"lp_pool{rank}d", rank, lambda x: (x, 2, 2))
    if rank > 1:
        samples = torch.full((1, 1, rank), 0.3)
        yield (
            "",
            Call(
                f"fractional_max_pool{rank}d",
                rank,
                lambda x: (x, 2, 2, None, False, samples.expand(x.shape[0], x.shape[1], rank)),
            ),
        )
    for kind in ("max_pool", "avg_pool"):
        yield "", Call(f"{kind}{rank}d", rank, lambda x: (x, 2))
        yield "by the size", Call(f"{kind}{rank}d", rank, lambda x: (x, x.shape[2] // 4))
    for kind in ("adaptive_max_pool", "adaptive_avg_pool"):
        yield "", Call(f"{kind}{rank}d", rank, lambda x: (x, 2))
        yield "by the size", Call(f"{kind}{rank}d", rank, lambda x: (x, (x.shape[2] // 2, *ones)))
        if rank > 1:
            yield "as it is", Call(f"{kind}{rank}d", rank, lambda x: (x, (None, *ones)))
    if rank == 2:
        yield "", Call("scaled_dot_product_attention", rank, lambda x: (x, x, x))
        masked = {"dropout_p": 0.0, "scale": 0.5}
        yield "mask", Call("scaled_dot_product_attention", rank, lambda x: (x, x, x, x[..., :1] > 0), masked)
        groups = {"enable_gqa": True}
        yield "groups", Call("scaled_dot_product_attention", rank, lambda x: (x, x[:, :1], x[:, :1]), groups)
        yield "transposed", Call("scaled_dot_product_attention", rank, lambda x: (x.mT,) * 3, {"is_causal": True})


CALLS = {f"{call.function} {case}".strip(): call for rank in SIZES for case, call in calls(rank)}
NOT_TRACED = {f"max_unpool{rank}d" for rank in (1, 2, 3)}  # nor are torch's, whose Python asserts a traced size


def traced(call: Call, namespace: Any, x: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.jit.trace(lambda x: call.of(namespace, x), x, check_trace=False)
    return program, [str(one.message) for one in caught if one.category is torch.jit.TracerWarning]


@pytest.mark.parametrize("name", CALLS)
def test_a_traced_program_is_right_at_other_sizes(name):
    call = CALLS[name]
    x, other = torch.randn(2, 3, *SIZES[call.rank]), torch.randn(3, 3, *OTHER_SIZES[call.rank])
    ours, our_warnings = traced(call, tritune, x)
    theirs, their_warnings = traced(call, F, x)
    assert our_warnings == their_warnings
    torch.testing.assert_close(ours(other), theirs(other), rtol=0, atol=0)
    torch.testing.assert_close(ours(x), call.of(tritune, x))


def test_every_function_that_torch_has_is_here():
    functions = {name for name in tritune.__all__ if inspect.isroutine(getattr(F, name, None))}
    assert {call.function for call in CALLS.values()} == functions - NOT_TRACED


def own_calls() -> Iterator[tuple[str, Callable[..., Any], list[tuple[int, ...]], list[tuple[int, ...]]]]:
    """What torch has no function for: name, call, and the shapes of its tensors for the trace and afterwards."""
    weight, vector = torch.randn(4, 3, 3, 3), torch.randn(4)
    image, other, y, other_y = (2, 3, 8, 12), (3, 3, 12, 16), (2, 4, 6, 10), (3, 4, 10, 14)
    for activation in ("relu", "leaky_relu", "silu", "gelu_tanh"):
        call = functools.partial(tritune.conv2d, weight=weight, bias=vector, activation=activation)
        yield f"conv2d {activation}", call, [image], [other]
    added = lambda x, r: tritune.conv2d(x, weight, residual=r, scale=vector)  # noqa: E731
    yield "conv2d residual", added, [image, y], [other, other_y]
    yield "conv2d_max_pool2d", lambda x: tritune.conv2d_max_pool2d(x, weight), [image], [other]
    for name in ("global_avg_pool", "global_max_pool"):
        yield name, getattr(tritune, name), [image], [other]
        yield f"{name} flat", functools.partial(getattr(tritune, name), keepdim=False), [image[1:]], [other[1:]]
    q, k, other_q, other_k = (2, 4, 6, 8), (2, 4, 5, 8), (3, 4, 9, 8), (3, 4, 7, 8)
    for options in ({}, {"score": "cosine"}, {"is_causal": True, "causal_alignment": "bottom_right"},
                    {"return_lse": True}, {"scale": vector}):  # fmt: skip
        call = functools.partial(tritune.attention, **options)
        for name, sizes in (("", (q, k)), (" of one length", (q, q))):
            yield f"attention {[*options]}{name}", call, [*sizes, sizes[1]], [other_q, other_k, other_k]
    pooled = lambda q, x, m: tritune.attention_pool(q, x, x, attn_mask=m > 0)  # noqa: E731
    yield "attention_pool", pooled, [(2, 8), (2, 6, 8), (2, 6)], [(2, 8), (3, 9, 8), (3, 9)]
    for name, gates in (("rnn", 1), ("gru", 3), ("lstm", 4)):
        weights = {"w_ih": torch.randn(4 * gates, 3), "w_hh": torch.randn(4 * gates, 4)}
        yield name, functools.partial(getattr(tritune, name), **weights), [(5, 2, 3)], [(7, 3, 3)]
    step = torch.randn(4, 3), torch.randn(4, 4)
    yield "elman_step", lambda x, h: tritune.elman_step(x, h, *step)[0], [(2, 3), (2, 4)], [(5, 3), (5, 4)]


OWN_CALLS = {name: call for name, *call in own_calls()}
# Python compares their sizes, as it does in torch's own recurrent layers; the values are right all the same.
WARN = {"attention", "attention_pool", "rnn", "gru", "lstm", "elman_step"}


@pytest.mark.parametrize("name", OWN_CALLS)
def test_a_traced_program_that_torch_lacks_is_right_at_other_sizes(name):
    function, shapes, other_shapes = OWN_CALLS[name]

    def call(*tensors: torch.Tensor) -> Any:
        return function(*tensors)

    with warnings.catch_warnings():
        if name.split()[0] in WARN:
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
        program = torch.jit.trace(call, tuple(map(torch.randn, shapes)), check_trace=False)
    other = [torch.randn(shape) for shape in other_shapes]
    torch.testing.assert_close(program(*other), function(*other))


def test_every_function_is_traced():
    assert {name.split()[0] for name in (*CALLS, *OWN_CALLS)} | NOT_TRACED == set(test_graphs.OPERATORS)


def size_after(name: str, shape: torch.Size) -> tuple[int, ...]:
    """Another size that a module of the table takes."""
    grows = {"Attention": (0, 2), "AttentionPool": (0, 1)}.get(name, range(2, len(shape)))
    if name in (*test_modules.RECURRENT, "ElmanRNN", "MultiheadAttention"):
        grows = (0, 1)
    return tuple(size + 4 if dim in grows else size for dim, size in enumerate(shape))


@pytest.mark.parametrize("name", [name for name in test_modules.TABLE if "Unpool" not in name])
def test_a_traced_module_is_right_at_other_sizes(name):
    module, x = test_modules.build(name).requires_grad_(False), test_modules.inputs(name)
    with warnings.catch_warnings():
        if "RNN" in name or "Attention" in name or name in test_modules.RECURRENT:
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
        program = torch.jit.trace(module, tuple(x), check_trace=False)
    other = [torch.randn(size_after(name, t.shape)) for t in x]
    torch.testing.assert_close(program(*other), module(*other))


@pytest.mark.parametrize("where", ["logging", "hooks", "torch"])
def test_sizes_stay_sizes(where, caplog):
    """Also where a call that nobody traces goes through our checks."""
    with contextlib.ExitStack() as stack:
        if where == "logging":
            stack.enter_context(caplog.at_level("INFO", "tritune"))
        elif where == "hooks":
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        else:
            stack.enter_context(tritune.use_backend("torch"))
        x, other = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 12)
        program = torch.jit.trace(tritune.nn.AdaptiveAvgPool2d((1, None)), x)
    assert program(other).shape == (1, 3, 1, 12)


@pytest.mark.parametrize("function", [tritune.avg_pool3d, functools.partial(tritune.lp_pool3d, norm_type=3)])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_torch_has_no_kernel_for(function):
    """An operator that fails while it is traced, and is caught, takes the process down with it."""
    x, other = torch.rand(2, 3, 4, 4, 4).half(), torch.rand(2, 3, 8, 6, 4).half()
    program = torch.jit.trace(lambda x: function(x, kernel_size=2), x, check_trace=False)
    torch.testing.assert_close(program(other), function(other, kernel_size=2))


@pytest.mark.parametrize("name", [name for name in CALLS if "size" not in name and "as it is" not in name])
def test_an_operator_that_fails_ends_the_trace(name):
    """A constant with a gradient cannot be traced; the error is not taken for a rejection of the arguments."""
    call = CALLS[name]
    constant = torch.randn(2, 3, *SIZES[call.rank], requires_grad=True)
    with pytest.raises(RuntimeError, match="requires grad as a constant"):
        torch.jit.trace(lambda x: call.of(tritune, constant), torch.ones(1), check_trace=False)


@pytest.mark.parametrize("name", OWN_CALLS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_operator_that_torch_lacks_ends_the_trace(name):
    function, shapes, _ = OWN_CALLS[name]
    constants = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with pytest.raises(RuntimeError, match="requires grad as a constant"):
        torch.jit.trace(lambda x: function(*constants), torch.ones(1), check_trace=False)


def scripted_calls() -> Iterator[tuple[str, str, int]]:
    """Name, arguments as they are written in scripted code, and dimensions of space."""
    for rank in SIZES:
        pair = [2] * rank
        yield f"conv{rank}d", "x, w, None, 1, 1", rank
        yield f"conv{rank}d", f'x, w, padding="same", dilation={pair}', rank
        yield f"conv_transpose{rank}d", "x, w, stride=2", rank
        yield f"avg_pool{rank}d", f"x, {pair}, count_include_pad=False", rank
        yield f"lp_pool{rank}d", "x, 2.0, 2", rank
        yield f"adaptive_avg_pool{rank}d", f"x, {pair}", rank
        for name, size in ((f"max_pool{rank}d", "2"), (f"adaptive_max_pool{rank}d", f"{pair}")):
            yield name, f"x, {size}", rank
            yield name, f"x, {size}, return_indices=True", rank
        if rank > 1:
            samples = f"_random_samples=0.3 * torch.ones(2, 3, {rank})"
            yield f"fractional_max_pool{rank}d", f"x, 2, {pair}, {samples}", rank
            yield f"fractional_max_pool{rank}d", f"x, 2, {pair}, return_indices=True, {samples}", rank
    yield "scaled_dot_product_attention", "x, x, x, is_causal=True", 2


SCRIPTED = list(scripted_calls())
UNSCRIPTED = {name for name in test_graphs.OPERATORS if not hasattr(F, name)} | NOT_TRACED


def written(code: str, path: Path) -> Callable[..., Any]:
    """A function of somebody's module, whose source TorchScript finds."""
    path.write_text(code)
    scope: dict[str, Any] = {"torch": torch, "tritune": tritune, "__name__": path.stem}
    exec(compile(code, str(path), "exec", dont_inherit=True), scope)
    return scope["compute"]


@pytest.mark.parametrize("name, arguments, rank", SCRIPTED)
def test_scripted_code_calls_torchs(name: str, arguments: str, rank: int, tmp_path: Path) -> None:
    code = f"def compute(x: torch.Tensor, w: torch.Tensor):\n    return tritune.{name}({arguments})\n"
    function, file = written(code, tmp_path / "of_a_user.py"), io.BytesIO()
    torch.jit.save(torch.jit.script(function), file)
    file.seek(0)
    x, w = torch.randn(2, 3, *SIZES[rank]), torch.randn(3, 3, *(3,) * rank)
    with tritune.use_backend("torch"):
        torch.testing.assert_close(torch.jit.load(file)(x, w), function(x, w), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(UNSCRIPTED))
def test_scripted_code_is_told_what_to_use(name: str, tmp_path: Path) -> None:
    function = written(f"def compute(x: torch.Tensor):\n    return tritune.{name}(x)\n", tmp_path / "of_a_user.py")
    for one in (function, getattr(tritune, name)):
        with pytest.raises(NotImplementedError, match=f"^torch.jit.script cannot compile {name}: use torch.export or"):
            torch.jit.script(one)


def test_every_function_is_scripted_or_not() -> None:
    assert {name for name, *_ in SCRIPTED} | UNSCRIPTED == set(test_graphs.OPERATORS)
