"""Rounds of search, pairs, training and evaluation, each round on what the model of the round before finds.

    cpo       M_t = CPO(M_t-1)         preferences from the trees of round t, which M_t-1 has searched
    sft_cpo   M_t = CPO(SFT(M_t-1))    imitation of the winning paths of the same trees first

A round goes on training the adapter of the round before, on the one base. Nothing is merged, so nothing is rounded, and
one adapter holds all rounds. The reference of a training is the adapter that it starts from, frozen, or with
`train.reference_model: base` the model without an adapter, M_0.

    run/round-0/          the evaluation of M_0 on train.dev_path, where that is set
    run/round-t/          what `collect`, `pairs`, `train` and `eval` write; with sft_cpo the first training is in sft/
    run/iterate.json      what every round brought, and the configuration that must not change
    run/adapter           of the best round so far

A stage that has ended stands in `iterate.json` and is not begun again. One that was killed goes on as its command does.
"""

import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cpo_fast import progress
from cpo_fast.adapters import adapter_hash, copy_adapter
from cpo_fast.config import Config, IterateConfig
from cpo_fast.errors import (
    CheckpointError,
    ConfigError,
    CpoFastError,
    DataError,
    EnvironmentProblem,
    Interrupted,
    first_line,
)
from cpo_fast.files import canonical_json, read_jsonl, short_hash, write_atomic
from cpo_fast.ranks import find_ranks
from cpo_fast.search.state_evaluator import check_evaluator
from cpo_fast.tasks import Question, Task, load_questions, load_task

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SUMMARY = "iterate.json"
INTERRUPTS = (130, 143)  # exit codes
# (command, its configuration): runs collect, train or eval to its end
RunCommand = Callable[[str, Config], None]
Round = dict[str, Any]


@dataclass(frozen=True)
class Watch:
    """What is called while rounds are made: with a line for each stage, and as `collect` and `train` call theirs."""

    on_stage: Callable[[str], None] = lambda line: None
    on_question: Callable[..., None] | None = None
    on_step: Callable[[dict[str, Any], int], None] | None = None


def iterate(config: Config, watch: Watch | None = None, run_command: RunCommand | None = None) -> dict[str, Any]:
    """Make the rounds that `config` asks for and that are not made yet, and return what `iterate.json` holds.

    Args:
        config: everything that collect, pairs, train and eval read, and section iterate.
        watch: for the screen.
        run_command: runs a command in place of this process (see `cpo_fast.cli.iterate`).

    Raises:
        ConfigError: the sections do not fit together, or this is a rank of a launcher.
        CheckpointError: the run folder holds rounds of another configuration.
        DataError: the first round's search leaves nothing to train on. CpoFastError: what a stage raises, its place
            before the sentence.
    """
    watch = watch or Watch()
    with _warned_once("cpo_fast.train.dev_questions"), _warned_once("cpo_fast.evaluate.evaluation"):
        identity = checked(config, watch)
        with _lock(Path(config.run)):
            rounds = Rounds(config, identity, watch, run_command or partial(run_here, watch=watch))
            rounds.make()
            return rounds.summary


