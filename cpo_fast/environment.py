"""What a command ran with, kept in its run folder for whoever looks at the results later.

    run/environment.json    {"train": {"cpo-fast": "0.1.0", "torch": "2.13.0", "GPU": "...", ...}, "eval": {...}}

Libraries are asked for their version and not imported. GPUs are named where the command has used torch.
"""

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from cpo_fast import __version__
from cpo_fast.errors import ConfigError
from cpo_fast.files import write_atomic
from cpo_fast.ranks import find_ranks

ENVIRONMENT = "environment.json"
LIBRARIES = ("torch", "triton", "transformers", "peft", "deepspeed", "numpy")


@contextmanager
def environment_kept(run: str | Path, command: str) -> Iterator[None]:
    """Keep what `command` ran with, however the block ends, where it has made the run folder. Rank 0 alone writes.

    It is never the reason for a failure: a file that cannot be read is replaced, one that cannot be written is left out.
    """
    try:
        yield
    finally:
        with suppress(OSError, ConfigError):
            ranks, path = find_ranks(), Path(run) / ENVIRONMENT
            if ranks.rank == 0 and path.parent.is_dir():
                commands = {**_known(path), command: environment(ranks.world_size)}
                write_atomic(path, json.dumps(commands, indent=2) + "\n")


def _known(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def environment(num_ranks: int = 1) -> dict[str, str]:
    """Versions and machine, by name."""
    found = {"cpo-fast": __version__, "Python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = str(torch.get_num_threads())
        if torch.cuda.is_initialized():
            found["GPU"] = torch.cuda.get_device_name()
            found["CUDA"] = str(torch.version.cuda)
    if num_ranks > 1:
        found["ranks"] = str(num_ranks)
    return found
