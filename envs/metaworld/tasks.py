"""Meta-World's tasks by name, and its package where it is installed."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from fibopolicy.errors import UserError

#: The 50 tasks of Meta-World 3 (Yu et al. 2019, McLean et al. 2025), known whether or not it is installed.  # noqa: E501
# fmt: off
METAWORLD: tuple[str, ...] = tuple(f"metaworld/{name}-v3" for name in (
    "assembly", "basketball", "bin-picking", "box-close", "button-press", "button-press-topdown",
    "button-press-topdown-wall", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn",  # noqa: E501
    "disassemble", "door-close", "door-lock", "door-open", "door-unlock", "drawer-close", "drawer-open", "faucet-close",  # noqa: E501
    "faucet-open", "hammer", "hand-insert", "handle-press", "handle-press-side", "handle-pull", "handle-pull-side",  # noqa: E501
    "lever-pull", "peg-insert-side", "peg-unplug-side", "pick-out-of-hole", "pick-place", "pick-place-wall", "plate-slide",  # noqa: E501
    "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "push", "push-back", "push-wall", "reach", "reach-wall",  # noqa: E501
    "shelf-place", "soccer", "stick-pull", "stick-push", "sweep", "sweep-into", "window-close", "window-open",  # noqa: E501
))
# fmt: on


def metaworld_version() -> str:
    return metadata.version("metaworld")


def import_metaworld() -> Any:
    """The metaworld module.

    Raises:
        UserError: it cannot be imported, or needs another mujoco; with the command that
            fixes it.
    """
    import mujoco

    try:
        import metaworld
    except ImportError as error:
        raise UserError(
            f"metaworld cannot be imported ({error}); install it with `pip install"
            " 'fibopolicy[metaworld]'`"
        ) from error
    from packaging.requirements import Requirement

    # Meta-World edits compiled models and reads the solver's arrays, so it names one
    # version of MuJoCo exactly.
    needs = [Requirement(text) for text in metadata.requires("metaworld") or ()]
    wanted = next(
        (str(need.specifier) for need in needs if need.name == "mujoco" and need.marker is None), ""
    )
    if not Requirement(f"mujoco{wanted}").specifier.contains(mujoco.__version__, prereleases=True):
        raise UserError(
            f"metaworld {metadata.version('metaworld')} works with mujoco{wanted}, and"
            f" {mujoco.__version__} is installed: run `pip install 'mujoco{wanted}'`"
        )
    return metaworld
