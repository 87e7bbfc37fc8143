"""What torch.compile and torch.export see of a call: on the default backend what they see of torch's own function, on
``"triton"`` our operators. Every public function and module has a row; one without fails."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import tritune
from tritune.ops import conv_operators

ACTIVATED = {"activation": "relu"}
OPERATORS = sorted(
    name for name in tritune.__all__ if getattr(getattr(tritune, name), "__module__", "").startswith("tritune.ops.")
    and getattr(tritune, name).__module__.rpartition(".")[2][0] != "_"
)  # fmt: skip


# Before torch 2.13 its own function raises to an infinite power.
NORMS = {2.0: "lp", 3.0: "avg"} | ({math.inf: "max", -math.inf: "max"} if torch.__version__ >= "2.13" else {})


class Row(NamedTuple):
    ours: Callable[..., Any]
    torchs: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    kernels: str
    """Words that the names of our operators in the graph begin with; empty where no kernel covers the call."""


def _space(rank: int, batched: bool = True) -> tuple[int, ...]:
    return (*((2,) if batched else ()), 4, *(6,) * rank)


def rows() -> dict[str, Row]:
    table: dict[str, Row] = {}
    for rank in (1, 2, 3):
        x, w, b = _space(rank), (4, 4, *(2,) * rank), (4,)
        conv, up = f"conv{rank}d", f"conv_transpose{rank}d"
        ours, theirs = getattr(tritune, conv), getattr(F, conv)
        table[conv] = Row(ours, theirs, (x, w, b), "conv")
        table[f"{conv} unbatched"] = Row(ours, theirs, (x[1:], w), "conv")
        for options in ({"stride": 2, "padding": 1}, {"padding": "same"}, {"padding": "valid", "groups": 2}):
            shapes = (x, (4, 4 // options.get("groups", 1), *w[2:]), b)
            table[f"{conv} {options}"] = Row(_with(ours, **options), _with(theirs, **options), shapes, "conv")
        table[f"{conv} relu"] = Row(_with(ours, **ACTIVATED), _then(torch.relu, theirs), (x, w, b), "conv")
        ours, theirs = getattr(tritune, up), getattr(F, up)
        table[up] = Row(ours, theirs, (x, w, b), "conv")
        options = {"stride": 2, "output_padding": 1}
        table[f"{up} {options}"] = Row(_with(ours, **options), _with(theirs, **options), (x, w), "conv")
        for kind in ("max", "avg"):
            pool, adaptive = f"{kind}_pool{rank}d", f"adaptive_{kind}_pool{rank}d"
            for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}):
                pair = (_with(getattr(m, pool), **options) for m in (tritune, F))
                table[f"{pool} {options}"] = Row(*pair, (x,), kind)
            table[f"{pool} unbatched"] = Row(
                *(_with(getattr(m, pool), kernel_size=2) for m in (tritune, F)), (x[1:],), kind
            )
            for size in (1, 3):
                pair = (_with(getattr(m, adaptive), output_size=size) for m in (tritune, F))
                table[f"{adaptive} {size}"] = Row(*pair, (x,), kind)
        for indices in (f"max_pool{rank}d", f"adaptive_max_pool{rank}d"):
            pair = (_partial(getattr(m, indices), 2, return_indices=True) for m in (tritune, F))
            table[f"{indices} indices"] = Row(*pair, (x,), "max")
        for norm, kernels in NORMS.items():
            pair = (_partial(getattr(m, f"lp_pool{rank}d"), norm, 2) for m in (tritune, F))
            table[f"lp_pool{rank}d {norm}"] = Row(*pair, (x,), kernels)
        unpool = [_unpooled(getattr(m, f"max_unpool{rank}d"), rank) for m in (tritune, F)]
        table[f"max_unpool{rank}d"] = Row(*unpool, (x,), "max_unpool")
        if rank > 1:
            for options in ({"output_size": 3}, {"output_size": 4, "return_indices": True}):
                pair = (_fractional(getattr(m, f"fractional_max_pool{rank}d"), rank, **options) for m in (tritune, F))
                table[f"fractional_max_pool{rank}d {options}"] = Row(*pair, (x,), "")
        averages = getattr(F, f"adaptive_avg_pool{rank}d")
        table[f"global_avg_pool {rank}"] = Row(tritune.global_avg_pool, _partial(averages, 1), (x,), "avg")
        maxima = getattr(F, f"adaptive_max_pool{rank}d")
        table[f"global_max_pool {rank}"] = Row(tritune.global_max_pool, _partial(maxima, 1), (x,), "max")
    image, filters = (2, 4, 6, 6), (4, 4, 3, 3)
    table["conv2d_max_pool2d"] = Row(
        tritune.conv2d_max_pool2d, lambda x, w: F.max_pool2d(F.relu(F.conv2d(x, w)), 2), (image, filters), "conv2d_max"
    )
    sdpa = (tritune.scaled_dot_product_attention, F.scaled_dot_product_attention)
    q = (2, 4, 6, 8)
    for options in ({}, {"is_causal": True}, {"scale": 0.5}):
        table[f"scaled_dot_product_attention {options}"] = Row(
            *(_with(f, **options) for f in sdpa), (q, q, q), "attention"
        )
    table["scaled_dot_product_attention 3d"] = Row(*sdpa, (q[1:],) * 3, "attention")
    table["scaled_dot_product_attention bias"] = Row(*sdpa, (q, q, q, (6, 6)), "attention")
    groups = [_with(f, enable_gqa=True) for f in sdpa]
    table["scaled_dot_product_attention groups"] = Row(*groups, (q, (2, 2, 6, 8), (2, 2, 6, 8)), "attention")
    return table


def _with(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *tensors: function(*tensors, **options)


def _partial(function: Callable[..., Any], *options: Any, **named: Any) -> Callable[..., Any]:
    return lambda tensor: function(tensor, *options, **named)


def _then(last: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: last(function(*tensors))


def _unpooled(function: Callable[..., Any], rank: int) -> Callable[..., Any]:
    def run(x: torch.Tensor) -> torch.Tensor:
        indices = torch.arange(6**rank).view(1, 1, *(6,) * rank).expand(x.shape)
        return function(x, indices, 2)

    return run


def _fractional(function: Callable[..., Any], rank: int, **options: Any) -> Callable[..., Any]:
    def run(x: torch.Tensor) -> Any:
        return function(x, 2, **options, _random_samples=x.new_full((x.shape[0], x.shape[1], rank), 0.3))

    return run


TABLE = rows()
# Of recurrences torch traces nothing with gradients, so that an operator stands for them; scores by cosine, lse and
# learned queries are not torch's: their own files hold their graphs.
ELSEWHERE = {"rnn", "gru", "lstm", "elman_step", "attention", "attention_pool"}


@pytest.mark.torch
def test_every_function_has_a_row() -> None:
    assert set(OPERATORS) - ELSEWHERE == {name.split()[0] for name in TABLE}


class _Call(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def exported(function: Callable[..., Any], tensors: list[torch.Tensor]) -> list[str]:
    """The operators of the strictly exported program."""
    program = torch.export.export(_Call(function), tuple(tensors), strict=True)
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function" and not _is_check(node)]


def _is_check(node: torch.fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or "assert" in str(node.target)


def compiled(function: Callable[..., Any], tensors: list[torch.Tensor]) -> tuple[list[str], Any]:
    """The operators that a compiler is given for forward and backward, and the result."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function" and not _is_check(n))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    result = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(*tensors)
    first = result[0] if isinstance(result, tuple) else result
    if first.requires_grad:
        first.sum().backward()
    return seen, result


