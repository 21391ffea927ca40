"""Options that several commands have."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import docstring_parser
from tyro.conf import Positional, arg

RUN_DIRECTORY = Annotated[Positional[Path], arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class Output:
    out: Path
    """File to write."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True, kw_only=True)
class OptionalOutput:
    out: Path | None = None
    """JSON file to write: results, hardware and versions."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    workers: int | None = None
    """Number of processes, one simulator each (about 1 GB with robosuite); the number of
    cores by default. The output does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class RecordingOptions(Workers, Output):
    resume: bool = False
    """Resume an interrupted command."""


@dataclass(frozen=True, kw_only=True)
class Demos:
    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """Robomimic HDF5 file; it is not changed."""
    filter_key: str | None = None
    """Use only the demos of this filter key."""
    skip_corrupt: bool = False
    """Leave out demos that cannot be used, and name each with the reason."""


def join_help_lines() -> None:
    """Make tyro show the docstring of an option as one paragraph. By default, it keeps
    the line breaks before indented lines.
    """

    @functools.wraps(parse_from_object := docstring_parser.parse_from_object)
    def parse(*args: Any, **kwargs: Any) -> docstring_parser.Docstring:
        found = parse_from_object(*args, **kwargs)
        for parameter in found.params:
            parameter.description = " ".join((parameter.description or "").split())
        return found

    docstring_parser.parse_from_object = parse
