"""MuJoCo's own viewer beside a rollout, in the process of its simulator."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from fibopolicy.envs import TaskEnv
from fibopolicy.errors import UserError


def check_display() -> None:
    """Raise `UserError` where no window can be opened."""
    if sys.platform == "linux" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        raise UserError(
            "--viewer opens a window, and there is no display here (DISPLAY is not set); watch the"
            " video instead"
        )


class Viewer:
    """Follows an environment in a window, no faster than real time; closing the window
    lets the rollout go on without.
    """

    def __init__(self, env: TaskEnv) -> None:
        self._env = env
        self._shown: tuple[Any, Any] | None = None
        self._window: Any = None
        self._next = 0.0

    def show(self) -> None:
        """Draw this instant; waits until a control step of real time has passed since the last."""
        simulation = self._env.simulation()
        if (
            self._shown is None
            or simulation[0] is not self._shown[0]
            or simulation[1] is not self._shown[1]
        ):
            self.close()
            self._shown, self._window = simulation, _open(*simulation)
        if self._window.is_running():
            self._window.sync()
            time.sleep(max(0.0, self._next - time.perf_counter()))
            self._next = time.perf_counter() + 1 / self._env.control_hz

    def close(self) -> None:
        if self._window is not None:
            self._window.close()
            self._window = None


def _open(model: Any, data: Any) -> Any:
    try:
        import mujoco.viewer

        return mujoco.viewer.launch_passive(model, data)
    except Exception as error:  # a missing window system shows itself in many ways
        raise UserError(
            f"--viewer: MuJoCo's viewer cannot be opened ({' '.join(str(error).split())})"
        ) from error
