"""Training: configuration, loop, checkpoints."""

from fibopolicy.training.config import ComputeConfig, OptimizerConfig, TrainConfig

__all__ = ["ComputeConfig", "OptimizerConfig", "TrainConfig"]
