"""One simulator in its own process, and the handle to it. Neither side loads torch.

Messages, in the order of an episode (`->` goes to the process):

    <- TaskInfo                           once, when the environment has been made
    -> ("start", model, state, keep_states, perturbation, index)   restore an initial state
    <- ("ready", hashes)                  the policy's window is in the shared memory
    -> ("execute", actions)
    <- ("ready", None), or ("ended", success, steps, total_reward, states)
    <- ("user_error", reason) or ("failed", reason)   instead: a UserError, any other error

Observations come back through memory that both sides map. It has no name in the file
system and no descriptors but the two mappings, so nothing is left behind however a
process ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs import Observation, SimState, TaskEnv
from fibopolicy.envs.perturbations import (
    PERTURBATIONS,
    Perturbation,
    PerturbedEnv,
    unsupported_reason,
)
from fibopolicy.errors import UserError, message_of, one_line
from fibopolicy.evaluation.init_states import camera_hashes, rendering_versions
from fibopolicy.utils.processes import WorkerProcess

#: Shape and dtype of each observation key.
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
#: Added to a simulator's niceness. All simulators wait for the one policy, so it runs
#: first where they share its core.
NICENESS = 10


@dataclass(frozen=True)
class TaskInfo:
    """Description of the environment in a process.

    Args:
        unsupported_reasons: for each perturbation, why the environment does not support
            it; empty if it does.
    """

    task_id: str
    env_args: Mapping[str, Any]
    max_steps: int
    quality: str
    control_hz: float
    proprioception: tuple[str, ...]
    layout: Layout
    versions: Mapping[str, str]
    unsupported_reasons: Mapping[str, str]
    warnings: tuple[str, ...] = ()


class Simulator:
    """The handle to a process with one environment.

    Args:
        make_env: makes the environment; must pass `check_importable`.
        n_obs_steps: T_o, observations that the policy reads.
        viewer: open MuJoCo's viewer.

    Attributes:
        info: description of the environment; `None` until the process has made it.
    """

    def __init__(
        self, make_env: Callable[[], TaskEnv], n_obs_steps: int, viewer: bool = False
    ) -> None:
        self.connection, remote = multiprocessing.Pipe()
        self.process = WorkerProcess(
            target=_serve, args=(remote, make_env, n_obs_steps, viewer), daemon=True
        )
        self.process.start()
        remote.close()
        self.info: TaskInfo | None = None
        self._n_obs_steps = n_obs_steps
        self._closed = False
        self._heartbeat: NDArray[np.int64] | None = None
        self._window: dict[str, NDArray[Any]] = {}
        self._model: bytes | None = None
        self._sender: threading.Thread | None = None

    def receive(self) -> TaskInfo | tuple[Any, ...]:
        """The next message.

        Raises:
            EOFError, OSError: the process is gone.
        """
        message = self.connection.recv()
        if isinstance(message, TaskInfo):
            handle = reduction.recv_handle(self.connection)
            try:
                self._heartbeat, self._window = _map(handle, message.layout, self._n_obs_steps)
            finally:
                os.close(handle)
            self.info = message
        assert isinstance(message, TaskInfo | tuple)
        return message

    def start(
        self,
        state: SimState,
        keep_states: bool = False,
        perturbation: Perturbation | None = None,
        index: int = 0,
    ) -> None:
        """Restore an initial state.

        Args:
            keep_states: keep the state after every step.
            perturbation: applied to the episode.
            index: index of the initial state, which the perturbation depends on.
        """
        digest = hashlib.sha256(state.model.encode()).digest()
        changed = digest != self._model
        self._model = digest
        model = state.model if changed else None
        message = ("start", model, state.state, keep_states, perturbation, index)
        if not changed:
            self.connection.send(message)
        else:  # more than a pipe holds, and a stopped process would block the sender forever
            self._sender = threading.Thread(target=self._send, args=(message,), daemon=True)
            self._sender.start()

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # `receive` reports a process that is gone
            self.connection.send(message)

    def execute(self, actions: NDArray[np.float32]) -> None:
        """Execute actions `(T_a, A)`."""
        self.connection.send(("execute", actions))

    def window(self) -> dict[str, NDArray[Any]]:
        """The last T_o observations, `(T_o, ...)` per key; valid until the next
        `execute` or `start`.
        """
        return self._window

    def heartbeat(self) -> int:
        """A number that grows while the process makes progress."""
        return 0 if self._heartbeat is None else int(self._heartbeat[0])

    def exit_reason(self) -> str:
        """The signal or exit code of a process that is gone."""
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with code {code}"

    def close(self) -> None:
        """End the process, even if it hangs or is stopped."""
        if self._closed:
            return
        self._closed = True
        self._window, self._heartbeat = {}, None
        self.process.kill()
        self.process.join()
        self.process.close()
        if self._sender is not None:
            self._sender.join()
        self.connection.close()


# What follows runs in the process.


def _serve(
    connection: Connection, make_env: Callable[[], TaskEnv], n_obs_steps: int, viewer: bool
) -> None:
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)
            # Without a perturbation it passes everything through; each episode sets its
            # own.
            env = PerturbedEnv(make_env())
        # The parent repeats them once, not once per process.
        messages = tuple(str(w.message) for w in caught if w.category is UserWarning)
        try:
            _run_episodes(connection, env, n_obs_steps, messages, viewer)
        finally:
            env.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has closed the connection
    except UserError as error:
        with contextlib.suppress(OSError):
            connection.send(("user_error", str(error)))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}, line {where.lineno}"
        with contextlib.suppress(OSError):
            connection.send(("failed", f"{one_line(error)} ({place})"[:500]))


def _run_episodes(
    connection: Connection,
    env: PerturbedEnv,
    n_obs_steps: int,
    messages: tuple[str, ...],
    viewer: bool,
) -> None:
    spaces: Any = env.observation_space
    layout = {key: (tuple(space.shape), np.dtype(space.dtype)) for key, space in spaces.items()}
    info = TaskInfo(
        task_id=env.task_id,
        env_args=env.env_args,
        max_steps=env.horizon,
        quality=env.quality,
        control_hz=env.control_hz,
        proprioception=env.proprioception,
        layout=layout,
        versions=rendering_versions(),
        unsupported_reasons={name: unsupported_reason(env.env, name) for name in PERTURBATIONS},
        warnings=messages,
    )
    counter, window = _share_memory(connection, info, n_obs_steps)
    show = Viewer(env).show if viewer else lambda: None

    def heartbeat() -> None:
        counter[0] += 1

    def ready(runner: EpisodeRunner, hashes: Mapping[str, str] | None = None) -> None:
        for t, obs in enumerate(runner.window):
            for key, array in window.items():
                array[t] = obs[key]
        connection.send(("ready", hashes))

    model = ""
    runner: EpisodeRunner | None = None
    while True:
        match connection.recv():
            case ("start", new_model, state, keep_states, perturbation, index):
                model = model if new_model is None else new_model
                obs = env.set_state(SimState(model, state))
                hashes = camera_hashes(obs)  # before it is perturbed
                if perturbation is not None:
                    obs = env.perturb(perturbation, index)
                obs = env.begin(obs)
                heartbeat()
                runner = EpisodeRunner(
                    env,
                    obs,
                    n_obs_steps,
                    keep_states=keep_states,
                    heartbeat=heartbeat,
                    on_step=show,
                )
                show()
                ready(runner, hashes)
            case ("execute", actions):
                assert runner is not None
                runner.execute(actions)
                if runner.done:
                    result = runner.success, runner.steps, runner.total_reward, runner.states
                    connection.send(("ended", *result))
                else:
                    ready(runner)


class EpisodeRunner:
    """Steps an environment through one episode.

    Cameras are rendered only where the policy reads them. A video is drawn from the
    states afterwards, so recording one changes nothing.

    Args:
        env: restored to the initial state.
        obs: its observation there; stands for the steps before it, too.
        n_obs_steps: T_o, observations that the policy reads.
        keep_states: keep the initial state and the state after every step in `states`,
            `(S,)` float64 each.
        heartbeat: called after every control step and every observation.
        on_step: called after every control step.
    """

    def __init__(
        self,
        env: TaskEnv,
        obs: Observation,
        n_obs_steps: int,
        *,
        keep_states: bool = False,
        heartbeat: Callable[[], None] = lambda: None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._env, self._n_obs_steps, self._keep_states = env, n_obs_steps, keep_states
        self._heartbeat, self._on_step = heartbeat, on_step
        self.window: deque[Observation] = deque([obs] * n_obs_steps, maxlen=n_obs_steps)
        self.states: list[NDArray[np.float64]] = [env.get_state().state] if keep_states else []
        self.steps, self.total_reward, self.success, self.done = 0, 0.0, False, False

    def execute(self, actions: NDArray[np.floating[Any]]) -> None:
        """Execute actions `(T_a, A)` until the episode ends. Afterwards, `window` holds
        the last T_o observations, the newest last.
        """
        for i, action in enumerate(actions):
            reward, terminated, truncated, info = self._env.advance(action)
            self._heartbeat()
            self._on_step()
            self.steps, self.total_reward = self.steps + 1, self.total_reward + reward
            self.success, self.done = bool(info["success"]), terminated or truncated
            read_by_policy = i >= len(actions) - self._n_obs_steps and not self.done
            if self._keep_states:
                self.states.append(self._env.get_state().state)
            if read_by_policy:
                self.window.append(self._env.observe())
                self._heartbeat()
            if self.done:
                return


class Viewer:
    """Shows an environment in MuJoCo's viewer, at most in real time. The episode
    continues if the window is closed.
    """

    def __init__(self, env: TaskEnv) -> None:
        self._env = env
        self._simulation: tuple[Any, Any] = (None, None)
        self._window: Any = None
        self._next = 0.0

    def show(self) -> None:
        """Draw the current state, one control step of real time after the last call."""
        model, data = self._env.simulation()
        if model is not self._simulation[0] or data is not self._simulation[1]:
            if self._window is not None:
                self._window.close()
            self._simulation, self._window = (model, data), _open_window(model, data)
        if self._window.is_running():
            self._window.sync()
            time.sleep(max(0.0, self._next - time.perf_counter()))
            self._next = time.perf_counter() + 1 / self._env.control_hz


def _open_window(model: Any, data: Any) -> Any:
    try:
        import mujoco.viewer

        return mujoco.viewer.launch_passive(model, data)
    except Exception as error:  # a missing window system raises errors of many kinds
        raise UserError(
            f"--viewer: MuJoCo's viewer cannot be opened ({message_of(error)})"
        ) from error


def check_display() -> None:
    """Raise `UserError` if the viewer cannot open a window."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not display:
        raise UserError(
            "--viewer opens a window, but there is no display (DISPLAY is not set); watch the"
            " video instead"
        )


