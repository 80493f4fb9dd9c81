"""Settings every test runs under: no network, quiet tokenizers, a fixed seed and no kernel override from the shell."""

import os

import pytest

# Set before any Hugging Face import: the hub client reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _no_kernel_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the kernels left in the shell would silently change what every kernel test compares."""
    for name in ("IMPL", "LOGPROB_PATH", "MAX_CHUNK_LOGITS"):
        monkeypatch.delenv(f"CPO_KERNELS_{name}", raising=False)


@pytest.fixture
def seeded() -> int:
    """Seed Python, NumPy and torch, for tests that draw from the global generators; returns the seed."""
    import random

    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    return 0
