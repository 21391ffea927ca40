"""A grid of runs that differ in what the study names and in nothing else, and its report."""
