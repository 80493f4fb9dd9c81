"""The largest micro-batch is computed once before the first step: what does not fit, or is not finite, ends a run there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpo_fast.config import validate_config
from cpo_fast.errors import NonFiniteError
from cpo_fast.train.loop import train
from tests.tiny import save_tiny_model
from tests.train.runs import MakeConfig

LONG = 3000  # tokens of the last pair
CHILD = """
import resource, sys
import psutil, torch
from cpo_fast.config import load_config
from cpo_fast.errors import OutOfMemory
from cpo_fast.train.deepspeed_engine import adamw
from cpo_fast.train.loop import train

def limited(config, parameters):
    # what is mapped by now, and some more, which the short rows fit into
    resource.setrlimit(resource.RLIMIT_AS, 2 * (psutil.Process().memory_info().vms + (600 << 20),))
    return adamw(config, parameters)

try:
    train(load_config(sys.argv[1]), make_optimizer=limited)
except OutOfMemory as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is one of Linux")
def test_what_does_not_fit_fails_before_the_first_step(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", intermediate_size=16384, max_position_embeddings=2 * LONG)
    rows = [
        {"prompt_token_ids": [5, 6], "chosen_token_ids": [7 + n], "rejected_token_ids": [100 + n]} for n in range(60)
    ]
    rows.append({"prompt_token_ids": [5], "chosen_token_ids": [9] * LONG, "rejected_token_ids": [8]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"path": str(tmp_path / "pairs.jsonl"), "max_length": 2 * LONG},
        "lora": {"r": 4, "alpha": 8},
        "train": {"batch_pairs": 4, "max_tokens": 4000, "gradient_checkpointing": "off", "num_epochs": 1},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 6, done.stderr
    assert "train.gradient_checkpointing=non_reentrant" in done.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

    # without the long row the same limit is enough
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_row_of_the_largest_micro_batch_that_is_not_finite_is_named_before_the_first_step(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config()
    save_tiny_model(tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.embed_tokens.weight"][250] = torch.inf
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    rows = [json.loads(line) for line in Path(config.data.path or "").read_text().splitlines()]
    rows[4]["rejected_token_ids"] = [*range(10, 60), 250, 9]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = config.model_dump(mode="json")
    values["model"]["path"], values["data"]["path"] = str(tmp_path / "broken"), str(tmp_path / "pairs.jsonl")
    with pytest.raises(NonFiniteError, match=r"the loss of 1 rows is not finite at step 1 \(rows .*pairs\.jsonl:5\)"):
        train(validate_config(values))
    assert not Path(config.run, "metrics.jsonl").exists()
