"""`cpo-fast demo`: the whole line once on this machine, with a small real model and word problems that are shipped.

Model, search, pairs, training, evaluation of base and adapter, one table. The sizes are set so that two CPU cores need
minutes. What takes long on a CPU is generating tokens one at a time.
"""

import logging
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpo_fast.config import Config, dump_config, validate_config
from cpo_fast.progress import say, shown, stage

if TYPE_CHECKING:
    from cpo_fast.data.pair_files import TreeRows
    from cpo_fast.evaluate import Evaluation
    from cpo_fast.search.collect import CollectResult
    from cpo_fast.train.loop import TrainResult

LIFE_SECONDS = 1.0  # without a word before a line says what it is at, also where nobody watches
STATEMENT = (
    "A model of 135M parameters shows that the pipeline works, not what it gains: it is too small for reliable "
    "arithmetic, and a dozen questions cannot tell a difference from chance (see the intervals)."
)


@click.command("demo")
@click.option("--out", default="runs/demo", show_default=True, help="Folder that receives every file.")
@click.option(
    "--quick", is_flag=True, help="Search two questions and ask four: the shortest run that touches everything."
)
def demo_command(out: str, quick: bool) -> None:
    """Search, pairs, training and evaluation with SmolLM2-135M on twelve shipped word problems.

    Eight are searched and trained on, all twelve are asked before and after. Run again, it keeps the trees it has.
    """
    with shown(LIFE_SECONDS, err=False), stage("demo"):  # so that there is no moment without a stage
        started = time.perf_counter()
        found = _demonstrate(out, quick)
    _report(*found, time.perf_counter() - started)


def _demonstrate(out: str, quick: bool) -> "tuple[Path, CollectResult, TreeRows, TrainResult, list[Evaluation]]":
    """Every stage, and what `_report` shows of it."""
    # the hub client reads this once, when transformers is first imported: nothing here may reach for the network
    os.environ["HF_HUB_OFFLINE"] = "1"

    _stage(1, "model: SmolLM2-135M-Instruct (converted to safetensors on the first run)")
    from cpo_fast.demo import convert_demo_model, find_gguf

    gguf = find_gguf()
    with stage("loading the libraries"):
        _quiet_libraries()
        from cpo_fast.data.pair_files import write_rows
        from cpo_fast.dtype import dtype_name, resolve_dtype
        from cpo_fast.evaluate import evaluate
        from cpo_fast.files import write_atomic
        from cpo_fast.models import resolve_device
        from cpo_fast.search.collect import collect
        from cpo_fast.train.loop import train
    with stage("converting the model"):
        config = demo_config(convert_demo_model(gguf), out, quick)

    device = resolve_device(config.model.device)
    say(f"  {config.model.path}, {dtype_name(resolve_dtype(config.model.dtype, device))} on {device}")
    run = Path(config.run)
    write_atomic(run / "demo.yaml", dump_config(config))
    _stage(2, f"collect: {config.search.num_candidates} thoughts per state, {config.search.num_kept} states kept")
    collected = collect(config, progress=_collect_line)
    _stage(3, "pairs: every winning thought against its losing siblings")
    with stage("pairs"):
        pairs = write_rows(collected.trees_path, config.data.path)
    say(f"  {len(pairs.rows)} pairs from {pairs.num_trees} trees")
    _stage(4, f"train: LoRA of rank {config.lora.r}, at most {config.train.max_steps} optimizer steps")
    trained = train(config, progress=_train_line)
    _stage(5, "eval: greedy chain of thought, base and adapter")
    asked = config.task.model_copy(update={"num_questions": 4 if quick else None})
    adapted = config.model.model_copy(update={"adapter": str(trained.adapter_path)})
    with stage("evaluation of the base") as place:
        base = evaluate(config.model_copy(update={"task": asked}), on_question=partial(place.at, unit="questions"))
    with stage("evaluation of the adapter") as place:
        adapter = evaluate(
            config.model_copy(update={"task": asked, "model": adapted}),
            on_question=partial(place.at, unit="questions"),
        )
    return run, collected, pairs, trained, [base, adapter]


def demo_config(model: Path, out: str, quick: bool) -> Config:
    """The demonstration's configuration for the converted model in folder `model`, writing into `out`.

    `quick` changes how many questions and steps there are and nothing else, so both may share one folder.
    """
    from cpo_fast.demo import QUESTIONS

    return validate_config(
        {
            "run": out,
            "model": {"path": str(model)},
            "task": {"path": str(QUESTIONS), "num_questions": 2 if quick else 8},
            # a tenth of the paper's tree: 4 + 2 * 4 + 2 * 4 thoughts a question instead of 10 + 3 * 5 * 10
            "search": {"num_candidates": 4, "num_kept": 2, "max_steps": 3, "max_thought_tokens": 40},
            "data": {"path": str(Path(out) / "pairs.jsonl")},
            # the paper's rate and warm-up are for hundreds of steps; with so few, a rate at which the loss visibly moves
            "train": {
                "lr": 2e-4,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "num_epochs": 1,
                "max_steps": 2 if quick else 4,
                "batch_pairs": 8,
                "max_tokens": 2048,
            },
            "eval": {"max_new_tokens": 96},
        },
        source="demo",
    )


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


def _collect_line(number: int, total: int, tree: Any, seconds: float) -> None:
    say(
        f"  {number}/{total} {tree.id}: {len(tree.nodes)} thoughts, {len(tree.winning_nodes)} winning paths, "
        f"answer {tree.answer}, {seconds:.1f} s"
    )


def _train_line(values: dict[str, Any], num_steps: int) -> None:
    say(
        f"  step {values['step']}/{num_steps}: loss {values['loss']:.4f}, "
        f"pairs ranked right {values['rewards/accuracies']:.0%}, {values['seconds']:.1f} s"
    )


def _report(
    run: Path,
    collected: "CollectResult",
    pairs: "TreeRows",
    trained: "TrainResult",
    evaluations: "list[Evaluation]",
    seconds: float,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from cpo_fast.cli.eval import evaluation_table

    first, last = trained.first, trained.last
    table = Table(title="Demonstration", title_justify="left", show_header=False)
    for name, value in (
        ("questions searched", f"{collected.num_questions} ({collected.num_resumed} from an earlier run)"),
        ("thoughts in the trees", str(collected.num_thoughts)),
        ("answered by vote", f"{collected.num_correct} of {collected.num_gold} right"),
        ("preference pairs", str(len(pairs.rows))),
        ("optimizer steps", f"{trained.num_steps} in {trained.seconds:.0f} s"),
        ("loss, first and last step", f"{first['loss']:.4f}, {last['loss']:.4f}"),
        ("reward margin, first and last", f"{first['rewards/margins']:+.4f}, {last['rewards/margins']:+.4f}"),
        ("tokens the forest saved", f"{first['tokens/saved']:.0%} of the first step's"),
        ("seconds in all", f"{seconds:.0f}"),
    ):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print(evaluation_table(evaluations))
    click.echo(STATEMENT)
    click.echo(f"files: {run} (trees.jsonl, pairs.jsonl, metrics.jsonl, adapter, eval-base.json, eval-adapter.json)")
    click.echo(f"next: set model.path and task.path in {run / 'demo.yaml'}; then cpo-fast collect, pairs, train, eval")
