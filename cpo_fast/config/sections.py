"""The configuration: one pydantic model a section, the same names in YAML, in dotted overrides and in Python.

Values that the CPO paper (arXiv 2406.09136) fixes are the defaults. What it leaves open is marked as ours. Unknown keys
are errors. Nothing here imports torch.
"""

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen after validation, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("the number has more than 63 bits; take a smaller one")
        if isinstance(value, str):
            if "\0" in value:
                raise ValueError("the text holds a null character; take it out")
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("the text is not UTF-8; rename the file or folder that it names") from None
        return value


class ModelConfig(Section):
    """Which language model, in which precision, on which device."""

    path: str = Field("", description="folder or hub id of a Hugging Face causal language model")
    adapter: str | None = Field(None, description="folder of a PEFT adapter to load on top")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="precision of the frozen base weights; auto: bfloat16, but float32 on a CPU that is not as fast in "
        "bfloat16",
    )
    device: str = Field("auto", description="auto (cuda if there is one), cpu, or cuda:N")


class TaskConfig(Section):
    """Which questions are asked, and from where they come."""

    name: Literal["svamp", "gsm8k", "bamboogle", "2wikimultihopqa", "hotpotqa", "fever", "feverous", "vitaminc"] = (
        Field("svamp", description="the data set: how its questions are read, asked and answered")
    )
    file: str | None = Field(
        None,
        description="a task of your own, in place of task.name: its words and how answers are read (docs/tasks.md)",
    )
    module: str | None = Field(
        None,
        description="my_task.py:MyTask, Python code for what a task file cannot say; needs cpo-fast --trust-task-code",
    )
    path: str = Field(
        "", description="the released file, a JSONL of question[, answer], or hub:org/name[:config][:split]"
    )
    num_questions: int | None = Field(None, ge=1, description="ask only so many questions; null: all")
    skip_questions: int = Field(0, ge=0, description="leave out so many questions at the beginning of the file")
    chat: bool = Field(False, description="for instruct models: ask through the tokenizer's chat template")
    shuffle_demonstrations: bool = Field(False, description="show the worked examples in an order drawn by the seed")

    @model_validator(mode="after")
    def _has_one_name(self) -> "TaskConfig":
        if self.file is not None and self.name != "svamp":  # its default
            raise ValueError("name and file exclude each other; delete one of them")
        return self

    def asking(self, path: str | None) -> "TaskConfig":
        """This task with all questions of another file: `eval.path` or `train.dev_path`. Itself where there is none."""
        return self.model_copy(update={"path": path, "num_questions": None, "skip_questions": 0}) if path else self

    @model_serializer(mode="wrap")
    def _as_before_both_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # hashes of this section, and so comparisons with evaluations of older versions, stay as they were
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if value is not None or key not in ("file", "module")}


# settings of the search that decide its speed and memory, never its result
_PERFORMANCE_ONLY = {"batch_size", "questions_in_flight", "arena_tokens", "prefill_tokens", "cuda_graphs"}


