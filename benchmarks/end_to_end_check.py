"""Do both sides of `benchmarks.end_to_end` compute the same thing?

The measured stages left their files. Of these

    trees       ours are those of the plain reference engine, and those that the alternative grows where its samples are
                drawn by the same named random numbers: the same nodes, winners and answers, token for token
    training    on the same pairs in the same batches ends at the same adapter, up to rounding
    chains      the same greedy chains, token for token, of the base and of our adapter, which the alternative merges

must agree. By hand, and as the benchmark calls it:

    python -m benchmarks.end_to_end_check FOLDER NUM_TREES
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.end_to_end_peer import GenerateEngine
from benchmarks.end_to_end_stages import OURS, THEIRS, adapter_of, chains_by_generate, rows_of, stock
from benchmarks.harness import Check
from cpo_fast.config import Config, load_config
from cpo_fast.evaluate.chain import Chain, chain_search
from cpo_fast.evaluate.evaluation import chains_side_by_side
from cpo_fast.models import load_model
from cpo_fast.search.collect import build_engine
from cpo_fast.search.engine import SampleRequest
from cpo_fast.search.engine.sampler import choose_token, uniforms
from cpo_fast.search.tree_search import search_question
from cpo_fast.tasks import Prompts, load_questions
from cpo_fast.tree import SearchTree, read_trees

# Difference over movement, both in Euclidean norm, without the thousandth of weights that differ most: AdamW makes a whole
# step of a gradient that is nothing but rounding. Measured: 2e-6 on the reasoner after 30 steps, 2e-5 on SmolLM2 after two.
MAX_ADAPTER_DIFFERENCE = 1e-4
LEFT_OUT = 1e-3
# of all weights; measured: 2e-6 and 5e-4 there. On SmolLM2 TRL in float32 is 4e-3 from itself in float64
MAX_WHOLE_DIFFERENCE = 5e-3


class NamedNumbers(LogitsProcessor):
    """Draws each row's token by the rule and the random numbers of our engines, and leaves no other to choose."""

    def __init__(self, rows: Sequence[SampleRequest]) -> None:
        self._rows, self._step = rows, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, V] scores, all but those of the drawn tokens -inf."""
        found = torch.full_like(scores, -torch.inf)
        for place, row in enumerate(self._rows):
            uniform = float(uniforms(row.uid, row.max_new_tokens)[self._step])
            logits = scores[place].double().numpy()
            found[place, choose_token(logits, uniform, row.temperature, row.top_p, row.top_k)] = 0
        self._step += 1
        return found


def check(folder: Path, num_trees: int) -> list[Check]:
    """All comparisons. `num_trees` of our trees are grown again in each of the two other ways."""
    collect, asked = (load_config(folder / f"{name}.yaml") for name in ("collect", "asked"))
    return [*_trees(collect, folder, num_trees), *_training(collect, folder), *_chains(asked, folder)]


def _trees(config: Config, folder: Path, count: int) -> list[Check]:
    ours = read_trees(folder / OURS / "trees.jsonl")[:count]
    model, tokenizer = stock(config)
    task, questions = load_questions(config)
    prompts = Prompts(task, tokenizer, config.task.chat)
    wanted = {tree.id for tree in ours}
    reference = build_engine(config.search.model_copy(update={"engine": "hf"}), prompts, model)
    alternative = GenerateEngine(
        model, tokenizer, rows_of(folder), lambda rows: LogitsProcessorList([NamedNumbers(rows)])
    )
    for prefix in prompts.prefixes:
        alternative.cache_prefix(prefix)
    checks = []
    for name, engine in (("of the reference engine", reference), ("of generate at the same numbers", alternative)):
        searches = ((one.id, search_question(config, prompts, one)) for one in questions if one.id in wanted)
        theirs = {name: tree for name, tree, _ in engine.run(searches)}
        different = sum(_shape(tree) != _shape(theirs[tree.id]) for tree in ours)
        checks.append(Check(f"trees unlike those {name}", different / len(ours), 0.0))
    return checks


def _shape(tree: Any) -> Any:
    """What a tree is, but for values and log-probs, which differ by rounding."""
    if not isinstance(tree, SearchTree):
        return repr(tree)
    nodes = [(node.parent, node.token_ids, node.count, node.kept, node.answer, node.stop) for node in tree.nodes]
    return nodes, tree.winning_nodes, tree.answer


def _training(config: Config, folder: Path) -> list[Check]:
    """How far both adapters are from each other, over how far ours has moved from the start."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(config.seed)
    lora = config.lora
    start = get_peft_model_state_dict(get_peft_model(
        stock(config)[0],
        LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.target_modules), task_type="CAUSAL_LM"),
    ))  # fmt: skip
    ours, theirs = (load_file(adapter_of(folder, side) / "adapter_model.safetensors") for side in (OURS, THEIRS))
    movement, whole = distance(ours, start), distance(ours, theirs)
    most = distance(ours, theirs, LEFT_OUT)
    name = "adapter unlike TRL's, over its movement"
    return [
        Check(name, most / movement, MAX_ADAPTER_DIFFERENCE),
        Check(f"{name}, with what rounding decides", whole / movement, MAX_WHOLE_DIFFERENCE),
    ]


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], left_out: float = 0.0) -> float:
    """Euclidean, over all weights but the share that differs most; infinite where names differ."""
    if one.keys() != other.keys():
        return float("inf")
    gaps = torch.cat([(one[name] - other[name]).double().abs().flatten() for name in one]).sort().values
    return float(gaps[: len(gaps) - int(left_out * len(gaps))].norm())


def _chains(config: Config, folder: Path) -> list[Check]:
    timed = json.loads((folder / THEIRS / "eval base.json").read_text())
    adapter = adapter_of(folder, OURS)
    merged, _ = chains_by_generate(config, folder, adapter)
    checks = []
    for name, folder_of_adapter, theirs in (
        ("base", None, timed),
        ("adapter", str(adapter), {name: list(chain.token_ids) for name, chain in merged.items()}),
    ):
        ours = our_chains(config, folder_of_adapter)
        different = sum(list(chain.token_ids) != theirs.get(question) for question, chain in ours.items())
        checks.append(Check(f"chains of the {name} unlike generate's", different / len(ours), 0.0))
        lines = (folder / OURS / f"eval-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        written = {row["id"]: (row["chain"], row["num_tokens"]) for row in map(json.loads, lines)}
        again = {question: (chain.text, chain.num_tokens) for question, chain in ours.items()}
        checks.append(Check(f"chains of the {name} unlike those measured", float(written != again), 0.0))
    return checks


def our_chains(config: Config, adapter: str | None) -> dict[str, Chain]:
    """Our greedy chains of all questions with an adapter as it is, not merged, or without one."""
    model, tokenizer = load_model(config.model.model_copy(update={"adapter": adapter}))
    task, questions = load_questions(config)
    prompts = Prompts(task, tokenizer, config.task.chat)
    engine = build_engine(chains_side_by_side(config), prompts, model)
    caps = {"max_new_tokens": config.eval.max_new_tokens, "max_steps": config.search.max_steps}
    searches = ((one.id, chain_search(tokenizer, prompts.encode(one), task, **caps)) for one in questions)
    found = {name: chain for name, chain, _ in engine.run(searches)}
    assert all(isinstance(chain, Chain) for chain in found.values()), found
    return found


def main(argv: list[str]) -> None:
    """Write the checks to checks.json of the folder."""
    folder = Path(argv[0])
    (folder / "checks.json").write_text(json.dumps([asdict(one) for one in check(folder, int(argv[1]))]))


if __name__ == "__main__":
    main(sys.argv[1:])
