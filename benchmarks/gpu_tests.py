"""The tests that need a GPU, in one process or in one of several that share them out.

Files are named, not collected: others import libraries at their top that a machine with torch, Triton, Transformers and
pytest lacks. What a file needs beyond those is named beside it, and a file whose need is not met is left out aloud.

    python -m benchmarks.gpu_tests [SHARD OF]
"""

import importlib.util
import sys
from collections.abc import Sequence

import pytest

FILES: dict[str, tuple[str, ...]] = {  # what it needs beside torch, Triton, Transformers and pytest
    "tests/cpo_kernels/test_tree_decode_triton.py": (),
    "tests/cpo_kernels/test_linear_logprob_triton.py": (),
    "tests/cpo_kernels/test_linear_logprob_triton_head.py": (),
    "tests/cpo_kernels/test_tree_attention_triton.py": (),
    "tests/cpo_kernels/test_tree_attention_parts.py": (),
    "tests/cpo_kernels/test_tree_attention_features_triton.py": (),
    "tests/cpo_kernels/test_packed_features_triton.py": ("peft",),
    "tests/cpo_kernels/test_tree_attention_flash.py": (),
    "tests/cpo_kernels/test_linear_logprob_triton_memory.py": (),
    "tests/cpo_kernels/test_linear_logprob_triton_mutations.py": (),
    "tests/cpo_kernels/test_linear_logprob_large.py": (),
    "tests/cpo_kernels/test_tree_decode_large.py": (),
    "tests/cpo_kernels/test_tree_attention_tiles.py": (),
    "tests/cpo_kernels/test_sample_tokens.py": (),
    "tests/cpo_kernels/test_fused_layers.py": (),
    "tests/cpo_kernels/test_fused_models.py": ("peft",),
    "tests/cpo_kernels/test_fused_lora.py": ("peft",),
    "tests/cpo_kernels/test_fewer_kernels_triton.py": ("peft",),
    "tests/search/test_gpu_engine.py": ("pydantic", "peft"),
    "tests/train/test_deepspeed_contract.py": ("deepspeed", "pydantic", "peft"),
    "tests/integrations/test_trl_tree.py": ("trl", "peft", "pyarrow", "pandas"),
    "tests/benchmarks/test_trl_tree_benchmark.py": ("trl",),
}
# pytest's own options alone: those of plugins that are not installed would end the run
OPTIONS = (
    "-q", "-o", "addopts=-ra --strict-markers --import-mode=importlib", "-p", "no:cacheprovider", "-m", "gpu",
    "--continue-on-collection-errors",  # a file that cannot be imported stops no other
)  # fmt: skip


class Share:
    """A plugin that keeps every test whose place is `shard` modulo `num_shards`."""

    def __init__(self, shard: int, num_shards: int) -> None:
        self._shard, self._num_shards = shard, num_shards

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop the other processes' tests; neighbours, which compile alike, go to different ones."""
        items[:] = items[self._shard :: self._num_shards]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a share of the tests; none at all, where nothing is marked, is no failure."""
    shard, num_shards = map(int, (sys.argv[1:] if argv is None else argv) or (0, 1))
    files = []
    for file, needs in FILES.items():
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if missing:
            sys.stdout.write(f"left out: {file} needs {', '.join(missing)}\n")
        else:
            files.append(file)
    status = pytest.main([*OPTIONS, *files], plugins=[Share(shard, num_shards)])
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else int(status)


if __name__ == "__main__":
    sys.exit(main())
