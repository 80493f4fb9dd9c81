"""The house rules: imports run one way, files stay small and say what they are, light commands load nothing heavy."""

import ast
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from cpo_fast.cli import COMMANDS
from tests import source_rules
from tests.conftest import LONGEST_FILES
from tests.source_rules import (
    annotations,
    docstrings,
    forbidden_calls,
    import_circles,
    import_directions,
    kernel_libraries,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"cpo_fast": ROOT / "cpo_fast", "cpo_kernels": ROOT / "kernels" / "cpo_kernels"}
MAX_LINES = 600
SUFFIXES = {".py", ".cpp", ".h", ".js", ".css"}
# CPU seconds of a light start over those of importing the command line's own libraries; 0.6 to 2.4 was seen. A ratio of CPU
# seconds says the same on a slow machine and beside other work, where a limit in seconds would not
MAX_STARTUP_RATIO = 5.0
LIBRARIES = "import click, pydantic, rich, yaml"
HEAVY = ("torch", "transformers", "peft", "deepspeed", "triton", "datasets", "trl")

PRODUCT = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}
# rule, module the sample pretends to be, bad sample, good sample
SAMPLES = [
    (import_directions, "cpo_kernels.forest", "from cpo_fast.tree import SearchTree", "import cpo_kernels._csrc"),
    (import_directions, "cpo_kernels.forest", "import cpo_fast", "import torch"),
    (import_directions, "cpo_kernels.forest", "from cpo_kernels.integrations import trl", "import cpo_kernels"),
    (import_directions, "cpo_fast.data.batches", "from cpo_kernels._csrc import build_forest", "import cpo_kernels"),
    (import_directions, "cpo_fast.data.pair_files", "from cpo_fast.search import state", "from cpo_fast import tree"),
    (import_directions, "cpo_fast.search.tree_search", "from ..data import pairs", "from ..tasks import task"),
    (import_directions, "cpo_fast.search.tree_search", "def f():\n import cpo_fast.train.loop", "from . import select"),
    (import_directions, "cpo_fast.tree", "from cpo_fast import data", "from cpo_fast import errors"),
    (import_directions, "cpo_fast.models", "from cpo_fast.evaluate import greedy", "from cpo_fast.config import load"),
    (import_directions, "cpo_fast.train.loop", "from cpo_fast.cli import main", "from cpo_fast.evaluate import greedy"),
    (
        import_directions,
        "cpo_kernels.tree_attention.triton_backward",
        "from cpo_kernels.tree_attention.triton_forward import BLOCK_Q",
        "from cpo_kernels.tree_attention.schedule import TreeSchedule",
    ),
    (
        import_directions,
        "cpo_kernels.tree_decode.eager",
        "from .reference import partial",
        "from .plan import DecodePlan",
    ),
    (
        import_directions,
        "cpo_kernels.tree_attention.triton",
        "from .eager import KeyRun",
        "from .triton_forward import f",
    ),
    (
        import_directions,
        "cpo_kernels.tree_attention.flash",
        "def f():\n from . import triton_forward",
        "from . import x",
    ),
    (kernel_libraries, "cpo_kernels.tolerances", "def f():\n import transformers", "import random, numpy, triton"),
    (kernel_libraries, "cpo_kernels.integrations", "import peft", "import importlib"),
    (docstrings, "cpo_fast.tree", "x = 1", '"""A tree."""'),
    (docstrings, "cpo_fast.tree", '"""m"""\ndef grow(): pass', '"""m"""\ndef _grow(): pass'),
    (docstrings, "cpo_fast.tree", '"""m"""\nclass A:\n def f(self): 1', '"""m"""\nclass A:\n "d"\n def f(self): 1'),
    (annotations, "cpo_fast.tree", "def f(x) -> int: pass", "def f(x: int) -> int: pass"),
    (annotations, "cpo_fast.tree", "def f(x: int): pass", "def _f(x): pass"),
    (annotations, "cpo_fast.tree", "def f(*x, **y) -> None: pass", "def f(*x: int, **y: int) -> None: pass"),
    (annotations, "cpo_fast.tree", "class A:\n def __init__(self, x) -> None: 1", "class A:\n def f(self) -> None: 1"),
    (annotations, "cpo_fast.tree", "class A:\n @staticmethod\n def f(x) -> None: 1", "def f() -> None:\n def g(x): 1"),
    (forbidden_calls, "cpo_fast.cli", "print('x')", "click.echo('x')"),
    (forbidden_calls, "cpo_fast.cli", "exit(1)", "sys.exit(1)"),
    (forbidden_calls, "cpo_fast.cli", "quit()", "self.quit()"),
    (forbidden_calls, "cpo_fast.tree", "sys.exit(1)", "exit_code = 1"),
    (forbidden_calls, "cpo_fast.tree", "raise SystemExit(2)", "raise ValueError(2)"),
    (forbidden_calls, "cpo_fast.tree", "try:\n f()\nexcept:\n 1", "try:\n f()\nexcept OSError:\n 1"),
    (forbidden_calls, "cpo_fast.tree", "while True:\n f()", "while not done:\n f()"),
    (forbidden_calls, "cpo_fast.tree", "while 1:\n f()", "while queue:\n f()"),
    (forbidden_calls, "cpo_fast.tree", "subprocess.run(c, shell=True)", "subprocess.run(c, shell=False)"),
    (forbidden_calls, "cpo_fast.tree", "os.system(c)", "os.replace(a, b)"),
    (forbidden_calls, "cpo_fast.tree", "import pickle", "import json"),
    (forbidden_calls, "cpo_fast.tree", "from pickle import loads", "from json import loads"),
    (forbidden_calls, "cpo_fast.tree", "torch.load(p)", "safetensors.torch.load_file(p)"),
    (forbidden_calls, "cpo_fast.tree", "from torch import load", "from torch import nn"),
    (forbidden_calls, "cpo_fast.tree", "numpy.load(p, allow_pickle=True)", "numpy.load(p)"),
]
RULES = list(dict.fromkeys(sample[0] for sample in SAMPLES))
Check = Callable[..., list[str]]


