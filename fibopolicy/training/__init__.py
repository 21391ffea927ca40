"""Training: configuration, loop, checkpoints."""

from typing import TYPE_CHECKING

from fibopolicy.training.config import ComputeConfig, OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from fibopolicy.training.loop import train

__all__ = ["ComputeConfig", "OptimizerConfig", "TrainConfig", "train"]


def __getattr__(name: str) -> object:
    # On demand: the command line reads configurations, and the loop brings TensorBoard
    # with it.
    if name == "train":
        from fibopolicy.training.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
