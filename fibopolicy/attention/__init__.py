"""Fibottention: sparse attention whose heads keep different, Fibonacci-like diagonals.

Needs torch and numpy alone.
"""

from fibopolicy.attention.functional import BACKENDS, fibottention
from fibopolicy.attention.patterns import FibottentionPattern, generate_fibomask, get_fibonacci, wythoff

__all__ = ["BACKENDS", "FibottentionPattern", "fibottention", "generate_fibomask", "get_fibonacci", "wythoff"]
