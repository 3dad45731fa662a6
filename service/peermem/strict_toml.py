"""Makes a frozen struct of one TOML file and environment variables, or says everything that is wrong.

Rules of this file:

* A problem is one sentence: where it stands (the file, or the variable), its key, its value, what was expected.
* Every key must be a field; a variable's name is the prefix and the key path, upper case, joined by _.
* Text and types that are made of text are written as they are in a variable, everything else as TOML.
* A field's type is bool, a bounded int, a Literal of texts or of numbers, a struct, a mapping, a class with `expected`
  whose constructor raises ValueError, a tuple of these, or a tuple of structs of several kinds, told apart by their
  field `kind`; the first is meant where that is left out. Empty text is None in a field that may be None.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

S = TypeVar("S", bound=msgspec.Struct)
Contradiction = tuple[str, str]
"""The key that it is about, and a sentence that starts with that key."""


class ConfigError(Exception):
    """The configuration is refused; `problems` holds one sentence for each thing that is wrong."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def read_file(path: Path) -> dict[str, Any]:
    """Return the table in a file. Raises ConfigError, and FileNotFoundError where there is none."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError([f"{path}: it can't be read: {error.strerror}."]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: it is not UTF-8 text, from byte {error.start} on."]) from error
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).removesuffix(")").rpartition(" (at ")
        raise ConfigError([f"{path}: {where}: this is not TOML: {what}."]) from error


def build(
    kind: type[S],
    table: Mapping[str, Any],
    file: Path,
    variables: Mapping[str, str],
    prefix: str,
    check: Callable[[S], Iterable[Contradiction]],
) -> S:
    """Return a `kind` of the table of `file`, with `variables` on top, all of which start with `prefix`.

    `check` finds what is wrong between valid values. Raises ConfigError.
    """
    builder = _Builder(str(file), _overrides(kind, variables, prefix))
    builder.problems += _unknown_variables(kind, variables, prefix)
    struct = builder.struct(kind, table, "")
    if not builder.problems:
        builder.problems += [f"{builder.where(key)}: {sentence}" for key, sentence in check(struct)]
    if builder.problems:
        raise ConfigError(builder.problems)
    return struct  # type: ignore[no-any-return]


class _Builder:
    """Walks types and values together, and notes each problem instead of stopping at it."""

    def __init__(self, file: str, overrides: Mapping[str, tuple[str, object]]) -> None:
        self.problems: list[str] = []
        self._file = file
        self._overrides = overrides

    def struct(self, kind: Any, table: object, path: str) -> Any:
        """Return a `kind`; None when there are problems."""
        if not isinstance(table, Mapping):
            return self._refuse(path, table, "a table")
        fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
        for key in sorted(table.keys() - fields.keys()):
            self.problems.append(f"{self.where(path)}: {_join(path, key)} is no option{_nearest(key, fields, path)}.")
        values = {}
        for key, field in fields.items():
            here = _join(path, key)
            if here in self._overrides:
                values[field.name] = self._value(field.type, self._overrides[here][1], here)
            elif _is_struct(field.type):
                values[field.name] = self.struct(field.type, table.get(key, {}), here)
            elif key in table:
                values[field.name] = self._value(field.type, table[key], here)
            elif field.required:
                self.problems.append(f"{self.where(path)}: {here} is missing: expected {_expected(field.type)}.")
        return None if self.problems else kind(**values)

    def _value(self, kind: Any, value: object, path: str) -> Any:
        inner = _without_none(kind)
        if inner is not kind and value == "":
            return None
        if get_origin(inner) is tuple:
            if not isinstance(value, list):
                return self._refuse(path, value, _expected(kind))
            return tuple(self._item(get_args(inner)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if get_origin(inner) is Mapping and isinstance(value, dict):
            of_key, of_value = get_args(inner)
            return {
                self._value(of_key, key, f"{path} key"): self._value(of_value, item, _join(path, key))
                for key, item in value.items()
            }
        try:
            return msgspec.convert(value, inner, dec_hook=_make)
        except msgspec.ValidationError:
            return self._refuse(path, value, _expected(kind))

    def _item(self, kind: Any, value: object, path: str) -> Any:
        """Return one item of a list."""
        structs = _structs(kind)
        if len(structs) < 2 or not isinstance(value, Mapping):
            return self.struct(structs[0], value, path) if structs else self._value(kind, value, path)
        by_kind = {_kind(struct): struct for struct in structs}
        chosen = value.get("kind", _kind(structs[0]))
        if chosen not in list(by_kind):
            return self._refuse(f"{path}.kind", chosen, _one_of(by_kind))
        return self.struct(by_kind[chosen], value, path)

    def _refuse(self, path: str, value: object, expected: str) -> None:
        self.problems.append(f"{self.where(path)}: {path} is {repr(value)[:80]}: expected {expected}.")

    def where(self, path: str) -> str:
        """Return what to edit: the variable that sets this key or a table around it, or the file."""
        for key, (variable, _) in self._overrides.items():
            if path == key or path.startswith((f"{key}.", f"{key}[", f"{key} ")):
                return variable
        return self._file


def _options(kind: Any, prefix: str, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the variable, the key path and the type of each option."""
    for field in msgspec.structs.fields(kind):
        variable, here = prefix + field.encode_name.upper(), _join(path, field.encode_name)
        if _is_struct(field.type):
            yield from _options(field.type, f"{variable}_", here)
        else:
            yield variable, here, field.type


