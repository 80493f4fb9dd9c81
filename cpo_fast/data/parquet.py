"""Rows to parquet and back. pyarrow is optional and imported when a parquet file is met."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpo_fast.errors import DataError, EnvironmentProblem


def write_parquet(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with equal keys, atomically; equal rows give equal bytes with the same version of pyarrow.

    Raises:
        EnvironmentProblem: pyarrow is not installed. DataError: a text holds what UTF-8 cannot.
    """
    pyarrow = _pyarrow(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        table = pyarrow.Table.from_pylist(list(rows))
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: a text is not valid Unicode ({error}); write .jsonl, which can escape it") from None
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        pyarrow.parquet.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_parquet(path: str | Path) -> list[dict[str, Any]]:
    """Every row, in file order.

    Raises:
        EnvironmentProblem: pyarrow is not installed. DataError: the file is missing or no parquet.
    """
    pyarrow = _pyarrow(path)
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(str(path)).to_pylist()
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror or error}); check the path") from None
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); make it again") from None
    return rows


def _pyarrow(path: str | Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise EnvironmentProblem(f'{path}: parquet needs pyarrow; pip install "cpo-fast[data]"') from None
    return pyarrow
