"""A Python that has torch, Triton, Transformers and pytest with what these need, and nothing else unless it is named.

It is a virtual environment without pip, whose packages are links to those of the Python that runs the tests. What the
four bring along on some versions alone is left out, so that nothing leans on it.
"""

import os
import subprocess
import sysconfig
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.gpu_bundle import canonical
from cpo_kernels import _csrc

GIVEN = ("torch", "triton", "transformers", "pytest")
LEFT_OUT = {
    "rich",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "markdown-it-py",
    "mdurl",
    "click",
}


def closure(names: Iterable[str]) -> set[str]:
    """The distributions and all that they require, by canonical name; what is not installed is left out."""
    found: set[str] = set()
    waiting = [canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for requirement in map(Requirement, requires):
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and canonical(requirement.name) not in found:
                waiting.append(canonical(requirement.name))
    return found


def make(folder: Path, carried: Iterable[str] = ()) -> Path:
    """Make it in `folder`, with the distributions `carried` beside the four; returns the path of its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for name in (closure(GIVEN) - LEFT_OUT) | {canonical(name) for name in carried}:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # a peer that is not installed here
            continue
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            source, link = Path(str(distribution.locate_file(top))), site / top
            if source.exists() and not os.path.lexists(link):
                link.symlink_to(source)
    # an editable installation may keep the extension elsewhere than in the checkout
    (site / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('cpo_kernels._csrc', {_csrc.__file__!r})\n"
        "module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
    )
    subprocess.run([python, "-c", "import torch, pytest"], check=True, cwd=folder, env=environment(folder))
    return python


def environment(results: Path) -> dict[str, str]:
    """Variables for a command of it: none of this process's paths, and results in a folder of the test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CPO_", "TRITON_"))}
    return kept | {"CPO_FAST_RESULTS": str(results), "PYTHONDONTWRITEBYTECODE": "1"}


def is_present(python: Path, module: str) -> bool:
    """Whether it finds a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], env=environment(python.parent), cwd=python.parent).returncode == 0