class SearchConfig(Section):
    """Tree of thoughts: how states are expanded, judged and kept."""

    engine: Literal["arena", "hf"] = Field(
        "arena",
        description="arena: fast, many questions over one KV cache that is a tree; hf: plain Hugging Face, one state at a "
        "time, the reference",
    )
    merge_adapter: bool = Field(
        False,
        description="Merge the LoRA weights while searching and restore them bit for bit after. Faster. Results differ "
        "slightly from an unmerged adapter (one extra rounding).",
    )
    strategy: Literal["bfs", "dfs", "mcts"] = Field(
        "bfs", description="search level by level, the best thought first, or by Monte Carlo tree search"
    )
    num_candidates: int = Field(10, ge=1, description="k: thoughts sampled for each state (paper: 10)")
    num_kept: int = Field(
        5,
        ge=1,
        description="n: best states that are continued, of each level or, with dfs, under each state (paper: 5); mcts "
        "continues whatever its simulations reach",
    )
    max_steps: int = Field(4, ge=1, description="thoughts in the longest chain, its answer line included")
    temperature: float = Field(
        0.9, gt=0, description="how varied thoughts are: their sampling temperature (paper: 0.4, arithmetic 0.9)"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest tokens that have this probability together; 1: all"
    )
    top_k: int = Field(0, ge=0, description="sample from so many likeliest tokens; 0: all (official code: 50)")
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description="make tokens of the prompt and of the thought so far less likely; 1: no change (official code: 1.1)",
    )
    max_thought_tokens: int = Field(
        96, ge=1, description="cut a thought after so many tokens; its chain then ends without an answer"
    )
    evaluator: Literal["logits", "sample"] = Field(
        "logits",
        description="how the model judges a thought. logits: by the probabilities of both verdicts, in one forward; "
        "sample: by verdicts that it writes, as in the paper, with a working before them if the task shows one",
    )
    num_verdicts: int = Field(5, ge=1, description="verdicts written for each state with evaluator=sample (paper: 5)")
    verdict_temperature: float = Field(0.4, gt=0, description="sampling temperature of verdicts")
    max_verdict_tokens: int = Field(
        96, ge=1, description="cut a written verdict, its working included, after so many tokens"
    )
    value_likely: float = Field(10.0, description="value of the verdict likely (paper: 10)")
    value_impossible: float = Field(1.0, description="value of the verdict impossible (paper: 1)")
    unparseable: Literal["drop", "impossible"] = Field(
        "drop", description="a written verdict that is neither: leave it out of the mean, or count it as impossible"
    )
    shuffle_evaluator: bool = Field(True, description="show the worked verdicts in an order drawn by the seed")
    keep_ties: bool = Field(False, description="continue every state that ties with the last one kept")
    max_nodes: int = Field(
        1000, ge=1, description="expand no further state of a question after so many thoughts: bounds time and memory"
    )
    min_value: float | None = Field(
        None,
        description="chains valued below this do not win, and a question whose winning answer has no other chain is left "
        "without one (abstained), from value_impossible to value_likely; null: every chain of the winning answer wins",
    )
    num_simulations: int = Field(
        16,
        ge=1,
        description="with mcts, walks from the question to the end of what is known; each expands a state at most",
    )
    exploration: float = Field(
        1.25,
        ge=0,
        description="with mcts, c: how much it prefers states visited seldom; 0: it goes by mean value alone",
    )
    dfs_threshold: float | None = Field(
        None, description="depth-first search does not enter states valued below this; null: enters all, best first"
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="lines that are generated side by side: more is faster and takes more memory; null: 256, or 2048 for "
        "a model below 10 million parameters on a CPU. In float32 on a CPU neither this nor the next four change a tree, "
        "unless the model is a mixture of experts",
    )
    questions_in_flight: int | None = Field(
        None,
        ge=1,
        description="questions that the arena engine searches at a time; null: 16, or 64 for such a small model",
    )
    arena_tokens: int | None = Field(
        None, ge=1, description="tokens that the arena engine's KV cache holds; null: what free memory allows"
    )
    prefill_tokens: int = Field(
        8192, ge=1, description="prompt tokens that the arena engine reads at once: lower it if memory runs out"
    )
    cuda_graphs: bool = Field(
        True, description="on a GPU, record the arena engine's steps as CUDA graphs: less time between kernels"
    )

    def side_by_side(self, is_tiny: bool = False) -> tuple[int, int]:
        """Lines and questions at a time. A tiny model spends its time on calls, so it is asked more at once by default."""
        return self.batch_size or (2048 if is_tiny else 256), self.questions_in_flight or (64 if is_tiny else 16)

    def result_settings(self) -> dict[str, Any]:
        """The settings that decide the trees, as plain JSON values: all but those of performance only."""
        # keys that decide nothing are absent, as in the hashes of versions without them
        unused = set() if self.strategy == "mcts" else {"num_simulations", "exploration"}
        unused |= {"min_value"} if self.min_value is None else set()
        return self.model_dump(mode="json", exclude=_PERFORMANCE_ONLY | unused)


class PairsConfig(Section):
    """Which pairs are made from search trees. Rule `all` is the paper's."""

    rule: Literal["all", "lower", "lowest", "fpo"] = Field(
        "all",
        description="what each winning thought is preferred over: all its losing siblings; those valued lower; the one "
        "valued lowest; fpo: whole winning chains over whole losing ones",
    )
    rejected_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="use this share of the losing thoughts, drawn by the seed: fewer pairs, less training",
    )
    num_questions: int | None = Field(
        None, ge=1, description="train on so many questions, drawn by the seed, the same ones for every rule; null: all"
    )
    max_fpo_pairs: int = Field(
        64,
        ge=1,
        description="with rule fpo, so many pairs a question at most, so that questions with many chains do not "
        "dominate",
    )
    weight: Literal["pair", "node", "question"] = Field(
        "pair", description="what counts equally in the loss: each pair, each state that was expanded, or each question"
    )


# what data.columns can name (`cpo_fast.data.layouts.NAMES` says what each is)
Columns = dict[
    Literal[
        "prompt",
        "messages",
        "instruction",
        "input",
        "system",
        "history",
        "tools",
        "chosen",
        "rejected",
        "completion",
    ],
    str,
]


