"""Derivatives of every order, functional transforms, and everyday torch, by value."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_as_exact, backend_of, in_turn, lay_out
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import tritune

ops = torch.ops.tritune
ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish", "hardsigmoid",
               "sigmoid", "tanh")  # fmt: skip
GEOMETRY = ((2, 1), (1, 1), (1, 1), 2)
CELLS = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}


# Shape; size of the result, kernel_size, stride, padding, dilation.
FIXED: dict[str, Any] = {
    "1d": ((2, 3, 9), ([5], [3], [2], [1], [1])),
    "2d": ((2, 3, 6, 5), ([3, 6], [3, 2], [2, 1], [1, 1], [1, 1])),
    "2d-ceil": ((1, 2, 5, 5), ([3, 3], [2, 2], [2, 2], [0, 0], [1, 1])),
    "3d": ((1, 2, 4, 3, 5), ([2, 2, 3], [2, 2, 3], [2, 1, 2], [0, 0, 1], [1, 1, 1])),
}
ADAPTIVE: dict[str, Any] = {
    "adaptive-1d": ((2, 3, 7), ([3], [], [], [], [])),
    "adaptive-2d": ((1, 2, 5, 4), ([3, 6], [], [], [], [])),
    "adaptive-3d": ((1, 2, 4, 3, 5), ([2, 4, 2], [], [], [], [])),
}
DILATED: dict[str, Any] = {
    "dilated": ((2, 3, 8, 8), ([6, 5], [2, 2], [1, 1], [0, 0], [2, 3])),
    "in-the-padding": ((2, 3, 8, 8), ([2, 2], [2, 2], [1, 1], [1, 1], [8, 8])),
}
MEANS = {**FIXED, **ADAPTIVE}
MAXIMA = {**MEANS, **DILATED}
DIVISORS = ((True, 0), (False, 0), (True, -3))  # include_pad, divisor; neither is asked of adaptive windows


# input, weight, bias, scale, residual; stride, padding, dilation, groups.
SHAPES = ((2, 4, 7, 6), (6, 2, 3, 3), (6,), (6,), (2, 6, 4, 6))
CONVOLUTIONS: dict[str, Any] = {
    "conv-2d": (SHAPES, GEOMETRY),
    "conv-1d": (((2, 3, 9), (4, 3, 3), (4,), (4,), (2, 4, 4)), ((2,), (1,), (2,), 1)),
    "conv-3d": (((1, 2, 4, 3, 5), (4, 1, 2, 3, 2), (4,), (4,), (1, 4, 3, 2, 4)),
                ((1, 2, 1), (0, 1, 0), (1, 1, 1), 2)),
    "conv_transpose-2d": (((2, 4, 4, 6), (4, 3, 3, 3), (6,), (6,), (2, 6, 8, 6)), GEOMETRY),
    # The image ends a stride and more after the last window.
    "conv_transpose-1d": (((2, 3, 4), (3, 2, 3), (2,), (2,), (2, 2, 9)), ((1,), (0,), (2,), 1)),
}  # fmt: skip


def tensors(
    dtype: torch.dtype, device: str = "cpu", shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def sequence(cell: str, directions: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor | None]:
    """input, w_ih, w_hh, b_ih, b_hh, h0, c0 of a small layer."""
    t, b, i, h = 3, 2, 3, 4
    rows, states = (directions, CELLS[cell] * h), (directions, b, h)
    shapes = ((t, b, i), (*rows, i), (*rows, h), rows, rows, states, states if cell == "lstm" else None)
    return [None if s is None else torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


def distinct(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """No two elements are near each other, so that a small step changes no maximum."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count, dtype=dtype) / count).view(shape).requires_grad_()


