"""What `files_run` measures can be found, and its closure follows the imports of a file and of the packages around it."""

from pathlib import Path

import pytest

from tests.golden import files_run
from tests.golden.runs import ROOT


@pytest.mark.parametrize("what", files_run.ENTRIES)
def test_an_entry_names_a_function_of_the_product(what: str) -> None:
    module, qualified = files_run.ENTRIES[what]
    names = files_run.functions(ROOT, module)
    assert qualified in names, f"{module} has no {qualified}; adjust ENTRIES"


def test_a_closure_holds_lazy_imports_and_packages_and_nothing_else(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "alone.py": "import json\nfrom cpo_fast.deep import inner",
        "deep/__init__.py": "def f():\n    from ..other import g",
        "deep/inner.py": "",
        "other.py": "import numpy",
        "stranger.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "cpo_fast" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    reached = files_run.closure(tmp_path, "cpo_fast.alone")
    unnamed = {"cpo_fast/stranger.py", "cpo_fast/__init__.py"}  # `from cpo_fast import ...` would name the latter
    assert reached == {f"cpo_fast/{name}" for name in files} - unnamed
