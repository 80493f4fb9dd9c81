"""Write the question files: `python examples/reasoner/questions.py`, into `questions/` beside this file.

For each variant three searches of 200 questions, 300 for choices (`dev`) and 600 for the comparison (`test`); of the plain
one twice 800 with whose votes alarms are tried. All are of the part that no document has, and no question is in two files.
"""

import json
import random
from pathlib import Path

from corpus import VARIANTS, draw_question, gold

# the file, its number of questions, and the seed that draws them
FILES = {
    "search-0": (200, 100),
    "search-1": (200, 101),
    "search-2": (200, 102),
    "dev": (300, 200),
    "test": (600, 300),
}
VOTES = {"votes": (800, 104), "votes-2": (800, 105)}


def question_files() -> dict[str, str]:
    """The content of each file, by its path from `questions/`."""
    files: dict[str, str] = {}
    for name, variant in VARIANTS.items():
        taken: set[str] = set()
        for file, (num_questions, seed) in (FILES | (VOTES if name == "plain" else {})).items():
            rng, rows = random.Random(seed), []
            while len(rows) < num_questions:
                text = draw_question(rng, variant, evaluation=True)
                if text not in taken:
                    taken.add(text)
                    rows.append({"id": f"{name}-{file}-{len(rows)}", "question": text, "answer": gold(text)})
            files[f"{name}/{file}.jsonl"] = "".join(f"{json.dumps(row)}\n" for row in rows)
    return files


def main() -> None:
    """Write all files."""
    folder = Path(__file__).with_name("questions")
    for path, content in question_files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
