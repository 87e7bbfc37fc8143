"""`make gpu` as it would run on a machine with a GPU, all of it, on this CPU; and with planted faults."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tritune
from tritune.autotune.environment import fingerprint
from tritune.perf.gpu_results import Results

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.checkout]

SOURCE = Path(tritune.__file__).resolve().parents[1]
PLANTED = """
import os, sys, time
from dataclasses import replace
from tritune.perf import conv, pool

def wrong(**arguments):
    y = conv.OPERATORS["conv2d"].torch(**arguments)
    y[0, 0, 0, 0] += 1
    return y

def raises(**_):
    raise ValueError("planted in /some/place/kernel.py")

def dies(**_):
    os._exit(7)

def hangs(**_):
    time.sleep(1000)

CASES = [conv.CASES[0]]
for fault in (raises, wrong, dies, hangs):
    op = f"conv2d_{fault.__name__}"
    conv.OPERATORS[op] = replace(conv.OPERATORS["conv2d"], ours=fault)
    CASES.append(replace(conv.CASES[0], op=op, name=fault.__name__))
CASES.append(pool.CASES[0])
"""
FIELDS = {"op": "conv2d", "dtype": "bf16", "layout": "nhwc", "shape": "1", "direction": "fwd"}


def environment(*folders: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITUNE_")}
    kept.pop("TRITON_INTERPRET", None)
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, [SOURCE, *folders])), "CUDA_VISIBLE_DEVICES": ""}


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "tritune.perf.gpu", "--out", str(out), *options]


def rehearse(out: Path, *options: str, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, "--rehearse", *options), env=environment(*path), capture_output=True, text=True, check=False
    )


def records(out: Path, suite: str) -> list[dict]:
    document = json.loads((out / f"{suite}.json").read_text())
    assert set(document) == {"schema", "suite", "env", "cases"}
    assert document["env"]["torch"]
    return document["cases"]


def test_a_short_rehearsal(tmp_path):
    pytest.importorskip("triton")
    started = time.monotonic()
    done = rehearse(tmp_path / "out", "--budget", "50", "--tests", "tests/test_perf.py")
    assert time.monotonic() - started < 50, "the budget is hard"
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"conv.json", "gpu_tests.json", "summary.md"} <= files <= {
        "conv.json", "pool.json", "conv_pool.json", "rnn.json", "attention.json", "gpu_tests.json", "summary.md",
        "measured_configs.json",
    }  # fmt: skip

    cases = records(tmp_path / "out", "conv")
    fields = {"id", "family", "op", "shape", "dtype", "layout", "direction", "provider", "correct", "err", "floor_us",
              "origin", "device_us", "host_us", "method", "pct_limit"}  # fmt: skip
    assert {case["provider"] for case in cases} == {"tritune", "torch", "torch_channels_last", "torch_bare"}
    for case in cases:
        ours = case["provider"] == "tritune"
        assert set(case) == (fields | {"config"} if ours else fields)
        assert set(case["device_us"]) == {"p50", "p20", "p80", "n"}
        assert case["correct"] is (True if ours else None)
        assert case["device_us"]["p50"] > 0

    tests = json.loads((tmp_path / "out/gpu_tests.json").read_text())
    assert tests["selected"] == tests["skipped"] == 3
    assert tests["failures"] == []
    table = done.stdout[done.stdout.index("\nop ") :]
    assert table.split()[:9] == ["op", "shape", "dtype", "direction", "ours", "us", "torch", "us", "faster"]
    assert len(table.splitlines()) <= 60
    assert "GPU tests: 3 skipped" in table
    assert "not run" in table
    summary = (tmp_path / "out/summary.md").read_text()
    assert "## Not run" in summary
    for path in (tmp_path / "out").iterdir():
        assert str(SOURCE.parent) not in path.read_text(), f"{path.name} names a folder of this machine"


@pytest.mark.full
def test_faults_are_survived_and_named(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "planted.py").write_text(PLANTED)
    done = rehearse(
        tmp_path / "out", "--cases", "planted", "--tests", "--item-limit", "10", "--budget", "120", path=(tmp_path,)
    )
    assert done.returncode == 1, done.stdout + done.stderr
    ours = {
        case["id"].split("-")[0]: case for case in records(tmp_path / "out", "conv") if case["provider"] == "tritune"
    }
    assert ours["resnet50"]["correct"] is True
    assert ours["raises"]["error"] == "raised ValueError: planted in kernel.py"
    assert ours["wrong"]["correct"] is False
    assert ours["wrong"]["err"]["where"] == "output: max"
    assert "device_us" not in ours["wrong"], "what is wrong is not timed"
    assert ours["dies"]["error"].startswith("exited with 7")
    assert ours["hangs"]["error"] == "hung: nothing for 10 s"
    (ours,) = (one for one in records(tmp_path / "out", "pool") if one["provider"] == "tritune")
    assert ours["correct"] is True, "the case behind them ran"
    assert 0 < ours["bytes"]["needed"] < ours["bytes"]["moved"]

    table = done.stdout[done.stdout.index("\nop ") :]
    for fault in ("raises", "wrong", "dies", "hangs"):
        assert f"FAILED {fault}-bias+relu-bf16-nhwc-fwd: " in table
        assert fault in (tmp_path / "out/summary.md").read_text()
    assert table.count(" NO\n") == 4
    assert "6 of 6 items measured" in table


@contextlib.contextmanager
def started(*arguments: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(*arguments), env=environment(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupted(tmp_path, number):
    pytest.importorskip("triton")
    (tmp_path / "planted.py").write_text(PLANTED + "\nCASES = [CASES[0], CASES[4]]\n")
    with started(tmp_path / "out", "--rehearse", "--cases", "planted", "--tests", path=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("[1/2]"):
                break
        process.send_signal(number)
        rest = process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert "1 of 2 items measured, 1 not run" in rest
    assert records(tmp_path / "out", "conv")[0]["correct"] is True


def test_killed_it_leaves_what_it_has(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "planted.py").write_text(PLANTED + "\nCASES = [CASES[0], CASES[4]]\n")
    with started(tmp_path / "out", "--rehearse", "--cases", "planted", "--tests", path=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("[1/2]"):
                break
        process.kill()
        # The worker holds the other end of this pipe, and hangs: it must end with its parent all the same.
        process.stdout.read()
    assert records(tmp_path / "out", "conv")[0]["correct"] is True


@pytest.mark.full
class TestResume:
    CASES = (
        PLANTED
        + """