def checked(config: Config, watch: Watch) -> dict[str, Any]:
    """Refuse what would fail after hours, and return what decides the rounds' results, by key.

    Says which gold answers will be read. `iterate.num_rounds` decides only how many rounds there are, and is left out.
    """
    from cpo_fast.train.dev_questions import voted_trees
    from cpo_fast.train.resume import training_identity

    settings, train = config.iterate, config.train
    if find_ranks().world_size > 1:
        raise ConfigError("iterate starts its own ranks; leave the launcher out and give --gpus N")
    if not config.model.path:
        raise ConfigError("model.path is empty; set it to a model's folder or hub id")
    if train.method == "sft":
        raise ConfigError("train.method=sft: iterate.method says what a round trains; leave train.method out")
    if config.data.mixture:
        raise ConfigError("data.mixture: each round trains on the trees of its own search; leave the mixture out")
    if train.reference_model == "base" and config.model.adapter is not None:
        raise ConfigError(
            "train.reference_model=base: the base without model.adapter is not the model that the rounds begin with; merge "
            "the adapter first (cpo-fast merge), or leave the key out"
        )
    if settings.stop_on == "accuracy" and train.dev_path is None:
        raise ConfigError(
            "iterate.stop_on=accuracy asks questions that are not searched, and train.dev_path names none; set it to a "
            "file of questions with answers, or set iterate.stop_on=never"
        )
    if settings.stop_on == "agreement" and train.dev_trees is None:
        raise ConfigError(
            "iterate.stop_on=agreement compares the chains of every round with the same votes, and train.dev_trees names "
            "none; set it to trees.jsonl of questions that no round searches, or set iterate.stop_on=never"
        )
    task, searched = _searched_questions(config)
    check_evaluator(config.search, task)
    dev = [] if train.dev_path is None else load_questions(_asking_dev(config))[1]
    if settings.stop_on == "accuracy" and not any(question.gold is not None for question in dev):
        raise ConfigError(f"iterate.stop_on=accuracy: no question of {train.dev_path} has a reference answer")
    voted = [] if settings.stop_on != "agreement" else voted_trees(config, ())[0]
    asked = {"dev_path": {question.text for question in dev}, "dev_trees": {tree.question for tree in voted}}
    for key, texts in asked.items():
        both = texts & {question.text for question in searched}
        if both:
            watch.on_stage(
                f"warning: {len(both)} of the {len(texts)} questions of train.{key} are searched and trained on too"
            )
    watch.on_stage(_gold_sentence(config))
    model_hash, dtype = _check_training(config)
    values = training_identity(config, model_hash, dtype, [])
    del values["data"]  # of no rows
    sections = {
        "task": config.task.model_dump(mode="json", exclude={"path"}),
        "search": config.search.result_settings(),
        "iterate": settings.model_dump(mode="json", exclude={"num_rounds"}),
    }
    values |= {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    values |= {"task": task.name, "eval.max_new_tokens": config.eval.max_new_tokens}
    of_file = load_task(config).load(config.task.path)  # all of it: more rounds may be asked for later
    values["questions"] = short_hash(canonical_json([[question.id, question.text] for question in of_file]))
    values["dev questions"] = short_hash(canonical_json([[each.id, each.text, each.gold] for each in dev]))
    if voted:
        values["dev votes"] = short_hash(canonical_json([[tree.id, tree.question, tree.answer] for tree in voted]))
    return values


def _searched_questions(config: Config) -> tuple[Task, list[Question]]:
    """The questions of all rounds."""
    number = config.task.num_questions
    if not config.iterate.new_questions:
        return load_questions(config)
    if number is None:
        raise ConfigError(
            "iterate.new_questions: task.num_questions says how many each round asks, and is not set; set it"
        )
    wanted = number * config.iterate.num_rounds
    task, questions = load_questions(_with(config, "task", num_questions=wanted))
    if len(questions) < wanted:
        raise ConfigError(
            f"iterate.new_questions: {config.iterate.num_rounds} rounds of task.num_questions={number} ask {wanted} "
            f"questions, and {config.task.path} has {len(questions)} after task.skip_questions="
            f"{config.task.skip_questions}; lower one of them"
        )
    return task, questions


def _gold_sentence(config: Config) -> str:
    """Which reference answers decide something, in words. None ever reaches a search, a pair or a loss."""
    uses = []
    if config.iterate.stop_on == "accuracy":
        uses.append(f"those of {config.train.dev_path} choose the best round and end the rounds (iterate.stop_on)")
    if config.train.stop_on == "accuracy":
        path = config.train.dev_path or config.task.path
        uses.append(f"those of {path} choose the best step of a training (train.stop_on)")
    return f"gold answers: {'; '.join(uses) or 'none decides anything'}"


def _check_training(config: Config) -> tuple[str, str]:
    """Refuse an adapter or LoRA targets that training would refuse after the search. Returns the base's hash and dtype."""
    from cpo_fast.adapter_kinds import reason_against_training
    from cpo_fast.dtype import dtype_name, resolve_dtype
    from cpo_fast.models import check_forest_adapter, model_hash, resolve_device
    from cpo_fast.train.plan import without_weights
    from cpo_fast.train.policy import load_policy

    device = resolve_device(config.model.device)
    if config.model.adapter is not None:
        check_forest_adapter(config.model, reason_against_training)
    else:
        with suppress(EnvironmentProblem):  # a model that needs its weights for that; training will look
            load_policy(config, *without_weights(config, device))
    return model_hash(config.model.path), dtype_name(resolve_dtype(config.model.dtype, device))


class Rounds:
    """The rounds of one run folder: what is made, what is to be made, and which is the best."""

    def __init__(self, config: Config, identity: dict[str, Any], watch: Watch, run_command: RunCommand) -> None:
        """Read `iterate.json`, or begin it. Raises as `iterate`."""
        self.config, self.settings, self.run = config, config.iterate, Path(config.run)
        self.watch, self.run_command = watch, run_command
        self.path = self.run / SUMMARY
        self.summary = self._opened(identity)

    @property
    def rounds(self) -> list[Round]:
        return list(self.summary["rounds"])

    def make(self) -> None:
        """Make rounds until `iterate.num_rounds`, or until they do not help."""
        number, reason = 0, ""
        while not reason:
            self._make(number)
            reason = self._reason_to_stop(number)
            self._publish()
            number += 1
        self.summary["stopped"] = reason
        self._write()

    def stages(self, number: int) -> list[str]:
        """The stages of a round, in order."""
        evaluation = ["eval"] if self.config.train.dev_path is not None else []
        evaluation += ["votes"] if self.settings.stop_on == "agreement" else []
        if number == 0:
            return evaluation
        return ["collect", "pairs", *(["sft"] if self.settings.method == "sft_cpo" else []), "train", *evaluation]

    def config_of(self, stage: str, number: int) -> Config:
        """The configuration that the command of a stage is given."""
        folder = self.run / f"round-{number}"
        config = self.config.model_copy(update={"run": str(folder)})
        if stage == "eval":
            config = _with(_with(config, "eval", method="cot"), "model", adapter=self._adapter_of(number))
            return _with(config, "eval", path=config.train.dev_path)
        if stage == "votes":
            return _with(config, "model", adapter=self._adapter_of(number))
        config = _with(config, "model", adapter=self._adapter_of(number - 1))
        if self.settings.new_questions:
            count = config.task.num_questions or 0
            config = _with(config, "task", skip_questions=config.task.skip_questions + (number - 1) * count)
        config = _with(config, "data", path=str(folder / "trees.jsonl"))
        if stage == "sft":
            rate = self.settings.sft_lr or config.train.lr
            config = _with(config, "train", method="sft", lr=rate).model_copy(update={"run": str(folder / "sft")})
        elif stage == "train" and self.settings.method == "sft_cpo":
            config = _with(config, "model", adapter=str(folder / "sft" / "adapter"))
        return config

    def _adapter_of(self, number: int) -> str | None:
        """The adapter of M_number, None for a base without one."""
        return self.config.model.adapter if number == 0 else str(self.run / f"round-{number}" / "adapter")

    def _make(self, number: int) -> None:
        if number == len(self.rounds):
            self.summary["rounds"].append({"round": number, "stages": {}})
        stages = self.rounds[number]["stages"]
        for stage in self.stages(number):
            record = stages.setdefault(stage, {"num_starts": 0})
            if "seconds" not in record:
                record["num_starts"] += 1
                self._write()
                config = self.config_of(stage, number)
                self.watch.on_stage(f"round {number} of {self.settings.num_rounds}, {stage}: {config.run}")
                started = time.perf_counter()
                with _placed(f"round {number}, {stage}"), progress.stage(f"round {number}, {stage}"):
                    numbers = self._made(stage, config)
                record |= {**numbers, "seconds": round(time.perf_counter() - started, 3)}
                self._write()
                _free_memory()
            if stage == "pairs" and not record["num_pairs"]:
                if number == 1:
                    raise DataError(f"round 1, pairs: {_no_pairs(record)}; change section search or pairs")
                return

    def _made(self, stage: str, config: Config) -> dict[str, Any]:
        """Run a stage, and return its numbers as its files say them."""
        folder = Path(config.run)
        if stage == "pairs":
            return _write_pairs(config)
        if stage == "votes":
            return _agreement(config)
        if stage in ("sft", "train"):
            self.run_command("train", config)
            return _training_numbers(folder / "metrics.jsonl")
        self.run_command(stage, config)
        return _search_numbers(config) if stage == "collect" else _evaluation_numbers(folder, config.seed)

    def _reason_to_stop(self, number: int) -> str:
        """Why no round follows round `number`, in words, or "" where one does."""
        if number and not _is_made(self.rounds[number]):
            return f"round {number}: {_no_pairs(self.rounds[number]['stages']['pairs'])}"
        scores = self.scores()
        if num_without_help(scores, self.settings) >= self.settings.patience:
            best = max(scores[:-1])
            than = f"{best:.3f}" + (f" by more than {self.settings.min_gain:g}" if self.settings.min_gain else "")
            return f"round {number} does not help: dev {self.settings.stop_on} {scores[-1]:.3f}, not better than {than}"
        if number >= self.settings.num_rounds:
            return f"iterate.num_rounds={self.settings.num_rounds}"
        return ""

    def scores(self) -> list[float]:
        """What `iterate.stop_on` goes by, of every round that was made, from M_0 on. Nothing where it is `never`."""
        stage = SCORES.get(self.settings.stop_on, "")
        made = [one["stages"][stage] for one in self.rounds if "seconds" in one["stages"].get(stage, {})]
        return [float(record[self.settings.stop_on]) for record in made]

    def best(self) -> int:
        """The round whose model is the best: the first of the highest score, or the last without a score."""
        scores = self.scores()
        if not scores:
            return max(one["round"] for one in self.rounds if _is_made(one))
        return scores.index(max(scores))

    def _publish(self) -> None:
        """Make `run/adapter` the best round's. There is none while a base without an adapter is the best."""
        best, target = self.best(), self.run / "adapter"
        source = self._adapter_of(best)
        if source is not None and not (target.is_dir() and adapter_hash(target) == adapter_hash(source)):
            copy_adapter(Path(source), target)
        self.summary |= {"best_round": best, "adapter": None if source is None else str(target)}
        self._write()

    def _opened(self, identity: dict[str, Any]) -> dict[str, Any]:
        from cpo_fast.train.resume import differences

        if not self.path.exists():
            if (self.run / "adapter").exists():
                raise ConfigError(
                    f"run: {self.run} holds the adapter of another run, in whose place the best round's would come; choose "
                    "another run folder"
                )
            empty: dict[str, Any] = {"rounds": [], "best_round": 0, "adapter": None, "stopped": ""}
            return {"schema_version": SCHEMA_VERSION, "config": identity, **empty}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            version, saved = found["schema_version"], found["config"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read ({first_line(error)}); choose another run folder"
            ) from None
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{self.path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}; choose another run "
                "folder"
            )
        differing = differences(saved, identity)
        if differing:
            raise CheckpointError(
                f"{self.run} holds rounds of another configuration ({'; '.join(differing.values())}); set it back, or "
                "choose another run folder"
            )
        return {**found, "stopped": ""}

    def _write(self) -> None:
        write_atomic(self.path, json.dumps(self.summary, indent=2) + "\n")


