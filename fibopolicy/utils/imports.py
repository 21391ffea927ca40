"""Imports that need more than an import statement: a user's "module:name", and
torchvision with any build of torch.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from typing import Any

from fibopolicy.errors import UserError, one_line

#: The user's modules that this process imported; an unexpected error may be theirs.
IMPORTED: set[str] = set()


def is_import_path(name: str) -> bool:
    """Whether a name has the form "module:name". Names of this library have no colon,
    except for the encoders "timm:<name>".
    """
    return ":" in name


def import_object(kind: str, name: str, prefixes: Iterable[str] = ()) -> Any:
    """Import the object "module:name". Modules are found in the current folder and on
    the path.

    Args:
        kind: kind of object, for messages: "encoder".
        prefixes: words with another meaning before a colon, suggested if `module` looks
            like one of them.

    Raises:
        UserError: the name does not have this form, or cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(
            f"{kind} {name!r}: expected"
            f" {''.join(f'{p}:<name> or ' for p in prefixes)}<module>:<name>"
        )
    if module.endswith(".py") or "/" in module or module.startswith("."):
        plain = module.removesuffix(".py").strip("./").replace("/", ".")
        raise UserError(f"{kind} {name}: name the module, not its file: {plain}:{attribute}")
    if module == "__main__":
        raise UserError(
            f"{kind} {name}: worker processes cannot import what a script or notebook defines; put"
            f" {attribute} into a module, a .py file beside it, and name it <module>:{attribute}"
        )
    added = os.getcwd() not in sys.path
    if added:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            meant = difflib.get_close_matches(module, prefixes)
            near = f" (did you mean '{meant[0]}:{attribute}'?)" if meant else ""
            raise UserError(
                f"{kind} {name}: there is no module {error.name}{near}; put its file into the"
                " current folder, beside the study that names it, or on PYTHONPATH"
            ) from error
        reason = one_line(error)
        raise UserError(f"{kind} {name}: importing {module} fails: {reason}") from error
    finally:
        if added:
            sys.path.remove(os.getcwd())
    if not hasattr(found, attribute):
        near = "".join(
            f", did you mean {name}?"
            for name in difflib.get_close_matches(attribute, dir(found), 1)
        )
        where = getattr(found, "__file__", None) or f"{module}, a built-in module,"
        raise UserError(f"{kind} {name}: {where} has no {attribute}{near}")
    IMPORTED.add(module)
    return getattr(found, attribute)


#: Kept, because torch drops the schemas when it is deleted.
_library: Any = None


def make_torchvision_importable() -> None:
    """Define the operators that torchvision expects, unless they are present. Call it
    before the first import of torchvision, timm or robomimic.
    """
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch  # here, since simulators import this module and must not load it

        make_library: Any = torch.library.Library
        _library = make_library("torchvision", "DEF")
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
