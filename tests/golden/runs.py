"""Golden runs: the same tiny runs on two trees of this project must write the same bytes, times aside.

    python -m tests.golden.runs run OUT [--tree TREE] [--small] [--only PART ...]
    python -m tests.golden.runs compare FIRST SECOND
    python -m tests.golden.runs expect OUT

`run` performs the fixed set of `run_list` through the command line, in one process, and prints a manifest: SHA-256 and name
of every file that was written (see `normalised` for what counts). TREE is the checkout whose `cpo_fast` and `cpo_kernels`
are used, this one if it is left out; the compiled extension must lie in it. `compare` prints, for every file that differs
between two output folders, the first line that does. Equal bytes are promised on one machine with one set of libraries.

    python -m tests.golden.runs run before --tree ../before
    python -m tests.golden.runs run after
    python -m tests.golden.runs compare before after

What holds on other machines too is a smaller claim, which `test_golden_runs` makes; `expect` writes what it expects out of
the output folder of a `--small` run (see `portable`).

Everything runs on one thread, unless `--threads` says otherwise: models this small leave threads nothing but waiting.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = Path(__file__).with_name("expected.json")
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "200",  # no table is folded
    "NO_COLOR": "1",
    "TERM": "dumb",
}
# lines on standard error that are this program's own; libraries write there too
OWN_LINES = ("error:", "warning:", "Usage:", "Error:", "Try ")


class Said(NamedTuple):
    """What a command left behind on the screen."""

    code: int
    output: str
    errors: str


def use_tree(tree: Path) -> None:
    """Let `cpo_fast` and `cpo_kernels` come from a checkout, also where another one is installed in editable mode."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]
    sys.path[:0] = [str(tree), str(tree / "kernels")]
    for package, folder in (("cpo_fast", tree), ("cpo_kernels", tree / "kernels")):
        found = Path(importlib.import_module(package).__file__ or "").resolve()
        if not found.is_relative_to(folder.resolve()):
            raise SystemExit(f"{package} comes from {found}, not from {folder}; it was imported before, or is missing")


def perform(
    out: Path,
    small: bool = False,
    only: Sequence[str] = (),
    num_threads: int = 1,
    progress: Callable[[str], object] = print,
) -> None:
    """Write inputs, configurations and runs into the new folder `out`.

    Args:
        out: made here. small: only the reduced set. only: of these runs, by the beginnings of their names.
        num_threads: of torch.
        progress: called with a line for each run.
    """
    import torch

    from tests.golden.inputs import write_inputs
    from tests.golden.run_list import all_runs, small_runs

    os.environ.update(SETTINGS)
    torch.set_num_threads(num_threads)
    out.mkdir(parents=True)
    with contextlib.chdir(out):
        write_inputs(Path("inputs"))
        for run in small_runs() if small else all_runs():
            if only and not run.name.startswith(tuple(only)):
                continue
            Path(run.config_path).parent.mkdir(parents=True, exist_ok=True)
            Path(run.config_path).write_text(json.dumps(run.values(), indent=1), encoding="utf-8")
            started = time.process_time()
            codes = []
            for number, arguments in enumerate(run.arguments(), start=1):
                said = invoke(arguments)
                codes.append(said.code)
                path = Path("said") / f"{run.name}-{number}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                parts = (" ".join(arguments), f"exit {said.code}", said.output, said.errors)
                path.write_text("\n".join(parts), encoding="utf-8")
            progress(f"{run.name}: exit {' '.join(map(str, codes))}, {time.process_time() - started:.1f} CPU seconds")


def invoke(arguments: Sequence[str]) -> Said:
    """One command line, in this process."""
    from cpo_fast.cli import main

    output, errors = io.StringIO(), io.StringIO()
    before = sys.argv
    code = 0
    sys.argv = ["cpo-fast", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:  # a defect of the product, which the comparison shall show
        code = 70
        errors.write(f"error: {type(error).__name__}: {error}\n")
        traceback.print_exc()
    finally:
        sys.argv = before
    lines = errors.getvalue().replace(f"python -m {__package__}.", "").splitlines()  # click's idea of our name
    kept = [line for line in lines if line.startswith(OWN_LINES) or _is_progress(line)]
    return Said(code, output.getvalue(), "".join(f"{line}\n" for line in kept))


def _is_progress(line: str) -> bool:
    """Whether a line is `2/3 question: ...`."""
    done, slash, rest = line.partition("/")
    return bool(slash) and done.isdigit() and rest[:1].isdigit()


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="golden runs", prog="python -m tests.golden.runs")
    modes = parser.add_subparsers(dest="mode", required=True)
    run = modes.add_parser("run", help="perform the runs and print a manifest")
    run.add_argument("out", type=Path, help="new folder")
    run.add_argument("--tree", type=Path, default=ROOT, help="checkout whose code is run")
    run.add_argument("--small", action="store_true", help="only the reduced set")
    run.add_argument("--only", nargs="+", default=[], help="only runs whose names begin so")
    run.add_argument("--threads", type=int, default=1, help="threads of torch")
    compare = modes.add_parser("compare", help="compare two output folders")
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    expect = modes.add_parser("expect", help="write what the test expects, from a --small output folder")
    expect.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.mode == "run":
        _fix_hashes()
        use_tree(options.tree)
        out = options.out.resolve()
        say = sys.stderr.write
        perform(out, options.small, options.only, options.threads, progress=lambda line: say(f"{line}\n"))
        _print_manifest(out)
    elif options.mode == "compare":
        _compare(options.first, options.second)
    else:
        from tests.golden.portable import summary, written

        EXPECTED.write_text(written(summary(options.out)), encoding="utf-8")


def _fix_hashes() -> None:
    """Start again with a fixed seed of text hashes: PEFT writes an adapter's target modules in the order of a set."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        arguments = [sys.executable, "-m", "tests.golden.runs", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, "PYTHONHASHSEED": "0"})


def _print_manifest(out: Path) -> None:
    from tests.golden.normalised import manifest

    text = "".join(f"{digest}  {name}\n" for name, digest in manifest(out).items())
    (out / "manifest.txt").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _compare(first: Path, second: Path) -> None:
    from tests.golden.normalised import differences, files_of

    found = list(differences(first, second))
    sys.stdout.write("".join(f"{each}\n" for each in found))
    sys.stdout.write(f"{len(found)} of {len({*files_of(first), *files_of(second)})} files differ\n")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
