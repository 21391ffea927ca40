"""Demonstrations in robomimic's HDF5 format: written, read, checked, cut into windows."""

if __name__ == "datasets":
    # The clone's root is on sys.path, and Hugging Face's package of this name is meant: load
    # that one instead.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec(
        __name__, [entry for entry in sys.path if Path(entry).resolve() != root]
    )
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
    sys.modules[__name__] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    from fibopolicy.datasets.cache import FrameCache
    from fibopolicy.datasets.conversions import resize_larger
    from fibopolicy.datasets.download import HOSTED, SOURCES, download
    from fibopolicy.datasets.hdf5 import DemoFile
    from fibopolicy.datasets.importing import import_demos
    from fibopolicy.datasets.inspect import inspect
    from fibopolicy.datasets.split import split
    from fibopolicy.datasets.validate import validate
    from fibopolicy.datasets.windows import (
        Batch,
        Mixture,
        WindowDataset,
        Windows,
        batch_indices,
        epoch_order,
        mixed_indices,
    )
    from fibopolicy.datasets.writer import DemoWriter

    __all__ = [
        "HOSTED",
        "SOURCES",
        "Batch",
        "DemoFile",
        "DemoWriter",
        "FrameCache",
        "Mixture",
        "WindowDataset",
        "Windows",
        "batch_indices",
        "download",
        "epoch_order",
        "import_demos",
        "inspect",
        "mixed_indices",
        "resize_larger",
        "split",
        "validate",
    ]
