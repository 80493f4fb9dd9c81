"""The fixed set of golden runs: what is asked of the command line, in order; later runs read what earlier ones wrote.

Only what a user can write stands here: commands, configuration keys and file names. Every path is relative to the output
folder, so that hashes of settings and the model's path in a file do not depend on where that folder lies.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

TASKS = {"svamp": "inputs/svamp.json", "hotpotqa": "inputs/hotpotqa.json", "fever": "inputs/fever.jsonl"}
BASE: dict[str, Any] = {
    "seed": 1,
    "model": {"path": "inputs/talker", "dtype": "float32", "device": "cpu"},
    "task": {"name": "svamp", "path": "inputs/svamp.json"},
    "search": {
        "num_candidates": 5,
        "num_kept": 2,
        "max_steps": 3,
        "max_thought_tokens": 5,
        "num_verdicts": 3,
        "max_verdict_tokens": 5,
        "arena_tokens": 30_000,
    },
    "lora": {"r": 4, "alpha": 8},
    "train": {"lr": 0.02, "batch_pairs": 6, "num_epochs": 2},
    "eval": {"max_new_tokens": 20},
}


@dataclass(frozen=True)
class Run:
    """One run: a configuration file and the commands that are given it.

    Attributes:
        name: its folder is `runs/<name>`, its configuration `configs/<name>.yaml`.
        config: sections that differ from `BASE`.
        commands: arguments of the command line; `{config}` and `{run}` stand for the two paths.
        small: whether it is part of the reduced set.
    """

    name: str
    config: dict[str, Any]
    commands: tuple[tuple[str, ...], ...]
    small: bool = False

    @property
    def folder(self) -> str:
        """Where the run writes."""
        return f"runs/{self.name}"

    @property
    def config_path(self) -> str:
        """Where its configuration lies."""
        return f"configs/{self.name}.yaml"

    def values(self) -> dict[str, Any]:
        """The whole configuration."""
        values = {"run": self.folder, **copy.deepcopy(BASE)}
        for section, given in self.config.items():
            if isinstance(given, dict):
                values[section] = {**values.get(section, {}), **given}
            else:
                values[section] = given
        return values

    def arguments(self) -> list[list[str]]:
        """The commands with their paths."""
        return [
            [part.format(config=self.config_path, run=self.folder) for part in command] for command in self.commands
        ]


def all_runs() -> list[Run]:
    """Every run, in order."""
    return [*_searches(), *_search_options(), *_pairs(), *_trainings(), *_evaluations(), *_refusals()]


def small_runs() -> list[Run]:
    """The reduced set, in order."""
    return [run for run in all_runs() if run.small]


SMALL_SEARCHES = {
    "collect/svamp-bfs-arena-logits-plain",
    "collect/hotpotqa-dfs-arena-sample-chat",
    "collect/fever-bfs-hf-sample-plain",
}


def _searches() -> Iterator[Run]:
    """Each strategy, family, engine and evaluator, plain and through the chat template."""
    choices = product(TASKS, ("bfs", "dfs"), ("arena", "hf"), ("logits", "sample"), ("plain", "chat"))
    for task, strategy, engine, evaluator, form in choices:
        name = f"collect/{task}-{strategy}-{engine}-{evaluator}-{form}"
        config = {
            "task": {"name": task, "path": TASKS[task], "chat": form == "chat"},
            "search": {"strategy": strategy, "engine": engine, "evaluator": evaluator},
        }
        said = ("--json",) if evaluator == "logits" else ()
        small = name in SMALL_SEARCHES
        yield Run(name, config, (("collect", "{config}", *said),), small)


def _search_options() -> Iterator[Run]:
    """One run for each other option that decides trees, and for the ways a run is shared out or continued."""

    def run(name: str, search: dict[str, Any], *commands: tuple[str, ...], small: bool = False, **more: Any) -> Run:
        config = {"search": search, **more}
        return Run(f"search/{name}", config, commands or (("collect", "{config}"),), small)

    yield run("ties", {"evaluator": "sample", "keep_ties": True, "num_verdicts": 2})
    for engine in ("arena", "hf"):
        sampling = {"top_k": 12, "top_p": 0.9, "repetition_penalty": 1.3, "temperature": 0.7}
        yield run(f"sampling-{engine}", {"engine": engine, "evaluator": "sample", **sampling}, small=engine == "arena")
        yield run(f"budget-{engine}", {"engine": engine, "max_nodes": 8, "strategy": "dfs", "dfs_threshold": 5.0})
        yield run(f"mcts-{engine}", {"engine": engine, "strategy": "mcts", "num_simulations": 6, "min_value": 5.0})
        yield run(f"failed-{engine}", {"engine": engine}, task={"path": "inputs/plain.jsonl"})
        adapter: dict[str, Any] = {"model": {"adapter": "inputs/adapter"}}
        yield run(f"adapter-{engine}", {"engine": engine, "evaluator": "sample"}, **adapter)
        yield run(f"merged-{engine}", {"engine": engine, "merge_adapter": True}, **adapter)
        yield run(f"bfloat16-{engine}", {"engine": engine, "strategy": "dfs"}, model={"dtype": "bfloat16"})
        babbler: dict[str, Any] = {
            "model": {"path": "inputs/babbler"},
            "task": {"name": "fever", "path": TASKS["fever"]},
        }
        yield run(f"babbler-{engine}", {"engine": engine, "num_candidates": 3}, **babbler)
    sharing = {"batch_size": 3, "questions_in_flight": 2, "prefill_tokens": 500, "arena_tokens": 6000}
    yield run("shared-out", sharing, task={"name": "hotpotqa", "path": TASKS["hotpotqa"]})
    yield run("strict", {"evaluator": "sample", "unparseable": "impossible", "value_impossible": 0.25})
    orders = {"shuffle_demonstrations": True}
    yield run("shuffled", {"evaluator": "logits"}, seed=7, task=orders)
    yield run("unshuffled", {"shuffle_evaluator": False})
    preset = {"num_candidates": 4, "max_verdict_tokens": 5}
    yield run("official", preset, preset="official")
    yield run("paper", preset, preset="paper")
    yield run("gsm8k", {}, task={"name": "gsm8k", "path": "inputs/gsm8k.jsonl"})
    yield run("bamboogle", {}, task={"name": "bamboogle", "path": "inputs/bamboogle.csv"})
    yield run("vitaminc", {}, task={"name": "vitaminc", "path": "inputs/vitaminc.jsonl"})
    workers = tuple(("collect", "{config}", "--worker", f"{index}/2") for index in range(2))
    yield run("workers", {}, *workers, task={"name": "fever", "path": TASKS["fever"]})
    continued = (
        ("collect", "{config}", "task.num_questions=1", "task.skip_questions=1"),
        ("collect", "{config}", "--json"),
    )
    yield run("continued", {}, *continued)
    yield run("import", {}, ("collect", "{config}", "--import-official", "inputs/official.json"))


RULES = ("all", "lower", "lowest", "fpo")
TREES = {
    "svamp": "runs/collect/svamp-bfs-arena-logits-plain/trees.jsonl",
    "fever": "runs/collect/fever-bfs-hf-sample-plain/trees.jsonl",
    "hotpotqa": "runs/collect/hotpotqa-dfs-arena-sample-chat/trees.jsonl",
}


def _pairs() -> Iterator[Run]:
    """Every rule on trees of each family, the draws, supervised rows, and parquet."""
    for task, trees in TREES.items():
        commands = [
            ("pairs", trees, "-o", f"{{run}}/{rule}.jsonl", f"pairs.rule={rule}", *(["--json"] * (rule != "all")))
            for rule in RULES
        ]
        commands.append(("pairs", trees, "-o", "{run}/half.jsonl", "pairs.rejected_fraction=0.5", "seed=3"))
        commands.append(("pairs", trees, "-o", "{run}/drawn.jsonl", "pairs.num_questions=1", "seed=5", "--json"))
        commands.append(("pairs", trees, "-o", "{run}/capped.jsonl", "pairs.rule=fpo", "pairs.max_fpo_pairs=2"))
        commands.append(("pairs", trees, "-o", "{run}/sft.jsonl", "--sft"))
        yield Run(f"pairs/{task}", {}, tuple(commands), small=True)
    parquet = ("pairs", TREES["svamp"], "-o", "{run}/pairs.parquet", "pairs.rule=lower")
    yield Run("pairs/parquet", {}, (parquet,))


def _trainings() -> Iterator[Run]:
    """Preferences by every rule and reference, fine-tuning, and data of other hands."""

    def run(name: str, small: bool = False, *, more: tuple[str, ...] = (), **config: Any) -> Run:
        config = {"data": {"path": TREES["svamp"]}, **config}
        return Run(f"train/{name}", config, (("train", "{config}", *more),), small)

    for rule in RULES:
        yield run(rule, pairs={"rule": rule}, train={"reference": "online"}, more=("--json",))
    online = {"batch_order": "questions", "reference": "online"}
    yield run("fever", small=True, data={"path": TREES["fever"], "held_out": 0.4}, train=online)
    yield run("hotpotqa", data={"path": TREES["hotpotqa"], "eos": "every"}, train={"reference": "cached"})
    yield run("written", data={"path": "runs/pairs/svamp/lower.jsonl", "eos": "never"})
    yield run("parquet", data={"path": "runs/pairs/parquet/pairs.parquet"}, train={"num_epochs": 1})
    yield run("sft", small=True, train={"method": "sft"}, data={"path": TREES["svamp"], "held_out": 0.4})
    continued: dict[str, Any] = {"model": {"adapter": "inputs/adapter"}}
    for reference in ("online", "cached"):
        small = reference == "online"
        yield run(f"continued-{reference}", small, train={"reference": reference}, **continued)
    text = {"path": "inputs/text-pairs.jsonl", "max_drop": 0.5}
    yield run("text", small=True, data=text, train={"batch_pairs": 2}, pairs={"rule": "lower"})
    yield run("conversations", data={"path": "inputs/conversations.jsonl"}, train={"batch_pairs": 3})
    yield run("implicit", data={"path": "inputs/implicit.jsonl", "max_length": 24}, train={"batch_pairs": 3})
    yield run("completions", data={"path": "inputs/completions.jsonl"}, train={"method": "sft", "batch_pairs": 4})
    mixture = [{"path": TREES["svamp"], "weight": 2.0}, {"path": "inputs/conversations.jsonl"}]
    yield run("mixture", data={"mixture": mixture}, pairs={"num_questions": 3, "weight": "question"})
    early = {"num_epochs": 6, "patience": 1, "eval_every": 1, "lr": 0.5}
    yield run("early", data={"path": TREES["svamp"], "held_out": 0.4}, train=early)
    judged = {"stop_on": "accuracy", "max_steps": 4, "eval_every": 2}
    yield run("accuracy", train=judged, task={"path": "inputs/gsm8k.jsonl", "name": "gsm8k"}, eval={"batch_size": 2})
    small_forests = {"max_tokens": 1500, "batch_order": "questions", "log_every": 2}
    yield run("micro-batches", train=small_forests, pairs={"weight": "node"})
    for loss in ("hinge", "ipo"):
        yield run(loss, train={"loss_type": loss, "beta": 0.3, "num_epochs": 1})
    smooth = {
        "label_smoothing": 0.1,
        "nll_weight": 0.5,
        "optimizer": "sgd",
        "schedule": "constant",
        "weight_decay": 0.1,
    }
    yield run("smooth", train={**smooth, "warmup_ratio": 0.5, "max_grad_norm": 0.05})
    yield run("non_reentrant", train={"gradient_checkpointing": "non_reentrant", "max_steps": 2})
    yield run("zero", train={"zero_stage": 2, "max_steps": 2})
    yield run("bfloat16", model={"dtype": "bfloat16"}, train={"max_steps": 2})
    babbler: dict[str, Any] = {"model": {"path": "inputs/babbler"}, "data": {"path": "inputs/implicit.jsonl"}}
    yield run("babbler", lora={"target_modules": ["q_proj", "o_proj", "down_proj"]}, seed=4, **babbler)
    again = (("train", "{config}", "--json"), ("train", "{config}", "--json", "train.lr=0.01"))
    config = {"data": {"path": TREES["svamp"]}, "train": {"reference": "cached", "num_epochs": 1}}
    yield Run("train/reference-read-again", config, again)


def _evaluations() -> Iterator[Run]:
    """Chains and trees, base and adapter, and what is made of them together; a merged model at the end."""
    trained = "model.adapter=runs/train/fever/adapter"
    for task in TASKS:
        name, small = f"eval/{task}", task == "fever"
        # the reduced set must say the same on any machine, and what a trained adapter says can hang on a last bit
        adapter, label = ("model.adapter=inputs/adapter", "inputs-adapter") if small else (trained, "fever-adapter")
        config = {"task": {"name": task, "path": TASKS[task]}, "eval": {"method": "both"}}
        commands = [("eval", "{config}"), ("eval", "{config}", adapter, "--json")]
        commands.append(("eval", "--compare", f"runs/{name}/eval-base.jsonl", f"runs/{name}/eval-{label}.jsonl"))
        yield Run(name, config, tuple(commands), small)
    both = {"eval": {"method": "both"}, "search": {"evaluator": "sample", "strategy": "dfs"}}
    yield Run("eval/hf", {**both, "search": {**both["search"], "engine": "hf"}}, (("eval", "{config}", trained),))
    chat = {**both, "task": {"chat": True, "name": "fever", "path": TASKS["fever"]}}
    yield Run("eval/chat", chat, (("eval", "{config}", "--json"),))
    batched = {"eval": {"batch_size": 2}, "task": {"path": "inputs/plain.jsonl", "num_questions": 1}}
    yield Run("eval/batched", batched, (("eval", "{config}", "task.path=inputs/svamp.json", "--json"),))
    merged = {"search": {"merge_adapter": True}, "model": {"adapter": "inputs/adapter"}}
    yield Run("eval/merged", merged, (("eval", "{config}"),))
    yield Run("eval/beside-trees", {}, (("collect", "{config}"), ("eval", "{config}", "eval.method=both")))
    failed = {"task": {"path": "inputs/plain.jsonl"}}
    yield Run("eval/failed", failed, (("eval", "{config}"),))
    merge = ("merge", "{config}", trained, "-o", "{run}/model", "--json")
    yield Run("merge/adapter", {}, (merge,), small=True)
    rounded = ("merge", "{config}", "model.adapter=inputs/adapter", "model.dtype=bfloat16", "-o", "{run}/model")
    yield Run("merge/rounded", {}, (rounded, (*rounded[:-1], "{run}/lenient", "--max-kl", "10")))


def _refusals() -> Iterator[Run]:
    """Mistakes of a user, which end with one sentence and an exit code."""
    commands: list[tuple[str, ...]] = [
        ("collect", "{config}", "search.num_candidate=3"),
        ("collect", "{config}", "task.path=inputs/none.jsonl"),
        ("collect", "{config}", "task.name=fever"),
        ("collect", "{config}", "model.adapter=inputs/none"),
        ("collect", "{config}", "search.value_likely=0.5"),
        ("collect", "{config}", "search.arena_tokens=100"),
        ("train", "{config}", "data.path=inputs/none.jsonl"),
        ("train", "{config}", "data.path=inputs/text-pairs.jsonl"),
        ("train", "{config}", f"data.path={TREES['svamp']}", "lora.target_modules=[query]"),
        ("eval", "{config}", "eval.method=tree"),
        ("eval",),
        ("merge", "{config}", "-o", "{run}/model"),
        ("pairs", "inputs/gsm8k.jsonl"),
        ("colect", "{config}"),
    ]
    yield Run("refused", {}, tuple(commands))
