"""Options out of a file that anybody may have written: each is checked for its type as it is read."""

import dataclasses
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..files import read_json

T = TypeVar("T")


class Options:
    """The keys of a JSON object or dict; `where` is named by every error."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{where}: must hold named options, got {type(values).__name__}")
        self.where = where
        self.values: dict[str, Any] = values

    @classmethod
    def of_file(cls, path: Path) -> "Options":
        return cls(str(path), read_json(path))

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The value of `key`; `default` where it is missing or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not _is_a(value, kind):
            raise ValueError(f"{self.where}: {key} must be {kind.__name__}, got {value!r}")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        if self.values.get(key) is None:
            raise ValueError(f"{self.where}: {key} is missing")
        return self.get(key, kind, kind())

    def must_be(self, key: str, expected: Any, default: Any) -> None:
        """Refuse any value of `key` but the one that a GPT can express."""
        value = self.values.get(key)
        value = default if value is None else value
        if value != expected:
            raise ValueError(f"{self.where}: {key} must be {expected!r}, got {value!r}")

    def check_fields(self, cls: type) -> None:
        """Check the values against the annotations of a dataclass."""
        for key, hint in get_type_hints(cls).items():
            if key in self.values and not _is_a(self.values[key], hint):
                expected = getattr(hint, "__name__", hint)
                raise ValueError(
                    f"{self.where}: {key} must be {expected}, got {self.values[key]!r}"
                )


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):  # a union
        return any(_is_a(value, each) for each in get_args(hint))
    if hint in (int, float):  # JSON writes 10000.0 as 10000; true is no number
        kinds = int if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    return isinstance(value, NoneType if hint is None else hint)
