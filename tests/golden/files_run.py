"""How many files of the product really run during a step, a round or a whole command, and how many one file reaches.

    python -m tests.golden.files_run [--tree TREE] [--list] [NAME ...]

A file runs when a function, method, lambda or comprehension of it is called; bodies of modules and classes, and what they
call while they are imported, do not count. Calls are seen by `sys.setprofile` in every thread, on the talker of
`tiny_models`, on a CPU and in plain torch.

    train step        forward, backward, metrics and optimizer of one step of `cpo-fast train`
    decode step       of the arena engine: one token for every row
    scheduler round   of the arena engine: admission, prefill, scoring and a decode step
    train             the whole command, on a file of pairs
    collect arena     the whole command, with and without what runs only inside the proof that `prepare` makes
    collect hf        the whole command
    closure MODULE    files that MODULE reaches by imports, its own and its packages' included, also inside functions

Steps and rounds differ (a prefill, a line that ends): the number is that of the one with most files, and the usual number
stands beside it. Of a command it is also said how many files are left without command line and configuration.

`ENTRIES` and `CLOSURES` name what is measured; after functions move, they are what has to be changed here.
"""

import argparse
import ast
import contextlib
import inspect
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from tests.golden.runs import ROOT, invoke, use_tree
from tests.source_rules import imports

PACKAGES = {"cpo_fast": "cpo_fast", "cpo_kernels": "kernels/cpo_kernels"}

# what is measured -> (module, qualified name of its function)
ENTRIES = {
    "train step": ("cpo_fast.train.trainer", "Trainer.step"),
    "decode step": ("cpo_fast.search.engine.decode_batch", "DecodeBatch.step"),
    "scheduler round": ("cpo_fast.search.engine.scheduler", "Scheduler.step"),
    "proof": ("cpo_kernels.integrations.transformers.prepare", "prepare"),
}
SHELL = ("cpo_fast/cli", "cpo_fast/config")  # folders, or modules of these names
CLOSURES = ("cpo_kernels.linear_logprob", "cpo_fast.train.loop")

CONFIG = """
run: run
model: {path: inputs/talker, dtype: float32, device: cpu}
task: {path: inputs/svamp.json}
search: {num_candidates: 4, num_kept: 2, max_steps: 3, max_thought_tokens: 5, arena_tokens: 30000}
data: {path: arena/pairs.jsonl}
lora: {r: 4, alpha: 8}
train: {lr: 0.01, batch_pairs: 12, num_epochs: 1}
"""
COMMANDS = {
    "collect arena": ["collect", "c.yaml", "run=arena"],
    "collect hf": ["collect", "c.yaml", "run=hf", "search.engine=hf"],
    "pairs": ["pairs", "arena/trees.jsonl"],
    "train": ["train", "c.yaml"],
}
ORDER = (
    "train step",
    "train",
    "decode step",
    "scheduler round",
    "collect arena",
    "collect arena without the proof",
    "collect hf",
)


