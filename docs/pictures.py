"""Draws docs/pictures/*.svg: one small search, followed from its tree to the loss.

    python docs/pictures.py

The numbers come from `cpo_kernels` itself. The SVG brings colours for light and dark with it. In the site it is part of the
page and takes the page's (docs/assets/site.css).
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from cpo_kernels import Forest, build_forest

FOLDER = Path(__file__).resolve().parent / "pictures"
WIDTH = 480  # of every picture: readable on a phone, where it shrinks by a quarter

# what each token says, and the node that it belongs to: p prompt, A and C win, B and D lose
NODES = {"p": ["8", "−3", "+4"], "A": ["→5", "+4"], "B": ["→6", "+4"], "C": ["→9", "."], "D": ["→8", "."]}
PAIRS = [("p", "A", "B"), ("pA", "C", "D")]  # prompt, chosen, rejected
KIND = {"p": "paper", "A": "win", "C": "win", "B": "lose", "D": "lose"}

STYLE = """
svg.picture{--ink:#1c2733;--faint:#5b6773;--line:#8b97a3;--paper:#eef1f4;--win:#00695c;--win-paper:#c8e6e0;--lose:#b04300;
--lose-paper:#ffe0cc;font:13px system-ui,sans-serif}
@media (prefers-color-scheme:dark){svg.picture{--ink:#e8edf2;--faint:#a8b3be;--line:#75818d;--paper:#2b313d;--win:#7fd8c8;
--win-paper:#14514a;--lose:#ffb38a;--lose-paper:#5a2f14}}
svg.picture text{fill:var(--ink)}
svg.picture .faint{fill:var(--faint)}
svg.picture .paper{fill:var(--paper);stroke:var(--line)}
svg.picture .win{fill:var(--win-paper);stroke:var(--win)}
svg.picture .lose{fill:var(--lose-paper);stroke:var(--lose)}
svg.picture .again{fill:none;stroke:var(--line);stroke-dasharray:3 2}
svg.picture .none{fill:none;stroke:var(--line);stroke-opacity:.35}
svg.picture .edge{fill:none;stroke:var(--line);stroke-width:1.5}
svg.picture .edge-win{fill:none;stroke:var(--win);stroke-width:2.5}
svg.picture .edge-lose{fill:none;stroke:var(--lose);stroke-width:2.5}
svg.picture .head-win{fill:var(--win)}
svg.picture .number{font:12px ui-monospace,monospace}
"""


def picture(name: str, height: float, title: str, parts: Sequence[str]) -> str:
    """A whole SVG, `title` said by screen readers."""
    return (
        f'<svg class="picture" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-labelledby="picture-{name}"><title id="picture-{name}">{escape(title)}</title><style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    """Words at a baseline."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, words: str = "", number: bool = False) -> str:
    """A rounded box with words in its middle."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{kind}"/>'
    faint = "faint" if kind == "again" else "number" if number else ""
    return shape + (text(x + width / 2, y + height / 2 + 4.5, words, kind=faint) if words else "")


def path(commands: str, kind: str) -> str:
    """A curve."""
    return f'<path d="{commands}" class="{kind}"/>'


def tokens_of(names: str) -> list[tuple[str, int]]:
    """(node, place in it) of every token of some nodes, such as `pA`."""
    return [(name, place) for name in names for place in range(len(NODES[name]))]


def packed() -> tuple[Forest, list[tuple[str, int]]]:
    """The forest of PAIRS, and the token that each of its rows holds."""
    ids = {token: number for number, token in enumerate(tokens_of("pABCD"))}
    by_id = {number: token for token, number in ids.items()}
    names = [prompt + response for prompt, *responses in PAIRS for response in responses]
    forest = build_forest([[ids[token] for token in tokens_of(each)] for each in names])
    return forest, [by_id[number] for number in forest.tokens.tolist()]


def tree() -> str:
    """Two steps of a search: boxes, edges, verdicts."""
    places = {"p": (180, 12), "A": (90, 96), "B": (270, 96), "C": (15, 180), "D": (165, 180)}
    words = {"p": "8 − 3 + 4", "A": "→5 +4", "B": "→6 +4", "C": "→9 .", "D": "→8 ."}
    parts = []
    for parent, child in (("p", "A"), ("p", "B"), ("A", "C"), ("A", "D")):
        (x0, y0), (x1, y1) = places[parent], places[child]
        line = f"M{x0 + 60} {y0 + 34} C{x0 + 60} {y0 + 64} {x1 + 60} {y1 - 30} {x1 + 60} {y1}"
        parts.append(path(line, "edge-win" if KIND[child] == "win" else "edge"))
    for name, (x, y) in places.items():
        parts.append(box(x, y, 120, 34, KIND[name], words[name]))
    for x, y, words_beside, anchor in (
        (312, 34, "question", "start"),
        (82, 118, "A: likely", "end"),
        (398, 118, "B: impossible", "start"),
        (75, 230, "C: likely", "middle"),
        (225, 230, "D: impossible", "middle"),
    ):
        parts.append(text(x, y, words_beside, anchor, "faint"))
    parts += [box(330, 184, 14, 14, "win"), text(352, 196, "winning path", "start")]
    parts += [box(330, 208, 14, 14, "lose"), text(352, 220, "lost beside it", "start")]
    return picture("tree", 244, "A search tree: under the question thoughts A and B, under A thoughts C and D. "
                   "A and C win, B and D lose.", parts)  # fmt: skip


def pairs() -> str:
    """Every pair as two rows, as a trainer of padded rows computes them."""
    parts, seen = [], set()
    num_row_tokens = y = 0
    for number, (prompt, *responses) in enumerate(PAIRS, start=1):
        for response, label in zip(responses, ("chosen", "rejected"), strict=True):
            parts.append(text(112, y + 21, f"pair {number}, {label}", "end", "faint"))
            for place, token in enumerate(tokens_of(prompt + response)):
                is_new = token not in seen
                seen.add(token)
                kind = KIND[token[0]] if is_new else "again"
                parts.append(box(122 + 44 * place, y + 3, 40, 27, kind, NODES[token[0]][token[1]]))
                num_row_tokens += 1
            y += 33
        y += 10
    count = f"{num_row_tokens} tokens in rows, {len(seen)} different ones: dashed ones are computed again"
    parts.append(text(WIDTH / 2, y + 10, count))
    return picture("pairs", y + 22, "Two pairs as four rows. " + count, parts)


CELL, LEFT = 32, 122


def line_of(tokens: Sequence[tuple[str, int]], y: float) -> list[str]:
    """The forest's tokens, side by side."""
    return [
        box(LEFT + CELL * row, y, CELL - 3, 27, KIND[name], NODES[name][place])
        for row, (name, place) in enumerate(tokens)
    ]


def forest() -> str:
    """The forest as one line, and the three numbers of every row."""
    made, tokens = packed()
    rows = {
        "row": range(len(tokens)),
        "position_ids": made.position_ids.tolist(),
        "subtree_end": made.subtree_end.tolist(),
        "parent row": made.parent_row.tolist(),
    }
    parts = [text(112, 22, "token", "end", "faint"), *line_of(tokens, 4)]
    for place, (label, values) in enumerate(rows.items()):
        y = 54 + 22 * place
        parts.append(text(112, y, label, "end", "faint"))
        parts += [text(LEFT + CELL * row + 14, y, str(value), kind="number") for row, value in enumerate(values)]
    return picture("forest", 132, f"The forest as one line of {len(tokens)} rows, with position ids, subtree ends and "
                   "parent rows.", parts)  # fmt: skip


def attention() -> str:
    """Which row sees which: the rule, applied to every pair of rows."""
    made, tokens = packed()
    ends, size, left, top = made.subtree_end.tolist(), 27, 62, 34
    parts = [text(left + size * len(tokens) / 2, 11, "token j, which is seen", kind="faint")]
    parts.append(f'<g transform="rotate(-90 12 {top + size * len(tokens) / 2:g})">')
    parts += [text(12, top + size * len(tokens) / 2 + 4, "token i, which sees", kind="faint"), "</g>"]
    for i, (name, place) in enumerate(tokens):
        parts.append(text(left - 8, top + size * i + 18, NODES[name][place], "end"))
        parts.append(text(left + size * i + 13, top - 7, NODES[name][place]))
        for j, (other, _) in enumerate(tokens):
            kind = KIND[other] if j <= i < ends[j] else "none"
            parts.append(f'<rect x="{left + size * j}" y="{top + size * i}" width="25" height="25" class="{kind}"/>')
    side = left + size * len(tokens) + 12
    for place, words in enumerate(("i sees j", "exactly if", "j ≤ i and", "i < end[j]")):
        parts.append(text(side, top + 20 + 20 * place, words, "start"))
    return picture("attention", top + size * len(tokens) + 8, "A square of rows against rows. A token sees the tokens on "
                   "its own path and no others.", parts)  # fmt: skip


def logprobs() -> str:
    """From which row each scored token is predicted."""
    made, tokens = packed()
    parts: list[str] = []
    for row, (parent, (name, _)) in enumerate(zip(made.parent_row.tolist(), tokens, strict=True)):
        if name == "p":
            continue
        x0, x1 = LEFT + CELL * parent + 14, LEFT + CELL * row + 14
        high = 78 - 7 * (row - parent)
        kind = KIND[name] if row - parent > 1 or tokens[parent][0] != name else ""
        parts.append(path(f"M{x0} 82 C{x0} {high} {x1} {high} {x1} 82", f"edge-{kind}" if kind else "edge"))
    parts += [
        text(112, 104, "token", "end", "faint"),
        *line_of(tokens, 86),
        text(112, 136, "is predicted at", "end", "faint"),
    ]
    for row, (parent, (name, _)) in enumerate(zip(made.parent_row.tolist(), tokens, strict=True)):
        shown = "-" if name == "p" else str(parent)
        parts.append(text(LEFT + CELL * row + 14, 136, shown, kind="number"))
    return picture("logprobs", 148, "The line again, with an arc from the row that predicts a token to the token. Two "
                   "thoughts that continue one state are predicted at the same row.", parts)  # fmt: skip


def loss() -> str:
    """The sigmoid loss over the margin."""
    left, right, top, bottom, reach = 60, 440, 20, 190, 4.0

    def place(margin: float) -> tuple[float, float]:
        value = math.log1p(math.exp(-margin))
        return left + (margin + reach) / (2 * reach) * (right - left), bottom - value / 4.2 * (bottom - top)

    points = [place(-reach + step / 10) for step in range(int(20 * reach) + 1)]
    zero_x, zero_y = place(0)
    curve = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts = [path(f"M{left} {bottom}H{right}M{zero_x:g} {bottom}V{top}", "edge"), path(curve, "edge-win")]
    parts.append(f'<circle cx="{zero_x:.1f}" cy="{zero_y:.1f}" r="4.5" class="head-win"/>')
    parts.append(text(zero_x + 10, zero_y - 8, "before the first step: log 2", "start"))
    parts.append(text((left + zero_x) / 2 - 20, bottom + 19, "rejected ahead", kind="faint"))
    parts.append(text((right + zero_x) / 2 + 10, bottom + 19, "chosen ahead", kind="faint"))
    parts.append(text(zero_x, bottom + 19, "0", kind="number"))
    parts.append(text(zero_x - 8, top + 2, "loss", "end", "faint"))
    parts.append(text(WIDTH / 2, bottom + 42, "margin = β (chosen − its reference) − β (rejected − its reference)"))
    return picture("loss", bottom + 52, "The loss falls as the margin between chosen and rejected grows. It is log 2 "
                   "before the first step.", parts)  # fmt: skip


PICTURES = {each.__name__: each for each in (tree, pairs, forest, attention, logprobs, loss)}


def main() -> None:
    """Write all of them."""
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
