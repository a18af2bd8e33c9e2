"""YAML and ``--set`` to :class:`lavcap.config.Config` and back, every key and type checked.

A file may start with ``base: other.yaml`` (relative to itself) and then holds only what differs. A section that offers
a choice has ``kind``; naming another kind than the base's drops the base's other settings of that section.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from lavcap.config import Config


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a YAML file, with ``key.sub=value`` settings on top.

    Raises:
        ValueError: an unknown key, kind or value, or a value of another type; the message names the section, what was
            given and what is known.
        FileNotFoundError: no such file.
    """
    settings = _read(Path(path), ())
    for override in overrides:
        settings = _merge(settings, _parse_override(override))
    return config_from_dict(settings)


def config_from_dict(settings: dict[str, Any]) -> Config:
    """A config from nested plain values, checked."""
    return _build(Config, settings, "")


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values that :func:`config_from_dict` reads back."""
    settings = plain(config)
    assert isinstance(settings, dict)
    return settings


def save_config(config: Config, path: str | Path) -> None:
    """Write every setting of ``config`` as YAML."""
    Path(path).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ValueError(f"{path}: 'base' goes round in a circle: {', '.join(map(str, seen))}")
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}; those of the package are in examples/lavcap/configs")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: must hold 'section: ...' lines, got {type(settings).__name__}")
    base = settings.pop("base", None)
    return settings if base is None else _merge(_read(path.parent / base, (*seen, path.resolve())), settings)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set takes key.sub=value, got {override!r}")
    settings: Any = yaml.safe_load(value)
    for part in reversed(key.strip().split(".")):
        settings = {part: settings}
    return settings


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    if "kind" in top and top["kind"] != base.get("kind"):
        return top
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(cls: type, settings: Any, section: str) -> Any:
    where = f"section '{section}'" if section else "the config"
    if not isinstance(settings, dict):
        raise ValueError(f"{where} takes keys of its own, got {settings!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in settings:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}; it has: {', '.join(map(str, known)) or 'no keys'}")
    given = {key: _with_default_kind(known[key], value) for key, value in settings.items()}
    return cls(**{key: _value(hints[key], value, f"{section}.{key}".lstrip(".")) for key, value in given.items()})


def _with_default_kind(field: dataclasses.Field[Any], value: Any) -> Any:
    """A section that offers a choice and names none is of the kind that is the default."""
    kind = getattr(field.default_factory, "kind", None)
    return {"kind": kind} | value if kind is not None and isinstance(value, dict) and "kind" not in value else value


def _value(kind: Any, value: Any, key: str) -> Any:
    """``value`` as the type that the field ``key`` is declared to have."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        options = tuple(o for o in options if o is not type(None))
        return _value(options[0], value, key) if len(options) == 1 else _one_of(options, value, key)
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, key)
    if issubclass(kind, Enum):
        return _enum(kind, value, key)
    if kind is float:
        return _float(value, key)
    if type(value) is not kind:
        raise ValueError(f"{key} takes {_NAMES[kind]}, got {value!r}")
    return value


def _one_of(options: tuple[Any, ...], value: Any, key: str) -> Any:
    by_kind = {option.kind: option for option in options}
    kinds = ", ".join(by_kind)
    if not isinstance(value, dict) or "kind" not in value:
        raise ValueError(f"section '{key}' needs 'kind', one of: {kinds}; got {value!r}")
    if value["kind"] not in by_kind:
        raise ValueError(f"{key}.kind is one of: {kinds}; got {value['kind']!r}")
    return _build(by_kind[value["kind"]], {k: v for k, v in value.items() if k != "kind"}, key)


def _enum(kind: type[Enum], value: Any, key: str) -> Enum:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{key} is one of: {', '.join(str(m.value) for m in kind)}; got {value!r}") from None


def _float(value: Any, key: str) -> float:
    """Numbers; also "5e-6", which YAML 1.1 takes for a word for want of a dot."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{key} takes {_NAMES[float]}, got {value!r}")


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def plain(value: Any) -> Any:
    """A config, or a part of one, as nested plain values."""
    if isinstance(value, Enum):
        return value.value
    if not dataclasses.is_dataclass(value):
        return value
    settings = {} if not hasattr(value, "kind") else {"kind": value.kind}
    return settings | {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