class Recorder:
    """Sees calls and keeps, for the whole time and for every call of an entry, which product files they were in.

    Attributes:
        files: of the whole time. outside_proof: of it, what ran outside the proof.
        windows: of each entry, the files of each of its calls.
    """

    def __init__(self, tree: Path) -> None:
        self._roots = tuple(f"{(tree / folder).resolve()}/" for folder in PACKAGES.values())
        self._tree = tree.resolve()
        self._entries = {(_path_of(self._tree, module), name): what for what, (module, name) in ENTRIES.items()}
        self._known: dict[CodeType, str | None] = {}  # file of a product function, None for all other code
        self._open: dict[FrameType, tuple[str, set[str]]] = {}
        self.files: set[str] = set()
        self.outside_proof: set[str] = set()
        self.windows: dict[str, list[set[str]]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See every call for the length of a `with` block."""
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            file = self._file_of(frame.f_code)
            if file is not None and not self._is_importing(frame):
                self._called(frame, file)
        elif event == "return" and frame in self._open:
            what, files = self._open.pop(frame)
            self.windows.setdefault(what, []).append(files)

    def _called(self, frame: FrameType, file: str) -> None:
        what = self._entries.get((file, frame.f_code.co_qualname))
        if what is not None:
            self._open[frame] = (what, set())
        self.files.add(file)
        open_names = set()
        for name, files in self._open.values():
            files.add(file)
            open_names.add(name)
        if "proof" not in open_names:
            self.outside_proof.add(file)

    def _file_of(self, code: CodeType) -> str | None:
        if code not in self._known:
            is_function = code.co_flags & inspect.CO_OPTIMIZED  # bodies of modules and classes are not
            inside = code.co_filename.startswith(self._roots)
            path = Path(code.co_filename)
            self._known[code] = path.relative_to(self._tree).as_posix() if is_function and inside else None
        return self._known[code]

    def _is_importing(self, frame: FrameType) -> bool:
        """Whether a module of the product is being imported below this call."""
        caller = frame.f_back
        while caller is not None:
            if caller.f_code.co_name == "<module>" and caller.f_code.co_filename.startswith(self._roots):
                return True
            caller = caller.f_back
        return False


class Measured(NamedTuple):
    """The files of something, and what is said beside their number."""

    files: set[str]
    note: str = ""


def measure(tree: Path) -> dict[str, Measured]:
    """Everything in `ORDER` and `CLOSURES`, on the code of a checkout that `use_tree` has chosen."""
    import torch

    from tests.golden.inputs import write_inputs

    torch.set_num_threads(1)
    found: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_inputs(Path("inputs"))
        Path("c.yaml").write_text(CONFIG, encoding="utf-8")
        for name, arguments in COMMANDS.items():
            recorder = Recorder(tree)
            with recorder.watching():
                said = invoke(arguments)
            if said.code:
                raise SystemExit(f"{' '.join(arguments)} ended with {said.code}: {said.errors}")
            found[name] = _of_command(recorder.files)
            if name == "collect arena":
                found["collect arena without the proof"] = _of_command(recorder.outside_proof)
            found.update((what, _of_calls(calls)) for what, calls in recorder.windows.items() if what not in found)
    missing = [f"{module}:{name}" for what, (module, name) in ENTRIES.items() if what not in found]
    if missing:
        raise SystemExit(f"never called: {', '.join(missing)}; adjust ENTRIES")
    closures = {f"closure {module}": Measured(closure(tree, module)) for module in CLOSURES}
    return {**{what: found[what] for what in ORDER}, **closures}


def _of_command(files: set[str]) -> Measured:
    inner = [file for file in files if not file.startswith(SHELL)]
    return Measured(files, f"{len(inner)} without command line and configuration")


def _of_calls(calls: list[set[str]]) -> Measured:
    usual, count = Counter(map(len, calls)).most_common(1)[0]
    return Measured(max(calls, key=len), f"usually {usual}: {count} of {len(calls)}")


def closure(tree: Path, module: str) -> set[str]:
    """The product files that a module names in its imports, those inside functions too, and those that they name.

    A package's face (`cpo_kernels/__init__`), which Python runs before any module in it, counts where it is named.
    """
    waiting, reached = [module], set()
    while waiting:
        path = _path_of(tree, waiting.pop())
        if path in reached:
            continue
        reached.add(path)
        name = _module_of(path)
        syntax = ast.parse((tree / path).read_text(encoding="utf-8"))
        targets = (target for target, _ in imports(name, syntax, path.endswith("__init__.py")))
        waiting += [target for target in targets if _path_of(tree, target)]
    return reached


def functions(tree: Path, module: str) -> set[str]:
    """The qualified names of the functions and methods that a module of a checkout defines."""
    syntax = ast.parse((tree / _path_of(tree, module)).read_text(encoding="utf-8"))
    return set(_functions(syntax, ""))


def _functions(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            yield f"{prefix}{child.name}"


def _path_of(tree: Path, module: str) -> str:
    """A product module's file inside a checkout; "" for anything else."""
    package, _, rest = module.partition(".")
    if package not in PACKAGES:
        return ""
    base = "/".join([PACKAGES[package], *(rest.split(".") if rest else [])])
    return next((path for path in (f"{base}.py", f"{base}/__init__.py") if (tree / path).is_file()), "")


def _module_of(path: str) -> str:
    package = next(package for package, folder in PACKAGES.items() if path.startswith(f"{folder}/"))
    rest = path.removeprefix(f"{PACKAGES[package]}/").removesuffix(".py").replace("/", ".")
    return f"{package}.{rest}".removesuffix(".__init__")


def report(found: dict[str, Measured], names: Sequence[str], with_files: bool, write: Callable[[str], Any]) -> None:
    """One line for each measured name, and its files where they are asked for."""
    for what, measured in found.items():
        if names and what not in names:
            continue
        write(f"{len(measured.files):4}  {what}{f' ({measured.note})' * bool(measured.note)}\n")
        if with_files:
            write("".join(f"          {file}\n" for file in sorted(measured.files)))


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="what to report, everything if left out")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout whose code is run")
    parser.add_argument("--list", action="store_true", help="name the files")
    options = parser.parse_args()
    use_tree(options.tree)
    report(measure(options.tree.resolve()), options.names, options.list, sys.stdout.write)


if __name__ == "__main__":
    main()
