"""Known ways to get packing wrong, each made on purpose: the comparison with padded rows must see every one.

A comparison that passes on right code proves little until it fails on wrong code. Each mutation changes the forest, the
plan or the attention hook of an otherwise untouched `packed_logps`, in fp64, where right code agrees to 1e-12; here the
error must exceed 1e-3.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cpo_kernels import Forest, LogprobPlan, build_forest, preference_loss
from cpo_kernels.integrations.transformers import packed_logps, prepare
from tests.cpo_kernels.model_copies import copies
from tests.cpo_kernels.padded_oracle import (
    PaddedStep,
    padded_step,
    pair_sequences,
    relative_error,
    trained_gradients,
    worst_gradient_error,
)
from tests.tiny import Pair, random_pairs, tiny_llama, with_exact_norms, with_lora

WIDE = 1e-3


# fp64 throughout, so that right code agrees to 1e-12
exact_model = copies(lambda: with_lora(with_exact_norms(tiny_llama(dtype=torch.float64))))
PAIRS = random_pairs(seed=1, num_questions=2)


@pytest.fixture(scope="module")
def padded() -> PaddedStep:
    """What the mutations are compared with."""
    return padded_step(exact_model(), PAIRS)


def backward_packed(
    model: nn.Module, pairs: list[Pair] = PAIRS, before_backward: Callable[[], Any] = lambda: None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean DPO loss and gradient by packed_logps, with a step of the caller's between forward and backward."""
    packed = packed_logps(model, *pair_sequences(pairs), reference="adapter_off")
    logps, reference = packed.segment_logps, packed.ref_segment_logps
    loss = preference_loss(logps[0::2], logps[1::2], reference[0::2], reference[1::2]).losses.mean()
    before_backward()
    loss.backward()
    return loss.detach(), trained_gradients(model)


def replace_everywhere(monkeypatch: pytest.MonkeyPatch, name: str, new: Callable[..., Any]) -> None:
    """Put `new` in place of `cpo_kernels.<name>` in every module of the package that imported it."""
    original = getattr(sys.modules["cpo_kernels"], name)
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "cpo_kernels" and getattr(module, name, None) is original:
            monkeypatch.setattr(module, name, new)


def mutate_forest(monkeypatch: pytest.MonkeyPatch, mutation: Callable[[Forest], Forest]) -> list[int]:
    """Every forest is built right, then mutated; returns a counter of how many were."""
    built = [0]

    def mutated(*args: Any, **options: Any) -> Forest:
        built[0] += 1
        return mutation(build_forest(*args, **options))

    replace_everywhere(monkeypatch, "build_forest", mutated)
    return built


def index_positions(forest: Forest) -> Forest:
    return replace(forest, position_ids=torch.arange(len(forest.tokens), dtype=torch.int32))


def one_row_late(forest: Forest) -> Forest:
    """Every subtree but those that end the line reaches one row further."""
    return replace(forest, subtree_end=(forest.subtree_end + 1).clamp(max=len(forest.tokens)))


def one_row_early(forest: Forest) -> Forest:
    return rows_early(forest, 1)


def two_rows_early(forest: Forest) -> Forest:
    return rows_early(forest, 2)


def rows_early(forest: Forest, count: int) -> Forest:
    """Every subtree loses its last `count` rows; a row still sees itself."""
    rows = torch.arange(len(forest.subtree_end), dtype=torch.int32)
    return replace(forest, subtree_end=torch.maximum(forest.subtree_end - count, rows + 1))


def sibling_swallowed(forest: Forest) -> Forest:
    """The first of two neighbouring siblings ends where the second does, so the second sees the first's tokens."""
    end, old, swallowed = forest.subtree_end.clone(), forest.subtree_end.tolist(), 0
    for row in range(len(old)):
        sibling = old[row]
        if row < swallowed or sibling >= len(old) or forest.parent_row[sibling] != forest.parent_row[row]:
            continue
        swallowed = old[sibling]
        end[row] = swallowed
    return replace(forest, subtree_end=end)


