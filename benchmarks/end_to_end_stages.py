"""The stages of `benchmarks.end_to_end`, for ours and for the alternative, and one of them measured in a process.

    python -m benchmarks.end_to_end_stages FOLDER SIDE STAGE

reads `collect.yaml` and `asked.yaml` of the folder, runs the stage, and writes what it took and gave to SIDE-STAGE.json.
Imports are left out of the measurement and told apart. Each stage loads its model itself, as commands do.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS, THEIRS = "ours", "alternative"
STAGES = ("collect", "pairs", "train", "eval base", "eval adapter")

_COMMON = ("torch", "transformers", "transformers.generation", "transformers.models.llama.modeling_llama", "peft")
_SEARCH = (*_COMMON, "cpo_fast.models", "cpo_fast.search.collect", "cpo_fast.evaluate")
_PAIRS = ("cpo_fast.data.pair_files",)
# both trainings import DeepSpeed, where it is installed
IMPORTS: dict[tuple[str, str], tuple[str, ...]] = {
    (OURS, "collect"): (*_SEARCH, "cpo_fast.search.engine.arena_engine"),
    (OURS, "pairs"): _PAIRS,
    (OURS, "train"): (*_COMMON, "deepspeed", "cpo_fast.train.loop"),
    (OURS, "eval"): (*_SEARCH, "cpo_fast.search.engine.arena_engine"),
    (THEIRS, "collect"): (*_SEARCH, "benchmarks.end_to_end_peer"),
    (THEIRS, "pairs"): _PAIRS,
    (THEIRS, "train"): (
        *_COMMON,
        "deepspeed",
        "datasets",
        "trl",
        "trl.trainer.dpo_trainer",
        "benchmarks.end_to_end_peer",
    ),
    (THEIRS, "eval"): (*_SEARCH, "benchmarks.end_to_end_peer"),
}


def stock(config: Any, adapter: Path | None = None) -> tuple[Any, Any]:
    """Model and tokenizer as `transformers` loads them, the adapter merged into the weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = config.model.path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.model.dtype))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval(), AutoTokenizer.from_pretrained(path)


def adapter_of(folder: Path, side: str) -> Path:
    """Where a side's training leaves its adapter."""
    return folder / side / "adapter"


def collected(config: Any, folder: Path, side: str) -> dict[str, Any]:
    """Search the questions of `config.task`."""
    from cpo_fast.search.collect import collect

    if side == OURS:
        result = collect(config)
    else:
        import torch

        from benchmarks.end_to_end_peer import GenerateEngine

        model, tokenizer = stock(config)
        torch.manual_seed(config.seed)
        result = collect(
            config.model_copy(update={"run": str(folder / side)}), model, tokenizer,
            make_engine=lambda settings, prompts, loaded: GenerateEngine(loaded, prompts.tokenizer, rows_of(folder)),
        )  # fmt: skip
    return {"accuracy": result.vote_accuracy, "num_generated": result.num_generated_tokens}


def paired(config: Any, folder: Path, side: str) -> dict[str, Any]:
    """Make pairs of a side's trees: the same code for both."""
    from cpo_fast.data.pair_files import write_rows

    made = write_rows(folder / side / "trees.jsonl", pairs_of(folder, side), config.pairs, config.seed)
    return {"num_pairs": len(made.rows)}


def pairs_of(folder: Path, side: str) -> Path:
    """The pairs of a side's own trees. Both train on ours."""
    return folder / side / "pairs.jsonl"


def trained(config: Any, folder: Path, side: str) -> dict[str, Any]:
    """Train on our pairs."""
    pairs = pairs_of(folder, OURS)
    if side == OURS:
        from cpo_fast.train.loop import train

        train(config.model_copy(update={"data": config.data.model_copy(update={"path": str(pairs)})}))
    else:
        from benchmarks.end_to_end_peer import train_with_trl

        train_with_trl(config, *stock(config), pairs, folder / side)
    return {}


