"""What an adapter knows its base by: some numbers of its weights, in a file beside those of PEFT.

A hash of the base's files would do for copies of them alone. These numbers are the same, up to rounding, where the base was
saved in another dtype, in other pieces or with another tokenizer, and its adapter may still be used on all of these.
"""

import json
import logging
import math
import random
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cpo_fast.errors import CheckpointError, first_line
from cpo_fast.files import canonical_json

logger = logging.getLogger(__name__)

NAME = "base_sample.json"
FOLDER = "_cpo_base_folder"  # attribute of a base model: the folder whose weights it has
_MATRICES, _NUMBERS = 64, 4  # of a base, and of a row in its middle
_ROUNDING = 2.0**-8  # by which a weight may change, relatively, in another dtype


def keep_sample(folder: Path, base: Any) -> None:
    """Write the file of the adapter in `folder`, where `base` is a model that `load_model` has read."""
    if hasattr(base, FOLDER):
        (folder / NAME).write_text(canonical_json(_sample(getattr(base, FOLDER))) + "\n", encoding="utf-8")


def check_base(adapter: Path, named: Any, base: Path) -> None:
    """Refuse an adapter of another base.

    Args:
        adapter: its folder. Without the file, all that can be done is a warning.
        named: the base that its `adapter_config.json` names.
        base: folder of the model that it is put on.

    Raises:
        CheckpointError: its base has other weights, or the file is damaged.
    """
    file = adapter / NAME
    if file.is_file():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            is_same = _is_same(saved, _sample(base, saved))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({first_line(error)}); delete it, or train the adapter again"
            ) from None
        if not is_same:
            of = f" (its adapter_config.json names {named})" if named else ""
            raise CheckpointError(
                f"model.adapter: {adapter} was trained on other weights than those in {base}{of}; set model.path to its "
                f"own base, or delete {file} to put it on this one all the same"
            )
    elif isinstance(named, str) and named and Path(named).is_dir():
        first = _sample(Path(named))
        if not _is_same(first, _sample(base, first)):
            logger.warning(
                "model.adapter: %s was trained on %s, as its adapter_config.json says, which has other weights than %s",
                adapter,
                named,
                base,
            )


def _sample(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """[dtype, numbers] by the name of matrices of a model: of `names`, as far as they are there, or of some of them all."""
    from safetensors import SafetensorError, safe_open

    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(each, framework="pt")) for each in folder.glob("*.safetensors")]
            pieces = {name: file.get_slice(name) for file in files for name in sorted(file.keys())}
            found = {name: piece for name, piece in pieces.items() if len(piece.get_shape()) == 2}
            if names is None:
                names = random.Random(0).sample(sorted(found), min(_MATRICES, len(found)))
            sample = {}
            for name in names:
                if name in found:
                    row = found[name].get_shape()[0] // 2
                    numbers = found[name][row : row + 1, :_NUMBERS].double().flatten().tolist()
                    if all(map(math.isfinite, numbers)):
                        sample[name] = [found[name].get_dtype(), numbers]
            return sample
    except (OSError, SafetensorError):
        return {}  # loading says why


def _is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two samples may be of one model, as far as they have matrices in common."""
    for name in one.keys() & other.keys():
        (dtype, numbers), (other_dtype, other_numbers) = one[name], other[name]
        near, least = (0.0, 0.0) if dtype == other_dtype else (_ROUNDING, 1e-7)
        if len(numbers) != len(other_numbers) or not all(
            math.isclose(*pair, rel_tol=near, abs_tol=least) for pair in zip(numbers, other_numbers, strict=True)
        ):
            return False
    return True
