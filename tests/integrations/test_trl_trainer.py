"""`PackedDPOTrainer` against TRL's own, unmodified `DPOTrainer`: parameters, losses, gradients, metrics, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GraniteConfig, LlamaConfig, MixtralConfig
from trl import DPOConfig, DPOTrainer

from cpo_kernels import build_forest
from cpo_kernels.integrations.trl import REFUSED_OPTIONS, PackedDPOTrainer
from tests.integrations.trainers import (
    BATCH,
    adapted_model,
    base_model,
    largest_difference,
    make_trainer,
    save_model,
    text_pairs,
    trained,
)
from tests.tiny import tiny_model, tiny_tokenizer, with_lora

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
# attributes that TRL's loss reads, beyond the loss type
CASES: dict[str, dict[str, Any]] = {
    **{name: {"loss_types": [name], "loss_weights": [1.0]} for name in LOSS_TYPES},
    "mixture": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.3},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def trainers(folder: Path) -> tuple[DPOTrainer, DPOTrainer]:
    """TRL's trainer and the packed one; the policy differs from its reference, so no loss is at its start."""
    both = []
    for trainer_class in (DPOTrainer, PackedDPOTrainer):
        trainer = make_trainer(trainer_class, adapted_model(folder), folder)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in sorted(trainer.model.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        trainer.model.train()
        both.append(trainer)
    return both[0], both[1]


def loss_and_gradient(
    trainer: DPOTrainer, first: int = 0, **attributes: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[float]]]:
    """Loss, gradients and metrics of one batch, by the trainer's own compute_loss."""
    saved = {name: getattr(trainer, name) for name in attributes}
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trainer.label_smoothing = 0.1  # exo_pair needs one above 0
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(first, first + BATCH)])
    trainer.model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    for name, value in saved.items():
        setattr(trainer, name, value)
    return loss.detach(), gradients, {name: list(value) for name, value in trainer._metrics["train"].items()}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_trl(trainers: tuple[DPOTrainer, DPOTrainer], case: str) -> None:
    (loss, gradients, _), (our_loss, our_gradients, _) = (loss_and_gradient(t, 2, **CASES[case]) for t in trainers)
    assert float((our_loss - loss).abs()) <= 1e-5 * float(loss.abs())
    size = max(float(value.abs().max()) for value in gradients.values())
    assert size > 0
    assert largest_difference(our_gradients, gradients) <= 1e-4 * size


def test_cases_are_different_losses(trainers: tuple[DPOTrainer, DPOTrainer]) -> None:
    """A loss type that was not set would make the comparison above compare one loss with itself."""
    losses = {round(float(loss_and_gradient(trainers[1], 2, **case)[0]), 6) for case in CASES.values()}
    # a label smoothing of 0.1 keeps every pair of definitions apart
    assert len(losses) == len(CASES)


def test_metrics_are_those_of_trl_and_name_the_tokens_saved(trainers: tuple[DPOTrainer, DPOTrainer]) -> None:
    (_, _, theirs), (_, _, ours) = (loss_and_gradient(trainer) for trainer in trainers)
    assert set(ours) - set(theirs) == {"packing/tokens", "packing/padded_tokens", "packing/tokens_saved"}
    for name in set(theirs) - {"num_tokens"}:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    examples = [trainers[1].train_dataset[index] for index in range(BATCH)]
    rows = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in examples]
    tokens, padded = build_forest(rows).num_tokens, len(rows) * max(map(len, rows))
    assert ours["packing/tokens"] == [tokens]
    assert ours["packing/tokens_saved"] == [padded - tokens]
    assert padded > 3 * tokens


def movement_and_difference(folder: Path, make_model: Any, **options: Any) -> tuple[float, float, DPOTrainer]:
    """How far TRL's parameters move, how far ours end from them, and our trainer."""
    ends, start = [], {}
    for trainer_class in (DPOTrainer, PackedDPOTrainer):
        given = {name: value() if callable(value) else value for name, value in options.items()}
        trainer = make_trainer(trainer_class, make_model(folder), folder, **given)
        start = trained(trainer.model)
        trainer.train()
        ends.append(trained(trainer.model))
    return largest_difference(ends[0], start), largest_difference(ends[0], ends[1]), trainer


