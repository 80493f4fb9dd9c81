"""Greedy chains of an evaluation: side by side in the arena engine against one at a time in the same engine.

    python -m benchmarks.chains [--model smollm2|reasoner] [--num-chains 64] [--max-new-tokens 48]
        [--threads 2] [--clock wall|cpu] [--no-record]

The model is one of the demonstration's, the questions are its own with other numbers. Chains have to be the same, token
for token, before anything is shown. The prompt that all questions share is read once, before either is timed.
"""

import argparse
import random
import re
import sys
from collections.abc import Sequence

import torch

from benchmarks.harness import CLOCKS, Check, gate, record, show
from cpo_fast.demo.model import convert_demo_model
from cpo_fast.demo.recipes import reasoner_recipe, smollm2_recipe
from cpo_fast.evaluate.chain import Chain, chain_search
from cpo_fast.evaluate.evaluation import chains_side_by_side
from cpo_fast.models import load_model
from cpo_fast.search.collect import build_engine, configured_engine
from cpo_fast.search.engine import Search, run_search
from cpo_fast.tasks import Prompts, Question, load_questions


def varied(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` different questions: the given ones with other numbers in them."""
    generator = random.Random(0)
    return [
        Question(f"{number}", re.sub(r"\d+", lambda _: str(generator.randint(2, 99)), question.text), None)
        for number, question in ((number, questions[number % len(questions)]) for number in range(count))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Ask both ways, compare, show, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "reasoner"), default="smollm2", help="of the demonstration")
    parser.add_argument("--num-chains", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    clock = CLOCKS[arguments.clock]

    if arguments.model == "smollm2":
        recipe = smollm2_recipe(convert_demo_model(), "runs/chains", quick=False, seed=0)
    else:
        recipe = reasoner_recipe("runs/chains", quick=False, seed=0)
    config = recipe.config
    sizes = config.eval.model_copy(
        update={"batch_size": arguments.num_chains, "max_new_tokens": arguments.max_new_tokens}
    )
    config = config.model_copy(update={"eval": sizes, "model": config.model.model_copy(update={"dtype": "float32"})})
    task, questions = load_questions(config)
    model, tokenizer = load_model(config.model)
    prompts = Prompts(task, tokenizer)
    engine = build_engine(chains_side_by_side(config), prompts, model, configured_engine)
    asked = {question.id: prompts.encode(question) for question in varied(questions, arguments.num_chains)}

    def search(prompt: Sequence[int]) -> Search[Chain]:
        return chain_search(tokenizer, prompt, task, arguments.max_new_tokens, config.search.max_steps)

    started = clock()
    together = {name: result for name, result, _ in engine.run((name, search(ids)) for name, ids in asked.items())}
    together_seconds = clock() - started
    started = clock()
    alone = {name: run_search(engine, search(ids), name) for name, ids in asked.items()}
    alone_seconds = clock() - started

    different = sum(together[name] != chain for name, chain in alone.items())
    checks = [Check("chains that differ", float(different), 0.0)]
    gate(checks)
    num_tokens = sum(chain.num_tokens for chain in alone.values() if isinstance(chain, Chain))
    ratio = alone_seconds / together_seconds
    rows = [
        ["one at a time", f"{alone_seconds:.1f}", f"{num_tokens / alone_seconds:.1f}", "1.0"],
        ["side by side", f"{together_seconds:.1f}", f"{num_tokens / together_seconds:.1f}", f"{ratio:.1f}"],
    ]
    columns = ["", f"seconds ({arguments.clock})", "tokens a second", "times faster"]
    show(f"{len(asked)} chains", columns, rows, f"{num_tokens} tokens, the same both ways; float32")
    if not arguments.no_record:
        command = "python -m benchmarks.chains " + " ".join(argv if argv is not None else sys.argv[1:])
        results = {"alone_seconds": alone_seconds, "together_seconds": together_seconds, "ratio": ratio}
        record("chains", command.strip(), checks, results | {"num_chains": len(asked), "num_tokens": num_tokens})
    return 0


if __name__ == "__main__":
    sys.exit(main())
