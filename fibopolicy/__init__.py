"""Visuomotor policies with Fibottention, trained by behaviour cloning and measured in
simulation.
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fibopolicy.encoders.convert import convert
    from fibopolicy.evaluation.policy_runner import load

__all__ = ["convert", "load"]


def __getattr__(name: str) -> object:
    # On demand: `import fibopolicy` alone must not import torch.
    if name == "convert":
        from fibopolicy.encoders.convert import convert

        return convert
    if name == "load":
        from fibopolicy.evaluation.policy_runner import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
