"""What of a golden run must hold on any machine: everything discrete exactly, every float to a tolerance.

Two processors sum a product in different orders (AVX2 or AVX-512, another matrix library), so floats differ in their last
bits from machine to machine, and hashes of files that hold floats cannot be kept. A summary therefore holds, for each file
and each field in it (`nodes.token_ids`, `loss`, the name of a tensor),

    exact     a hash of the discrete values in order: texts, ids, counts, flags, null, and where floats stand between them
    floats    how many, the sum of w_i x_i and of w_i |x_i|, with weights w_i that tell the places apart

Floats agree when both sums do to `RELATIVE` of the second, plus `ABSOLUTE` a float. A sample flips only where its uniform
number falls within a rounding error of a boundary between two tokens, and an order only where two values are that close:
about 1e-4 of a chance for the whole reduced set, and then on every run of that machine. Left out are times, hashes of
weights, what names a file by them, and what a library writes about itself.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.golden.normalised import files_of

RELATIVE = 1e-4  # a hundred times what SSE, AVX2 and AVX-512 were seen to differ by
ABSOLUTE = 2e-6
NUM_WEIGHTS = 7  # places are told apart modulo this
# `stated` names adapters by their hashes
LEFT_OUT_KEYS = {"model_hash", "adapter_hash", "stated", "setup_seconds", "total_seconds", "seconds", "seconds_ratio"}
COMPARED = {".jsonl", ".json", ".safetensors"}
LEFT_OUT_NAMES = {
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "config.json",
}

# count of values, hash of the discrete ones, and where there are floats: how many, the two weighted sums
Digest = list[Any]
Summary = dict[str, dict[str, Digest]]


def summary(out: Path) -> Summary:
    """Of the runs in an output folder: file -> field -> what must hold of it on any machine."""
    found: Summary = {}
    for name in files_of(out):
        path = out / name
        if name.startswith("runs/") and path.suffix in COMPARED and path.name not in LEFT_OUT_NAMES:
            found[_machine_free(name)] = _fields(path, noisy=name.endswith("metrics.jsonl") and _is_cached(path.parent))
    codes = {name: (out / name).read_text(encoding="utf-8").splitlines()[1] for name in files_of(out) if _is_said(name)}
    return {**found, "exit codes": {name: _digest([code]) for name, code in codes.items()}}


def disagreements(expected: Summary, found: Summary) -> list[str]:
    """One sentence for each file or field that does not hold."""
    wrong = [f"{name}: is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name}: was not expected" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        for field in sorted({*expected[name], *found[name]}):
            reason = _disagreement(expected[name].get(field), found[name].get(field))
            if reason:
                wrong.append(f"{name}: {field}: {reason}")
    return wrong


def written(found: Summary) -> str:
    """A summary as JSON with a field on each line, so that a change of one shows as one."""
    files = []
    for name, fields in sorted(found.items()):
        lines = (f"  {json.dumps(field)}: {json.dumps(digest)}" for field, digest in sorted(fields.items()))
        files.append(f" {json.dumps(name)}: {_braced(lines)}")
    return _braced(files) + "\n"


def _braced(lines: Iterable[str]) -> str:
    return "{\n" + ",\n".join(lines) + "\n}"


def _disagreement(expected: Digest | None, found: Digest | None) -> str:
    if expected is None or found is None:
        return "was not expected" if expected is None else "is missing"
    if expected[0] != found[0]:
        return f"{found[0]} values instead of {expected[0]}"
    if expected[1] != found[1]:
        return "other values, or in another order"
    if len(expected) == 2:
        return ""
    number, total, size = expected[2:]
    tolerance = RELATIVE * size + ABSOLUTE * number
    for name, ours, theirs in (("sum", found[3], total), ("size", found[4], size)):
        if not abs(ours - theirs) <= tolerance:
            return f"weighted {name} of its floats is {ours:.9g} instead of {theirs:.9g} (tolerance {tolerance:.1g})"
    return ""


def _fields(path: Path, noisy: bool = False) -> dict[str, Digest]:
    """Field -> summary. `noisy` leaves the signs of differences out that are nothing but rounding."""
    if path.suffix == ".safetensors":
        return {name: _of_tensor(tensor) for name, tensor in sorted(load_file(path).items())}
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
    values: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        for field, value in _leaves(row, ""):
            values[field].append(value)
    return {
        field: _digest(column)
        for field, column in sorted(values.items())
        if not (noisy and field.startswith("rewards/accuracies"))
    }


def _is_cached(run: Path) -> bool:
    """Whether a run's first rewards are differences of two forests, so that their signs are anybody's guess."""
    return (run / "reference").is_dir()


def _leaves(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    """Every number, text, flag and null under `value` with the names that lead to it; places in lists are left out.

    How long a list is, and which names an object has, are values too.
    """
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if name not in LEFT_OUT_KEYS}
        yield f"{field}{{}}", " ".join(kept)
        for name, part in kept.items():
            yield from _leaves(part, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        yield f"{field}[]", len(value)
        for part in value:
            yield from _leaves(part, field)
    else:
        yield field, value


def _digest(values: list[Any]) -> Digest:
    floats = [value for value in values if isinstance(value, float)]
    rest = json.dumps([None if isinstance(value, float) else [value] for value in values])
    exact = hashlib.sha256(rest.encode()).hexdigest()[:12]
    if not floats:
        return [len(values), exact]
    weighted = [value * _weight(place) for place, value in enumerate(floats)]
    return [len(values), exact, len(floats), _short(math.fsum(weighted)), _short(math.fsum(map(abs, weighted)))]


def _of_tensor(tensor: torch.Tensor) -> Digest:
    shape = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode()).hexdigest()[:12]
    flat = tensor.double().flatten()
    weighted = flat * torch.tensor([_weight(place) for place in range(flat.numel())], dtype=torch.float64)
    sums = float(weighted.sum()), float(weighted.abs().sum())
    return [flat.numel(), shape, flat.numel(), *map(_short, sums)]


def _weight(place: int) -> float:
    return 1.0 + place % NUM_WEIGHTS / NUM_WEIGHTS


def _short(value: float) -> float:
    return float(f"{value:.9g}")


def _machine_free(name: str) -> str:
    """The name of a file without the hash of weights and library versions in it."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/*.safetensors" if folder.endswith("/reference") else f"{folder}/{last}"


def _is_said(name: str) -> bool:
    return name.startswith("said/")
