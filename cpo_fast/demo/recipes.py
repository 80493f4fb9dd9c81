"""The settings of each demonstration: what is searched, how it is trained, what is asked, and what that does not show.

`quick` changes how many questions and steps there are and nothing else, so quick and full runs may share a folder.
"""

from dataclasses import dataclass
from pathlib import Path

from cpo_fast.config import Config, TaskConfig, validate_config

QUESTIONS = Path(__file__).with_name("questions.jsonl")
"""Twelve word problems of one or two steps, one JSON object a line: id, question, answer."""

REASONER = Path(__file__).with_name("reasoner")
"""The model (`base-0`) and task of `examples/reasoner`, 40 questions to search and 150 others to ask."""


@dataclass(frozen=True)
class Recipe:
    """One demonstration. `asked` are the questions of both evaluations, `caveat` says what their result does not show."""

    config: Config
    asked: TaskConfig
    caveat: str


def reasoner_recipe(out: str, quick: bool, seed: int) -> Recipe:
    """That of the tiny reasoner, whose gain can be measured, writing into the folder `out`.

    Search and training are those of `examples/reasoner/config.yaml`. Sizes were chosen on its dev questions.
    """
    config = validate_config(
        {
            "run": out,
            "seed": seed,
            "model": {"path": str(REASONER / "base-0"), "dtype": "float32", "device": "cpu"},
            "task": {
                "file": str(REASONER / "plain.yaml"),
                "path": str(REASONER / "search.jsonl"),
                "num_questions": 12 if quick else None,
            },
            "search": {"num_candidates": 8, "num_kept": 3, "max_steps": 4, "max_thought_tokens": 16},
            "data": {"path": str(Path(out) / "pairs.jsonl")},
            "lora": {
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            },
            "train": {"lr": 1e-3, "max_steps": 30},
            "eval": {"path": str(REASONER / "asked.jsonl"), "max_new_tokens": 96},
        },
        source="demo",
    )
    asked = config.task.asking(config.eval.path).model_copy(update={"num_questions": 60 if quick else None})
    return Recipe(
        config,
        asked,
        "The gap that is closed here was built in: this model of 605,000 parameters was pretrained on sums by writers who "
        "are sloppy and judges who can calculate. It shows that the method works where such a gap exists, and says nothing "
        "about how large the gap is in a language model trained on text.",
    )


def smollm2_recipe(model: Path, out: str, quick: bool, seed: int) -> Recipe:
    """That of SmolLM2-135M, converted into the folder `model`, writing into the folder `out`."""
    config = validate_config(
        {
            "run": out,
            "seed": seed,
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
    return Recipe(
        config,
        config.task.model_copy(update={"num_questions": 4 if quick else None}),
        "A model of 135M parameters shows that the pipeline works, not what it gains: it is too small for reliable "
        "arithmetic, and a dozen questions cannot tell a difference from chance (see the intervals). It is trained on some "
        "of the questions that it is asked.",
    )
