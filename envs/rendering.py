"""Off-screen rendering: the choice of OpenGL, the frames' sizes and quality, the renderers."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import importlib.util
import operator
import os
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fibopolicy.errors import UserError, unknown

INSTALL_GL = {
    "egl": "apt-get install -y libegl1 libgl1-mesa-dri",
    "osmesa": "apt-get install -y libosmesa6",
}

#: full: the simulator's own lights, shadows and multisampling. fast: none of them, many
#: times faster in software.
Quality = Literal["full", "fast"]
#: Pixels: the side of square frames, (height, width), or one of these per camera.
ImageSize = int | Sequence[int] | Mapping[str, int | Sequence[int]]
#: Pixels; a larger number is taken for a typo.
MAX_IMAGE_SIZE = 1024
DEFAULT_IMAGE_SIZE = 84


# The choice of OpenGL


def configure_gl() -> None:
    """Choose a headless OpenGL before mujoco is imported: EGL on Linux, or MUJOCO_GL.

    An empty MUJOCO_GL counts as unset. EGL gives the same frames with and without a
    display, so DISPLAY, which may name an unreachable server, has no effect.

    Software rendering of small frames is fastest on one thread per process, so that is
    the default as well.
    """
    if not os.environ.get("MUJOCO_GL") and sys.platform == "linux":
        os.environ["MUJOCO_GL"] = "egl"
    # If mujoco was imported earlier, it chose a window system: robosuite sets
    # MUJOCO_GL only afterwards. If a reload would fail, the first frame raises the
    # error.
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    module = sys.modules.get("mujoco.gl_context")
    settled = getattr(module, "GLContext", type).__module__ == f"mujoco.{chosen}"
    if module is not None and chosen in INSTALL_GL and not settled and not _contradiction():
        importlib.reload(module)
    os.environ.setdefault("LP_NUM_THREADS", "0")
    # Mesa's software renderer exports LLVM's symbols to the whole process. A Triton
    # that is loaded after it (torch does so when it makes an optimizer) binds to them
    # and crashes. Loaded before it, both work.
    if importlib.util.find_spec("triton"):
        with contextlib.suppress(ImportError):
            importlib.import_module("triton._C.libtriton")


def load_mujoco() -> None:
    """Import mujoco with the OpenGL of `configure_gl`.

    Raises:
        UserError: its OpenGL cannot be loaded.
    """
    configure_gl()
    try:
        import mujoco  # noqa: F401
    except Exception as error:  # every OpenGL backend raises its own type
        raise no_gl(error) from error


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
    """What is wrong with PYOPENGL_PLATFORM, which must name the OpenGL of MUJOCO_GL."""
    chosen, platform = (
        os.environ.get(name, "").strip() for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    )
    if not platform or chosen.lower() not in INSTALL_GL or platform.lower() == chosen.lower():
        return ""
    return f"PYOPENGL_PLATFORM={platform} contradicts MUJOCO_GL={chosen}; unset PYOPENGL_PLATFORM"


def renderer_name() -> str:
    """What drew the last frame, e.g. "llvmpipe (LLVM 15.0.6, 256 bits) through egl"."""
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER)
    renderer = name.decode() if isinstance(name, bytes) else "unknown"
    return f"{renderer} through {os.environ.get('MUJOCO_GL', 'a window system')}"


# Sizes and quality of frames


def check_options(quality: str, horizon: int) -> None:
    """Check the options that every environment takes.

    Raises:
        UserError: an unknown quality, or an episode without a step.
    """
    if quality not in ("fast", "full"):
        raise unknown("render quality", quality, ("fast", "full"))
    if not isinstance(horizon, int) or horizon < 1:
        raise UserError(f"horizon must be at least 1 control step, got {horizon!r}")


def apply_quality(model: Any, quality: Quality) -> None:
    """Turn off shadows, multisampling and reflections of an `MjModel` for "fast" frames."""
    if quality == "fast":
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.mat_reflectance[:] = 0


class FrameSizes:
    """The size of each camera's frames.

    Args:
        image_size: pixels, the side of square frames, (height, width), or a mapping
            from each camera to one of these. A mapping may name more cameras.
        cameras: the cameras in use.

    Raises:
        UserError: a camera has no size, or an impossible one.
    """

    def __init__(self, image_size: ImageSize, cameras: Iterable[str]) -> None:
        if isinstance(image_size, Mapping):
            if missing := [camera for camera in cameras if camera not in image_size]:
                known = ", ".join(image_size) or "no camera"
                raise UserError(
                    f"image_size has no size for {', '.join(missing)}, only for {known};"
                    " give one for each camera"
                )
            self._sizes = {camera: _size(image_size[camera]) for camera in cameras}
            self._default = next(iter(self._sizes.values()), _size(DEFAULT_IMAGE_SIZE))
        else:
            self._default = _size(image_size)
            self._sizes = dict.fromkeys(cameras, self._default)

    def __getitem__(self, camera: str) -> tuple[int, int]:
        """(height, width); that of the first camera in use for one that is not in use."""
        return self._sizes.get(camera, self._default)

    @property
    def by_camera(self) -> dict[str, tuple[int, int]]:
        """(height, width) of each camera in use, in their order."""
        return dict(self._sizes)

    @property
    def shared(self) -> tuple[int, int] | None:
        """(height, width) if all cameras have the same, else `None`."""
        return self._default if set(self._sizes.values()) <= {self._default} else None

    @property
    def largest(self) -> tuple[int, int]:
        """The height and width that every frame fits into."""
        heights, widths = zip(self._default, *self._sizes.values(), strict=True)
        return max(heights), max(widths)

    def stored(self) -> int | list[int] | dict[str, int | list[int]]:
        """The `image_size` that gives these sizes, as JSON stores it."""

        def short(size: tuple[int, int]) -> int | list[int]:
            return size[0] if size[0] == size[1] else list(size)

        if self.shared:
            return short(self.shared)
        return {camera: short(size) for camera, size in self._sizes.items()}


def _size(given: int | Sequence[int]) -> tuple[int, int]:
    pair = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
    try:
        height, width = (operator.index(side) for side in (given if pair else (given, given)))  # type: ignore[arg-type, union-attr]
    except TypeError as error:
        raise UserError(
            "image_size must be a number of pixels, (height, width), or one of these per camera,"
            f" got {given!r}"
        ) from error
    if not (8 <= height <= MAX_IMAGE_SIZE and 8 <= width <= MAX_IMAGE_SIZE):
        raise UserError(f"image_size must be between 8 and {MAX_IMAGE_SIZE} pixels, got {given}")
    return height, width


# Renderers


@dataclass(frozen=True)
class Decor:
    """A shape that is drawn into frames although the simulation does not have it.

    Args:
        shape: "box", "sphere", "ellipsoid", "cylinder", or "plane", a rectangle that is
            seen from above.
        position: position of its centre, `(3,)` metres.
        size: half its extents, `(3,)` metres; a plane's third is ignored.
        rgba: colour and opacity, in [0, 1].
    """

    shape: str
    position: tuple[float, float, float]
    size: tuple[float, float, float]
    rgba: tuple[float, float, float, float]


def _add_decor(scene: Any, decor: Iterable[Decor]) -> None:
    """Add shapes to a `MjvScene` that has been updated."""
    import mujoco

    for one in decor:
        geom, (kind, size, *others) = scene.geoms[scene.ngeom], _geom_arguments(one)
        mujoco.mjv_initGeom(geom, kind, size, *others)
        geom.size[:] = size  # MuJoCo reads a cylinder's as radius and half length
        scene.ngeom += 1


@lru_cache(maxsize=64)
def _geom_arguments(decor: Decor) -> tuple[Any, ...]:
    """Type, size, position, rotation and colour of a shape, as MuJoCo takes them."""
    import mujoco

    kind = getattr(mujoco.mjtGeom, f"mjGEOM_{decor.shape.upper()}")
    # MuJoCo blends a translucent shape twice.
    rgba = np.array([*decor.rgba[:3], 1 - (1 - decor.rgba[3]) ** 0.5], np.float32)
    return kind, np.array(decor.size), np.array(decor.position), np.eye(3).ravel(), rgba


class Renderers:
    """Draws an `MjModel` with a `mujoco.Renderer` per size, created on first use."""

    def __init__(self, model: Any, sizes: FrameSizes) -> None:
        self._model, self._sizes = model, sizes
        self._renderers: dict[tuple[int, int], Any] = {}
        model.vis.global_.offheight, model.vis.global_.offwidth = sizes.largest

    def render(
        self, data: Any, camera: str, decor: Iterable[Decor] | None = None
    ) -> NDArray[np.uint8]:
        """The present instant of `data`, an `MjData` of the model: uint8 `(H, W, 3)`.

        Args:
            decor: further shapes.

        Raises:
            UserError: no OpenGL context can be made.
        """
        import mujoco

        size = self._sizes[camera]
        if size not in self._renderers:
            try:
                self._renderers[size] = mujoco.Renderer(self._model, *size)
            except Exception as error:  # every OpenGL backend raises its own type
                raise no_gl(error) from error
            _close_at_exit(self._renderers[size])
        self._renderers[size].update_scene(data, camera)
        _add_decor(self._renderers[size].scene, decor or ())
        frame: NDArray[np.uint8] = self._renderers[size].render()
        return frame

    def close(self) -> None:
        while self._renderers:
            self._renderers.popitem()[1].close()


#: A geom group that is not drawn. Robosuite's visual meshes are in group 1, its
#: collision shapes in group 0.
_HIDDEN = 5
#: Fields of a model that a MuJoCo context uploads. Models that agree in them can share
#: a context.
_UPLOADED = ("mesh_", "tex_", "hfield_", "skin_", "ntex", "nmesh", "nhfield", "nskin")


class SceneRenderer:
    """Draws many MuJoCo models in one OpenGL context, and only what lies in view.

    Frames are uint8, upright, of at most `(height, width)` pixels. Robosuite's own
    renderer does not switch to its OpenGL context, so that two of them in one process
    return each other's frames; this one does. Uploading a robot's meshes takes a
    second: a model that looks like the previous one reuses what was uploaded.

    Raises:
        UserError: no OpenGL context can be made.
    """

    def __init__(self, height: int, width: int) -> None:
        load_mujoco()
        import mujoco
        from mujoco import gl_context  # `mujoco.GLContext` ignores `configure_gl`

        self._mujoco = mujoco
        self._shape = (height, width)
        self._camera, self._perturb = mujoco.MjvCamera(), mujoco.MjvPerturb()
        self._options = mujoco.MjvOption()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._options.geomgroup[0] = 0
        self._gl: Any = None
        self._context: Any = None
        self._uploaded = b""
        try:
            self._gl = gl_context.GLContext(width, height)
            self._gl.make_current()
        except Exception as error:  # every OpenGL backend raises its own type
            # The destructor of the incomplete object reads it and would print a
            # traceback.
            gl_context.GLContext._context = None
            raise no_gl(error) from error
        _close_at_exit(self)

    def load(self, model: Any) -> None:
        """Draw this `MjModel` from now on."""
        mujoco = self._mujoco
        model.vis.global_.offheight, model.vis.global_.offwidth = self._shape
        self._model = model
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._groups = model.geom_group.copy()
        if (appearance := _appearance(model)) != self._uploaded:
            self._gl.make_current()
            if self._context is not None:
                self._context.free()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
            self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
            self._uploaded = appearance

    def render(
        self,
        data: Any,
        camera: str,
        *,
        cull: bool,
        size: tuple[int, int] | None = None,
        decor: Iterable[Decor] | None = None,
    ) -> NDArray[np.uint8]:
        """The present instant of `data`, an `MjData` of the loaded model: `(H, W, 3)`.

        Args:
            decor: further shapes.
            size: (height, width), pixels; by default the largest.
            cull: draw only what can lie in the camera's field of view. The frame is the
                same, and it takes a fraction of the time for a camera on the gripper.
                Do not use it with shadows or reflections, which may show what is out of
                view.
        """
        mujoco, model = self._mujoco, self._model
        height, width = size or self._shape
        self._gl.make_current()
        self._camera.fixedcamid = model.camera(camera).id
        if cull:
            outside = self._out_of_view(data, self._camera.fixedcamid, width / height)
            model.geom_group[outside] = _HIDDEN
        category = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(
            model, data, self._options, self._perturb, self._camera, category, self._scene
        )
        model.geom_group[:] = self._groups
        _add_decor(self._scene, decor or ())
        viewport = mujoco.MjrRect(0, 0, width, height)
        frame = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_render(viewport, self._scene, self._context)
        mujoco.mjr_readPixels(frame, None, viewport, self._context)
        return np.ascontiguousarray(frame[::-1])  # OpenGL's first row is the lowest

    def close(self) -> None:
        if self._gl is not None:
            self._gl.make_current()
            if self._context is not None:
                self._context.free()
            self._gl.free()
            self._gl = self._context = None

    def _out_of_view(self, data: Any, camera: int, aspect: float) -> NDArray[np.bool_]:
        """Whether each geom's bounding sphere lies outside the camera's pyramid.

        Planes have no bounding sphere and stay.
        """
        model = self._model
        radius = np.where(model.geom_rbound > 0, model.geom_rbound, np.inf)
        rotation = data.cam_xmat[camera].reshape(3, 3)  # it looks along -z
        x, y, z = ((data.geom_xpos - data.cam_xpos[camera]) @ rotation).T
        tall = np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
        wide = tall * aspect
        sideways = (np.abs(x) + z * wide) / np.hypot(1, wide)
        above = (np.abs(y) + z * tall) / np.hypot(1, tall)
        outside = (sideways > radius) | (above > radius) | (z > radius)
        return np.asarray(outside, dtype=np.bool_)


def _appearance(model: Any) -> bytes:
    """A digest of what a context uploads."""
    digest = hashlib.blake2b(digest_size=16)
    for name in dir(model):
        if name.startswith(_UPLOADED):
            value = np.asarray(getattr(model, name))
            digest.update(f"{name} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
    quality, sizes = model.vis.quality, model.vis.global_
    settings = [quality.shadowsize, quality.offsamples, sizes.offheight, sizes.offwidth]
    digest.update(repr(settings).encode())
    return digest.digest()


class _Closes(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[_Closes] = weakref.WeakSet()


def _close_at_exit(renderer: _Closes) -> None:
    """Close a renderer when the interpreter exits, unless it was closed before.

    Exit hooks run last in, first out: registered once the first renderer exists, this
    one runs before mujoco's own hook removes the display, after which closing would
    print a traceback.
    """
    if not _open:
        atexit.unregister(_close_open)
        atexit.register(_close_open)
    _open.add(renderer)


def _close_open() -> None:
    for renderer in list(_open):
        renderer.close()
