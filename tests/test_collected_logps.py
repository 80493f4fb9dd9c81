"""What collection records of a sampled token is what training computes for it, on the very same ids."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast.config import Config, validate_config
from cpo_fast.data.load import load_examples
from cpo_fast.ranks import SINGLE
from cpo_fast.search.collect import collect
from cpo_fast.train.communication import Communicator
from cpo_fast.train.objective import MicroBatch, Objective
from cpo_fast.train.policy import Policy, build_policy
from cpo_fast.train.reference import ReferenceCache, scored_sequences
from cpo_fast.tree import LOGP_DECIMALS, Node, read_prompt, read_trees
from cpo_kernels.integrations.transformers import packed_logps
from tests.search.tiny_llama import build_model, build_tokenizer
from tests.tiny import with_lora

BOUND = 1e-5 + 0.5 * 10**-LOGP_DECIMALS  # a token's, in float32; the file rounds
EOS = 2  # of the tiny tokenizer
Scored = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class Collected:
    """A finished collection by an adapter, the policy that trains it further, and every thought with its sequence."""

    config: Config
    policy: Policy
    thoughts: list[
        tuple[Node, Scored]
    ]  # the ids the model read and wrote, end-of-sequence included, and its first place


@pytest.fixture(scope="module", params=["arena", "hf"])
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = build_tokenizer()
    model = adapted_model(tokenizer)
    model.save_pretrained(folder / "adapter")
    rows = [
        {"id": name, "question": text}
        for name, text in (("a", "what is 1 + 1"), ("b", "how many"), ("c", "why"), ("d", "and"))
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"num_candidates": 8, "num_kept": 2, "max_steps": 3, "max_thought_tokens": 12}
    config = validate_config(
        {
            "run": str(folder / "run"),
            "model": {"adapter": str(folder / "adapter"), "dtype": "float32"},
            "task": {"path": str(folder / "questions.jsonl")},
            "search": {"engine": request.param, "arena_tokens": 20_000, **sizes},
            "data": {"path": str(folder / "run" / "trees.jsonl"), "eos": "never"},
            "train": {"reference": "cached", "max_tokens": 2048},
        }
    )
    path = collect(config, model, tokenizer).trees_path
    thoughts = []
    for tree in read_trees(path):
        root = tree.root_ids(read_prompt(path, tree.prompt_hash))
        for node in tree.nodes:
            before = [*root, *tree.path_ids(node.parent)]
            end = [EOS] if node.stop == "eos" else []
            thoughts.append((node, ((*before, *node.token_ids, *end), len(before))))
    return Collected(config, build_policy(config, model, tokenizer), thoughts)


def adapted_model(tokenizer: Any) -> Any:
    """Weights at which float32 is sure of five decimals, under an adapter that matters."""
    ids = tokenizer.convert_tokens_to_ids
    words = {"\n": 4.0, "Answer:": 5.0, "</s>": 3.5, "1": 5.0, "2": 5.0}
    model = build_model(len(tokenizer), {ids(word): bias for word, bias in words.items()})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.5)
    return with_lora(model, targets=("q_proj", "k_proj", "v_proj", "down_proj"), seed=3)


def training_logps(policy: Policy, scored: list[Scored]) -> list[torch.Tensor]:
    """Of each sequence, the log-probs of its scored tokens by the training path."""
    with torch.no_grad():
        packed = packed_logps(policy.model, [ids for ids, _ in scored], [start for _, start in scored])
    return list(packed.result.token_logps.double().split([len(ids) - start for ids, start in scored]))


def largest_difference(thoughts: list[tuple[Node, Scored]], computed: list[torch.Tensor]) -> float:
    """Between recorded and computed log-probs, over all tokens of all thoughts."""
    return max(
        float((torch.tensor(node.logps, dtype=torch.float64) - logps).abs().max())
        for (node, _), logps in zip(thoughts, computed, strict=True)
    )


def test_every_recorded_logp_is_that_of_the_training_path(collected: Collected) -> None:
    assert {node.stop for node, _ in collected.thoughts} == {"newline", "eos", "length"}
    assert {node.depth for node, _ in collected.thoughts} == {1, 2, 3}
    computed = training_logps(collected.policy, [scored for _, scored in collected.thoughts])
    assert largest_difference(collected.thoughts, computed) <= BOUND


@pytest.mark.parametrize("mistake", ["one place early", "adapter off", "another end", "siblings' first tokens swapped"])
def test_a_mistake_would_be_seen(collected: Collected, mistake: str) -> None:
    thoughts = [entry for entry in collected.thoughts if mistake != "another end" or entry[0].stop == "eos"]
    scored = [scored for _, scored in thoughts]
    if mistake == "one place early":
        computed = [logps[:-1] for logps in training_logps(collected.policy, [(ids, at - 1) for ids, at in scored])]
    elif mistake == "adapter off":
        with collected.policy.model.disable_adapter():
            computed = training_logps(collected.policy, scored)
    elif mistake == "another end":
        computed = training_logps(collected.policy, [((*ids[:-1], EOS + 1), at) for ids, at in scored])
    else:
        computed = training_logps(collected.policy, scored)
        firsts = [logps[0].clone() for logps in computed]
        for logps, first in zip(computed, firsts[1:] + firsts[:1], strict=True):
            logps[0] = first
    assert largest_difference(thoughts, computed) > 100 * BOUND


def test_the_reference_of_the_next_round_is_what_collection_recorded(collected: Collected, tmp_path: Path) -> None:
    pairs = load_examples(collected.config, collected.policy.tokenizer).examples
    recorded = {
        (ids[: at + len(node.token_ids)], at): sum(node.logps[: len(node.token_ids)])
        for node, (ids, at) in collected.thoughts
    }
    assert collected.policy.reference != "adapter_off"
    policy = collected.policy
    cache = ReferenceCache(collected.config, "base", policy.model.dtype, pairs, tmp_path)
    cached = cache.logps(policy.model, policy, Communicator(SINGLE, torch.device("cpu")))
    wanted = scored_sequences(pairs)
    assert len(wanted) > 10
    assert set(cached) == set(wanted) <= set(recorded)
    for (ids, at), value in cached.items():
        assert value == pytest.approx(recorded[ids, at], abs=(len(ids) - at) * BOUND)


def test_an_objective_of_sampled_log_probs_starts_at_the_policy_that_sampled(collected: Collected) -> None:
    """Every ratio is 1 up to rounding, also of thoughts that ended with end-of-sequence, which is not trained."""
    config = validate_config(collected.config.model_dump() | {"train": {"method": "tree_grpo", "max_tokens": 100_000}})
    policy, examples = collected.policy, load_examples(config, build_tokenizer()).examples
    trained = {(sequence, len(example.prompt_ids)) for example in examples for sequence in example.sequences}
    ended = [scored for node, scored in collected.thoughts if node.stop == "eos"]
    assert sum((ids[:-1], start) in trained for ids, start in ended) > 5
    with torch.no_grad():
        columns = Objective(policy.model, config.train, policy.reference)(MicroBatch(examples)).columns
    assert float(columns["off_sampling"]) < BOUND
    assert not columns["chosen_rewards"].any()
