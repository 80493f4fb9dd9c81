"""The documents say what was measured, and a document that says another thing is told so in a sentence."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import numbers
from benchmarks.claim import Claim, Logged, Recorded, exactly, here, ratio
from benchmarks.number_claims import CLAIMS, EXEMPT

COMMAND = "python -m benchmarks.step"
README = """# A project

One step is 14.7 times
faster [12.1, 17.3], from 28,472 tokens. Moved by 7.6e-2 within 95 % intervals.

| | tokens | seconds |
|---|---|---|
| packed | 1,644 | 11.3 |
"""
LOG = "# Log\n\n## 2026-11-20: later\n\n## 2026-11-19: exactness\n\nParameters moved\nby 7.6e-2, and 2,014 MiB.\n"


def record(ratio_: float = 14.68, tokens: int = 28472, clock: str = "wall") -> dict[str, Any]:
    results = {
        "ratio": ratio_,
        "ends": [12.11, 17.26],
        "padded": tokens,
        "packed": 1644,
        "seconds": 11.34,
        "clock": clock,
    }
    stamp = {"command": COMMAND, "date": "2026-11-23T07:00:00+00:00", "processor": "A CPU", "num_threads": 2}
    return {"benchmark": "step", "environment": stamp, "results": results}


def speed(found: Mapping[str, Any]) -> list[Any]:
    results = found["results"]
    return [ratio(results["ratio"]), *map(here, results["ends"]), exactly(results["padded"])]


def row(found: Mapping[str, Any]) -> list[Any]:
    return [exactly(found["results"]["packed"]), here(found["results"]["seconds"])]


WALL = {"results.clock": "wall"}
SMALL = [
    Claim("speed", "{:.1f} times faster [{:.1f}, {:.1f}], from {:,} tokens", Recorded("step", speed, WALL), COMMAND),
    Claim("row", "| packed | {:,} | {:.1f} |", Recorded("step", row, WALL), COMMAND),
    Claim("movement", "Moved by {}", Logged("Parameters moved by {}"), "pytest"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a document, a log and results, all of which agree."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "log.md").write_text(LOG)
    write(tmp_path, record(99.0), record(), record(13.9, clock="cpu"))
    return tmp_path


def write(root: Path, *records: dict[str, Any]) -> None:
    (root / "results" / "step.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def wrong(root: Path) -> list[str]:
    return numbers.wrong_claims(SMALL, root / "results", root)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_documents_say_what_was_measured() -> None:
    found = numbers.wrong_claims(CLAIMS)
    for document, exempt in EXEMPT.items():
        found += numbers.uncovered(document, CLAIMS, exempt)
    assert found == []


def test_the_page_of_figures_is_the_table_of_the_claims() -> None:
    page = (numbers.ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert page == numbers.PAGE + numbers.table(CLAIMS), "write it again: make numbers-table"


def test_a_document_that_agrees_has_no_wrong_claim_whatever_its_line_breaks(root: Path) -> None:
    assert wrong(root) == []
    assert numbers.uncovered("README.md", SMALL, ["95 %"], root) == []


def test_another_figure_in_the_document_is_told_with_both_and_the_command(root: Path) -> None:
    edit(root / "README.md", "14.7 times", "14.8 times")
    (sentence,) = wrong(root)
    assert "README.md says 14.8 12.1 17.3 28,472, benchmarks/results/step.jsonl says 14.7 12.1 17.3 28,472" in sentence
    assert sentence.endswith(f"measure again by `{COMMAND}`")


def test_another_record_makes_the_document_wrong(root: Path) -> None:
    write(root, record(), record(15.2))
    (sentence,) = wrong(root)
    assert "says 15.2" in sentence


def test_a_passage_that_is_gone_and_a_record_that_is_gone_are_told(root: Path) -> None:
    edit(root / "README.md", "from 28,472 tokens", "of tokens")
    (sentence,) = wrong(root)
    assert "README.md has no passage like" in sentence
    write(root, record(clock="cpu"))
    assert "has no record with results.clock 'wall'" in wrong(root)[0]
    write(root)
    assert len(wrong(root)) == 2


def test_a_record_without_the_figure_is_told(root: Path) -> None:
    write(root, {"results": {"clock": "wall", "packed": 1644, "seconds": 11.34}})
    (sentence,) = wrong(root)
    assert "speed: benchmarks/results/step.jsonl does not tell the figures ('ratio')" in sentence


def test_a_logged_figure_must_be_the_logs(root: Path) -> None:
    edit(root / "docs" / "log.md", "by 7.6e-2", "by 7.7e-2")
    (sentence,) = wrong(root)
    assert "README.md says 7.6e-2, docs/log.md says 7.7e-2" in sentence
    edit(root / "docs" / "log.md", "Parameters", "Weights")
    assert 'docs/log.md has no passage like "Parameters moved by {}"' in wrong(root)[0]


def test_a_logged_figure_may_be_rounded_by_its_claim(root: Path) -> None:
    source = Logged("and {} MiB", lambda found: [here(found / 1024)])
    claims = [Claim("memory", "holds {:.1f} GiB", source, "pytest")]
    edit(root / "README.md", "# A project", "It holds 2.0 GiB.")
    assert numbers.wrong_claims(claims, root / "results", root) == []
    edit(root / "README.md", "2.0 GiB", "2.1 GiB")
    assert len(numbers.wrong_claims(claims, root / "results", root)) == 1


@pytest.mark.parametrize(
    ("added", "number"),
    [
        ("It is 3.5 times smaller.", "3.5"),
        ("It is 3x smaller.", "3"),
        ("It takes 12 s.", "12"),
        ("It takes 12 CPU seconds.", "12"),
        ("It holds 1.5 GiB.", "1.5"),
        ("It gains 4 %.", "4"),
        ("It differs by 3e-8.", "3e-8"),
        ("It lies in [1.5, 2.5).", "1.5"),
        ("| more | 5,000 | no |", "5,000"),
    ],
)
def test_a_measured_figure_that_no_claim_covers_is_told(root: Path, added: str, number: str) -> None:
    edit(root / "README.md", "# A project", added)
    (sentence,) = numbers.uncovered("README.md", SMALL, ["95 %"], root)
    assert sentence.startswith(f"README.md says {number} in")


@pytest.mark.parametrize(
    "added", ["Python 3.11 or newer.", "TRL 1.16, SmolLM2-135M.", "arXiv 2406.09136", "k = 10", "sm80"]
)
def test_versions_names_and_settings_are_no_measured_figures(root: Path, added: str) -> None:
    edit(root / "README.md", "# A project", added)
    assert numbers.uncovered("README.md", SMALL, ["95 %"], root) == []


def test_an_exempt_passage_that_the_document_lacks_is_told(root: Path) -> None:
    (sentence,) = numbers.uncovered("README.md", SMALL, ["95 %", "a prompt of 450 tokens"], root)
    assert 'has no passage "a prompt of 450 tokens"' in sentence


def test_a_new_measurement_is_compared_as_its_figures_allow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "RESULTS", root / "results")
    monkeypatch.setattr(numbers, "ROOT", root)
    folder = root / "again"
    folder.mkdir()
    commands = []

    def measure(new: dict[str, Any], code: int = 0) -> list[str]:
        def run(words: list[str], cwd: Path, env: dict[str, str]) -> SimpleNamespace:
            commands.append(words[1:])
            (Path(env["CPO_FAST_RESULTS"]) / "step.jsonl").write_text(json.dumps(new) + "\n")
            return SimpleNamespace(returncode=code)

        return numbers.measured_again(SMALL, folder, run)

    slower = record(12.0)
    slower["results"]["seconds"] = 50.0  # another machine
    assert measure(slower) == []
    assert commands == [["-m", "benchmarks.step"]]  # once for two claims, never for what the log says
    (sentence,) = measure(record(9.0))
    assert "14.68 was expected within 30%, measured again 9.0" in sentence
    (sentence,) = measure(record(tokens=28000))
    assert "28472 was expected exactly, measured again 28000" in sentence
    assert measure(record(), code=3) == [f"`{COMMAND}` ended with exit code 3"]
    assert "did not tell the figures" in measure({"results": {"clock": "wall"}})[0]


def test_the_table_has_command_machine_and_date(root: Path) -> None:
    lines = numbers.table(SMALL, root / "results", root).splitlines()
    assert lines[2] == f"| speed | 14.7 12.1 17.3 28,472 | `{COMMAND}` | A CPU, 2 threads | 2026-11-23 |"
    assert lines[4] == "| movement | 7.6e-2 | `pytest` | as the log says | 2026-11-19 |"


def test_the_command_ends_with_1_and_a_sentence_where_a_document_is_wrong(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(root / "README.md", "11.3", "11.4")
    monkeypatch.setattr(numbers, "CLAIMS", SMALL)
    monkeypatch.setattr(numbers, "EXEMPT", {"README.md": ["95 %"]})
    monkeypatch.setattr(numbers, "wrong_claims", lambda claims: _wrong(claims, root / "results", root))
    monkeypatch.setattr(numbers, "uncovered", lambda *found: _uncovered(*found, root))
    assert numbers.main(["--quick"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("row: README.md says 1,644 11.4")
    assert told[-1] == "3 claims, 1 wrong"
    edit(root / "README.md", "11.4", "11.3")
    assert numbers.main(["--quick"]) == 0


_wrong, _uncovered = numbers.wrong_claims, numbers.uncovered


def test_the_checks_need_no_libraries() -> None:
    """A reader without torch can run them."""
    code = "import sys, benchmarks.numbers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=numbers.ROOT).returncode == 0
