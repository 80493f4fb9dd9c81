"""Packed log-probs behind a padded batch against the padded batch itself."""

import pytest
import torch

from cpo_kernels.integrations.padded import packed_token_logps
from cpo_kernels.integrations.transformers import prepare
from tests.tiny import random_pairs, tiny_llama, with_exact_norms, with_lora


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [B, L] of sequences that share prefixes, padded by 0 on one side."""
    rows = [torch.tensor(prompt + answer) for prompt, *both in random_pairs() for answer in both]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_scored_token_equals_the_padded_forward(side: str) -> None:
    model = with_lora(with_exact_norms(tiny_llama(dtype=torch.float64)))
    ids, mask = padded_batch(side)
    scored = mask.bool() & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.6)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits[:, :-1]
    expected = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).squeeze(2)
    # the first real token of a row is predicted from padding: not scored
    keep = (scored[:, 1:] & mask[:, :-1].bool()).double()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = torch.randn(keep.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(logps: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((logps * keep * weights).sum(), [model.get_parameter(n) for n in names]))

    wanted = gradients(expected)
    packed = packed_token_logps(prepare(model), ids, mask, scored, ("entropy", "mean_logit", "is_top1"))
    assert torch.allclose(packed.logps, expected.detach() * keep, rtol=0, atol=1e-10)
    assert torch.all(packed.logps[keep == 0] == 0)
    for ours, theirs in zip(gradients(packed.logps), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    entropy = -(torch.log_softmax(logits, -1).exp() * torch.log_softmax(logits, -1)).sum(-1)
    assert torch.allclose(packed.outputs["entropy"], entropy.detach() * keep, rtol=0, atol=1e-10)
    assert torch.allclose(packed.outputs["mean_logit"], logits.mean(-1).detach() * keep, rtol=0, atol=1e-10)
    assert torch.equal(packed.outputs["is_top1"], (logits.argmax(-1) == ids[:, 1:]) & keep.bool())
    assert packed.num_tokens < mask.sum() <= packed.num_padded_tokens == ids.numel()


def test_a_batch_without_scored_tokens_is_a_differentiable_zero() -> None:
    model = prepare(with_lora(tiny_llama()))
    ids, mask = padded_batch("right")
    packed = packed_token_logps(model, ids, mask, torch.zeros_like(mask))
    packed.logps.sum().backward()
    assert torch.all(packed.logps == 0)


def test_a_gap_in_a_row_is_refused() -> None:
    ids, mask = padded_batch("right")
    mask[1, 3] = 0
    with pytest.raises(ValueError, match="row 1"):
        packed_token_logps(prepare(tiny_llama()), ids, mask, mask.bool())
    with pytest.raises(ValueError, match="expected input_ids"):
        packed_token_logps(prepare(tiny_llama()), ids, mask, mask[:, 1:])
