"""The documentation builds without a warning, has no dead link, loads nothing from elsewhere and leaves nothing out."""

import ast
import html
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import cpo_fast.evaluate
import cpo_kernels
from cpo_fast.cli import COMMANDS
from cpo_fast.config import Config
from cpo_fast.config.sections import MixtureItem
from tests.config_fields import fields
from tests.docs.snippets import ROOT

DOCS = ROOT / "docs"


def loaded(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """Links, what the browser loads, and anchors of an HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag in ("a", "area"):
            self.links.append(found.get("href", ""))
        elif tag == "link" and found.get("rel") in ("prev", "next", "canonical"):
            self.links.append(found["href"])
        else:
            self.loads += [found[name] for name in ("src", "href", "data", "poster") if name in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert built.returncode == 0, built.stderr[-3000:]
    assert [line for line in built.stderr.splitlines() if not line.startswith("INFO")] == []
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """Every page of the site, by its path."""
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_links_and_anchors_inside_the_site_are_there(site: Path, pages: dict[str, Page]) -> None:
    dead, num_checked = [], 0
    for name, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or name == "404.html":  # which is served anywhere, so its links are absolute
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            target = Path(os.path.normpath(target))
            num_checked += 1
            other = target.relative_to(site).as_posix()
            if not target.exists() or (other in pages and parts.fragment and not _has(pages[other], parts.fragment)):
                dead.append(f"{name}: {link}")
    assert dead == []
    assert num_checked > 1000


def _has(page: Page, fragment: str) -> bool:
    return unquote(fragment) in page.anchors


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    assert [load for page in pages.values() for load in page.loads if urlsplit(load).scheme not in ("", "data")] == []
    for style in site.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*", style.read_text("utf-8")) == [], style


def test_links_to_elsewhere_have_a_possible_form(pages: dict[str, Page]) -> None:
    links = {link for page in pages.values() for link in page.links if urlsplit(link).scheme}
    assert any("arxiv.org" in link for link in links)
    assert [link for link in links if not re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(/[^\s<>]*)?", link)] == []
    papers = [link for link in links if "arxiv.org" in link]
    assert [link for link in papers if not re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link)] == []


def test_every_picture_stands_in_its_page_and_has_a_title(site: Path) -> None:
    text = (site / "concepts.html").read_text("utf-8")
    titles = re.findall(r'<svg class="picture"[^>]*role="img"[^>]*><title id="[\w-]+">[^<]+', text)
    assert len(titles) == 6
    assert "<img" not in text


def test_pictures_are_what_their_script_draws() -> None:
    drawn = loaded("pictures").PICTURES
    assert len(drawn) == 6
    for name, draw in drawn.items():
        assert (DOCS / "pictures" / f"{name}.svg").read_text("utf-8") == draw(), "python docs/pictures.py"


# what is generated


def test_pages_of_the_checkout_hold_what_is_generated_as_it_is_now() -> None:
    written_anew = loaded("site_hooks").written_anew
    kept = [path for path in DOCS.rglob("*.md") if "<!-- end of " in path.read_text("utf-8")]
    assert {path.name for path in kept} >= {"configuration.md", "commands.md"}
    for path in kept:
        assert path.read_text("utf-8") == written_anew(path.read_text("utf-8")), "python docs/site_hooks.py"
    assert '| <span id="train.beta"></span>`beta` |' in (DOCS / "configuration.md").read_text("utf-8")


def test_every_key_says_what_it_means() -> None:
    keys = dict(loaded("site_hooks").keys())
    assert {key for key, _ in fields()} | {f"data.mixture[].{name}" for name in MixtureItem.model_fields} == set(keys)
    assert [key for key, field in keys.items() if not (field.description or "").strip()] == []


def test_every_key_stands_in_the_reference_with_type_and_default(pages: dict[str, Page], site: Path) -> None:
    assert {key for key, _ in fields()} <= pages["configuration.html"].anchors
    text = re.sub(r"\s+", " ", (site / "configuration.html").read_text("utf-8"))
    rows = dict(re.findall(r'<span id="([\w.\[\]]+)"></span>(.*?)</tr>', text))
    cells = {
        key: [re.sub(r"<.*?>", "", cell).strip() for cell in re.split("<td>|<br */?>", row)]
        for key, row in rows.items()
    }
    assert cells["train.beta"][::2] == ["beta", "number, above 0; default 0.1"]
    assert cells["train.loss_type"][2] == "sigmoid, hinge, ipo; default sigmoid"
    assert cells["train.num_epochs"][2] == "integer or null, at least 1; default 4"
    assert cells["data.mixture[].path"][::2] == ["mixture[].path", "text; needed"]
    assert cells["task.chat"][2] == "true or false; default false"
    assert cells["data.path"][2] == "text; default empty"
    assert html.unescape(cells["task.path"][1]).endswith(
        "a JSONL of question[, answer], or hub:org/name[:config][:split]"
    )


def test_every_command_and_code_stands_on_its_page(pages: dict[str, Page], site: Path) -> None:
    assert set(COMMANDS) <= pages["commands.html"].anchors
    text = (site / "commands.html").read_text("utf-8")
    codes = [int(code) for code in re.findall(r"<td>(\d+)</td>", text)]
    assert codes == [0, 1, 2, 3, 4, 5, 6, 7, 130, 143]
    assert "--allow-mismatch KEY" in text


def test_every_public_name_stands_in_the_reference(pages: dict[str, Page]) -> None:
    anchors = pages["api.html"].anchors
    names = [f"cpo_kernels.{name}" for name in cpo_kernels.__all__]
    names += [f"cpo_fast.evaluate.{name}" for name in cpo_fast.evaluate.__all__]
    for path in (ROOT / "kernels" / "cpo_kernels" / "integrations").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        module = f"cpo_kernels.integrations.{path.stem}"
        public = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        found = [name for name in public if f"{module}.{name}" in anchors]
        assert path.stem == "__init__" or found != [], module
    twice = [name for name in names if f"{name}.{name.rpartition('.')[2]}" in anchors]  # a module of the same name
    assert [name for name in names if name not in anchors and name not in twice] == []


def test_figures_are_those_of_the_records(site: Path) -> None:
    hooks = loaded("site_hooks")
    record = hooks.newest("train_step", lambda each: each["results"]["clock"] == "wall")
    text = (site / "speed.html").read_text("utf-8")
    assert f"{record['results']['baselines']['TRL']['ratio_to_packed']:.1f} [" in text
    assert record["environment"]["command"] in text


def test_a_key_without_a_type_that_has_words_is_an_error() -> None:
    with pytest.raises(KeyError):
        loaded("site_hooks").type_text(complex)
    assert Config.model_fields["run"].description
