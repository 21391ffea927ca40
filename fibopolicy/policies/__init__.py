"""Features and proprioception to action chunks."""

from fibopolicy.policies import bc  # noqa: F401  (registers itself)
from fibopolicy.policies.base import Policy, PolicyConfig, Shapes, build_policy, policy_names, register_policy

__all__ = ["Policy", "PolicyConfig", "Shapes", "build_policy", "policy_names", "register_policy"]
