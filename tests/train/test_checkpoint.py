"""A checkpoint is whole or not there, whatever dies. What a disk spoils is named, and the checkpoint before is used."""

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpo_fast.errors import CheckpointError
from cpo_fast.train.checkpoint import Checkpoint, CheckpointStore
from tests.train.kill_saves import checkpoint, is_whole

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Two whole checkpoints, of steps 1 and 2."""
    made = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        assert made.save(checkpoint(step))
    return made


def kill(folder: Path, num_random: int) -> dict[str, Any]:
    """Kill saves in a process without torch, and read its report."""
    command = [sys.executable, "-m", "tests.train.kill_saves", str(folder), str(num_random)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_no_kill_of_a_save_leaves_a_run_that_cannot_go_on(tmp_path: Path) -> None:
    report = kill(tmp_path, 25)
    assert report["problems"] == []
    assert report["operations"] >= 15  # kills at every operation on files that the protocol makes
    assert report["leftovers"] == []
    assert not report["torch"]


@pytest.mark.soak
def test_no_kill_of_200_leaves_a_run_that_cannot_go_on(tmp_path: Path) -> None:
    report = kill(tmp_path, 200)
    assert report["problems"] == []
    assert report["steps"] > 200  # the forks did save


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def shorten(size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size(path.stat().st_size))


SPOILED: dict[str, Callable[[Path], None]] = {
    "one bit": flip,
    "empty": shorten(lambda size: 0),
    "one byte": shorten(lambda size: 1),
    "half": shorten(lambda size: size // 2),
    "last byte missing": shorten(lambda size: size - 1),
    "deleted": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir())[-1],
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", SPOILED)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    store: CheckpointStore, how: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    SPOILED[how](store.folder / "step-00000002" / name)
    with caplog.at_level(logging.WARNING):
        found = store.newest()
    assert found is not None
    assert found.step == 1
    assert is_whole(found)
    assert "step-00000002" in caplog.text
    # a changed manifest shows in whatever it says of the files
    assert name in caplog.text or name == "MANIFEST.json"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("step-00000002/adapter.safetensors", "step-00000002/optimizer.safetensors"),
        ("step-00000002/adapter.safetensors", "step-00000001/adapter.safetensors"),
        ("step-00000002/state.json", "step-00000002/MANIFEST.json"),
    ],
)
def test_swapped_files_are_found(store: CheckpointStore, left: str, right: str) -> None:
    one, two = store.folder / left, store.folder / right
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    if left.split("/")[0] == right.split("/")[0]:
        found = store.newest()
        assert found is not None
        assert found.step == 1
    else:
        with pytest.raises(CheckpointError, match=r"no checkpoint of this run is whole .*delete"):
            store.newest()


def test_a_checkpoint_under_another_name_is_not_taken_for_that_step(store: CheckpointStore) -> None:
    os.rename(store.folder / "step-00000002", store.folder / "step-00000009")
    found = store.newest()
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("content", [b"", b"step-00000007", b"../../../etc", b"\xff\xfe", b"step-00000002\nmore"])
def test_a_latest_that_names_nothing_is_named_and_changes_nothing(
    store: CheckpointStore, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (store.folder / "LATEST").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = store.newest()
    assert found is not None
    assert found.step == 2
    assert "LATEST names no checkpoint" in caplog.text


def test_all_damaged_is_an_error_that_names_each_and_none_is_no_error(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (1, 2):
        flip(store.folder / f"step-0000000{step}" / "state.json")
    with pytest.raises(CheckpointError, match=r"step-00000002: state\.json .*step-00000001: state\.json") as caught:
        store.newest()
    assert caught.value.exit_code == 4
    assert CheckpointStore(tmp_path / "nothing").newest() is None


def rewrite(folder: Path, **files: bytes) -> None:
    """Replace files of a checkpoint and describe them rightly in its manifest, as an attacker would."""
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    for name, content in files.items():
        name = name.replace("_", ".")
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["adapter_safetensors", "optimizer_safetensors", "state_json"])
def test_a_planted_pickle_is_never_executed(store: CheckpointStore, name: str, tmp_path: Path) -> None:
    rewrite(store.folder / "step-00000002", **{name: pickle.dumps(Planted(str(tmp_path / "executed")))})
    found = store.newest()
    assert found is not None
    assert found.step == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "sub/adapter.safetensors", "adapter.safetensors\0"])
def test_a_manifest_opens_no_other_file(store: CheckpointStore, path: str) -> None:
    folder = store.folder / "step-00000002"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"][path] = manifest["files"].pop("adapter.safetensors")
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    found = store.newest()
    assert found is not None
    assert found.step == 1


def test_a_link_is_no_checkpoint_and_cleaning_follows_none(store: CheckpointStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(store.folder / "step-00000002", outside)
    (store.folder / "step-00000003").symlink_to(outside)
    (store.folder / ".step-00000004.host-1-abc.tmp").symlink_to(outside)
    store.clean()
    assert store.names() == ["step-00000001", "step-00000002"]
    assert len(list(outside.iterdir())) == len(FILES)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in range(1, 8):
        store.save(checkpoint(step), best_step=3 if step >= 3 else None)
    assert store.names() == ["step-00000003", "step-00000006", "step-00000007"]
    assert (tmp_path / "LATEST").read_text() == "step-00000007"


def test_a_damaged_later_checkpoint_takes_no_place_of_a_whole_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(checkpoint(9))
    flip(tmp_path / "step-00000009" / "state.json")
    for step in (4, 5):
        assert store.save(checkpoint(step))
    found = store.newest()
    assert found is not None
    assert found.step == 5


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        assert not store.save(checkpoint(3))
    monkeypatch.undo()
    assert "No space left on device" in caplog.text
    assert store.names() == ["step-00000001", "step-00000002"]
    assert is_whole(store.newest())
    assert [each.name for each in store.folder.iterdir() if each.name.startswith(".")] == []


def test_a_checkpoint_has_twelve_bytes_a_trainable_parameter(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    adapter = {"a": np.zeros((1000, 300), np.float32), "b": np.zeros((300, 1000), np.float32)}
    moments = {f"{moment}.{name}": value for moment in ("exp_avg", "exp_avg_sq") for name, value in adapter.items()}
    store.save(Checkpoint(1, adapter, moments, {}))
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size <= 12 * 600_000 * 1.1 + 1_000_000
