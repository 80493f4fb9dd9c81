"""Where the Triton kernels run: on a GPU when GPU tests are asked for, else in Triton's interpreter on the CPU.

The interpreter must be chosen before a kernel is defined, and a process that has it cannot compile for a GPU. So tests
marked `runs_kernels` run in one process of their own, which has TRITON_INTERPRET=1 (`conftest`, `interpreter_process`);
those marked `interpreted` are for that process alone. `TRITON_INTERPRET=1 pytest` runs them in its own process.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

runs_kernels = pytest.mark.kernels
interpreted = pytest.mark.interpreted
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="here a CPU can run the kernels, and none is compiled")


def gpu_alone_unless(interpreted_too: bool) -> tuple[pytest.MarkDecorator, ...]:
    """Marks of a case that the interpreter need not run, where it takes the same way through a kernel as another."""
    on_gpu = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs another like it"))
    return () if interpreted_too else on_gpu
