"""The tests' own yardstick: what it lets through and what it stops."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import conftest
import pytest
import torch
from harness import EPSILON, FEW, Case, Errors, assert_as_exact, assert_close, check, in_turn, product

pytestmark = pytest.mark.torch
EXACT = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)


def off_by(error: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The reference with its last element, the largest, off by ``error`` times itself."""
    return torch.cat([EXACT[:-1], EXACT[-1:] * (1 + error)]).to(dtype)


class TestAssertClose:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_twice_torchs_error_and_an_epsilon(self, dtype):
        step = 8 * EPSILON[dtype]
        assert_close("y", off_by(step, dtype), EXACT, off_by(step, dtype))
        assert_close("y", off_by(2 * step, dtype), EXACT, off_by(step, dtype))
        with pytest.raises(AssertionError, match="y: max error"):
            assert_close("y", off_by(3 * step, dtype), EXACT, off_by(step, dtype))

    def test_rms_is_judged_too(self):
        everywhere = (EXACT * (1 + 2e-6)).float()
        with pytest.raises(AssertionError, match="rms"):
            assert_close("y", everywhere, EXACT, off_by(1e-6))

    def test_other_samples_count_for_the_largest_error(self):
        exact = torch.linspace(1, 2, 100, dtype=torch.float64)
        everywhere, one = (exact * (1 + 1e-6)).float(), exact.float()
        one[-1] *= 1 + 3e-6
        errors, first = Errors.of(one, exact), Errors.of(everywhere, exact).allowed(EPSILON[torch.float32])
        assert errors.max > first.max and errors.rms < first.rms
        assert_close("y", one, exact, everywhere, [Errors(2e-6, 0.0)])
        with pytest.raises(AssertionError, match="max error"):
            assert_close("y", one, exact, everywhere, [Errors(0.0, 0.0), Errors(1e-6, 1e-6)])

    def test_the_root_mean_square_of_many_is_held_to_the_first(self):
        for count in (FEW, FEW - 1):
            exact = torch.linspace(1, 2, count, dtype=torch.float64)
            one, everywhere = exact.float(), (exact * (1 + 3e-6)).float()
            one[-1] *= 1 + 1e-6
            is_rejected = pytest.raises(AssertionError, match="rms") if count == FEW else contextlib.nullcontext()
            with is_rejected:
                assert_close("y", everywhere, exact, one, [Errors(1.0, 1.0)])

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, wrong):
        ours, exact = off_by(0.0), EXACT.clone()
        ours[1] = wrong
        with pytest.raises(AssertionError):
            assert_close("y", ours, exact, off_by(0.0))
        exact[1] = wrong
        assert_close("y", ours, exact, off_by(0.0))
        with pytest.raises(AssertionError, match="NaN or inf misplaced"):
            assert_close("y", off_by(0.0), exact, ours)

    def test_shape_and_dtype(self):
        with pytest.raises(AssertionError, match="shape"):
            assert_close("y", off_by(0.0)[:3], EXACT, off_by(0.0))
        with pytest.raises(AssertionError, match="dtype"):
            assert_close("y", off_by(0.0, torch.float16), EXACT, off_by(0.0))


class TestAssertAsExact:
    def test_each_result_is_held_to_torchs_error(self):
        def outcome(layer, x):
            y = layer(x)
            return y, torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

        x, layer = torch.randn(5, 7, requires_grad=True), torch.nn.Linear(7, 3)
        y, grads = outcome(layer, x)
        assert_as_exact((y, grads), outcome, layer, x)
        for index in range(3):
            wrong = [*grads[:index], grads[index] * (1 + 2e-6), *grads[index + 1 :]]
            with pytest.raises(AssertionError, match=f"result {index + 1}: max error"):
                assert_as_exact((y, wrong), outcome, layer, x)
        with pytest.raises(ValueError, match="zip"):
            assert_as_exact((y, grads[:2]), outcome, layer, x)

    def test_a_module_in_half_precision_and_what_is_not_finite(self):
        x, layer = torch.randn(5, 7).half(), torch.nn.Linear(7, 3).half()
        x[1, 2], x[4, 0] = float("nan"), float("inf")
        y = layer(x)
        assert_as_exact(y, layer, x)
        assert layer.weight.dtype == torch.float16
        with pytest.raises(AssertionError, match="NaN or inf misplaced"):
            assert_as_exact(y.nan_to_num(), layer, x)


