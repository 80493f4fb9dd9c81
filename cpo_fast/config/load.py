"""YAML and dotted overrides to a validated `Config`, and every way that can fail as one sentence.

A value has the type of its field, and not the one that YAML would guess: `off` is text for a setting that may be `off` and
false for a switch, `010` is ten, and a path is what it looks like. An override is what the shell passed, unchanged: `#`,
quotes, colons and spaces are part of it. Only a field that holds a list or a mapping takes one written as in YAML,
`[a, b]`. `null`, or nothing at all, leaves open a field that may be left open.

Duplicate keys, unknown keys (with the nearest known name), wrong types and YAML syntax errors all become `ConfigError`
with the file, the key and the remedy.
"""

import copy
import difflib
import hashlib
import json
import re
import reprlib
import types
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cpo_fast.config.other_names import hint
from cpo_fast.config.presets import PRESETS
from cpo_fast.config.sections import Config
from cpo_fast.errors import ConfigError
from cpo_fast.files import write_atomic

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?[0-9]{1,300}", re.ASCII)  # Python reads no number of thousands of digits
_NOT_FINITE = re.compile(r"[+-]?\.(inf|nan)", re.ASCII | re.IGNORECASE)  # as YAML writes them
_NULLS = ("", "~", "null", "Null", "NULL")
_SHOWN = reprlib.Repr()  # of a wrong value, as much as a sentence bears
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80


class _Plain(str):
    """A scalar that stood in a file without quotes: its field says what it is."""


class _Shell(str):
    """The value of an override."""


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that leaves scalars as they stand, and refuses a mapping with the same key twice."""


def _mapping(loader: _PlainLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        where = f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            found = "nothing" if key is None else f"a {key_node.id}"
            raise ConfigError(f"{where}: a key is a word, such as 'train', and this one is {found}; mend the line")
        if key in seen:  # PyYAML keeps the last one silently
            raise ConfigError(f"{where}: key '{key}' appears twice; delete one of them")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _plain(loader: _PlainLoader, node: yaml.ScalarNode) -> str:
    return _Plain(node.value)


_PlainLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _tag in ("bool", "int", "float", "timestamp", "value", "merge"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _plain)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or none), apply `section.key=value` overrides in order, fill in the preset, validate.

    A top-level `preset: paper` (or `official`) supplies every value of that preset that the file and the overrides leave
    open. See `cpo_fast.config.sections`.

    Raises:
        ConfigError: the file is unreadable or not a mapping, a key is unknown or doubled, or a value has a wrong type, or
            `run` is no folder.
    """
    values = {} if path is None else _read_yaml(Path(path))
    source = "command line" if path is None else str(path)
    given: dict[str, str] = {}
    values = _typed(Config, values)
    for override in overrides:
        _apply_override(values, override, given)
    # last, so that file and overrides win over it, and an override may name it
    config = _validated(_with_preset(values, source), source, given)
    _check_folder(config.run)
    return config


def validate_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Turn plain nested dictionaries into a `Config`. `source` names where they came from in errors."""
    return _validated(values, source, {})


def _validated(values: dict[str, Any], source: str, given: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(item, source, given) for item in error.errors())) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the sections. Loading it gives an equal `Config`."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(value: Any) -> str:
    """YAML in the value's order, in any script. Loading it gives an equal value."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    # written as they are, these are line breaks to YAML, which reads them as blanks
    return yaml.safe_dump(value, sort_keys=False) if {"\x85", "\u2028", "\u2029"} & set(text) else text


def keep_config(path: Path, config: Config) -> None:
    """Write the resolved configuration to `path`, unless that says the same: a file with comments stays as it is."""
    with suppress(ConfigError):
        if load_config(path) == config:
            return
    write_atomic(path, dump_config(config))


