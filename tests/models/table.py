"""`docs/models.md` and the short form in README.md, from a run of every architecture: `python -m tests.models.table`."""

import datetime
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers

from tests.models.matrix import BOUND, IN_FLOAT64, PARTS, Result, Row, run
from tests.models.tiny_configs import UNBUILT, WINDOW, architectures

ROOT = Path(__file__).resolve().parents[2]
DOCS, README = ROOT / "docs" / "models.md", ROOT / "README.md"
BEGIN, END = "<!-- models -->", "<!-- end of models -->"
EQUAL, TRAINING, REFUSED, LEFT_OUT = (
    "Equal in training and in search",
    "Equal in training, refused by a search",
    "Refused",
    "Not run",
)
# the types that most people start from, in the order in which the README names them
KNOWN = (
    "llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3", "gemma4", "phi", "phi3", "phimoe", "olmo3", "olmoe", "smollm3", "granite", "cohere2", "exaone4", "glm4",
    "glm4_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "minicpm3", "minimax_m2", "seed_oss", "starcoder2", "gpt2",
    "gpt_neox", "opt", "deepseek_v32", "deepseek_v4", "llama4", "qwen3_next", "qwen3_5", "minimax", "falcon", "bloom",
    "mpt", "stablelm", "mamba2", "jamba", "lfm2", "nemotron_h", "rwkv",
)  # fmt: skip


def run_all() -> list[Row]:
    """A row for every model type that can be built."""
    return [run(name) for name in architectures() if name not in UNBUILT]


def section(row: Row) -> str:
    """The heading under which a row stands. ValueError for a row with a defect."""
    wrong = {part: result for part, result in row.results.items() if not result.is_right}
    if wrong:
        raise ValueError(f"{row.model_type} has a defect: {wrong}")
    equal = {part for part, result in row.results.items() if result.outcome == "equal"}
    if equal == set(PARTS):
        return EQUAL
    if equal == {"training", "lora"}:
        return TRAINING
    if equal:
        raise ValueError(f"{row.model_type} is equal in {equal} only: the table has no place for it")
    return REFUSED


def document(rows: Sequence[Row]) -> str:
    """Text of `docs/models.md`."""
    by_section: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_section[section(row)].append(row)
    worst = {part: max((row.results[part].error, row.model_type) for row in rows) for part in PARTS}
    versions = f"Transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__}"
    doubled = _types([row for row in rows if row.model_type in IN_FLOAT64])
    text = f"""# Which models are exact

Written by `python -m tests.models.table` on {datetime.date.today()}: {versions}, CPU, float32.
`make test` runs all of it again and fails where an outcome is another.

Each of the {len(rows) + len(UNBUILT)} model types that Transformers maps to a causal language model is built tiny:
two to four layers, one of each kind that the type has, random weights of deviation 0.2, windows of {WINDOW} tokens
where it has them. One forest of eight sequences (prefixes of each other, equal ones, 41 tokens deep) is computed in
training mode without dropout. Figures are the worst relative errors of a line.

* *Training* is equal when values and every gradient are within {BOUND:.0e} of one unpadded forward a sequence through an
  untouched copy. Worst: {_worst(worst["training"])}.
* *LoRA*: likewise under LoRA on every linear layer but the head. Worst: {_worst(worst["lora"])}.
* *Search* is equal when the arena engine writes what `generate` writes greedily, and its log-probs are within
  {BOUND:.0e} of a forward without a cache. Worst: {_worst(worst["search"])}.

Compared in float64 in training and LoRA: {doubled}.
In float32 the stock gradients of these random models are themselves 1e-5 (Gemma 4, which does not scale its scores down)
to 3e-4 (Gemma 3n) from those in float64, and packed ones no further.

Triton kernels on a GPU have their own tests. `make soak` repeats this with other weights and windows, and in bfloat16.
What `prepare(model)` says of a model counts, whatever stands here.

## {EQUAL}

| attention and logits | model types | training | LoRA | search |
|---|---|---|---|---|
"""
    for name, group in _by_features(by_section[EQUAL]):
        errors = " | ".join(f"{max(row.results[part].error for row in group):.0e}" for part in PARTS)
        text += f"| {name} | {_types(group)} | {errors} |\n"
    conditions = [(row, result) for row in rows for result in _conditions(row)]
    if conditions:
        text += "\nWith a condition:\n\n| model types | what is equal | beyond that |\n|---|---|---|\n"
        found: dict[tuple[str, str], list[tuple[Row, str]]] = defaultdict(list)
        for row, (part, result) in conditions:
            found[f"{part}, {result.only}", _cause(result.text, row)].append((row, result.text))
        for (what, _), pairs in found.items():
            text += f"| {_types([row for row, _ in pairs])} | {what} | {_escaped(pairs[0][1])} |\n"
    for title, part in ((TRAINING, "search"), (REFUSED, "training")):
        text += f"\n## {title}\n\n| model types | the sentence, of the first |\n|---|---|\n"
        causes: dict[str, list[Row]] = defaultdict(list)
        for row in by_section[title]:
            causes[_cause(row.results[part].text, row)].append(row)
        for group in sorted(causes.values(), key=lambda group: (-len(group), group[0].model_type)):
            text += f"| {_types(group)} | {_escaped(group[0].results[part].text)} |\n"
    text += f"\n## {LEFT_OUT}\n\n| model types | why |\n|---|---|\n"
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in UNBUILT.items():
        reasons[reason].append(f"`{name}`")
    return text + "".join(f"| {' '.join(names)} | {_escaped(reason)} |\n" for reason, names in reasons.items())


