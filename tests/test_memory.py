"""What kernels touch: operands whose elements lie far apart, and the memory checker itself."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import itertools
import math
import mmap
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

triton = pytest.importorskip("triton")

import numpy as np  # noqa: E402
import test_traffic as shapes  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton.language as tl  # noqa: E402
from harness import in_turn  # noqa: E402
from memory import CHECKER, KERNELS, MemoryFault  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

import tritune  # noqa: E402
from tritune import kernels  # noqa: E402
from tritune.autotune.config import Config, Tunable  # noqa: E402
from tritune.kernels._launch import Launch, readable  # noqa: E402
from tritune.ops.rnn_operators import OP as rnn_operator  # noqa: E402
from tritune.perf import traffic  # noqa: E402

pytestmark = pytest.mark.interpret
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on


# --- operands whose elements lie far apart ---------------------------------------------------------------------------


class Case(NamedTuple):
    """A call of a public function.

    Attributes:
        shapes: sizes of its tensors by the names of its parameters.
        options: its other arguments.
        differentiated: is its gradient computed as well?
        strays: do the indices of an unpooling name places outside their own windows?
    """

    function: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any]
    differentiated: bool = True
    strays: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Small integers, whose sums are exact in any order. A mask has some of them as booleans."""
        made = {name: torch.randint(-2, 3, shape).float() for name, shape in self.shapes.items()}
        if "attn_mask" in made and self.options.get("mask") != "float":
            made["attn_mask"] = made["attn_mask"] > -2
        if "indices" in made:
            rank = int(self.function[-2])
            space = [2 * size for size in self.shapes["input"][2:]]
            pool: Callable[..., Any] = getattr(F, f"max_pool{rank}d")
            made["indices"] = pool(torch.randn(*self.shapes["input"][:2], *space), 2, return_indices=True)[1]
            if self.strays:
                made["indices"] = made["indices"].flip(-1)
        return made


