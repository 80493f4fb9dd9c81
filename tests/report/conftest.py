"""A browser for the pages that the report writes, and axe, which looks for faults that keep people from using them."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.chromium import Chromium, find_chromium

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A headless Chromium. `make test` installs one, so a skip says that none can be installed."""
    program = find_chromium()
    if program is None:
        can_install = shutil.which("apt-get") is not None and os.geteuid() == 0
        if (
            can_install and not (ROOT / ".venv" / ".no-chromium").exists()
        ):  # which `make chromium` leaves where it fails
            pytest.fail("no Chromium; install it: make chromium")
        pytest.skip("no Chromium, and none can be installed here; CPO_FAST_CHROMIUM names one")
    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's script, from a package that carries it."""
    found = importlib.util.find_spec("axe_playwright_python")
    assert found is not None, "axe is missing; pip install --no-deps -c constraints.txt axe-playwright-python"
    assert found.origin is not None, "a package has a file"
    return Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8")
