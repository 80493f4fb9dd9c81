"""What makes a training the same one, so that it may go on from a checkpoint.

A checkpoint carries the configuration that decides its results and the hashes of base, adapter and data. A run that
differs in one of them is another training and is refused with what differs, unless that key is allowed by name. How a
result is computed (ranks, ZeRO stage, micro-batches, kernels, files written) may change freely.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from cpo_fast.adapters import adapter_hash
from cpo_fast.config import Config
from cpo_fast.data.examples import Example
from cpo_fast.errors import CheckpointError, ConfigError
from cpo_fast.tasks import task_name

# keys of section train that say how and where to compute, or what to write, and not what to compute
FREE = frozenset(
    {
        "alarm_nats",
        "collective_timeout",
        "deepspeed",
        "grace",
        "gradient_checkpointing",
        "heartbeat",
        "impl",
        "keep_last",
        "log_every",
        "lora_input",
        "max_tokens",
        "offload",
        "reference_cache",
        "save_every",
        "trackers",
        "zero_stage",
    }
)

DECISIVE = frozenset({"data", "model", "model.adapter"})  # keys that no message offers to let differ


def training_identity(config: Config, base: str, dtype: str, examples: Sequence[Example]) -> dict[str, Any]:
    """Everything that decides a training's results, by key.

    Args:
        config: sections pairs, data, lora and train, and the seed.
        base: hash of the base's files or weights. dtype: of its weights.
        examples: of training and validation, in order.
    """
    values: dict[str, Any] = {"seed": config.seed}
    for section in ("pairs", "data", "lora", "train"):
        for key, value in getattr(config, section).model_dump(mode="json").items():
            if (section, key) == ("data", "mixture"):
                value = [{name: each for name, each in item.items() if name != "path"} for item in value]
            if not (section == "train" and key in FREE) and (section, key) != ("data", "path"):
                values[f"{section}.{key}"] = value
    if config.train.stop_on != "held_out_loss":  # the best adapter and patience go by these chains
        task = config.task.asking(config.train.dev_path)
        values |= {f"task.{key}": value for key, value in task.model_dump(mode="json").items()}
        if config.task.file or config.task.module:
            values["task"] = task_name(config.task)  # their content decides, and not their path alone
        values |= {"eval.max_new_tokens": config.eval.max_new_tokens, "search.max_steps": config.search.max_steps}
    return values | {
        "model": base,
        "model.dtype": dtype,
        "model.adapter": adapter_hash(config.model.adapter),
        "data": examples_hash(examples),
    }


def examples_hash(examples: Sequence[Example]) -> str:
    """16 hex digits that name the token ids, questions and depths of examples, and what trees say of them, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.group}\0{example.step}".encode("utf-8", "surrogatepass"))
        for ids in (example.prompt_ids, *example.responses):
            digest.update(np.array([len(ids), *ids], np.int64).tobytes())
        if example.visits or example.thoughts:
            digest.update(repr((example.visits, example.thoughts)).encode())
    return digest.hexdigest()[:16]


def training_sources(config: Config, num_rows: int) -> dict[str, str]:
    """Where what an identity has hashes of came from, by key, and how much data it is."""
    data = [config.data.path] if config.data.path else [item.path for item in config.data.mixture]
    return {
        "model": config.model.path,
        "model.adapter": config.model.adapter or "",
        "data": f"{', '.join(data)}, {num_rows:,} rows",
    }


Sources = Mapping[str, str]


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], sources: tuple[Sources, Sources] = ({}, {})
) -> dict[str, str]:
    """The keys in which two identities differ, each with what it was and what it is, in words.

    `sources`: of both, as far as they are known.
    """

    def word(key: str, values: Mapping[str, Any], known: Sources) -> str:
        return f"{known[key]} (hash {values.get(key)})" if known.get(key) else repr(values.get(key))

    # an older version may have saved a key that is free today
    keys = sorted({*saved, *now} - {f"train.{name}" for name in FREE})
    was, is_now = sources
    return {
        key: f"{key} was {word(key, saved, was)}, is {word(key, now, is_now)}"
        for key in keys
        if saved.get(key) != now.get(key)
    }


def check_same_training(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    allowed: Collection[str],
    folder: str,
    sources: tuple[Sources, Sources] = ({}, {}),
) -> None:
    """Refuse to go on with another training than the one that was saved.

    Args:
        saved, now: identities. allowed: keys that may differ. folder: of the run, for the message.
        sources: where both came from, as `training_sources` says.

    Raises:
        CheckpointError: other keys differ. ConfigError: an allowed key does not exist.
    """
    keys = {*saved, *now}
    unknown = sorted(set(allowed) - keys)
    if unknown:
        raise ConfigError(
            f"--allow-mismatch {unknown[0]}: there is no such key; the keys are {', '.join(sorted(keys))}"
        )
    differing = {key: words for key, words in differences(saved, now, sources).items() if key not in allowed}
    if differing:
        options = " ".join(f"--allow-mismatch {key}" for key in differing)
        going_on = f", or go on all the same with {options}"
        if any(key in DECISIVE or key.startswith("lora.") for key in differing):
            going_on = ""  # what would be gone on with is not what was begun
        raise CheckpointError(
            f"{folder} holds checkpoints of another training ({'; '.join(differing.values())}); choose another run folder "
            f"(run=...), or delete {folder}/checkpoints to train anew{going_on}"
        )
