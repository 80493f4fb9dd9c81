"""Model cards: the README.md beside an adapter or a merged model, with YAML front matter as the Hugging Face hub reads it.

A card says what a run knows and nothing else: no date, no host and no run folder, so that equal runs write equal bytes.
Paths and other text of users stand in code spans, in which neither markdown nor control characters mean anything.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cpo_fast.config import Config, dump_yaml

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_VERSIONS = ("cpo-fast", "peft", "torch", "transformers", "deepspeed")
# metrics of a step or a validation that a card shows, where the run has them
_SHOWN = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen_drift",
    "logps/chosen_drift_p10",
    "mean_token_accuracy",
    "grad_norm",
    "eval_loss",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
    "eval_accuracy",
    "eval_agreement",
    "eval_answered",
    "eval_contradicted",
)
_METHODS = {
    "preference": "preference pairs, as DPO",
    "sft": "imitation of winning chains (SFT)",
    "tpo": "ranking of the thoughts after a state by their values (TPO)",
    "dvo": "regression of log-ratios on values (DVO)",
    "tree_grpo": "policy gradient over the thoughts after a state (tree GRPO)",
    "full_step": "whole chains, each thought weighted by its value",
}
_LIMITS = (
    "It was trained to answer one kind of question in the words of one kind of prompt; nothing is known about others.",
    "A preference loss can fall while a model gets worse; what its chains answer counts, not reward accuracy.",
    "Nothing was done about bias, safety or facts: what the base model gets wrong, this one may too.",
)


@dataclass(frozen=True)
class Training:
    """What cards of one training share.

    Attributes:
        base_hash, data_hash: 16 hex digits. adapter_hash: of the adapter it began with, or "".
        dtype: of the base's weights. kind: of the adapter, such as lora.
        num_items: rows trained on. num_questions: that these belong to. num_held_out: rows validated on.
        num_steps: optimizer steps of the whole training.
    """

    config: Config
    base_hash: str
    data_hash: str
    adapter_hash: str
    dtype: str
    kind: str
    num_items: int
    num_questions: int
    num_held_out: int
    num_steps: int


def adapter_card(
    training: Training, step: int, metrics: Mapping[str, Any], intervals: Mapping[str, tuple[float, float]], alarm: str
) -> str:
    """The card of the adapter after a step.

    Args:
        step: 0 is the starting point.
        metrics: of this step and its validation, by the names of metrics.jsonl.
        intervals: (low, high) at 95 % of some of them.
        alarm: sentences of the alarms that have rung until then, or "".
    """
    config, train = training.config, training.config.train
    base, lora = _base(config.model.path, training.base_hash, training.dtype), config.lora
    data = [config.data.path] if config.data.path else [item.path for item in config.data.mixture]
    unit = {"sft": "completions", "preference": "pairs"}.get(train.method, "rows")
    epochs = "as many epochs as that takes" if train.num_epochs is None else f"{train.num_epochs} epochs at most"
    loss = f", loss `{train.loss_type}`" if train.method == "preference" else ""
    front = {
        "library_name": "peft",
        **_base_model(config.model.path),
        "pipeline_tag": "text-generation",
        "tags": ["cpo-fast", training.kind, train.method],
    }
    start = f"rank {lora.r}, alpha {lora.alpha:g}, on {', '.join(map(code, lora.target_modules))}"
    if config.model.adapter:
        start = f"goes on from {code(config.model.adapter)}, hash `{training.adapter_hash}`"
    data_text = f"{', '.join(map(code, data))}, hash `{training.data_hash}`: {training.num_items} {unit}"
    rate = f"learning rate {train.lr:g} ({train.schedule}, warm-up {train.warmup_ratio:g} of the steps)"
    limits = f"weight decay {train.weight_decay:g}, gradient norm at most {train.max_grad_norm:g}"
    lines = [
        f"- base: {base}",
        f"- adapter: {start}",
        f"- data: {data_text} of {training.num_questions} questions trained on, {training.num_held_out} held out",
        f"- method: `{train.method}`, {_METHODS[train.method]}{loss}",
        f"- steps: {step} of {training.num_steps}, {train.batch_pairs} {unit} each, {epochs}",
        f"- settings: beta {train.beta:g}, {rate}, {limits}, seed {config.seed}",
    ]
    sections = [
        ("Metrics", _table(metrics, intervals) or "None: this is the starting point, before the first step."),
        ("Alarms", alarm or "None had rung by this step."),
        ("Limits", "\n".join(f"- {line}" for line in _LIMITS)),
        ("How to load", _how_to_load(config.model.path, training.dtype)),
    ]
    return _card(front, "Adapter trained by cpo-fast", lines, sections)


def merged_card(config: Config, base_hash: str, adapter_hash: str, dtype: str, kl: tuple[float, float, int]) -> str:
    """The card of base and adapter in one. `kl`: mean and largest divergence in nats, and over how many tokens."""
    front = {
        "library_name": "transformers",
        **_base_model(config.model.path),
        "pipeline_tag": "text-generation",
        "tags": ["cpo-fast", "merged-adapter"],
    }
    adapter = f"{code(config.model.adapter or '')}, hash `{adapter_hash}`; its own card says how it was trained"
    compared = f"mean {kl[0]:.2e}, largest {kl[1]:.2e} nats over {kl[2]} tokens"
    snippet = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")"""
    facts = [
        f"- base: {_base(config.model.path, base_hash, dtype)}",
        f"- adapter: {adapter}",
        f"- compared with base plus adapter: Kullback-Leibler divergence {compared}",
    ]
    limit = "The sum was made in float32 and rounded once, so answers can differ from those of base plus adapter."
    sections = [("Limits", f"- {limit}\n- {_LIMITS[2]}"), ("How to load", f"```python\n{snippet}\n```")]
    return _card(front, "Model merged by cpo-fast", facts, sections)