# the stage that measures a round, for every `iterate.stop_on` that goes by a measure
SCORES = {"accuracy": "eval", "agreement": "votes"}


def num_without_help(scores: Sequence[float], settings: IterateConfig) -> int:
    """How many of the newest rounds in a row have not beaten all before them by more than `iterate.min_gain`.

    Args:
        scores: of M_0 and the rounds after it. M_0 has nothing to beat.
    """
    count = 0
    for place in range(1, len(scores)):
        helped = scores[place] > max(scores[:place]) + settings.min_gain
        count = 0 if helped else count + 1
    return count


def run_here(command: str, config: Config, watch: Watch) -> None:
    """Run collect, train or eval in this process, as its command does."""
    if command == "collect":
        from cpo_fast.search.collect import collect

        found = collect(config, progress=watch.on_question)
        if found.statuses.get("failed", 0) == found.num_questions:
            raise CpoFastError(f"every question failed; the first: {found.first_failure[:400]}")
    elif command == "train":
        from cpo_fast.train.loop import train

        train(config, progress=watch.on_step)
    else:
        from cpo_fast.evaluate import evaluate, run_overview

        with progress.stage("evaluation") as shown:
            evaluate(config, on_question=partial(shown.at, unit="questions"))
        run_overview(Path(config.run), config.seed).write(Path(config.run))


