"""Off-screen rendering, with its quality as an explicit setting."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import operator
import os
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fibopolicy.errors import UserError, unknown

INSTALL_GL = {
    "egl": "apt-get install -y libegl1 libgl1-mesa-dri",
    "osmesa": "apt-get install -y libosmesa6",
}

#: full: the simulator's own lights, shadows and multisampling. fast: none of them, many
#: times quicker in software.
Quality = Literal["full", "fast"]
#: Pixels: the side of square frames, (height, width), or one of these per camera.
ImageSize = int | Sequence[int] | Mapping[str, int | Sequence[int]]
#: Pixels; more would be a slip of the finger.
MAX_IMAGE_SIZE = 1024
DEFAULT_IMAGE_SIZE = 84


def configure_gl() -> None:
    """Choose a headless OpenGL before mujoco is imported: on Linux EGL, unless
    MUJOCO_GL says otherwise.

    An empty MUJOCO_GL counts as unset. EGL draws without a display and beside one, and
    gives the same frames: a DISPLAY, which may name a server that cannot be reached,
    changes nothing.

    Software rendering of small frames is fastest on one thread per process, so that is
    the default as well.
    """
    if not os.environ.get("MUJOCO_GL") and sys.platform == "linux":
        os.environ["MUJOCO_GL"] = "egl"
    # Somebody may have imported mujoco first, and it settled for a window system:
    # robosuite sets MUJOCO_GL only afterwards. It is not reloaded where that would
    # fail: the first frame says why.
    chosen, module = (
        os.environ.get("MUJOCO_GL", "").strip().lower(),
        sys.modules.get("mujoco.gl_context"),
    )
    settled = getattr(module, "GLContext", type).__module__ == f"mujoco.{chosen}"
    if module is not None and chosen in INSTALL_GL and not settled and not _contradiction():
        importlib.reload(module)
    os.environ.setdefault("LP_NUM_THREADS", "0")
    # Mesa's software renderer brings LLVM's symbols into the process for all to see; a
    # Triton loaded after it (torch does so when it makes an optimiser) binds to them
    # and crashes. Loaded before it, both work.
    if importlib.util.find_spec("triton"):
        with contextlib.suppress(ImportError):
            importlib.import_module("triton._C.libtriton")


def check_options(quality: str, horizon: int) -> None:
    """Refuse what no environment can be made with.

    Raises:
        UserError: an unknown quality, or an episode without a step.
    """
    if quality not in ("fast", "full"):
        raise unknown("render quality", quality, ("fast", "full"))
    if not isinstance(horizon, int) or horizon < 1:
        raise UserError(f"horizon must be at least 1 control step, got {horizon!r}")


class FrameSizes:
    """The size of each camera's frames.

    Args:
        image_size: pixels, the side of square frames, (height, width), or a mapping
            from each camera to one of these. A mapping may name more cameras.
        cameras: the cameras in use.

    Raises:
        UserError: a camera without a size, or a size that no frame can have.
    """

    def __init__(self, image_size: ImageSize, cameras: Iterable[str]) -> None:
        if isinstance(image_size, Mapping):
            if missing := [camera for camera in cameras if camera not in image_size]:
                known = ", ".join(image_size) or "no camera"
                raise UserError(
                    f"image_size gives no size for {', '.join(missing)}, but for {known}; give one"
                    " for each camera"
                )
            self._sizes = {camera: _size(image_size[camera]) for camera in cameras}
            self._others = next(iter(self._sizes.values()), _size(DEFAULT_IMAGE_SIZE))
        else:
            self._others = _size(image_size)
            self._sizes = dict.fromkeys(cameras, self._others)

    def __getitem__(self, camera: str) -> tuple[int, int]:
        """(height, width); for a camera that is not in use, that of the first one in use."""
        return self._sizes.get(camera, self._others)

    @property
    def all(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each camera in use, in their order."""
        return tuple(self._sizes.values())

    @property
    def shared(self) -> tuple[int, int] | None:
        """(height, width) where all cameras have the same, else `None`."""
        return self._others if set(self.all) <= {self._others} else None

    @property
    def largest(self) -> tuple[int, int]:
        """The height and width that every frame fits into."""
        heights, widths = zip(self._others, *self.all, strict=True)
        return max(heights), max(widths)

    def stored(self) -> int | list[int] | dict[str, int | list[int]]:
        """The `image_size` that gives these sizes, as JSON holds it."""

        def short(size: tuple[int, int]) -> int | list[int]:
            return size[0] if size[0] == size[1] else list(size)

        return (
            short(self.shared)
            if self.shared
            else {camera: short(size) for camera, size in self._sizes.items()}
        )


