"""Evaluation of policies in simulation, on stored initial states; acting on a robot."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fibopolicy.evaluation.evaluate import evaluate_policy
    from fibopolicy.evaluation.policy_runner import PolicyRunner

__all__ = ["PolicyRunner", "evaluate_policy"]


def __getattr__(name: str) -> object:
    # Lazy: simulator processes import this package and must not load torch.
    if name == "evaluate_policy":
        from fibopolicy.evaluation.evaluate import evaluate_policy

        return evaluate_policy
    if name == "PolicyRunner":
        from fibopolicy.evaluation.policy_runner import PolicyRunner

        return PolicyRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