def no_branches(forest: Forest) -> Forest:
    """Plain causal attention along the line: every later row sees every earlier one."""
    return replace(forest, subtree_end=torch.full_like(forest.subtree_end, len(forest.tokens)))


def previous_row_predicts(forest: Forest) -> Forest:
    """The log-prob of a token is read from the row before it on the line instead of from its parent's."""
    return replace(forest, parent_row=torch.arange(-1, len(forest.tokens) - 1, dtype=torch.int32))


WRONG_FORESTS = [index_positions, two_rows_early, sibling_swallowed, no_branches, previous_row_predicts]


def test_the_untouched_code_agrees(padded: PaddedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patching itself changes nothing: without it the other tests could fail for the wrong reason."""
    model = prepare(exact_model())
    built = mutate_forest(monkeypatch, lambda forest: forest)
    loss, gradients = backward_packed(model)
    assert built == [1]
    assert relative_error(loss, padded.loss) <= 1e-12
    assert worst_gradient_error(gradients, padded.gradients) <= 1e-12


@pytest.mark.parametrize("mutation", WRONG_FORESTS)
def test_wrong_forest_is_seen(
    mutation: Callable[[Forest], Forest], padded: PaddedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare(exact_model())  # its probe would refuse a mutated forest, so it runs first
    built = mutate_forest(monkeypatch, mutation)
    loss, gradients = backward_packed(model)
    assert built == [1]
    assert relative_error(loss, padded.loss) > WIDE
    assert worst_gradient_error(gradients, padded.gradients) > WIDE


@pytest.mark.parametrize("mutation", [index_positions, no_branches, one_row_early, two_rows_early, sibling_swallowed])
def test_probe_of_prepare_refuses_a_wrong_forest(
    mutation: Callable[[Forest], Forest], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = mutate_forest(monkeypatch, mutation)
    with pytest.raises(ValueError, match=r"(?i)layer"):
        prepare(exact_model())
    assert built[0] >= 1


def test_end_one_row_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cuts into the next sibling's subtree, so it is no tree any more; every forward says so."""
    model = prepare(exact_model())
    mutate_forest(monkeypatch, one_row_late)
    with pytest.raises(ValueError, match="nest"):
        backward_packed(model)


def test_end_one_row_early_shows_in_the_logits_of_the_last_row() -> None:
    """The last row of a subtree is a leaf: it predicts nothing that is scored, so only its own logits can tell."""
    sequences, _ = pair_sequences(PAIRS)
    forest, model = build_forest(sequences), prepare(exact_model())
    with torch.no_grad():
        padded_logits = exact_model()(input_ids=torch.tensor([sequences[-1]])).logits[0, -1]
        last_row = int(forest.path_rows[-1])
        errors = []
        for candidate in (forest, one_row_early(forest)):
            logits = model(
                input_ids=candidate.tokens.long()[None],
                position_ids=candidate.position_ids.long()[None],
                subtree_end=candidate.subtree_end,
                use_cache=False,
            ).logits[0, last_row]
            errors.append(relative_error(logits, padded_logits))
    assert errors[0] <= 1e-12
    assert errors[1] > WIDE


def drop_shared_rows(forest: Forest, plan: LogprobPlan) -> torch.Tensor:
    """Keep a token only if no other target is read from its row: what packers without branch supervision score."""
    targets_of: dict[int, set[int]] = {}
    for row, target in zip(plan.rows.tolist(), plan.targets.tolist(), strict=True):
        targets_of.setdefault(row, set()).add(target)
    return torch.tensor([len(targets_of[row]) == 1 for row in plan.rows.tolist()])


def drop_children_of_branches(forest: Forest, plan: LogprobPlan) -> torch.Tensor:
    """Keep a token only if its parent row has a single child."""
    parents = forest.parent_row[forest.parent_row >= 0].long()
    num_children = torch.bincount(parents, minlength=len(forest.tokens))
    return num_children[plan.rows] == 1


def keep_one_target_per_row(forest: Forest, plan: LogprobPlan) -> torch.Tensor:
    """Keep the tokens of the first target of each row: what a table with one label per row can hold."""
    first_target: dict[int, int] = {}
    columns = zip(plan.rows.tolist(), plan.targets.tolist(), strict=True)
    return torch.tensor([first_target.setdefault(row, target) == target for row, target in columns])


@pytest.mark.parametrize("keep", [drop_shared_rows, drop_children_of_branches, keep_one_target_per_row])
def test_dropped_first_token_supervision_is_seen(
    keep: Callable[[Forest, LogprobPlan], torch.Tensor], padded: PaddedStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepare(exact_model())
    original, num_dropped = Forest.logprob_plan, []

    def thinned(forest: Forest, starts: Any) -> LogprobPlan:
        plan = original(forest, starts)
        kept = keep(forest, plan)
        num_dropped.append(int((~kept).sum()))
        return LogprobPlan.build(plan.rows[kept], plan.targets[kept], plan.segments[kept], plan.num_segments)

    monkeypatch.setattr(Forest, "logprob_plan", thinned)
    loss, gradients = backward_packed(model)
    assert num_dropped[0] > 0
    assert relative_error(loss, padded.loss) > WIDE
    assert worst_gradient_error(gradients, padded.gradients) > WIDE


def test_equal_first_tokens_would_hide_dropped_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the pairs above diverge at once: where siblings share their first token, it cancels out of the margin."""
    pairs: list[Pair] = [([5, 6, 7], [20, 21, 22], [20, 31]), ([5, 6, 7], [20, 21, 22], [20, 41, 42])]
    want = padded_step(exact_model(), pairs)
    model = prepare(exact_model())
    original = Forest.logprob_plan

    def without_first_tokens(forest: Forest, starts: list[int]) -> LogprobPlan:
        return original(forest, [start + 1 for start in starts])

    monkeypatch.setattr(Forest, "logprob_plan", without_first_tokens)
    loss, gradients = backward_packed(model, pairs)
    assert relative_error(loss, want.loss) <= 1e-12
    assert worst_gradient_error(gradients, want.gradients) <= 1e-12


def test_mean_of_means_over_ragged_micro_batches_is_seen(padded: PaddedStep) -> None:
    model = prepare(exact_model())
    losses = []
    for micro_batch in (PAIRS[:1], PAIRS[1:]):  # backward accumulates into .grad
        loss, _ = backward_packed(model, micro_batch)
        losses.append(loss)
    mean_of_means = {name: gradient / 2 for name, gradient in trained_gradients(model).items()}
    assert relative_error(sum(losses) / 2, padded.loss) > WIDE
    assert worst_gradient_error(mean_of_means, padded.gradients) > WIDE


def test_reference_with_the_adapter_on_is_seen(padded: PaddedStep) -> None:
    """A reference that equals the policy gives ln 2 and a gradient scaled by one half instead of by the margin."""
    model = prepare(exact_model())
    logps = packed_logps(model, *pair_sequences(PAIRS)).segment_logps
    frozen = logps.detach()
    loss = preference_loss(logps[0::2], logps[1::2], frozen[0::2], frozen[1::2]).losses.mean()
    loss.backward()
    assert relative_error(loss.detach(), padded.loss) > WIDE
    assert worst_gradient_error(trained_gradients(model), padded.gradients) > WIDE


def test_hook_restored_before_backward_under_reentrant_checkpointing_is_seen(padded: PaddedStep) -> None:
    """The recomputation then runs the stock attention: the loss is right and the gradient silently is not."""
    model = prepare(exact_model()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    base = model.get_base_model()
    loss, gradients = backward_packed(model, before_backward=lambda: base.set_attn_implementation("sdpa"))
    assert relative_error(loss, padded.loss) <= 1e-12
    assert worst_gradient_error(gradients, padded.gradients) > WIDE
