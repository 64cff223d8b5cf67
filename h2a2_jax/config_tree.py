"""Dataclasses from nested plain values and back, with every misfit named by its key."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from h2a2_jax.errors import InputError


def as_config_dict(config: Any) -> ConfigDict:
    """A dataclass as a ConfigDict; None keeps the type that may stand there, so that a flag can set it."""
    result, hints = ConfigDict(), typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), _without_none(hints[f.name])
        if dataclasses.is_dataclass(value):
            value = as_config_dict(value)
        elif value is None and isinstance(kind, type) and not dataclasses.is_dataclass(kind):
            value = placeholder(kind)
        result[f.name] = value
    return result


def _without_none(kind: Any) -> Any:
    """T for T | None."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def build(kind: Any, value: Any, path: str) -> Any:
    """A value of an annotated type from plain containers, which must fit exactly.

    Args:
        kind: dataclass, tuple, Literal, float (an int will do), int, str, bool, or one of them or None.
        value: mappings for dataclasses, lists for tuples.
        path: dotted key of the value, for messages; "" at the top.

    Raises:
        InputError: an unknown key, with the nearest known one; a missing key; a value of another type.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, path)
    if _without_none(kind) is not kind:
        return None if value is None else build(_without_none(kind), value, path)
    if typing.get_origin(kind) is tuple:
        return _tuple(kind, value, path)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise InputError(f"{path} is {value!r}; expected one of {', '.join(map(repr, choices))}.")
        return value
    if kind is float and isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise wrong_type(path, value, kind.__name__)


def _dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        keys = ", ".join(f.name for f in dataclasses.fields(kind))
        raise wrong_type(path, value, f"a group with the keys {keys}")
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            nearest = difflib.get_close_matches(str(key), hints, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
            raise InputError(f"unknown config key '{prefix}{key}'{hint} (keys there: {', '.join(hints)})")
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise InputError(f"config key '{prefix}{f.name}' is missing; expected {_kind_name(hints[f.name])}.")
    return kind(**{key: build(hints[key], entry, f"{prefix}{key}") for key, entry in value.items()})


def _tuple(kind: Any, value: Any, path: str) -> tuple:
    kinds = typing.get_args(kind)
    if not isinstance(value, list | tuple):
        raise wrong_type(path, value, _kind_name(kind))
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise InputError(f"{path} has {len(value)} entries ({list(value)}); expected {_kind_name(kind)}.")

    def key(index: int, entry: Any) -> str:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        return f"{path}.{index if name is None else name}"

    return tuple(build(part, entry, key(i, entry)) for i, (part, entry) in enumerate(zip(kinds, value, strict=True)))


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        many = "any number of" if parts[-1] is Ellipsis else str(len(parts))
        return f"a list of {many} {_kind_name(parts[0])}"
    return getattr(kind, "__name__", str(kind))


def leaves_of(config: Any) -> dict[str, object]:
    """The values of a dataclass by dotted key; entries of a tuple that have a name, by that."""
    return _leaves("", dataclasses.asdict(config))


def _leaves(path: str, value: object) -> dict[str, object]:
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, tuple) and value and isinstance(value[0], dict):
        entries = {str(entry.get("name", i)): entry for i, entry in enumerate(value)}.items()
    else:
        return {path: value}
    return {k: v for key, entry in entries for k, v in _leaves(f"{path}.{key}" if path else str(key), entry).items()}


def wrong_type(path: str, value: Any, expected: str) -> InputError:
    """The sentence for a value of another type."""
    return InputError(f"{path or 'the config'} is {value!r} ({type(value).__name__}); expected {expected}.")