def code(text: str) -> str:
    """Text as a code span that nothing in it can end or change. What cannot be printed is escaped."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown[:1] in ("`", " ") or shown[-1:] in ("`", " ") or not shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _card(front: Mapping[str, Any], title: str, facts: Sequence[str], sections: Sequence[tuple[str, str]]) -> str:
    versions = ", ".join(f"{name} {_version(name)}" for name in _VERSIONS)
    header = dump_yaml(dict(front))
    parts = [f"---\n{header}---", f"# {title}", "\n".join(facts)]
    parts += [f"## {name}\n\n{text}" for name, text in (*sections, ("Versions", versions))]
    return "\n\n".join(parts) + "\n"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _base(path: str, base_hash: str, dtype: str) -> str:
    name = code(path) if path else "a model that was passed in Python"
    return f"{name}, hash `{base_hash}`, weights in {dtype}"


def _base_model(path: str) -> dict[str, str]:
    """The hub refuses a card whose base model is a folder."""
    is_hub_id = _HUB_ID.fullmatch(path) is not None and not Path(path).exists()
    return {"base_model": path} if is_hub_id else {}


def _table(metrics: Mapping[str, Any], intervals: Mapping[str, tuple[float, float]]) -> str:
    rows = []
    for name in _SHOWN:
        if metrics.get(name) is not None:
            low, high = intervals.get(name, (None, None))
            shown = "" if low is None else f"{low:.4f} to {high:.4f}"
            rows.append(f"| `{name}` | {metrics[name]:.6g} | {shown} |")
    if not rows:
        return ""
    notes = (
        "Names are those of metrics.jsonl; `eval_` is validation, everything else is of the last step's batch alone."
    )
    return "\n".join(["| metric | value | 95 % interval (Wilson) |", "|---|---|---|", *rows, "", notes])


def _how_to_load(path: str, dtype: str) -> str:
    # a relative path means nothing to whoever stands in the adapter's folder
    base = str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().is_dir() else path
    snippet = f"""import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base or "the base model"!r}
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(model, ".")  # this folder
model = model.merge_and_unload()  # optional: faster, and rounded once more"""
    merge = "`cpo-fast merge CONFIG.yaml model.adapter=FOLDER -o MERGED` merges too, and compares the result with both."
    return f"```python\n{snippet}\n```\n\n{merge}"
