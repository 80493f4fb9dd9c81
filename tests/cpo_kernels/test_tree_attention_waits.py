"""Claims about what a step may not do: read a device tensor on the host, or make the schedule again.

Without a GPU, the operations that would wait for one are counted on the CPU, and the `meta` device, which has no
numbers to read, stands for it.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpo_kernels import build_forest, tree_attention, tree_schedule
from tests.cpo_kernels.random_forests import random_sequences

WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "item", "is_nonzero", "_to_copy")
Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


class Refusing(TorchDispatchMode):
    """Fails on any operation that has to wait for a device, a copy to the CPU included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        stays = name == "_to_copy" and kwargs.get("device") in (None, args[0].device)
        assert name not in WAITING or stays, f"{name} waits for the device"
        return func(*args, **kwargs)


def heads(num_rows: int, device: str = "cpu") -> list[torch.Tensor]:
    shapes = [(num_rows, count, HEAD_DIM) for count in (Q_HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def test_a_layer_with_a_schedule_reads_nothing_back() -> None:
    forest = build_forest(random_sequences(1)[0], pad_to_multiple_of=16)
    schedule = forest.schedule()
    q, k, v = heads(len(forest.tokens))
    with Refusing():
        out = tree_attention(q, k, v, forest.subtree_end, schedule=schedule, impl="eager")
        out.backward(torch.ones_like(out))
    assert q.grad is not None
    with Refusing(), pytest.raises(AssertionError, match="equal waits"):
        tree_attention(q, k, v, forest.subtree_end.clone(), schedule=schedule, impl="eager")


def test_eager_runs_where_there_are_no_numbers_to_read() -> None:
    forest = build_forest(random_sequences(2)[0], pad_to_multiple_of=16).to("meta")
    q, k, v = heads(len(forest.tokens), "meta")
    out = tree_attention(q, k, v, forest.subtree_end, schedule=forest.schedule(), impl="eager")
    out.backward(torch.ones_like(out))
    assert out.shape == q.shape
    assert q.grad is not None


def test_a_forest_makes_each_schedule_once_and_takes_it_along() -> None:
    forest = build_forest([[1, 2, 3], [1, 4]])
    schedule = forest.schedule(16, 32)
    assert forest.schedule(16, 32) is schedule
    assert forest.schedule(32, 16) is not schedule
    there = forest.to("meta")
    assert there.schedule(16, 32).subtree_end is there.subtree_end
    assert there.schedule(16, 32) is there.schedule(16, 32)
    late = there.schedule(64, 64)  # made on the host from what the forest kept there
    assert late.subtree_end is there.subtree_end
    assert late.kv_query_stop.device.type == "meta"
    assert late.host_segment_stop.tolist() == forest.schedule(64, 64).host_segment_stop.tolist()
    assert there.to("meta").schedule(64, 64).subtree_end.device.type == "meta"


def test_a_changed_forest_makes_its_own_schedule() -> None:
    forest = build_forest([[1, 2, 3], [1, 4]])
    first = forest.schedule()
    changed = replace(forest, subtree_end=torch.tensor([4, 2, 3, 4], dtype=torch.int32))
    assert changed.schedule() is not first
    assert changed.schedule().subtree_end is changed.subtree_end


def test_on_a_device_a_schedule_of_another_forest_is_refused_without_reading() -> None:
    forest, other = (build_forest([[1, 2, token]]).to("meta") for token in (3, 4))
    q, k, v = heads(3, "meta")
    for schedule in (other.schedule(), forest.schedule().to("meta", forest.subtree_end.clone())):
        with pytest.raises(ValueError, match="made for another forest"):
            tree_attention(q, k, v, forest.subtree_end, schedule=schedule, impl="eager")
    out = tree_attention(q, k, v, forest.subtree_end, schedule=forest.schedule(), impl="eager")
    assert out.device.type == "meta"


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=["q", "k", "v", "q, v", "k, v"])
def test_eager_gradients_that_nobody_wants_are_not_made(wanted: tuple[int, ...]) -> None:
    """The others have the bits that they have when all are made."""
    forest = build_forest(random_sequences(3)[0], pad_to_multiple_of=16)
    leaves = heads(len(forest.tokens))
    full = torch.autograd.grad(tree_attention(*leaves, forest.subtree_end, impl="eager").square().sum(), leaves)
    made: list[torch.Tensor | None] = []
    some = [leaf if place in wanted else leaf.detach() for place, leaf in enumerate(leaves)]
    out = tree_attention(*some, forest.subtree_end, impl="eager")
    out.grad_fn.register_hook(lambda gradients, _: made.extend(gradients[:3]))
    out.square().sum().backward()
    assert len(made) == 3
    for place, gradient in enumerate(made):
        assert (gradient is not None) is (place in wanted)
        assert gradient is None or torch.equal(gradient, full[place])


def test_a_compiled_function_may_call_eager_tree_attention() -> None:
    """The graph breaks at the op, whose tiles differ from forest to forest."""
    forest = build_forest([[1, 2, 3], [1, 4, 5, 6]])
    schedule = tree_schedule(forest.subtree_end)
    q, k, v = heads(len(forest.tokens))

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tree_attention(q * 2, k, v, schedule.subtree_end, schedule=schedule, impl="eager") + 1

    plain = layer(q, k, v)
    compiled = torch.compile(layer, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(compiled, plain)
    for got, want in zip(
        torch.autograd.grad(compiled.sum(), (q, k, v)), torch.autograd.grad(plain.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(got, want)
