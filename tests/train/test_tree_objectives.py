"""Objectives that read whole trees, against their formulas in plain float64 loops over padded rows of the stock model."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpo_fast.config import Config, validate_config
from cpo_fast.data.examples import Example
from cpo_fast.data.load import load_examples
from cpo_fast.train.objective import MicroBatch, MicroBatchResult, Objective
from cpo_fast.tree import SearchTree
from cpo_kernels.integrations.transformers import PairTooLarge, prepare, split_pairs
from tests.cpo_kernels.padded_oracle import padded_logps, sum_gradients, trained_gradients, worst_gradient_error
from tests.data.hand_made import PROMPT
from tests.tiny import tiny_llama, tiny_tokenizer, with_exact_norms, with_lora
from tests.train.valued_trees import sampled_by, valued_trees, visited, write

BETA, CLIP, GAMMA, EOS = 0.3, 0.02, 2.0, 2
EXACT = 1e-12
METHODS = ("tpo", "dvo", "tree_grpo", "full_step")


def model(**changes: Any) -> nn.Module:
    """A float64 model with an adapter, whose twins have the same weights."""
    return with_lora(with_exact_norms(tiny_llama(dtype=torch.float64)), **changes)


def token_logps(sampler: nn.Module) -> Any:
    """Log-probs of a sequence's tokens from a position on, under a model."""

    def of(ids: list[int], start: int) -> list[float]:
        with torch.no_grad():
            return [float(padded_logps(sampler, [ids[: end + 1]], [end])) for end in range(start, len(ids))]

    return of


@pytest.fixture(scope="module")
def trees() -> list[SearchTree]:
    """Sampled by a model near the one that is trained, so that some ratios are clipped and some are not."""
    return sampled_by(valued_trees(2), token_logps(model(seed=1)))


def config_of(path: Path, method: str, **train: Any) -> Config:
    options = {"method": method, "beta": BETA, "clip_range": CLIP, "gamma": GAMMA, "max_tokens": 10_000, **train}
    return validate_config({"data": {"path": str(path)}, "train": options})


def examples_of(config: Config) -> list[Example]:
    return load_examples(config, tiny_tokenizer()).examples


def step(packed: nn.Module, config: Config, examples: list[Example], parts: Any = None) -> tuple[float, dict]:
    """Mean loss and gradient over micro-batches."""
    objective, losses, gradients = Objective(packed, config.train, "adapter_off"), [], []
    for part in parts or [range(len(examples))]:
        packed.zero_grad(set_to_none=True)
        result = objective(MicroBatch([examples[place] for place in part]))
        (result.loss_sum / len(examples)).backward()
        losses.append(float(result.loss_sum) / len(examples))
        gradients.append(trained_gradients(packed))
    return sum(losses), sum_gradients(gradients)


class Oracle:
    """Log-probs of thoughts by padded rows, policy and reference."""

    def __init__(self, stock: nn.Module, one: SearchTree, with_eos: bool) -> None:
        self.one, self.with_eos = one, with_eos
        rows = [self.row(node.id) for node in one.nodes]
        sequences, starts = [ids for ids, _ in rows], [start for _, start in rows]
        self.policy = padded_logps(stock, sequences, starts)
        with torch.no_grad(), stock.disable_adapter():
            self.reference = padded_logps(stock, sequences, starts)
        self.lengths = [len(ids) - start for ids, start in rows]

    def row(self, node_id: int) -> tuple[list[int], int]:
        node = self.one.nodes[node_id]
        state = [*self.one.root_ids(PROMPT), *self.one.path_ids(node.parent)]
        ended = [EOS] if self.with_eos and node.terminal and node.stop != "length" else []
        return [*state, *node.token_ids, *ended], len(state)

    def ratio(self, node_id: int) -> torch.Tensor:
        return self.policy[node_id] - self.reference[node_id]


def unit(value: float) -> float:
    return (value - 1.0) / 9.0


