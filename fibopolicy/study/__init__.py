"""Encoder-swap studies: a grid of runs in which only what the study names differs."""

from fibopolicy.study.config import StudyConfig, StudyEncoder, StudyHead, StudyTask

__all__ = ["StudyConfig", "StudyEncoder", "StudyHead", "StudyTask"]
