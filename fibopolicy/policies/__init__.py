"""Features and proprioception to action chunks."""

from fibopolicy.policies import (  # noqa: F401  (they register themselves)
    bc,
    bc_gaussian,
    bc_gmm,
    bc_rnn_gmm,
    bc_transformer_gmm,
    diffusion,
    flow,
)
from fibopolicy.policies.base import Policy, PolicyConfig, Shapes, build_policy, policy_names, register_policy
from fibopolicy.policies.run_directory import load_policy

__all__ = ["Policy", "PolicyConfig", "Shapes", "build_policy", "load_policy", "policy_names", "register_policy"]
