"""Monte Carlo tree search over scripted thoughts: where simulations lead, what they count, and when they end."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.config import PairsConfig
from cpo_fast.data.pair_rules import select_pairs, select_winning_paths
from cpo_fast.search.collect import collect, configured_engine
from cpo_fast.search.engine import SampleRequest
from cpo_fast.search.tree_store import Worker
from cpo_fast.tree import ROOT, SearchTree, read_trees
from tests.search.listening_engine import ListeningEngine
from tests.search.scripted_engine import Lines, Said, ScriptedEngine, full_tree, line, search

EVEN = 0.5  # the reward of a thought that the script does not value: both labels have log-prob -1


def mcts(tokenizer: Any, thoughts: Any, likely: Any = None, **settings: Any) -> tuple[SearchTree, ScriptedEngine]:
    return search(tokenizer, thoughts, likely, strategy="mcts", **settings)


def chances(**rewards: float) -> dict[str, float]:
    """The script's log-probs for which a last line has these rewards: the other label's log-prob is -1."""
    return {text.replace("_", " "): -1 + math.log(reward / (1 - reward)) for text, reward in rewards.items()}


def visits(tree: SearchTree) -> dict[str, int | None]:
    return {node.text.strip(): node.visits for node in tree.nodes}


def test_the_walk_goes_by_mean_reward_and_prior_and_counts_itself(tokenizer):
    """Worked by hand, c = 1: P is 2/3 for the thought sampled twice and 1/3 for the other."""
    thoughts = {
        (): [line("Step a"), line("Step b"), line("Step b")],
        ("Step a\n",): [line("Step c"), line("Answer: 1"), line("Answer: 2")],
        ("Step b\n",): [line("Answer: 3"), line("Answer: 4"), line("Answer: 5")],
    }
    likely = chances(Step_a=0.9, Step_b=0.5, Step_c=0.2) | {f"Answer: {n}": -9.0 for n in range(6)}
    likely |= chances(**{"Answer:_1": 0.4, "Answer:_3": 0.6})
    # 1: question, best child a (0.9). N = 1, N(a) = 1, Q(a) = 0.9
    # 2: a 0.9 + 1/3 / 2 = 1.07, b 0.5 + 2/3 = 1.17: b is expanded, best child 3 (0.6). Q(b) = 0.6
    # 3: a 0.9 + 1/3 sqrt 2 / 2 = 1.14, b 0.6 + 2/3 sqrt 2 / 2 = 1.07: a is expanded, best child 1 (0.4). Q(a) = 0.65
    # 4: a 0.65 + 1/3 sqrt 3 / 3 = 0.84, b 0.6 + 2/3 sqrt 3 / 2 = 1.18: b; N(b) = 1
    #    3 0.6 + 1/3 / 2 = 0.77, 4 and 5 about 0 + 1/3: chain 3 again. Q(b) = 0.6
    # 5: a 0.65 + 1/3 2 / 3 = 0.87, b 0.6 + 2/3 2 / 3 = 1.04: b; 3 0.6 + 1/3 sqrt 2 / 3 = 0.76: chain 3 again
    tree, engine = mcts(tokenizer, thoughts, likely, num_simulations=5, exploration=1.0)
    assert engine.expanded == [(), ("Step b\n",), ("Step a\n",)]
    expected = {"Step a": 2, "Step b": 3, "Answer: 3": 3, "Answer: 1": 1, "Step c": 0}
    assert {text: visits(tree)[text] for text in expected} == expected
    assert [node.count for node in tree.nodes[:2]] == [1, 2]
    # the vote is that of the other searches: the evaluator's values of complete chains, whatever the visits
    assert tree.answer == "3"
    assert {node.kept for node in tree.nodes if node.complete} == {True}


class Random:
    """Thoughts, answers, duplicates and broken lines, and a value for each, all hashes of a seed and the lines."""

    def __init__(self, seed: int, num_candidates: int) -> None:
        self.seed, self.num_candidates = seed, num_candidates

    def thoughts(self, lines: Lines) -> list[Said]:
        return [self._said(lines, index) for index in range(self.num_candidates)]

    def _said(self, lines: Lines, index: int) -> Said:
        first, second, third = self._bytes(lines, index)
        if first < 60:
            return line(f"Answer: {second % 3} {'x' * third}")
        if first < 90:
            return (f"Step {second % 4}", "length")
        if first < 100:
            return ("\n", "newline")
        return line(f"Step {self.seed} {len(lines)} {'abcd'[second % 4]} {third % 16}")

    def _bytes(self, *parts: object) -> tuple[int, int, int]:
        one, two, three = hashlib.sha256(repr((self.seed, *parts)).encode()).digest()[:3]
        return one, two, three

    def get(self, last_line: str, default: float) -> float:
        """In place of the table of the scripted engine: the log-prob of `likely` by last line."""
        return -self._bytes(last_line)[0] / 50


class Oracle:
    """The same search written by itself: recursive, over text, no counters but a list of (path, reward)."""

    def __init__(self, script: Random, config: dict[str, Any]) -> None:
        self.script, self.config = script, config
        self.simulations: list[tuple[Lines, float]] = []
        self.expanded: list[Lines] = []
        self.num_nodes = 0

    def run(self) -> None:
        for _ in range(self.config["num_simulations"]):
            left = self.config["max_nodes"] - self.num_nodes
            if left <= 0 or not any(True for _ in self.open_states(())):
                return
            self.simulate(())

    def children(self, state: Lines) -> list[tuple[str, str, int]]:
        """(text, stop, count) of the distinct thoughts under a state."""
        said = [one for one in self.script.thoughts(state) if one[0].strip()]
        distinct = list(dict.fromkeys(said))
        return [(text, stop, said.count((text, stop))) for text, stop in distinct]

    def is_complete(self, text: str, stop: str) -> bool:
        return stop == "newline" and text.startswith("Answer:")

    def is_open(self, text: str, stop: str, depth: int) -> bool:
        return stop == "newline" and text.startswith("Step") and depth < self.config["max_steps"]

    def open_states(self, state: Lines) -> Iterator[Lines]:
        if state not in self.expanded:
            yield state
            return
        for text, stop, _ in self.children(state):
            if self.is_open(text, stop, len(state) + 1):
                yield from self.open_states((*state, text))

    def alive(self, state: Lines, text: str, stop: str) -> bool:
        if self.is_complete(text, stop):
            return True
        if not self.is_open(text, stop, len(state) + 1):
            return False
        below = (*state, text)
        return below not in self.expanded or any(self.alive(below, *each[:2]) for each in self.children(below))

    def reward(self, text: str) -> float:
        difference = self.script.get(text.strip(), 0.0) + 1
        return 1 / (1 + math.exp(-difference))

    def visits(self, state: Lines) -> int:
        return sum(path[: len(state)] == state for path, _ in self.simulations)

    def score(self, state: Lines, text: str, count: int) -> float:
        below = (*state, text)
        through = [reward for path, reward in self.simulations if path[: len(below)] == below]
        quality = sum(through) / len(through) if through else self.reward(text)
        prior = count / self.config["num_candidates"]
        return quality + self.config["exploration"] * prior * math.sqrt(self.visits(state)) / (1 + len(through))

    def simulate(self, state: Lines) -> None:
        if state and state[-1].startswith("Answer:"):
            self.simulations.append((state, self.reward(state[-1])))
        elif state in self.expanded:
            alive = [each for each in self.children(state) if self.alive(state, *each[:2])]
            best = max(alive, key=lambda each: self.score(state, each[0], each[2]))
            self.simulate((*state, best[0]))
        else:
            self.expanded.append(state)
            self.num_nodes += len(self.children(state))
            alive = [each for each in self.children(state) if self.alive(state, *each[:2])]
            best = max(alive, key=lambda each: self.script.get(each[0].strip(), 0.0), default=None)
            end = (state, 0.0) if best is None else ((*state, best[0]), self.reward(best[0]))
            self.simulations.append(end)


@pytest.mark.parametrize("seed", range(40))
def test_expansions_and_visits_are_those_of_the_definition(tokenizer, seed):
    config = {
        "num_candidates": 1 + seed % 5,
        "max_steps": 2 + seed % 3,
        "num_simulations": (3, 12, 40)[seed % 3],
        "exploration": (0.0, 0.3, 1.25, 9.0)[seed % 4],
        "max_nodes": (20, 1000)[seed % 2],
    }
    script = Random(seed, config["num_candidates"])
    oracle = Oracle(script, config)
    oracle.run()
    tree, engine = mcts(tokenizer, script.thoughts, script, **config)
    assert engine.expanded == oracle.expanded
    for node in tree.nodes:
        chain = tuple(each.text for each in tree.path(node.id))
        assert node.visits == oracle.visits(chain), chain
        assert node.kept == (node.complete or chain in oracle.expanded)
    assert len(tree.nodes) < config["max_nodes"] + config["num_candidates"]


def test_a_chain_that_is_walked_again_costs_nothing_and_counts(tokenizer):
    thoughts = {(): [line("Answer: 7"), line("Step b"), line("Step c")]}
    likely = chances(**{"Answer:_7": 0.9})
    tree, engine = mcts(tokenizer, thoughts, likely, num_simulations=9, exploration=0.0)
    assert engine.expanded == [()]
    assert len(engine.asks) == 2  # one for thoughts and one for verdicts
    assert visits(tree) == {"Answer: 7": 9, "Step b": 0, "Step c": 0}


def test_a_state_below_which_nothing_is_left_is_not_entered_again_and_rewards_nothing(tokenizer):
    broken: list[Said] = [("Step x", "length"), line("Question: another"), ("\n", "newline")]
    thoughts = {
        (): [line("Step a"), line("Step b"), ("Step c", "length")],
        ("Step a\n",): [line("Step d"), line("Step d"), line("Step d")],
        ("Step a\n", "Step d\n"): broken,
        ("Step b\n",): broken,
    }
    likely = chances(Step_a=0.9, Step_b=0.1, Step_d=0.9)
    tree, engine = mcts(tokenizer, thoughts, likely, max_steps=4, num_simulations=99)
    assert engine.expanded == [(), ("Step a\n",), ("Step a\n", "Step d\n"), ("Step b\n",)]  # and then it is over
    # the first simulation ended at a, the second at d below it, the third came as far as d and the fourth to b
    assert {text: visits(tree)[text] for text in ("Step a", "Step d", "Step b", "Step c")} == {
        "Step a": 3, "Step d": 2, "Step b": 1, "Step c": 0
    }  # fmt: skip
    assert tree.status == "no_answer"


def test_equal_scores_go_to_the_earlier_sample(tokenizer):
    _, engine = mcts(tokenizer, full_tree, num_simulations=4, exploration=1.0)
    first = ("Step 1a\n",)
    # after the first simulation a has been visited, so b is the first of the two others; then a, then c is ahead of b
    assert engine.expanded == [(), ("Step 1b\n",), ("Step 1c\n",), first]


def test_it_ends_with_its_simulations_its_nodes_or_its_open_states(tokenizer):
    assert len(mcts(tokenizer, full_tree, num_simulations=5)[1].expanded) == 5
    tree, engine = mcts(tokenizer, full_tree, num_simulations=99, max_nodes=10)
    assert (len(engine.expanded), len(tree.nodes)) == (4, 12)
    tree, engine = mcts(tokenizer, full_tree, num_simulations=99)  # three steps: 1 + 3 + 9 states
    assert (len(engine.expanded), len(tree.nodes)) == (13, 39)


def test_a_question_without_candidates_ends_at_once(tokenizer):
    tree, engine = mcts(tokenizer, {(): [("", "eos")] * 3}, num_simulations=9)
    assert (tree.status, engine.expanded) == ("no_candidates", [()])


def test_a_thought_without_a_readable_verdict_rewards_nothing_and_is_entered_last(tokenizer):
    thoughts = {
        (): [line("Step a"), line("Step b"), line("Step c")],
        ("Step b\n",): [line("Step d"), line("Step d"), line("Step d")],
    }
    verdicts = ["no idea"]
    settings = {"evaluator": "sample", "num_verdicts": 1, "num_simulations": 2, "exploration": 0.0, "max_steps": 2}
    tree, engine = search(tokenizer, lambda lines: thoughts.get(lines, full_tree(lines)), strategy="mcts",
                          verdicts=verdicts, **settings)  # fmt: skip
    assert {node.value for node in tree.nodes} == {None}
    assert engine.expanded == [(), ("Step a\n",)]


def test_other_searches_write_no_visits_and_hash_as_before(make_config, model, tokenizer):
    paths = {
        name: Path(collect(make_config(name, strategy=name), model, tokenizer).trees_path) for name in ("bfs", "mcts")
    }
    assert b'"visits"' not in paths["bfs"].read_bytes()
    assert all(node.visits is None for tree in read_trees(paths["bfs"]) for node in tree.nodes)
    rows = [json.loads(each) for each in paths["mcts"].read_text().splitlines()]
    assert all(isinstance(node["visits"], int) for row in rows for node in row["nodes"])
    settings = make_config("bfs").search.result_settings()
    assert {"num_simulations", "exploration", "min_value"} & set(settings) == set()
    assert {"num_simulations", "exploration"} <= set(make_config("mcts", strategy="mcts").search.result_settings())


@pytest.mark.parametrize("evaluator", ["logits", "sample"])
def test_a_real_model_s_trees_are_the_same_bytes_however_they_are_computed(
    make_config, model, tokenizer, engine, evaluator
):
    verdicts = {"evaluator": evaluator, "num_verdicts": 2, "max_verdict_tokens": 3}
    settings = {"strategy": "mcts", "num_simulations": 12, "max_nodes": 45, "engine": engine, **verdicts}
    found = set()
    for run, sharing in (("all", {}), ("few", {"batch_size": 3, "questions_in_flight": 2}), ("workers", {})):
        config = make_config(run, **settings, **sharing)
        workers = [Worker(number, 2) for number in (1, 0)] if run == "workers" else [Worker()]
        results = [collect(config, model, tokenizer, worker=worker) for worker in workers]
        found.add(Path(results[-1].trees_path).read_bytes())
    (content,) = found
    trees = read_trees(Path(make_config("all").run) / "trees.jsonl")
    assert any(tree.status == "ok" for tree in trees)
    assert max(node.visits for tree in trees for node in tree.nodes) > 1
    assert len(content.splitlines()) == 3


def test_a_search_killed_between_simulations_goes_on_to_the_same_bytes(make_config, model, tokenizer):
    settings = {"strategy": "mcts", "num_simulations": 8}
    undisturbed = Path(collect(make_config("whole", **settings), model, tokenizer).trees_path).read_bytes()
    asked: list[str] = []

    def killed_after(count: int) -> None:
        config = make_config("killed", **settings)

        def listen(ask):
            asked.extend(item.uid for item in ask.items if isinstance(item, SampleRequest))
            if len(asked) > count:
                raise KeyboardInterrupt

        def listening(*parts):
            return ListeningEngine(configured_engine(*parts), on_ask=listen)

        collect(config, model, tokenizer, make_engine=listening)

    with pytest.raises(KeyboardInterrupt):
        killed_after(15)  # in the third or fourth expansion of the first question
    before = list(asked)
    killed_after(10**9)
    assert (Path(make_config("killed").run) / "trees.jsonl").read_bytes() == undisturbed
    assert not set(before[:10]) & set(asked[len(before) :])  # what was answered is not asked again


@pytest.mark.parametrize("rule", ["all", "lower", "lowest", "fpo"])
def test_pairs_and_winning_paths_come_from_its_trees_as_from_any(tokenizer, rule):
    for seed in range(6):
        script = Random(seed, 4)
        tree, _ = mcts(tokenizer, script.thoughts, script, num_candidates=4, max_steps=3, num_simulations=20)
        pairs = select_pairs(tree, PairsConfig(rule=rule)).examples
        winning = {node.id for winner in tree.winning_nodes for node in tree.path(winner)}
        if rule == "all":
            # every sibling that lost, those that no simulation entered included
            expected = {
                (winner.id, loser.id)
                for state in (ROOT, *winning)
                for winner in tree.children(state) if winner.id in winning
                for loser in tree.children(state) if loser.id not in winning
            }  # fmt: skip
            assert {pair.node_ids for pair in pairs} == expected
            if seed == 0:
                assert any(tree.nodes[loser].visits == 0 for _, loser in expected)
        paths = select_winning_paths(tree).examples
        assert bool(paths) == bool(tree.winning_nodes)
        assert {path.last[0].id for path in paths} <= set(tree.winning_nodes)
