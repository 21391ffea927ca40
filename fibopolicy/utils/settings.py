"""Compare settings as plain JSON documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def first_difference(there: Any, now: Any, name: str = "") -> str:
    """Describe the first setting in which two documents differ; empty if they are equal. A
    missing setting counts as `None`.

    Lists are compared entry by entry; lists of different lengths differ as a whole.

    >>> first_difference({"steps": 10, "optimizer": {"betas": [0.9, 0.95]}}, {"steps": 10, "optimizer": {"betas": [0.9, 0.99]}})
    'optimizer.betas[1] = 0.95 there, 0.99 now'

    Args:
        name: prefix of the setting's name.
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
    return next((found for key, a, b in pairs if (found := first_difference(a, b, key))), "")


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names, in one dictionary."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        found |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _brief(value: Any) -> str:
    """A value as short text; if it has a name, only its name."""
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]"
    return (
        str(value.get("name") or value.get("task") or value)
        if isinstance(value, dict)
        else str(value)
    )
