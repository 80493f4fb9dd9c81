"""The reference's log-probs on disk: one a sequence, appended to, shared by runs and processes, damaged ones named."""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save

from cpo_fast.config import Config
from cpo_fast.train import reference as reference_module
from cpo_fast.train.loop import train
from cpo_fast.train.reference_store import LogpStore, sequence_key
from tests.train.runs import MakeConfig, adapter_of, id_rows, largest_difference


class Counted:
    """The sequences that a run has scored under the reference: `sampled` by comparisons, `computed` for keeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed: list[tuple[tuple[int, ...], int]] = []
        self.sampled = self.num_calls = 0
        online, agrees = reference_module._online, reference_module.ReferenceCache._agrees

        def counting(policy: Any, wanted: Any) -> torch.Tensor:
            self.computed += wanted
            return online(policy, wanted)

        def sampling(cache: Any, *args: Any) -> bool:
            before = len(self.computed)
            found = agrees(cache, *args)
            self.sampled += len(self.computed) - before
            del self.computed[before:]
            return found

        monkeypatch.setattr(reference_module, "_online", counting)
        monkeypatch.setattr(reference_module.ReferenceCache, "_agrees", sampling)

    def take(self) -> tuple[int, int]:
        """(computed, sampled) since the last call."""
        found = len(self.computed), self.sampled
        self.computed, self.sampled = [], 0
        return found


def write(path: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def num_sequences(rows: list[dict[str, Any]]) -> int:
    return len(
        {
            (*row["prompt_token_ids"], -1, *row[name])
            for row in rows
            for name in ("chosen_token_ids", "rejected_token_ids")
        }
    )


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def cached(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Config]:
    """A run of one short epoch over rows, with a cached reference."""

    def make(rows: list[dict[str, Any]], name: str = "rows", **options: Any) -> Config:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        data = write(folder / f"{name}.jsonl", rows)
        return make_config(data=data, reference="cached", num_epochs=1, max_steps=1, **options)

    return make


def test_a_changed_row_computes_its_own_sequences_alone(
    cached: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs with one folder: the second one reads what it has in common with the first."""
    counted, rows = Counted(monkeypatch), id_rows()
    shared = {"reference_cache": str(tmp_path / "shared")}
    train(cached(rows, **shared))
    assert counted.take() == (num_sequences(rows), 0)
    train(cached(rows, "again", **shared))
    num_computed, num_sampled = counted.take()
    assert num_computed == 0
    assert num_sampled > 0
    changed = [dict(row) for row in rows]
    changed[5]["rejected_token_ids"] = [200, 201, 202]
    changed.append(changed[5] | {"rejected_token_ids": [203]})
    train(cached(changed, "changed", **shared))
    num_computed, num_sampled = counted.take()
    assert num_computed == 2
    assert num_sampled > 0
    assert len(files_of(tmp_path / "shared")) == 2  # appended
    # another model, another context: nothing is shared, nothing is lost
    train(cached(rows, "other", model={"dtype": "bfloat16"}, **shared))
    assert counted.take() == (num_sequences(rows), 0)
    train(cached(changed, "changed again", **shared))
    assert counted.take()[0] == 0


def test_the_adapter_is_that_of_the_reference_computed_in_every_step(
    make_config: MakeConfig, cached: Callable[..., Config], tmp_path: Path
) -> None:
    """Where every value comes from another run's file."""
    rows, shared = id_rows(), {"reference_cache": str(tmp_path / "shared")}
    train(cached(id_rows()[::-1], "reversed", **shared))
    expected = adapter_of(cached(rows).model_copy(update={"train": make_config(reference="online").train}))
    config = cached(rows, **shared)
    options = config.train.model_dump() | {"num_epochs": 2, "max_steps": None, "reference": "cached"}
    found = adapter_of(config.model_copy(update={"train": type(config.train)(**options)}))
    assert largest_difference(expected, found) < 1e-4


