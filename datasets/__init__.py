"""Demonstrations in robomimic's HDF5 format: fetch, inspect, read, write, check, split, and cut into training windows."""

from fibopolicy.datasets.cache import FrameCache
from fibopolicy.datasets.fetch import SOURCES, fetch
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.inspect import inspect
from fibopolicy.datasets.mixture import Mixture, Windows
from fibopolicy.datasets.sampling import batch_indices, epoch_order, mixed_indices
from fibopolicy.datasets.split import split
from fibopolicy.datasets.validate import validate
from fibopolicy.datasets.windows import Batch, WindowDataset
from fibopolicy.datasets.writer import DemoWriter

__all__ = [
    "SOURCES",
    "Batch",
    "DemoFile",
    "DemoWriter",
    "FrameCache",
    "Mixture",
    "WindowDataset",
    "Windows",
    "batch_indices",
    "epoch_order",
    "fetch",
    "inspect",
    "mixed_indices",
    "split",
    "validate",
]
