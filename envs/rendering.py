"""Off-screen rendering, with its quality as an explicit setting."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import sys
import weakref
from typing import Any, Literal, Protocol

from fibopolicy.errors import UserError, unknown

INSTALL_GL = {
    "egl": "apt-get install -y libegl1 libgl1-mesa-dri",
    "osmesa": "apt-get install -y libosmesa6",
}

#: full: the simulator's own lights, shadows and multisampling. fast: none of them, many times quicker in software.
Quality = Literal["full", "fast"]
#: Pixels; more would be a slip of the finger.
MAX_IMAGE_SIZE = 1024


def configure_gl() -> None:
    """Choose a headless OpenGL before mujoco is imported: EGL, unless MUJOCO_GL or a display says otherwise.

    Software rendering of small frames is fastest on one thread per process, so that is the default as well.
    """
    if "MUJOCO_GL" not in os.environ and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ["MUJOCO_GL"] = "egl"
        if "mujoco.gl_context" in sys.modules:  # somebody imported mujoco first, and it settled for a window system
            importlib.reload(sys.modules["mujoco.gl_context"])
    os.environ.setdefault("LP_NUM_THREADS", "0")
    # Mesa's software renderer brings LLVM's symbols into the process for all to see; a Triton loaded after it (torch
    # does so when it makes an optimiser) binds to them and crashes. Loaded before it, both work.
    if importlib.util.find_spec("triton"):
        with contextlib.suppress(ImportError):
            importlib.import_module("triton._C.libtriton")


def check_options(quality: str, image_size: int, horizon: int) -> None:
    """Refuse what no environment can be made with.

    Raises:
        UserError: an unknown quality, an impossible image size or an episode without a step.
    """
    if quality not in ("fast", "full"):
        raise unknown("render quality", quality, ("fast", "full"))
    if not 8 <= image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"image_size must be between 8 and {MAX_IMAGE_SIZE} pixels, got {image_size}")
    if not isinstance(horizon, int) or horizon < 1:
        raise UserError(f"horizon must be at least 1 control step, got {horizon!r}")


def no_gl(error: BaseException) -> UserError:
    """The error for a machine on which no OpenGL context can be made."""
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    backend = os.environ.get("MUJOCO_GL", "unset")
    command = INSTALL_GL.get(backend, INSTALL_GL["egl"])
    return UserError(
        f"cannot render: no OpenGL context could be made (MUJOCO_GL={backend}; {type(error).__name__}: {reason});"
        f" install the libraries with `{command}` or set MUJOCO_GL to egl or osmesa"
    )


def open_renderer(model: Any, image_size: int) -> Any:
    """A `mujoco.Renderer` of an `MjModel` for frames `(image_size, image_size, 3)`, closed at exit at the latest.

    Raises:
        UserError: no OpenGL context can be made.
    """
    import mujoco

    try:
        renderer = mujoco.Renderer(model, image_size, image_size)
    except Exception as error:  # every OpenGL backend fails with a type of its own
        raise no_gl(error) from error
    close_at_exit(renderer)
    return renderer


def renderer_name() -> str:
    """What drew the last frame of this process, e.g. "llvmpipe (LLVM 15.0.6, 256 bits) through egl"."""
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER)
    told = name.decode() if isinstance(name, bytes) else "unknown"
    return f"{told} through {os.environ.get('MUJOCO_GL', 'a window system')}"


class _Closes(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[_Closes] = weakref.WeakSet()


def close_at_exit(renderer: _Closes) -> None:
    """Close a renderer when the interpreter exits, should nobody have done so before.

    Exit hooks run last in, first out: registered once the first renderer exists, this one runs before mujoco's own hook
    takes the display away, after which closing would print a traceback.
    """
    if not _open:
        atexit.unregister(_close_open)
        atexit.register(_close_open)
    _open.add(renderer)


def _close_open() -> None:
    for renderer in list(_open):
        renderer.close()
