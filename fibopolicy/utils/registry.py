"""A registry: maps the names that a user may write to objects."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from fibopolicy.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name. An entry given as "module:attribute" is imported at its first
    use.

    Args:
        kind: what an entry is, for messages: "encoder".
        lazy: entries that are imported at their first use, as "module:attribute".
    """

    def __init__(self, kind: str, lazy: dict[str, str] | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = dict(lazy or {})

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry."""

        def add(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        """Raise `UserError` with the closest name if there is no such entry."""
        if name not in self._entries:
            raise unknown(self.kind, name, self.names())
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = cast(T, getattr(importlib.import_module(module), attribute))
            self._entries[name] = entry
        return entry
