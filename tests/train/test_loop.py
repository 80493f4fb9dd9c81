"""Claims about the training loop, each on real files, DeepSpeed and a tiny Llama."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from cpo_fast.cli.train import TrainingScreen
from cpo_fast.config import TrainConfig
from cpo_fast.errors import ConfigError, CpoFastError, DataError, EnvironmentProblem, NonFiniteError
from cpo_fast.train.loop import train
from cpo_fast.train.objective import Objective
from cpo_fast.train.policy import build_policy
from cpo_kernels.implementation import DEFAULT_BY_DEVICE
from cpo_kernels.integrations.lora import RecastLinear
from cpo_kernels.integrations.transformers import proof
from cpo_kernels.self_check import CHECKS
from tests.data.hand_made import node, tree, write_trees
from tests.processor import Processor
from tests.tiny import randomize_lora
from tests.train.runs import CONSTANT_RATE, MakeConfig, adapter_of, id_rows, largest_difference, metrics_of, sgd


def test_first_step_has_loss_ln2_and_rewards_exactly_zero(make_config: MakeConfig) -> None:
    first = metrics_of(make_config(batch_pairs=36, reference="online"))[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0
    assert abs(first["loss"] - math.log(2)) < 1e-7
    assert first["grad_norm"] > 0


def test_metrics_carry_the_names_of_trl_and_the_tokens_saved(make_config: MakeConfig) -> None:
    last = metrics_of(make_config())[-1]
    of_trl = "entropy logits/chosen logits/rejected logps/chosen logps/rejected loss mean_token_accuracy num_tokens"
    of_trl += " rewards/accuracies rewards/chosen rewards/margins rewards/rejected grad_norm learning_rate epoch"
    assert set(of_trl.split()) <= set(last)
    assert {"rewards/accuracies/step_1", "rewards/accuracies/step_2", "rewards/accuracies/step_3"} <= set(last)
    assert 0.5 < last["tokens/saved"] < 1
    assert last["tokens/computed"] < last["tokens/rows"]
    assert last["rewards/margins"] > 0


def test_token_counts_are_those_of_the_rows(make_config: MakeConfig) -> None:
    rows = id_rows()
    config = make_config(batch_pairs=len(rows), num_epochs=1, max_tokens=100_000)
    expected = 0
    for row in rows:
        eos = row["chosen_final"]
        expected += (
            2 * len(row["prompt_token_ids"]) + len(row["chosen_token_ids"]) + len(row["rejected_token_ids"]) + 2 * eos
        )
    assert metrics_of(config)[0]["num_tokens"] == expected


@pytest.mark.parametrize("options", [{"max_tokens": 60}, {"max_tokens": 100_000}, {"reference": "cached"}])
def test_adapter_does_not_depend_on_micro_batches_or_reference_mode(
    make_config: MakeConfig, options: dict[str, Any]
) -> None:
    def difference(**changes: Any) -> float:
        return largest_difference(expected, adapter_of(make_config(**(usual | changes)), make_optimizer=sgd))

    usual = {**CONSTANT_RATE, "reference": "online"}
    expected = adapter_of(make_config(**usual), make_optimizer=sgd)
    assert difference(**options) < 1e-6
    assert difference(lr=0.51) > 1e-5


def test_mean_of_micro_batch_means_would_be_noticed(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = adapter_of(make_config(**CONSTANT_RATE, max_tokens=90), make_optimizer=sgd)
    score = Objective.score

    def mean_instead(self: Objective, batch: Any) -> Any:
        result = score(self, batch)
        object.__setattr__(result, "loss_sum", result.loss_sum / len(batch.examples) * 4)
        return result

    monkeypatch.setattr(Objective, "score", mean_instead)
    wrong = adapter_of(make_config(**CONSTANT_RATE, max_tokens=90), make_optimizer=sgd)
    assert largest_difference(expected, wrong) > 1e-4


def test_same_run_twice_gives_the_same_bytes(make_config: MakeConfig) -> None:
    one, two = (train(make_config(num_epochs=1)) for _ in range(2))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one.adapter_path / name).read_bytes() == (two.adapter_path / name).read_bytes()


def test_checkpointing_changes_nothing(make_config: MakeConfig) -> None:
    kept, recomputed = (
        adapter_of(make_config(**CONSTANT_RATE, num_epochs=1, gradient_checkpointing=option), make_optimizer=sgd)
        for option in ("off", "non_reentrant")
    )
    assert largest_difference(kept, recomputed) < 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_the_same_adapter(make_config: MakeConfig, stage: int) -> None:
    expected = adapter_of(make_config(num_epochs=1))
    assert largest_difference(expected, adapter_of(make_config(num_epochs=1, zero_stage=stage))) < 1e-5


def test_max_steps_alone_repeats_the_data_and_beside_epochs_the_first_end_is_said(make_config: MakeConfig) -> None:
    def run(**train_options: Any) -> tuple[Any, list[dict[str, Any]]]:
        config = make_config()
        options = {"batch_pairs": 12, "lr": 0.01, "max_tokens": 400, **train_options}
        config = config.model_copy(update={"train": TrainConfig(**options), "run": f"{config.run}-{train_options}"})
        result = train(config)
        return result, [json.loads(line) for line in result.metrics_path.read_text().splitlines()]

    alone, lines = run(max_steps=14)  # three steps an epoch: more than the four epochs of the default
    assert [line["epoch"] for line in lines] == pytest.approx([step / 3 for step in range(1, 15)])
    assert alone.remarks == ()
    rates = [line["learning_rate"] for line in lines]
    assert rates.index(max(rates)) == 2  # ceil(0.1 * 14) steps of warm-up: the schedule is that of 14 steps
    assert 0 < rates[-1] < 0.02 * max(rates)
    _, by_epochs = run(num_epochs=5, max_steps=14)
    timeless = [[{**line, "seconds": 0} for line in each] for each in (lines, by_epochs)]
    assert timeless[0] == timeless[1]
    short, lines = run(num_epochs=1, max_steps=14)
    assert len(lines) == short.num_steps == 3
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.0, 0.01, 0.005])
    (remark,) = short.remarks
    assert remark.startswith(
        "training ended after step 3 and not 14 (train.max_steps), because train.num_epochs=1 passes"
    )
    assert len(run(max_steps=2)[1]) == 2


def test_order_questions_trains_every_pair_once_and_saves_more(make_config: MakeConfig) -> None:
    by_pairs = metrics_of(make_config(num_epochs=1, batch_order="pairs", batch_pairs=9))
    by_questions = metrics_of(make_config(num_epochs=1, batch_order="questions", batch_pairs=9))
    assert sum(line["pairs"] for line in by_pairs) == sum(line["pairs"] for line in by_questions) == 36
    assert sum(line["tokens/computed"] for line in by_questions) < sum(line["tokens/computed"] for line in by_pairs)


def test_peft_loads_the_adapter_with_bit_equal_logits(make_config: MakeConfig, tiny_folder: Path) -> None:
    config = make_config(num_epochs=1)
    policy = build_policy(config)
    result = train(config, policy.model, policy.tokenizer)
    ids = torch.tensor([[7, 9, 30, 200, 41, 5]])
    base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32)
    untrained = base(ids).logits.clone()
    loaded = PeftModel.from_pretrained(base, result.adapter_path).eval()
    with torch.no_grad():
        ours, theirs = policy.model.eval()(ids).logits, loaded(ids).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(theirs, untrained)


def test_training_from_an_adapter_starts_at_zero_rewards(make_config: MakeConfig) -> None:
    first = train(make_config(num_epochs=1))
    config = make_config(model={"adapter": str(first.adapter_path)}, reference="online", batch_pairs=36)
    line = metrics_of(config)[0]
    assert line["rewards/chosen"] == 0.0
    assert line["rewards/rejected"] == 0.0


def test_policy_that_is_not_its_reference_is_refused(make_config: MakeConfig) -> None:
    config = make_config(reference="online")
    policy = build_policy(config)
    randomize_lora(policy.model)
    with pytest.raises(CpoFastError, match="self-test: rewards at step 0"):
        train(config, policy.model, policy.tokenizer)


def test_nonfinite_loss_stops_before_the_update_and_names_rows(make_config: MakeConfig) -> None:
    """The first step throws the weights so far away that the second has no finite loss."""
    config = make_config(reference="online", lr=1e30, warmup_ratio=0.0)
    policy = build_policy(config)
    weights = {name: value for name, value in policy.model.state_dict().items() if "lora_" in name}
    after_a_step: dict[str, torch.Tensor] = {}

    def remember(values: dict[str, Any], num_steps: int) -> None:
        assert values["step"] == 1
        after_a_step.update({name: value.clone() for name, value in weights.items()})

    with pytest.raises(
        NonFiniteError, match=r"the loss of \d+ rows is not finite at step 2 \(rows .*pairs\.jsonl:\d+"
    ) as raised:
        train(config, policy.model, policy.tokenizer, remember)
    assert raised.value.exit_code == 7
    assert after_a_step
    assert all(torch.equal(value, weights[name]) for name, value in after_a_step.items())


def test_lora_target_without_a_module_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"target_modules": ("q_proj", "fc_in")})})
    with pytest.raises(ConfigError, match="'fc_in' matches no module"):
        train(config)


def test_ids_of_another_tokenizer_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    row = id_rows()[0] | {"chosen_token_ids": [5, 100_000]}
    (tmp_path / "foreign.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"foreign\.jsonl:1: token id 100000"):
        train(make_config(data={"path": str(tmp_path / "foreign.jsonl")}))


def test_budget_below_one_pair_names_the_option(make_config: MakeConfig) -> None:
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:\d+: the pair alone has \d+ tokens, more than train\.max_tokens=20"
    ):
        train(make_config(max_tokens=20))


@pytest.fixture
def tree_file(tmp_path: Path) -> Path:
    """Trees of three questions: two levels, one winning path, ids inside the tiny vocabulary."""
    nodes = [node(0, -1, 1), node(1, -1, 1), node(2, 0, 2, "4"), node(3, 0, 2, "5")]
    trees = [tree(nodes, (2,), f"t{n}", question_token_ids=(50, 60 + n)) for n in range(3)]
    return write_trees(tmp_path / "trees.jsonl", trees)


@pytest.mark.parametrize(
    ("train_options", "rule"), [({"method": "sft", "lr": 0.05}, "all"), ({"lr": 0.05}, "all"), ({"lr": 0.05}, "fpo")]
)
def test_trees_are_trained_on_directly_by_every_method(
    make_config: MakeConfig, tree_file: Path, train_options: dict[str, Any], rule: str
) -> None:
    config = make_config(data={"path": str(tree_file)}, num_epochs=8, **train_options)
    config = config.model_copy(update={"pairs": config.pairs.model_copy(update={"rule": rule})})
    values = metrics_of(config)
    assert values[-1]["loss"] < values[0]["loss"] - 0.01
    if train_options.get("method") == "sft":
        assert {"loss", "entropy", "mean_token_accuracy", "completions", "tokens/saved"} <= set(values[0])
    else:
        assert values[0]["pairs"] == {"all": 6, "fpo": 3}[rule]


def test_every_line_of_the_metrics_names_the_kernels_that_ran(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resolved once at the start: what the environment says later changes nothing."""
    monkeypatch.setenv("CPO_KERNELS_IMPL", "reference")
    lines = metrics_of(make_config(max_steps=2))
    assert [line["impl/tree_attention"] for line in lines] == ["reference"] * 2
    monkeypatch.delenv("CPO_KERNELS_IMPL")
    lines = metrics_of(
        make_config(max_steps=2, reference="online"),
        progress=lambda values, num_steps: monkeypatch.setenv("CPO_KERNELS_IMPL", "no_such_kernel"),
    )
    assert [(line["impl/tree_attention"], line["impl/linear_logprob"]) for line in lines] == [("native", "eager")] * 2


