"""Commands run as a user runs them: in a process of their own."""

import subprocess
import sys


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `cpo-fast` with these arguments to its end."""
    return subprocess.run(
        [sys.executable, "-c", "from cpo_fast.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=3000,
    )
