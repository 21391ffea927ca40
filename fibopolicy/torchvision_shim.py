"""Makes torchvision importable beside a torch build for which its compiled operators do not load.

A CPU-only torch next to the common torchvision wheel fails at import with "operator torchvision::nms does not exist",
because torchvision registers a fake kernel for an operator whose library it could not load. Declaring the two schemas
first cures the import; calling the operators would still fail, which nothing here does.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

#: Must outlive its first use: the schemas go when it does.
_library: Any = None


def make_torchvision_importable() -> None:
    """Call before the first import of torchvision, timm or robomimic. Does nothing where the operators are present."""
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        make_library: Any = torch.library.Library
        _library = make_library("torchvision", "DEF")
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