@pytest.mark.parametrize(("rule", "name", "bad", "good"), SAMPLES)
def test_rule_catches_its_bad_sample_and_passes_its_good_one(rule: Check, name: str, bad: str, good: str) -> None:
    assert rule(name, ast.parse(bad)) != []
    assert rule(name, ast.parse(good)) == []


def test_relative_imports_are_resolved() -> None:
    found = dict(source_rules.imports("a.b.c", ast.parse("from ..x import y\nfrom . import z")))
    assert {"a.x", "a.x.y", "a.b", "a.b.z"} == set(found)
    inside_package = dict(source_rules.imports("a.b", ast.parse("from .x import y"), is_package=True))
    assert {"a.b.x", "a.b.x.y"} == set(inside_package)


def circles(**sources: str) -> list[str]:
    return import_circles(
        {f"p.{name}": ast.parse(text) for name, text in sources.items()} | {"p": ast.parse("")}, {"p"}
    )


def test_a_circle_of_imports_is_caught() -> None:
    assert circles(a="from p import b", b="from p.c import C", c="def f():\n from . import a") == [
        "p.a <-> p.b <-> p.c"
    ]
    assert circles(a="from p import b", b="if TYPE_CHECKING:\n import p.a") == ["p.a <-> p.b"]
    assert circles(a="from p import b", b="from p.c import C", c="from p import name") == []


def test_no_imports_run_in_a_circle() -> None:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PRODUCT.items()}
    packages = {name for name, path in PRODUCT.items() if path.name == "__init__.py"}
    assert import_circles(trees, packages) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_product_follows(rule: Check) -> None:
    wrong = []
    for name, path in PRODUCT.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(ROOT)}:{one}" for one in rule(name, tree, path.name == "__init__.py")]
    assert wrong == []


def test_both_packages_are_seen() -> None:
    """Without files every rule above would hold."""
    assert {"cpo_fast.errors", "cpo_fast.cli", "cpo_kernels.forest", "cpo_kernels"} <= set(PRODUCT)


