"""Each training objective against code that shares nothing with it: padded rows, Hugging Face's loss, TRL's loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cpo_fast.config import TrainConfig
from cpo_fast.data.examples import Example
from cpo_fast.errors import DataError
from cpo_fast.train.objective import MicroBatch, MicroBatchResult, Objective, split_examples
from cpo_kernels.integrations.transformers import prepare
from tests.cpo_kernels.padded_oracle import padded_step, trained_gradients, worst_gradient_error
from tests.tiny import random_pairs, tiny_llama, with_lora


def models() -> tuple[nn.Module, nn.Module]:
    """A prepared model for packed forwards and its stock twin with the same weights."""
    return prepare(with_lora(tiny_llama())), with_lora(tiny_llama())


def as_examples(rows: list[Any], weights: list[float] | None = None) -> list[Example]:
    """Of (prompt, chosen, rejected) or (prompt, completion)."""
    weights = weights or [1.0] * len(rows)
    return [
        Example(tuple(prompt), tuple(tuple(response) for response in responses), "q", 1, "row", weight)
        for (prompt, *responses), weight in zip(rows, weights, strict=True)
    ]


def full_path_pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """FPO's data: whole winning and losing paths under one prompt that share their first steps."""
    prompt, shared = [5, 6, 7, 8], [20, 21, 22, 23]
    return [
        (prompt, [*shared, 30, 31, 32], [*shared, 40, 41]),
        (prompt, [*shared, 30, 31, 32], [*shared, 30, 50, 51, 52]),
        (prompt, [*shared, 30, 33], [60, 61, 62]),
    ]


def objective_step(model: nn.Module, pairs: list[Example], **options: Any) -> tuple[MicroBatchResult, dict]:
    model.zero_grad(set_to_none=True)
    result = Objective(model, TrainConfig(**options), "adapter_off")(MicroBatch(pairs))
    (result.loss_sum / len(pairs)).backward()
    return result, trained_gradients(model)


def test_fpo_packed_gradient_equals_the_padded_one() -> None:
    packed, stock = models()
    rows = full_path_pairs()
    result, gradients = objective_step(packed, as_examples(rows))
    expected = padded_step(stock, rows)
    assert abs(float(result.loss_sum) / len(rows) - float(expected.loss)) < 1e-6
    assert worst_gradient_error(gradients, expected.gradients) < 1e-5


def test_tokens_that_two_paths_share_cancel_in_fpo() -> None:
    packed, _ = models()
    whole = [row for row in full_path_pairs() if row[2][:4] == row[1][:4]]
    diverging = [(prompt + chosen[:4], chosen[4:], rejected[4:]) for prompt, chosen, rejected in whole]
    result, gradients = objective_step(packed, as_examples(whole))
    other, other_gradients = objective_step(packed, as_examples(diverging))
    assert abs(float(result.loss_sum - other.loss_sum)) < 1e-6
    assert worst_gradient_error(gradients, other_gradients) < 1e-5
    one, two = result.columns["chosen_logps"], other.columns["chosen_logps"]
    assert float((one - two).abs().min()) > 0.1  # the log-probs themselves do differ


