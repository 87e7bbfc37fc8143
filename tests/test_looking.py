"""Looking on changes nothing: what records, logs, counts or hooks a call gets the bits and the layout that the call has
without it, and so do its gradients. Where torch serves, every way through a function ends in the same call of torch's.

Every row of the tables of calls (``perf/calls.py``) and of graphs is run with every way to look on; the other rows are
calls in which a way of ours has branches of its own.
"""

import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch
from test_graphs import TABLE
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tritune
from tritune.ops import record
from tritune.perf.calls import CALLS, differentiable, prepare

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:(LSTM with projections is not supported|Using padding='same')"),
]


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def logging_info():
    log, handler = logging.getLogger("tritune"), logging.NullHandler()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


def saving():
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


LOOKS = {
    "record": record,
    "log": logging_info,
    "operators": Operators,
    "functions": Functions,
    "saved tensors": saving,
    "backend": lambda: tritune.use_backend("torch"),
}


def attention(**options):
    return lambda q, k, v: tritune.attention(q, k, v, **options)


def sdpa(**options):
    return lambda q, k, v: tritune.scaled_dot_product_attention(q, k, v, **options)


def packed(kind, **options):
    torch.manual_seed(0)
    module = getattr(tritune.nn, kind)(4, 5, **options)

    def run(x):
        out, state = module(pack_padded_sequence(x, [7, 3]))
        return out.data, state

    return run


def sequence(kind, **options):
    torch.manual_seed(0)
    return getattr(tritune.nn, kind)(4, 5, **options)


def pool(**options):
    torch.manual_seed(0)
    return tritune.nn.AttentionPool(128, 4, **options)


def rows():
    """Name to a call and the shapes of its tensors."""
    q, k = (2, 4, 5, 8), (2, 4, 6, 8)
    for rank in (2, 3, 4, 5):
        shapes = [((2, 2, 4)[: rank - 2] + one[2:]) for one in (q, k, k)]
        yield f"sdpa of {rank} dimensions", sdpa(), shapes
        yield f"sdpa of {rank} dimensions, causal", sdpa(is_causal=True), shapes
        yield f"attention of {rank} dimensions", attention(), shapes
        yield f"cosine attention of {rank} dimensions", attention(score="cosine", scale=3.0), shapes
    mask = torch.arange(30).view(5, 6) % 3 > 0
    for name, options in {
        "mask": {"attn_mask": mask},
        "mask and cause": {"attn_mask": mask, "is_causal": True},
        "bias": {"bias": torch.linspace(-1, 1, 30).view(5, 6)},
        "bias of heads and cause": {"bias": torch.linspace(-1, 1, 24).view(4, 1, 6), "is_causal": True},
        "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
        "scales of heads": {"scale": torch.tensor([1.0, 2.0, 3.0, 4.0])},
        "negative scale": {"scale": -1.0},
        "lse": {"return_lse": True},
    }.items():
        yield f"attention, {name}", attention(**options), (q, k, k)
        yield f"cosine attention, {name}", attention(score="cosine", **options), (q, k, k)
    yield "sdpa, mask", sdpa(attn_mask=mask), (q, k, k)
    yield "sdpa, mask and dropout", sdpa(attn_mask=mask, dropout_p=0.3), (q, k, k)
    yield "sdpa, negative scale", sdpa(scale=-1.0, is_causal=True), (q, k, k)
    yield "sdpa, groups", sdpa(enable_gqa=True), (q, (2, 2, 6, 8), (2, 2, 6, 8))
    yield "attention, groups", attention(enable_gqa=True), (q, (2, 2, 6, 8), (2, 2, 6, 8))
    yield "attention, one query for all", attention(), (q[1:], k, k)
    long = ((2, 4, 1, 64), (2, 4, 4096, 64), (2, 4, 4096, 64))
    yield "attention, one query and many keys", attention(), long
    yield "cosine attention, one query and many keys", attention(score="cosine"), long
    yield "cosine attention, many rows", attention(score="cosine"), ((2, 4, 600, 64),) * 3
    yield "AttentionPool, large", pool(), ((4, 600, 128),)
    yield "AttentionPool, cosine", pool(score="cosine", scale="learnable"), ((4, 600, 128),)
    for kind in ("RNN", "GRU", "LSTM"):
        for options in ({}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False, "batch_first": True}):
            yield f"{kind} {options}, packed", packed(kind, **options), ((7, 2, 4),)
            yield f"{kind} {options}", sequence(kind, **options), ((7, 2, 4),)
            yield f"{kind} {options}, one sequence", sequence(kind, **options), ((7, 4),)
    yield "LSTM with projections", sequence("LSTM", proj_size=3), ((7, 2, 4),)
    for name, row in TABLE.items():
        yield name, row.ours, row.shapes


ROWS = {name: (call, shapes) for name, call, shapes in rows()}


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [] if result is None else [one for part in result for one in tensors(part)]


def seen(result):
    return [(t.detach(), t.stride(), t.requires_grad) for t in tensors(result)]


def of_row(name, trains):
    call, shapes = ROWS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=trains) for shape in shapes]

    def run():
        torch.manual_seed(1)
        out = call(*leaves)
        if not trains:
            return seen(out)
        weights = list(call.parameters()) if isinstance(call, torch.nn.Module) else []
        grads = torch.autograd.grad(sum(t.sin().sum() for t in differentiable(out)), leaves + weights)
        return [*seen(out), *seen(grads)]

    return run


def of_call(call, size, direction):
    run, _ = prepare(call, size, direction)
    return lambda: seen(run())


def assert_looking_changes_nothing(run, trains):
    with nullcontext() if trains else torch.no_grad():
        alone = run()
        for look, look_on in LOOKS.items():
            with look_on():
                watched = run()
            assert len(watched) == len(alone)
            for (value, stride, graph), (other, other_stride, other_graph) in zip(alone, watched, strict=True):
                assert (other.shape, other_stride, other_graph) == (value.shape, stride, graph), look
                torch.testing.assert_close(
                    other, value, rtol=0.0, atol=0.0, equal_nan=True, msg=lambda text, look=look: f"{look}: {text}"
                )


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", ROWS)
def test_looking_on_changes_nothing(name, trains):
    assert_looking_changes_nothing(of_row(name, trains), trains)


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("size", ["small", pytest.param("large", marks=pytest.mark.full)])
@pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])
def test_looking_on_changes_nothing_in_the_table_of_calls(call, size, direction):
    assert_looking_changes_nothing(of_call(call, size, direction), direction == "training")
