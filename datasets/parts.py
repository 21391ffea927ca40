"""What a killed command leaves for `--resume`: finished parts of its output, in a
folder beside it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError
from fibopolicy.utils.files import atomic_write, wrap_os_error

#: The settings that the parts beside it were made with.
PLAN = "plan.json"


def parts_folder(out: Path) -> Path:
    """Where the parts of an output lie."""
    return out.with_name(out.name + ".parts")


@contextmanager
def opened_parts(
    parts: Path, plan: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Make the folder of parts, or check that the one there is of the same plan; for
    the block that does the work.

    A block that fails before its first part, as with a mistaken setting, leaves no
    folder.

    Raises:
        UserError: unfinished work lies there and is to be neither completed nor
            replaced, or is of another plan.
    """
    wanted = json.loads(json.dumps(plan))
    file = parts / PLAN
    begun = any(not path.name.startswith(PLAN) for path in parts.glob("*"))
    if begun and file.exists():
        if overwrite:
            remove_parts(parts)
        elif not resume:
            raise UserError(
                f"{parts}: holds unfinished work; pass --resume to go on with it or --overwrite to"
                " start again"
            )
        elif (found := json.loads(file.read_text(encoding="utf-8"))) != wanted:
            changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            told = ", ".join(
                f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}" for key in changed
            )
            raise UserError(
                f"{parts}: holds work with other settings ({told}); pass --overwrite to start again"
            )
    elif begun:
        raise UserError(f"{parts}: is in the way and not ours; choose another --out")
    with wrap_os_error(parts):
        parts.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as aside:
        aside.write_text(json.dumps(wanted), encoding="utf-8")
    try:
        yield
    except BaseException:
        if not any(parts.glob("*.npz")):
            remove_parts(parts)
        raise


def remove_parts(parts: Path) -> None:
    """Delete the parts and their plan, and nothing else."""
    for path in (*parts.glob("*.npz"), *parts.glob("*.npz.partial"), parts / PLAN):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        parts.rmdir()
