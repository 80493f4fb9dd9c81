"""What `cpo-fast demo` shows and what it takes, as a record: the command in a process and a folder of its own.

    python -m benchmarks.demonstration [--seed N]

Everything but the seconds is the same on every run with one thread. CPU seconds are those of the whole process, the
loading of the libraries included.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import record, show


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration, print a table, append a record; its exit code if it fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer questions and steps, to see this command work")
    arguments = parser.parse_args(argv)
    from safetensors import safe_open

    from cpo_fast.demo import REASONER
    from cpo_fast.evaluate import compare, read_evaluation

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cpo_fast", "demo", "--out", folder, "--seed", str(arguments.seed)]
        command += ["--quick"] if arguments.quick else []
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.stdout.write(done.stdout)
            return done.returncode
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        base, adapter = (read_evaluation(Path(folder) / f"eval-{label}.jsonl") for label in ("base", "adapter"))
    with safe_open(REASONER / "base-0" / "model.safetensors", "numpy") as weights:
        num_parameters = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118
    search = re.search(r"search\s+that\s+taught\s+it\s+takes\s+(\d+)", done.stdout)
    results = {
        "seed": arguments.seed,
        "quick": arguments.quick,
        "num_parameters": num_parameters,
        "num_questions": base.num_graded,
        "before": base.num_correct,
        "before_interval": base.interval,
        "after": adapter.num_correct,
        "after_interval": adapter.interval,
        "mcnemar_p": compare(base, adapter, ("before", "after")).mcnemar_p,
        "tokens": adapter.tokens.mean,
        "search_tokens": None if search is None else int(search.group(1)),  # a run that shows no gain does not say
        "cpu_seconds": now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime,
    }
    asked = " ".join(["python -m benchmarks.demonstration", *(sys.argv[1:] if argv is None else argv)])
    show("the demonstration", ("", "value"), [(name, str(value)) for name, value in results.items()], "one thread")
    record("demonstration", asked, [], results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
