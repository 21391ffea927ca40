"""Encoder-swap studies: a grid of runs in which only what the study names differs."""

from fibopolicy.study.config import StudyConfig, StudyEncoder, StudyPolicy, StudyTask

__all__ = ["StudyConfig", "StudyEncoder", "StudyPolicy", "StudyTask"]
