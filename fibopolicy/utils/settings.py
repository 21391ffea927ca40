"""Settings as plain JSON documents: where two of them differ."""

from __future__ import annotations

from typing import Any


def first_difference(there: Any, now: Any, name: str = "") -> str:
    """The first setting of two documents that differs, in words; empty if none does. A
    missing setting is `None`.

    Entries of a list go by their index, unless the lists differ in length: those differ
    as a whole.

    >>> first_difference({"steps": 10, "optimizer": {"betas": [0.9, 0.95]}}, {"steps": 10, "optimizer": {"betas": [0.9, 0.99]}})
    'optimizer.betas[1] = 0.95 there, 0.99 now'

    Args:
        name: of the documents, which begins the setting's name.
    """  # noqa: E501
    if there == now:
        return ""
    if isinstance(there, dict) and isinstance(now, dict):
        pairs = [
            (f"{name}.{key}" if name else str(key), there.get(key), now.get(key))
            for key in {**there, **now}
        ]
    elif isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(there, now, strict=True))]
    else:
        return f"{name} = {_brief(there)} there, {_brief(now)} now"
    return next((told for key, a, b in pairs if (told := first_difference(a, b, key))), "")


def _brief(value: Any) -> str:
    """A value in a word: of what has a name, that alone."""
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]"
    return (
        str(value.get("name") or value.get("task") or value)
        if isinstance(value, dict)
        else str(value)
    )
