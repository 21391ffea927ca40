"""Rollouts over stored start states, episode rows, intervals, video."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fibopolicy.evaluation.api import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> object:
    # On demand: the processes of simulators import this package and must not load
    # torch.
    if name == "evaluate":
        from fibopolicy.evaluation.api import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
