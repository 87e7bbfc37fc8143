"""The performance suite's own parts: cases and floors, timer, verdict, fingerprint; and the budgets of host time."""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tritune
from tritune.autotune import device as devices
from tritune.autotune import environment, store, timer
from tritune.autotune.check import Machine, argument_sets, compare
from tritune.autotune.config import Config
from tritune.autotune.workload import Case, random_tensors
from tritune.perf import families, gpu, gpu_tests, overhead, worker
from tritune.perf.calls import CALLS, DIRECTIONS, SIZES, Call
from tritune.perf.calls import prepare as prepare_call
from tritune.perf.families import CASES, operator_of
from tritune.perf.providers import prepare

ROOT = Path(__file__).resolve().parents[1]
H200 = devices.named("h200")


def case_named(start: str) -> Case:
    """The forward of a layer, by the beginning of its id."""
    return next(case for case in CASES if case.id.startswith(start) and case.direction == "fwd")


@pytest.mark.torch
class TestCases:
    def test_ids_are_unique(self):
        ids = [case.id for case in CASES]
        assert len(ids) == len(set(ids))

    @pytest.mark.parametrize(
        "case, floor_us",
        [  # research on each layer: FLOPs over 788 TFLOP/s (67 without tensor cores) or bytes over 4.3 TB/s
            ("resnet50-stem-bias+relu", 14.2),
            ("resnet50-s1-3x3-bf16-nhwc", 9.4),
            ("resnet50-s2-shortcut-bias", 18.0),
            ("resnet50-s4-3x3-bias+relu", 9.4),
            ("vgg-c1-bias+relu", 150),
            ("convnext-stem-bias", 13.4),
            ("convnext-dw-s1-bias", 28.2),
            ("efficientnet-dw-bias+silu", 44.8),
            ("unet-1280-bias", 19.2),
            ("deeplab-aspp-bias+relu", 104),
            ("resnet50-maxpool-bf16-nhwc", 14.9),
            ("vgg-maxpool-bf16-nhwc", 59.7),
        ],
    )
    def test_floor(self, case, floor_us):
        pytest.importorskip("triton")
        one = case_named(case)
        assert operator_of(one).floor_us(one, H200) == pytest.approx(floor_us, rel=0.02)  # the table has 2 to 3 digits

    def test_floor_of_the_gradients(self):
        pytest.importorskip("triton")
        by_id = {case.id: case for case in CASES}
        one = by_id["vgg-c3-bias+relu-bf16-nhwc-fwd+bwd"]
        forward = operator_of(one).floor_us(replace(one, direction="fwd"), H200)
        assert operator_of(one).floor_us(one, H200) == pytest.approx(3 * forward)  # bound by FLOPs
        pool = by_id["resnet50-maxpool-bf16-nhwc-fwd+bwd"]
        x, y = 32 * 64 * 112 * 112, 32 * 64 * 56 * 56
        assert operator_of(pool).floor_us(pool, H200) == pytest.approx(2 * (2 * x + 3 * y) / 4.3e6)
        assert operator_of(pool).traffic(pool, H200) == (
            2 * (2 * x + 3 * y), 9 * 2 * y + 3 * y + 9 * 3 * y + 2 * x
        )  # fmt: skip

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
    def test_tiny_is_the_same_kind_of_layer(self, case):
        small = families.tiny(case)
        assert small.id == case.id
        assert sum(torch.Size(shape).numel() for shape in small.shapes.values()) < 10_000
        for name, value in case.kwargs.items():
            if name not in ("groups", "dilation", "padding"):
                assert small.kwargs[name] == value
        if case.op.startswith("conv"):
            assert small.shapes["weight"][2:] == case.shapes["weight"][2:]
            assert (small.shapes["weight"][1] == 1) == (case.shapes["weight"][1] == 1)
            assert (small.kwargs["groups"] > 1) == (case.kwargs["groups"] > 1)
            assert (small.kwargs["dilation"] > 1) == (case.kwargs["dilation"] > 1)
        assert case.op == "attention" or "global" in case.op or min(operator_of(small).output_shape(small)[2:]) > 1

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
    def test_providers_agree(self, case):
        small = replace(families.tiny(case), dtype="fp32")
        operator = operator_of(small)
        tensors = random_tensors(operator, small, "cpu", seed=1)
        assert all(0.5 < float(t.std()) * (t[0].numel() ** 0.5 if name.startswith("w") else 1) < 1.5
                   for name, t in tensors.items() if t.numel() > 50)  # fmt: skip
        results = {name: prepare(operator, small, name, tensors)() for name in operator.providers}
        ours = results["tritune"]
        assert set(ours) == {"output", *(f"grad {name}" for name in case.needs_grad)}
        for result in results.values():
            for name in ours:
                torch.testing.assert_close(ours[name], result[name])
        if "torch_bare" in operator.providers_of(small):
            bare = prepare(operator, small, "torch_bare", tensors)()["output"]
            assert not torch.equal(bare, ours["output"])

    def test_the_compiler_is_a_provider_where_there_is_a_gpu(self, monkeypatch):
        """On the cases of rank 0 alone; here it traces, and torch runs what it traced."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        compared = [case for case in CASES if "torch_compile" in operator_of(case).providers_of(case)]
        assert compared and {case.rank for case in compared} == {0}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert all("torch_compile" not in operator_of(case).providers_of(case) for case in compared)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        for case in compared[:2]:
            small = replace(families.tiny(case), dtype="fp32")
            operator = operator_of(small)
            tensors = random_tensors(operator, small, "cpu", seed=1)
            ours, compiled = (prepare(operator, small, name, tensors)() for name in ("tritune", "torch_compile"))
            torch.testing.assert_close(compiled["output"], ours["output"])

    def test_what_the_compiler_makes_is_made_before_it_is_timed(self, monkeypatch):
        """By the processes that run beside the tests: they check, and have no timer."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        compared = next(case for case in CASES if "torch_compile" in operator_of(case).providers_of(case))
        other = next(case for case in CASES if "torch_compile" not in operator_of(case).providers_of(case))
        ran: list[str] = []
        monkeypatch.setattr(worker, "prepare", lambda operator, case, provider, tensors: partial(ran.append, provider))
        for case in (compared, other):
            worker._timed(case, Machine("cuda", H200, None, 0.0), {}, {"provider": "tritune", "correct": True})
        assert ran == ["torch_compile"]

    def test_inputs_exceed_the_cache(self):
        case = case_named("resnet50-s3-3x3")
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in case.shapes.items()}
        size = sum(t.numel() * 2 for t in tensors.values())
        assert argument_sets(tensors, H200) * size >= 2.5 * 50 * 2**20
        assert argument_sets({"input": torch.empty(2**28, device="meta")}, H200) == 1