def expected_losses(method: str, stock: nn.Module, one: SearchTree) -> list[torch.Tensor]:
    """A loss for each state, or pair of chains, straight from the tree."""
    of = Oracle(stock, one, with_eos=method != "tree_grpo")
    if method == "full_step":
        winners = [node.id for node in one.nodes if node.id in one.winning_nodes]
        losers = [node.id for node in one.nodes if node.complete and node.id not in one.winning_nodes]
        return [step_weighted(of, winner, loser) for winner in winners for loser in losers]
    losses = []
    for state in [-1, *range(len(one.nodes))]:
        children = [node.id for node in one.nodes if node.parent == state and node.value is not None]
        if len({one.nodes[child].value for child in children}) > 1:
            losses.append({"tpo": ranking, "dvo": values, "tree_grpo": policy_gradient}[method](of, children))
    return losses


def ranking(of: Oracle, children: list[int]) -> torch.Tensor:
    rewards = {child: BETA * of.ratio(child) for child in children}
    ranked = sorted(children, key=lambda child: -float(rewards[child].detach()))
    total = torch.zeros((), dtype=torch.float64)
    for i in children:
        for j in children:
            v_i, v_j = unit(of.one.nodes[i].value), unit(of.one.nodes[j].value)
            if v_i > v_j:
                discounts = [1 / math.log(1 + ranked.index(child) + 1) for child in (i, j)]
                weight = abs(2**v_i - 2**v_j) * abs(discounts[0] - discounts[1])
                total = total - weight * F.logsigmoid(rewards[i] - rewards[j])
    return total


def samples(of: Oracle, children: list[int]) -> tuple[list[int], list[float]]:
    """Every sample, the merged ones as often as they came, and its value."""
    found = [child for child in children for _ in range(of.one.nodes[child].count)]
    return found, [unit(of.one.nodes[child].value) for child in found]


def values(of: Oracle, children: list[int]) -> torch.Tensor:
    found, of_samples = samples(of, children)
    mean = sum(of_samples) / len(of_samples)
    squares = [(BETA * of.ratio(child) - (value - mean)) ** 2 for child, value in zip(found, of_samples, strict=True)]
    return torch.stack(squares).mean()


def policy_gradient(of: Oracle, children: list[int]) -> torch.Tensor:
    found, of_samples = samples(of, children)
    mean = sum(of_samples) / len(of_samples)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in of_samples) / len(of_samples))
    terms = []
    for child, value in zip(found, of_samples, strict=True):
        length, advantage = of.lengths[child], (value - mean) / deviation
        ratio = torch.exp((of.policy[child] - sum(of.one.nodes[child].logps)) / length)
        surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        away = -of.ratio(child) / length
        terms.append(-surrogate + BETA * (torch.exp(away) - away - 1))
    return torch.stack(terms).mean()


def step_weighted(of: Oracle, winner: int, loser: int) -> torch.Tensor:
    sides = []
    for last, sign in ((winner, 1), (loser, -1)):
        path = [node.id for node in of.one.path(last)]
        exponents = [math.exp(sign * GAMMA * unit(of.one.nodes[thought].value)) for thought in path]
        sides.append(sum(e / sum(exponents) * of.ratio(each) for e, each in zip(exponents, path, strict=True)))
    return -F.logsigmoid(BETA * (sides[0] - sides[1]))


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_equal_the_formula_on_padded_rows(
    method: str, trees: list[SearchTree], tmp_path: Path
) -> None:
    config = config_of(write(tmp_path / "trees.jsonl", trees), method)
    examples, stock = examples_of(config), model(seed=2)
    losses = [loss for one in trees for loss in expected_losses(method, stock, one)]
    assert len(examples) == len(losses) >= 6
    expected = torch.stack(losses).mean()
    expected.backward()
    loss, gradients = step(prepare(model(seed=2)), config, examples)
    assert abs(loss - float(expected.detach())) < EXACT * abs(float(expected.detach()))
    assert worst_gradient_error(gradients, trained_gradients(stock)) < EXACT


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_of_any_size_and_order_give_one_gradient(
    method: str, trees: list[SearchTree], tmp_path: Path
) -> None:
    config = config_of(write(tmp_path / "trees.jsonl", trees), method)
    examples, packed = examples_of(config), prepare(model(seed=2))
    whole = step(packed, config, examples)
    rows = [(example.prompt_ids, *example.responses) for example in examples]
    sizes = set()
    for max_tokens in range(10, 200):
        try:
            parts = split_pairs(rows, max_tokens)
        except PairTooLarge:
            continue
        if len(parts) in sizes:
            continue
        sizes.add(len(parts))
        loss, gradients = step(packed, config, examples, parts)
        assert abs(loss - whole[0]) < EXACT * abs(whole[0])
        assert worst_gradient_error(gradients, whole[1]) < EXACT
    assert len(sizes) >= 3