class MixtureItem(Section):
    """One data set of a mixture."""

    path: str = Field(description="as data.path")
    columns: Columns = Field({}, description="as data.columns, for this data set")
    weight: float = Field(1.0, gt=0, description="its share of the questions, relative to the other items")


class DataConfig(Section):
    """Which data is trained on, and how it becomes token ids."""

    path: str = Field(
        "",
        description="search trees, pairs, completions or any preference set of others: JSON lines or list, CSV, parquet, "
        "hub:org/name[:config][:split]",
    )
    mixture: tuple[MixtureItem, ...] = Field((), description="several data sets with their shares, in place of path")
    columns: Columns = Field(
        {},
        description="our names to your columns, where yours are not recognised: instruction: ask makes ask the user's "
        "turn, prompt: ask the text that a response continues",
    )
    template_date: Literal["2024-07-26"] = Field(
        "2024-07-26", description="the day that a chat template which asks for today's date is told, in every command"
    )
    eos: Literal["final", "every", "never"] = Field(
        "final",
        description="where the model learns to stop: after the final answer only, after every response, or nowhere",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="drop rows with more tokens than this, prompt included; they are counted, nothing is cut",
    )
    max_drop: float = Field(
        0.05, ge=0, le=1, description="stop with exit code 3 when more than this share of the rows cannot be used"
    )
    held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="keep this share of the questions for validation, which chooses the best adapter, the starting point "
        "among them",
    )


class LoraConfig(Section):
    """The adapter, in PEFT's terms (paper: rank 8, alpha 16, on q, k and v, which are what its targets match)."""

    r: int = Field(8, ge=1, description="rank: more can learn more and costs more memory")
    alpha: float = Field(16, gt=0, description="how strongly the adapter acts: its update is scaled by alpha / r")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj"), description="the linear layers that are adapted; each must match a module"
    )


_LATER = {
    "visit_smoothing",
    "clip_range",
    "gamma",
    "dev_path",
    "dev_trees",
    "reference_cache",
    "trackers",
    "alarm_chains",
}  # keys of section train that did not exist always
# methods that read trees and the values in them; all but the last one compare the thoughts that continue a state
TREE_METHODS = ("tpo", "dvo", "tree_grpo", "full_step")


