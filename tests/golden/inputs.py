"""Everything that the golden runs read: models, adapter, questions of every family, and preference data of other hands."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.golden.tiny_models import save_adapter, save_babbler, save_talker

SVAMP = [
    {"ID": "s-1", "Body": "Ann has 3 pears.", "Question": "How many pears are 3 + 4?", "Answer": 7.0},
    {"ID": "s-2", "Body": "Bob had 5 figs and ate 3.", "Question": "How many are left?", "Answer": 2},
    {"ID": "s-3", "Body": "A box holds 12 eggs.", "Question": "How many eggs are in 1 box?", "Answer": "12"},
]
GSM8K = [
    {"question": "Two and five?", "answer": "2 + 5 = 7\n#### 7"},
    {"question": "Two and five?", "answer": "2 + 5 = 7\n#### 7"},
    {"question": "Nine less eight?", "answer": "9 - 8 = 1\n#### 1"},
]
HOTPOTQA = [
    {"_id": "h-1", "question": "Which river passes the city of the oldest bridge?", "answer": "The Rhine"},
    {"_id": "h-2", "question": "Is Paris larger than the town where Ann was born?", "answer": "yes"},
    {"_id": "h-3", "question": "Which town is on it?", "answer": "Paris"},
]
BAMBOOGLE = 'Question,Answer\n"Who was first, Ann, or Bob?",Paris\nWhere does it end?,the Rhine\n'
FEVER = [
    {"id": 11, "label": "SUPPORTS", "claim": "The Rhine passes Paris.", "evidence": []},
    {"id": 12, "label": "REFUTES", "claim": "Ann was never born.", "evidence": []},
    {"id": 13, "claim": "Nobody knows Bob."},
]
VITAMINC = [
    {"unique_id": "v-1", "case_id": "c", "label": "SUPPORTS", "claim": "Eggs are round.", "evidence": "one"},
    {"unique_id": "v-2", "case_id": "c", "label": "NOT ENOUGH INFO", "claim": "Eggs are round.", "evidence": "two"},
]
PLAIN = [{"question": "and why not"}, {"id": "long", "question": "why " * 1500}, {"id": "é/ü", "question": "Où?"}]

TEXT_PAIRS: list[dict[str, Any]] = [
    {"prompt": "Question: a + b?\n", "chosen": "Answer: 7\n", "rejected": "Answer: 2\n"},
    {"prompt": "Question: a + b?\n", "chosen": "Answer: 7\n", "rejected": "Step 1\n", "tree": "named", "step": 2},
    {"prompt": "Claim: so?", "chosen": "\nAnswer: SUPPORTS", "rejected": "\nAnswer: REFUTES"},
    {"prompt": "Claim: so?\n", "chosen": "\nAnswer: yes", "rejected": "Answer: no"},  # merges with the prompt's end
    {"prompt": "Question: x?\n", "chosen": "Step 1\nAnswer: 1\n", "rejected": "Answer: 1\n"},
    {"prompt": "Question: x?\n", "chosen": "Step 1\nAnswer: 1\n", "rejected": "Answer: 1\n"},  # twice
    {"prompt": "Question: y?\n", "chosen": " ", "rejected": "Answer: 1\n"},  # empty
    {"prompt": "Question: z?\n", "chosen": "Answer: 1\n"},  # half
]
SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}
CONVERSATIONS: list[dict[str, Any]] = [
    {"prompt": [ASKED], "chosen": [_said], "rejected": [{"role": "assistant", "content": f"Answer: {wrong}"}]}
    for _said in ({"role": "assistant", "content": "Answer: 2"}, {"role": "assistant", "content": "Step 1\nAnswer: 2"})
    for wrong in ("1", "7", "no")
] + [
    {
        "prompt": [SYSTEM, ASKED, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}],
        "chosen": [{"role": "assistant", "content": " yes"}],
        "rejected": [{"role": "assistant", "content": " no"}, ASKED, {"role": "assistant", "content": "7"}],
    }
]
IMPLICIT = [
    {"chosen": f"Question: {name}?\nAnswer: 1 yes", "rejected": f"Question: {name}?\nAnswer: 1 no"} for name in "abcdef"
]
COMPLETIONS = [
    {"prompt": f"Question: {name}?\n", "completion": f"Step {number}\nAnswer: {number}\n"}
    for number, name in enumerate("abcdef")
]

_FIRST = "step 1, ann has 3 pears. "
_SECOND = f"{_FIRST}step 2, 3 + 4 = 7. "
_NUMBER = "step 3, the answer (arabic numerals) is "
OFFICIAL = {
    "Ann has 3 pears.How many pears are 3 + 4?": {
        "0": {"candiate": [_FIRST, "step 1, x. "], "values": [5, 1.004]},
        "1": {"candiate": [_SECOND], "values": [5]},
        "2": {
            "candiate": [f"{_SECOND}{_NUMBER}7. ", f"{_SECOND}{_NUMBER}7.0", f"{_SECOND}{_NUMBER}1,912"],
            "values": [5, 2.003, 1.004],
        },
        "correct": [f"{_SECOND}{_NUMBER}7. "],
    }
}


def write_inputs(folder: Path) -> None:
    """Write every input into `folder`, which must not hold them yet."""
    folder.mkdir(parents=True)
    save_talker(folder / "talker")
    save_babbler(folder / "babbler")
    save_adapter(folder / "talker", folder / "adapter")
    for name, rows in (("svamp.json", SVAMP), ("hotpotqa.json", HOTPOTQA)):
        (folder / name).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "bamboogle.csv").write_text(BAMBOOGLE, encoding="utf-8")
    _write_lines(folder / "gsm8k.jsonl", GSM8K)
    _write_lines(folder / "fever.jsonl", FEVER)
    _write_lines(folder / "vitaminc.jsonl", VITAMINC)
    _write_lines(folder / "plain.jsonl", PLAIN)
    _write_lines(folder / "text-pairs.jsonl", TEXT_PAIRS)
    _write_lines(folder / "conversations.jsonl", CONVERSATIONS)
    _write_lines(folder / "implicit.jsonl", IMPLICIT)
    _write_lines(folder / "completions.jsonl", COMPLETIONS)
    (folder / "official.json").write_text(json.dumps(OFFICIAL, indent=1) + ",\n", encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