@pytest.mark.parametrize("method", METHODS)
def test_weights_scale_each_examples_share(method: str, trees: list[SearchTree], tmp_path: Path) -> None:
    config = config_of(write(tmp_path / "trees.jsonl", trees), method)
    examples, packed = examples_of(config)[:2], prepare(model(seed=2))
    objective = Objective(packed, config.train, "adapter_off")
    single = [float(objective(MicroBatch([example])).loss_sum) for example in examples]
    weighted = [replace(example, weight=weight) for example, weight in zip(examples, (0.5, 2.0), strict=True)]
    assert float(objective(MicroBatch(weighted)).loss_sum) == pytest.approx(0.5 * single[0] + 2 * single[1], rel=1e-12)


def results_of(trees: list[SearchTree], tmp_path: Path, method: str, **train: Any) -> tuple[MicroBatchResult, Any]:
    config = config_of(write(tmp_path / "trees.jsonl", trees), method, **train)
    examples = examples_of(config)
    return Objective(prepare(model(seed=2)), config.train, "adapter_off")(MicroBatch(examples)), examples


def test_statistics_are_those_of_the_best_and_the_worst_thought(trees: list[SearchTree], tmp_path: Path) -> None:
    result, examples = results_of(trees[:1], tmp_path, "tpo")
    of, stock = Oracle(model(seed=2), trees[0], with_eos=True), trees[0]
    states = [[node for node in stock.nodes if node.parent == state and node.value is not None] for state in (-1, 0, 2)]
    for which, name in ((max, "chosen"), (min, "rejected")):
        ends = [which(children, key=lambda node: node.value).id for children in states]
        rewards = [BETA * float(of.ratio(end)) for end in ends]
        assert result.columns[f"{name}_rewards"].tolist() == pytest.approx(rewards, rel=1e-10)
        assert result.columns[f"{name}_logps"].tolist() == pytest.approx([float(of.policy[end]) for end in ends])
    tokens = [sum(len(example.responses[place]) for example in examples) for place in (0, 1)]
    assert result.num_scored[:2] == tuple(tokens)
    assert sum(result.num_scored) == sum(len(response) for example in examples for response in example.responses)


def test_rewards_of_whole_chains_are_those_of_their_thoughts_together(trees: list[SearchTree], tmp_path: Path) -> None:
    weighted, examples = results_of(trees, tmp_path, "full_step")
    config = config_of(write(tmp_path / "trees.jsonl", trees), "preference").model_copy(deep=True)
    whole = validate_config(config.model_dump() | {"pairs": {"rule": "fpo"}})
    pairs = examples_of(whole)
    assert [pair.responses for pair in pairs] == [example.responses for example in examples]
    plain = Objective(prepare(model(seed=2)), whole.train, "adapter_off")(MicroBatch(pairs))
    for name in ("chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps"):
        torch.testing.assert_close(weighted.columns[name], plain.columns[name], rtol=1e-10, atol=1e-10)
    assert weighted.num_scored == plain.num_scored
    assert weighted.num_tokens == plain.num_tokens  # a thought by itself adds no token


