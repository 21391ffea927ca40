"""Evaluation of policies in simulation, on stored initial states."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fibopolicy.evaluation.evaluate import evaluate_policy

__all__ = ["evaluate_policy"]


def __getattr__(name: str) -> object:
    # Lazy: simulator processes import this package and must not load torch.
    if name == "evaluate_policy":
        from fibopolicy.evaluation.evaluate import evaluate_policy

        return evaluate_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
