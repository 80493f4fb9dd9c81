"""Rules that can be read off Python files. `test_architecture` applies them and shows that each catches a bad sample.

All but `import_circles` look at one file: they take a module's name and syntax tree and return sentences.
"""

import ast
import sys
from collections.abc import Iterator, Mapping

# cpo_fast from the ground up; what is not named (errors, files, config, tree, tasks, models, ...) is the ground, level 0
LEVELS = {
    "search": 1,
    "data": 1,
    "official": 2,
    "train": 2,
    "evaluate": 2,
    "report": 3,
    "cli": 3,
    "demo": 3,
    "iterate": 3,
    "__main__": 3,
}
STRANGERS = {("search", "data"), ("data", "search")}
KERNEL_LIBRARIES = {"torch", "triton", "numpy", "cpo_kernels"}
# files of a kernel folder that hold one implementation each, Triton's in several; none imports another implementation
IMPLEMENTATIONS = {"reference", "eager", "flash", "native", "triton"}
TRITON_HALVES = {"triton_forward", "triton_backward"}  # nor one of these the other
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "joblib", "marshal"}
EXITS = {"sys.exit", "os._exit", "SystemExit"}


def imports(name: str, tree: ast.AST, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Every module that `tree` may import, lazily or not, with the line; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _imported_from(node, name, is_package)
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def _imported_from(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def import_circles(trees: Mapping[str, ast.AST], packages: set[str]) -> list[str]:
    """Sets of modules that reach each other, imports inside functions and for types counted.

    `from a import b` counts as a.b where that is a module, else as a. That a's own `__init__` runs too makes no circle.
    """
    edges: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                base = _imported_from(node, name, name in packages)
                modules = (f"{base}.{alias.name}" for alias in node.names)
                targets = [module if module in trees else base for module in modules]
            edges[name] |= {target for target in targets if target in trees and target != name}
    reached = {name: _reached(name, edges) for name in trees}
    circles = {frozenset(other for other in reached[name] if name in reached[other]) for name in trees}
    return sorted(" <-> ".join(sorted(circle)) for circle in circles if circle)


def _reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = edges[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def import_directions(name: str, tree: ast.AST, is_package: bool = False) -> list[str]:
    """csrc <- cpo_kernels <- cpo_fast, and the levels inside cpo_fast and inside a kernel folder."""
    wrong = []
    for target, line in imports(name, tree, is_package):
        if _within(name, "cpo_kernels") and _within(target, "cpo_fast"):
            wrong.append(f"{line}: cpo_kernels imports {target}")
        if _within(name, "cpo_fast") and _within(target, "cpo_kernels._csrc"):
            wrong.append(f"{line}: cpo_fast imports {target}; only cpo_kernels calls csrc")
        if _within(name, "cpo_fast") and _within(target, "cpo_fast"):
            ours, theirs = (f"{module}..".split(".")[1] for module in (name, target))
            if LEVELS.get(theirs, 0) > LEVELS.get(ours, 0) or (ours, theirs) in STRANGERS:
                wrong.append(f"{line}: {ours or 'cpo_fast'} imports {target}")
        outside = _within(name, "cpo_kernels") and not _within(name, "cpo_kernels.integrations")
        if outside and _within(target, "cpo_kernels.integrations"):
            wrong.append(f"{line}: {name} imports {target}")
        folder, _, ours = name.rpartition(".")
        if _within(name, "cpo_kernels") and target.startswith(f"{folder}."):
            theirs = target.removeprefix(f"{folder}.").split(".")[0]
            one, other = (stem.split("_")[0] for stem in (ours, theirs))
            if (one != other and {one, other} <= IMPLEMENTATIONS) or {ours, theirs} == TRITON_HALVES:
                wrong.append(f"{line}: {name} imports {target}")
    return wrong


def kernel_libraries(name: str, tree: ast.AST, is_package: bool = False) -> list[str]:
    """cpo_kernels needs torch, triton and numpy; others belong in cpo_kernels/integrations/<library>, not its root."""
    if not _within(name, "cpo_kernels") or name.startswith("cpo_kernels.integrations."):
        return []
    known = KERNEL_LIBRARIES | set(sys.stdlib_module_names)
    return [
        f"{line}: {name} imports {target}"
        for target, line in imports(name, tree, is_package)
        if target.split(".")[0] not in known
    ]


def forbidden_calls(name: str, tree: ast.AST, is_package: bool = False) -> list[str]:
    """No print, exit() or quit(); sys.exit in the cli alone; no bare except, endless loop, shell or pickle."""
    wrong = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            wrong.append(f"{line}: bare except")
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant) and node.test.value:
            wrong.append(f"{line}: endless loop")
        if isinstance(node, ast.Name) and node.id in {"print", "exit", "quit"}:
            wrong.append(f"{line}: {node.id}")
        if isinstance(node, ast.Name | ast.Attribute):
            text = ast.unparse(node)
            # a training that hangs in a collective can only be left that way
            leaves = text == "os._exit" and name in {"cpo_fast.train.signals", "cpo_fast.train.heartbeat"}
            if text in EXITS and not _within(name, "cpo_fast.cli") and not leaves:
                wrong.append(f"{line}: {text} outside the cli")
            if text in {"torch.load", "torch.save", "os.system", "os.popen"}:
                wrong.append(f"{line}: {text}")
        if (
            isinstance(node, ast.keyword)
            and node.arg in {"shell", "allow_pickle"}
            and ast.unparse(node.value) != "False"
        ):
            wrong.append(f"{node.value.lineno}: {node.arg}={ast.unparse(node.value)}")
    for target, line in imports(name, tree, is_package):
        if target.split(".")[0] in PICKLERS or target in {"torch.load", "torch.save"}:
            wrong.append(f"{line}: imports {target}")
    return wrong


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _public(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes and functions of a module, methods included, functions inside functions left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If | ast.Try):
            yield from _public(node, prefix)
        if not isinstance(node, Definition):
            continue
        if node.name.startswith("_") and not (node.name.startswith("__") and prefix):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _public(node, f"{prefix}{node.name}.")


def docstrings(name: str, tree: ast.Module, is_package: bool = False) -> list[str]:
    """Every module, public class and public function says what it is; methods do where their name does not."""
    wrong = [] if ast.get_docstring(tree) else ["1: the module has no docstring"]
    for public, node in _public(tree):
        if "." not in public and not ast.get_docstring(node):
            wrong.append(f"{node.lineno}: {public} has no docstring")
    return wrong


def annotations(name: str, tree: ast.Module, is_package: bool = False) -> list[str]:
    """Every argument and result of a public function has a type."""
    wrong = []
    for public, node in _public(tree):
        if isinstance(node, ast.ClassDef):
            continue
        static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
        positional = node.args.posonlyargs + node.args.args
        if "." in public and not static:
            positional = positional[1:]  # self or cls
        arguments = [*positional, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        wrong += [f"{node.lineno}: {public}: {a.arg} has no type" for a in arguments if a and a.annotation is None]
        if node.returns is None:
            wrong.append(f"{node.lineno}: {public} has no return type")
    return wrong
