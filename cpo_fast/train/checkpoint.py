"""Checkpoints on disk: whole or absent whatever dies and when, every byte checked before it is used.

    <run>/checkpoints/step-00000120/    adapter.safetensors, optimizer.safetensors, state.json, MANIFEST.json
    <run>/checkpoints/LATEST            the name of the newest one, replaced in one step

A checkpoint is written into a hidden folder of a name that no other process has, its manifest (size and SHA-256 of every
file) last, everything is flushed to disk, and then the folder gets its name in one rename. So a folder with a name is
whole unless the disk has lost something, which the manifest shows. The newest whole one is used and every other one is
named with what is wrong. There are no pickles: tensors are safetensors, the rest is JSON, and only the four names above are
ever opened.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cpo_fast.errors import CheckpointError, first_line
from cpo_fast.files import canonical_json, replacing, sync_folder

logger = logging.getLogger(__name__)

FORMAT = 1
Tensors = dict[str, np.ndarray]
_FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")
_MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-([0-9]{8})")
_LEFTOVER = re.compile(r"\.step-[0-9]{8}\..+\.(tmp|old)")


class Damaged(Exception):
    """A checkpoint's folder is not what was written; the message says which file and how."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after a step.

    Attributes:
        step: optimizer steps taken.
        adapter: float32 weights by parameter name.
        optimizer: the moments, by `exp_avg.NAME` and `exp_avg_sq.NAME`; none before the first step.
        state: JSON values, of which this module reads none.
    """

    step: int
    adapter: Tensors
    optimizer: Tensors
    state: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}"


class CheckpointStore:
    """The checkpoints of a run. One process writes at a time, the one that holds the run's lock."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        """`keep_last` newest checkpoints stay, and beside them the one of the best step."""
        self.folder, self.keep_last = folder, keep_last

    def save(self, checkpoint: Checkpoint, best_step: int | None = None) -> bool:
        """Write a checkpoint and remove those that are no longer kept.

        Returns:
            False where the disk refused (full, or gone): what was there stays, and the log says why.
        """
        aside = self.folder / f".{checkpoint.name}.{_unique()}.tmp"
        try:
            self._write(checkpoint, aside)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            logger.warning(
                "checkpoint %s was not saved (%s); training goes on with the previous one. Free some space in %s",
                checkpoint.name,
                error.strerror or first_line(error),
                self.folder,
            )
            return False
        try:
            self._prune(checkpoint.step, best_step)
        except OSError as error:
            logger.warning("%s: older checkpoints could not be removed (%s)", self.folder, error.strerror)
        return True

    def _write(self, checkpoint: Checkpoint, aside: Path) -> None:
        target = self.folder / checkpoint.name
        aside.mkdir(parents=True)
        contents = (save(checkpoint.adapter), save(checkpoint.optimizer), canonical_json(checkpoint.state).encode())
        manifest: dict[str, Any] = {"format": FORMAT, "step": checkpoint.step, "files": {}}
        for name, content in zip(_FILES, contents, strict=True):
            _write_file(aside / name, content)
            manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        _write_file(aside / _MANIFEST, canonical_json(manifest).encode())
        sync_folder(aside)
        replaced = None
        if target.exists():  # saved before its validation, or taken again after a resume from an earlier checkpoint
            replaced = self.folder / f".{target.name}.{_unique()}.old"
            os.rename(target, replaced)
        os.rename(aside, target)
        sync_folder(self.folder)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        with replacing(self.folder / "LATEST") as file:
            file.write(checkpoint.name.encode())
        sync_folder(self.folder)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None where there is none at all. Damaged ones are named in the log.

        Raises:
            CheckpointError: there are checkpoints and every one is damaged.
        """
        names = self.names()
        problems = []
        for name in reversed(names):
            try:
                checkpoint = self.read(name)
            except Damaged as problem:
                problems.append(f"{self.folder / name}: {problem}")
                logger.warning("%s; the checkpoint before it is used", problems[-1])
                continue
            self._check_latest(name, names)
            return checkpoint
        if problems:
            raise CheckpointError(
                f"no checkpoint of this run is whole ({'; '.join(problems)}); delete {self.folder} to train from the start"
            )
        return None

    def names(self) -> list[str]:
        """Names of the checkpoints that are there, whole or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(each.name for each in self.folder.iterdir() if _NAME.fullmatch(each.name) and _is_folder(each))

    def read(self, name: str) -> Checkpoint:
        """Read one checkpoint, every byte against the manifest. Raises Damaged."""
        folder = self.folder / name
        manifest = _json(_read_file(folder / _MANIFEST), _MANIFEST)
        if manifest.get("format") != FORMAT:
            raise Damaged(f"{_MANIFEST} has format {manifest.get('format')!r}, and this version reads {FORMAT}")
        files = manifest.get("files")
        step = manifest.get("step")
        if not isinstance(files, dict) or set(files) != set(_FILES) or step != int(name.removeprefix("step-")):
            raise Damaged(f"{_MANIFEST} does not describe this checkpoint")
        contents = {}
        for file_name in _FILES:
            content = _read_file(folder / file_name)
            expected = files[file_name] if isinstance(files[file_name], dict) else {}
            if len(content) != expected.get("size"):
                raise Damaged(f"{file_name} has {len(content)} bytes instead of {expected.get('size')}")
            if hashlib.sha256(content).hexdigest() != expected.get("sha256"):
                raise Damaged(f"{file_name} is not what was written (its SHA-256 differs)")
            contents[file_name] = content
        try:
            adapter, optimizer = (load(contents[file_name]) for file_name in _FILES[:2])
        except SafetensorError as error:
            raise Damaged(f"its tensors cannot be read ({first_line(error)})") from None
        return Checkpoint(step, adapter, optimizer, _json(contents["state.json"], "state.json"))

    def clean(self) -> None:
        """Remove what killed processes left half written, and put back what one was about to replace.

        Call with the run's lock held.
        """
        if self.folder.is_dir():
            newest = max(self.names(), default="")
            for each in list(self.folder.iterdir()):
                if _LEFTOVER.fullmatch(each.name) and _is_folder(each):
                    name = each.name.split(".")[1]
                    if each.suffix == ".old" and name > newest:  # older ones were being removed
                        os.rename(each, self.folder / name)
                    else:
                        shutil.rmtree(each, ignore_errors=True)

    def _check_latest(self, used: str, names: list[str]) -> None:
        try:
            latest = (self.folder / "LATEST").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            latest = ""
        if latest not in names:
            logger.warning("%s names no checkpoint (%r); %s is used", self.folder / "LATEST", latest[:40], used)

    def _prune(self, step: int, best_step: int | None) -> None:
        # a later one is damaged, or this run would have gone on from it: it is no reason to remove what is whole
        names = [name for name in self.names() if name <= f"step-{step:08d}"]
        kept = {*names[-self.keep_last :], f"step-{best_step or 0:08d}"}
        for name in names:
            if name not in kept:
                self._remove(self.folder / name)

    def _remove(self, folder: Path) -> None:
        # first out of sight: a folder with a name is whole
        aside = self.folder / f".{folder.name}.{_unique()}.old"
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _unique() -> str:
    """Unlike that of any other process, on other hosts of a shared folder too."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from None


def _json(content: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise Damaged(f"{name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise Damaged(f"{name} holds no JSON object")
    return value
