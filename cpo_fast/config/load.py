"""YAML and dotted overrides to a validated `Config`, and every way that can fail as one sentence.

Duplicate keys, unknown keys (with the nearest known name), wrong types and YAML syntax errors all become `ConfigError`
with the file, the key and the remedy.
"""

import copy
import difflib
import hashlib
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cpo_fast.config.sections import PRESETS, Config
from cpo_fast.errors import ConfigError


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a mapping with the same key twice."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:  # PyYAML keeps the last one silently
            raise ConfigError(
                f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}: key '{key}' appears twice; delete one of them"
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or none), apply `section.key=value` overrides in order, fill in the preset, validate.

    A top-level `preset: paper` (or `official`) supplies every value of that preset that the file and the overrides leave
    open. See `cpo_fast.config.sections`.

    Raises:
        ConfigError: the file is unreadable or not a mapping, a key is unknown or doubled, or a value has a wrong type.
    """
    values = {} if path is None else _read_yaml(Path(path))
    source = "command line" if path is None else str(path)
    for override in overrides:
        _apply_override(values, override)
    # last, so that file and overrides win over it, and an override may name it
    return validate_config(_with_preset(values, source), source)


def validate_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Turn plain nested dictionaries into a `Config`. `source` names where they came from in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(item, source) for item in error.errors())) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the sections. Loading it gives an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_hash(config: BaseModel) -> str:
    """First 16 hex digits of the SHA-256 of a section's canonical JSON, which name what produced a file."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the configuration is not UTF-8 text; save it as UTF-8") from None
    loader = _UniqueKeyLoader(text)
    loader.name = str(path)  # in the marks of errors
    try:
        values = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "syntax error"
        raise ConfigError(f"{where}: not valid YAML ({problem}); check indentation and quotes there") from None
    finally:
        loader.dispose()
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'train:', got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}' is not of the form section.key=value, such as train.lr=5e-6")
    try:
        value = yaml.safe_load(text)  # YAML 1.1 reads 5e-6 as text, of which pydantic makes a number
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': the value is not valid YAML; quote it") from None
    *sections, last = key.split(".")
    target = values
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
        target = inner
    target[last] = value


def _with_preset(values: dict[str, Any], source: str) -> dict[str, Any]:
    name = values.pop("preset", None)
    if name is None:
        return values
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"{source}: preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    merged = copy.deepcopy(PRESETS[name])  # the update below must not reach the preset itself
    for section, given in values.items():
        if isinstance(given, dict) and isinstance(merged.get(section), dict):
            merged[section].update(given)  # one level: no section holds another
        else:
            merged[section] = given
    return merged


def _sentence(item: Any, source: str) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] != "extra_forbidden":
        got = f", got {item['input']!r}" if not isinstance(item["input"], dict | BaseModel) else ""
        message = item["msg"].removeprefix("Value error, ")  # what pydantic puts before a validator's own sentence
        return f"{source}: {key or 'configuration'}: {message}{got}"
    nearest = difflib.get_close_matches(key, ["preset", *_known_keys(Config)], n=1, cutoff=0.5)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"{source}: unknown key '{key}'{hint}"


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.extend(_known_keys(field.annotation, f"{prefix}{name}."))
    return keys
