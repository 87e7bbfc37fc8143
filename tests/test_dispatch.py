"""The choice of backend: where it holds, what it refuses, and how it explains itself."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import test_conv
import test_extremes
import test_pool
import torch
import torch.nn.functional as F
from harness import Case, lay_out, lp_pool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tritune
from tritune.autotune.variables import WORDS
from tritune.ops import _dispatch, conv_operators, conv_pool_operators, rnn_operators
from tritune.ops import _layout as ops_layout
from tritune.perf.calls import CALLS, prepare


@pytest.mark.torch
class TestUseBackend:
    def test_nests_and_restores(self):
        with tritune.use_backend("torch"):
            with tritune.use_backend("triton"):
                assert _dispatch.current_backend() == "triton"
            assert _dispatch.current_backend() == "torch"
        assert _dispatch.current_backend() == "auto"

    def test_restores_after_an_exception(self):
        with pytest.raises(ZeroDivisionError), tritune.use_backend("torch"):
            1 / 0  # noqa: B018
        assert _dispatch.current_backend() == "auto"

    def test_decorates_recursive_functions(self):
        @tritune.use_backend("torch")
        def depth(n: int) -> str:
            return depth(n - 1) if n else _dispatch.current_backend()

        assert depth(3) == "torch"
        assert _dispatch.current_backend() == "auto"

    def test_is_per_thread(self):
        with tritune.use_backend("torch"), ThreadPoolExecutor(1) as pool:
            assert pool.submit(_dispatch.current_backend).result() == "auto"

    def test_one_object_in_two_threads(self):
        shared = tritune.use_backend("torch")
        meet = threading.Barrier(2, timeout=60)

        def use(name: str) -> list[str]:
            with tritune.use_backend(name):
                meet.wait()
                with shared:
                    meet.wait()  # both are inside
                    within = _dispatch.current_backend()
                    meet.wait()
                return [within, _dispatch.current_backend()]

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(use, ("auto", "triton")))
        assert results == [["torch", "auto"], ["torch", "triton"]]
        assert not shared.previous

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="auto, triton, torch"):
            tritune.use_backend("cuda")

    def test_environment_sets_the_default(self, tmp_path):
        code = "from tritune.ops._dispatch import current_backend; print(current_backend())"
        environment = {"TRITUNE_BACKEND": "torch", **_clean_environment()}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "torch", done.stderr

    @pytest.mark.parametrize("name", WORDS)
    def test_a_wrong_word_in_the_environment_is_one_warning(self, name):
        code = "from tritune.ops._dispatch import current_backend; print(current_backend())"
        environment = {name: "nonsense", **_clean_environment()}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "auto", done.stderr
        message = f"RuntimeWarning: {name} must be one of {', '.join(WORDS[name])}, got 'nonsense': it counts as unset"
        assert done.stderr.count(message) == 1


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TRITUNE_")}


FILLED_LATER = (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format)


@pytest.mark.torch
class TestRefusals:
    def test_cpu_tensors_are_refused_by_name(self):
        x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
        with tritune.use_backend("triton"):
            with pytest.raises(tritune.UnsupportedError, match=r"conv2d: .*CPU"):
                tritune.conv2d(x, w)
            with pytest.raises(NotImplementedError, match=r"max_pool2d: .*CPU"):
                tritune.max_pool2d(x, 2)

    @pytest.mark.parametrize("name", test_extremes.CALLS)
    def test_an_error_of_a_mode_or_a_hook_is_no_rejection(self, name):
        """The call is not made once more without it."""
        call = test_extremes.CALLS[name]
        tensors = {name: t.requires_grad_() for name, t in call.inputs(torch.float32).items()}
        seen: list[str] = []

        class PlantedError(RuntimeError):
            pass

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(str(func))
                raise PlantedError

        def pack(tensor):
            seen.append("pack")
            raise PlantedError

        with Mode(), pytest.raises(PlantedError):
            call.function(**tensors, **call.kwargs)
        assert len(seen) == 1
        with contextlib.suppress(PlantedError), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call.function(**tensors, **call.kwargs)
        assert len(seen) <= 2, "a mean saves nothing"

    # torch's own RNN and GRU compute each step in place.
    @pytest.mark.parametrize("name", [name for name in test_extremes.CALLS if name[:3] not in ("rnn", "gru")])
    def test_what_a_mode_keeps_is_not_written_over(self, name):
        """Selective activation checkpointing keeps results, and raises if they change."""
        call = test_extremes.CALLS[name]
        kept: list[tuple[Any, Tensor, Tensor]] = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                if isinstance(result, Tensor) and func not in FILLED_LATER:
                    kept.append((func, result, result.clone()))
                return result

        with Mode():
            call.function(**call.inputs(torch.float32), **call.kwargs)
        assert kept
        for func, result, at_once in kept:
            torch.testing.assert_close(result, at_once, rtol=0, atol=0, equal_nan=True, msg=str(func))

    def test_functions_that_do_not_run_when_they_are_called(self):
        def generator():
            yield tritune.ops.current_backend()

        async def coroutine():
            pass

        async def both():
            yield

        for function in (generator, coroutine, both):
            with pytest.raises(TypeError, match=f"use_backend cannot decorate .*{function.__name__}"):
                tritune.use_backend("torch")(function)

    def test_bad_input_is_rejected_before_the_backend_is_asked(self):
        with tritune.use_backend("triton"), pytest.raises(RuntimeError, match="negative padding") as caught:
            tritune.conv2d(torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3), padding=-1)
        assert not isinstance(caught.value, tritune.UnsupportedError)


@pytest.mark.interpret
@pytest.mark.gpu
class TestKernelsOnly:
    def test_dtype_is_refused_by_name(self, device):
        x = torch.randn(1, 2, 4, 4, dtype=torch.float64, device=device)
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match="float64"):
            tritune.max_pool2d(x, 2)

    def test_integers_run_on_torch_under_auto(self, device):
        x = torch.arange(16, device=device).view(1, 1, 4, 4)
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match="int64"):
            tritune.max_pool2d(x, 2)
        if device == "cpu":
            assert tritune.max_pool2d(x, 2).flatten().tolist() == [5, 7, 13, 15]

    def test_unknown_subclasses_go_to_torch(self, device):
        class Traced(torch.Tensor):
            functions: list = []

            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                cls.functions.append(func)
                return super().__torch_function__(func, types, args, kwargs or {})

        x = torch.randn(1, 2, 4, 4, device=device).as_subclass(Traced)
        y = tritune.max_pool2d(x, 2)
        assert isinstance(y, Traced) and tritune.max_pool2d in Traced.functions
        with tritune.use_backend("triton"):
            with pytest.raises(tritune.UnsupportedError, match="Traced"):
                tritune.max_pool2d(x, 2)
            with pytest.raises(tritune.UnsupportedError, match="Traced"):
                tritune.conv2d(
                    torch.randn(1, 2, 4, 4, device=device), torch.randn(2, 2, 3, 3).as_subclass(Traced).to(device)
                )

    def test_backward_runs_where_forward_ran(self, device, monkeypatch):
        """Also after the block, and in another thread, where use_backend was never called."""
        from tritune.kernels import conv, pool

        ran = []
        for module, name in ((conv, "run_transpose"), (conv, "run_weight_grad"), (pool, "run_backward")):
            original = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, f=original, n=name, **k: ran.append(n) or f(*a, **k))
        x = torch.randn(1, 2, 6, 6, device=device, requires_grad=True)
        w = torch.randn(2, 2, 3, 3, device=device, requires_grad=True)
        with tritune.use_backend("triton"):
            y = tritune.max_pool2d(tritune.conv2d(x, w), 2)
        thread = threading.Thread(target=lambda: y.sum().backward())
        thread.start()
        thread.join()
        assert sorted(ran) == ["run_backward", "run_transpose", "run_weight_grad"]

    def test_conjugate_and_negative_views_are_resolved(self, device):
        z = torch.randn(1, 2, 4, 4, dtype=torch.complex64, device=device)
        x = z.conj().imag  # a view whose storage holds the negated values
        assert x.is_neg()
        with tritune.use_backend("triton"):
            assert torch.equal(tritune.max_pool2d(x, 2), F.max_pool2d(x.resolve_neg(), 2))

    def test_misaligned_storage(self, device):
        flat = torch.randn(2 * 8 * 6 * 6 + 1, device=device, dtype=torch.float16)
        x = flat[1:].view(2, 6, 6, 8).permute(0, 3, 1, 2)
        assert x.data_ptr() % 16
        w = torch.randn(16, 8, 3, 3, device=device, dtype=torch.float16)
        with tritune.use_backend("triton"):
            torch.testing.assert_close(tritune.conv2d(x, w), tritune.conv2d(x.clone(), w), rtol=0, atol=0)
            assert torch.equal(tritune.max_pool2d(x, 2), F.max_pool2d(x, 2))

    def test_auto_never_takes_the_interpreter(self):
        x = torch.randn(1, 64, 8, 8).to(memory_format=torch.channels_last)
        decision = tritune.explain(tritune.max_pool2d, x, 2)
        assert decision.backend == "torch" and "interpreter" in decision.because
        assert (decision.origin, decision.instead) == ("rule", ())


@pytest.mark.gpu  # the interpreter serves one thread at a time, under its lock
def test_launches_in_threads(device):
    x, w = torch.randn(2, 8, 9, 9, device=device), torch.randn(8, 8, 3, 3, device=device)

    def work(_: int) -> torch.Tensor:
        with tritune.use_backend("triton"):
            return tritune.conv2d(x, w, activation="relu")

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(work, range(64)))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.interpret
def test_interpreter_in_threads():
    x = torch.randn(1, 2, 6, 6)

    def work(_: int) -> torch.Tensor:
        with tritune.use_backend("triton"):
            return tritune.max_pool2d(x, 2)

    with ThreadPoolExecutor(4) as threads:
        for result in threads.map(work, range(8)):
            assert torch.equal(result, F.max_pool2d(x, 2))


@pytest.mark.torch
@pytest.mark.parametrize("namespace", [torch, F], ids=["torch", "functional"])
def test_ours_work_in_the_place_of_torchs(namespace, monkeypatch):
    """With all that torch has of these names replaced: torch's own functions find each other by name."""
    calls = [prepare(call, "small", "training")[0] for call in CALLS]
    before = [call() for call in calls]
    replaced = [name for name in tritune.__all__ if hasattr(namespace, name)]
    assert len(replaced) >= 12
    for name in replaced:
        monkeypatch.setattr(namespace, name, getattr(tritune, name))
    for call, call_of_the_table, grads in zip(calls, CALLS, before, strict=True):
        assert all(map(torch.equal, call(), grads)), call_of_the_table.name


