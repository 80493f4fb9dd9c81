"""What was answered before a kill is not asked again, and a search that is given it grows the same tree, bit for bit."""

import json
import math
from pathlib import Path

import pytest

from cpo_fast.search.answer_cache import AnswerFiles, item_digest
from cpo_fast.search.engine import Requests, Sample, SampleRequest, ScoreRequest
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from cpo_fast.search.tree_store import Provenance
from tests.search.engine_cases import (
    TOKENIZER,
    engine_config,
    forked_prompts,
    sampled,
    small_model,
    two_level_searches,
)

PROVENANCE = Provenance("svamp", "prompt", "model", "", 0, "config")
REQUEST = SampleRequest((1, 2, 3), "0/q/thought/digest/0", 0.9, 1.0, 12)
SCORING = ScoreRequest((1, 2, 3), ((4,), (5, 6)))
SAMPLE = Sample((7, 8), "a\ud800 \u2028b\n", "newline", (-0.1, -2.0 / 3))


class Remembered:
    """A cache of the first so many answers of an earlier run."""

    def __init__(self, known=()):
        self.known = dict(known)
        self.noted = []

    def get(self, name, item):
        return self.known.get((name, item_digest(item)))

    def put(self, name, item, answer):
        self.noted.append(((name, item_digest(item)), answer))


def engine(kind):
    if kind == "hf":
        return HuggingFaceEngine(small_model(), TOKENIZER, 16)
    return ArenaEngine(small_model(), TOKENIZER, engine_config(arena_tokens=900, questions_in_flight=2))


def outcome(kind, memory, prompts, few_shot):
    arena = engine(kind)
    arena.cache_prefix(few_shot)
    return {name: result for name, result, _ in arena.run(two_level_searches(prompts), memory)}


@pytest.mark.parametrize("kind", ["arena", "hf"])
def test_a_run_that_knows_some_answers_gives_the_bits_of_one_that_knows_none(kind):
    few_shot, prompts = forked_prompts(11, num_groups=2)
    first = Remembered()
    expected = outcome(kind, first, prompts, few_shot)
    total = len(first.noted)
    assert total > 40
    for count in (1, total // 3, total // 2, 2 * total // 3, total - 1, total):
        memory = Remembered(first.noted[:count])
        assert outcome(kind, memory, prompts, few_shot) == expected
        assert len(memory.noted) == total - len(memory.known)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_subset_of_the_answers_may_be_known(seed):
    few_shot, prompts = forked_prompts(seed)
    first = Remembered()
    expected = outcome("arena", first, prompts, few_shot)
    for part in range(3):
        memory = Remembered(first.noted[part::3])
        assert outcome("arena", memory, prompts, few_shot) == expected


def test_a_state_that_branches_off_in_the_middle_of_a_known_one_is_laid_out_as_it_was():
    """As a depth-first search asks: siblings one after another, which share more tokens than their parent has."""
    few_shot, prompts = forked_prompts(1, num_groups=1)
    stem = prompts[0] + tuple(range(20, 44))
    states = [stem + tuple(range(first, first + 9)) for first in (10, 30, 50)]

    def search():
        found = []
        for state in states:
            found.extend((yield Requests(tuple(sampled([state], copies=4)), keep=True)))
        return found

    def run(memory):
        arena = engine("arena")
        arena.cache_prefix(few_shot)
        ((_, samples, _),) = arena.run([("q", search())], memory)
        return samples

    first = Remembered()
    expected = run(first)
    for count in (2, 4, 7, 8):
        assert run(Remembered(first.noted[:count])) == expected


def test_answers_come_back_as_they_were(tmp_path: Path):
    log = AnswerFiles(tmp_path / "answers", PROVENANCE)
    assert log.get("q\ud800/1", REQUEST) is None
    log.put("q\ud800/1", REQUEST, SAMPLE)
    log.put("q\ud800/1", SCORING, [-1.25, -1e-17])
    log.put("other", REQUEST, SAMPLE)
    log.close()
    again = AnswerFiles(tmp_path / "answers", PROVENANCE)
    assert again.get("q\ud800/1", REQUEST) == SAMPLE
    assert again.get("q\ud800/1", SCORING) == [-1.25, -1e-17]
    assert again.get("other", SCORING) is None
    again.put("other", SCORING, [0.0, 1.0])  # appended to what is there
    again.close()
    assert AnswerFiles(tmp_path / "answers", PROVENANCE).get("other", REQUEST) == SAMPLE


def test_half_a_line_is_cut_and_what_follows_is_read(tmp_path: Path):
    log = AnswerFiles(tmp_path, PROVENANCE)
    log.put("q", REQUEST, SAMPLE)
    log.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b'{"item":"torn')
    log = AnswerFiles(tmp_path, PROVENANCE)
    assert log.get("q", REQUEST) == SAMPLE
    log.put("q", SCORING, [1.0])
    log.close()
    log = AnswerFiles(tmp_path, PROVENANCE)
    assert (log.get("q", REQUEST), log.get("q", SCORING)) == (SAMPLE, [1.0])


