"""Rows in a list, where the library `datasets` cannot be had: it needs pyarrow and pandas, a hundred megabytes of them.

TRL's trainers import that library at their top, and their constructors want a data set. The benchmarks hand token ids
to the trainer's own collator and loss, which never see a data set, so a constructor that is satisfied is enough.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any


class Dataset:
    """Rows of columns, as far as `DPOTrainer.__init__` asks for them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    @classmethod
    def from_list(cls, rows: list[dict[str, Any]]) -> "Dataset":
        """A data set of these rows."""
        return cls(list(rows))

    cache_files: tuple[()] = ()  # nothing of it is on disk

    @property
    def column_names(self) -> list[str]:
        """Names of the first row's columns."""
        return list(self._rows[0])

    def map(self, function: Callable[..., Any], fn_kwargs: dict[str, Any] | None = None, **options: Any) -> "Dataset":
        """Every row updated by what `function` returns for it, minus `remove_columns`."""
        dropped = options.get("remove_columns") or ()
        updated = [row | function(dict(row), **(fn_kwargs or {})) for row in self._rows]
        return Dataset([{name: row[name] for name in row if name not in dropped} for row in updated])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


class _StandIn(types.ModuleType):
    """A module in which every name is an empty class: enough for imports, annotations and `isinstance`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


def _can_be_imported(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # missing, or of a version that another library does not bear
        return False
    return True


STAND_INS = ("datasets", "datasets.fingerprint", "pandas", "pyarrow", "pyarrow.compute", "pyarrow.types")


def stand_in_for_datasets() -> list[str]:
    """Put `Dataset` and empty modules in the place of the libraries that are missing; returns their names."""
    missing = {name for name in ("pyarrow", "pandas") if not _can_be_imported(name)}
    if missing or not _can_be_imported("datasets"):
        missing.add("datasets")
    for name in STAND_INS:
        if name.split(".")[0] in missing:
            module = sys.modules[name] = _StandIn(name)
            module.__spec__ = ModuleSpec(name, None)  # libraries ask whether a module could be found
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)
    if "datasets" in missing:
        sys.modules["datasets"].Dataset = Dataset  # type: ignore[attr-defined]
    return sorted(missing)
