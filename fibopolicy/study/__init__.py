"""Encoder-swap studies: a grid of runs that differ only in what the study names."""

from fibopolicy.study.config import (
    StudyConfig,
    StudyEncoder,
    StudyPolicy,
    StudySearch,
    StudyTask,
)

__all__ = ["StudyConfig", "StudyEncoder", "StudyPolicy", "StudySearch", "StudyTask"]
