"""Training: configuration, loop, checkpoints."""

from fibopolicy.training.config import OptimizerConfig, TrainConfig

__all__ = ["OptimizerConfig", "TrainConfig"]
