"""A page that holds the search-tree browser alone, under the content-security policy of a report."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import cpo_fast.report.trees

FOLDER = Path(cpo_fast.report.trees.__file__).parent
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src {style}; script-src {script}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Trees</title><style>{css}</style></head>
<body><main><h1>Report</h1><section id="trees">{section}</section></main>
<script type="application/json" id="trees-data">{data}</script><script>{js}</script></body></html>"""
BODY = """
:root { color-scheme: light dark; }
body { margin: 0; padding: 16px; font: 16px/1.5 system-ui, sans-serif; background: #fff; }
@media (prefers-color-scheme: dark) { body { background: #14171b; color: #e6e8eb; } }
"""


def write_page(path: Path, payloads: dict[str, Any]) -> Path:
    """Write the page of some runs, named, and return its path."""
    environment = Environment(loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined)
    css = BODY + (FOLDER / "static" / "trees.css").read_text(encoding="utf-8")
    js = (FOLDER / "static" / "trees.js").read_text(encoding="utf-8")
    runs = {"runs": [{"name": name, "trees": payload} for name, payload in payloads.items()]}
    data = json.dumps(runs, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    section = environment.get_template("trees.html.j2").render()
    page = PAGE.format(style=_hash(css), script=_hash(js), css=css, section=section, data=data, js=js)
    path.write_text(page, encoding="utf-8")
    return path


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