def test_a_damaged_file_is_named_removed_and_computed_again(
    cached: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted, rows = Counted(monkeypatch), id_rows()
    config = cached(rows)
    expected = adapter_of(config)
    shared = {"reference_cache": f"{config.run}/reference"}
    train(cached([*rows[:-1], rows[-1] | {"rejected_token_ids": [203]}], "changed", **shared))
    large, small = sorted(files_of(Path(config.run, "reference")), key=lambda path: -path.stat().st_size)
    whole, num_lost = large.read_bytes(), num_sequences(rows)
    for damaged in (whole[:40], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        large.write_bytes(damaged)
        counted.take()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert largest_difference(expected, adapter_of(anew(config))) == 0.0
        assert f"{large}: the cached reference is damaged" in caplog.text
        assert counted.take()[0] == num_lost
        assert large.read_bytes() == whole  # of the same forests, so the same bits
        assert small.exists()


def test_values_that_differ_from_an_online_computation_are_made_anew(
    cached: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is whole and wrong."""
    counted, rows = Counted(monkeypatch), id_rows()
    config = cached(rows)
    expected = adapter_of(config)
    (path,) = files_of(Path(config.run, "reference"))
    wrong = load_file(path)
    wrong["segment_logps"] = wrong["segment_logps"] + 1.0
    right = path.read_bytes()
    path.unlink()
    context = path.name.partition("-")[0]
    content = save(wrong)
    path.with_name(f"{context}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors").write_bytes(content)
    counted.take()
    assert largest_difference(expected, adapter_of(anew(config))) == 0.0
    assert "differ from an online computation; making them anew" in caplog.text
    assert counted.take()[0] == num_sequences(rows)
    assert [file.read_bytes() for file in files_of(path.parent)] == [right]


def anew(config: Config) -> Config:
    """The same training from its start, with the reference that lies there."""
    for path in Path(config.run).glob("checkpoints/*/*"):
        path.unlink()
    for path in sorted(Path(config.run).glob("checkpoints/*")):
        path.rmdir() if path.is_dir() else path.unlink()
    return config


def test_who_computes_what_another_process_has_written_takes_that(tmp_path: Path) -> None:
    key, other = sequence_key((1, 2, 3), 1), sequence_key((1, 2, 3), 2)
    assert key != other != sequence_key((1, 2), 1)
    one, two = LogpStore(tmp_path, "c"), LogpStore(tmp_path, "c")
    assert one.read([key]) == two.read([key]) == [None]
    assert one.add({key: -1.0}) == [-1.0]
    assert two.add({key: -1.0000001, other: -2.0, sequence_key((9,), 1): float("nan")})[:2] == [-1.0, -2.0]
    assert one.read([other, key, sequence_key((9,), 1)]) == [-2.0, -1.0, None]
    assert LogpStore(tmp_path, "other").read([key]) == [None]
    assert two.add({key: -3.0}, instead=True) == [-3.0]
    assert LogpStore(tmp_path, "c").read([key, other]) == [-3.0, None]


PROCESS = """
import sys
from pathlib import Path
from cpo_fast.train.reference_store import LogpStore, sequence_key
folder, mine = Path(sys.argv[1]), float(sys.argv[2])
used = {}
for turn in range(30):
    store = LogpStore(folder, "c")
    keys = [sequence_key((number,), 1) for number in range(turn, turn + 5)]
    found = dict(zip(keys, store.read(keys)))
    missing = {key: mine for key, value in found.items() if value is None}
    found.update(zip(missing, store.add(missing)))
    for key, value in found.items():
        assert used.setdefault(key, value) == value, "a value has changed under a run that uses it"
for key, value in used.items():
    print(key.hex(), value)
"""


def test_processes_at_once_agree_on_every_value(tmp_path: Path) -> None:
    """Each would write values of its own: all end with those of whoever was first."""
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    started = [subprocess.Popen([*command, str(-n)], stdout=subprocess.PIPE, text=True) for n in (1, 2, 3)]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert said[0] == said[1] == said[2]
    assert len(said[0].splitlines()) == 34
    written = [key.tobytes() for file in files_of(tmp_path) for key in load_file(file)["keys"]]
    assert len(written) == len(set(written)) == 34
    assert {path.suffix for path in tmp_path.iterdir() if path.name != ".lock"} == {".safetensors"}


def test_a_folder_that_cannot_be_written_costs_a_sentence_and_no_training(
    cached: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    train(cached(id_rows(), reference_cache=str(tmp_path / "file")))
    assert "cannot be written" in caplog.text
