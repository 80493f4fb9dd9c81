"""Log-probs of sequences in a folder that runs append to and may share, each under a hash of its tokens.

    <folder>/<context>-<digest>.safetensors    keys [N, 32] uint8, segment_logps [N] float64

`context` names what decides every value beside the tokens (weights, dtype, kernels). A key is the SHA-256 of a sequence's
first scored position and ids. `digest` is the SHA-256 of the file, so a file that is not what was written shows. A file is
written aside and renamed, never changed, and removed where it is damaged or was found wrong. The first process that writes
a sequence's value decides it: one that has computed the same sequence meanwhile takes that value, and so its own run, gone
on with later, finds the very bits that it has used.
"""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cpo_fast.errors import first_line
from cpo_fast.files import replacing

logger = logging.getLogger(__name__)

NUM_DIGITS = 16  # hexadecimal, of each hash in a file's name


def sequence_key(sequence: Sequence[int], start: int) -> bytes:
    """32 bytes that name a sequence of token ids and the first position that is scored."""
    return hashlib.sha256(np.array([start, *sequence], np.int64).tobytes()).digest()


class LogpStore:
    """The log-probs of one context in a folder. Any number of processes may read and add."""

    def __init__(self, folder: Path, context: str) -> None:
        """`context`: a text that names what decides the values, of any length."""
        self.folder, self.context = folder, hashlib.sha256(context.encode()).hexdigest()[:NUM_DIGITS]
        self._read: set[str] = set()  # names of the files whose values are in `_known`
        self._known: dict[bytes, float] = {}
        self._damaged: set[Path] = set()

    def read(self, wanted: Sequence[bytes]) -> list[float | None]:
        """The value of each key, or None. Damaged files are named in the log."""
        self._read_new()
        return [self._known.get(key) for key in wanted]

    def add(self, values: Mapping[bytes, float], instead: bool = False) -> list[float]:
        """Append the values of keys that nobody else has written meanwhile.

        Args:
            values: log-probs. Those that are not finite are not kept.
            instead: what is there is wrong: remove it all first.

        Returns:
            The value that stands for each key of `values`: that of the process that wrote it first.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                if instead:
                    for path in self._files():
                        path.unlink(missing_ok=True)
                    self._known.clear()
                    self._read.clear()
                self._read_new()
                for path in self._damaged:
                    path.unlink(missing_ok=True)
                self._damaged.clear()
                new = {key: value for key, value in values.items() if key not in self._known and math.isfinite(value)}
                if new:
                    self._write(new)
                self._known |= new
        except OSError as error:  # the values are there, and only not kept
            logger.warning(
                "%s cannot be written (%s), so the reference's log-probs are not kept", self.folder, error.strerror
            )
            return list(values.values())
        return [self._known.get(key, value) for key, value in values.items()]

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.context}-{'[0-9a-f]' * NUM_DIGITS}.safetensors"))

    def _read_new(self) -> None:
        for path in self._files():
            if path.name in self._read or path in self._damaged:
                continue
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # another process found it wrong
                continue
            except OSError as error:
                self._name_damaged(path, error.strerror or first_line(error))
                continue
            if hashlib.sha256(content).hexdigest()[:NUM_DIGITS] != path.stem.partition("-")[2]:
                self._name_damaged(path, "it is not what was written")
                continue
            try:
                tensors = load(content)
                keys, logps = tensors["keys"], tensors["segment_logps"]
            except (SafetensorError, KeyError) as error:
                self._name_damaged(path, first_line(error))
                continue
            for key, value in zip(keys, logps.tolist(), strict=True):
                self._known.setdefault(key.tobytes(), value)
            self._read.add(path.name)

    def _name_damaged(self, path: Path, why: str) -> None:
        self._damaged.add(path)
        logger.warning("%s: the cached reference is damaged (%s); its log-probs are computed again", path, why)

    def _write(self, values: Mapping[bytes, float]) -> None:
        keys = np.frombuffer(b"".join(values), np.uint8).reshape(len(values), -1)
        content = save({"keys": keys, "segment_logps": np.array(list(values.values()), np.float64)})
        digest = hashlib.sha256(content).hexdigest()[:NUM_DIGITS]
        with replacing(self.folder / f"{self.context}-{digest}.safetensors") as file:
            file.write(content)
        self._read.add(f"{self.context}-{digest}.safetensors")
