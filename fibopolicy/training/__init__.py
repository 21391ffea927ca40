"""Training: configuration, loop, checkpoints."""

from typing import TYPE_CHECKING

from fibopolicy.training.config import ComputeConfig, OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from fibopolicy.training.trainer import train

__all__ = ["ComputeConfig", "OptimizerConfig", "TrainConfig", "train"]


def __getattr__(name: str) -> object:
    # On demand: the command line reads configurations; the loop imports TensorBoard.
    if name == "train":
        from fibopolicy.training.trainer import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