def test_sft_packed_loss_and_gradient_equal_hugging_face_on_padded_rows() -> None:
    packed, stock = models()
    rows = [([5, 6, 7], [20, 21, 22, 2]), ([5, 6, 7], [20, 30, 2]), ([5, 6, 7, 8], [9]), ([9, 9], [20, 21, 40, 41, 42])]
    result = Objective(packed, TrainConfig(method="sft"))(MicroBatch(as_examples(rows)))
    (result.loss_sum / sum(len(c) for _, c in rows)).backward()
    width = max(len(p) + len(c) for p, c in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end], mask[row, :end] = torch.tensor(prompt + completion), 1
        labels[row, len(prompt) : end] = torch.tensor(completion)
    expected = stock(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    assert abs(float(result.loss_sum) / sum(result.num_scored) - float(expected)) < 1e-6
    assert worst_gradient_error(trained_gradients(packed), trained_gradients(stock)) < 1e-5
    assert result.num_tokens < result.num_sequence_tokens


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_each_loss_equals_the_one_of_that_name_in_trl(loss_type: str, tmp_path: Any) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    texts = [{"prompt": f"Q{i}\n", "chosen": f"yes {i}\n", "rejected": "no" * (i + 1)} for i in range(4)]
    shape = {"vocab_size": len(tokenizer)}
    options = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=1, loss_type=loss_type, beta=0.3,
        learning_rate=0.0, optim="sgd", max_grad_norm=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False,
        max_length=None, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    # the trainer copies a PeftModel's adapter as its reference; another start makes policy and reference differ
    stock = with_lora(tiny_llama(**shape))
    trainer = DPOTrainer(model=stock, args=options, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(trainer.model.named_parameters()):
        if ".default." in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    theirs = {name: p.grad for name, p in trainer.model.named_parameters() if ".default." in name}
    rows = trainer.train_dataset
    pairs = as_examples([(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows])
    model = prepare(trainer.model)
    model.zero_grad()
    result = Objective(model, TrainConfig(loss_type=loss_type, beta=0.3), "ref")(MicroBatch(pairs))
    (result.loss_sum / len(pairs)).backward()
    ours = {name: p.grad for name, p in model.named_parameters() if ".default." in name}
    assert abs(float(result.loss_sum) / 4 - float(expected)) < 1e-5 * max(1.0, float(expected))
    assert worst_gradient_error(ours, theirs) < 1e-4


def test_pair_weights_scale_each_pairs_share_of_loss_and_gradient() -> None:
    packed, _ = models()
    rows = random_pairs(num_questions=1, num_levels=2)[:3]
    single = [objective_step(packed, as_examples([row])) for row in rows]
    weights = [0.5, 2.0, 0.25]
    result, gradients = objective_step(packed, as_examples(rows, weights))
    expected = sum(w * float(one.loss_sum) for w, (one, _) in zip(weights, single, strict=True))
    assert abs(float(result.loss_sum) - expected) < 1e-5
    mixed = {name: sum(w * g[name] for w, (_, g) in zip(weights, single, strict=True)) / 3 for name in gradients}
    assert worst_gradient_error(gradients, mixed) < 1e-5


def test_nll_weight_adds_the_mean_negative_log_likelihood_of_the_chosen() -> None:
    packed, _ = models()
    pairs = as_examples(random_pairs(num_questions=1, num_levels=1))
    plain, _ = objective_step(packed, pairs)
    with_nll, _ = objective_step(packed, pairs, nll_weight=0.7)
    lengths = torch.tensor([len(pair.responses[0]) for pair in pairs])
    expected = plain.loss_sum - 0.7 * (plain.columns["chosen_logps"] / lengths).sum()
    assert abs(float(with_nll.loss_sum - expected)) < 1e-5


def test_the_first_example_too_large_for_a_micro_batch_is_named_with_its_tokens() -> None:
    """The first as they were given, though pairs are visited in the order of their prompts."""
    rows: list[Any] = [([9, 9], [1], [2]), ([5, 6, 7], [1, 2, 3], [1, 4]), ([1, 1, 1], [2, 2, 2], [3, 3, 3])]
    pairs = [replace(pair, source=f"file:{line}") for line, pair in enumerate(as_examples(rows), start=1)]
    with pytest.raises(DataError, match=r"^file:2: the pair alone has 7 tokens, more than train\.max_tokens=6; raise"):
        split_examples(pairs, 6)
    assert split_examples(pairs[:2], 7) == [[1], [0]]
    with pytest.raises(DataError, match=r"^row: the row has 4 tokens, more than train\.max_tokens=3; raise"):
        split_examples(as_examples([([1, 2], [3, 4])]), 3)
