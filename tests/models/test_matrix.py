"""Every causal language model of the installed Transformers is exact on a forest and in a search, or refused by name.

An architecture that Transformers gains joins by itself. `docs/models.md` shows what came of each; its outcomes are these.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from cpo_kernels.integrations.transformers import hook, packed, prepare
from tests.models import matrix, table
from tests.models.tiny_configs import UNBUILT, architectures, tiny_model

FORESTS = (0, 1, 2)
WINDOWS = (6, 24, matrix.NO_WINDOW)
IMPLS = ("reference", "eager")


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
    with pytest.raises((ImportError, ValueError)):
        tiny_model(model_type)


@pytest.mark.skipif(table.written_for() != transformers.__version__, reason="docs/models.md is of another Transformers")
def test_docs_and_readme_say_what_came_of_each_architecture() -> None:
    rows = table.run_all()
    assert table.outcomes(table.DOCS.read_text(encoding="utf-8")) == table.outcomes(table.document(rows))
    assert table.short_form(rows) in table.README.read_text(encoding="utf-8")
