"""Robosuite's tasks. Importing this package imports neither robosuite nor MuJoCo."""
