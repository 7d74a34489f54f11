"""Reading JSON files strictly into frozen dataclasses; errors name the file, the key and the fix."""

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from basemodel.common.errors import InputError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of values that a key may have."""

    min: float = -math.inf
    above: float = -math.inf
    max: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.min <= value <= self.max and self.above < value < self.below

    def __str__(self) -> str:
        if math.isfinite(self.min) and math.isfinite(self.max):
            return f"from {self.min} to {self.max}"
        bounds = {"at least": self.min, "more than": self.above, "at most": self.max, "below": self.below}
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound))


def key(meaning: str, default: Any = dataclasses.MISSING, **bounds: float) -> Any:
    """A config's field: its meaning, its default unless it is required, and the bounds of its Range."""
    allowed = Range(**bounds) if bounds else None
    return dataclasses.field(default=default, metadata={"meaning": meaning, "range": allowed})


def check_ranges(config: Any) -> None:
    """Raise InputError, naming the key, if a value of a config, or of a list in it, is out of range."""
    for field in dataclasses.fields(config):
        allowed, value = field.metadata.get("range"), getattr(config, field.name)
        numbers = value if isinstance(value, tuple) else [value]
        if allowed and any(number is not None and number not in allowed for number in numbers):
            or_null = " or null" if field.default is None else ""
            shown = list(value) if isinstance(value, tuple) else value
            raise InputError(f"{field.name} must be {allowed}{or_null}, not {shown}")


def read_config(config_class: type[Config], path: Path) -> Config:
    """Read a JSON object from `path` into the dataclass `config_class`. Raises InputError, naming file and
    key, for an unreadable file, unknown or missing keys, wrong types, and values that the class refuses."""
    return checked_config(config_class, read_json_object(path), path)


def checked_config(config_class: type[Config], values: dict[str, Any], source: Path | str) -> Config:
    """Make a config from a JSON object's values, checked as in `read_config`; errors name the `source`. A
    class with `from_old_keys` first rewrites keys that older versions named differently."""
    try:
        values = _without_old_keys(config_class, values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key in values:
        require_known(key, fields, source)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{source}: the key '{name}' is missing")
    hints = typing.get_type_hints(config_class)
    try:
        return config_class(**{key: _checked(key, value, hints[key]) for key, value in values.items()})
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def with_defaults(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config that an older version may have written, with current keys and all defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    return defaults | _without_old_keys(config_class, values)


def _without_old_keys(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    return config_class.from_old_keys(values) if hasattr(config_class, "from_old_keys") else values


def require_known(key: str, known: Iterable[str], source: Path | str) -> None:
    """Raise InputError, naming the nearest key, unless `key` is one of the `known`."""
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise InputError(f"{source}: unknown key '{key}'; did you mean '{nearest}'?")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object, rejecting repeated keys and NaN. Raises InputError with its path."""

    def object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):  # counted only then: a tokenizer.json has tens of thousands
            key = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{path}: the key '{key}' appears twice; keep one")
        return dict(pairs)

    def refuse_constant(name: str) -> NoReturn:
        raise InputError(f"{path}: {name} is not a JSON number")

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=object_once, parse_constant=refuse_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must contain a JSON object, {{...}}")
    return values


def _checked(key: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, or raise InputError. An integer counts as a float."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    for option in typing.get_args(hint) if is_union else (hint,):
        kind, arguments = typing.get_origin(option) or option, typing.get_args(option)
        if kind is typing.Literal and isinstance(value, str) and value in arguments:
            return value
        if kind is tuple and isinstance(value, list):
            hints = arguments[:1] * len(value) if arguments[-1] is ... else arguments
            if len(value) == len(hints):
                return tuple(_checked(key, each, hint) for each, hint in zip(value, hints, strict=True))
        if kind is dict and isinstance(value, dict):
            return {name: _checked(f"{key}.{name}", entry, arguments[1]) for name, entry in value.items()}
        if kind is float and type(value) in (int, float) and abs(value) < sys.float_info.max:
            return float(value)
        if kind is not float and type(value) is kind:
            return value
    raise InputError(f"{key} must be {described(hint)}, not {json.dumps(value)}")


def described(hint: Any) -> str:
    """Describe a type hint in the terms of JSON."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(json.dumps(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        first, *others = typing.get_args(hint)
        plural = "strings" if first is str else described(first)
        return f"a list of {plural}" if ... in others else f"a list of {1 + len(others)} numbers"
    if typing.get_origin(hint) is dict:
        return "a table"
    if typing.get_args(hint):
        return " or ".join(described(option) for option in typing.get_args(hint))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    return names[hint]
