"""Demonstrations in robomimic's HDF5 format: read and write."""

from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.writer import DemoWriter

__all__ = ["DemoFile", "DemoWriter"]