def unpadded(row: Any) -> Any:
    """The same windows for a norm, which knows no padding."""
    shape, (_, kernel_size, stride, _, dilation) = row
    size = [(full - taps) // step + 1 for full, taps, step in zip(shape[2:], kernel_size, stride, strict=True)]
    return shape, (size, kernel_size, stride, [0] * len(size), dilation)


def unpooling(name: str, dtype: torch.dtype, places: str) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
    """Input, indices, size of the result, and windows; ``shuffled`` indices lie anywhere, each once."""
    shape, (size, kernel_size, stride, padding, _) = FIXED[name]
    if places == "pooled":  # windows that share no element name none twice
        kernel_size, padding = [min(pair) for pair in zip(kernel_size, stride, strict=True)], [0] * len(stride)
        size = [(full - taps) // step + 1 for full, taps, step in zip(shape[2:], kernel_size, stride, strict=True)]
        call = (size, kernel_size, stride, padding, [1] * len(size), "auto")
        indices = ops.max_pool_with_indices(torch.randn(shape), *call)[1]
    else:
        full, count = torch.Size(shape[2:]).numel(), torch.Size(size).numel()
        indices = torch.stack([torch.randperm(full)[:count] for _ in range(shape[0] * shape[1])])
        indices = indices.view(*shape[:2], *size)
    x = torch.randn(indices.shape, dtype=dtype, requires_grad=True)
    return x, indices, list(shape[2:]), (kernel_size, stride, padding)


ATTENTIONS: list[dict[str, Any]] = [
    {"heads": 2, "kv": 2, "mask": True, "bias": (1, 2, 1, 6), "shift": None},
    {"heads": 4, "kv": 2, "mask": False, "bias": None, "shift": 0},
    {"heads": 2, "kv": 1, "mask": False, "bias": (2, 1, 5, 6), "shift": -1},
]


def attended(options: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor | None]:
    """query, key, value, mask, bias; the first query sees nothing where ``shift`` is -1."""
    shapes = ((2, options["heads"], 5, 3), *((2, options["kv"], 6, d) for d in (3, 4)))
    q, k, v = (torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes)
    mask = torch.rand(2, 1, 5, 6, device=device) > 0.3 if options["mask"] else None
    shape = options["bias"]
    bias = None if shape is None else torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    return [q, k, v, mask, bias]


def direct_calls() -> dict[str, tuple[Any, ...]]:
    """One legal call of each operator."""
    x, w, g, y = (torch.randn(shape) for shape in ((1, 2, 4, 4), (2, 2, 2, 2), (1, 2, 3, 3), (1, 2, 3, 3)))
    places = torch.arange(9).view(1, 1, 3, 3).repeat(1, 2, 1, 1)
    geometry, window = ([1, 1], [0, 0], [1, 1], 1), ([2, 2], [1, 1], [0, 0], [1, 1])
    size, space, activated = [3, 3], [4, 4], ("silu", "ieee", "auto")
    q, k, v, out, dout = (torch.randn(1, 1, 3, 4) for _ in range(5))
    stats, inverse = torch.randn(2, 1, 1, 3), torch.rand(1, 1, 3)
    steps, w_ih, w_hh, h0, hidden, dhidden = (
        torch.randn(shape) for shape in ((3, 2, 5), (1, 4, 5), (1, 4, 4), (1, 2, 4), (3, 2, 4), (3, 2, 4))
    )
    layer = (steps, w_ih, w_hh, None, None, h0, None)
    return {
        "conv": (x, w, None, None, None, size, None, *geometry, *activated),
        "conv_saving_input": (x, w, None, None, None, size, None, *geometry, *activated),
        "conv_transpose": (g, w, None, None, None, space, None, *geometry, *activated),
        "conv_transpose_saving_input": (g, w, None, None, None, space, None, *geometry, *activated),
        "conv_epilogue_grad": (g, y, "silu", True, False, "auto"),
        "conv_bias_grad": (g, "auto"),
        "conv_weight_grad": (x, g, [2, 2], False, *geometry, "ieee", "auto"),
        "conv2d_max_pool2d": (x, w, None, None, size, *geometry, "relu", "ieee", *window[:3], "auto"),
        "max_pool": (x, size, *window, "auto"),
        "max_pool_with_offsets": (x, size, *window, "auto"),
        "max_pool_with_indices": (x, size, *window, "auto"),
        "max_pool_backward": (g, places, space, False, *window, "auto"),
        "pool_gather": (x, places, *window, "auto"),
        "avg_pool": (x, size, *window, True, 0, "auto"),
        "avg_pool_backward": (g, space, False, *window, True, 0, "auto"),
        "lp_pool": (x, size, *window, 2.0, "auto"),
        "lp_pool_backward": (g, x, y, *window, 2.0, "auto"),
        "max_unpool": (g, places, space, *window[:3], "auto"),
        "attention": (q, k, v, None, None, 0.5, None, False, False, False, "ieee", "auto"),
        "attention_backward": (
            q, k, v, None, None, out, stats, dout, None, [True, True, True, False], 0.5, None, False, "ieee", "auto",
        ),
        "attention_normalize": (q, 1e-6, "auto"),
        "attention_normalize_backward": (q, out, inverse, dout, 1e-6, "auto"),
        "rnn": (*layer, "tanh", False, "default", False, "auto"),
        "rnn_backward": (
            *layer, hidden, None, dhidden, None, None, None, [True, True, True, False, False], "tanh", False, "default",
            "auto",
        ),
    }  # fmt: skip


DIRECT = direct_calls()


@pytest.mark.torch
class TestAutogradKey:
    """What an operator's key for autograd runs when the operator is called without our public function."""

    @pytest.fixture
    def entered(self, monkeypatch):
        """Names of our autograd Functions whose forward has run."""
        names: list[str] = []

        def recording(kind: Any) -> Any:
            forward = kind.forward

            def record(*args: Any) -> Any:
                names.append(kind.__name__)
                return forward(*args)

            return staticmethod(record)

        for kind in torch.autograd.Function.__subclasses__():
            if kind.__module__.startswith("tritune.ops."):
                monkeypatch.setattr(kind, "forward", recording(kind))
        return names

    @pytest.mark.parametrize("name", DIRECT)
    def test_a_function_is_entered_only_for_a_gradient(self, name, entered):
        op = getattr(ops, name)
        without = op(*DIRECT[name])
        leaves = [
            t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in DIRECT[name]
        ]
        with torch.no_grad():
            op(*leaves)
        assert entered == []

        with_gradient = op(*leaves)
        first, expected = (t[0] if isinstance(t, (tuple, list)) else t for t in (with_gradient, without))
        assert first.requires_grad and not expected.requires_grad
        torch.testing.assert_close(first.detach(), expected)
        entered.clear()
        inputs = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
        torch.autograd.grad(first.sum(), inputs, allow_unused=True)
        assert entered == []

    def test_functions_are_seen(self, entered):
        x = torch.randn(1, 2, 4, 4, requires_grad=True)
        ops.avg_pool(x, *DIRECT["avg_pool"][1:])
        assert entered == ["_AvgPool"]

    def test_every_operator_is_called(self):
        """None takes a list of tensors, into which the key would not look."""
        names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tritune::")]
        assert {name.removeprefix("tritune::") for name in names} == set(DIRECT)
        assert not [name for name in DIRECT if "Tensor[]" in str(getattr(ops, name).default._schema)]


@pytest.mark.torch
class TestOperators:
    """Called directly, an operator is opaque to autograd: what runs below it is not recorded, with kernels or not. So
    these checks see our formulas, in float64."""

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_gradients_of_conv(self, name, activation):
        op, shapes, geometry = getattr(ops, name.split("-")[0]), *CONVOLUTIONS[name]

        def conv(*args: Any) -> Any:
            return op(*args, shapes[4][2:], None, *geometry, activation, "ieee", "auto")

        args = tensors(torch.float64, shapes=shapes)
        assert gradcheck(conv, args, fast_mode=True)
        assert gradgradcheck(conv, args, fast_mode=True)

    @pytest.mark.parametrize("name", MAXIMA)
    def test_gradients_of_max_pool(self, name):
        shape, call = MAXIMA[name]
        x = distinct(shape, torch.float64)
        for op in (ops.max_pool, ops.max_pool_with_offsets, ops.max_pool_with_indices):
            if name == "in-the-padding" and op is ops.max_pool_with_indices:
                continue  # there is none

            def maximum(x: Any, op: Any = op) -> Any:
                result = op(x, *call, "auto")
                return result if op is ops.max_pool else result[0]

            assert gradcheck(maximum, x, fast_mode=True)
            assert gradgradcheck(maximum, x, fast_mode=True)

    @pytest.mark.parametrize("include_pad, divisor", DIVISORS)
    @pytest.mark.parametrize("name", MEANS)
    def test_gradients_of_avg_pool(self, name, include_pad, divisor):
        shape, call = MEANS[name]
        options = (include_pad, divisor) if name in FIXED else (True, 0)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: ops.avg_pool(x, *call, *options, "auto"), x, fast_mode=True)
        assert gradgradcheck(lambda x: ops.avg_pool(x, *call, *options, "auto"), x, fast_mode=True)

    @pytest.mark.parametrize("norm", [1.0, 2.0])
    @pytest.mark.parametrize("name", FIXED)
    def test_gradients_of_lp_pool(self, name, norm):
        shape, call = unpadded(FIXED[name])
        x = (torch.rand(shape, dtype=torch.float64) + 0.5).requires_grad_()
        assert gradcheck(lambda x: ops.lp_pool(x, *call, norm, "auto"), x, fast_mode=True)
        assert gradgradcheck(lambda x: ops.lp_pool(x, *call, norm, "auto"), x, fast_mode=True)

    @pytest.mark.parametrize("places", ["pooled", "shuffled"])
    @pytest.mark.parametrize("name", FIXED)
    def test_gradients_of_max_unpool(self, name, places):
        x, indices, size, windows = unpooling(name, torch.float64, places)
        assert gradcheck(lambda x: ops.max_unpool(x, indices, size, *windows, "auto"), x, fast_mode=True)
        assert gradgradcheck(lambda x: ops.max_unpool(x, indices, size, *windows, "auto"), x, fast_mode=True)

    @pytest.mark.parametrize("name, activation, last", in_turn(CONVOLUTIONS, ["none", "relu", "silu"], [False, True]))
    def test_opcheck_conv(self, name, activation, last):
        op, shapes, geometry = name.split("-")[0], *CONVOLUTIONS[name]
        x, *rest = (t.detach() for t in tensors(torch.float32, shapes=shapes))
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        args = [t.requires_grad_() for t in (x, *rest)]
        for channels_last in (None, last):
            call = (*args, shapes[4][2:], channels_last, *geometry, activation, "ieee", "auto")
            opcheck(getattr(ops, op).default, call)
            opcheck(getattr(ops, f"{op}_saving_input").default, call)

    @pytest.mark.parametrize(
        "name, channels_last", in_turn([name for name in CONVOLUTIONS if "transpose" not in name], [False, True])
    )
    def test_opcheck_gradients_of_conv(self, name, channels_last):
        shapes, geometry = CONVOLUTIONS[name]
        x, w, _, _, g = tensors(torch.float32, shapes=shapes)
        opcheck(ops.conv_weight_grad.default, (x, g, w.shape[2:], channels_last, *geometry, "ieee", "auto"))
        opcheck(ops.conv_bias_grad.default, (g, "auto"))
        for need_bias in (False, True):
            for saved, activation in ((g.detach().clone(), "silu"), (None, "none")):
                call = (g, saved, activation, need_bias, channels_last, "auto")
                opcheck(ops.conv_epilogue_grad.default, call)

    @pytest.mark.parametrize("name, last", in_turn(MAXIMA, [False, True]))
    def test_opcheck_max_pool(self, name, last):
        shape, (size, *windows) = MAXIMA[name]
        x = lay_out(distinct(shape, torch.float32).detach(), "nhwc" if last else "nchw").requires_grad_()
        for op in (ops.max_pool, ops.max_pool_with_offsets, ops.max_pool_with_indices):
            opcheck(op.default, (x, size, *windows, "auto"))
        for op in (ops.max_pool_with_offsets, ops.max_pool_with_indices):
            y, winners = op(x, size, *windows, "auto")
            dy = torch.randn_like(y).requires_grad_()
            opcheck(ops.max_pool_backward.default, (dy, winners, shape[2:], last, *windows, "auto"))
            opcheck(ops.pool_gather.default, (x, winners, *windows, "auto"))

    @pytest.mark.parametrize("name, last", in_turn(MEANS, [False, True]))
    def test_opcheck_avg_pool(self, name, last):
        shape, (size, *windows) = MEANS[name]
        x = lay_out(torch.randn(shape), "nhwc" if last else "nchw").requires_grad_()
        for options in DIVISORS[: 3 if name in FIXED else 1]:
            opcheck(ops.avg_pool.default, (x, size, *windows, *options, "auto"))
            dy = torch.randn(*shape[:2], *size, requires_grad=True)
            opcheck(ops.avg_pool_backward.default, (dy, shape[2:], last, *windows, *options, "auto"))

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at them
    @pytest.mark.parametrize("name, norm", in_turn(FIXED, [1.0, 2.0]))
    def test_opcheck_lp_pool(self, name, norm):
        shape, (size, *windows) = unpadded(FIXED[name])
        x = torch.rand(shape, requires_grad=True)
        opcheck(ops.lp_pool.default, (x, size, *windows, norm, "auto"))
        y = ops.lp_pool(x, size, *windows, norm, "auto").detach().requires_grad_()
        opcheck(ops.lp_pool_backward.default, (torch.randn_like(y), x, y, *windows, norm, "auto"))

    @pytest.mark.parametrize("name", FIXED)
    def test_opcheck_max_unpool(self, name):
        x, indices, size, windows = unpooling(name, torch.float32, "pooled")
        opcheck(ops.max_unpool.default, (x, indices, size, *windows, "auto"))
        y = torch.randn(*x.shape[:2], *size, requires_grad=True)
        opcheck(ops.pool_gather.default, (y, indices, [], [], [], [], "auto"))

    @pytest.mark.parametrize("directions, reverse", [(1, False), (1, True), (2, False)])
    @pytest.mark.parametrize("cell", CELLS)
    def test_gradients_of_rnn(self, cell, directions, reverse):
        """Of everything that comes out: the output, both last states, and LSTM's cells."""

        def layer(*args: Any) -> Any:
            full = args if cell == "lstm" else (*args, None)
            outputs = ops.rnn(*full, cell, reverse, "ieee", True, "auto")
            return tuple(t for t in outputs if t.numel())

        args = [t for t in sequence(cell, directions, torch.float64) if t is not None]
        assert gradcheck(layer, args, fast_mode=True)
        assert gradgradcheck(layer, args, fast_mode=True)

    @pytest.mark.parametrize("cell, directions", in_turn(CELLS, [1, 2]))
    def test_opcheck_rnn(self, cell, directions):
        args = sequence(cell, directions, torch.float32)
        opcheck(ops.rnn.default, (*args, cell, False, "ieee", True, "auto"))
        plain = [None if t is None else t.detach() for t in args]
        out, h_n, _, cells = ops.rnn(*plain, cell, False, "ieee", True, "auto")
        lstm = cell == "lstm"
        grads = (torch.randn_like(out), torch.randn_like(h_n), torch.randn_like(h_n) if lstm else None, None)
        for needs in ([True] * 5, [False, True, False, True, False]):
            call = (*plain, out, cells if lstm else None, *grads, needs, cell, False, "ieee", "auto")
            opcheck(ops.rnn_backward.default, call)

    @pytest.mark.parametrize("options", ATTENTIONS, ids=str)
    def test_gradients_of_attention(self, options):
        """Of the result and of lse."""

        def attention(q: Any, k: Any, v: Any, bias: Any = None) -> Any:
            out, lse, _ = ops.attention(q, k, v, mask, bias, 0.4, options["shift"], False, True, True, "ieee", "auto")
            return out, torch.where(lse == float("-inf"), 0.0, lse)  # differences of -inf are NaN

        q, k, v, mask, bias = attended(options, torch.float64)
        args = [q, k, v, *([] if bias is None else [bias])]
        assert gradcheck(attention, args, fast_mode=True)
        assert gradgradcheck(attention, args, fast_mode=True)

    @pytest.mark.parametrize("options", ATTENTIONS, ids=str)
    def test_opcheck_attention(self, options):
        args = attended(options, torch.float32)
        opcheck(ops.attention.default, (*args, 0.4, options["shift"], False, True, True, "ieee", "auto"))
        opcheck(ops.attention.default, (*args, 0.4, options["shift"], False, False, True, "ieee", "auto"))
        plain = [None if t is None else t.detach() for t in args]
        out, lse, stats = ops.attention(*plain, 0.4, options["shift"], False, True, True, "ieee", "auto")
        for needs in ([True] * 4, [True, False, False, True], [False, True, False, False]):
            call = (*plain, out, stats, torch.randn_like(out), torch.randn_like(lse), needs, 0.4, options["shift"])
            opcheck(ops.attention_backward.default, (*call, False, "ieee", "auto"))

    def test_gradients_of_rows_of_unit_length(self):
        """Among them a short one, which is only multiplied, and one of zeros."""
        x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
        x[0, 0, 1] *= 1e-3
        x[0, 1, 2] = 0
        x.requires_grad_()
        assert gradcheck(lambda x: ops.attention_normalize(x, 0.1, "auto")[0], x)
        assert gradgradcheck(lambda x: ops.attention_normalize(x, 0.1, "auto")[0], x)
        opcheck(ops.attention_normalize.default, (x, 0.1, "auto"))
        out, inverse = ops.attention_normalize(x.detach(), 0.1, "auto")
        opcheck(
            ops.attention_normalize_backward.default, (x.detach(), out, inverse, torch.randn_like(out), 0.1, "auto")
        )

    def test_derivatives_where_torch_serves(self):
        """torch's fused kernel for the CPU has no second derivative; through our function there is one."""
        args = [t for t in attended(ATTENTIONS[1], torch.float64) if t is not None]
        for score in ("dot", "cosine"):

            def attention(*args: Any, score: str = score) -> Any:
                return tritune.attention(*args, score=score, scale=0.8, is_causal=True, enable_gqa=True)

            assert gradcheck(attention, args, fast_mode=True)
            assert gradgradcheck(attention, args, fast_mode=True)

    def test_every_operator_is_checked(self):
        """A new operator must join the tests above."""
        names = {
            name for name in dir(ops) if name.startswith(("conv", "max_", "avg_", "lp_", "pool", "rnn", "attention"))
        }
        registered = {schema.name.split("::")[1] for schema in torch._C._jit_get_all_schemas()
                      if schema.name.startswith("tritune::")}  # fmt: skip
        assert registered == {
            "conv", "conv_saving_input", "conv_transpose", "conv_transpose_saving_input", "conv_epilogue_grad",
            "conv2d_max_pool2d", "conv_bias_grad", "conv_weight_grad", "max_pool", "max_pool_with_offsets",
            "max_pool_with_indices", "max_pool_backward", "pool_gather", "avg_pool", "avg_pool_backward", "lp_pool",
            "lp_pool_backward", "max_unpool", "rnn", "rnn_backward", "attention", "attention_backward",
            "attention_normalize", "attention_normalize_backward",
        }  # fmt: skip
        assert names <= registered


# Pooling: function, shape, the other arguments (of an unpooling: kernel_size, and the sides of the result).
SECOND: list[Any] = [
    ("max_pool2d", (1, 4, 7, 7), (3, 2, 1)),
    ("max_pool2d", (1, 4, 7, 7), (3, 2, 1, 1, False, True)),
    ("max_pool3d", (1, 2, 4, 4, 5), (2, 1)),
    ("adaptive_max_pool2d", (1, 3, 5, 7), ((2, 4),)),
    ("avg_pool1d", (2, 3, 12), (3, 2, 1, True, False)),
    ("avg_pool2d", (1, 4, 7, 7), (3, 2, 1)),
    ("adaptive_avg_pool2d", (1, 3, 5, 7), ((2, 9),)),
    ("global_avg_pool", (2, 3, 5, 4), ()),
    ("lp_pool2d", (1, 3, 6, 7), (1, 2)),
    ("lp_pool2d", (1, 3, 6, 7), (2.0, 3, 2)),
    ("max_unpool2d", (1, 3, 3, 3), (2, 6)),
]


@pytest.mark.interpret
@pytest.mark.gpu
class TestSecondDerivativeOfKernels:
    """Against torch's composite in float64: a backward op without a derivative of its own would be off silently."""

    @pytest.mark.parametrize("activation", ["none", "relu", "silu"])
    def test_conv2d(self, activation, device):
        def second(fn: Any, args: list[torch.Tensor]) -> list[torch.Tensor]:
            y = fn(*args)
            first = torch.autograd.grad((y * y).sum(), args, create_graph=True)
            return list(torch.autograd.grad(sum((g * g).sum() for g in first), args))

        def ours(x: Any, w: Any, b: Any, s: Any, r: Any) -> Any:
            with tritune.use_backend("triton"):
                name = None if activation == "none" else activation
                return tritune.conv2d(x, w, b, *GEOMETRY, activation=name, scale=s, residual=r)

        def composite(x: Any, w: Any, b: Any, s: Any, r: Any) -> Any:
            z = F.conv2d(x, w, None, *GEOMETRY) * s.view(-1, 1, 1) + b.view(-1, 1, 1) + r
            return {"none": lambda z: z, "relu": torch.relu, "silu": F.silu}[activation](z)

        args = tensors(torch.float32, device)
        exact = second(composite, [t.detach().double().cpu().requires_grad_() for t in args])
        for got, wanted in zip(second(ours, args), exact, strict=True):
            error = (got.double().cpu() - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-5

    @pytest.mark.parametrize("name, shape, args", SECOND, ids=lambda value: value if isinstance(value, str) else "")
    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_pooling(self, name, shape, args, layout, device):
        theirs = "adaptive_avg_pool2d" if name == "global_avg_pool" else name

        def second(op: str, x: torch.Tensor, *args: Any) -> list[torch.Tensor]:
            with tritune.use_backend("triton" if op == name and x.dtype is torch.float32 else "torch"):
                y = getattr(tritune, op)(x, *args)
            y = y[0] if isinstance(y, tuple) else y
            (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
            return [first, *torch.autograd.grad((first**2).sum(), x)]

        x = lay_out(distinct(shape, torch.float32).detach() + 0.1, layout).to(device)
        exact = x.double().cpu().requires_grad_()
        if "unpool" in name:
            places = torch.randint(0, args[1] ** 2, shape)
            got = second(name, x.requires_grad_(), places.to(device), args[0], None, 0, (args[1],) * 2)
            wanted = second(name, exact, places, args[0], None, 0, (args[1],) * 2)
        else:
            got = second(name, x.requires_grad_(), *args)
            wanted = second(theirs, exact, *(args if theirs == name else (1,)))
        for one, right in zip(got, wanted, strict=True):
            error = (one.double().cpu() - right).abs().max() / right.abs().max()
            assert error < 1e-5

    @pytest.mark.parametrize("cell", CELLS)
    def test_rnn(self, cell, device):
        def second(args: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
            x, w_ih, w_hh, b_ih, b_hh, *states = args
            options = {"nonlinearity": cell} if cell in ("tanh", "relu") else {}
            with tritune.use_backend(backend):
                fn = {"gru": tritune.gru, "lstm": tritune.lstm}.get(cell, tritune.rnn)
                outputs = fn(x, w_ih, w_hh, b_ih, b_hh, *states, **options)
            first = torch.autograd.grad(sum((y * y).sum() for y in outputs), args, create_graph=True)
            return list(torch.autograd.grad(sum((g * g).sum() for g in first), args))

        args = [t for t in sequence(cell, 2, torch.float32, device) if t is not None]
        exact = second([t.detach().double().cpu().requires_grad_() for t in args], "torch")
        for got, wanted in zip(second(args, "triton"), exact, strict=True):
            error = (got.double().cpu() - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-5

    @pytest.mark.parametrize("score", ["dot", "cosine"])
    @pytest.mark.parametrize("options", ATTENTIONS, ids=str)
    def test_attention(self, options, score, device):
        def second(args: list[Any], backend: str) -> list[torch.Tensor]:
            q, k, v, mask, bias = args
            causal = {"is_causal": True, "causal_alignment": "top_left"} if options["shift"] == 0 else {}
            with tritune.use_backend(backend):
                out, lse = tritune.attention(
                    q, k, v, attn_mask=mask, bias=bias, score=score, scale=0.7, enable_gqa=True, return_lse=True,
                    **causal,
                )  # fmt: skip
            leaves = [t for t in (q, k, v, bias) if t is not None]
            first = torch.autograd.grad((out * out).sum() + lse.sum(), leaves, create_graph=True)
            return list(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))

        args = attended(options, torch.float32, device)
        exact = [t if t is None or t.dtype is torch.bool else t.detach().double().cpu().requires_grad_() for t in args]
        exact[3] = None if exact[3] is None else exact[3].cpu()
        for got, wanted in zip(second(args, "triton"), second(exact, "torch"), strict=True):
            error = (got.double().cpu() - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-5


def lstm_by_steps(x: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor) -> torch.Tensor:
    """[B, T, I] to [B, T, H]; torch's own layer has no derivatives under transforms."""
    h = c = x.new_zeros(x.shape[0], w_hh.shape[1])
    outs = []
    for x_t in x.unbind(1):
        i, f, g, o = (x_t @ w_ih.T + h @ w_hh.T).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outs.append(h)
    return torch.stack(outs, 1)


def causal_by_scores(x: torch.Tensor) -> torch.Tensor:
    """torch's fused attention has no forward-mode derivative."""
    s = x @ x.transpose(-1, -2) * x.shape[-1] ** -0.5
    seen = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril()
    return torch.softmax(s.masked_fill(~seen, float("-inf")), -1) @ x


def calls(device: str) -> list[Any]:
    x, w = torch.randn(2, 4, 6, 6, device=device), torch.randn(4, 4, 3, 3, device=device)
    w_ih, w_hh = torch.randn(12, 4, device=device), torch.randn(12, 3, device=device)
    k = torch.randn(1, 1, 6, 4, device=device)
    _, places = F.max_pool2d(torch.randn(1, 4, 12, 12, device=device).expand(2, -1, -1, -1), 2, return_indices=True)
    return [
        (lambda x: tritune.conv2d(x, w, padding=1, activation="gelu"),
         lambda x: F.gelu(F.conv2d(x, w, padding=1)), x),
        (lambda x: tritune.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2), x),
        (lambda x: tritune.avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 3, 2, 1), x),
        (lambda x: tritune.adaptive_avg_pool2d(x, 4), lambda x: F.adaptive_avg_pool2d(x, 4), x),
        (lambda x: tritune.lp_pool2d(x, 2, 2), lambda x: F.lp_pool2d(x, 2, 2), x),
        (lambda x: tritune.max_unpool2d(x, places[: len(x)], 2), lambda x: F.max_unpool2d(x, places[: len(x)], 2), x),
        (lambda x: tritune.lstm(x, w_ih, w_hh, batch_first=True)[0],
         lambda x: lstm_by_steps(x, w_ih, w_hh), torch.randn(2, 5, 4, device=device)),
        (lambda x: tritune.attention(x, x, x, is_causal=True),
         causal_by_scores, torch.randn(2, 1, 5, 4, device=device)),
        (lambda x: tritune.attention(x, k, k, score="cosine", scale=3.0, return_lse=True)[1],
         lambda x: torch.logsumexp(3.0 * F.normalize(x, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2), -1),
         torch.randn(2, 1, 5, 4, device=device)),
    ]  # fmt: skip


@pytest.mark.torch
@pytest.mark.interpret
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself, on the first jvp
class TestTransforms:
    """Under a transform or an open forward-AD level the opaque operators would drop derivatives: jvp would be 0."""

    def test_jvp(self, device):
        for ours, theirs, x in calls(device):
            tangent = torch.randn_like(x)
            got, wanted = torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(theirs, (x,), (tangent,))
            torch.testing.assert_close(got, wanted)
            assert got[1].abs().sum() > 0

    def test_dual_level(self, device):
        for ours, theirs, x in calls(device):
            tangent = torch.randn_like(x)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, tangent)
                got = forward_ad.unpack_dual(ours(dual)).tangent
                wanted = forward_ad.unpack_dual(theirs(dual)).tangent
                torch.testing.assert_close(got, wanted)

    def test_grad(self, device):
        for ours, theirs, x in calls(device):
            got = torch.func.grad(lambda x, fn=ours: fn(x).square().sum())(x)
            torch.testing.assert_close(got, torch.func.grad(lambda x, fn=theirs: fn(x).square().sum())(x))

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for unpooling
    def test_per_sample_gradients(self, device):
        for ours, theirs, x in calls(device):

            def loss(sample: Any, fn: Any) -> Any:
                return fn(sample.unsqueeze(0)).square().sum()

            got = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(x, ours)
            torch.testing.assert_close(got, torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(x, theirs))


# Those of which torch's fused attention has the derivative; each hands out a tensor.
OF_TORCH: dict[str, Any] = {
    "functionalize": torch.func.functionalize,
    "grad": lambda fn: torch.func.grad(lambda *q: fn(*q).square().sum()),
    "grad of the value": lambda fn: torch.func.grad(lambda *q: fn(*q).square().sum(), 2),
    "vjp": lambda fn: lambda *q: torch.func.vjp(fn, *q)[1](q[0])[1],
    "jacrev": lambda fn: lambda *q: torch.func.jacrev(fn)(*(t[:1, :1] for t in q)),
    "vmap": lambda fn: lambda *q: torch.func.vmap(fn)(*(torch.stack([t, t + 1]) for t in q)),
    "vmap of heads": partial(torch.func.vmap, in_dims=1, out_dims=1),
    "vmap of vmap": lambda fn: lambda *q: torch.func.vmap(torch.func.vmap(fn))(*(t.unsqueeze(2) for t in q)),
    "vmap of grad": lambda fn: torch.func.vmap(torch.func.grad(lambda *q: fn(*q).square().sum())),
    "grad of vmap": lambda fn: torch.func.grad(lambda *q: torch.func.vmap(fn)(*q).square().sum()),
    "functionalize of grad": lambda fn: torch.func.functionalize(torch.func.grad(lambda *q: fn(*q).square().sum())),
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
class TestTransformsOfAttention:
    """Inside a transform torch's own function is called where it has the derivative, and the formula elsewhere."""

    @staticmethod
    def operands(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        laid_out = [torch.randn(2, 6, 4, 8, dtype=dtype).transpose(1, 2) for _ in range(3)]
        return [t.detach().requires_grad_(requires_grad) for t in laid_out]

    @pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
    @pytest.mark.parametrize("name", OF_TORCH)
    def test_it_is_torchs(self, name: str, options: dict[str, Any]) -> None:
        tensors = self.operands()
        ours, theirs = (
            OF_TORCH[name](lambda *q, f=function: f(*q, **options))(*tensors)
            for function in (tritune.scaled_dot_product_attention, F.scaled_dot_product_attention)
        )
        assert ours.stride() == theirs.stride() and torch.equal(ours, theirs)

    @pytest.mark.parametrize("name", [name for name in OF_TORCH if "grad" not in name and "j" not in name])
    def test_gradients_around_it_are_torchs_and_can_be_differentiated(self, name: str) -> None:
        tensors = self.operands(True, torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            wanted = self.second(OF_TORCH[name](F.scaled_dot_product_attention), tensors)
        firsts = []
        for function in (tritune.scaled_dot_product_attention, F.scaled_dot_product_attention):
            out = OF_TORCH[name](function)(*tensors)
            firsts.append(torch.autograd.grad(out.square().sum(), tensors))
        for one, other in zip(*firsts, strict=True):
            assert one.stride() == other.stride() and torch.equal(one, other)
        torch.testing.assert_close(self.second(OF_TORCH[name](tritune.scaled_dot_product_attention), tensors), wanted)

    @staticmethod
    def second(function: Any, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), tensors)

    def test_where_torch_has_no_derivative(self) -> None:
        """Of forward mode, or of the second order, however the levels lie."""
        q, k, v = self.operands()

        def loss(function: Any) -> Any:
            return lambda q: function(q, k, v).square().sum()

        orders = {
            "jvp": lambda f: torch.func.jvp(f, (q,), (q,))[1],
            "hessian": lambda f: torch.func.hessian(f)(q),
            "jacrev twice": lambda f: torch.func.jacrev(torch.func.jacrev(f))(q),
            "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(q),
            "backward of grad": lambda f: torch.autograd.grad(torch.func.grad(f)(leaf).square().sum(), leaf)[0],
        }
        leaf = q.clone().requires_grad_()
        for name, order in orders.items():
            with sdpa_kernel(SDPBackend.MATH):
                wanted = order(loss(F.scaled_dot_product_attention))
            torch.testing.assert_close(order(loss(tritune.scaled_dot_product_attention)), wanted, msg=name)

    def test_no_scores_are_traced(self) -> None:
        q = self.operands()[0]
        graphs = []
        for function in (tritune.scaled_dot_product_attention, F.scaled_dot_product_attention):
            traced = make_fx(torch.func.functionalize(partial(function, key=q, value=q)))(q)
            graphs.append([str(node.target) for node in traced.graph.nodes if node.op == "call_function"])
        assert graphs[0] == graphs[1]


def tangent_of(fn: Any) -> Any:
    def dual(x: Any) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(fn(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    return dual


TRANSFORMS: dict[str, Any] = {
    "jvp": lambda fn: lambda x: torch.func.jvp(fn, (x,), (torch.ones_like(x),))[1],
    "dual level": tangent_of,
    "vmap of grad": lambda fn: torch.func.vmap(torch.func.grad(lambda x: fn(x.unsqueeze(0)).square().sum())),
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_transforms(name, device):
    """What is traced for later cannot ask at once whether a transform is open."""
    for ours, _, x in calls(device):
        torch.compiler.reset()
        transformed = TRANSFORMS[name](ours)
        wanted = transformed(x)
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(torch.compile(transformed, backend="eager")(x), wanted)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("transform", [TRANSFORMS["jvp"], TRANSFORMS["dual level"], torch.func.vmap])
def test_compiled_kernels_refuse_transforms(transform, device):
    for ours, _, x in calls(device):
        torch.compiler.reset()
        x = x.unsqueeze(0) if transform is torch.func.vmap else x
        with tritune.use_backend("triton"), pytest.raises(Exception, match="transform"):
            torch.compile(transform(ours), backend="eager")(x)


@pytest.mark.interpret
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_kernels_refuse_transforms(device):
    for ours, _, x in calls(device):
        with tritune.use_backend("triton"):
            with pytest.raises(tritune.UnsupportedError, match="transform"):
                torch.func.jvp(ours, (x,), (x,))
            with pytest.raises(tritune.UnsupportedError, match="transform"):
                torch.func.grad(lambda x, fn=ours: fn(x).sum())(x)
            with forward_ad.dual_level(), pytest.raises(tritune.UnsupportedError, match="transform"):
                ours(forward_ad.make_dual(x, x))


@pytest.mark.torch
@pytest.mark.interpret
@pytest.mark.gpu
class TestEverydayTorch:
    @pytest.fixture(autouse=True)
    def backend(self, tier):
        with tritune.use_backend(backend_of(tier)):
            yield

    def test_checkpoint(self, device):
        for ours, _, x in calls(device):
            plain, again = x.clone().requires_grad_(), x.clone().requires_grad_()
            ours(plain).square().sum().backward()
            torch.utils.checkpoint.checkpoint(ours, again, use_reentrant=False).square().sum().backward()
            torch.testing.assert_close(again.grad, plain.grad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype, device):
        x = torch.randn(2, 8, 6, 6, device=device, requires_grad=True)
        w = torch.randn(8, 8, 3, 3, device=device, requires_grad=True)
        b = torch.randn(8, device=device, requires_grad=True)
        with torch.autocast(device, dtype=dtype):
            y = tritune.conv2d(x, w, b, activation="relu")
            for name, args in (("max_pool2d", (2,)), ("avg_pool2d", (2,)), ("lp_pool2d", (2, 2)),
                               ("adaptive_avg_pool2d", (2,))):  # fmt: skip
                for pooled in (x, y.detach()):
                    results = [getattr(namespace, name)(pooled, *args).dtype for namespace in (tritune, F)]
                    assert results[0] == results[1], name
        assert y.dtype == dtype
        y.float().sum().backward()
        assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32
        with torch.autocast(device, dtype=dtype):
            assert_as_exact(y, lambda *args: F.conv2d(*args).relu(), x, w, b)

    @pytest.mark.filterwarnings("ignore:max_unpooling2d_forward_out does not have a deterministic")
    def test_deterministic_mode(self, device, tier):
        """torch refuses to unpool then, on the CPU too, unless it may just warn."""
        torch.use_deterministic_algorithms(True, warn_only=tier == "torch")
        try:
            for ours, _, x in calls(device):
                x = x.requires_grad_()
                first, second = (torch.autograd.grad(ours(x).square().sum(), x)[0] for _ in range(2))
                assert torch.equal(first, second)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_tensor_and_module_hooks(self, device):
        seen = []
        layer = tritune.nn.Conv2d(4, 4, 3).to(device)
        layer.register_forward_hook(lambda *_: seen.append("forward"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        x = torch.randn(1, 4, 6, 6, device=device, requires_grad=True)
        x.register_hook(lambda g: seen.append("tensor") or 2 * g)
        layer(x).sum().backward()
        assert sorted(seen) == ["backward", "forward", "tensor"]

    def test_in_place_change_of_a_saved_tensor_is_noticed(self, device):
        x = torch.randn(1, 4, 6, 6, device=device, requires_grad=True)
        w = torch.randn(4, 4, 3, 3, device=device, requires_grad=True)
        y = tritune.conv2d(x, w)
        with torch.no_grad():
            w.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_gradient_is_freed_after_backward(self, device):
        x = torch.randn(1, 4, 6, 6, device=device, requires_grad=True)
        y = tritune.conv2d(x, torch.randn(4, 4, 3, 3, device=device)).sum()
        y.backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()


@pytest.mark.torch
@pytest.mark.interpret
@pytest.mark.gpu
class TestTorchsOwnSamples:
    """The operator samples that torch tests itself with; those of convolution and pooling have files of their own."""

    @pytest.mark.parametrize("name", ["nn.functional.scaled_dot_product_attention"])
    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.filterwarnings("ignore")
    def test_samples(self, name, requires_grad, device, tier):
        pytest.importorskip("expecttest")  # torch.testing needs it
        from torch.testing._internal.common_methods_invocations import op_db

        (info,) = (info for info in op_db if info.name == name and not info.variant_test_name)
        ours = getattr(tritune, name.rsplit(".", 1)[1])

        def fused(*args: torch.Tensor, **options: Any) -> torch.Tensor:
            """Of one sequence of heads, too, for which torch takes its composite: where a softmax is as saturated as
            by these samples, the gradient that remains is a difference which the composite rounds less. Where torch
            serves, ours is that composite."""
            return info.op(*args, **options) if tier == "torch" else info.op(*(t[None] for t in args), **options)[0]

        samples = list(info.sample_inputs(device, torch.float32, requires_grad=requires_grad))
        assert len(samples) > 5
        for sample in samples:
            if tier != "torch" and sample.kwargs.get("dropout_p"):
                with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match="dropout_p"):
                    ours(sample.input, *sample.args, **sample.kwargs)
                continue

            def outcome(function: Any, *args: Any, options: dict[str, Any] = sample.kwargs) -> list[torch.Tensor]:
                y = function(*args, **options)
                leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
                dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
                return [y, *(torch.autograd.grad(y, leaves, dy) if requires_grad else ())]

            arguments = (sample.input, *sample.args)
            torch.manual_seed(42)  # as torch does in what it calls for operators that drop out
            with tritune.use_backend(backend_of(tier)):
                got = outcome(ours, *arguments)
            if sample.kwargs.get("dropout_p"):  # float64 need not drop the same
                assert all(map(torch.equal, got, outcome(info.op, *arguments)))
            else:
                assert_as_exact(got, partial(outcome, fused), *arguments)
