"""The settings that decide the trees of a run: their hash, which stands in every tree, and what differs from those kept.

A hash does not tell which setting is another one. `collect` keeps its configuration beside the trees, in `collect.yaml`.
The settings are read from there: they are those of the trees where their hash is the trees' own.
"""

from collections.abc import Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

from cpo_fast.config import Config, load_config
from cpo_fast.errors import CpoFastError
from cpo_fast.files import canonical_json, short_hash
from cpo_fast.tasks import Task, load_task

KEPT = "collect.yaml"
MAX_NAMED = 3  # settings that a refusal names
_EVALUATORS = "few_shot_evaluators"
_DTYPES = ("float32", "bfloat16", "float16")  # of loaded models

Settings = Mapping[str, Any]


def search_settings(config: Config, task: Task, dtype: str) -> Settings:
    """What decides the trees besides the questions, the shared prompt, the model and the seed.

    Args:
        dtype: of the loaded model: `auto` and the name it resolves to are one search.
    """
    return {
        "search": config.search.result_settings(),
        "dtype": dtype,
        "chat": config.task.chat,
        _EVALUATORS: [task.few_shot_evaluator, task.few_shot_conclusion_evaluator],
    }


def settings_hash(settings: Settings) -> str:
    """What a tree names its settings by."""
    return short_hash(canonical_json(settings))


def kept_settings(folder: Path, wanted_hash: str, now: Settings) -> Settings | None:
    """The settings of this hash, from the configuration that `folder` keeps. None where that is missing or another one.

    Args:
        now: settings of this run, whose evaluator prompts are tried where those of the kept task do not fit any more.
    """
    try:
        config = load_config(folder / KEPT)
    except CpoFastError:
        return None
    evaluators = [now[_EVALUATORS]]
    with suppress(CpoFastError):  # its task file may be gone
        task = load_task(config)
        evaluators.append([task.few_shot_evaluator, task.few_shot_conclusion_evaluator])
    fixed = {"search": config.search.result_settings(), "chat": config.task.chat}
    for dtype, prompts in product(_DTYPES, evaluators):
        settings = {**fixed, "dtype": dtype, _EVALUATORS: prompts}
        if settings_hash(settings) == wanted_hash:
            return settings
    return None


def differing_settings(saved: Settings, now: Settings) -> str:
    """The keys in which two searches differ, each with both values, in words: the first three, and how many more."""
    first, second = _by_key(saved), _by_key(now)
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    words = [
        f"{key} was {_shown(first.get(key))}, is {_shown(second.get(key))}" if key != _EVALUATORS else _OTHER_PROMPTS
        for key in keys[:MAX_NAMED]
    ]
    more = len(keys) - len(words)
    return "; ".join(words) + (f"; and {more} more" if more else "")


_OTHER_PROMPTS = "the task's evaluator prompts were others"


def _by_key(settings: Settings) -> dict[str, Any]:
    """Settings by the key that sets them."""
    found = {f"search.{key}": value for key, value in settings["search"].items()}
    return found | {
        "task.chat": settings["chat"],
        "model.dtype": settings["dtype"],
        _EVALUATORS: settings[_EVALUATORS],
    }


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