def test_twenty_steps_end_at_the_parameters_of_trl(folder: Path) -> None:
    movement, difference, trainer = movement_and_difference(folder, adapted_model)
    assert movement >= 1e-2
    assert difference <= 1e-4 * movement
    # the comparison has teeth: a slightly different objective ends elsewhere
    ours = trained(trainer.model)
    other = make_trainer(PackedDPOTrainer, adapted_model(folder), folder, beta=0.101)
    other.train()
    assert largest_difference(ours, trained(other.model)) > 1e-4 * movement
    print(f"movement {movement:.3e}, difference {difference:.1e}")
    logs = [row for row in trainer.state.log_history if "packing/tokens_saved" in row]
    assert len(logs) == 20
    assert all(row["packing/tokens_saved"] == row["packing/padded_tokens"] - row["packing/tokens"] > 0 for row in logs)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"precompute_ref_log_probs": True},
        {"max_length": 60, "truncation_mode": "keep_end", "gradient_accumulation_steps": 2},
    ],
    ids=lambda options: "+".join(options),
)
def test_option_is_kept(folder: Path, options: dict[str, Any]) -> None:
    movement, difference, _ = movement_and_difference(folder, adapted_model, max_steps=3, **options)
    assert difference <= 1e-4 * movement


def test_dropout_that_trl_switches_off_is_no_obstacle(folder: Path) -> None:
    """`disable_dropout`, TRL's default, sets the modules to 0 and leaves the adapter's configuration as it was."""
    movement, difference, _ = movement_and_difference(
        folder, lambda folder: with_lora(base_model(folder), dropout=0.1), max_steps=3
    )
    assert difference <= 1e-4 * movement


def test_scaled_logits_train_as_in_trl(folder: Path) -> None:
    def granite(_: Path) -> Any:
        return with_lora(tiny_model(GraniteConfig, vocab_size=len(tiny_tokenizer()), logits_scaling=0.5))

    movement, difference, _ = movement_and_difference(folder, granite, max_steps=3)
    assert difference <= 1e-4 * movement


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_reference_log_probs_to_be_precomputed_equal_those_of_trl(
    trainers: tuple[DPOTrainer, DPOTrainer], ld_alpha: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL caches them by data and model, so a run after TRL's own would read its numbers."""
    results = []
    for trainer in trainers:
        monkeypatch.setattr(trainer, "ld_alpha", ld_alpha)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(BATCH)])
        results.append(torch.stack(trainer.compute_ref_log_probs(trainer.model, batch)))
    assert torch.allclose(results[0], results[1], rtol=1e-5, atol=0)


def test_rewards_before_the_first_step_are_exactly_zero(folder: Path) -> None:
    trainer = make_trainer(PackedDPOTrainer, adapted_model(folder), folder)
    trainer.model.train()
    loss, _, metrics = loss_and_gradient(trainer)
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == [0.0]
    assert float(loss) == pytest.approx(0.693147, abs=1e-6)


def test_a_sixteen_bit_model_trains_close_to_trl(folder: Path) -> None:
    losses = []
    for trainer_class in (DPOTrainer, PackedDPOTrainer):
        model = adapted_model(folder).to(torch.bfloat16)
        trainer = make_trainer(trainer_class, model, folder, bf16=True, max_steps=4)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
    assert abs(losses[0][-1] - losses[0][0]) > 0.05


def test_the_default_call_trains_float32_weights_under_autocast(folder: Path) -> None:
    """A path and no option but the CPU: TRL loads float32 weights, and computes in bfloat16 with gradient checkpointing."""
    ends = []
    for trainer_class in (DPOTrainer, PackedDPOTrainer):
        config = DPOConfig(
            output_dir=str(folder / "run"), use_cpu=True, max_steps=2, report_to=[], save_strategy="no", logging_steps=1
        )
        assert config.bf16
        assert config.gradient_checkpointing
        trainer = trainer_class(str(folder / "model"), args=config, train_dataset=Dataset.from_list(text_pairs()))
        assert trainer.model.dtype == trainer.ref_model.dtype == torch.float32
        trainer.train()
        ends.append([row for row in trainer.state.log_history if "loss" in row])
    for ours, theirs in zip(ends[1], ends[0], strict=True):
        for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2), name
    assert ends[1][0]["rewards/chosen"] == ends[1][0]["rewards/rejected"] == 0.0