def _write_pairs(config: Config) -> dict[str, Any]:
    """`pairs.jsonl`, which is what training makes of the trees, and how many winning paths there are."""
    from cpo_fast.data.pair_files import write_rows

    trees = Path(config.data.path)
    made = write_rows(trees, trees.with_name("pairs.jsonl"), config.pairs, config.seed)
    return {
        "num_pairs": len(made.rows),
        "num_trees": made.num_trees,
        "dropped": made.unused_by_reason,
        "trees_without_pairs": made.trees_without_by_reason,
    }


def _search_numbers(config: Config) -> dict[str, Any]:
    from cpo_fast.search.statistics import diversity, summarise, tree_statistics
    from cpo_fast.tree import read_trees

    path = Path(config.data.path)
    trees = read_trees(path)
    task, questions = load_questions(config)
    found = summarise(path, trees, [tree_statistics(tree) for tree in trees], task, len(questions), 0, 0.0).to_dict()
    left_out = ("trees_path", "num_missing", "num_resumed", "num_other", "first_failure", "seconds")
    return {key: value for key, value in found.items() if key not in left_out} | asdict(diversity(trees))


def _training_numbers(path: Path) -> dict[str, Any]:
    lines = [line for _, line in read_jsonl(path)]
    last = lines[-1]
    names = ("loss", "rewards/accuracies", "rewards/margins", "alarm")
    best = [line["eval_best_step"] for line in lines if "eval_best_step" in line]
    numbers = {"num_steps": last["step"], "best_step": best[-1] if best else last["step"]}
    return numbers | {name: last[name] for name in names if name in last}


