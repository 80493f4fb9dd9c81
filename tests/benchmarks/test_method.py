"""The table of the method: its plan can be run, its questions are apart, its statistics are right."""

import json
from pathlib import Path

import pytest

from benchmarks.method import once, places, settings
from benchmarks.method_plan import HARD, PLAIN, PLAN, SEEDS
from benchmarks.method_table import (
    DOCUMENT,
    RESULTS,
    against_base,
    documented,
    holm,
    in_place,
    latest,
    repeated,
    report,
    summary,
)
from cpo_fast.config import validate_config

PARTS = [*(f"search-{seed}" for seed in SEEDS), "dev", "test"]


def texts(variant, part):
    return [json.loads(line)["question"] for line in variant.questions(part).read_text().splitlines()]


@pytest.mark.parametrize("variant", [PLAIN, HARD], ids=lambda variant: variant.name)
def test_no_question_stands_in_two_parts(variant):
    parts = {part: texts(variant, part) for part in PARTS}
    assert [len(found) for found in parts.values()] == [200, 200, 200, 300, 600]
    together = [text for found in parts.values() for text in found]
    assert len(set(together)) == len(together)


def test_every_cell_is_a_valid_configuration_and_none_reads_gold_before_it_is_asked(tmp_path):
    for place in places():
        base, cell = place.base, place.cell
        config = validate_config(settings(base, place.seed, base.variant, tmp_path, cell.settings))
        assert base.path.is_dir()
        last = config.train.stop_on == "held_out_loss" and config.data.held_out == 0  # the last step's adapter is taken
        assert last or config.train.stop_on == "agreement"
        for one in cell.searches:
            assert one.variant.questions(f"search-{place.seed}").is_file()
            validate_config(settings(base, place.seed, one.variant, tmp_path, {"search": one.settings}))
    # by identity: two workers would make one that stands twice at the same time, in one folder
    searches = {one for place in places() for one in place.cell.searches}
    assert len({(one.variant.name, one.name) for one in searches}) == len(searches)
    names = [place.name for place in places()]
    assert len(set(names)) == len(names)


def test_only_chooses_cells_by_their_name():
    assert [place.name for place in places("base-1/2/CPO lowest")] == ["base-1/2/CPO lowest"]
    assert {place.base.name for place in places("hard-0/")} == {PLAN[2].name}


def test_what_is_finished_is_made_again_only_with_other_settings(tmp_path: Path):
    calls = []

    def make():
        calls.append(1)
        return {"count": len(calls)}

    folder = tmp_path / "cell"
    assert [once(folder, {"rate": rate}, make)["count"] for rate in (1, 1, 2, 2, 1)] == [1, 1, 2, 2, 3]


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 4 x .005, 3 x .01, 2 x .03
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def record(cell, right, seed=0):
    return {
        "base": "b", "seed": seed, "group": "main", "cell": cell, "variant": "plain", "part": "test", "training": {},
        "num_questions": len(right), "num_correct": right.count("1"), "right": right, "tokens": 3.0, "seconds": 0.01,
        "total_seconds": 1.0,
    }  # fmt: skip


def test_the_newest_record_of_a_cell_counts(tmp_path: Path):
    path = tmp_path / "method.jsonl"
    runs = [[record("base", "01"), record("SFT", "00")], [record("SFT", "11")]]
    path.write_text("".join(json.dumps({"results": {"cells": cells}}) + "\n" for cells in runs))
    assert [(one["cell"], one["right"]) for one in latest(path)] == [("base", "01"), ("SFT", "11")]


def test_only_the_primary_comparison_is_left_uncorrected():
    base, better = "0" * 10 + "1" * 10, "1" * 19 + "0"
    records = [record("base", base), record("CPO all", better), record("SFT", better), record("FPO", base)]
    found = against_base(records)
    assert [found[place][:2] for place in (1, 2, 3)] == [(1, 10), (1, 10), (0, 0)]
    raw = 2 * (1 + 11) / 2**11  # of 11 questions that differ, at most one lost
    assert [found[place][2] for place in (1, 2, 3)] == pytest.approx([raw, 2 * raw, 1.0])
    assert "+10/-1" in report(records)
    assert f"| CPO all | 95.0% | 95.0% | +10 -1 | {raw:.0e} |  |  | 3 | 10 |" in summary(records)


def test_a_row_that_comes_out_otherwise_is_named():
    recorded = [record("base", "01"), record("SFT", "11")]
    assert repeated(recorded, recorded) == "2 of 2 recorded rows came out the same, question by question\n"
    again = [record("base", "01"), record("SFT", "10"), record("CPO all", "10")]
    assert repeated(again, recorded).startswith("1 of 2 recorded rows came out the same")
    assert "b/0/SFT asked plain" in repeated(again, recorded)


def test_the_document_shows_the_tables_of_the_results():
    text = DOCUMENT.read_text()
    assert in_place(text, documented(RESULTS)) == text
    with pytest.raises(ValueError, match="0 places for the table 'another'"):
        in_place(text, {"another": ""})
