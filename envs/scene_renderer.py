"""Frames of MuJoCo models: one OpenGL context for many of them, and nothing drawn that
no pixel shows.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.rendering import close_at_exit, configure_gl, no_gl

configure_gl()

#: The geom group of what robosuite draws, its visual meshes; group 0 holds the
#: collision shapes.
_VISUAL, _HIDDEN = 1, 5
#: What a MuJoCo context keeps on the graphics side. Two models that agree in it can
#: share one.
_UPLOADED = ("mesh_", "tex_", "hfield_", "skin_", "ntex", "nmesh", "nhfield", "nskin")


class SceneRenderer:
    """Draws MuJoCo models off screen, frames of at most `(height, width)` pixels,
    uint8, upright.

    Robosuite's own renderer does not switch to its OpenGL context, so that two of them
    in one process return each other's frames; this one does. Uploading a robot's meshes
    takes a second, so a model that looks like the one before keeps what is there.

    Raises:
        UserError: no OpenGL context can be made.
    """

    def __init__(self, height: int, width: int) -> None:
        import mujoco

        # not `mujoco.GLContext`, which stays what it was before `configure_gl`
        from mujoco import gl_context

        self._mujoco = mujoco
        self._shape = (height, width)
        self._camera, self._perturb, self._options = (
            mujoco.MjvCamera(),
            mujoco.MjvPerturb(),
            mujoco.MjvOption(),
        )
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._options.geomgroup[0] = 0
        self._gl: Any = None
        self._context: Any = None
        self._uploaded = b""
        try:
            self._gl = gl_context.GLContext(width, height)
            self._gl.make_current()
        except Exception as error:  # every OpenGL backend fails with a type of its own
            # the half-made object's destructor misses it, and would print a traceback
            gl_context.GLContext._context = None
            raise no_gl(error) from error
        close_at_exit(self)

    def load(self, model: Any) -> None:
        """Draw this `MjModel` from now on."""
        model.vis.global_.offheight, model.vis.global_.offwidth = self._shape
        self._model = model
        self._scene = self._mujoco.MjvScene(model, maxgeom=10_000)
        self._groups = model.geom_group.copy()
        if (looks := _looks(model)) != self._uploaded:
            self._gl.make_current()
            if self._context is not None:
                self._context.free()
            self._context = self._mujoco.MjrContext(
                model, self._mujoco.mjtFontScale.mjFONTSCALE_150
            )
            self._mujoco.mjr_setBuffer(self._mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
            self._context.readDepthMap = self._mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
            self._uploaded = looks

    def render(
        self, data: Any, camera: str, *, cull: bool, size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """The present instant of `data`, an `MjData` of the loaded model: `(height,
        width, 3)`.

        Args:
            size: (height, width), pixels; by default the largest.
            cull: draw only what can lie in the camera's field of view. The frame is the
                same, many times sooner for a camera in a hand; but where there are
                shadows or reflections, what is out of view may be seen by them.
        """
        mujoco, model = self._mujoco, self._model
        height, width = size or self._shape
        self._gl.make_current()
        self._camera.fixedcamid = model.camera(camera).id
        if cull:
            model.geom_group[self._out_of_view(data, self._camera.fixedcamid, width / height)] = (
                _HIDDEN
            )
        mujoco.mjv_updateScene(
            model,
            data,
            self._options,
            self._perturb,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        model.geom_group[:] = self._groups
        viewport, frame = (
            mujoco.MjrRect(0, 0, width, height),
            np.empty((height, width, 3), dtype=np.uint8),
        )
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
        """Per geom, whether its bounding sphere lies outside the camera's pyramid;
        planes have none and stay.
        """
        model = self._model
        radius = np.where(model.geom_rbound > 0, model.geom_rbound, np.inf)
        # it looks along -z
        x, y, z = ((data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)).T
        tall = np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
        wide = tall * aspect
        aside = (np.abs(x) + z * wide) / np.hypot(1, wide)
        above = (np.abs(y) + z * tall) / np.hypot(1, tall)
        return np.asarray((aside > radius) | (above > radius) | (z > radius), dtype=np.bool_)


def _looks(model: Any) -> bytes:
    """A digest of what a context uploads."""
    digest = hashlib.blake2b(digest_size=16)
    for name in dir(model):
        if name.startswith(_UPLOADED):
            value = np.asarray(getattr(model, name))
            digest.update(f"{name} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
    quality, sizes = model.vis.quality, model.vis.global_
    digest.update(
        repr([quality.shadowsize, quality.offsamples, sizes.offheight, sizes.offwidth]).encode()
    )
    return digest.digest()
