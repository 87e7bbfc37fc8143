"""The demo from end to end, and that it cannot claim what is not so."""

import json
import subprocess
import sys
import time

import pytest
import torch

from tritune import demo

pytestmark = pytest.mark.torch


@pytest.mark.slow
def test_demo(tmp_path):
    for module in ("triton", "rich", "matplotlib", "sklearn"):
        pytest.importorskip(module)
    start = time.monotonic()
    command = [sys.executable, "-m", "tritune", "demo", "--json", "--out", str(tmp_path / "new" / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 90
    assert "20/20 epochs" in done.stderr

    results = json.loads(done.stdout)
    assert results["failures"] == []
    assert results["tritune"]["accuracy"] >= 0.95
    assert results["torch"]["accuracy"] >= 0.95
    assert results["tritune"]["losses"][-1] < 0.1 * results["tritune"]["losses"][0]
    assert [one["op"] for one in results["ran"]] == ["conv2d", "conv2d", "max_pool2d"]
    assert all(one["why"] for one in results["ran"])
    assert (tmp_path / "new/folder/demo.png").stat().st_size > 10_000

    step = results["step"]
    assert step["interpreted"] is not torch.cuda.is_available()
    names = {"output", "grad input", *(f"grad {layer}.{kind}" for layer in ("conv1", "conv2", "linear")
                                       for kind in ("weight", "bias"))}  # fmt: skip
    assert set(step["differences"]) == names
    assert 0 < max(step["differences"].values()) < 1e-5
    kernels = {kernel["kernel"] for one in step["ran"] for kernel in one["kernels"]}
    assert kernels == {
        "conv2d", "conv2d_epilogue_grad", "conv2d_input_grad", "conv2d_weight_grad",
        "max_pool2d", "max_pool2d_backward",
    }  # fmt: skip


def result(accuracy=0.97, **differences):
    one = {"accuracy": accuracy, "seconds": 1.0, "losses": [1.0, 0.1]}
    return {"tritune": one, "torch": one, "step": {"differences": differences}}


@pytest.mark.parametrize(
    "results, failures",
    [
        (result(output=1e-6), []),
        (result(accuracy=0.95), []),
        ({**result(), "step": None}, []),
        (result(output=1e-6, weight=1e-3), ["weight differs from torch's by 1.0e-03 of its largest value"]),
        (result(output=float("nan")), ["output differs from torch's by nan of its largest value"]),
        (
            {**result(), "torch": {"accuracy": 0.949}},
            ["torch reached a test accuracy of 0.949, less than 0.95"],
        ),
    ],
)
def test_failures_are_named(results, failures):
    assert demo.check(results) == failures


def test_the_networks_share_their_weights():
    ours, torchs = demo.network(ours=True), demo.network(ours=False)
    torchs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), torchs(images))