# Shared memory: the heartbeat, a counter, and the window of each observation key.

Arrays = tuple[NDArray[np.int64], dict[str, NDArray[Any]]]


def _share_memory(connection: Connection, info: TaskInfo, n_obs_steps: int) -> Arrays:
    """Allocate the memory; send it to the parent after the task's description."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    handle = _allocate(_record(info.layout, n_obs_steps).itemsize)
    try:
        arrays = _map(handle, info.layout, n_obs_steps)
        connection.send(info)
        reduction.send_handle(connection, handle, parent.pid)
    finally:
        os.close(handle)
    return arrays


def _map(handle: int, layout: Layout, n_obs_steps: int) -> Arrays:
    """The heartbeat `(1,)` and the windows `(T_o, ...)`, which keep the memory mapped."""
    record = _record(layout, n_obs_steps)
    memory = np.frombuffer(mmap.mmap(handle, record.itemsize), record)
    return memory["heartbeat"], {key: memory["window"][key][0] for key in layout}


def _record(layout: Layout, n_obs_steps: int) -> np.dtype[Any]:
    window = [(key, dtype, (n_obs_steps, *shape)) for key, (shape, dtype) in layout.items()]
    return np.dtype([("heartbeat", np.int64), ("window", window)], align=True)


def _allocate(size: int) -> int:
    """A descriptor of `size` bytes of memory for two processes.

    Raises:
        UserError: there is not enough memory.
    """
    if hasattr(os, "memfd_create"):  # needs no /dev/shm, which containers make small or read-only
        handle = os.memfd_create("fibopolicy")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    try:
        os.ftruncate(handle, size)
        if hasattr(os, "posix_fallocate"):
            # Fails here; otherwise the first write would end the process with SIGBUS.
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        os.close(handle)
        raise UserError(
            f"a simulator needs {size} bytes of memory to share with its parent, which the system"
            f" refuses ({error.strerror}): use fewer workers or raise the memory limit"
        ) from error
    return handle
