"""Train in a process of its own and write how much memory that took: `python -m tests.train.growth_process CONFIG.json`.

The answer, in bytes, goes to `<run>/growth.json`: the largest resident memory while training, by the kernel's own
high-water mark, less that after the imports. Of several trainings in one process the later ones would find memory and code
of the first.
"""

import json
import sys
from pathlib import Path

import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

from cpo_fast.config import validate_config
from cpo_fast.train.loop import train
from tests.train.runs import memory_bytes

if __name__ == "__main__":
    config = validate_config(json.loads(Path(sys.argv[1]).read_text()))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    imported = memory_bytes("VmRSS")
    train(config)
    (Path(config.run) / "growth.json").write_text(json.dumps(memory_bytes("VmHWM") - imported))