# --- timer -----------------------------------------------------------------------------------------------------------


class LoggedGpu:
    """Runs nothing; each call takes ``call_us`` of a clock that only moves when something is queued."""

    def __init__(self, call_us: float, *, can_capture: bool = True) -> None:
        self.call_us, self.can_capture = call_us, can_capture
        self.now = 0.0
        self.log: list[str] = []

    def call(self, name: str) -> Callable[[], None]:
        def launch() -> None:
            self.log.append(name)
            self.now += self.call_us

        return launch

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def event(self) -> float:
        self.log.append("event")
        return self.now

    def elapsed_us(self, start: float, end: float) -> float:
        return end - start

    def flush(self) -> None:
        self.log.append("flush")
        self.now += 40

    def busy(self, us: float) -> None:
        self.log.append("busy")
        self.now += us

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        before, length = self.now, len(self.log)
        run()
        took, self.now = self.now - before, before
        launches = len(self.log) - length
        del self.log[length:]

        def replay() -> None:
            self.log.append(f"replay {launches}")
            self.now += took

        return replay


@pytest.mark.torch
class TestTimer:
    def measure(self, log: LoggedGpu, names=("ours", "torch"), sets=3, **options) -> dict[str, timer.Timing | str]:
        competitors = {
            name: timer.Competitor([log.call(f"{name} {i}") for i in range(sets)], lambda: None) for name in names
        }
        return timer.CudaTimer(log, least=4, most=4).measure(competitors, seconds=0, **options)

    def test_long_calls_by_events_behind_a_flush(self):
        log = LoggedGpu(call_us=500)
        result = self.measure(log)
        assert result["ours"].p50 == result["torch"].p20 == 500
        assert result["ours"].method == "events"
        assert result["ours"].n == 4
        samples = [i for i, entry in enumerate(log.log) if entry == "event"][::2]
        for start in samples:  # the flush lies outside of the events, and nobody waits between it and the first
            assert log.log[start - 2 : start] == ["flush", "busy"]
            assert log.log[start + 1][:4] in ("ours", "torc")
            assert log.log[start + 2 : start + 4] == ["event", "synchronize"]

    def test_short_calls_in_one_graph_over_all_arguments(self):
        log = LoggedGpu(call_us=8)
        result = self.measure(log, sets=5)
        assert result["ours"].method == "graph"
        assert result["ours"].p50 == pytest.approx(8)
        replays = [entry for entry in log.log if entry.startswith("replay")]
        assert set(replays) == {"replay 125"}  # a millisecond
        assert log.log[log.log.index(replays[0]) - 2] != "flush"

    def test_an_estimate_of_zero(self):
        result = self.measure(LoggedGpu(call_us=0))
        assert result["ours"].p50 == 0
        assert result["ours"].method == "graph"

    def test_capture_fails(self):
        result = self.measure(LoggedGpu(call_us=8, can_capture=False))
        assert result["ours"].method == "events"
        assert result["ours"].p50 == 8

    def test_a_failing_competitor_does_not_stop_the_others(self):
        log = LoggedGpu(call_us=500)

        def out_of_memory() -> None:
            raise torch.OutOfMemoryError("planted")

        competitors = {
            "bad": timer.Competitor([out_of_memory]),
            "good": timer.Competitor([log.call("good")]),
        }
        for one in (timer.CudaTimer(log, least=1, most=1), timer.WallTimer(least=1, most=1)):
            result = one.measure(competitors, seconds=0)
            assert result["bad"] == "planted"
            assert isinstance(result["good"], timer.Timing)

    def test_order_changes(self):
        order: list[str] = []
        timer.interleaved(["a", "b", "c"], lambda name: order.append(name) or 0.0, 0, least=3, most=3)
        assert order == ["a", "b", "c", "c", "b", "a", "b", "c", "a"]

    @pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
    def test_each_is_first_and_last_as_often_as_the_others(self, names):
        order: list[str] = []
        rounds = 2 * len(names)
        timer.interleaved(list(names), lambda name: order.append(name) or 0.0, 0, least=rounds, most=rounds)
        assert sorted(order[:: len(names)]) == sorted(order[len(names) - 1 :: len(names)]) == sorted(2 * names)

    def test_percentiles(self):
        assert timer.percentile([3, 1, 2], 0.5) == 2
        assert timer.percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
        assert timer.percentile([7], 0.8) == 7

    def test_wall_clock(self):
        result = timer.WallTimer().measure({"sleep": timer.Competitor([lambda: time.sleep(0.002)])}, 0.02)
        assert 1900 < result["sleep"].p20 <= result["sleep"].p50 <= result["sleep"].p80


