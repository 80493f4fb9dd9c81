"""`cpo-fast demo`: the whole line once on this machine, with a model and questions that are shipped.

Model, search, pairs, training, evaluation of base and adapter, one table. The sizes are set so that two CPU cores need
one minute with the reasoner, and minutes with SmolLM2, where generating tokens one at a time takes long.
"""

import logging
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpo_fast.config import dump_config
from cpo_fast.interrupts import stopped_by_signals
from cpo_fast.progress import say, shown, stage

if TYPE_CHECKING:
    from cpo_fast.data.pair_files import TreeRows
    from cpo_fast.demo import Recipe
    from cpo_fast.evaluate import Evaluation
    from cpo_fast.search.collect import CollectResult
    from cpo_fast.train.loop import TrainResult

LIFE_SECONDS = 1.0  # without a word before a line says what it is at, also where nobody watches
MAX_LINES = 8  # that one stage leaves on the screen
MODELS = {  # and what stage 1 says of them
    "reasoner": "a reasoner of 605,000 parameters that was pretrained on two-digit sums",
    "smollm2": "SmolLM2-135M-Instruct (converted to safetensors on the first run)",
}


@click.command("demo")
@click.option(
    "--model",
    type=click.Choice(list(MODELS)),
    default="reasoner",
    show_default=True,
    help="reasoner: a tiny model made for this, whose gain can be measured; smollm2: a real language model of 135M "
    "parameters from a PyPI package, on twelve word problems, which shows the pipeline alone.",
)
@click.option(
    "--out", help="Folder that receives every file.  [default: runs/demo-MODEL, with the seed if it is not 0]"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another search and training.")
@click.option("--quick", is_flag=True, help="Fewer questions and steps: the shortest run that touches everything.")
def demo_command(model: str, out: str | None, seed: int, quick: bool) -> None:
    """Search, pairs, training and evaluation before and after, in a minute on two CPU cores.

    A small model searches 40 questions, learns from its own searches and is asked 150 others, before and after. Run
    again, it keeps the trees it has and trains anew.
    """
    folder = out or "-".join(["runs/demo", model, *([str(seed)] if seed else [])])
    from cpo_fast.environment import environment_kept

    # the outer stage: so that there is no moment without one
    kept = "the same command keeps the trees that it has, and trains anew"
    with (
        shown(LIFE_SECONDS, err=False),
        stage("demo"),
        environment_kept(folder, "demo"),
        stopped_by_signals(kept),
    ):
        started = time.perf_counter()
        found = _demonstrate(model, folder, seed, quick)
    _report(found, time.perf_counter() - started)


@dataclass(frozen=True)
class _Found:
    """What every stage gave."""

    recipe: "Recipe"
    collected: "CollectResult"
    pairs: "TreeRows"
    trained: "TrainResult"
    base: "Evaluation"
    adapter: "Evaluation"


def _demonstrate(name: str, out: str, seed: int, quick: bool) -> _Found:
    # the hub client reads this once, when transformers is first imported: nothing here may reach for the network
    os.environ["HF_HUB_OFFLINE"] = "1"

    _stage(1, f"model: {MODELS[name]}")
    from cpo_fast.demo import convert_demo_model, find_gguf, reasoner_recipe, smollm2_recipe

    gguf = find_gguf() if name == "smollm2" else None
    with stage("loading the libraries"):
        _quiet_libraries()
        from cpo_fast.data.pair_files import write_rows
        from cpo_fast.dtype import dtype_name, resolve_dtype
        from cpo_fast.files import write_atomic
        from cpo_fast.models import resolve_device
        from cpo_fast.search.collect import collect
        from cpo_fast.train.loop import train
    if gguf is None:
        recipe = reasoner_recipe(out, quick, seed)
    else:
        with stage("converting the model"):
            recipe = smollm2_recipe(convert_demo_model(gguf), out, quick, seed)

    config = recipe.config
    device = resolve_device(config.model.device)
    say(f"  {config.model.path}, {dtype_name(resolve_dtype(config.model.dtype, device))} on {device}")
    settings = Path(config.run) / "demo.yaml"
    if settings.exists():  # of a demonstration before: its checkpoints may be of more or fewer steps
        shutil.rmtree(settings.with_name("checkpoints"), ignore_errors=True)
    write_atomic(settings, dump_config(config))
    _stage(2, f"collect: {config.search.num_candidates} thoughts per state, {config.search.num_kept} states kept")
    collected = collect(config, progress=_collect_line)
    _stage(3, "pairs: every winning thought against its losing siblings")
    with stage("pairs"):
        pairs = write_rows(collected.trees_path, config.data.path)
    say(f"  {len(pairs.rows)} pairs from {pairs.num_trees} trees")
    _stage(4, f"train: LoRA of rank {config.lora.r}, at most {config.train.max_steps} optimizer steps")
    trained = train(config, progress=_train_line)
    _stage(5, "eval: greedy chain of thought, base and adapter")
    base = _evaluate(recipe, None)
    adapter = _evaluate(recipe, trained.adapter_path)
    return _Found(recipe, collected, pairs, trained, base, adapter)


def _evaluate(recipe: "Recipe", adapter: Path | None) -> "Evaluation":
    from cpo_fast.evaluate import evaluate

    config = recipe.config
    changes: dict[str, Any] = {"task": recipe.asked, "eval": config.eval.model_copy(update={"path": None})}
    if adapter is not None:
        changes["model"] = config.model.model_copy(update={"adapter": str(adapter)})
    with stage(f"evaluation of the {'base' if adapter is None else 'adapter'}") as place:
        found = evaluate(config.model_copy(update=changes), on_question=partial(place.at, unit="questions"))
    say(f"  {'before' if adapter is None else 'after'}: {found.num_correct} of {found.num_graded} right")
    return found


def _stage(number: int, text: str) -> None:
    say(f"[{number}/5] {text}")


def _quiet_libraries() -> None:
    """Libraries' own bars and notices off: this command shows its own progress, and errors still come through."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _is_said(number: int, total: int) -> bool:
    """Whether so far along, a line stays on the screen: `MAX_LINES` a stage at most, the last one always."""
    return number == total or number % -(-total // MAX_LINES) == 0


def _collect_line(number: int, total: int, tree: Any, seconds: float) -> None:
    if _is_said(number, total):
        say(
            f"  {number}/{total} {tree.id}: {len(tree.nodes)} thoughts, {len(tree.winning_nodes)} winning paths, "
            f"answer {tree.answer}, {seconds:.1f} s"
        )


def _train_line(values: dict[str, Any], num_steps: int) -> None:
    from cpo_fast.cli.train import figure

    if _is_said(values["step"], num_steps):
        say(
            f"  step {values['step']}/{num_steps}: loss {values['loss']:.4f}, "
            f"pairs ranked right {figure(values, 'rewards/accuracies', '.0%')}, {values['seconds']:.1f} s"
        )


def _report(found: _Found, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from cpo_fast.demo.report import HEADINGS, first_gained, notes, table_rows, verdict
    from cpo_fast.evaluate import compare

    base, adapter, collected, trained = found.base, found.adapter, found.collected, found.trained
    comparison = compare(base, adapter, ("before", "after"))
    console, run = Console(), Path(found.recipe.config.run)

    def tell(text: str) -> None:
        console.print(Text(text))  # unlike an echo it breaks lines between words

    table = Table("", *(Column(heading, justify="right") for heading in HEADINGS), title="Before and after")
    table.title_justify = "left"
    for row in table_rows(base, adapter, collected):
        table.add_row(*row)
    click.echo()
    console.print(table)
    for note in notes(comparison, collected, len(found.pairs.rows), trained, found.recipe):
        tell(note)
    tell(f"{seconds:.0f} s in all.")
    gained = first_gained(base, adapter)
    if gained is not None:
        tell(f"\nOne that it answers now: {gained[0].question} (answer {gained[0].gold})")
        chains = Table("before", "after")
        chains.add_row(*(Text(result.chain.strip()) for result in gained))
        console.print(chains)
    click.echo()
    for sentence in filter(None, (trained.alarm, *trained.remarks, found.recipe.caveat)):
        tell(sentence)
    tell(
        f"\nfiles: {run} (demo.yaml, trees.jsonl, pairs.jsonl, metrics.jsonl, adapter, eval-base.json, eval-adapter.json)"
    )
    tell(
        f"next: in a copy of {run / 'demo.yaml'} set run, model, task and train.lr (the paper's is 5e-6); then cpo-fast "
        "collect, pairs, train and eval"
    )
    from cpo_fast.cli.report import written_report

    tell(written_report(run))
    click.echo()
    tell(verdict(adapter, comparison, collected))
