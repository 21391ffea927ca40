"""The simulators' versions, told without importing them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from fibopolicy.utils.system import versions


def warn_of_versions(env_args: Mapping[str, Any]) -> None:
    """Warn when a dataset comes from another version of its simulator than is
    installed, with both versions.
    """
    told = env_args.get("env_version")
    if told is None:
        return
    suite = str(env_args.get("env_name")).partition("/")[0]
    package = (
        "robosuite" if env_args.get("type") == 1 else {"fibopolicy": "mujoco"}.get(suite, suite)
    )
    here = versions().get(package)
    if here is not None and str(told).split(".")[:2] != here.split(".")[:2]:
        warnings.warn(
            f"the data come from {package} {told}, and {here} is installed: replay some before"
            " relying on them",
            stacklevel=3,
        )
