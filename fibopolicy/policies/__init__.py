"""Policies: observations to chunks of actions."""

from fibopolicy.policies import (
    bc,  # noqa: F401
    diffusion,  # noqa: F401
)
from fibopolicy.policies.base import (
    Policy,
    PolicyConfig,
    Shapes,
    build_policy,
    register_policy,
)
from fibopolicy.policies.run_directory import load_policy

__all__ = [
    "Policy",
    "PolicyConfig",
    "Shapes",
    "build_policy",
    "load_policy",
    "register_policy",
]
