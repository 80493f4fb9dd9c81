"""A tensor core's arithmetic is not taken for a wrong kernel: eager poses as the kernels, its products summed as one sums.

A tensor core adds 8 (Ampere) or 16 (Hopper) products at a time into a float32 that it cuts off instead of rounding, so a
long sum is biased towards 0. Interpreters and CPUs round to nearest and do not show it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cpo_kernels.kernel_check import ModelShape
from cpo_kernels.linear_logprob import check, eager, results

CPU = torch.device("cpu")


def truncated(values: torch.Tensor) -> torch.Tensor:
    """float64 to float32 towards 0."""
    near = values.float()
    return torch.where(near.double().abs() > values.abs(), torch.nextafter(near, torch.zeros_like(near)), near)


class TensorCore:
    """What the check takes for the kernels: eager, with products `at_a_time`, and logits off by a factor."""

    def __init__(self, at_a_time: int, factor: float = 1.0) -> None:
        self.at_a_time, self.factor = at_a_time, factor

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[M, K] by [K, N], as float32."""
        total = torch.zeros(a.shape[0], b.shape[1])
        for start in range(0, a.shape[1], self.at_a_time):
            part = slice(start, start + self.at_a_time)
            total = truncated(total.double() + a[:, part].double() @ b[part].double())
        return total * self.factor

    @contextmanager
    def summing(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:  # the arithmetic of the hardware
            patch.setattr(results, "matmul_accumulated", self.product)
            yield

    def score(self, *arguments: Any, path: str = "") -> Any:
        with self.summing():
            return eager.score(*arguments)

    def row_gradients(self, *arguments: Any) -> Any:
        with self.summing():
            return eager.row_gradients(*arguments)

    def head_gradients(self, *arguments: Any) -> Any:
        with self.summing():
            return eager.head_gradients(*arguments)


@pytest.mark.parametrize("at_a_time", [8, 16])
@pytest.mark.parametrize("hidden_size", [1024, 4096])
def test_a_right_kernel_on_a_tensor_core_passes(hidden_size: int, at_a_time: int) -> None:
    shape = ModelShape(torch.bfloat16, hidden_size=hidden_size)
    ratios = check.check_linear_logprob(CPU, shape, TensorCore(at_a_time))
    assert max(ratios.values()) <= 1, max(ratios, key=lambda name: ratios[name])


def test_the_bound_of_one_rounding_would_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PRODUCTS_A_ROUNDING", 4096)
    ratios = check.check_linear_logprob(CPU, ModelShape(torch.bfloat16, hidden_size=4096), TensorCore(16))
    assert max(ratios.values()) > 1


def test_a_kernel_that_is_wrong_by_a_few_thousandths_is_refused_all_the_same() -> None:
    """Of a logit: less than a product that is rounded to bfloat16 on the way would be."""
    ratios = check.check_linear_logprob(CPU, ModelShape(torch.bfloat16, hidden_size=4096), TensorCore(16, 1 + 1e-3))
    assert max(ratios.values()) > 5