def _size(given: int | Sequence[int]) -> tuple[int, int]:
    sides = (
        given
        if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
        else (given, given)
    )
    try:
        height, width = (operator.index(side) for side in sides)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(
            "image_size must be a number of pixels, (height, width), or one of these per camera,"
            f" got {given!r}"
        ) from error
    if not (8 <= height <= MAX_IMAGE_SIZE and 8 <= width <= MAX_IMAGE_SIZE):
        raise UserError(f"image_size must be between 8 and {MAX_IMAGE_SIZE} pixels, got {given}")
    return height, width


def no_gl(error: BaseException) -> UserError:
    """The error for a machine on which no OpenGL context can be made."""
    if contradiction := _contradiction():
        return UserError(f"cannot render: {contradiction}")
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    backend = os.environ.get("MUJOCO_GL", "unset")
    command = INSTALL_GL.get(backend, INSTALL_GL["egl"])
    return UserError(
        f"cannot render: no OpenGL context could be made (MUJOCO_GL={backend};"
        f" {type(error).__name__}: {reason}); install the libraries with `{command}` or set"
        " MUJOCO_GL to egl or osmesa"
    )


def _contradiction() -> str:
    """What is wrong with PYOPENGL_PLATFORM, which must name the same OpenGL as
    MUJOCO_GL; else empty.
    """
    chosen, platform = (
        os.environ.get(name, "").strip() for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    )
    if not platform or chosen.lower() not in INSTALL_GL or platform.lower() == chosen.lower():
        return ""
    return f"PYOPENGL_PLATFORM={platform} contradicts MUJOCO_GL={chosen}; unset PYOPENGL_PLATFORM"


class Renderers:
    """Draws an `MjModel` with a `mujoco.Renderer` per size, made when it is needed and
    closed at exit at the latest.
    """

    def __init__(self, model: Any, sizes: FrameSizes) -> None:
        self._model, self._sizes = model, sizes
        self._made: dict[tuple[int, int], Any] = {}
        model.vis.global_.offheight, model.vis.global_.offwidth = sizes.largest

    def render(self, data: Any, camera: str) -> NDArray[np.uint8]:
        """The present instant of `data`, an `MjData` of the model: uint8 `(height,
        width, 3)`.

        Raises:
            UserError: no OpenGL context can be made.
        """
        import mujoco

        size = self._sizes[camera]
        if size not in self._made:
            try:
                self._made[size] = mujoco.Renderer(self._model, *size)
            except Exception as error:  # every OpenGL backend fails with a type of its own
                raise no_gl(error) from error
            close_at_exit(self._made[size])
        self._made[size].update_scene(data, camera)
        frame: NDArray[np.uint8] = self._made[size].render()
        return frame

    def close(self) -> None:
        while self._made:
            self._made.popitem()[1].close()


def renderer_name() -> str:
    """What drew the last frame of this process, e.g. "llvmpipe (LLVM 15.0.6, 256 bits)
    through egl".
    """
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER)
    told = name.decode() if isinstance(name, bytes) else "unknown"
    return f"{told} through {os.environ.get('MUJOCO_GL', 'a window system')}"


class _Closes(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[_Closes] = weakref.WeakSet()


def close_at_exit(renderer: _Closes) -> None:
    """Close a renderer when the interpreter exits, should nobody have done so before.

    Exit hooks run last in, first out: registered once the first renderer exists, this
    one runs before mujoco's own hook takes the display away, after which closing would
    print a traceback.
    """
    if not _open:
        atexit.unregister(_close_open)
        atexit.register(_close_open)
    _open.add(renderer)


def _close_open() -> None:
    for renderer in list(_open):
        renderer.close()
