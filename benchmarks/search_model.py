"""The models and searches of the collect benchmark: one set for a CPU, one for a GPU, one for tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.search_script import TINY_SHAPE, Script, SearchShape, draw_script, record_script
from benchmarks.step_contestants import LLAMA_2_7B, TINY_LLAMA, random_model
from cpo_fast.config import ModelConfig, SearchConfig


@dataclass(frozen=True)
class SearchSet:
    """A loaded model and what it searches.

    Attributes:
        script: of so many questions. warm_up: a short one, played before anything is timed.
        shape: sizes of random searches on this model. num_candidates: k.
        sample_calls: timed calls of `sequential` and of `batched`. max_peer_tokens: of a script that peers play whole.
        roofline_rows: rows of the step that is compared with memory bandwidth.
    """

    name: str
    model: Any
    settings: SearchConfig
    script: Callable[[int], Script]
    warm_up: Script
    shape: SearchShape
    num_questions: int
    num_candidates: int
    sample_calls: tuple[int, int]
    max_peer_tokens: int
    roofline_rows: int


def smollm2(device: torch.device) -> SearchSet:
    """SmolLM2-135M-Instruct in float32, and real searches of the shipped word problems."""
    from cpo_fast.demo import QUESTIONS, convert_demo_model
    from cpo_fast.models import load_model
    from cpo_fast.tasks import get_task

    model, tokenizer = load_model(ModelConfig(path=str(convert_demo_model()), dtype="float32", device=str(device)))
    settings = SearchConfig(
        num_candidates=10, num_kept=2, max_steps=2, max_thought_tokens=48, evaluator="sample", max_verdict_tokens=16,
        arena_tokens=32768,
    )  # fmt: skip
    task = get_task("svamp")

    def script(num_questions: int) -> Script:
        questions = task.load(str(QUESTIONS), num_questions, 0)
        return record_script(model, tokenizer, task, questions, settings)

    shape = SearchShape(
        few_shot=375, evaluator=350, thought=(12, 32), verdict=(2, 3), num_kept=2, depth=2,
        vocab_size=model.config.vocab_size,
    )  # fmt: skip
    warm_up = draw_script(SearchShape(few_shot=64, evaluator=64, depth=1, vocab_size=1000), 1)
    return SearchSet("SmolLM2-135M, fp32", model, settings, script, warm_up, shape, 3, 10, (24, 20), 400, 60)


def llama_2_7b(device: torch.device) -> SearchSet:
    """Random bfloat16 weights in the shape of Llama-2-7B, and random searches in the paper's shape."""
    model = random_model(LLAMA_2_7B, LLAMA_2_7B["num_hidden_layers"], torch.bfloat16, device).eval()
    shape = SearchShape(vocab_size=LLAMA_2_7B["vocab_size"])
    settings = SearchConfig(arena_tokens=81920)  # 40 GiB of keys and values
    return SearchSet(
        "Llama-2-7B shape, bf16", model, settings, lambda count: draw_script(shape, count), draw_script(shape, 2, 1),
        shape, 16, shape.num_candidates, (200, 48), 20000, 256,
    )  # fmt: skip


def tiny(device: torch.device) -> SearchSet:
    """A two-layer Llama, for tests."""
    model = random_model(TINY_LLAMA, TINY_LLAMA["num_hidden_layers"], torch.float32, device).eval()
    settings = SearchConfig(arena_tokens=4096, batch_size=16)
    return SearchSet(
        "tiny Llama, fp32", model, settings, lambda count: draw_script(TINY_SHAPE, count), draw_script(TINY_SHAPE, 1, 1),
        TINY_SHAPE, 2, TINY_SHAPE.num_candidates, (8, 8), 40, 12,
    )  # fmt: skip


SETS: dict[str, Callable[[torch.device], SearchSet]] = {"cpu": smollm2, "gpu": llama_2_7b, "tiny": tiny}