@pytest.mark.torch
class TestExplain:
    def test_one_operator(self):
        decision = tritune.explain(tritune.conv2d, torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3))
        assert decision.op == "conv2d" and decision.backend == "torch"
        assert "CPU" in str(decision)

    def test_a_model_lists_its_calls_and_computes_nothing(self):
        model = torch.nn.Sequential(tritune.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), tritune.nn.MaxPool2d(2))
        decisions = tritune.explain(model, torch.randn(1, 2, 8, 8))
        assert [d.op for d in decisions] == ["conv2d", "max_pool2d"]

    def test_errors_are_the_calls_own(self):
        with pytest.raises(RuntimeError, match="expected input"):
            tritune.explain(tritune.conv2d, torch.randn(1, 3, 4, 4), torch.randn(2, 2, 3, 3))

    def test_on_a_gpu_that_is_not_here(self, monkeypatch):
        from torch._subclasses.fake_tensor import FakeTensorMode

        monkeypatch.setenv("TRITUNE_DEVICE", "h200")
        with FakeTensorMode(), _dispatch.record() as decisions, torch.no_grad():
            x = torch.empty(32, 64, 112, 112, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            w = torch.empty(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            with tritune.use_backend("triton"):
                tritune.conv2d(x, w, padding=1, activation="relu")
                tritune.max_pool2d(x, 3, 2, 1)
            tritune.conv2d(x, w, padding=1)
        conv, pool, auto = decisions
        assert conv.kernels[0][0] == "conv" and conv.kernels[0][1].config.BLOCK_M >= 64
        assert pool.kernels[0][0] == "pool"
        assert auto.backend == "torch" and "not measured" in auto.because
        assert (conv.origin, pool.origin, auto.origin) == ("", "", "rule")
        assert conv.instead == pool.instead == auto.kernels == ()
        assert [name for name, _ in auto.instead] == ["conv"]
        assert "  triton would run conv: BLOCK_" in str(auto)
        assert auto.summary().endswith("`tritune tune` can  [rule]")

    def test_auto_follows_measurements(self, monkeypatch, tmp_path):
        """An entry with both times decides, whichever way they point."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        from tritune.autotune import resolve, store
        from tritune.kernels import pool

        monkeypatch.setenv("TRITUNE_DEVICE", "h200")
        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        image = torch.empty(8, 64, 32, 32, device="meta", dtype=torch.float16)
        window = pool.Window.of((2, 2), (2, 2), (0, 0), (1, 1))
        problem = pool.problem_of(image, (16, 16), window, "max", layout="nhwc")
        for us, backend in ((5.0, "triton"), (50.0, "torch")):
            key, config = pool.FORWARD.features(problem), pool.FORWARD.configs[0]
            entry = store.Entry(key, config, "measured", us=us, torch_us=10.0)
            store.write(tmp_path / "nvidia_h200" / "pool.json", "pool", [entry])
            resolve.clear_memo()
            with FakeTensorMode(), _dispatch.record() as decisions, torch.no_grad():
                x = torch.empty(8, 64, 32, 32, device="cuda", dtype=torch.float16)
                tritune.max_pool2d(x.to(memory_format=torch.channels_last), 2)
            (decision,) = decisions[:1]
            assert (decision.backend, decision.origin) == (backend, "measured") and "measured" in decision.because
            ((name, choice),) = decision.kernels or decision.instead
            assert (name, choice.origin, bool(decision.kernels)) == ("pool", "measured", backend == "triton")

    @pytest.mark.parametrize("norm_type", [1, 2, 2.0, 3, float("inf")])
    @pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
    def test_autocast_widens_powers(self, backend, norm_type, monkeypatch):
        """On a GPU torch takes powers in fp32, and rounds nothing that becomes of them."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        monkeypatch.setenv("TRITUNE_DEVICE", "h200")
        torch.set_autocast_enabled("cuda", True)
        try:
            with FakeTensorMode(), tritune.use_backend(backend):
                x = torch.empty(2, 8, 8, 8, device="cuda", dtype=torch.float16)
                ours, theirs = (function(x, norm_type, 2) for function in (tritune.lp_pool2d, lp_pool(2)))
            assert ours.dtype == theirs.dtype
        finally:
            torch.set_autocast_enabled("cuda", False)

    @pytest.mark.parametrize(
        "op, shape, args",
        [
            ("max_pool3d", (2, 8, 4, 8, 8), (2,)), ("avg_pool3d", (2, 8, 4, 8, 8), (2,)),
            ("adaptive_avg_pool1d", (2, 8, 64), (7,)), ("adaptive_avg_pool2d", (2, 8, 16, 16), (7,)),
            ("adaptive_avg_pool3d", (2, 8, 4, 8, 8), (3,)), ("adaptive_max_pool1d", (2, 8, 64), (7,)),
            ("adaptive_max_pool2d", (2, 8, 16, 16), (7,)), ("lp_pool3d", (2, 8, 4, 8, 8), (2, 2)),
            ("max_unpool1d", (2, 8, 32), (2,)), ("max_unpool2d", (2, 8, 8, 8), (2,)),
            ("max_unpool3d", (2, 8, 2, 4, 4), (2,)),
        ],
    )  # fmt: skip
    def test_deterministic_where_torch_is_not(self, op, shape, args, monkeypatch):
        """What torch's documentation of use_deterministic_algorithms lists, most often for the backward alone."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        from tritune.ops import pool as ops_pool

        monkeypatch.setenv("TRITUNE_DEVICE", "h200")
        reasons = []
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                with FakeTensorMode(), _dispatch.record() as decisions, torch.no_grad():
                    x = torch.empty(shape, device="cuda")
                    # Recording a gradient of a fake CUDA tensor ends the process in a CPU build of torch.
                    monkeypatch.setattr(ops_pool, "requires_grad", lambda _: True)
                    more = (torch.empty(shape, device="cuda", dtype=torch.int64),) if "unpool" in op else ()
                    getattr(tritune, op)(x, *more, *args)
            finally:
                torch.use_deterministic_algorithms(False)
            reasons.append(decisions[0])
        assert "deterministic" not in reasons[0].because
        assert reasons[1].backend == "triton" and "deterministic" in reasons[1].because
        assert [reason.origin for reason in reasons] == ["rule", "rule"]

    def test_deterministic_is_no_reason_without_a_gradient(self, monkeypatch):
        from torch._subclasses.fake_tensor import FakeTensorMode

        monkeypatch.setenv("TRITUNE_DEVICE", "h200")
        torch.use_deterministic_algorithms(True)
        try:
            with FakeTensorMode(), _dispatch.record() as decisions, torch.no_grad():
                tritune.adaptive_avg_pool2d(torch.empty(2, 8, 16, 16, device="cuda"), 7)
        finally:
            torch.use_deterministic_algorithms(False)
        assert decisions[0].backend == "torch"

    def test_fallback_is_logged_once(self, caplog):
        _dispatch._logged.clear()
        with caplog.at_level(logging.INFO, logger="tritune"):
            for _ in range(3):
                tritune.max_pool2d(torch.randn(1, 1, 4, 4), 2)
        assert len([record for record in caplog.records if "max_pool2d runs on torch" in record.message]) == 1


@pytest.mark.torch
@pytest.mark.checkout
def test_a_copy_under_another_name_registers_beside(tmp_path):
    """Two revisions in one process: the operators' namespace is the top package's name."""
    root = Path(__file__).resolve().parents[1]
    package = root / "src/tritune"
    spec = importlib.util.spec_from_file_location(
        "tritune_base", package / "__init__.py", submodule_search_locations=[str(package), str(root)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["tritune_base"] = module
    spec.loader.exec_module(module)
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(module.max_pool2d(x, 2), tritune.max_pool2d(x, 2))
    call = (x, [2, 2], [2, 2], [2, 2], [0, 0], [1, 1], "auto")
    assert torch.equal(torch.ops.tritune_base.max_pool(*call), torch.ops.tritune.max_pool(*call))
    assert module.conv2d is not tritune.conv2d


def unpooled(rank: int, indices: str) -> Case:
    """Indices of a pooling, or such of another layout than the input's."""
    sizes = {1: (30,), 2: (8, 12), 3: (4, 6, 4)}[rank]

    def unpool(input: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input[0, 0].numel()).expand(*input.shape[:2], -1).reshape(input.shape)
        last = ops_layout.is_channels_last(input) != (indices == "other")
        function = getattr(tritune, f"max_unpool{rank}d")
        result: torch.Tensor = function(input, lay_out(places, "nhwc" if last else "nchw"), 2)
        return result

    return Case(f"max_unpool{rank}d-{indices}", unpool, unpool, {"input": (2, 8, *sizes)})


def winners(case: Case) -> Case:
    def values(**arguments: Any) -> torch.Tensor:
        result: torch.Tensor = case.op(**arguments, return_indices=True)[0]
        return result

    return Case(f"{case.id}-indices", values, values, case.shapes, case.kwargs)


POOLINGS = [
    *test_pool.CASES,
    *(winners(case) for case in test_pool.MAXIMA if "global" not in case.id),
    *(unpooled(rank, indices) for rank in (1, 2, 3) for indices in ("same", "other")),
]
EXPLAINED = [
    *itertools.product(test_conv.CASES, ("nchw", "nhwc", "nhwc-weights-nchw")),
    *(
        (case, layout)
        for case, layout in itertools.product(POOLINGS, ("nchw", "nhwc", "strided"))
        if "unbatched" not in case.id or layout != "nhwc"
    ),
]


@pytest.mark.interpret
@pytest.mark.parametrize("case, layout", EXPLAINED, ids=lambda value: getattr(value, "id", value))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
def test_explains_what_runs(case, layout, monkeypatch):
    """Every kernel of a call and of its backward is listed beforehand, for the problem that it will get, and no other.

    Problems are compared, not configs alone: those of these small cases often agree where those of a real layer do not.
    What a launch would compute decides nothing, so none is run.
    """
    from tritune.kernels import _launch
    from tritune.ops import conv as ops_conv
    from tritune.ops import pool as ops_pool

    looked_up = {"explained": set(), "launched": set()}

    def recording(name, resolve):
        def record(tunable, problem, device):
            choice = resolve(tunable, problem, device)
            looked_up[name].add((tunable.name, problem, choice))
            return choice

        return record

    for module, name in ((ops_conv, "explained"), (ops_pool, "explained"), (_launch, "launched")):
        monkeypatch.setattr(module, "resolve", recording(name, module.resolve))
    monkeypatch.setattr(_launch.Launch, "run", lambda launch: None)
    with tritune.use_backend("triton"), _dispatch.record() as decisions:
        leaves = case.inputs(torch.float16, layout.split("-")[0], "cpu")
        if layout == "nhwc-weights-nchw" and "weight" in leaves:
            leaves["weight"] = leaves["weight"].contiguous()
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        y = case.op(**leaves, **case.kwargs)
        torch.autograd.grad(y, list(leaves.values()), torch.randn_like(y))
    assert looked_up["launched"] == looked_up["explained"]
    assert {(name, choice) for name, _, choice in looked_up["launched"]} == set(decisions[0].kernels)


def _convolve(transposed: bool, x: torch.Tensor, groups: int) -> Any:
    weight, size = x.new_empty(8, 8 // groups, 3, 3), [8, 8] if transposed else [4, 4]
    return conv_operators.forward(
        transposed, x, weight, None, None, None, size, None, [1, 1], [0, 0], [1, 1], groups, "none", "default",
        "triton", save_input=False,
    )  # fmt: skip


def _conv_weight_grad(x: torch.Tensor, groups: int) -> Any:
    g = x.new_empty(2, 8, 4, 4)
    return conv_operators._weight_grad(
        x, g, [3, 3], True, [1, 1], [0, 0], [1, 1], groups, "default", "triton"
    )  # fmt: skip


def _convolve_and_pool(x: torch.Tensor) -> Any:
    return conv_pool_operators._forward(
        x, x.new_empty(4, 8, 3, 3), None, None, [4, 4], [1, 1], [0, 0], [1, 1], 1, "relu", "default", [2, 2], [2, 2],
        [0, 0], "triton",
    )  # fmt: skip


def _recur(x: torch.Tensor, *, backward: bool) -> Any:
    operands = (x.new_empty(5, 2, 8), x.new_empty(1, 16, 8), x.new_empty(1, 16, 16), None, None, x.new_empty(1, 2, 16))
    if not backward:
        return rnn_operators._forward(*operands, None, "tanh", False, "default", True, "triton")
    out = x.new_empty(5, 2, 16)
    return rnn_operators._backward(
        *operands, None, out, None, out, None, None, None, [True] * 5, "tanh", False, "default", "triton"
    )  # fmt: skip


# What hands a precision to the kernels, and a call by which an operator in a graph comes there.
ASKS_FOR_PRECISION: dict[str, Callable[[torch.Tensor], Any]] = {
    "conv.run_forward": lambda x: _convolve(False, x, 1),
    "conv.run_transpose": lambda x: _convolve(True, x, 1),
    "conv.run_weight_grad": lambda x: _conv_weight_grad(x, 1),
    "conv_direct.run_forward": lambda x: _convolve(False, x, 8),
    "conv_direct.run_transpose": lambda x: _convolve(True, x, 8),
    "conv_direct.run_weight_grad": lambda x: _conv_weight_grad(x, 8),
    "conv_pool.run": _convolve_and_pool,
    "rnn.run_forward": lambda x: _recur(x, backward=False),
    "rnn.run_backward": lambda x: _recur(x, backward=True),
}


@pytest.mark.torch
class TestPrecision:
    """How fp32 is multiplied on a GPU where the caller does not say."""

    @pytest.fixture(autouse=True)
    def settings(self, monkeypatch):
        # torch's own test utilities, which other tests import, lock them.
        module = torch.backends.ContextProp.__set__.__globals__
        monkeypatch.setitem(module, "__allow_nonbracketed_mutation_flag", True)
        yield
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")

    def resolved(self, setting: Any, precision: str | None = None, dtype: torch.dtype = torch.float32) -> str:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            return _dispatch.resolved_precision(torch.empty(1, device="cuda", dtype=dtype), precision, setting)

    def test_defaults_are_torchs(self):
        assert self.resolved(_dispatch.conv_setting) == self.resolved(_dispatch.rnn_setting) == "tf32"
        assert self.resolved(_dispatch.matmul_setting) == "ieee"
        assert self.resolved(_dispatch.conv_setting, dtype=torch.float16) == "ieee"
        assert _dispatch.resolved_precision(torch.empty(1), "default", _dispatch.conv_setting) == "ieee"

    @pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
    def test_the_caller_decides(self, precision):
        assert self.resolved(_dispatch.conv_setting, precision) == precision

    @pytest.mark.parametrize("precision", [None, "default"])
    def test_settings_are_read_when_needed(self, precision):
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("medium")
        assert self.resolved(_dispatch.conv_setting, precision) == "ieee"
        assert self.resolved(_dispatch.rnn_setting, precision) == "ieee"
        assert self.resolved(_dispatch.matmul_setting, precision) == "tf32"

    @pytest.mark.parametrize("launcher", ASKS_FOR_PRECISION)
    def test_an_operator_in_a_graph_reads_its_own_setting(self, launcher, monkeypatch):
        """Each time that it runs; the settings of other operators are none of its business."""
        pytest.importorskip("triton")
        from torch._subclasses.fake_tensor import FakeTensorMode

        module, function = launcher.rsplit(".", 1)
        kernels = importlib.import_module(f"tritune.kernels.{module}")
        told: list[str] = []

        def run(*args: Any, precision: str | None = None, **_: Any) -> Any:
            told.append(precision or args[0].precision)
            raise InterruptedError

        monkeypatch.setattr(kernels, function, run)
        # Slices of fake CUDA tensors need a torch that was built for CUDA.
        monkeypatch.setattr(rnn_operators, "_previous_states", lambda states, first, reverse: states.unsqueeze(2))
        own, other = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
        if module == "rnn":
            own, other = other, own
        for setting, another in (("tf32", "ieee"), ("ieee", "tf32")):
            own.fp32_precision, other.fp32_precision = setting, another
            with FakeTensorMode(), pytest.raises(InterruptedError):
                ASKS_FOR_PRECISION[launcher](torch.empty(2, 8, 6, 6, device="cuda"))
        assert told == ["tf32", "ieee"]

    def test_both_ways_of_setting_at_once(self):
        """torch.backends.cudnn.allow_tf32 raises then."""
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="legacy and new"):
            _ = torch.backends.cudnn.allow_tf32
        assert self.resolved(_dispatch.conv_setting) == "tf32"
        assert self.resolved(_dispatch.rnn_setting) == "ieee"


@pytest.mark.torch
@pytest.mark.parametrize("index", [0, 1])
def test_kernels_run_on_the_tensors_device(index, monkeypatch):
    """Triton launches on the current device, here the first of two."""
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tritune.kernels import _launch, pool

    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *exc_info: object) -> None:
            current.pop()

    class Launch:
        def run(self) -> None:
            ran_on.append(current[-1])

    ran_on: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    with FakeTensorMode():
        x = torch.empty(2, 8, 6, 6, device=f"cuda:{index}")
    problem = pool.problem_of(x, (3, 3), pool.Window.of((2, 2), (2, 2), (0, 0), (1, 1)), "max", layout="nhwc")
    _launch.launch(pool.FORWARD, lambda problem, config, x: [Launch(), Launch()], problem, x)
    assert ran_on == [index] * 2 and current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu():
    x = torch.randn(2, 8, 6, 6, device="cuda:1", requires_grad=True)
    w = torch.randn(4, 8, 3, 3, device="cuda:1", requires_grad=True)
    results = []
    for backend in ("triton", "torch"):
        with tritune.use_backend(backend):
            y = tritune.max_pool2d(tritune.conv2d(x, w, precision="ieee"), 2)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
    torch.testing.assert_close(*results)
