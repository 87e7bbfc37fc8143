"""The bytes that each kernel moves, counted in the interpreter, against the formula at its head."""

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from tritune.autotune.config import Config, Tunable  # noqa: E402
from tritune.autotune.device import named  # noqa: E402
from tritune.autotune.resolve import ranked  # noqa: E402
from tritune.kernels import attention, conv, conv_pool, pool, registered, rnn  # noqa: E402
from tritune.kernels._launch import Launch  # noqa: E402
from tritune.ops.pool_operators import kernel_window  # noqa: E402
from tritune.perf import traffic  # noqa: E402

pytestmark = pytest.mark.interpret
TUNABLES = registered()
SPLITS = ("SPLIT_K", "SPLIT_M", "SPLIT")


def dense(x, w, stride=1, pad=0, dil=1, groups=1, dtype=torch.float16, last=True):
    sizes = zip(x[2:], w[2:], strict=True)
    output = tuple((size + 2 * pad - dil * (tap - 1) - 1) // stride + 1 for size, tap in sizes)
    rank = len(output)
    geometry = conv.Geometry.of((stride,) * rank, (pad,) * rank, (dil,) * rank, groups)
    return conv.problem_of(x, w, output, geometry, dtype, "ieee", last)


def pooling(x, window=0, stride=0, pad=0, out=(), *, reduce="max", dtype=torch.float16, index=1, last=True):
    """Windows of one size, or, with ``out``, adaptive ones."""
    rank = len(x) - 2
    windows = tuple((value,) * rank if window else () for value in (window, stride, pad, 1))
    out = out or tuple((size + 2 * pad - window) // stride + 1 for size in x[2:])
    image, index = torch.empty(x, dtype=dtype, device="meta"), index if reduce in ("max", "last") else 0
    taken = kernel_window(x[2:], out, windows)
    return pool.problem_of(image, out, taken, reduce, index_bytes=index, layout="nhwc" if last else "nchw")


def pooled(problem, window, stride, pad=0):
    output = [(size + 2 * pad - window) // stride + 1 for size in problem.output[1:]]
    return conv_pool.conv_pool_problem(problem, conv_pool.PoolWindow(window, window, stride, stride, pad, pad), output)


CONVOLUTIONS = {
    "3x3": dense((2, 32, 10, 10), (48, 32, 3, 3)),
    "3x3-padded": dense((2, 32, 10, 10), (48, 32, 3, 3), pad=1),
    "1x1": dense((2, 64, 8, 8), (32, 64, 1, 1)),
    "strided": dense((2, 32, 11, 11), (32, 32, 3, 3), stride=2),
    "1x1-strided": dense((2, 32, 9, 9), (32, 32, 1, 1), stride=2),
    "groups": dense((2, 32, 10, 10), (48, 8, 3, 3), groups=4),
    "dilated": dense((1, 16, 12, 12), (16, 16, 3, 3), dil=2),
    "stem": dense((1, 4, 20, 20), (24, 4, 7, 7), stride=2),
    "fp32": dense((1, 24, 9, 9), (20, 24, 3, 3), dtype=torch.float32),
    "nchw": dense((1, 16, 10, 10), (16, 16, 3, 3), last=False),
    "1d": dense((2, 32, 40), (48, 32, 3)),
    "3d": dense((1, 32, 4, 7, 7), (16, 32, 2, 3, 3)),
    "wide": dense((1, 32, 4, 66), (64, 32, 3, 3)),
    "3d-strided": dense((1, 16, 5, 7, 7), (16, 16, 3, 3, 3), stride=2),
}
DIRECT = {
    "3x3": dense((2, 24, 10, 10), (24, 1, 3, 3), groups=24),
    "7x7-padded": dense((1, 32, 12, 12), (32, 1, 7, 7), pad=3, groups=32),
    "strided": dense((2, 16, 11, 11), (16, 1, 3, 3), stride=2, groups=16),
    "multiplier": dense((1, 8, 9, 9), (16, 1, 3, 3), groups=8),
    "nchw-fp32": dense((1, 3, 12, 12), (3, 1, 3, 3), groups=3, dtype=torch.float32, last=False),
    "nchw-runs": dense((1, 4, 10, 16), (4, 1, 3, 3), groups=4, last=False),
    "1d-causal-padded": dense((1, 16, 40), (16, 1, 4), pad=3, groups=16),
    "1d-causal-padded-nchw": dense((1, 4, 64), (4, 1, 4), pad=3, groups=4, last=False),
    "3d": dense((1, 8, 4, 6, 6), (8, 1, 2, 3, 3), groups=8),
}
POOLED_CONVOLUTIONS = {
    "side-by-side": pooled(dense((2, 32, 10, 10), (48, 32, 3, 3)), 2, 2),
    "overlapping": pooled(dense((2, 32, 16, 18), (16, 32, 3, 3)), 3, 2, 1),
    "overlapping-by-two": pooled(dense((1, 16, 12, 12), (16, 16, 1, 1)), 3, 1),
    "stem": pooled(dense((1, 3, 40, 40), (24, 3, 7, 7), stride=2), 3, 2, 1),
    "stem-padded": pooled(dense((1, 3, 40, 40), (24, 3, 7, 7), stride=2, pad=3), 3, 2, 1),
    "groups": pooled(dense((1, 32, 10, 10), (32, 16, 3, 3), groups=2), 2, 2),
    "fp32": pooled(dense((1, 24, 9, 9), (20, 24, 3, 3), dtype=torch.float32), 2, 3),
}
SMALL_GROUPS = {
    "four": dense((1, 32, 8, 8), (32, 4, 3, 3), groups=8),
    "two-by-eight": dense((1, 8, 8, 8), (32, 2, 3, 3), groups=4),
}
POOLS = {
    "2x2": pooling((2, 24, 12, 12), 2, 2),
    "3x3-padded": pooling((1, 16, 14, 14), 3, 2, 1),
    "overlapping": pooling((1, 8, 10, 10), 3, 1),
    "nchw-fp32": pooling((1, 5, 12, 12), 2, 2, dtype=torch.float32, last=False),
    "nchw-padded": pooling((1, 5, 16, 16), 3, 2, 1, last=False),
    "int64-indices": pooling((1, 16, 12, 12), 2, 2, index=8),
    "mean": pooling((1, 16, 12, 12), 2, 2, reduce="mean"),
    "mean-nchw": pooling((1, 4, 9, 15), 3, 3, reduce="mean", last=False),
    "norm": pooling((1, 16, 12, 12), 2, 2, reduce="norm2"),
    "norm-nchw-fp32": pooling((2, 3, 8, 16), 2, 2, reduce="norm2", dtype=torch.float32, last=False),
    "1d-nchw": pooling((2, 3, 992), 4, 4, last=False),
    "rows-in-parts-padded": pooling((1, 2, 2, 640), 3, 2, 1, last=False),
    "overlapping-rows-in-parts-padded": pooling((1, 1, 3, 320), 5, 1, 2, reduce="mean", last=False),
    "3d": pooling((1, 16, 4, 6, 6), 2, 2),
    "3d-mean-nchw": pooling((1, 3, 4, 6, 16), 2, 2, reduce="mean", last=False),
    "adaptive": pooling((1, 16, 12, 8), out=(4, 2)),
    "adaptive-nchw": pooling((1, 3, 12, 16), out=(4, 4), last=False),
    "adaptive-uneven": pooling((1, 16, 10, 9), out=(4, 4), reduce="mean"),
    "adaptive-uneven-nchw": pooling((1, 3, 10, 18), out=(4, 7), last=False),
    "adaptive-uneven-nchw-many-rows": pooling((2, 9, 12, 18), out=(4, 7), last=False),
    "adaptive-upwards-mean": pooling((1, 16, 3, 4), out=(6, 8), reduce="mean"),
}
UNPOOLS = {
    "2x2": pooling((2, 24, 12, 12), 2, 2, reduce="last", index=8),
    "2x2-nchw": pooling((2, 4, 12, 16), 2, 2, reduce="last", index=8, last=False),
    "3x3-padded": pooling((1, 16, 14, 14), 3, 2, 1, reduce="last", index=8),
    "3d": pooling((1, 16, 4, 6, 6), 2, 2, reduce="last", index=8),
}
PLANES = {
    "mean": pooling((2, 64, 16, 16), out=(1, 1), reduce="mean"),
    "mean-nchw": pooling((2, 24, 32, 32), out=(1, 1), reduce="mean", last=False),
    "max": pooling((1, 64, 16, 16), out=(1, 1), index=4),
    "max-nchw-fp32": pooling((2, 8, 40, 32), out=(1, 1), index=2, dtype=torch.float32, last=False),
    "values-3d": pooling((1, 32, 4, 8, 8), out=(1, 1, 1), index=0),
    "norm-1d-nchw": pooling((2, 8, 1024), 1024, 1, reduce="norm2", last=False),
    "many-planes": pooling((3, 100, 16, 16), out=(1, 1), index=2),
}
EPILOGUES = {
    "all": conv.EpilogueProblem(300, 48, torch.float16, True, True, True),
    "bias-only": conv.EpilogueProblem(300, 48, torch.float32, False, False, True),
    "activation-only": conv.EpilogueProblem(130, 20, torch.float16, True, True, False),
}


SEQUENCES = {
    **{cell: rnn.RnnProblem(cell, 6, 9, 24, 1, torch.float16, "16", True) for cell in ("tanh", "relu", "gru", "lstm")},
    "both-directions": rnn.RnnProblem("lstm", 5, 20, 16, 2, torch.float32, "ieee", True),
    "no-backward": rnn.RnnProblem("lstm", 8, 4, 20, 1, torch.float16, "16", False),
}


def attended(m, n, dtype=torch.float16, *, heads=2, group=1, **options):
    precision = "ieee" if dtype is torch.float32 else "16"
    return attention.AttentionProblem(2, heads, m, n, 16, 24, group, dtype, precision, saves=True, **options)


ATTENTIONS = {
    "plain": attended(40, 50),
    "fp32": attended(33, 20, torch.float32),
    "causal": attended(48, 40, shift=0),
    "bottom-right": attended(40, 70, shift=30),
    "groups": attended(30, 33, heads=4, group=2),
    "masked": attended(30, 33, masked=True),
    "bounded": attended(30, 33, bounded=True),
}
BIASED = {
    "pairs": attended(30, 33, bias=torch.float16, bias_dims="mn"),
    "all": attended(30, 33, bias=torch.float32, bias_dims="bhmn"),
    "keys-causal": attended(30, 33, bias=torch.float16, bias_dims="bn", shift=0, masked=True),
}
ROWS = {
    "fp16": attention.NormalizeProblem(200, 24, torch.float16),
    "fp32": attention.NormalizeProblem(70, 64, torch.float32),
}


def problems_of(kernel):
    if kernel.startswith("attention_normalize"):
        return ROWS
    if kernel.startswith("attention"):
        # The gradient of a bias walks all pairs; the other kernels read one too.
        return BIASED if kernel == "attention_bias_grad" else {**ATTENTIONS, **BIASED}
    if kernel.startswith("rnn"):
        return SEQUENCES
    if kernel == "conv_epilogue_grad":
        return EPILOGUES
    if kernel == "conv_max_pool":
        return POOLED_CONVOLUTIONS
    if kernel in ("global_pool", "max_unpool"):
        return PLANES if kernel == "global_pool" else UNPOOLS
    if "pool" in kernel:  # what is gathered is what a maximum has won
        return {name: p for name, p in POOLS.items() if kernel != "pool_gather" or p.reduce == "max"}
    if kernel == "conv_direct_weight_grad":
        return DIRECT
    return {**DIRECT, **SMALL_GROUPS} if "direct" in kernel else CONVOLUTIONS


CASES = [(kernel, name) for kernel in TUNABLES for name in problems_of(kernel)]


def configs(kernel, problem):
    """The best by the model, of those that split the reduction in two or more, of those that copy boxes, of those that
    pool single windows, and of those that walk rows or not."""
    order = [config for config, _ in ranked(TUNABLES[kernel], problem, named("sm_90"))]
    split = [one for one in order if max(dict(one).get(name, 1) for name in SPLITS) > 1]
    boxes = [one for one in order if "TMA" in one]
    single = [one for one in order if dict(one).get("TALL") == 1]
    rows = [one for one in order if ("BLOCK_W" in one) != ("BLOCK_W" in order[0])]
    return {order[0], *split[:1], *boxes[:1], *rows[:1], *single[:1]}


def places(problem):
    """Those of a pooling's first taps: each in its own window."""
    taps = [torch.arange(n) * step - pad for n, step, pad in zip(problem.out, *problem.window[1:3], strict=True)]
    d, h, w = (tap.clamp(min=0).view(shape) for tap, shape in zip(taps, ((-1, 1, 1), (-1, 1), (-1,)), strict=True))
    flat = (d * problem.space[1] + h) * problem.space[2] + w
    return flat.view(1, 1, *problem.out[3 - problem.rank :])


def taps(problem):
    """The first tap of each window that lies in the image; a tap outside is no winner, and read from elsewhere."""
    sides = zip(problem.out, *problem.window[1:3], strict=True)
    firsts = [(pad - torch.arange(n) * step).clamp(min=0) for n, step, pad in sides]
    t, r, s = (first.view(shape) for first, shape in zip(firsts, ((-1, 1, 1), (-1, 1), (-1,)), strict=True))
    _, rows, columns = problem.window.kernel
    return ((t * rows + r) * columns + s).view(1, 1, *problem.out[3 - problem.rank :])


def values(kernel, problem):
    """Arguments that may not be random numbers, by name."""
    if kernel == "max_unpool" or (kernel == "pool_gather" and problem.index_bytes == 8):
        return {"index_ptr": places(problem)}
    return {"index_ptr": taps(problem)} if kernel == "pool_gather" else {}


@pytest.mark.parametrize("kernel, name", CASES)
def test_no_more_than_the_formula(kernel, name):
    problem = problems_of(kernel)[name]
    for config in configs(kernel, problem):
        counted = traffic.measure(TUNABLES[kernel], problem, config, values(kernel, problem))
        assert traffic.fault(TUNABLES[kernel], problem, config, counted) == "", f"{config}: {counted}"
        # A formula that promises too little would prove nothing; what padding or a smaller window masks is not loaded.
        expected = TUNABLES[kernel].moved_bytes(problem, config)
        is_exact = not {"padded", "uneven"} & set(name.split("-")) and kernel != "pool_backward"
        assert counted.total >= (0.9 if is_exact else 0.4) * expected, f"{config}: {counted}, formula {expected}"


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("kernel", ["pool", "pool_backward"])
def test_each_element_is_written_once(kernel, name):
    """Rows that are cut into parts overlap in what they read, not in what they write."""
    problem = POOLS[name]
    x, y = problem.elements()
    e = problem.dtype.itemsize
    written = y * (e + problem.index_bytes) if kernel == "pool" else x * e
    for config in configs(kernel, problem):
        assert traffic.measure(TUNABLES[kernel], problem, config).stored == written, config


# --- planted ---------------------------------------------------------------------------------------------------------


@triton.jit
def _copy(x_ptr, y_ptr, M, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    """Pools windows of one pixel, reading each TIMES times and writing TIMES copies of the result."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < M
    for copy in range(TIMES):
        value = tl.load(x_ptr + offsets, mask=mask)
        tl.store(y_ptr + copy * M + offsets, value, mask=mask)


def planted(times):
    def launches(problem, config):
        elements = problem.elements()[0]
        x = torch.empty(elements, dtype=problem.dtype, device="meta")
        y = torch.empty(times * elements, dtype=problem.dtype, device="meta")
        grid = -(-x.numel() // config.BLOCK)
        args = {"x_ptr": x, "y_ptr": y, "M": x.numel()}
        return [Launch(_copy, grid, args, {"TIMES": times, "BLOCK": config.BLOCK}, 4, 1)]

    return Tunable("pool", (), None, None, None, launches, pool.FORWARD.moved_bytes)


@pytest.mark.compat
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("times, named_as", [(1, ""), (2, "traffic: 2.00 times the formula of pool")])
def test_doubled_traffic_is_named(times, named_as, dtype):
    problem = pooling((1, 3, 11, 13), 1, 1, dtype=dtype, index=0)
    config = Config(BLOCK=64, num_warps=4, num_stages=1)
    tunable = planted(times)
    counted = traffic.measure(tunable, problem, config)
    assert counted.loaded == counted.stored == times * 3 * 11 * 13 * dtype.itemsize
    assert traffic.fault(tunable, problem, config, counted) == named_as