@pytest.mark.gpu
class TestTimerOnAGpu:
    @pytest.mark.parametrize("side, method", [(256, "graph"), (8192, "events")])
    def test_agrees_with_the_rate_of_a_product(self, side, method):
        sets = [torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        calls = [lambda a=a: a @ a for a in sets]
        result = timer.timer_for("cuda").measure({"one": timer.Competitor(calls), "same": timer.Competitor(calls)}, 0.3)
        one, same = result["one"], result["same"]
        assert one.method == same.method == method
        assert one.p20 <= one.p50 <= one.p80
        assert one.p50 == pytest.approx(same.p50, rel=0.1)  # two measurements of one product
        tflops = 2 * side**3 / one.p50 / 1e6
        assert tflops < 1.05 * 2250  # more than any device of the table has: the wrong thing was timed

    def test_gradients_are_captured(self):
        case = replace(case_named("resnet50-s1-3x3-bf16"), direction="fwd+bwd")
        operator = operator_of(case)
        tensors = random_tensors(operator, case, "cuda", seed=0)
        with tritune.use_backend("triton"):
            competitors = {
                name: timer.Competitor([prepare(operator, case, name, tensors)])
                for name in ("tritune", "torch_channels_last")
            }
            result = timer.timer_for("cuda").measure(competitors, 0.2)
        assert {one.method for one in result.values()} == {"graph"}


# --- verdict, results, environment -----------------------------------------------------------------------------------


@pytest.mark.torch
class TestVerdict:
    exact = torch.linspace(-3, 3, 1000, dtype=torch.float64)

    def verdict(self, ours: torch.Tensor) -> tuple[bool, str]:
        torchs = {"y": self.exact.to(torch.bfloat16)}
        result = compare({"y": ours}, {"y": self.exact}, torchs, 4e-3)
        return result.correct, result.where

    def test_rounded_is_right(self):
        assert self.verdict(self.exact.to(torch.bfloat16)) == (True, "y: max")

    @pytest.mark.parametrize("change, where", [(0.1, "y: max"), (float("nan"), "y: max"), (float("inf"), "y: max")])
    def test_one_wrong_element(self, change, where):
        ours = self.exact.to(torch.bfloat16)
        ours[500] += change
        assert self.verdict(ours) == (False, where)

    def test_all_a_little_wrong(self):
        assert self.verdict(self.exact * 1.015) == (False, "y: max")
        assert self.verdict(self.exact + 0.02) == (False, "y: rms")

    def test_shape(self):
        assert self.verdict(self.exact[1:]) == (False, "y: shape")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_in_the_reference(self, value):
        exact = self.exact.clone()
        exact[7] = value
        right, wrong = exact.to(torch.bfloat16), exact.to(torch.bfloat16)
        wrong[7] = 1.0
        for ours, correct in ((right, True), (wrong, False), (-right, False)):
            assert compare({"y": ours}, {"y": exact}, {"y": right}, 4e-3).correct is correct


@pytest.mark.torch
class TestEnvironment:
    def test_fingerprint_names_no_place(self, monkeypatch):
        monkeypatch.setenv("TRITUNE_CACHE_DIR", "/somewhere/private/cache")
        found = environment.fingerprint("cpu")
        assert found["torch"] == torch.__version__
        assert found["variables"]["TRITUNE_CACHE_DIR"] == "cache"
        text = json.dumps(found)
        import socket

        for secret in (socket.gethostname(), str(ROOT), str(Path.home()), "private"):
            assert len(secret) < 3 or secret not in text

    def test_without_nvidia_smi(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert set(environment.gpu_state("GPU-1").values()) == {None}
        assert environment.fingerprint("cpu")["commit"] is None

    def test_nvidia_smi(self, monkeypatch):
        monkeypatch.setattr(environment, "_output", lambda *_, **__: "580.65, 345, 1980, 3201, 31, [N/A]\n")
        state = environment.gpu_state()
        assert state["driver"] == "580.65"
        assert state["max_clock_mhz"] == 1980
        assert state["power_w"] is None

    @pytest.mark.parametrize(
        "text, kept",
        [
            ("File \"/some/place/x/ops/conv.py\", line 3", 'File "conv.py", line 3'),
            ("at /opt/a b/c.py:12", "at a b/c.py:12"),
            ("tests/test_conv.py::test[1/2] 3/4", "tests/test_conv.py::test[1/2] 3/4"),
            ("~/cache and ./here", "cache and ./here"),
        ],
    )  # fmt: skip
    def test_paths_are_cut(self, text, kept):
        assert environment.without_paths(text) == kept


@pytest.mark.torch
class TestTierFour:
    def read(self, *lines: str) -> dict:
        run = gpu_tests.TierFour.__new__(gpu_tests.TierFour)
        run.outcomes, run.messages, run.selected, run.log = {}, {}, None, []
        run.started, run.ended = time.monotonic(), "exited with 1"
        for line in lines:
            run.read(line)
        return run.to_json()

    def test_alone(self):
        found = self.read(
            "collected 12 items / 8 deselected / 4 selected",
            "tests/test_a.py::TestX::test_b[(32, 16)-x] PASSED                [ 25%]",
            "tests/test_a.py::test_c FAILED                                   [ 50%]",
            "tests/test_a.py::test_d SKIPPED (needs more memory)              [ 75%]",
            "FAILED tests/test_a.py::test_c - AssertionError: 1 is not 2",
        )
        assert (found["selected"], found["passed"], found["failed"], found["skipped"], found["not_run"]) == (
            4,
            1,
            1,
            1,
            1,
        )
        assert found["failures"] == [{"test": "tests/test_a.py::test_c", "message": "AssertionError: 1 is not 2"}]
        assert "1 passed, 1 failed, 1 skipped, 1 not run" in gpu_tests.in_words(found)
        assert found["log"][0].startswith("collected 12 items") and len(found["log"]) == 5

    def test_in_parallel(self):
        found = self.read(
            "8 workers [942 items]",
            "tests/test_a.py::test_b[1] ",
            "[gw1] [  0%] PASSED tests/test_a.py::test_b[1] ",
            "[gw0] [  1%] ERROR tests/test_a.py::test_b[2] ",
        )
        assert (found["selected"], found["passed"], found["error"], found["not_run"]) == (942, 1, 1, 940)

    def test_a_file_that_cannot_be_imported(self):
        found = self.read("ERROR tests/test_a.py - ModuleNotFoundError: No module named 'x'")
        assert found["failures"] == [{"test": "tests/test_a.py", "message": "ModuleNotFoundError: No module named 'x'"}]


@pytest.mark.torch
class TestPatterns:
    """What follows ``-k``."""

    def test_they_reach_the_worker_as_they_are(self, monkeypatch):
        patterns = ["conv/short", "", "-x", "--rehearse", "=conv/", "a b", "*"]
        commands: list[list[str]] = []
        monkeypatch.setattr(gpu, "Child", lambda command, env: commands.append(command))
        gpu.start_worker(SimpleNamespace(cases=".families", patterns=patterns, rehearse=False), None, "--probe")
        found: list[SimpleNamespace] = []
        monkeypatch.setattr(worker, "run", lambda args, send: found.append(args))
        monkeypatch.setattr(worker, "private_stdout", lambda: contextlib.nullcontext(sys.stdout))
        # The first three are Python's; a child would end this process when its input does.
        worker.main([option for option in commands[0][3:] if option != "--child"])
        assert found[0].patterns == patterns
        assert found[0].probe and not found[0].rehearse

    def test_they_name_family_and_case(self):
        pytest.importorskip("triton")
        names = {item.name for item in worker.items(".families", False)}
        some = {item.name for item in worker.items(".families", False, ["pool/sweep-", "conv/short-conv"])}
        assert some == {name for name in names if "pool/sweep-" in name or "conv/short-conv" in name}
        assert {name.split("/")[0] for name in some} == {"conv", "pool"}
        assert worker.items(".families", False, ["no-such-layer"]) == []
        assert len(worker.items(".families", False, [""])) == len(names)


@pytest.mark.torch
class TestMerge:
    def document(self, tmp_path: Path, source: str) -> Path:
        entry = {
            "key": {"pixels": 8, "dtype": "bf16"}, "config": {"BLOCK_M": 16, "num_warps": 4}, "origin": source,
            "version": 1, "us": 3.0, "torch_us": 4.0, "default_us": 3.5, "env": {"triton": "3.6.0"},
        }  # fmt: skip
        file = tmp_path / "measured_configs.json"
        file.write_text(json.dumps({"schema": 1, "slug": "nvidia_h200", "kernels": {"conv": [entry]}}))
        return file

    def test_entries_reach_the_store(self, tmp_path):
        assert gpu.merge(self.document(tmp_path, "measured"), tmp_path / "configs") == 0
        assert [path.name for path in (tmp_path / "configs").rglob("*.*")] == ["conv.json"]
        (entry,) = store.load(tmp_path / "configs/nvidia_h200/conv.json")
        assert entry.config == Config(BLOCK_M=16, num_warps=4)
        assert (entry.us, entry.torch_us, entry.extra["default_us"]) == (3.0, 4.0, 3.5)

    def test_a_rehearsal_is_refused(self, tmp_path, capsys):
        assert gpu.merge(self.document(tmp_path, "rehearsed"), tmp_path / "configs") == 1
        assert "rehearsal" in capsys.readouterr().err
        assert not (tmp_path / "configs").exists()

    def test_it_is_told_where(self, tmp_path, capsys):
        assert gpu.merge(self.document(tmp_path, "measured"), None) == 2
        assert capsys.readouterr().err == "--merge needs --out STORE to add to; in a checkout autotune/configs\n"

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"slug": 3, "kernels": {}}', '{"kernels": {"conv": [3]}}'])
    def test_what_is_no_such_file(self, text, tmp_path, capsys):
        (tmp_path / "file").write_text(text)
        assert gpu.merge(tmp_path / "file", tmp_path / "configs") == 2
        assert capsys.readouterr().err.startswith(f"{tmp_path / 'file'} is no measured_configs.json: ")
        assert not (tmp_path / "configs").exists()


@pytest.mark.torch
class TestSweep:
    def test_targets(self):
        pytest.importorskip("triton")
        from tritune.perf.sweep import sweep_header, sweep_targets

        targets = sweep_targets(CASES)
        assert targets[0].case.name == "resnet50-s1-3x3"
        kinds = {(target.case.name, target.kind) for target in targets}
        assert ("resnet50-maxpool", "bwd") in kinds
        assert ("resnet50-stem", "weight_grad") in kinds
        assert ("resnet50-stem", "input_grad") not in kinds
        assert len({sweep_header(target)["id"] for target in targets}) == len(targets)


@pytest.mark.torch
@pytest.mark.checkout
def test_a_gpu_run_needs_no_other_packages():
    """The GPU machine has no network: what these files import at their top must be there."""
    there = {"torch", "triton", "numpy", "pytest", "pytest_benchmark", "rich", "matplotlib", "tritune"}
    local = {path.stem for path in (ROOT / "tests").glob("*.py")}
    files = [*(ROOT / "perf").rglob("*.py"), ROOT / "tests/conftest.py", ROOT / "tests/harness.py"]
    files += [path for path in (ROOT / "tests").glob("*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(str(node.module))
            for name in names:
                package = name.partition(".")[0]
                assert package in {*sys.stdlib_module_names, *there, *local}, f"{path.name} imports {name}"


# --- what a call costs above torch's own -----------------------------------------------------------------------------


@pytest.mark.torch
class TestCalls:
    def test_every_public_function_and_module_has_a_row(self):
        values = {name: getattr(tritune, name) for name in tritune.__all__}
        functions = {name for name, value in values.items() if callable(value) and not inspect.isclass(value)}
        modules = {f"nn.{name}" for name, value in vars(tritune.nn).items() if inspect.isclass(value)}
        others = {"explain", "record_shapes", "register_with_transformers", "replace", "restore"}
        assert {call.public_name for call in CALLS} == functions - others | modules
        assert len({call.name for call in CALLS}) == len(CALLS)

    @pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
    def test_the_peer_computes_the_same(self, call):
        for direction in DIRECTIONS:
            with torch.set_grad_enabled(direction == "training"):
                ours, torchs = prepare_call(call, "small", direction)
                torch.testing.assert_close(ours(), torchs())

    @pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
    def test_ours_runs_our_code_and_the_peer_does_not(self, call):
        folders = {str(Path(package.__file__).parent) for package in (tritune.ops, tritune.nn)}

        def runs_ours(run: Callable[[], object]) -> bool:
            files: set[str] = set()
            sys.setprofile(lambda frame, event, argument: files.add(frame.f_code.co_filename))
            try:
                run()
            finally:
                sys.setprofile(None)
            return any(str(Path(file).parent) in folders for file in files)

        ours, torchs = prepare_call(call, "small", "forward")
        assert runs_ours(ours)
        assert not runs_ours(torchs)


@pytest.mark.torch
class TestOverhead:
    def test_a_drift_and_a_burst_cancel(self):
        """The clock slows down from sample to sample, and once somebody else takes the machine."""
        us = {"ours": 13.0, "torch": 10.0}
        taken: list[str] = []

        def sample(name: str) -> float:
            taken.append(name)
            return us[name] + 0.5 * len(taken) + (500 if len(taken) == 21 else 0)

        samples = timer.interleaved(list(us), sample, 0, least=40, most=40)
        found = overhead.cost(samples["ours"], samples["torch"])
        assert found.above_us == pytest.approx(3)
        assert found.rounds == 40

    @pytest.mark.parametrize("slower_us", [0.0, 30.0])
    def test_work_of_our_own_is_found(self, slower_us):
        def spin(us: float) -> None:
            end = time.thread_time_ns() + 1e3 * us
            while time.thread_time_ns() < end:
                pass

        found = overhead.measure(lambda: spin(50 + slower_us), lambda: spin(50), 0.05)
        assert found.above_us == pytest.approx(slower_us, abs=5)  # a clock's times: what a call of spin adds
        assert found.ratio == pytest.approx(1 + slower_us / 50, abs=0.1)  # the same 5 us of 50

    @pytest.mark.parametrize(
        "size, above_us, ratio, within",
        [
            ("small", 4.0, 5.0, True),
            ("small", 4.1, 1.01, False),
            ("large", 90.0, 1.02, True),
            ("large", 3, 1.03, False),
        ],
    )
    def test_the_yardstick(self, size, above_us, ratio, within):
        assert overhead.Cost(1.0, 1.0, above_us, ratio, 1).is_within(size) == within

    @pytest.fixture
    def run(self, monkeypatch):
        """The command, on two calls whose measurements are made up: one misses the yardstick in training."""
        monkeypatch.setattr(overhead, "CALLS", [call for call in CALLS if call.name in ("conv1d", "nn.Conv2d")])

        def measured(call: Call) -> Iterator[dict[str, object]]:
            for size in SIZES:
                for direction in DIRECTIONS:
                    missed = call.name == "nn.Conv2d" and direction == "training"
                    numbers = {"torch_us": 2000.0, "ours_us": 2001.0, "above_us": 9.5, "ratio": 1.4, "rounds": 9}
                    yield {"call": call.name, "size": size, "direction": direction, **numbers, "within": not missed}

        monkeypatch.setattr(overhead, "measure_call", measured)

        def run(*argv: object) -> int:
            parser = argparse.ArgumentParser()
            overhead.add_arguments(parser)
            return overhead.main(parser.parse_args(list(map(str, argv))))

        return run

    def test_json_and_nothing_else(self, run, capsys):
        assert run("--json") == 1
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert [record["call"] for record in document["records"]] == ["conv1d"] * 4 + ["nn.Conv2d"] * 4
        assert document["env"]["torch"] == torch.__version__
        assert "1/2 conv1d" in err and "2/2 nn.Conv2d" in err

    def test_files_and_readme(self, run, tmp_path, capsys):
        readme = tmp_path / "README.md"
        readme.write_text(f"above\n{overhead.BEGIN}\nold\n{overhead.END}\nbelow\n")
        assert run("--out", tmp_path / "cpu", "--readme", readme) == 1
        table = (tmp_path / "cpu/overhead.md").read_text()
        assert table == overhead.markdown(json.loads((tmp_path / "cpu/overhead.json").read_text()))
        assert readme.read_text() == f"above\n{overhead.BEGIN}\n{table}{overhead.END}\nbelow\n"
        assert "6 of 8 measurements" in table
        assert "| small, forward | +9.5 µs | +9.5 µs (`conv1d`) |\n" in table
        assert "| large, training | 1.400 × | 1.400 × (`conv1d`) |\n" in table
        assert "| `conv1d` | 2000.0 + 9.5 | 2000.0 + 9.5 | 2.0 × 1.400 | 2.0 × 1.400 | yes |" in table
        assert "| `nn.Conv2d` | 2000.0 + 9.5 | **2000.0 + 9.5** | 2.0 × 1.400 | **2.0 × 1.400** | no |" in table
        assert {path.name for path in tmp_path.rglob("*.*")} == {"README.md", "overhead.json", "overhead.md"}
        assert capsys.readouterr().out == ""

    def test_all_within(self, run):
        assert run("--only", "conv1d") == 0

    def test_bad_usage(self, run, tmp_path, capsys):
        (tmp_path / "README.md").write_text("no markers")
        for argv in (("--only", "nothing"), ("--only", "conv1d", "--out", tmp_path / "cpu"),
                     ("--readme", tmp_path / "README.md"), ("--readme", tmp_path / "missing")):  # fmt: skip
            assert run(*argv) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]

    def test_an_interrupt_writes_nothing(self, run, tmp_path, monkeypatch, capsys):
        def interrupted(call: Call) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(overhead, "measure_call", interrupted)
        assert run("--out", tmp_path / "cpu") == 130
        assert capsys.readouterr().err == "interrupted after 0 of 2 calls\n"
        assert not list(tmp_path.iterdir())

    @pytest.mark.checkout
    def test_the_table_of_the_readme_is_that_of_the_results(self):
        folder = ROOT / "perf/results/cpu"
        document = json.loads((folder / "overhead.json").read_text(encoding="utf-8"))
        table = (folder / "overhead.md").read_text(encoding="utf-8")
        assert table == overhead.markdown(document)
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert overhead.between_markers(readme, table) == readme
        assert [record["call"] for record in document["records"][::4]] == [call.name for call in CALLS]


# --- budgets of host time --------------------------------------------------------------------------------------------


def fastest(calls: dict[str, Callable[[], object]], seconds: float) -> SimpleNamespace:
    """The least time of each call in microseconds, of samples taken in turn: noise only ever adds."""
    competitors = {name: timer.Competitor([call]) for name, call in calls.items()}
    one = timer.WallTimer(least=20, most=100_000, sample_us=300)
    least: dict[str, float] = {}

    def sample(name: str) -> float:
        us = timer.mean_us(competitors[name], counts[name])
        least[name] = min(us, least.get(name, us))
        return us

    counts = {name: max(1, int(one.sample_us / timer.mean_us(c, 5))) for name, c in competitors.items()}
    timer.interleaved(list(calls), sample, seconds, one.least, one.most)
    return SimpleNamespace(**least)


def within_budget(calls: dict[str, Callable[[], object]], holds: Callable[[SimpleNamespace], bool]) -> None:
    """A busy machine gets a longer measurement, not a wider bound."""
    for seconds in (0.5, 2.0, 8.0):
        found = fastest(calls, seconds)
        if holds(found):
            return
    raise AssertionError(f"microseconds: ours {found.ours:.1f}, torch {found.torch:.1f}")


def python_events(call: Callable[[], object]) -> int:
    """Calls that Python makes, of Python's functions and of torch's, in one warm call."""
    call()
    count = -1  # the end of the profile itself

    def event(frame: object, what: str, argument: object) -> None:
        nonlocal count
        count += what in ("call", "c_call")

    sys.setprofile(event)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.torch
class TestHostCalls:
    """Validation and the choice of backend cost a small call on the CPU some 10 to 13 us (convolution, attention) or
    6 to 9 (pooling) on an idle machine. Microseconds do not repeat on a shared one, so what is held is the number of
    calls that Python makes; ``make overhead`` has the times, beside torch's."""

    @pytest.mark.parametrize(
        "op, budget",
        [
            ("conv2d", 62), ("max_pool2d", 48), ("avg_pool2d", 44), ("adaptive_avg_pool2d", 36),
            ("scaled_dot_product_attention", 22), ("attention", 26), ("cosine", 62), ("attention_pool", 31),
        ],
    )  # fmt: skip
    def test_a_small_call(self, op, budget):
        x, w, q = (torch.randn(shape) for shape in ((1, 4, 6, 6), (4, 4, 3, 3), (1, 2, 8, 16)))
        calls = {
            "conv2d": lambda: tritune.conv2d(x, w),
            "max_pool2d": lambda: tritune.max_pool2d(x, 2),
            "avg_pool2d": lambda: tritune.avg_pool2d(x, 2),
            "adaptive_avg_pool2d": lambda: tritune.adaptive_avg_pool2d(x, 2),
            "scaled_dot_product_attention": lambda: tritune.scaled_dot_product_attention(q, q, q),
            "attention": lambda: tritune.attention(q, q, q),
            "cosine": lambda: tritune.attention(q, q, q, score="cosine"),
            "attention_pool": lambda: tritune.attention_pool(q[0], q, q),
        }
        assert python_events(calls[op]) <= budget


@pytest.mark.torch
@pytest.mark.slow
class TestHostTime:
    """Within 5 % of torch, on a call with work."""

    @pytest.fixture(autouse=True)
    def one_thread(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def test_convolution_with_work(self):
        x, w, b = torch.randn(4, 64, 28, 28), torch.randn(64, 64, 3, 3), torch.randn(64)
        calls = {"ours": lambda: tritune.conv2d(x, w, b, padding=1), "torch": lambda: F.conv2d(x, w, b, padding=1)}
        within_budget(calls, lambda us: us.ours <= 1.05 * us.torch)

    def test_pooling_with_work(self):
        x = torch.randn(4, 40, 56, 56)
        calls = {"ours": lambda: tritune.max_pool2d(x, 3, 2, 1), "torch": lambda: F.max_pool2d(x, 3, 2, 1)}
        within_budget(calls, lambda us: us.ours <= 1.05 * us.torch)

    @pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
    def test_attention_with_work(self, grad):
        q, k, v = (torch.randn(4, 8, 256, 64, requires_grad=grad) for _ in range(3))
        calls = {
            "ours": lambda: tritune.scaled_dot_product_attention(q, k, v),
            "torch": lambda: F.scaled_dot_product_attention(q, k, v),
        }
        within_budget(calls, lambda us: us.ours <= 1.05 * us.torch)

    def test_cosine_attention_trains_no_slower(self):
        """Rows of unit length, of which torch's own function makes more passes, forward and backward."""
        q, k, v = (torch.randn(4, 8, 256, 64, requires_grad=True) for _ in range(3))
        dout = torch.randn(4, 8, 256, 64)

        def by_hand() -> torch.Tensor:
            return F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=5.0)

        def gradients(out: torch.Tensor) -> object:
            return torch.autograd.grad(out, (q, k, v), dout)

        calls = {
            "ours": lambda: gradients(tritune.attention(q, k, v, score="cosine", scale=5.0)),
            "torch": lambda: gradients(by_hand()),
        }
        within_budget(calls, lambda us: us.ours <= us.torch)
