"""Without its compiled part the package says how to get it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cpo_kernels


def test_a_package_without_its_extension_says_how_to_build_it(tmp_path: Path) -> None:
    package = Path(cpo_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "cpo_kernels", ignore=shutil.ignore_patterns("_csrc*", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import cpo_kernels.forest"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: cpo_kernels: its compiled part, _csrc, is missing, or built for another Python; in a "
        "checkout build it with 'pip install -e .', elsewhere install a wheel of cpo-fast for this Python"
    )