def operands(row: Row, grad: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in row.shapes]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "name, dtype",
    [*((name, torch.float32) for name in TABLE), *((name, torch.bfloat16) for name in TABLE if "attention" in name)],
    ids=str,
)
def test_graph_is_torchs(name: str, dtype: torch.dtype) -> None:
    row = TABLE[name]
    tensors = operands(row, grad=dtype is torch.float32, dtype=dtype)
    ours, result = compiled(row.ours, tensors)
    theirs, _ = compiled(row.torchs, [t.detach().requires_grad_(t.requires_grad) for t in tensors])
    assert ours == theirs
    for mine, eager in zip(_all(result), _all(row.ours(*tensors)), strict=True):
        assert mine.stride() == eager.stride() and mine.dtype is eager.dtype
        torch.testing.assert_close(mine, eager, equal_nan=True)
    plain = [t.detach() for t in tensors]
    assert exported(row.ours, plain) == exported(row.torchs, plain)


def _all(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


class _Selects(_Call):
    """Calls the function with as many slices of its first tensor as only the data tell."""

    def __init__(self, function: Callable[..., Any], dim: int) -> None:
        super().__init__(function)
        self.dim = dim

    def forward(self, keep: torch.Tensor, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        return self.function(x.index_select(self.dim, keep.nonzero().squeeze(1)), *tensors)


def _exported_of_unknown_size(
    function: Callable[..., Any], tensors: list[torch.Tensor], dim: int, strict: bool
) -> tuple[Any, ...]:
    """Operators and ranges of sizes of the exported program, or the type of the error."""
    keep = torch.ones(tensors[0].shape[dim], dtype=torch.bool)
    try:
        program = torch.export.export(_Selects(function, dim), (keep, *tensors), strict=strict)
    except Exception as error:
        return (type(error),)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return operators, sorted(map(str, program.range_constraints.values()))


# `make test` exports each function of images, and attention, in one of the two ways.
EXPORTS = [
    pytest.param(
        name, strict, id=f"{name}-{'strict' if strict else 'non-strict'}",
        marks=[] if ("2d" in name or "attention" in name) and (number + strict) % 2 else [pytest.mark.full],
    )
    for number, name in enumerate(TABLE) for strict in (True, False)
]  # fmt: skip


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name, strict", EXPORTS)
def test_a_size_that_depends_on_data_is_exported_where_torchs_is(name: str, strict: bool) -> None:
    """A question about such a size ends the export. torch's attention asks about a batch, heads and queries, and some
    versions of torch about what an unbatched call has."""
    row = TABLE[name]
    tensors, exports = operands(row, grad=False), 0
    for dim in range(len(row.shapes[0])):
        theirs = _exported_of_unknown_size(row.torchs, tensors, dim, strict)
        assert _exported_of_unknown_size(row.ours, tensors, dim, strict) == theirs, f"dimension {dim}"
        exports += len(theirs) == 2
    # torch's fractional_max_pool3d has no shape of a symbolic batch.
    assert exports or "unbatched" in name or name.startswith(("scaled_dot_product_attention", "fractional_max_pool3d"))


@pytest.mark.torch
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_attention_over_a_length_that_depends_on_data(strict: bool) -> None:
    def shortened(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
            count = length.item()
            torch._check(count >= 4)
            torch._check(count <= 8)
            return function(*(q[:, :, :count],) * 3)

        return run

    arguments = (torch.randn(2, 3, 8, 8), torch.tensor(6))
    programs = [
        torch.export.export(_Call(shortened(f)), arguments, strict=strict)
        for f in (tritune.scaled_dot_product_attention, F.scaled_dot_product_attention)
    ]
    ours, theirs = ([str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in programs)
    assert ours == theirs
    got, wanted = (program.module()(*arguments) for program in programs)
    assert torch.equal(got, wanted)


def _guards(function: Callable[..., Any], tensors: list[torch.Tensor]) -> set[str]:
    """What make_fx notes of the sizes of a training step."""

    def step(*tensors: torch.Tensor) -> Any:
        result = _all(function(*tensors))
        wanted = [t for t in tensors if t.requires_grad]
        return result, torch.autograd.grad(result[0].sum(), wanted) if wanted else ()

    traced = make_fx(step, tracing_mode="symbolic")(*tensors)
    return {str(guard.expr) for guard in traced.shape_env.guards}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", TABLE)
def test_sizes_are_guarded_as_torchs(name: str) -> None:
    row = TABLE[name]
    tensors = operands(row, grad="fractional_max_pool3d" not in name)  # fake tensors lack its backward
    assert _guards(row.ours, tensors) == _guards(row.torchs, tensors)


def _compilations(function: Callable[..., Any], calls: list[list[torch.Tensor]]) -> Any:
    """How often the calls compile, or the type of the error: Dynamo cannot trace torch's ``lp_pool3d`` of a symbol."""
    count = 0

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=keep)
    try:
        for tensors in calls:
            compiled(*tensors)
    except Exception as error:
        return type(error)
    return count


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", [name for name in TABLE if "unpool" not in name])
def test_other_sizes_compile_as_often_as_torchs(name: str) -> None:
    """From few pixels to so many that kernels of ours would keep winners in another type."""
    row = TABLE[name]
    rank = 0 if "attention" in name else len(row.shapes[0]) - (1 if "unbatched" in name else 2)

    def grown(place: int, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        if rank:
            return shape if place else (*shape[:-rank], *(size,) * rank)
        return (size, size) if place == 3 else (*shape[:-2], size, shape[-1])

    calls = [
        [torch.randn(grown(*one, size), requires_grad=True) for one in enumerate(row.shapes)]
        for size in (9, 12, 33, 33 if rank == 3 else 200)
    ]
    assert _compilations(row.ours, calls) == _compilations(row.torchs, calls)


@pytest.mark.interpret
@pytest.mark.parametrize("name", TABLE)
def test_graph_is_ours_on_the_kernels(name: str) -> None:
    """Nothing runs here: what is exported for the kernels is traced on fake tensors."""
    row = TABLE[name]
    assert conv_operators.OP is torch.ops.tritune.conv.default
    with tritune.use_backend("triton"):
        if not row.kernels:
            with pytest.raises(Exception, match="no kernel covers the call"):
                exported(row.ours, operands(row, grad=False))
            return
        operators = [op for op in exported(row.ours, operands(row, grad=False)) if op.startswith("tritune.")]
    assert operators and all(op.startswith(f"tritune.{row.kernels}") for op in operators)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TABLE)
def test_kernels_are_not_traced(name: str) -> None:
    """torch.jit.trace cannot record sizes that are computed for an operator of ours."""
    row = TABLE[name]
    tensors = tuple(operands(row, grad=False))
    with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match=r"use torch\.export"):
        torch.jit.trace(row.ours, tensors, check_trace=False)


class _Overriding:
    """No tensor, but an object that torch's functions accept."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function, args


@pytest.mark.torch
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_override_comes_first(name: str, backend: str) -> None:
    """As torch's own do, a function hands an object with ``__torch_function__`` itself and all arguments."""
    function = getattr(tritune, name)
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    arguments = [_Overriding() for _ in needed]
    with tritune.use_backend(backend):
        called, given = function(*arguments)
    assert called is function and list(given[: len(arguments)]) == arguments


class _Records(TorchFunctionMode):
    """Keeps what is called, and calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


# A row's own lines come before the call; torch's functions with indices have names of their own.
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", TABLE)
def test_a_mode_sees_one_call(name: str) -> None:
    """No attribute of a tensor is read before a mode has been asked."""
    row, ours, theirs = TABLE[name], _Records(), _Records()
    tensors = operands(row, grad=False)
    with ours:
        row.ours(*tensors)
    with theirs:
        row.torchs(*tensors)
    assert ours.seen[-1] is getattr(tritune, name.split()[0])
    before = len(ours.seen) - 1
    assert ours.seen[:before] == theirs.seen[:before]
    assert len(ours.seen) <= len(theirs.seen)


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_a_mode_sees_one_call_of_what_torch_has_not(name: str) -> None:
    function, x, w = getattr(tritune, name), torch.randn(5, 2, 4), torch.randn(4, 4)
    tensors = [x, x, x] if "attention" in name else [x[0], x[0], w, w]
    if name in ("rnn", "gru", "lstm"):
        gates = {"rnn": 4, "gru": 12, "lstm": 16}[name]
        tensors = [x, torch.randn(gates, 4), torch.randn(gates, 4)]
    with _Records() as mode:
        function(*tensors)
    assert mode.seen == [function]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", [name for name in TABLE if "unpool" not in name])
def test_fx_records_the_function(name: str) -> None:
    row = TABLE[name]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for place, shape in enumerate(row.shapes[1:]):
                self.register_buffer(f"operand{place}", torch.randn(shape))

        def forward(self, x: torch.Tensor) -> Any:
            return row.ours(x, *self.buffers())

    model, x = Model(), torch.randn(row.shapes[0])
    traced = torch.fx.symbolic_trace(model)
    assert getattr(tritune, name.split()[0]) in [node.target for node in traced.graph.nodes]
    for got, wanted in zip(_all(traced(x)), _all(model(x)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