class TrainConfig(Section):
    """The optimisation. `beta`, rate, batch and epochs are the paper's. The rest is ours."""

    method: Literal["preference", "sft", "tpo", "dvo", "tree_grpo", "full_step"] = Field(
        "preference",
        description="preference: prefer winners over losers (CPO; FPO with pairs.rule=fpo); sft: imitate winning chains; "
        "on search trees alone: tpo: rank the thoughts after a state by value; dvo: fit log-ratios to values; tree_grpo: "
        "policy gradient by values; full_step: whole chains, each thought weighted by its value",
    )
    beta: float = Field(0.1, gt=0, description="how strongly the model is held to its starting point (paper: 0.1)")
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="preference loss, as TRL names them")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of the preferences that you expect to be wrong; sigmoid only"
    )
    visit_smoothing: bool = Field(
        False,
        description="smooth each pair's label by its thoughts' visits in a Monte Carlo tree search; sigmoid only",
    )
    clip_range: float = Field(
        0.2, gt=0, lt=1, description="tree_grpo: how far a thought's probability may move from that of its sampling"
    )
    gamma: float = Field(
        1.0,
        ge=0,
        le=50,
        description="full_step: how strongly a thought's weight follows its value; 0: all weigh the same",
    )
    nll_weight: float = Field(
        0.0, ge=0, description="also imitate the chosen responses, with this weight: keeps them likely"
    )
    lr: float = Field(5e-6, gt=0, description="peak learning rate (paper: 5e-6; SFT: 1e-5)")
    num_epochs: int | None = Field(
        4,
        ge=1,
        description="passes over the data (paper: 4); null, or left out beside max_steps: as many as that takes",
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        description="train for so many optimizer steps, repeating the data; with num_epochs too, whichever ends first",
    )
    batch_pairs: int = Field(
        32, ge=1, description="pairs (or completions, or states with their thoughts) per optimizer step (paper: 32)"
    )
    batch_order: Literal["pairs", "questions"] = Field(
        "pairs",
        description="pairs: shuffle all pairs; questions: keep a question's pairs in one step, which is faster because "
        "more is shared",
    )
    max_tokens: int = Field(
        8192, ge=1, description="tokens computed at once: lower it if memory runs out; the result is the same"
    )
    optimizer: Literal["adamw"] = Field("adamw", description="AdamW is the one there is")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="of AdamW")
    adam_eps: float = Field(1e-8, gt=0, description="of AdamW")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="how the rate goes on after its warm-up")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises to its peak")
    max_grad_norm: float = Field(
        1.0, ge=0, description="scale larger gradients down to this global norm, so that no step jumps; 0: never"
    )
    reference_model: Literal["base"] | None = Field(
        None,
        description="the frozen model of a training that goes on from model.adapter; null: a copy of that adapter, so "
        "that rewards begin at 0; base: the model without it",
    )
    reference: Literal["auto", "online", "cached"] = Field(
        "auto",
        description="the frozen model's log-probs: computed in every step, or once and kept in the run folder; auto: kept "
        "when there are several epochs",
    )
    reference_cache: str | None = Field(
        None,
        description="folder that keeps the frozen model's log-probs by their tokens, for several runs, at a time too; "
        "null: reference in the run folder. Their last bits may hang on what it held before",
    )
    gradient_checkpointing: Literal["auto", "off", "non_reentrant"] = Field(
        "auto",
        description="save memory by computing each layer again in backward, about a third slower; auto: only where a step "
        "would not fit otherwise",
    )
    lora_input: Literal["recast", "peft"] = Field(
        "recast",
        description="recast saves memory on a 16-bit base by keeping an adapted layer's input once; peft keeps a float32 "
        "copy; same result, bit for bit on a CPU, where a GPU's kernels differ by rounding",
    )
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto",
        description="DeepSpeed ZeRO stage: 0 keeps the base on every GPU, 3 cuts it over all of them; auto: 0 unless the "
        "base takes more than 0.7 of a GPU",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="what waits in host memory: nothing, the optimizer's state (stages 1 to 3), or the base too (stage 3)",
    )
    deepspeed: str | None = Field(
        None, description="your own DeepSpeed JSON, merged into ours; a value that differs from ours is an error"
    )
    collective_timeout: float = Field(
        600.0, gt=0, description="seconds after which ranks that wait for a silent one give up"
    )
    heartbeat: float = Field(
        60.0, gt=0, description="seconds without a sign of life after which a rank is named and the run ends"
    )
    save_every: int = Field(100, ge=1, description="save a checkpoint every so many steps, and after the last")
    keep_last: int = Field(2, ge=1, description="checkpoints to keep, beside that of the best step")
    grace: float = Field(
        25.0,
        gt=0,
        description="seconds that a run may take to save after SIGTERM, SIGINT or SIGUSR1 before it just ends",
    )
    impl: Literal["eager", "triton"] | None = Field(
        None, description="kernels: triton on a GPU, eager anywhere; null: the fastest that the device has"
    )
    eval_every: int | None = Field(None, ge=1, description="validate every so many steps; null: after each epoch")
    stop_on: Literal["held_out_loss", "accuracy", "agreement"] = Field(
        "held_out_loss",
        description="what chooses the best adapter: held-out loss; the share of dev_path's questions that chains answer "
        "right; or, without reference answers, the share that they answer as search trees have voted",
    )
    dev_path: str | None = Field(
        None,
        description="ask all questions of this file, as task.path, with stop_on=accuracy; null: those of task.path. With "
        "stop_on=agreement ask these alone of the voted ones",
    )
    dev_trees: str | None = Field(
        None,
        description="trees.jsonl of questions that are not trained on, whose votes stop_on=agreement compares with; null: "
        "the held-out trees of data.path",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop early after so many validations past the warm-up without a better one; null: train to the end",
    )
    alarm_nats: float = Field(
        0.5,
        gt=0,
        description="warn of a collapse when a tenth of the chosen responses lost so many nats a token since the start",
    )
    alarm_chains: int = Field(
        16,
        ge=0,
        description="with stop_on=agreement and 400 questions or more sample so many chains of each before training, and "
        "warn of a collapse when answers contradict them; with fewer, or 0, when votes are forgotten",
    )
    log_every: int = Field(1, ge=1, description="write a line of metrics.jsonl every so many steps")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (),
        description="also show the lines of metrics.jsonl to these, with files in the run folder's trackers; wandb is "
        "offline unless WANDB_MODE says otherwise",
    )

    @model_serializer(mode="wrap")
    def _as_before_later_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # so that checkpoints of older versions are gone on with
        values: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        return {key: value for key, value in values.items() if key not in _LATER or value != fields[key].default}

    @model_validator(mode="before")
    @classmethod
    def _steps_alone_decide(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("max_steps") is not None and "num_epochs" not in values:
            return {**values, "num_epochs": None}
        return values

    @model_validator(mode="after")
    def _ends(self) -> "TrainConfig":
        if self.num_epochs is None and self.max_steps is None:
            raise ValueError("num_epochs: null never ends; set max_steps, or num_epochs to a number")
        return self

    def length(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole training, of which one pass over the data takes `steps_per_epoch`."""
        by_epochs = None if self.num_epochs is None else self.num_epochs * steps_per_epoch
        return min(count for count in (by_epochs, self.max_steps) if count is not None)


class EvalConfig(Section):
    """Evaluation: greedy chain of thought, tree of thought, or both on the same questions."""

    method: Literal["cot", "tot", "both"] = Field("cot", description="chain, tree of thought with its vote, or both")
    path: str | None = Field(
        None, description="ask all questions of this file, as task.path; null: those that the task section names"
    )
    max_new_tokens: int = Field(320, ge=1, description="cap on one chain, all its lines together")
    batch_size: int = Field(64, ge=1, description="chains that run side by side in the arena engine")
    latency_questions: int = Field(
        4, ge=1, description="the first so many questions are asked alone, one after the other: seconds are theirs"
    )


class IterateConfig(Section):
    """Rounds of search, pairs, training and evaluation (`cpo-fast iterate`)."""

    method: Literal["cpo", "sft_cpo"] = Field(
        "cpo",
        description="what a round trains. cpo: preferences; sft_cpo: first to imitate the winning paths of the same "
        "trees, then preferences from there",
    )
    num_rounds: int = Field(3, ge=1, description="rounds at most; a larger number goes on after the last one")
    new_questions: bool = Field(
        False, description="ask the next task.num_questions of task.path in each round, and not the same ones again"
    )
    sft_lr: float | None = Field(
        None, gt=0, description="peak learning rate of the imitation with sft_cpo (paper: 1e-5); null: train.lr"
    )
    stop_on: Literal["accuracy", "agreement", "never"] = Field(
        "accuracy",
        description="what ends the rounds and chooses the best. accuracy: of chains on train.dev_path, whose gold answers "
        "are read for that; agreement: of chains with the votes of train.dev_trees, the same in every round, without a "
        "gold answer; never: all rounds are made and the last one is taken, without a gold answer either",
    )
    min_gain: float = Field(
        0.0, ge=0, lt=1, description="accuracy or agreement by more than which a round must beat all before it to help"
    )
    patience: int = Field(1, ge=1, description="stop after so many rounds in a row that did not help")


class Config(Section):
    """Everything one run needs. A command reads the sections it uses and leaves the others alone."""

    run: str = Field("runs/default", min_length=1, description="folder that receives every file of this run")
    seed: int = Field(0, ge=0, description="the one seed: search, data order and adapter initialisation derive from it")
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    search: SearchConfig = SearchConfig()
    pairs: PairsConfig = PairsConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    iterate: IterateConfig = IterateConfig()

    @property
    def reference_adapter(self) -> str | None:
        """Folder of the adapter that training's reference has, None for the base alone."""
        return None if self.train.reference_model == "base" else self.model.adapter

    @model_validator(mode="after")
    def _values_are_ordered(self) -> "Config":
        if self.search.value_impossible >= self.search.value_likely:
            raise ValueError("search.value_impossible must be smaller than search.value_likely")
        low, high, least = self.search.value_impossible, self.search.value_likely, self.search.min_value
        if least is not None and not low <= least <= high:
            raise ValueError(
                f"search.min_value must be from search.value_impossible to search.value_likely, {low:g} to {high:g}"
            )
        if self.data.path and self.data.mixture:
            raise ValueError("data.path and data.mixture exclude each other; put the path into the mixture")
        # accuracy is measured on task.path, which needs nothing held out
        if self.train.patience is not None and not self.data.held_out and self.train.stop_on == "held_out_loss":
            raise ValueError(
                "train.patience needs held-out questions: set data.held_out=0.1, say, or train.patience=null"
            )
        return self

    @model_validator(mode="after")
    def _method_has_its_loss(self) -> "Config":
        method = self.train.method
        if method in TREE_METHODS:
            for key in ("loss_type", "label_smoothing", "visit_smoothing", "nll_weight"):
                if getattr(self.train, key) != TrainConfig.model_fields[key].default:
                    raise ValueError(f"train.{key} is of preference pairs, and train.method={method} has its own loss")
        if method == "tree_grpo" and self.data.eos == "every":
            raise ValueError("train.method=tree_grpo trains what was sampled, to which data.eos=every would add tokens")
        if self.train.visit_smoothing and (self.train.label_smoothing or self.train.loss_type != "sigmoid"):
            raise ValueError(
                "train.visit_smoothing takes the place of train.label_smoothing, with train.loss_type=sigmoid"
            )
        return self
