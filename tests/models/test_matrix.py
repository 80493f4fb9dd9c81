"""Every causal language model of the installed Transformers is exact on a forest and in a search, or refused by name.

An architecture that Transformers gains joins by itself. `docs/models.md` shows what came of each; its outcomes are these.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from cpo_kernels.integrations.transformers import hook, packed
from tests.models import matrix, table
from tests.models.tiny_configs import UNBUILT, architectures, tiny_model

WIDE = [
    (1, 6, "reference"),
    (2, 6, "eager"),
    (3, matrix.NO_WINDOW, "reference"),
    (4, 24, "eager"),
]  # seed, window, impl


@pytest.fixture(autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    """These models are too small for two threads, and they warn of their tiny configurations."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("model_type", [name for name in architectures() if name not in UNBUILT])
def test_architecture_is_exact_or_refused_by_name(model_type: str) -> None:
    row = matrix.run(model_type)
    assert set(row.results) == set(matrix.PARTS)
    assert {part: result for part, result in row.results.items() if not result.is_right} == {}


@pytest.mark.parametrize("model_type", UNBUILT)
def test_architecture_that_is_left_out_cannot_be_built(model_type: str) -> None:
    with pytest.raises((ImportError, ValueError, StrictDataclassError)):
        tiny_model(model_type)


@pytest.mark.skipif(table.written_for() != transformers.__version__, reason="docs/models.md is of another Transformers")
def test_docs_and_readme_say_what_came_of_each_architecture() -> None:
    rows = table.run_all()
    assert table.outcomes(table.DOCS.read_text(encoding="utf-8")) == table.outcomes(table.document(rows))
    assert table.short_form(rows) in table.README.read_text(encoding="utf-8")


# part, function of the hook, place of the argument that is lost, and a model that needs it
LOST = [
    ("training", "attention_layer", 7, "mistral"),  # window
    ("training", "attention_layer", 8, "gemma2"),  # soft-cap
    ("training", "attention_layer", 9, "gpt_oss"),  # sinks
    ("search", "decode_layer", 9, "mistral"),
    ("search", "decode_layer", 10, "gemma2"),
    ("search", "decode_layer", 11, "gpt_oss"),
]


@pytest.mark.parametrize(("part", "function", "place", "model_type"), LOST)
def test_an_argument_of_attention_that_is_lost_is_seen(
    part: str, function: str, place: int, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is lost beyond the 32 rows of the probe of `prepare`, which would refuse the model."""
    kept: Callable[..., Any] = getattr(hook, function)

    def losing(*arguments: Any) -> Any:
        lost = function == "decode_layer" or arguments[0].shape[0] > 32
        return kept(*arguments[:place], None if lost else arguments[place], *arguments[place + 1 :])

    monkeypatch.setattr(hook, function, losing)
    assert matrix.run.__wrapped__(model_type).results[part].outcome == "wrong"


def test_a_scale_of_the_logits_that_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "logit_transform", lambda parts: {"logit_scale": 1.0, "softcap": None})
    assert matrix.run.__wrapped__("granite").results["training"].outcome == "wrong"


@pytest.mark.soak
@pytest.mark.parametrize(("seed", "window", "impl"), WIDE)
@pytest.mark.parametrize("model_type", [name for name in architectures() if name not in UNBUILT])
def test_architecture_is_right_on_other_weights_and_windows(model_type: str, seed: int, window: int, impl: str) -> None:
    row = matrix.run(model_type, seed, window, impl)
    assert {part: result for part, result in row.results.items() if not result.is_right} == {}


@pytest.mark.soak
@pytest.mark.parametrize("model_type", [name for name in architectures() if name not in UNBUILT])
def test_architecture_in_bfloat16_is_no_further_from_float32_than_stock(model_type: str) -> None:
    if matrix.run(model_type).results["training"].outcome != "equal":
        pytest.skip("refused")
    for packed_error, stock_error in matrix.rounded(model_type).values():
        assert packed_error <= 2.5 * stock_error + 1e-2