class TestCheck:
    SHAPES = {"x": (3, 5), "w": (5, 4)}

    def case(self, op) -> Case:
        return Case("product", op, lambda x, w: x @ w, self.SHAPES)

    def test_a_wrong_output_and_a_wrong_gradient_are_named(self):
        class WrongGradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, w):
                ctx.save_for_backward(x, w)
                return x @ w

            @staticmethod
            def backward(ctx, dy):
                x, w = ctx.saved_tensors
                return dy @ w.mT, 1.001 * (x.mT @ dy)

        check(self.case(lambda x, w: x @ w), torch.float32, "nchw", "cpu", "torch")
        with pytest.raises(AssertionError, match=r"^output: max error"):
            check(self.case(lambda x, w: 1.001 * (x @ w)), torch.float32, "nchw", "cpu", "torch")
        case = self.case(lambda x, w: WrongGradient.apply(x, w))  # noqa: PLW0108 - no keywords before torch 2.13
        with pytest.raises(AssertionError, match=r"^grad w: max error"):
            check(case, torch.float32, "nchw", "cpu", "torch")

    def test_an_element_nobody_wrote(self):
        def forgetful(x, w):
            y = torch.empty_like(x @ w)
            y[:, 1:] = (x @ w)[:, 1:]
            return y

        with pytest.raises(AssertionError, match="output"):
            check(self.case(forgetful), torch.float32, "nchw", "cpu", "torch")

    def test_another_layout(self):
        with pytest.raises(AssertionError, match="layout"):
            check(self.case(lambda x, w: (w.mT @ x.mT).mT), torch.float32, "nchw", "cpu", "torch")

    @pytest.mark.parametrize("seed", range(20))
    def test_torch_passes_its_own_test(self, seed):
        """The same layer, its sums in another order: with one sample of torch's error, one in thirty fails."""
        order = torch.randperm(12)
        weights = {"input": (3, 7, 12), "w_ih": (45, 12), "w_hh": (45, 15), "b_ih": (45,), "h0": (1, 7, 15)}

        def gru(input, w_ih, w_hh, b_ih, h0, permute=False):
            if permute:
                input, w_ih = input[..., order], w_ih[..., order]
            parameters = [w_ih / 4, w_hh / 4, b_ih, torch.zeros_like(b_ih)]
            return torch._VF.gru(input, h0, parameters, True, 1, 0.0, True, False, False)[0]

        torch.manual_seed(seed)
        other = Case("gru", lambda **arguments: gru(**arguments, permute=True), gru, weights)
        check(other, torch.float32, "nchw", "cpu", "torch")


def test_the_order_on_a_gpu_is_random_and_the_same_in_each_process():
    """pytest-xdist compares them."""

    def ordered(tier: str) -> list[str]:
        items = [SimpleNamespace(name=str(n), add_marker=lambda _: None) for n in range(100)]
        conftest.pytest_collection_modifyitems(SimpleNamespace(stash={conftest.tier_key: tier}), items)
        return [item.name for item in items]

    written = [str(n) for n in range(100)]
    assert ordered("torch") == written
    once = ordered("gpu")
    assert once != written and sorted(once) == sorted(written)
    assert ordered("gpu") == once


def test_rows_of_the_short_suite():
    """Each two values meet in them, and the others add the rest of the product."""
    cases = [Case(str(number), abs, abs, {}) for number in range(6)]
    rows = product(cases, ("a", "b", "c"), ("x", "y"))
    assert len({row.id for row in rows}) == len(rows) == 36
    short = [(row.values[0].id, *row.values[1:]) for row in rows if not row.marks]
    assert len(short) == 18
    for one, other in itertools.combinations(range(3), 2):
        pairs = {(row[one], row[other]) for row in short}
        assert len(pairs) == len({row[one] for row in short}) * len({row[other] for row in short})


def test_rows_in_turn():
    """One for each case; every combination is met where there are as many cases."""
    rows = in_turn("fghijk", ("a", "b", "c"), ("x", "y"))
    short = [row.values for row in rows if not row.marks]
    assert len(rows) == 36
    assert [case for case, *_ in short] == list("fghijk")
    assert len({tuple(choice) for _, *choice in short}) == 6
