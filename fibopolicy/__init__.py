"""Visuomotor policies with Fibottention, trained by behaviour cloning and measured in simulation."""

__version__ = "0.1.0"
