"""Placeholder."""

from pathlib import Path
from typing import Any


def trees_payload(run: Path, budget_bytes: int) -> dict[str, Any] | None:
    """None."""
    return None
