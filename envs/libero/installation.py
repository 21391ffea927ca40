"""LIBERO's package and its assets, where they are installed."""

from __future__ import annotations

import contextlib
import io
import os
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.libero.tasks import assets_home, suite_of
from fibopolicy.envs.robosuite.options import import_robosuite
from fibopolicy.errors import UserError

#: The distribution: LIBERO by its authors, ported to robosuite 1.5 by the RLinf team.
PACKAGE = "rpent-libero"
#: Modules with a variable `absolute_path`, below which LIBERO looks for its assets.
_OBJECTS = ("articulated", "google_scanned", "hope", "turbosquid")


def checked_assets() -> Path:
    """`assets_home()`.

    Raises:
        UserError: nothing was downloaded.
    """
    folder = assets_home()
    if not folder.is_dir():
        raise UserError(
            f"LIBERO's meshes are not in {folder}: run `fibopolicy download libero-assets` (360 MB)"
        )
    return folder


def official_states(task_id: str) -> NDArray[np.float64]:
    """The initial states of LIBERO's evaluations `(50, S)`: time, joint positions and
    joint velocities.
    """
    name = task_id.rpartition("/")[2]
    path = checked_assets() / "init_states" / suite_of(task_id) / f"{name}.npz"
    with np.load(path, allow_pickle=False) as file:
        states: NDArray[np.float64] = file["states"]
    return states


def import_libero() -> Any:
    """The module `libero.libero.envs`, which then reads its assets from `assets_home`.

    Nothing is written into the package or the home folder: the import writes its
    settings to `LIBERO_CONFIG_PATH`, here a folder of the cache unless it is set.

    Raises:
        UserError: it cannot be imported, with the command that installs it; there are
            no assets.
    """
    import_robosuite()
    folder = checked_assets()
    try:
        metadata.version(PACKAGE)
        # gym prints a long note when it is imported; LIBERO needs it for a class that
        # is not used here.
        import_module("gym_notices.notices").notices.clear()
        settings = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", f"{folder}-settings"))
        settings.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            envs = import_module("libero.libero.envs")
    except ImportError as error:
        raise UserError(
            f"LIBERO cannot be imported ({error}); install it with"
            " `pip install 'fibopolicy[libero]'`"
        ) from error
    for name in _OBJECTS:
        import_module(f"libero.libero.envs.objects.{name}_objects").absolute_path = folder  # type: ignore[attr-defined]
    # It adds "../assets".
    import_module("libero.libero.envs.bddl_base_domain").DIR_PATH = str(folder / "envs")  # type: ignore[attr-defined]
    # LIBERO returns None, for which robosuite 1.5 looks up a class.
    robot = import_module("libero.libero.envs.robots.on_the_ground_panda").OnTheGroundPanda
    robot.default_base = property(lambda self: "NullMount")
    return envs


def problem_file(task_id: str) -> Path:
    """The BDDL file of a task: its scene, its initial layout and its goal."""
    root = Path(str(import_module("libero.libero").__file__)).parent
    name = task_id.rpartition("/")[2]
    return root / "bddl_files" / f"libero_{suite_of(task_id)}" / f"{name}.bddl"