def outcomes(text: str) -> dict[str, str]:
    """The heading of each model type in `docs/models.md`, with what is said of it under a condition."""
    found: dict[str, str] = {}
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        for line in body.splitlines():
            cells = line.split(" | ")
            column = next((cell for cell in cells[:2] if cell.strip("| ").startswith("`")), "")
            for name in re.findall(r"`(\S+)`", column):
                found[name] = f"{found[name]}; {cells[1]}" if name in found else title
    return found


def short_form(rows: Sequence[Row]) -> str:
    """The block of README.md, its marks included."""
    names: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        names[section(row)].append(row.model_type)
    head = f"of {len(rows) + len(UNBUILT)} model types of Transformers {transformers.__version__}"
    text = f"{BEGIN}\n| {head} | | such as |\n|---|---|---|\n"
    for title in (EQUAL, TRAINING, REFUSED):
        known = " ".join(f"`{name}`" for name in KNOWN if name in names[title])
        if names[title]:
            text += (
                f"| {title.lower()}{' in a sentence' if title == REFUSED else ''} | {len(names[title])} | {known} |\n"
            )
    return f"{text}| not run, as it cannot be built here | {len(UNBUILT)} | |\n{END}"


def written_for() -> str:
    """The Transformers release that `docs/models.md` is about, empty where there is no such file."""
    found = re.search(r"Transformers (\S+), PEFT", DOCS.read_text(encoding="utf-8") if DOCS.exists() else "")
    return found[1] if found else ""


def _by_features(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.features].append(row)
    ordered = sorted(groups.items(), key=lambda item: (len(item[0]), -len(item[1])))
    return [(", ".join(names) or "as Llama's", group) for names, group in ordered]


def _conditions(row: Row) -> list[tuple[str, Result]]:
    """Parts that are equal under a condition; LoRA where it says more than training."""
    found = [(part, row.results[part]) for part in ("training", "search") if row.results[part].only]
    return found


def _cause(sentence: str, row: Row) -> str:
    """A refusal without the names and figures of one model, so that those of one cause stand together."""
    bare = re.sub(r"\([A-Za-z]\w*\)|\b\w+\.[\w.]*\w|\b[A-Z]\w*(For|LM)\w+", "#", sentence)
    return re.sub(r"\d[\d.e+-]*", "#", re.sub(r"\b[A-Z]\w+Attention\b", "#", bare))


def _types(rows: Sequence[Row]) -> str:
    return " ".join(f"`{row.model_type}`" for row in rows)


def _worst(found: tuple[float, str]) -> str:
    return f"{found[0]:.1e} (`{found[1]}`)"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write both."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for name in architectures():
        if name not in UNBUILT:
            rows.append(run(name))
            sys.stderr.write(
                f"{name}: {', '.join(f'{part} {each.outcome}' for part, each in rows[-1].results.items())}\n"
            )
    DOCS.write_text(document(rows), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    README.write_text(before + short_form(rows) + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
