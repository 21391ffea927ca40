"""Training: configuration, loop, checkpoints."""

from fibopolicy.training.config import ComputeConfig, OptimizerConfig, TrainConfig
from fibopolicy.training.loop import train

__all__ = ["ComputeConfig", "OptimizerConfig", "TrainConfig", "train"]
