"""Trainings of whole trees from their file to the adapter, and what such a training refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpo_fast.data.pair_files import write_rows
from cpo_fast.errors import ConfigError, CpoFastError, DataError
from cpo_fast.models import model_hash
from cpo_fast.train.loop import train
from cpo_fast.train.plan import make_plan
from cpo_fast.tree import SearchTree
from tests.cpo_kernels.padded_oracle import padded_logps
from tests.train.runs import CONSTANT_RATE, MakeConfig, adapter_of, largest_difference, metrics_of, sgd
from tests.train.valued_trees import sampled_by, valued_trees, visited, write

METHODS = ("tpo", "dvo", "tree_grpo", "full_step")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def sampled(tiny_folder: Path) -> list[SearchTree]:
    """Trees that the model of the configuration sampled."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder / "model", attn_implementation="sdpa")

    def logps(ids: list[int], start: int) -> list[float]:
        with torch.no_grad():
            return [float(padded_logps(model, [ids[: end + 1]], [end])) for end in range(start, len(ids))]

    named = {"model_hash": model_hash(str(tiny_folder / "model")), "adapter_hash": ""}
    return sampled_by(valued_trees(4, largest_id=250), logps, **named)


@pytest.fixture
def make(make_config: MakeConfig, sampled: list[SearchTree], tmp_path: Path) -> Make:
    """A configuration to train on trees, by default on those of the fixture."""

    def configured(trees: list[SearchTree] | None = None, **train: Any) -> Any:
        path = write(tmp_path / f"trees-{len(list(tmp_path.iterdir()))}.jsonl", sampled if trees is None else trees)
        return make_config({"path": str(path)}, **{"max_tokens": 120, **train})

    return configured


@pytest.mark.parametrize("method", METHODS)
def test_training_raises_margins_lowers_the_loss_and_writes_the_statistics(method: str, make: Make) -> None:
    config = make(method=method, num_epochs=12, clip_range=0.9, schedule="constant", warmup_ratio=0.0)
    lines = metrics_of(config)
    first, last = lines[0], lines[-1]
    assert abs(first["rewards/margins"]) < 1e-5
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > first["rewards/margins"] + 1e-3
    assert last["pairs" if method == "full_step" else "states"] > 0
    assert {"logps/chosen_drift", "rewards/accuracies", "entropy", "tokens/saved", "alarm"} <= last.keys()
    assert ("rewards/accuracies/step_1" in last) == (method != "full_step")
    assert all(line["tokens/computed"] < line["tokens/rows"] for line in lines)


