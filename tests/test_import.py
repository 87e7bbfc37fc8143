"""What ``import tritune`` costs and needs, each in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch


def run_python(code: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, *options, "-c", code], {**os.environ, **variables}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def import_microseconds(log: str, module: str) -> int:
    """A module's cumulative time in the output of ``-X importtime``."""
    match = re.search(rf"\| +(\d+) \| {module}$", log, flags=re.MULTILINE)
    assert match, f"{module} was not imported from the top level"
    return int(match.group(1))


@pytest.mark.slow
def test_import_costs_at_most_a_tenth_of_torch(tmp_path: Path) -> None:
    # With torch loaded first, what tritune adds is its own line. Both lines come from one process, so a busy
    # machine slows both; the least of several runs is what the machine can do. The first one writes the bytecode of
    # both, as an installation does.
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = "import torch\nimport tritune"
    logs = [run_python(code, "-X", "importtime", **bytecode).stderr for _ in range(4)]
    torch = min(import_microseconds(log, "torch") for log in logs)
    tritune = min(import_microseconds(log, "tritune") for log in logs)
    assert tritune <= 0.1 * torch


def test_import_loads_nothing_heavy() -> None:
    # Each of these costs more than tritune itself, or may be missing.
    heavy = ["triton", "torch._dynamo", "torch._inductor", "matplotlib", "rich", "sklearn", "filelock", "transformers"]
    code = f"""
import sys, torch
before = set(sys.modules)
import tritune
print(*sorted((set(sys.modules) - before) & set({heavy})))
print("triton" in sys.modules)
"""
    assert run_python(code).stdout.split("\n") == ["", "False", ""]


def test_the_facade_shows_what_ops_has() -> None:
    """Their two lists of names are literal, since type checkers read no others."""
    import tritune

    functions = {"accelerate", "fold_bn", "record_shapes", "register_with_transformers", "replace", "restore"}
    assert {*tritune.__all__} - functions - {"__version__", "nn"} == {*tritune.ops.__all__} - {"record"}


def test_what_is_missing_for_transformers_is_named() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import tritune

try:
    tritune.register_with_transformers()
except ImportError as error:
    print(error)
"""
    said = run_python(code).stdout
    assert said.startswith("register_with_transformers needs Hugging Face transformers")
    assert said.count("\n") == 1


def test_works_without_triton() -> None:
    code = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, NoTriton())
import torch
import tritune
import tritune.cli

x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
y = tritune.max_pool2d(tritune.conv2d(x, w), 2)
assert torch.equal(y, torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, w), 2))
y.sum().backward()
assert x.grad.shape == x.shape

try:
    with tritune.use_backend("triton"):
        tritune.conv2d(x, w)
except tritune.UnsupportedError:
    pass
else:
    raise AssertionError("no triton, and yet the triton backend ran")
assert "triton" not in sys.modules
"""
    run_python(code)
