"""Rollouts over stored start states, episode rows, intervals, video."""
