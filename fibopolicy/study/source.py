"""A study from a file of Python: `my_study.py`, or `my_study.py:function`."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import chdir
from pathlib import Path

from fibopolicy.errors import UserError, unknown
from fibopolicy.study.config import StudyConfig
from fibopolicy.utils.files import expanded

#: The function that a file without a named one is asked for.
FUNCTION = "study"


def load_study(source: str) -> tuple[StudyConfig, Path]:
    """Call the function that `source` names; returns its study and the folder of its
    file.

    The folder is importable meanwhile and afterwards, so that "module:function"
    encoders may lie beside the study, and the current one meanwhile, so that relative
    paths of data and weights are found from there, too.

    Raises:
        UserError: no such file or function, an error inside it, or something else than
            a `StudyConfig` comes out.
    """
    name, _, function = source.partition(":")
    function = function or FUNCTION
    path = expanded(name)
    if path.suffix != ".py":
        raise UserError(
            f"{source}: expected a file of Python with a function that returns a StudyConfig:"
            " my_study.py[:function]"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    path = path.absolute()
    folder = path.resolve().parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(f"fibopolicy_study_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        with chdir(folder):
            spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be run: {_told(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = [
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == spec.name
        ]
        raise unknown(f"function of {path}:", function, functions)
    try:
        with chdir(folder):
            config = found()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {function}() failed: {_told(error)}") from error
    if not isinstance(config, StudyConfig):
        raise UserError(
            f"{path}: {function}() must return a StudyConfig, got {type(config).__name__}"
        )
    return config, folder


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
