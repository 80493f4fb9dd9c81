"""Draws the picture of the README's first screen: a tree as one line, and how long one step and one search take.

    python -m benchmarks.overview          # writes docs/pictures/overview.svg from benchmarks/results/

Seconds and ratios are those of the newest records of `benchmarks.train_step` (wall clock) and `benchmarks.collect`. The SVG
brings colours for light and dark with it.
"""

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.harness import results_folder

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "overview.svg"
WIDTH, HEIGHT = 840, 330
# the tree of the README: a prompt, thoughts A and B under it, C under A
NODES = (("p", 3, None), ("a", 2, 0), ("c", 2, 1), ("b", 2, 0))
CELL = 30  # of a token
STYLE = """
svg{--ink:#1c2733;--faint:#5b6773;--line:#8b97a3;--paper:#eef1f4;--win:#00695c;--win-paper:#c8e6e0;--lose:#b04300;
--lose-paper:#ffe0cc;font:13px system-ui,sans-serif}
@media (prefers-color-scheme:dark){svg{--ink:#e8edf2;--faint:#a8b3be;--line:#75818d;--paper:#2b313d;--win:#7fd8c8;
--win-paper:#14514a;--lose:#ffb38a;--lose-paper:#5a2f14}}
text{fill:var(--ink)}.faint{fill:var(--faint)}.title{font-weight:600}
.p{fill:var(--paper);stroke:var(--line)}.a,.c{fill:var(--win-paper);stroke:var(--win)}.b{fill:var(--lose-paper);stroke:var(--lose)}
.none{fill:none;stroke:var(--line);stroke-opacity:.3}.seen{fill:var(--line);fill-opacity:.45;stroke:var(--line);stroke-opacity:.3}
.ours{fill:var(--win)}.theirs{fill:var(--line)}
"""

Bar = tuple[str, float, str]  # contestant, seconds, its ratio in words


def newest(benchmark: str, clock: str = "wall") -> dict[str, Any]:
    """Results of the newest record of a benchmark by a clock.

    Raises:
        ValueError: there is none.
    """
    path = results_folder() / f"{benchmark}.jsonl"
    found = [json.loads(line)["results"] for line in path.read_text().splitlines()]
    of_clock = [results for results in found if results.get("clock") == clock]
    if not of_clock:
        raise ValueError(f"{path} has no record by the {clock} clock; run python -m benchmarks.{benchmark}")
    last: dict[str, Any] = of_clock[-1]
    return last


def step_bars(results: dict[str, Any]) -> list[Bar]:
    """Seconds of one training step: packed, padded rows, TRL."""
    bars: list[Bar] = [("packed", results["packed_median_seconds"], "")]
    for name, title in (("padded", "padded rows"), ("TRL", "TRL DPOTrainer")):
        one = results["baselines"][name]
        bars.append((title, one["total_seconds"], f"{one['ratio_to_packed']:.1f} times"))
    return bars


def search_bars(results: dict[str, Any]) -> list[Bar]:
    """Seconds of one search: ours and what Transformers has."""
    titles = {"ours": "arena engine", "batched": "generate, batched", "sequential": "generate, one by one"}
    seconds = {row["name"]: row["seconds"] for row in results["rows"] if row["name"] in titles}
    ours = seconds["ours"]
    return [
        (title, seconds[name], "" if name == "ours" else f"{seconds[name] / ours:.1f} times")
        for name, title in titles.items()
    ]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words at a baseline."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rounded box."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" class="{kind}"/>'


def line_of_the_tree(x: float, y: float) -> list[str]:
    """The tokens of the tree in one row, and under them which ones each sees."""
    tokens = [(name, node) for node, (name, count, _) in enumerate(NODES) for _ in range(count)]
    paths: list[set[int]] = []
    for node, (_, _, parent) in enumerate(NODES):
        paths.append({node} | (paths[parent] if parent is not None else set()))
    parts = [text(x, y, "A tree is one line: every shared prefix once", "title")]
    top = y + 18
    for place, (name, _) in enumerate(tokens):
        parts.append(rectangle(x + CELL * place + 1, top, CELL - 3, 24, name))
        parts.append(text(x + CELL * place + CELL / 2, top + 16.5, name, anchor="middle"))
    size = 18
    grid, left = top + 46, x + (CELL * len(tokens) - size * len(tokens)) / 2
    for row, (_, node) in enumerate(tokens):
        for column, (_, other) in enumerate(tokens):
            seen = column <= row and other in paths[node]
            parts.append(
                rectangle(left + size * column + 1, grid + size * row, size - 2, size - 2, "seen" if seen else "none")
            )
    below = grid + size * len(tokens) + 22
    parts.append(text(x, below, "token i sees token j  ⇔  j ≤ i < subtree_end[j]", "faint"))
    return parts


def bars_of(x: float, y: float, title: str, bars: Sequence[Bar]) -> list[str]:
    """Bars from one zero, the first ours."""
    longest = max(seconds for _, seconds, _ in bars)
    parts = [text(x, y, title, "title")]
    for place, (name, seconds, ratio) in enumerate(bars):
        row = y + 16 + 30 * place
        length = max(2.0, 190 * seconds / longest)
        parts.append(text(x, row + 15, name))
        parts.append(rectangle(x + 140, row + 2, length, 18, "theirs" if place else "ours"))
        parts.append(text(x + 146 + length, row + 15.5, f"{seconds:.0f} s" + (f", {ratio}" if ratio else ""), "faint"))
    return parts


def draw() -> str:
    """The picture as SVG."""
    step, search = newest("train_step"), newest("collect")
    title = "A tree of tokens as one line, and seconds of a training step and of a search beside TRL and Transformers"
    parts = line_of_the_tree(10, 24)
    x = 350
    parts += bars_of(x, 24, f"One training step, {step['num_pairs']} pairs of one tree", step_bars(step))
    parts.append(
        text(
            x,
            150,
            f"{step['packed_tokens']:,} tokens in place of {step['padded_tokens']:,}; same loss and gradient",
            "faint",
        )
    )
    parts += bars_of(x, 190, f"One search, {search['num_tokens']:,} tokens", search_bars(search))
    parts.append(text(x, 316, "SmolLM2-135M, float32, two CPU cores; ours medians of 3, theirs sampled", "faint"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="overview">'
        f'<title id="overview">{escape(title)}</title><style>{STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> int:
    """Write the picture."""
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
