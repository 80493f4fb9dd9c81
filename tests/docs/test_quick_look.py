"""The notebook runs from its first cell to its last, and shows what is committed."""

from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

from tests.docs.snippets import ROOT

PATH = ROOT / "examples" / "quick_look.ipynb"


def shown(notebook: Any) -> list[str]:
    """What the cells have printed. Remarks and bars of libraries are on stderr."""
    printed = [[each for each in cell.get("outputs", []) if each.get("name") != "stderr"] for cell in notebook.cells]
    assert {each.output_type for outputs in printed for each in outputs} <= {"stream"}
    return ["".join(each.text for each in outputs) for outputs in printed]


@pytest.mark.usefixtures("no_launcher")
def test_the_notebook_shows_what_is_committed() -> None:
    committed = nbformat.read(PATH, as_version=4)
    again = nbformat.read(PATH, as_version=4)
    for cell in again.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    sockets = Config({"KernelManager": {"transport": "ipc"}})  # no port of this machine is opened
    resources = {"metadata": {"path": ROOT}}
    NotebookClient(again, timeout=1200, kernel_name="python3", resources=resources, config=sockets).execute()
    assert shown(again) == shown(committed)
    text = "\n".join(shown(committed))
    assert "largest difference below 1e-4: True" in text
    assert "33 in the forest" in text


def test_the_notebook_is_small_and_keeps_no_trace_of_a_run() -> None:
    committed = nbformat.read(PATH, as_version=4)
    nbformat.validate(committed)
    assert PATH.stat().st_size < 20_000
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(dict(cell.metadata) == {} for cell in code)
    assert {output.name for cell in code for output in cell.outputs} == {"stdout"}