@pytest.mark.parametrize("method", METHODS)
def test_the_token_budget_and_where_the_reference_is_computed_change_nothing(method: str, make: Make) -> None:
    options = {"method": method, "max_steps": 2, "max_grad_norm": 0.0, **CONSTANT_RATE}
    adapters = [
        adapter_of(make(max_tokens=max_tokens, reference=reference, **options), make_optimizer=sgd)
        for max_tokens, reference in ((60, "online"), (4000, "online"), (60, "cached"))
    ]
    assert max(float(value.abs().max()) for name, value in adapters[0].items() if "lora_B" in name) > 1e-3
    assert largest_difference(adapters[0], adapters[1]) < 1e-5
    assert largest_difference(adapters[0], adapters[2]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_counts_what_training_computes(method: str, make: Make) -> None:
    config = make(method=method, num_epochs=1, batch_pairs=4)
    plan, lines = make_plan(config, 2), metrics_of(config)
    assert plan.num_steps == len(lines)
    assert plan.forest_tokens == sum(line["tokens/computed"] for line in lines)


def test_smoothing_by_visits_trains_on_trees_and_on_the_pairs_written_from_them(
    make: Make, sampled: list[SearchTree], tmp_path: Path
) -> None:
    trees = [visited(one) for one in sampled]
    config = make(trees, visit_smoothing=True, num_epochs=1)
    pairs = tmp_path / "visited.jsonl"
    rows = write_rows(config.data.path, pairs).rows
    assert all(row["chosen_visits"] > 0 and row["rejected_visits"] > 0 for row in rows)
    from_pairs = config.model_copy(
        update={
            "run": str(tmp_path / "of-pairs"),
            "data": config.data.model_copy(update={"path": str(pairs)}),
        }
    )
    plain = make(trees, num_epochs=1)
    smoothed = adapter_of(config)
    assert largest_difference(smoothed, adapter_of(from_pairs)) == 0
    assert largest_difference(smoothed, adapter_of(plain)) > 1e-6


def test_trees_and_pairs_without_visits_are_refused_for_it(make: Make, make_config: MakeConfig) -> None:
    for config in (make(visit_smoothing=True), make_config(visit_smoothing=True)):
        with pytest.raises(DataError, match=r"no visit counts .*search\.strategy=mcts have them"):
            train(config)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_no_trees_are_refused(method: str, make_config: MakeConfig) -> None:
    with pytest.raises(
        DataError, match=rf"pairs\.jsonl holds no trees but rows, and train\.method={method} reads whole"
    ):
        train(make_config(method=method))


def test_values_of_another_scale_are_refused(make: Make, sampled: list[SearchTree]) -> None:
    nodes = tuple(replace(node, value=None if node.value is None else node.value / 10) for node in sampled[0].nodes)
    with pytest.raises(DataError, match=r"q0: the value 0\.\d+ is not between search\.value_impossible=1 and search"):
        train(make([replace(sampled[0], nodes=nodes)], method="dvo"))


def test_trees_of_another_model_or_adapter_are_refused_by_name(make: Make, sampled: list[SearchTree]) -> None:
    for changes in ({"model_hash": "0123456789abcdef"}, {"adapter_hash": "0123456789abcdef"}):
        other = [replace(sampled[0], **changes), *sampled[1:]]
        with pytest.raises(
            DataError, match=r"sampled by model \w+ with adapter \w+, and this training starts from model"
        ):
            train(make(other, method="tree_grpo"))
        train(make(other, method="tpo", max_steps=1))  # which needs no log-probs of theirs


def test_log_probs_that_are_not_the_models_are_found_before_the_first_step(
    make: Make, sampled: list[SearchTree]
) -> None:
    def shifted(one: SearchTree, by: float) -> SearchTree:
        return replace(one, nodes=tuple(replace(n, logps=tuple(v - by for v in n.logps)) for n in one.nodes))

    with pytest.raises(
        CpoFastError, match=r"self-test: the log-probs that the trees hold .* 1\.0e-02 nats a token from"
    ):
        train(make([shifted(one, 0.01) for one in sampled], method="tree_grpo"))
    train(make([shifted(one, 1e-5) for one in sampled], method="tree_grpo", max_steps=1))


def test_imported_trees_have_no_log_probs_and_are_refused(make: Make, sampled: list[SearchTree]) -> None:
    bare = [replace(one, nodes=tuple(replace(node, logps=()) for node in one.nodes)) for one in sampled]
    with pytest.raises(DataError, match=r"no log-probs of their sampling, which train\.method=tree_grpo needs"):
        train(make(bare, method="tree_grpo"))
    train(make(bare, method="dvo", max_steps=1))


def test_trees_without_different_values_are_refused(make: Make, sampled: list[SearchTree]) -> None:
    flat = [replace(one, nodes=tuple(replace(node, value=5.0) for node in one.nodes)) for one in sampled]
    with pytest.raises(
        DataError, match=r"no example for train\.method=tpo: no thoughts of different values to compare"
    ):
        train(make(flat, method="tpo"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "tpo", "loss_type": "hinge"},
            "train.loss_type is of preference pairs, and train.method=tpo has its",
        ),
        ({"method": "dvo", "nll_weight": 0.1}, "train.nll_weight is of preference pairs"),
        ({"method": "full_step", "visit_smoothing": True}, "train.visit_smoothing is of preference pairs"),
        ({"visit_smoothing": True, "label_smoothing": 0.1}, "takes the place of train.label_smoothing"),
        ({"visit_smoothing": True, "loss_type": "ipo"}, "with train.loss_type=sigmoid"),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(
    options: dict[str, Any], message: str, make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**options)


def test_tokens_that_were_not_sampled_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.eos=every would add tokens"):
        make_config({"eos": "every"}, method="tree_grpo")


def test_a_checkpoint_is_of_one_set_of_values(make: Make, sampled: list[SearchTree], tmp_path: Path) -> None:
    config = make(method="tpo", num_epochs=1)
    train(config)
    (node, *others) = sampled[0].nodes
    changed = [replace(sampled[0], nodes=(replace(node, value=node.value + 0.25), *others)), *sampled[1:]]
    write(Path(config.data.path), changed)
    with pytest.raises(CpoFastError, match=r"another training \(data was"):
        train(config)


def test_values_decide_and_gold_answers_do_not(make: Make, sampled: list[SearchTree]) -> None:
    config, other = make(method="tpo"), make([replace(one, gold="17") for one in sampled], method="tpo")
    assert largest_difference(adapter_of(config), adapter_of(other)) == 0
    assert json.loads(Path(other.data.path).read_text().splitlines()[0])["gold"] == "17"