@pytest.mark.parametrize("make_model", [adapted_model, base_model], ids=["lora", "full"])
def test_autocast_ends_nearer_to_trl_than_another_order_of_the_rows(folder: Path, make_model: Any) -> None:
    """Three SGD steps under bfloat16 autocast; and no further from float32 than TRL, but for rows it rounds more often."""
    rows = text_pairs(3 * BATCH)

    def end(trainer_class: type[DPOTrainer], rows: list[dict[str, str]], bf16: bool = True) -> dict[str, torch.Tensor]:
        reference = {"ref_model": base_model(folder)} if make_model is base_model else {}
        trainer = make_trainer(
            trainer_class, make_model(folder), folder, rows=rows, max_steps=3, bf16=bf16, **reference
        )
        trainer.train()
        return trained(trainer.model)

    theirs, ours, exact = end(DPOTrainer, rows), end(PackedDPOTrainer, rows), end(DPOTrainer, rows, bf16=False)
    difference, reordered = largest_difference(ours, theirs), largest_difference(end(DPOTrainer, rows[::-1]), theirs)
    error, their_error = largest_difference(ours, exact), largest_difference(theirs, exact)
    print(f"from TRL {difference:.1e}, TRL reordered {reordered:.1e}; from float32 {error:.1e}, TRL {their_error:.1e}")
    assert difference <= reordered
    assert 0 < difference <= 2 * their_error
    assert error <= 2 * their_error


@pytest.mark.parametrize("sync", [False, True], ids=["separate reference", "synchronised reference"])
def test_full_fine_tuning_with_a_reference_model(folder: Path, sync: bool) -> None:
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5} if sync else {}
    movement, difference, _ = movement_and_difference(
        folder, base_model, max_steps=6, ref_model=lambda: base_model(folder), **options
    )
    assert difference <= 1e-4 * movement


def test_evaluation_and_compute_metrics_are_kept(folder: Path) -> None:
    """`compute_metrics` needs logits, which come from the model's ordinary forward."""
    results, seen = [], []
    for trainer_class in (DPOTrainer, PackedDPOTrainer):
        trainer = make_trainer(
            trainer_class,
            adapted_model(folder),
            folder,
            eval_dataset=Dataset.from_list(text_pairs(BATCH)),
            compute_metrics=lambda prediction: {"mean": float(prediction.predictions.mean())},
        )
        results.append(trainer.evaluate())
        seen.append(trainer)
    for name in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_mean"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-4, abs=1e-6), name
    assert results[1]["eval_packing/tokens_saved"] > 0


@pytest.mark.parametrize("option", REFUSED_OPTIONS)
def test_option_is_refused_by_name(folder: Path, option: str) -> None:
    config = DPOConfig(output_dir=str(folder / "run"), use_cpu=True, bf16=False)
    setattr(config, option, True)
    with pytest.raises(ValueError, match=f"does not support {option}="):
        PackedDPOTrainer(model=base_model(folder), args=config, train_dataset=Dataset.from_list(text_pairs(BATCH)))


def test_vision_data_is_refused(folder: Path) -> None:
    rows = [row | {"image": "x"} for row in text_pairs(BATCH)]
    with pytest.raises(ValueError, match="does not support vision data"):
        make_trainer(PackedDPOTrainer, base_model(folder), folder, rows=rows)


def test_dropout_and_expert_losses_are_refused(folder: Path) -> None:
    def make(model: Any, **options: Any) -> None:
        make_trainer(PackedDPOTrainer, model, folder, ref_model=base_model(folder), **options)

    with pytest.raises(ValueError, match="does not support disable_dropout=False"):
        make(with_lora(base_model(folder), dropout=0.1), disable_dropout=False)
    functional = tiny_model(LlamaConfig, attention_dropout=0.1, vocab_size=len(tiny_tokenizer()))
    with pytest.raises(ValueError, match=r"disable_dropout=True: .*self_attn.*attention_dropout=0\.1"):
        make(functional)  # TRL switches off modules only
    with pytest.raises(ValueError, match="activated LoRA"):
        make(with_lora(base_model(folder), alora_invocation_tokens=[5, 6]))
    experts = tiny_model(MixtralConfig, num_local_experts=2, vocab_size=len(tiny_tokenizer()), sliding_window=None)
    with pytest.raises(ValueError, match="does not support router_aux_loss_coef"):
        make(experts)


def test_noise_that_comes_after_the_trainer_is_refused_at_the_step(folder: Path) -> None:
    trainer = make_trainer(PackedDPOTrainer, adapted_model(folder), folder, max_steps=1)
    trainer.neftune_noise_alpha = 5.0  # its hook is put on the embeddings where training begins
    with pytest.raises(ValueError, match=r"embed_tokens.*neftune_noise_alpha=5"):
        trainer.train()


def test_input_without_a_place_in_a_forest_is_refused(trainers: tuple[DPOTrainer, DPOTrainer]) -> None:
    trainer = trainers[1]
    batch = dict(trainer.data_collator([trainer.train_dataset[index] for index in range(BATCH)]))
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with pytest.raises(ValueError, match="token_type_ids"):
        trainer.compute_loss(trainer.model, batch)
