"""The packed trainer inside `DistributedDataParallel`: two processes on the CPU against TRL's own trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.trainers import save_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.soak
def test_two_processes_end_at_the_parameters_of_trl(tmp_path: Path) -> None:
    save_model(tmp_path)
    script = ROOT / "tests" / "integrations" / "two_processes.py"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["wrapper"] == "DistributedDataParallel"
    assert result["movement"] >= 1e-2
    assert result["difference"] <= 1e-4 * result["movement"]
    # counts are summed over both processes: eight rows of 2 x 2 pairs
    assert all(row["packing/tokens_saved"] > row["packing/tokens"] for row in result["logs"])
    assert len(result["logs"]) == 5
