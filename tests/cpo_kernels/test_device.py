"""Moving forest, schedule and plan together; the `meta` device stands for a GPU, which tests cannot count on."""

import pytest
import torch

from cpo_kernels import build_forest
from cpo_kernels.device import matmul_accumulated, to_device


def test_every_tensor_moves_and_the_schedule_stays_the_forests_own() -> None:
    forest = build_forest([[3, 4, 5, 6], [3, 4, 7]])
    value = (forest, forest.schedule(16, 16), forest.logprob_plan([1, 2]))
    moved_forest, schedule, plan = to_device(value, "meta")
    for moved, original in zip((moved_forest, schedule, plan), value, strict=True):
        assert type(moved) is type(original)
        for name, tensor in vars(original).items():
            if isinstance(tensor, torch.Tensor):
                expected = "cpu" if name.startswith("host_") else "meta"
                assert getattr(moved, name).device.type == expected, name
                assert tensor.device.type == "cpu", name
    assert schedule.subtree_end is moved_forest.subtree_end
    assert (moved_forest.num_tokens, plan.num_segments, schedule.block_q) == (5, 2, 16)


def test_what_is_kept_beside_the_fields_moves_along() -> None:
    forest = build_forest([[3, 4]])
    object.__setattr__(forest, "_kept", {"ends": forest.subtree_end, "host": [1, 2]})
    moved = to_device(forest, "meta")
    assert moved._kept["ends"] is moved.subtree_end  # type: ignore[attr-defined]
    assert moved._kept["host"] == [1, 2]  # type: ignore[attr-defined]


def test_what_is_there_already_is_given_back_itself() -> None:
    forest = build_forest([[3, 4]])
    assert to_device(forest, "cpu") is forest
    there = to_device((forest, forest.schedule(16, 16)), "meta")
    assert to_device(there, "meta") is there


def test_what_a_copy_keeps_is_its_own() -> None:
    """A schedule made for the copy must not be found by the original."""
    forest = build_forest([[3, 4]])
    assert to_device(forest, "meta").schedule().subtree_end.device.type == "meta"
    assert forest.schedule().subtree_end is forest.subtree_end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_16_bit_numbers_on_a_gpu_has_a_gradient(dtype: torch.dtype) -> None:
    """`impl="reference"` differentiates through it."""
    a, b = (torch.empty(shape, device="meta", dtype=dtype, requires_grad=True) for shape in ((4, 8), (8, 3)))
    product = matmul_accumulated(a, b)
    assert product.dtype == torch.float32
    for gradient in torch.autograd.grad(product.sum(), (a, b)):
        assert gradient.dtype == dtype
    with torch.no_grad():
        assert matmul_accumulated(a, b).dtype == torch.float32