def asked(config: Any, folder: Path, side: str, stage: str) -> dict[str, Any]:
    """Ask greedy chains of the base or of the side's own adapter."""
    adapter = adapter_of(folder, side) if stage == "eval adapter" else None
    if side == OURS:
        from cpo_fast.evaluate import evaluate

        model = config.model.model_copy(update={"adapter": None if adapter is None else str(adapter)})
        search = config.search.model_copy(update={"merge_adapter": adapter is not None})
        result = evaluate(config.model_copy(update={"model": model, "search": search}))
        num_generated = sum(one.num_tokens for one in result.results)
        return {"accuracy": result.accuracy, "num_generated": num_generated, "num_asked": len(result.results)}
    chains, accuracy = chains_by_generate(config, folder, adapter)
    (folder / side / f"{stage}.json").write_text(json.dumps({name: chain.token_ids for name, chain in chains.items()}))
    num_generated = sum(chain.num_tokens for chain in chains.values())
    return {"accuracy": accuracy, "num_generated": num_generated, "num_asked": len(chains)}


def chains_by_generate(config: Any, folder: Path, adapter: Path | None) -> tuple[Mapping[str, Any], float]:
    """The alternative's chains of all questions, and the share of right ones."""
    from benchmarks.end_to_end_peer import GenerateEngine, greedy_chains
    from cpo_fast.tasks import Prompts, load_questions

    model, tokenizer = stock(config, adapter)
    task, questions = load_questions(config)
    prompts = Prompts(task, tokenizer, config.task.chat)
    engine = GenerateEngine(model, tokenizer, rows_of(folder))
    engine.cache_prefix(prompts.prefixes[0])
    by_name = {question.id: prompts.encode(question) for question in questions}
    chains = greedy_chains(engine, by_name, task, config.eval.max_new_tokens, config.search.max_steps)
    right = [task.is_correct(chains[one.id].answer(task), one.gold) for one in questions if one.gold is not None]
    return chains, sum(right) / len(right)


def rows_of(folder: Path) -> int:
    """Rows of the alternative's batches."""
    return int(json.loads((folder / "plan.json").read_text())["rows"])


def run_stage(folder: Path, side: str, stage: str) -> dict[str, Any]:
    """Run a stage: its tokens, both clocks, peak memory, and what it gave.

    Returns:
        tokens: positions that went through the model, padding and reference passes included, backward passes not.
        cpu, wall: seconds after the imports. import_cpu: those of the imports. peak_bytes: largest resident memory beyond
        that of the imports, None where the system does not tell.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as training sets it, for the import of DeepSpeed
    began = time.process_time()
    for name in IMPORTS[side, stage.split()[0]]:
        importlib.import_module(name)
    from cpo_fast.config import load_config

    _quiet()
    config = load_config(folder / ("asked.yaml" if stage.startswith("eval") else "collect.yaml"))
    (folder / side).mkdir(parents=True, exist_ok=True)
    functions: dict[str, Callable[[], dict[str, Any]]] = {
        "collect": lambda: collected(config, folder, side),
        "pairs": lambda: paired(config, folder, side),
        "train": lambda: trained(config, folder, side),
        "eval": lambda: asked(config, folder, side, stage),
    }
    before = resident_bytes(reset_peak=True)
    with counted_tokens() as tokens:
        cpu, wall = time.process_time(), time.perf_counter()
        gave = functions[stage.split()[0]]()
        cpu_end, wall_end = time.process_time(), time.perf_counter()
    peak = resident_bytes()
    return {
        "side": side,
        "stage": stage,
        "tokens": tokens[0],
        "cpu": cpu_end - cpu,
        "wall": wall_end - wall,
        "import_cpu": cpu - began,
        "peak_bytes": None if before is None or peak is None else peak[1] - before[0],
        **gave,
    }


@contextmanager
def counted_tokens() -> Iterator[list[int]]:
    """Counts the ids that any embedding looks up, in a list of one number."""
    count = [0]
    if "torch" not in sys.modules:
        yield count
        return
    from torch import nn

    look_up = nn.Embedding.forward

    def counting(self: Any, ids: Any) -> Any:
        count[0] += ids.numel()
        return look_up(self, ids)

    nn.Embedding.forward = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        nn.Embedding.forward = look_up  # type: ignore[method-assign]


def resident_bytes(reset_peak: bool = False) -> tuple[int, int] | None:
    """Resident memory of this process now, and its peak so far or since a reset. None where /proc does not tell."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(values["VmRSS"]) * 1024, int(values["VmHWM"]) * 1024


def _quiet() -> None:
    """Libraries' bars and notices off, which go to a log file."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "transformers" in sys.modules:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


def main(argv: list[str]) -> None:
    """Run one stage and write its measurement."""
    folder, side, stage = Path(argv[0]), argv[1], argv[2]
    result = run_stage(folder, side, stage)
    (folder / f"{side}-{stage}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