def test_files_are_short() -> None:
    folders = (*PACKAGES.values(), ROOT / "csrc", ROOT / "tests", ROOT / "benchmarks")
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_kernels_holds_a_package_and_is_none() -> None:
    """A module named `kernels` would shadow the Hugging Face package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_csrc_includes_no_torch_header() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h"}]
    assert sources != []
    pattern = re.compile(r"#include\s*[<\"](torch|ATen|c10)/")
    assert pattern.search("#include <torch/extension.h>")
    assert [path.name for path in sources if pattern.search(path.read_text(encoding="utf-8"))] == []


def test_constraints_pin_every_dependency_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lists = [project["build-system"]["requires"], project["project"]["dependencies"]]
    lists += project["project"]["optional-dependencies"].values()
    wanted = {re.split(r"[\[<>=;! ]", requirement)[0] for each in lists for requirement in each} - {"cpo-fast"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", pin)] == []

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    assert {normal(name) for name in wanted} - {normal(pin.split("==")[0]) for pin in pins} == set()


REPORT = """
import sys
sys.argv = ["cpo-fast", *{arguments!r}]
code = 0
try:
    {statement}
except SystemExit as stop:
    code = stop.code or 0
sys.stderr.write("\\nLOADED " + ",".join(name for name in {heavy!r} if name in sys.modules) + f" CODE {{code}}")
"""
RUN = "from cpo_fast.cli import main; main()"


def light_run(statement: str, arguments: list[str]) -> tuple[str, int, float]:
    """Heavy modules loaded, exit code, and the fewest CPU seconds of three runs in a fresh interpreter."""
    program = REPORT.format(arguments=arguments, statement=statement, heavy=HEAVY)
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    loaded, code = re.fullmatch(r"LOADED (\S*) CODE (\d+)", done.stderr.splitlines()[-1]).groups()
    return loaded, int(code), min(seconds)


@pytest.fixture(scope="session")
def library_seconds() -> float:
    """CPU seconds of importing the libraries that every command needs."""
    return light_run(LIBRARIES, [])[2]


def test_a_heavy_import_would_be_noticed() -> None:
    loaded, _, _ = light_run("import triton", [])
    assert "triton" in loaded


@pytest.mark.parametrize(
    ("statement", "arguments"),
    [("import cpo_fast", []), (RUN, ["--help"]), *((RUN, [command, "--help"]) for command in COMMANDS)],
    ids=["import", "help", *COMMANDS],
)
def test_light_command_loads_nothing_heavy(statement: str, arguments: list[str], library_seconds: float) -> None:
    if arguments[:1] and arguments[0] in COMMANDS and find_spec(f"cpo_fast.cli.{arguments[0]}") is None:
        pytest.fail(f"cpo_fast.cli lists '{arguments[0]}' but has no module of that name")
    loaded, code, seconds = light_run(statement, arguments)
    assert (loaded, code) == ("", 0)
    assert seconds < MAX_STARTUP_RATIO * library_seconds


@pytest.mark.parametrize("command", ["collect", "train", "eval"])
def test_config_error_loads_nothing_heavy(command: str, tmp_path: Path, library_seconds: float) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("train:\n  learning_rat: 1\n")
    loaded, code, seconds = light_run(RUN, [command, str(config)])
    assert (loaded, code) == ("", 2)
    assert seconds < MAX_STARTUP_RATIO * library_seconds


@pytest.mark.parametrize("command", ["collect", "train", "eval", "plan", "pairs"])
def test_a_fault_of_the_data_is_found_before_anything_heavy_is_loaded(command: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"ask": "a", "good": "b"}\n')
    config = tmp_path / "config.yaml"
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    config.write_text(f"{{run: {run}, model: {{path: {tmp_path}}}, task: {{path: {rows}}}, data: {{path: {rows}}}}}\n")
    loaded, code, _ = light_run(RUN, [command, str(config)])
    assert (loaded, code) == ("", 3)


def test_the_files_that_begin_first_are_there() -> None:
    assert [name for name in LONGEST_FILES if not (Path(__file__).parent / name).is_file()] == []
