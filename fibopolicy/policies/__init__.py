"""Features and proprioception to action chunks."""

from fibopolicy.policies import (
    bc,  # noqa: F401
    bc_gaussian,  # noqa: F401
    bc_gmm,  # noqa: F401
    bc_rnn_gmm,  # noqa: F401
    bc_transformer_gmm,  # noqa: F401
    diffusion,  # noqa: F401
    flow,  # noqa: F401
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