@pytest.mark.parametrize(
    "content", [b"", b"no json\n", b'{"provenance":{}}\n', b"[1]\n", b'{"item":"x"}\n', b"\xff\xfe\n"]
)
def test_what_cannot_be_read_is_asked_again(tmp_path: Path, content: bytes):
    log = AnswerFiles(tmp_path, PROVENANCE)
    log.put("q", REQUEST, SAMPLE)
    log.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    log = AnswerFiles(tmp_path, PROVENANCE)
    assert log.get("q", REQUEST) is None
    log.put("q", SCORING, [1.0])
    log.close()
    assert AnswerFiles(tmp_path, PROVENANCE).get("q", SCORING) == [1.0]


@pytest.mark.parametrize(
    "row",
    [
        {"answer": [1.0]},  # as they were written before
        {"logps": "xy"},
        {"logps": "00"},
        {"logps": 3},
        {"logps": "0" * 16, "ids": "01", "text": "a", "stop": "eos"},
        {"logps": "0" * 16, "ids": "0" * 16, "stop": "eos"},
    ],
    ids=str,
)
def test_a_damaged_answer_is_asked_again(tmp_path: Path, row: dict):
    log = AnswerFiles(tmp_path, PROVENANCE)
    log.put("q", REQUEST, SAMPLE)
    log.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + json.dumps({"item": item_digest(SCORING), **row}).encode() + b"\n")
    log = AnswerFiles(tmp_path, PROVENANCE)
    assert (log.get("q", REQUEST), log.get("q", SCORING)) == (None, None)
    log.put("q", SCORING, [1.0])
    log.close()
    assert AnswerFiles(tmp_path, PROVENANCE).get("q", SCORING) == [1.0]


def test_answers_of_another_search_are_forgotten(tmp_path: Path):
    log = AnswerFiles(tmp_path, PROVENANCE)
    log.put("q", REQUEST, SAMPLE)
    log.close()
    changed = Provenance("svamp", "prompt", "model", "adapter", 0, "config")
    assert AnswerFiles(tmp_path, changed).get("q", REQUEST) is None
    assert AnswerFiles(tmp_path, PROVENANCE).get("q", REQUEST) == SAMPLE


def test_nothing_is_left_once_the_trees_are_on_disk(tmp_path: Path):
    log = AnswerFiles(tmp_path / "answers", PROVENANCE)
    for name in ("a", "b"):
        log.put(name, REQUEST, SAMPLE)
    log.discard(["a"])
    assert len(list((tmp_path / "answers").iterdir())) == 1
    log.discard(["b", "never asked"])
    assert not (tmp_path / "answers").exists()


def test_an_infinite_log_prob_is_kept(tmp_path: Path):
    log = AnswerFiles(tmp_path, PROVENANCE)
    log.put("q", SCORING, [-math.inf, 0.0])
    log.put("q", REQUEST, SAMPLE)
    log.close()
    log = AnswerFiles(tmp_path, PROVENANCE)
    assert (log.get("q", SCORING), log.get("q", REQUEST)) == ([-math.inf, 0.0], SAMPLE)


@pytest.mark.parametrize(
    "other",
    [
        SampleRequest((1, 2, 4), REQUEST.uid, 0.9, 1.0, 12),
        SampleRequest((1, 2, 3), "0/q/thought/digest/1", 0.9, 1.0, 12),
        SampleRequest((1, 2, 3), REQUEST.uid, 0.8, 1.0, 12),
        SampleRequest((1, 2, 3), REQUEST.uid, 0.9, 0.9, 12),
        SampleRequest((1, 2, 3), REQUEST.uid, 0.9, 1.0, 13),
        SampleRequest((1, 2, 3), REQUEST.uid, 0.9, 1.0, 12, top_k=5),
        SampleRequest((1, 2, 3), REQUEST.uid, 0.9, 1.0, 12, repetition_penalty=1.1),
        SCORING,
        ScoreRequest((1, 2, 3), ((4, 5), (6,))),
    ],
)
def test_an_answer_is_given_to_its_own_item_only(other):
    assert item_digest(other) != item_digest(REQUEST)
    assert other is SCORING or item_digest(other) != item_digest(SCORING)
