"""Import the raw tree file of the CPO paper's own program into `trees.jsonl`: pairs and training then need no search.

`reader` reads the file and `nodes` makes nodes. Here questions get their ids, lines their token ids, and everything its
place on disk:

    run/trees.jsonl, run/prompts/<hash>.json    as a search writes them, in the order of the file
    run/import-dropped.jsonl                    one line for each entry and each candidate that was left out, with reason

The few-shot prompt is this task's own. Token ids are those of the configured model's tokenizer, because the file holds
text only. Values are the program's (a sum of verdicts).
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpo_fast.config import Config, keep_config
from cpo_fast.errors import ConfigError, DataError, first_line, require_library
from cpo_fast.files import canonical_json, short_hash, write_jsonl
from cpo_fast.official.nodes import build_nodes
from cpo_fast.official.reader import BadEntry, Entry, read_official
from cpo_fast.search.search_settings import KEPT
from cpo_fast.search.tree_store import Provenance, open_trees
from cpo_fast.tasks import Prompts, Question, common_prefix_length, load_questions, load_task
from cpo_fast.tree import SearchTree, Status


@dataclass(frozen=True)
class ImportResult:
    """What an import did.

    Attributes:
        trees_path, dropped_path: the files written.
        num_entries: searches in the file, damaged parts included, of which num_trees became trees.
        statuses: how many trees per status. num_winning_paths: over all of them.
        num_candidates: chains in those trees' entries. num_thoughts: nodes, duplicates merged.
        num_lost_winners: recorded winners that are no complete node here.
        dropped_entries, dropped_candidates: how many were left out, by reason.
    """

    trees_path: str
    dropped_path: str
    num_entries: int
    num_trees: int
    statuses: dict[str, int]
    num_candidates: int
    num_thoughts: int
    num_winning_paths: int
    num_lost_winners: int
    dropped_entries: dict[str, int]
    dropped_candidates: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_official(config: Config, path: str | Path, tokenizer: Any = None) -> ImportResult:
    """Write the trees of a raw tree file into `config.run`.

    Args:
        config: `run`, `seed`, `model`, `task` and `data.max_drop` are used. With `task.path` set, entries are matched
            to its questions (whitespace aside) and take their ids and reference answers. Without it an id is a hash.
        tokenizer: already loaded. None loads that of `config.model`.

    Raises:
        ConfigError: no model is configured, or its tokenizer cannot be loaded.
        DataError: the file is not readable, no entry is usable, more than `data.max_drop` of them are not, or
            `run/trees.jsonl` holds other trees.
    """
    from cpo_fast.models import model_hash

    task = load_task(config)
    known = {_squeezed(one.text): one for one in load_questions(config)[1]} if config.task.path else None
    parts = list(read_official(path))
    if tokenizer is None:
        tokenizer = _load_tokenizer(config.model.path)
    # this task's few-shot prompt, not the program's: what is trained is what will be asked
    prompts = Prompts(task, tokenizer, config.task.chat)
    # the file stands for the settings of a search: another file does not continue these trees
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    settings = canonical_json({"imported": digest, "chat": config.task.chat})
    # the model that searched, its seed and its token counts are not in the file: these are of the import
    provenance = Provenance(
        task=task.name,
        prompt_hash=prompts.shared.hash,
        model_hash=model_hash(config.model.path),
        adapter_hash="",
        seed=config.seed,
        config_hash=short_hash(settings),
    )
    trees: dict[str, SearchTree] = {}
    dropped: list[dict[str, Any]] = []
    num_candidates = num_lost_winners = 0
    for part in parts:
        question = _question(part, known, trees)
        if isinstance(question, BadEntry):
            dropped.append({"what": "entry", "place": question.place, "reason": question.reason})
            continue
        assert isinstance(part, Entry)
        root_ids = prompts.encode(question)
        try:
            nodes, winners, lost, num_lost = build_nodes(part, task, _line_tokenizer(prompts, question))
        except ValueError as error:
            dropped.append({"what": "entry", "place": part.place, "reason": str(error)})
            continue
        dropped += [{"what": "candidate", "place": part.place, **asdict(candidate)} for candidate in lost]
        num_candidates += sum(len(level.candidates) for level in part.levels)
        num_lost_winners += num_lost
        status: Status = "ok" if winners else "no_answer" if nodes else "no_candidates"
        num_shared_tokens = common_prefix_length(prompts.shared.token_ids, root_ids)
        trees[question.id] = SearchTree(
            id=question.id,
            question=question.text,
            question_prompt=prompts.question_part(question),
            gold=question.gold,
            num_shared_tokens=num_shared_tokens,
            question_token_ids=tuple(root_ids[num_shared_tokens:]),
            nodes=tuple(nodes),
            winning_nodes=tuple(winners),
            answer=nodes[winners[0]].answer if winners else None,
            num_empty=0,
            status=status,
            detail=f"imported from line {part.place.rpartition(':')[2]}",
            **asdict(provenance),
        )
    trees_path, dropped_path = Path(config.run) / "trees.jsonl", Path(config.run) / "import-dropped.jsonl"
    write_jsonl(dropped_path, dropped)  # before the refusal below, which names it
    entries = [row for row in dropped if row["what"] == "entry"]
    _check_drop_rate(path, dropped_path, len(parts), entries, config.data.max_drop)
    questions = [Question(tree.id, tree.question) for tree in trees.values()]
    with open_trees(trees_path, provenance, questions):  # refuses a file that another search or import wrote
        prompts.shared.save(trees_path)
        write_jsonl(trees_path, (tree.to_dict() for tree in trees.values()))
        keep_config(trees_path.with_name(KEPT), config)
    return ImportResult(
        trees_path=str(trees_path),
        dropped_path=str(dropped_path),
        num_entries=len(parts),
        num_trees=len(trees),
        statuses=dict(Counter(tree.status for tree in trees.values())),
        num_candidates=num_candidates,
        num_thoughts=sum(len(tree.nodes) for tree in trees.values()),
        num_winning_paths=sum(len(tree.winning_nodes) for tree in trees.values()),
        num_lost_winners=num_lost_winners,
        dropped_entries=dict(Counter(row["reason"] for row in entries)),
        dropped_candidates=dict(Counter(row["reason"] for row in dropped if row["what"] == "candidate")),
    )


def _question(
    part: Entry | BadEntry, known: dict[str, Question] | None, trees: dict[str, SearchTree]
) -> Question | BadEntry:
    if isinstance(part, BadEntry):
        return part
    text = " ".join(part.question.split())
    if known is None:
        question = Question(short_hash(text), text)
    elif (found := known.get(_squeezed(text))) is not None:
        question = found
    else:
        return BadEntry(part.place, "question is not in task.path")
    if question.id in trees:
        return BadEntry(part.place, "question was searched before")
    return question


def _squeezed(text: str) -> str:
    # the program joined SVAMP's two fields without a blank
    return "".join(text.split())


def _line_tokenizer(prompts: Prompts, question: Question) -> Callable[[str, str], list[int]]:
    """What gives the tokens of a line after the lines before it. ValueError where they do not separate."""

    def tokenize(before: str, line: str) -> list[int]:
        context, whole = prompts.encode(question, before), prompts.encode(question, before + line)
        if whole[: len(context)] != context or len(whole) == len(context):
            raise ValueError("tokens of two lines merge")
        return whole[len(context) :]

    return tokenize


def _check_drop_rate(
    path: str | Path, dropped_path: Path, num_entries: int, dropped: list[dict[str, Any]], max_drop: float
) -> None:
    if not num_entries:
        raise DataError(f"{path}: holds no search; give the file that the program's --data_json_file named")
    if len(dropped) == num_entries or len(dropped) / num_entries > max_drop:
        first = dropped[0]
        raise DataError(
            f"{path}: {len(dropped)} of {num_entries} entries cannot be imported, more than data.max_drop = {max_drop} "
            f"allows; the first is {first['place']} ({first['reason']}), all are in {dropped_path}"
        )


def _load_tokenizer(path: str) -> Any:
    from cpo_fast.models import model_folder

    folder = model_folder(path)
    transformers = require_library("transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model.path: the tokenizer in {path} cannot be loaded ({first_line(error)})") from error
