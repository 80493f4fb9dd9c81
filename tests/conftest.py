"""Settings every test runs under: no network, quiet tokenizers, a fixed seed and no kernel override from the shell."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.processor import Processor

# Set before any Hugging Face import: the hub client reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


# A minute and more each. Begun first, so that none is left alone at the end with half of the machine idle; those that wait
# for other processes beside those that compute.
LONGEST_FILES = (
    "train/test_launch.py",
    "cpo_kernels/test_aot_tree_attention.py",
    "train/test_several_ranks.py",
    "cpo_kernels/test_aot_linear_logprob.py",
    "train/test_hosts.py",
    "models/test_matrix.py",
    "benchmarks/test_gpu_quick.py",
    "search/test_cuda_graph_batch.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    order = {folder / name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(autouse=True)
def _no_kernel_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the kernels left in the shell would silently change what every kernel test compares."""
    for name in ("IMPL", "LOGPROB_PATH", "MAX_CHUNK_LOGITS"):
        monkeypatch.delenv(f"CPO_KERNELS_{name}", raising=False)


@pytest.fixture(scope="module", autouse=True)
def _leave_what_is_old_to_itself() -> None:
    """A pass of the garbage collector walks all that a process has imported and kept, a quarter of a second and more."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher: trainers of other libraries, which other tests run, leave RANK and the like behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Processor]":
    """`processor(bf16_ratio=...)`: a CPU whose bfloat16 products take so many times as long; None has no instructions."""
    from tests.processor import Processor

    made = Processor(monkeypatch)
    made.forget()
    yield made
    made.forget()


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
