"""Texts that attack a page, and a tree of a search that is made of them."""

from pathlib import Path

from cpo_fast.tree import SearchTree
from tests.data.hand_made import node, tree, write_trees

TEXTS = {
    "element": "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>",
    "end of script": "</script><script>window.hacked = 3</script>",
    "comment": "<!--<script> ]]> </textarea></title></style>",
    "template": "{{7*7}} {% raw %} ${7*7} #{7*7}",
    "terminal": "\x1b[31mred\x1b[0m\x07",
    "right to left": "שלום \u202eevil\u202c \u2066isolate\u2069 \u200fmark",
    "nothing": "a\u200b\u200b\u200bb\ufeffc\u00add\u2060e\u3164f",
    "null": "one\x00two",
    "half a pair": "high \ud83d low \udc00 end",
    "lines": "one\rtwo\u2028three\u2029four\u0085five\tsix",
    "marks": "Z" + "\u0351" * 60,
    "entity": "&lt;b&gt; &amp;amp; &#x3c;",
    "long": "long " + "x" * 100_000,
    "long and invisible": "\u202e\u200b" * 2_000,
}


def hostile_tree() -> SearchTree:
    """A tree whose thoughts are `TEXTS`, one each: the first wins, the others lose to it."""
    thoughts = [
        node(place, -1, 1, text=text + "\n", value=float(len(TEXTS) - place), kept=place < 3, logps=(-0.5, -0.25))
        for place, text in enumerate(TEXTS.values())
    ]
    last = node(len(thoughts), 0, 2, "</script>", text="Answer: 4\n", logps=(-1.0, -0.5))
    evil = "<script>window.hacked = 4</script>\u202e{{7*7}}\x00"
    return tree([*thoughts, last], (last.id,), evil, question=evil, answer=evil, detail=evil, gold="SECRET GOLD")


def write_hostile(folder: Path) -> Path:
    """A run of the hostile tree, and one more that failed; returns the run's folder."""
    failed = tree([], (), "failed", question="Why?", status="failed", detail="ValueError: \x1b[1m<b>no</b>")
    write_trees(folder / "trees.jsonl", [hostile_tree(), failed])
    return folder