def test_before_the_first_step_thoughts_are_ranked_by_value_and_rounding_does_not_matter(
    trees: list[SearchTree], tmp_path: Path
) -> None:
    """Rewards are 0 then, or 0 up to rounding where the reference was computed on other forests."""
    config = config_of(write(tmp_path / "trees.jsonl", trees), "tpo")
    examples, packed = examples_of(config), prepare(model(zero_b=True))
    batch = MicroBatch(examples)
    online = Objective(packed, config.train, "adapter_off")(batch)
    assert not online.columns["chosen_rewards"].any()
    assert not online.columns["rejected_rewards"].any()
    reference = [
        float(value) for value in padded_logps(model(zero_b=True), *map(list, zip(*batch.scored, strict=True)))
    ]
    noise = torch.Generator().manual_seed(0)
    shaken = [value + 1e-5 * float(torch.randn((), generator=noise)) for value in reference]
    cached = Objective(packed, config.train, "adapter_off")(MicroBatch(examples, shaken))
    assert cached.columns["chosen_rewards"].abs().min() > 0
    torch.testing.assert_close(cached.columns["losses"], online.columns["losses"], rtol=1e-5, atol=0)
    expected = []
    for example in examples:
        ordered = sorted((thoughts.values[0] for thoughts in example.thoughts), reverse=True)
        discounts = [1 / math.log(2 + place) for place in range(len(ordered))]
        expected.append(
            sum(
                math.log(2) * (2 ** ordered[i] - 2 ** ordered[j]) * (discounts[i] - discounts[j])
                for i in range(len(ordered))
                for j in range(i, len(ordered))
                if ordered[i] > ordered[j]
            )
        )
    assert online.columns["losses"].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_policy_that_sampled_its_trees_starts_with_the_gradient_of_the_advantages(tmp_path: Path) -> None:
    """At ratio 1 nothing is clipped, and the gradient is the policy gradient of the mean over samples."""
    start = model(zero_b=True)
    trees = sampled_by(valued_trees(1), token_logps(start))
    config = config_of(write(tmp_path / "trees.jsonl", trees), "tree_grpo")
    examples, packed = examples_of(config), prepare(model(zero_b=True))
    result = Objective(packed, config.train, "adapter_off")(MicroBatch(examples))
    assert float(result.columns["off_sampling"]) < 1e-6  # rounded in the file
    (result.loss_sum / len(examples)).backward()
    of = Oracle(start, trees[0], with_eos=False)
    terms = []
    for state in (-1, 0, 2):
        children = [node.id for node in trees[0].nodes if node.parent == state and node.value is not None]
        taken, of_samples = samples(of, children)
        mean = sum(of_samples) / len(of_samples)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in of_samples) / len(of_samples))
        each = [
            -(value - mean) / deviation * of.policy[child] / of.lengths[child]
            for child, value in zip(taken, of_samples, strict=True)
        ]
        terms.append(torch.stack(each).mean())
    torch.stack(terms).mean().backward()
    expected = {
        name: each for name, each in trained_gradients(start).items() if "lora_B" in name
    }  # A's is 0 while B is
    found = {name: each for name, each in trained_gradients(packed).items() if "lora_B" in name}
    assert worst_gradient_error(found, expected) < 1e-5


def test_smoothing_by_visits_equals_its_formula(trees: list[SearchTree], tmp_path: Path) -> None:
    path = write(tmp_path / "trees.jsonl", [visited(one) for one in trees])
    config = validate_config({"data": {"path": str(path)}, "train": {"beta": BETA, "visit_smoothing": True}})
    examples, stock = examples_of(config), model(seed=2)
    losses = []
    for one in trees:
        of, counts = Oracle(stock, one, with_eos=True), [node.visits for node in visited(one).nodes]
        winning = {node.id for winner in one.winning_nodes for node in one.path(winner)}
        for state in [-1, *sorted(winning)]:
            children = [node.id for node in one.nodes if node.parent == state]
            for winner in (child for child in children if child in winning):
                for loser in (child for child in children if child not in winning):
                    smoothing = 1 / (counts[winner] / counts[loser] + 1)
                    margin = BETA * (of.ratio(winner) - of.ratio(loser))
                    losses.append(-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin))
    assert len(examples) == len(losses)
    expected = torch.stack(losses).mean()
    expected.backward()
    loss, gradients = step(prepare(model(seed=2)), config, examples)
    assert abs(loss - float(expected.detach())) < EXACT * abs(float(expected.detach()))
    assert worst_gradient_error(gradients, trained_gradients(stock)) < EXACT
