"""Rows of a data set on the Hugging Face hub: `hub:org/name[:config][:split]`, through the `datasets` library.

One part after the id is a split if it is called train, validation, dev or test (a slice such as test[:100] may follow),
else a configuration. Without a split, a data set that has several is refused: which questions a run asks is never
guessed. Class labels become their names. Code that comes with a data set is never run. The library is imported when it
is needed.
"""

import re
from collections.abc import Iterator
from typing import Any

from cpo_fast.errors import DataError, EnvironmentProblem

HUB_PREFIX = "hub:"
_SPLIT = re.compile(r"(train|validation|dev|test)\w*(\[.*\])?")


def parse_hub_path(path: str) -> tuple[str, str | None, str | None]:
    """(id, configuration, split) of `hub:org/name[:config][:split]`. Raises DataError for anything else."""
    # a colon inside the brackets of a slice, test[:100], separates nothing
    parts = re.split(r":(?![^\[]*\])", path.removeprefix(HUB_PREFIX))
    if not path.startswith(HUB_PREFIX) or len(parts) > 3 or not all(parts):
        raise DataError(f"{path}: not a hub id; write hub:org/name, hub:org/name:split or hub:org/name:config:split")
    if len(parts) == 2 and _SPLIT.fullmatch(parts[1]):
        return parts[0], None, parts[1]
    name, config, split = [*parts, None, None][:3]
    assert name is not None
    return name, config, split


def read_hub(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a hub data set in order.

    Args:
        path: `hub:org/name[:config][:split]`.

    Raises:
        DataError: not such a path, or the data set, configuration or split cannot be read (also: no network and no
            cached copy), or there are several splits and none is named.
        EnvironmentProblem: `datasets` is not installed.
    """
    name, config, split = parse_hub_path(path)
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise EnvironmentProblem(
            f"{path} needs the library datasets ({error}); install it with: pip install 'cpo-fast[data]'"
        ) from None
    try:
        table = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:240].rstrip(".")
        raise DataError(
            f"{path}: cannot be read from the Hugging Face hub ({first_line}); check id, configuration and split, "
            "download it while online, or give a file"
        ) from error
    if isinstance(table, dict):
        if len(table) != 1:
            named = f"{HUB_PREFIX}{name}" + (f":{config}" if config else "")
            raise DataError(f"{path}: choose a split, {' or '.join(f'{named}:{key}' for key in table)}")
        table = next(iter(table.values()))
    names = {key: feature.names for key, feature in table.features.items() if hasattr(feature, "names")}
    for row in table:
        yield {key: _label(value, names[key]) if key in names else value for key, value in row.items()}


def _label(value: int | None, names: list[str]) -> str | None:
    """The name of a class label, which is stored as an integer; -1 marks a hidden one."""
    return None if value is None or value < 0 else names[value]
