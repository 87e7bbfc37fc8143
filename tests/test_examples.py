"""Each example runs, in a process of its own, and says what it did."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tritune

pytestmark = [pytest.mark.torch, pytest.mark.checkout]

FOLDER = Path(__file__).resolve().parents[1] / "examples"
DIFFERENCE = "largest difference to torch: "
RATIO = "time of ours / time of torch's"

# By the name of an example: the packages that it needs beside tritune's own, and what a reader has to find.
EXAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "conv_channels_last": ([], [DIFFERENCE]),
    "elman_rnn": ([], [DIFFERENCE]),
    "gpt2_finetune": (["transformers"], ["largest difference to eager: "]),
    "keras_layers": (
        ["keras"],
        [
            "largest difference to Keras: ", "conv2d: 1 on torch: input is on the CPU", "max_pool2d: 1 on torch",
            "avg_pool2d: 1 on torch", "SimpleRNN", "tritune.rnn: ", "tritune.lstm: ", "tritune.attention: ",
        ],
    ),
    "replace_convnext": (
        [],
        [f"{DIFFERENCE}0.0e+00", "4 of 7 modules would be", "7 of 7 modules were", "time of a step"],
    ),
    "replace_resnet": (
        [],
        [DIFFERENCE, "51 of 51 modules were", "1 is folded into it; computes the relu of 2", RATIO, "restored"],
    ),
    "tune_own_shapes": (
        ["triton", "typer"],
        ['"op": "gru"', "conv/4x32x16x64", "2 entries for conv on sm_90", "1 entries for rnn on sm_90", "3 x 4x32x512"],
    ),
    "vae_accelerate": (
        ["sklearn"], [f"{DIFFERENCE}0.0e+00", "conv2d: 80 on torch", "conv_transpose2d: 80 on torch", "time of a step"]
    ),
}  # fmt: skip


def test_every_example_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(Path(tritune.__file__).resolve().parents[1]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what is expected is what a machine without a GPU prints
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # Keras writes its settings when it is imported


def run(*words):
    command = [sys.executable, "-W", "error", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "tune_own_shapes" else ()) for name in EXAMPLES]
)
def test_runs(name):
    needs, shows = EXAMPLES[name]
    missing = [package for package in needs if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    done = run(str(FOLDER / f"{name}.py"))
    assert done.returncode == 0, done.stderr
    assert [text for text in shows if text not in done.stdout] == [], done.stdout


@pytest.mark.parametrize(
    "name, package, install", [("keras_layers", "keras", "keras"), ("vae_accelerate", "sklearn", "scikit-learn")]
)
def test_says_what_it_lacks(name, package, install):
    code = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path({str(FOLDER / name)!r} + '.py', "
    done = run("-c", f"{code}run_name='__main__')")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("This example ") and done.stderr.endswith(f"pip install {install}\n")
    assert done.stderr.count("\n") == 1