def _evaluation_numbers(folder: Path, seed: int) -> dict[str, Any]:
    from cpo_fast.evaluate import run_overview

    (found,) = run_overview(folder, seed).evaluations  # a round evaluates one model by one method
    names = ("num_questions", "num_graded", "num_correct", "num_unanswered", "accuracy", "interval")
    return {name: getattr(found, name) for name in names} | {"mean_tokens": found.tokens.mean}


def _agreement(config: Config) -> dict[str, Any]:
    """How many questions of `train.dev_trees` a greedy chain of the model answers as their trees have voted."""
    from cpo_fast.models import num_embeddings
    from cpo_fast.search.collect import load_searched_model, searched_weights
    from cpo_fast.train.dev_questions import load_dev_questions

    model, tokenizer = load_searched_model(config)
    config = _with(config, "train", stop_on="agreement")
    asked = load_dev_questions(config, tokenizer, (), (), num_embeddings(model))
    assert asked is not None
    with searched_weights(model, config.search):
        answers = asked.answers(model, asked.questions)
    num_agreeing = sum(asked.is_as_expected(answers[question.id], question.expected) for question in asked.questions)
    return {
        "num_questions": len(answers),
        "num_agreeing": num_agreeing,
        "num_unanswered": list(answers.values()).count(None),
        "agreement": num_agreeing / len(answers),
    }


def _is_made(one: Round) -> bool:
    """Whether a round has a model of its own that is whole."""
    return one["round"] == 0 or "seconds" in one["stages"].get("train", {})


def _no_pairs(record: dict[str, Any]) -> str:
    reasons = ", ".join(f"{count} trees: {reason}" for reason, count in record["trees_without_pairs"].items())
    return f"the search leaves no pair to train on ({reasons})"


def _asking_dev(config: Config) -> Config:
    return config.model_copy(update={"task": config.task.asking(config.train.dev_path)})


def _with(config: Config, section: str, **changes: Any) -> Config:
    """The configuration with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """Say before the sentence of an error in which round and stage it is."""
    try:
        yield
    except CpoFastError as error:
        error.args = (f"{where}: {error}", *error.args[1:])
        raise


@contextmanager
def _warned_once(name: str) -> Iterator[None]:
    """Let a logger say each sentence once: every round reads the same files and finds the same in them."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_first = text not in said
        said.add(text)
        return is_first

    its = logging.getLogger(name)
    its.addFilter(is_new)
    try:
        yield
    finally:
        its.removeFilter(is_new)


def _free_memory() -> None:
    """What a stage has held, models and engines in circles among it, before the next one loads its own."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".iterate.lock", blocking=False):
            yield
    except Timeout:
        raise EnvironmentProblem(
            f"{run}: another process makes rounds here; wait for it, or choose another run folder"
        ) from None


def stage_ended(code: int) -> CpoFastError:
    """The error of a command that ran in processes of its own and has said itself what is wrong."""
    if code in INTERRUPTS:
        return Interrupted("interrupted; the same command goes on from there", code)
    error = CpoFastError(f"ended with exit code {code}, for the reason that stands above")
    error.exit_code = code
    return error
