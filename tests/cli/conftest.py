"""A tiny model on disk for commands that run as a user would run them."""

from pathlib import Path

import pytest

from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "model")