def test_training_says_the_dtype_of_the_base_weights(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture, processor: Processor
) -> None:
    processor(bf16_ratio=None)
    with caplog.at_level(logging.INFO, logger="cpo_fast.train"):
        for dtype in ("auto", "bfloat16"):
            build_policy(make_config(model={"dtype": dtype, "device": "cpu"}))
    said = [message for message in caplog.messages if message.startswith("base weights")]
    assert said == ["base weights: float32 on cpu", "base weights: bfloat16 on cpu"]


def test_kernels_that_cannot_run_on_the_device_are_refused_by_option(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.impl: triton cannot run on cpu; choose one of eager"):
        train(make_config(impl="triton"))


def test_kernels_that_fail_their_check_end_the_run_as_a_problem_of_the_machine(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEFAULT_BY_DEVICE, "cpu", "triton")
    monkeypatch.setitem(CHECKS, "tree_attention", lambda device, shape: {"out": 2.0})
    with pytest.raises(EnvironmentProblem, match=r"^tree_attention: .* wrong on cpu.*CPO_KERNELS_IMPL=eager") as raised:
        train(make_config())
    assert raised.value.exit_code == 5


def test_kept_lora_input_does_not_change_the_adapter_of_a_16_bit_base(make_config: MakeConfig) -> None:
    recast, peft = (
        make_config(num_epochs=1, model={"dtype": "bfloat16"}, lora_input=kept) for kept in ("recast", "peft")
    )
    assert largest_difference(adapter_of(recast), adapter_of(peft)) == 0.0
    layers = [sum(isinstance(m, RecastLinear) for m in build_policy(c).model.modules()) for c in (recast, peft)]
    assert layers == [6, 0]


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stops_before_the_update(make_config: MakeConfig, factor: float) -> None:
    config = make_config(reference="online")
    policy = build_policy(config)
    weights = [parameter for name, parameter in policy.model.named_parameters() if "lora_B" in name]
    weights[0].register_hook(lambda gradient: gradient * factor)
    before = [weight.detach().clone() for weight in weights]
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step 1"):
        train(config, policy.model, policy.tokenizer)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_a_gradient_whose_squares_float32_cannot_hold_is_finite(make_config: MakeConfig) -> None:
    config = make_config(reference="online", max_steps=1)
    policy = build_policy(config)
    weights = [parameter for name, parameter in policy.model.named_parameters() if "lora_B" in name]
    weights[0].register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    result = train(config, policy.model, policy.tokenizer)
    assert result.first["grad_norm"] == pytest.approx(1e30 * weights[0].numel() ** 0.5)


def test_dropout_of_an_adapter_is_set_to_zero_and_that_of_another_module_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(reference="online", max_steps=2)
    policy = build_policy(config)
    looked: list[Any] = []
    monkeypatch.setattr(proof, "_random_module", lambda *args: looked.append(args))
    train(config, policy.model, policy.tokenizer)
    assert len(looked) == 1  # by the proof before the first step
    monkeypatch.undo()
    layer = next(module for module in policy.model.modules() if isinstance(module, LoraLayer))
    layer.lora_dropout["default"] = torch.nn.Dropout(0.1)
    train(config, policy.model, policy.tokenizer)
    assert "lora_dropout=0.1 of the adapter is set to 0" in caplog.text
    assert isinstance(layer.lora_dropout["default"], torch.nn.Identity)
    mlp = policy.model.get_base_model().model.layers[1].mlp
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, torch.nn.Dropout(0.1))
    with pytest.raises(ConfigError, match=r"cannot be trained on forests: dropout.*layers\.1\.mlp\.act_fn\.1.*p=0\.1"):
        train(config, policy.model, policy.tokenizer)


def test_a_step_before_any_reward_has_moved_shows_ties(capsys: pytest.CaptureFixture[str]) -> None:
    """And not that no pair is ranked right."""
    for margin, accuracy, said in (
        (0.0, 0.0, "accuracy ties"),
        (-0.1, 0.0, "accuracy 0.00"),
        (0.1, 0.5, "accuracy 0.50"),
    ):
        values = {"step": 1, "loss": 0.7, "seconds": 0.1, "rewards/margins": margin, "rewards/accuracies": accuracy}
        TrainingScreen().update(values, 4)
        assert said in capsys.readouterr().out