def _overrides(kind: Any, variables: Mapping[str, str], prefix: str) -> dict[str, tuple[str, object]]:
    """Return the variable and its value by key path."""
    return {
        path: (variable, _from_text(variables[variable], option))
        for variable, path, option in _options(kind, prefix)
        if variable in variables
    }


def _unknown_variables(kind: Any, variables: Mapping[str, str], prefix: str) -> list[str]:
    known = [variable for variable, _, _ in _options(kind, prefix)]
    unknown = sorted(variables.keys() - set(known))
    return [f"environment: {variable} is no option{_nearest(variable, known)}." for variable in unknown]


def _from_text(text: str, kind: Any) -> object:
    inner = _without_none(kind)
    if (get_origin(inner) is Literal and isinstance(get_args(inner)[0], str)) or hasattr(inner, "expected"):
        return text
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def _make(kind: type, value: object) -> object:
    if issubclass(kind, str) and not isinstance(value, str):
        raise ValueError("not a text")
    return kind(value)


def _expected(kind: Any) -> str:
    inner = _without_none(kind)
    if get_origin(inner) is Literal:
        text = _one_of(get_args(inner))
    elif inner is bool:
        text = "true or false"
    elif get_origin(inner) is tuple:
        item = get_args(inner)[0]
        text = "a list of tables" if _structs(item) else f"a list, each {_expected(item)}"
    elif get_origin(inner) is Mapping:
        text = "a table"
    elif isinstance(bounds := msgspec.inspect.type_info(inner), msgspec.inspect.IntType):
        text = f"a whole number from {bounds.ge} to {bounds.le}"
    else:
        text = inner.expected
    return text if inner is kind else f"{text}, or empty for none"


def _one_of(choices: Iterable[object]) -> str:
    return "one of " + ", ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)


def _structs(kind: Any) -> tuple[Any, ...]:
    """Return the structs that an item may be; none for an item that is no struct."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return parts if all(map(_is_struct, parts)) else ()


def _kind(struct: Any) -> Any:
    """Return what the field `kind` of a struct holds."""
    (field,) = (field for field in msgspec.structs.fields(struct) if field.name == "kind")
    return field.default


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _without_none(kind: Any) -> Any:
    """Return X of `X | None`, and anything else as it is."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    return kind


def _nearest(word: str, known: Collection[str], path: str = "") -> str:
    (match,) = difflib.get_close_matches(word, known, 1, cutoff=0)
    return f"; the nearest is {_join(path, match)}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