def _convolutions() -> dict[str, Case]:
    shapes = {"input": (3, 8, 8, 7), "weight": (8, 8, 3, 3), "bias": (8,), "scale": (8,)}
    # Where a gradient is needed it is a convolution and a pooling.
    found = {"conv2d_max_pool2d": Case("conv2d_max_pool2d", shapes, {}, differentiated=False)}
    for rank in (1, 2, 3):
        space, window = {1: ((9,), (3,)), 2: ((5, 4), (3, 2)), 3: ((3, 3, 3), (2, 2, 1))}[rank]
        out = tuple(size - tap + 1 for size, tap in zip(space, window, strict=True))
        big = tuple(size + tap - 1 for size, tap in zip(space, window, strict=True))
        # Groups of few channels take long to interpret: one rank of them.
        for kind, groups, c in (("dense", 1, 8), ("depthwise", 4, 4))[: 2 if rank == 2 else 1]:
            shared = {"input": (3, c, *space), "weight": (c, c // groups, *window), "bias": (c,), "scale": (c,)}
            # For its gradient SiLU keeps its argument, which is one more tensor that the kernel writes.
            options = {"groups": groups, "activation": "silu" if rank == 1 else "relu"}
            name = f"conv{rank}d"
            found[f"{name}-{kind}"] = Case(name, {**shared, "residual": (3, c, *out)}, options)
            name = f"conv_transpose{rank}d"
            found[f"{name}-{kind}"] = Case(name, {**shared, "residual": (3, c, *big)}, options)
    return found


def _pools() -> dict[str, Case]:
    found = {}
    for rank in (1, 2, 3):
        x = {"input": (3, 3, *(6, 5, 8)[3 - rank :])}
        for name, options in (
            ("max_pool", {"kernel_size": 2}), ("avg_pool", {"kernel_size": 2}),
            ("adaptive_avg_pool", {"output_size": 3}), ("adaptive_max_pool", {"output_size": 3}),
            ("lp_pool", {"norm_type": 2, "kernel_size": 2}),
        ):  # fmt: skip
            if name.startswith("adaptive") and rank > 1:
                options = {"output_size": (3,) * rank}
            found[f"{name}{rank}d"] = Case(f"{name}{rank}d", x, options)
        both = {"input": (3, 3, *(3, 4, 3)[3 - rank :]), "indices": (3, 3, *(3, 4, 3)[3 - rank :])}
        found[f"max_unpool{rank}d"] = Case(f"max_unpool{rank}d", both, {"kernel_size": 2})
    found["max_unpool3d-strays"] = found["max_unpool3d"]._replace(strays=True)
    found |= {name: Case(name, {"input": (3, 3, 5, 8)}, {}) for name in ("global_avg_pool", "global_max_pool")}
    return found


def _recurrences() -> dict[str, Case]:
    found = {}
    for name, gates in (("rnn", 1), ("gru", 3), ("lstm", 4)):
        shapes = {
            "input": (3, 3, 5), "w_ih": (2, gates * 4, 5), "w_hh": (2, gates * 4, 4), "b_ih": (2, gates * 4),
            "b_hh": (2, gates * 4), "h0": (2, 3, 4),
        }  # fmt: skip
        found[name] = Case(name, {**shapes, "c0": (2, 3, 4)} if name == "lstm" else shapes, {})
    shapes = {
        "x": (3, 5), "h": (3, 4), "W_xh": (4, 5), "W_hh": (4, 4), "b_h": (4,), "W_ho": (3, 4), "b_o": (3,),
        "W_yh": (3, 3),
    }  # fmt: skip
    found["elman_step"] = Case("elman_step", shapes, {})
    return found


def _attentions() -> dict[str, Case]:
    rows = {"query": (2, 2, 5, 8), "key": (2, 2, 6, 8), "value": (2, 2, 6, 8)}
    pairs = (2, 2, 5, 6)
    return {
        "sdpa-mask": Case("scaled_dot_product_attention", {**rows, "attn_mask": pairs}, {}),
        "sdpa-bias": Case("scaled_dot_product_attention", {**rows, "attn_mask": pairs}, {"mask": "float"}),
        "attention": Case("attention", {**rows, "attn_mask": pairs, "bias": pairs}, {"return_lse": True}),
        "attention-keys": Case("attention", {**rows, "attn_mask": (2, 1, 1, 6), "bias": (1, 2, 1, 6)}, {}),
        "attention-queries": Case("attention", {**rows, "attn_mask": (2, 1, 5, 1), "bias": (1, 2, 5, 1)}, {}),
        "attention-cosine": Case("attention", {**rows, "scale": (2,)}, {"score": "cosine"}),
        "attention_pool": Case(
            "attention_pool", {**rows, "query": (2, 5, 8), "attn_mask": (2, 6), "scale": (2,)}, {}
        ),
    }  # fmt: skip


FAMILIES = {"conv": _convolutions(), "pool": _pools(), "rnn": _recurrences(), "attention": _attentions()}
CASES = {name: case for family in FAMILIES.values() for name, case in family.items()}


def far(t: Tensor, near: int | None) -> Tensor:
    """The same tensor with its elements 2**30 apart along each dimension, but 1 along ``near``, in memory of which only
    the pages that hold them exist."""
    # Multiples of 16, so that no launcher takes them for unaligned, and no two elements in one place.
    steps = [1 if near is not None and dim == near % t.dim() else 2**30 + 16 ** (2 + dim) for dim in range(t.dim())]
    size = 1 + sum((length - 1) * step for length, step in zip(t.shape, steps, strict=True))
    memory = mmap.mmap(-1, size * t.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, steps).copy_(t)


@functools.cache
def expected(name: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A case's tensors, and its results for them."""
    tensors = CASES[name].tensors()
    return tensors, results(CASES[name], tensors)


def results(case: Case, tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    """All outputs, and the gradients of all operands that have one, for output gradients which ``change`` lays out."""
    leaves = {
        name: t.detach().requires_grad_(case.differentiated and t.is_floating_point()) for name, t in tensors.items()
    }
    options = {name: value for name, value in case.options.items() if name != "mask"}
    with tritune.use_backend("triton"):
        found = getattr(tritune, case.function)(**leaves, **options)
        outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
        if not case.differentiated:
            return outputs
        generator = torch.Generator().manual_seed(5)
        seeds = [change(torch.randint(-2, 3, t.shape, generator=generator).float()) for t in outputs]
        wanted = [t for t in leaves.values() if t.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, wanted, seeds)]


@pytest.mark.parametrize("name, near", in_turn(CASES, [None, 1, -1]))
def test_elements_far_apart(name, near):
    """Offsets within a tile that wrap at 2**31 read elsewhere, or nothing that is mapped."""
    tensors, right = expected(name)
    apart = {operand: far(t, near) for operand, t in tensors.items()}
    found = results(CASES[name], apart, lambda t: far(t, near))
    for ours, wanted in zip(found, right, strict=True):
        # What torch itself adds up in the order of its memory may differ in the last bits.
        torch.testing.assert_close(ours, wanted)


def test_every_operand_of_every_public_function_is_laid_out_far():
    public = {
        name: value
        for name, value in vars(tritune).items()
        if getattr(value, "__module__", "").startswith("tritune.ops.") and value.__module__ != "tritune.ops._dispatch"
    }
    for name, function in public.items():
        if name.startswith("fractional_max_pool"):
            continue  # no kernel reads its operands
        tensors = {one.name for one in inspect.signature(function).parameters.values() if "Tensor" in one.annotation}
        covered = {operand for case in CASES.values() if case.function == name for operand in case.shapes}
        assert tensors == covered, name


def device_functions() -> dict[str, InterpretedFunction]:
    """Everything in kernels/ that Triton compiles, by its name."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{one.name}") for one in pkgutil.iter_modules(kernels.__path__)
    ]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, InterpretedFunction)
    }


FUNCTIONS = device_functions()
LAUNCHED = [name for name in FUNCTIONS if name.endswith("_kernel")]


def test_strides_are_64_bit():
    """Those that are not are the ones of attention, whose rows and scores pass ``readable(tile=...)``."""
    narrow = {
        kernel
        for kernel in LAUNCHED
        for name, parameter in inspect.signature(FUNCTIONS[kernel].fn).parameters.items()
        if name.startswith("stride_") and "int64" not in str(parameter.annotation)
    }
    files = {name: FUNCTIONS[name].fn.__module__.removeprefix("tritune.kernels.") for name in LAUNCHED}
    assert narrow == {name for name, file in files.items() if file.startswith("attention_")}


def test_one_function_decides_what_is_copied():
    copies = {
        (path.name, node.lineno)
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("contiguous", "clone")
    }
    assert {name for name, _ in copies} == {"_launch.py"}


class TestReadable:
    """What is read in place, and how a copy is laid out."""

    def test_in_place(self):
        for t in (torch.ones(3, 4, 5, 6), far(torch.ones(2, 2, 3, 3), None)):
            assert readable(t) is t
        rows = torch.ones(2, 3, 4, 8).transpose(1, 2)
        assert readable(rows, unit=3, tile=(2,)) is rows
        single = far(torch.ones(2, 2, 1, 1), None)
        assert readable(single, unit=3, tile=(2, 3)) is single, "the stride of a dimension of size 1 says nothing"

    @pytest.mark.parametrize("unit", [1, 3])
    def test_neighbours_of_a_copy(self, unit):
        t = torch.randn(2, 8, 3, 8)[:, ::2, :, ::2]
        copy = readable(t, unit=unit)
        assert copy.stride(unit) == 1
        assert torch.equal(copy, t)

    def test_what_is_repeated_takes_no_memory(self):
        t = far(torch.randn(1, 3, 5, 6), None).expand(7, 3, 5, 6)
        copy = readable(t, tile=(2, 3))
        assert copy.untyped_storage().nbytes() == 3 * 5 * 6 * 4
        assert torch.equal(copy, t)

    def test_offsets_within_the_largest_tile(self):
        """A tile has rows and columns, of any kernel's configs."""
        sides = [
            sum(value for name, value in config.items() if name.startswith("BLOCK"))
            for name, one in kernels.registered().items() if name.startswith("attention")
            for config in one.configs
        ]  # fmt: skip
        assert max(sides) * kernels._launch.STEP <= 2**31

    def test_rows_that_no_copy_brings_closer(self):
        query, key = torch.ones(1, 1, 2, 4), torch.ones(1).expand(1, 1, 2**22, 4)
        mask = torch.ones(1, dtype=torch.bool).expand(2, 2**22)
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match="attn_mask"):
            tritune.scaled_dot_product_attention(query, key, key, mask)


# --- the checker -----------------------------------------------------------------------------------------------------


@triton.jit
def _planted(x_ptr, y_ptr, N, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """Copies N elements, BLOCK in a program; but for FAULT."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < N
    if FAULT == "reads outside":
        x = tl.load(x_ptr + i)
    elif FAULT == "reads before":
        x = tl.load(x_ptr + i - 1, mask=mask)
    elif FAULT == "reads gaps":
        x = tl.load(x_ptr + i // 2, mask=mask)
    elif FAULT == "reads far away":
        x = tl.load(x_ptr + i.to(tl.int64) * 2**42, mask=mask)
    elif FAULT == "reads results":
        x = tl.load(y_ptr + (i + BLOCK) % N, mask=mask)
    else:
        x = tl.load(x_ptr + 2 * i, mask=mask)
    if FAULT == "writes outside":
        tl.store(y_ptr + i, x)
    elif FAULT == "writes one element":
        tl.store(y_ptr + i // BLOCK + tl.zeros_like(i), x, mask=mask)
    elif FAULT == "all write there":
        tl.store(y_ptr + tl.program_id(0) * 0, N)
    elif FAULT == "adds":
        tl.atomic_add(y_ptr + i, x, mask=mask)
    else:
        tl.store(y_ptr + i, x, mask=mask)
    if FAULT == "writes again":
        tl.store(y_ptr + i, x, mask=mask)
    if FAULT == "reads back":
        tl.store(y_ptr + i, tl.load(y_ptr + i, mask=mask), mask=mask)


def run_planted(fault: str) -> None:
    """x has a gap behind each element; a multiple of it lies in storage behind both tensors."""
    x, y = torch.arange(60.0)[:40:2], torch.zeros(30)[:20]
    Launch(_planted, 3, {"x_ptr": x, "y_ptr": y, "N": 20}, {"FAULT": fault, "BLOCK": 8}, 1, 1).run()
    assert torch.equal(x, y)


@pytest.mark.compat
@pytest.mark.parametrize(
    "fault, named",
    [
        ("reads outside", "reads x_ptr outside the view"),
        ("reads before", "reads x_ptr outside its storage"),
        ("reads gaps", "reads x_ptr outside the view"),
        ("reads far away", "reads far from every argument|reads x_ptr outside its storage"),
        ("reads results", "reads an element of y_ptr that program|writes an element of y_ptr that another"),
        ("writes outside", "writes y_ptr outside the view"),
        ("writes one element", "twice in one store"),
        ("all write there", "program 1 writes an element of y_ptr that program 0 wrote"),
        ("writes again", "program 0 writes an element of y_ptr that program 0 wrote"),
        ("reads back", "program 0 reads an element of y_ptr that program 0 wrote"),
        ("adds", "uses an atomic operation"),
    ],
)
def test_planted_faults(fault, named):
    with pytest.raises(MemoryFault, match=named):
        run_planted(fault)


@pytest.mark.compat
def test_nothing_is_found_where_nothing_is_wrong():
    run_planted("")


def test_an_order_that_decides_is_found():
    """Were the notes about elements wrong, the results would still tell."""
    with mock.patch.object(CHECKER, "note"), mock.patch.object(CHECKER, "orders", True):
        x, y = torch.arange(60.0)[:40:2], torch.zeros(30)[:20]
        args = {"x_ptr": x, "y_ptr": y, "N": 20}
        launch = Launch(_planted, 3, args, {"FAULT": "reads results", "BLOCK": 8}, 1, 1)
        y.copy_(x + 1)
        with pytest.raises(MemoryFault, match="depends on the order"):
            launch.run()


# --- every kernel ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A registered kernel, one of the shapes whose traffic is counted, and a config."""

    tunable: Tunable
    problem: Any
    config: Config

    def run(self) -> None:
        traffic.measure(self.tunable, self.problem, self.config, shapes.values(self.tunable.name, self.problem))


def plans_of(kernel: str, problem: Any) -> list[Plan]:
    configs = sorted(shapes.configs(kernel, problem), key=str)
    return [Plan(shapes.TUNABLES[kernel], problem, config) for config in configs]


@functools.cache
def launching() -> dict[str, Plan]:
    """The smallest plan that launches several programs of a kernel, by its name."""
    found: dict[str, tuple[int, Plan]] = {}
    for tunable, case in shapes.CASES:
        for plan in plans_of(tunable, shapes.problems_of(tunable)[case]):
            for launch in plan.tunable.launches(plan.problem, plan.config):
                name = launch.kernel.__name__
                if 1 < launch.grid < found.get(name, (math.inf,))[0]:
                    found[name] = launch.grid, plan
    return {name: plan for name, (_, plan) in found.items()}


@pytest.mark.parametrize("kernel", LAUNCHED)
def test_the_order_of_programs_does_not_matter(kernel):
    """A kernel to come is at fault until a shape of test_traffic.py launches it."""
    with mock.patch.object(CHECKER, "orders", True):
        before = CHECKER.programs[kernel]
        launching()[kernel].run()
        assert CHECKER.programs[kernel] - before > 1


# What no case reaches: channels last, reductions that are split, and tiles that are whole in one dimension and end in
# the middle of another.
UNEVEN: dict[str, list[tuple[str, Any]]] = {
    "conv": [
        ("conv", shapes.dense((1, 64, 6, 6), (33, 64, 3, 3), pad=1)),
        ("conv_transpose", shapes.dense((1, 33, 6, 6), (64, 33, 3, 3), pad=1)),
        ("conv_weight_grad", shapes.dense((1, 64, 3, 3), (5, 64, 3, 3), pad=1)),
        ("conv_direct", shapes.dense((1, 5, 5, 5), (5, 1, 3, 3), groups=5)),
        ("conv_direct", shapes.dense((1, 2, 5, 5), (2, 1, 3, 3), groups=2, last=False)),
        ("conv_direct_transpose", shapes.dense((1, 5, 5, 5), (5, 1, 3, 3), stride=2, groups=5)),
        ("conv_direct_weight_grad", shapes.dense((1, 5, 5, 5), (5, 1, 3, 3), groups=5)),
    ],
    "pool": [
        ("pool", shapes.pooling((1, 5, 6, 6), 2, 2, index=8)),
        ("pool_backward", shapes.pooling((1, 5, 66), 33, 33, reduce="norm2")),
        ("pool_backward", shapes.pooling((1, 2, 6, 15), 3, 3, reduce="norm2", last=False)),
        ("global_pool", shapes.pooling((1, 5, 16, 16), out=(1, 1), index=4)),
    ],
    "attention": [
        ("attention", kernels.attention.AttentionProblem(1, 1, 5, 128, 5, 5, 1, torch.float16, "16", saves=True)),
    ],
}  # fmt: skip


def differentiate_cells() -> None:
    """The LSTM's operator also returns the cells of all steps, which no public function does."""
    leaves = [t.requires_grad_() for t in CASES["lstm"].tensors().values()]
    cells = rnn_operator(*leaves, "lstm", False, "ieee", True, "triton")[3]
    torch.autograd.grad(cells.sum(), leaves)


def runs(family: str) -> Iterator[Callable[[], object]]:
    """Small ones of a family's kernels; of all kernels for what families share, whose files' names begin with "_".
    The cases come last, because other tests run them, too."""
    for one in [family] if family else FAMILIES:
        for name, problem in UNEVEN.get(one, []):
            yield from (plan.run for plan in plans_of(name, problem))
        if one == "rnn":
            yield differentiate_cells
        for case in FAMILIES.get(one, {}).values():
            yield functools.partial(results, case, case.tensors())


@functools.cache
def sources() -> list[tuple[InterpretedFunction, str, range]]:
    """The device functions, each with its file's name and its lines there."""
    found = []
    for function in FUNCTIONS.values():
        lines, first = inspect.getsourcelines(function.fn)
        found.append((function, Path(inspect.getfile(function.fn)).name, range(first, first + len(lines))))
    return found


@contextlib.contextmanager
def without_mask(site: tuple[str, int]) -> Iterator[None]:
    """The loads and stores at a place in kernels/ without their mask."""
    file, line = site
    (function,) = (one for one, name, lines in sources() if name == file and line in lines)
    rewriter, usual = function.rewriter, function.rewriter.ast_transformer

    class Transformer:
        def visit(self, tree: ast.AST) -> ast.AST:
            for node in masked(tree):
                if node.lineno + rewriter.def_file_lineno - 1 == line:
                    node.args = node.args[: BEFORE_MASK[node.func.attr]]
                    node.keywords = [one for one in node.keywords if one.arg not in ("mask", "other")]
            return usual.visit(tree)

    with (
        mock.patch.dict(InterpretedFunction.rewritten_fn),
        mock.patch.object(rewriter, "ast_transformer", Transformer()),
    ):
        InterpretedFunction.rewritten_fn.pop(function.fn, None)
        yield


BEFORE_MASK = {"load": 1, "store": 2}  # how many arguments come before the mask


def masked(tree: ast.AST) -> Iterator[Any]:
    """The calls of ``tl.load`` and ``tl.store`` that have a mask."""
    for node in ast.walk(tree):
        before = BEFORE_MASK.get(getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else None
        if before and (len(node.args) > before or any(one.arg == "mask" for one in node.keywords)):
            yield node


@functools.cache
def masks() -> frozenset[tuple[str, int]]:
    """File and line of every load and store that has one."""
    found = [(path.name, node.lineno) for path in KERNELS.glob("*.py") for node in masked(ast.parse(path.read_text()))]
    assert len(found) == len(set(found)), "two masks in one line could hide each other"
    return frozenset(found)


def family_of(file: str) -> str:
    """The first word of a file's name: ``"conv"`` of ``conv_direct.py``, and nothing of ``_math.py``."""
    return Path(file).stem.split("_")[0]


def needed(run: Callable[[], object]) -> set[tuple[str, int]]:
    """Where masks keep a run from a fault. What lies outside a descriptor's tensor has no mask in the source."""
    with mock.patch.object(CHECKER, "idle", set()):
        run()
        return CHECKER.idle & masks()


@pytest.mark.parametrize("family", sorted({family_of(file) for file, _ in masks()}))
def test_each_mask_that_is_missing(family):
    """Every mask of every kernel, taken out of the source. One of a kernel to come is at fault until a case or a
    problem of UNEVEN needs it."""
    left = {site for site in masks() if family_of(site[0]) == family}
    with np.errstate(all="ignore"):  # what a mask stops may be 0 / 0
        for run in itertools.takewhile(lambda _: left, runs(family)):
            for site in sorted(left & needed(run)):
                with without_mask(site), pytest.raises(MemoryFault):
                    run()
                left.remove(site)
    assert not left, "nothing notices that these masks are missing"
