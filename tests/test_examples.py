"""Each example runs, in a process of its own, and says what it did."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tritune

pytestmark = [pytest.mark.torch, pytest.mark.checkout]

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} == {"conv_channels_last", "elman_rnn", "gpt2_finetune"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path, monkeypatch):
    if path.stem == "gpt2_finetune":
        pytest.importorskip("transformers")
    monkeypatch.setenv("PYTHONPATH", str(Path(tritune.__file__).resolve().parents[1]))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search("^largest difference to (torch|eager):", done.stdout, re.MULTILINE)