def config_hash(config: BaseModel) -> str:
    """First 16 hex digits of the SHA-256 of a section's canonical JSON, which name what produced a file."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        is_override = "=" in path.name and not path.exists()
        remedy = f"the file comes first: CONFIG.yaml {path}" if is_override else "check the path"
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the configuration is not UTF-8 text; save it as UTF-8") from None
    except ValueError as error:  # a path with a null character
        raise ConfigError(f"{str(path)!r}: cannot read the configuration ({error}); check the path") from None
    try:
        values = _parse(text, str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({_problem(error)}); check indentation and quotes there") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; sections hold values, and no further sections") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'train:', got {_kind_of(values)}")
    return values


def _parse(text: str, name: str) -> Any:
    loader = _PlainLoader(text)
    loader.name = name  # in the marks of errors
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or getattr(error, "reason", None) or "syntax error")


def _kind_of(value: Any) -> str:
    return "text" if isinstance(value, str) else type(value).__name__


def _apply_override(values: dict[str, Any], override: str, given: dict[str, str]) -> None:
    key, separator, text = override.partition("=")
    shown = _SHOWN.repr(override)
    if not separator or not key:
        raise ConfigError(f"override {shown} is not of the form section.key=value, such as train.lr=5e-6")
    *sections, last = key.split(".")
    target, kind = values, Config
    for section in sections:
        kind = _kind_below(kind, section)
        if target.get(section) is None:
            target[section] = {}
        inner = target[section]
        if not isinstance(inner, dict) or not _holds_keys(kind):
            raise ConfigError(f"override {shown}: '{section}' is a value, not a section")
        target = inner
    try:
        target[last] = _typed(_kind_below(kind, last), _Shell(text))
    except (yaml.YAMLError, RecursionError) as error:
        problem = _problem(error) if isinstance(error, yaml.YAMLError) else "nested too deeply"
        raise ConfigError(f"override {shown}: the value is not valid YAML ({problem}); quote what is in it") from None
    except ConfigError as error:  # of a mapping's keys
        raise ConfigError(f"override {shown}: {error}") from None
    given[key] = shown


def _kind_below(kind: Any, key: str) -> Any:
    """The type of a section's field or of a mapping's value, `Any` where there is none of that name."""
    for option in _options(kind):
        if _is_model(option) and key in option.model_fields:
            return option.model_fields[key].annotation
        if get_origin(option) is dict:
            return get_args(option)[1]
    return Any


def _holds_keys(kind: Any) -> bool:
    # what is not known is refused by its name later on
    return kind is Any or any(_is_model(option) or get_origin(option) is dict for option in _options(kind))


def _options(kind: Any) -> tuple[Any, ...]:
    """The types that a value may have, each without its annotations."""
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(option for each in get_args(kind) for option in _options(each))
    return (kind,)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_list(kind: Any) -> bool:
    return (get_origin(kind) or kind) in (tuple, list)


def _typed(kind: Any, value: Any) -> Any:
    """A value of a file or an override, read as the field's type says. What does not fit stays, for validation."""
    options = _options(kind)
    if isinstance(value, _Shell):
        value = _from_shell(options, value)
    if value is None and _is_model(options[0]):
        return {}  # a section without a line
    if isinstance(value, dict):
        return {key: _typed(_kind_below(kind, key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        items = next((get_args(option) for option in options if _is_list(option) and get_args(option)), (Any,))
        is_uniform = len(items) != len(value) or items[-1] is Ellipsis or len(items) == 1
        return [_typed(items[0] if is_uniform else items[place], inner) for place, inner in enumerate(value)]
    return _scalar(options, value) if isinstance(value, _Plain) else value


def _scalar(options: tuple[Any, ...], value: str) -> Any:
    text = value.strip()
    for option in options:
        if get_origin(option) is Literal:
            for choice in get_args(option):
                if str(choice) == text:
                    return choice
    if str in options:
        return str(value)
    if Any in options:  # nothing says what it is
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            return text
    if int in options and _WHOLE.fullmatch(text):
        return int(text)
    if float in options and _NUMBER.fullmatch(text):
        return int(text) if _WHOLE.fullmatch(text) else float(text)
    if float in options and _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text  # pydantic knows how switches are written


def _from_shell(options: tuple[Any, ...], value: str) -> Any:
    """What an override says: a list or a mapping for fields that hold one, and else its text."""
    text = value.strip()
    # a path may be called ~
    if type(None) in options and (text in _NULLS if str not in options else value in ("", "null")):
        return None
    holds_more = any(_is_model(each) or _is_list(each) or get_origin(each) is dict or each is Any for each in options)
    if not holds_more or text[:1] not in ("[", "{"):
        return _Plain(value)
    node = yaml.compose(text, _PlainLoader)
    if text.count("#") != sum(text[first:end].count("#") for first, end in _scalar_places(node)):
        raise yaml.MarkedYAMLError(problem="a # that begins a comment")
    return _parse(text, "command line")


def _scalar_places(node: Any) -> list[tuple[int, int]]:
    """Where scalars begin and end in the text."""
    if isinstance(node, yaml.ScalarNode):
        return [(node.start_mark.index, node.end_mark.index)]
    pairs = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
    return [place for inner in pairs for place in _scalar_places(inner)]


def _with_preset(values: dict[str, Any], source: str) -> dict[str, Any]:
    name = values.pop("preset", None)
    if name is None:
        return values
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"{source}: preset: expected one of {', '.join(PRESETS)}, got {_SHOWN.repr(name)}")
    merged = copy.deepcopy(PRESETS[name])  # the update below must not reach the preset itself
    for section, given in values.items():
        if isinstance(given, dict) and isinstance(merged.get(section), dict):
            merged[section].update(given)  # one level: no section holds another
        else:
            merged[section] = given
    train = values.get("train")
    if isinstance(train, dict) and train.get("max_steps") is not None and "num_epochs" not in train:
        merged["train"].pop("num_epochs")  # steps that are asked for do not end with a preset's passes
    return merged


def _check_folder(run: str) -> None:
    """Refuse a run folder that a file stands in the way of."""
    path = Path(run)
    try:
        for place in (path, *path.parents):
            if place.exists():
                if not place.is_dir():
                    raise ConfigError(f"run: {place} is a file, where a folder is due; choose another folder")
                return
    except OSError as error:
        raise ConfigError(f"run: {_SHOWN.repr(run)} cannot be a folder ({error.strerror}); choose another") from None


def _sentence(item: Any, source: str, given: Mapping[str, str]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    prefixes = [".".join(location[: count + 1]) for count in range(len(location))]
    override = next((given[prefix] for prefix in reversed(prefixes) if prefix in given), None)
    source = source if override is None else f"override {override}"
    if item["type"] != "extra_forbidden":
        got = f", got {_SHOWN.repr(item['input'])}" if not isinstance(item["input"], dict | BaseModel) else ""
        message = item["msg"].removeprefix("Value error, ")  # what pydantic puts before a validator's own sentence
        if item["type"] in ("tuple_type", "list_type"):
            message = "expected a list, such as [a, b]"
        choices = re.findall(r"'([^']*)'", item["ctx"]["expected"]) if item["type"] == "literal_error" else []
        return f"{source}: {key or 'configuration'}: {message}{got}{_nearest(str(item['input']), choices)}"
    nearest = hint(key) or _nearest(key, ["preset", *_known_keys(Config)])
    return f"{source}: unknown key '{_SHOWN.repr(key)[1:-1]}'{nearest}"


def _nearest(word: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.extend(_known_keys(field.annotation, f"{prefix}{name}."))
    return keys
