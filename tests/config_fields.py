"""Every field of every section, by its dotted key, and what a text on the command line means for its type."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from cpo_fast.config import Config


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of the fields that hold values."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def is_what_was_passed(kind: Any, text: str, value: Any) -> bool:
    """Whether `value` is what `text` says for this type. Written without the code that reads it."""
    options = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None:
        return type(None) in options and text.strip() in ("", "null", "~", "Null", "NULL")
    if isinstance(value, bool):
        truth = text.strip().lower()
        return truth in (("1", "on", "t", "true", "y", "yes") if value else ("0", "off", "f", "false", "n", "no"))
    if isinstance(value, int | float) and not any(get_origin(option) is Literal for option in options):
        return float(text.strip().replace("_", "")) == float(value)
    if isinstance(value, tuple):
        return text.strip()[:1] == "["
    if any(get_origin(option) is Literal for option in options):
        return text.strip() == str(value)
    return bool(text == value)