if not os.path.exists("mended"):
    CASES = [CASES[0], CASES[1], CASES[3]]
else:
    conv.OPERATORS["conv2d_raises"] = conv.OPERATORS["conv2d"]
    CASES = [CASES[0], CASES[1], CASES[5]]
"""
    )

    def rehearse(self, tmp_path, *more):
        """Runs in a folder of its own, where a file makes the planted faults disappear."""
        (tmp_path / "planted.py").write_text(self.CASES)
        options = ("--rehearse", "--cases", "planted", "--tests", "--budget", "100", *more)
        return subprocess.run(
            command(tmp_path / "out", *options), env=environment(tmp_path), cwd=tmp_path, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    def test_what_failed_and_what_is_new_runs(self, tmp_path):
        pytest.importorskip("triton")
        assert self.rehearse(tmp_path).returncode == 1
        first = {case["id"]: case for case in records(tmp_path / "out", "conv") if case["provider"] == "tritune"}
        (tmp_path / "mended").touch()
        done = self.rehearse(tmp_path, "--resume")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "resumed: 1 of 3 items measured, 2 not run" in done.stdout
        assert "3 of 3 items measured" in done.stdout
        again = {case["id"]: case for case in records(tmp_path / "out", "conv") if case["provider"] == "tritune"}
        good, bad = (next(name for name in first if name.startswith(word)) for word in ("resnet50", "raises"))
        assert again[good] == first[good], "not measured again"
        assert again[bad]["correct"] and not first[bad]["correct"]
        assert len(records(tmp_path / "out", "pool")) > 0

    def test_sweeps(self, tmp_path):
        pytest.importorskip("triton")
        out = tmp_path / "out"
        pattern = ("-k", "pool/sweep-resnet50-global", "--tests", "--budget", "100")
        assert rehearse(out, *pattern).returncode == 0
        before = json.loads((out / "measured_configs.json").read_text())
        done = rehearse(out, *pattern, "--resume")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "resumed: 2 of 2 items measured" in done.stdout
        after = json.loads((out / "measured_configs.json").read_text())
        assert after["kernels"] == before["kernels"] and after["sweeps"] == before["sweeps"]

    @pytest.mark.parametrize(
        "damage, words",
        [
            (lambda text: text.replace('"torch": "', '"torch": "x'), "conv.json is of another torch"),
            (lambda text: text[:-9], "conv.json holds no results: "),
            (lambda text: text.replace('"env"', '"venv"'), "holds no results: KeyError 'env'"),
            (lambda text: text.replace('"provider"', '"who"'), "holds no results: KeyError 'provider'"),
        ],
    )
    def test_results_that_do_not_belong_together(self, tmp_path, damage, words):
        results = Results(tmp_path, fingerprint("cpu"), [])
        results.records = [{"id": "a", "family": "conv", "provider": "tritune", "correct": True, **FIELDS}]
        results.write()
        Results(tmp_path, fingerprint("cpu"), []).resume()
        path = tmp_path / "conv.json"
        path.write_text(damage(path.read_text()))
        with pytest.raises(ValueError, match=re.escape(words)):
            Results(tmp_path, fingerprint("cpu"), []).resume()


def test_cases_by_name(tmp_path):
    pytest.importorskip("triton")
    patterns = ("-k", "conv/short-conv", "-k", "pool/sweep-resnet50-global")
    done = rehearse(tmp_path / "out", *patterns, "--tests", "--budget", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {case["id"] for case in records(tmp_path / "out", "conv")}
    assert len(found) == 4 and all(name.startswith("short-conv-") for name in found)
    configs = json.loads((tmp_path / "out/measured_configs.json").read_text())
    assert set(configs["kernels"]) == {"global_pool", "pool_backward"}
    assert "6 of 6 items measured" in done.stdout


def test_no_case_of_that_name(tmp_path):
    done = rehearse(tmp_path / "out", "-k", "no-such-layer", "--tests", "--budget", "60")
    assert done.returncode == 2
    assert "no case has no-such-layer in its name" in done.stderr


def test_a_worker_that_cannot_start(tmp_path):
    done = rehearse(tmp_path / "out", "--cases", "no_such_module", "--tests", "--budget", "60")
    assert done.returncode == 2
    assert "ModuleNotFoundError" in done.stderr


def test_without_a_gpu(tmp_path):
    done = subprocess.run(command(tmp_path / "out"), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()
