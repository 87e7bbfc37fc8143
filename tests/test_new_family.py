"""The worked example of docs/architecture.md, a new family in ``examples/lse_pool``: every step of it, run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import assert_as_exact

import tritune

pytestmark = pytest.mark.checkout

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [((2, 3, 24), 8), ((5, 21), 7), ((300, 6), 2), ((0, 8), 4), ((4,), 1)]


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """The example can be imported, and what its import registers is forgotten: the suites that walk over all kernels
    and families run in the same process."""
    pytest.importorskip("triton")
    from tritune.autotune.config import TUNABLES
    from tritune.autotune.workload import FAMILIES

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    FAMILIES.pop("lse_pool", None)
    for name in ("lse_pool", "lse_pool_backward"):
        TUNABLES.pop(name, None)


def reference(x, kernel_size):
    return x.double().unflatten(-1, (-1, kernel_size)).exp().mean(-1).log().to(x.dtype)


@pytest.mark.torch
class TestOperator:
    @pytest.mark.parametrize("shape, kernel_size", [one for one in SHAPES if 0 not in one[0]])
    def test_values_and_derivatives(self, shape, kernel_size):
        from lse_pool.op import lse_pool1d

        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(lse_pool1d(x, kernel_size), reference(x, kernel_size))
        assert torch.autograd.gradcheck(lse_pool1d, (x, kernel_size))
        assert torch.autograd.gradgradcheck(lse_pool1d, (x, kernel_size))

    @pytest.mark.parametrize("backend", ["auto", "torch"])
    def test_the_registered_operators(self, backend):
        from lse_pool.op import OP, OP_BACKWARD

        x = torch.randn(3, 12, requires_grad=True)
        torch.library.opcheck(OP, (x, 4, backend))
        y = OP(x, 4, backend)
        torch.library.opcheck(OP_BACKWARD, (torch.randn(3, 3), x, y.detach(), 4, backend))
        (ours,) = torch.autograd.grad(y.sum(), x)
        (theirs,) = torch.autograd.grad(reference(x, 4).sum(), x)
        torch.testing.assert_close(ours, theirs)

    def test_a_compiled_call(self):
        from lse_pool.op import lse_pool1d

        x = torch.randn(3, 12)
        torch.testing.assert_close(torch.compile(lse_pool1d, backend="eager", fullgraph=True)(x, 4), reference(x, 4))

    def test_rejections(self):
        from lse_pool.op import lse_pool1d

        with pytest.raises(TypeError, match="floating-point"):
            lse_pool1d(torch.ones(4, dtype=torch.int64), 2)
        for kernel_size in (0, 3, 5):
            with pytest.raises(ValueError, match="does not divide"):
                lse_pool1d(torch.ones(4), kernel_size)
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError):
            lse_pool1d(torch.ones(4), 2)

    def test_it_explains_itself(self):
        from lse_pool.op import lse_pool1d

        (decision,) = tritune.explain(lse_pool1d, torch.ones(4, 8), 4)
        assert (decision.op, decision.backend) == ("lse_pool1d", "torch")

    def test_it_is_tuned(self, tmp_path):
        """By the real command, in a process of its own: rehearsed, since there is no GPU."""
        command = [
            sys.executable, "-m", "tritune", "tune", "lse_pool1d", "--families", "lse_pool.layers", "--rehearse",
            "--budget", "60", "--direction", "fwd,bwd", "--shapes", "logits", "--out", str(tmp_path), "--json",
        ]  # fmt: skip
        source = Path(tritune.__file__).resolve().parents[1]
        env = {"PYTHONPATH": f"{source}:{ROOT / 'examples'}", "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        keys = json.loads(done.stdout)["keys"]
        assert [(key["kernel"], key["status"]) for key in keys] == [
            ("lse_pool", "tuned"), ("lse_pool_backward", "tuned"),
        ]  # fmt: skip
        assert all(trial["fault"] == "" for key in keys for trial in key["trials"])


@pytest.mark.interpret
class TestKernels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("shape, kernel_size", SHAPES)
    def test_values_and_gradients(self, shape, kernel_size, dtype, device):
        from lse_pool.op import lse_pool1d

        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        with tritune.use_backend("triton"):
            y = lse_pool1d(x, kernel_size)
            dy = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, x, dy)

        def composed(x, dy):
            y = x.unflatten(-1, (-1, kernel_size)).exp().mean(-1).log()
            return y, torch.autograd.grad(y, x, dy)

        assert_as_exact((y, dx), composed, x, dy)

    @pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter takes log(0) as the GPU does
    def test_infinities(self, device):
        from lse_pool.op import lse_pool1d

        x = torch.tensor([[-torch.inf, -torch.inf, 1.0, torch.inf, torch.nan, 0.0]], device=device)
        with tritune.use_backend("triton"):
            ours = lse_pool1d(x, 2)
        with tritune.use_backend("torch"):
            torch.testing.assert_close(ours, lse_pool1d(x, 2), equal_nan=True)

    def test_bytes(self):
        from lse_pool import kernel

        from tritune.perf import traffic

        problem = kernel.problem_of(torch.empty(1000, 6, device="meta"), 6)
        for tunable in (kernel.FORWARD, kernel.BACKWARD):
            for config in tunable.configs:
                counted = traffic.measure(tunable, problem, config)
                assert counted.total == tunable.moved_bytes(problem, config)


@pytest.mark.static
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled(target):
    from lse_pool import layers

    from tritune.autotune import static_profile
    from tritune.autotune.device import named
    from tritune.autotune.resolve import resolve

    for _, tunable, problem in layers.layers(target):
        (launch,) = tunable.launches(problem, resolve(tunable, problem, named(target)).config)
        one = static_profile.profile(launch, target)
        assert static_profile.faults(tunable, problem, one, target) == []
