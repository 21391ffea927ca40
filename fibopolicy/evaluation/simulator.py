"""A simulator in a process of its own: what runs there, and the handle to it. Neither
side of it loads torch.

A process makes one environment, and observations come back through memory that both
sides map. It has no name in the file system and its only descriptors are the two
mappings, so that nothing is left behind however a process ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs import Observation, SimState, TaskEnv
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episode import LiveEpisode
from fibopolicy.evaluation.init_states import camera_hashes, picture_versions
from fibopolicy.evaluation.viewer import Viewer
from fibopolicy.utils.processes import WorkerProcess

#: Shape and dtype per observation key.
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
#: Arrays in shared memory begin at multiples of this; a counter that shows signs of
#: life has the first such piece.
ALIGNED = 64
#: Added to a simulator's niceness. All of them wait for the one policy, so it goes
#: first where they share its core.
NICENESS = 10


@dataclass(frozen=True)
class TaskInfo:
    """What a process tells of the environment that it made."""

    task_id: str
    env_args: Mapping[str, Any]
    horizon: int
    quality: str
    control_hz: float
    proprioception: tuple[str, ...]
    layout: Layout
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()


# Replies of a process, in the order of an episode: Hello once, then Ready before every
# decision, then Ended.


@dataclass(frozen=True)
class Ready:
    """The observation lies in shared memory; at an episode's start also the digest of
    each camera's frame.
    """

    hashes: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Ended:
    """The episode is over."""

    success: bool
    steps: int
    total_reward: float
    frames: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True)
class Failed:
    """Something was raised; `user` when it was a `UserError`."""

    user: bool
    reason: str


class Simulator:
    """The handle to a process with one environment.

    Args:
        make_env: makes the environment; see `check_importable`.
        n_obs_steps: T_o, observations that the policy reads.
        viewer: open MuJoCo's viewer beside it.
    """

    def __init__(
        self, make_env: Callable[[], TaskEnv], n_obs_steps: int, viewer: bool = False
    ) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.process = WorkerProcess(
            target=_serve, args=(theirs, make_env, n_obs_steps, viewer), daemon=True
        )
        self.process.start()
        theirs.close()
        self.info: TaskInfo | None = None
        self.n_obs_steps = n_obs_steps
        self._closed = False
        self._beats: NDArray[np.int64] | None = None
        self._views: dict[str, NDArray[Any]] = {}
        self._model: bytes | None = None
        self._sender: threading.Thread | None = None

    def receive(self) -> TaskInfo | Ready | Ended | Failed:
        """The next reply; the first is a `TaskInfo` (or why there is none).

        Raises:
            EOFError, OSError: the process is gone.
        """
        reply = self.connection.recv()
        if isinstance(reply, TaskInfo):
            handle = reduction.recv_handle(self.connection)
            try:
                memory = mmap.mmap(handle, _size(reply.layout, self.n_obs_steps))
            finally:
                os.close(handle)
            self.info = reply
            # which keep it mapped
            self._beats, self._views = _arrays(memory, reply.layout, self.n_obs_steps)
        assert isinstance(reply, TaskInfo | Ready | Ended | Failed)
        return reply

    def start(self, state: SimState, film: str | None = None) -> None:
        """Restore a start state; `Ready` follows."""
        digest = hashlib.sha256(state.model.encode()).digest()
        message = ("start", None if digest == self._model else state.model, state.state, film)
        self._model = digest
        if message[1] is None:
            self.connection.send(message)
        else:  # more than a pipe holds: a process that was stopped would hold up the sender for ever  # noqa: E501
            self._sender = threading.Thread(target=self._send, args=(message,), daemon=True)
            self._sender.start()

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # its end shows itself to `receive`
            self.connection.send(message)

    def execute(self, actions: NDArray[np.float32]) -> None:
        """Execute actions `(T_a, A)`; `Ready` or `Ended` follows."""
        self.connection.send(("execute", actions))

    def window(self) -> dict[str, NDArray[Any]]:
        """The last T_o observations, `(T_o, ...)` per key; valid until the next
        `n_action_steps` or `start`.
        """
        return self._views

    def beats(self) -> int:
        """A number that grows while the process makes progress."""
        return 0 if self._beats is None else int(self._beats[0])

    def how_it_ended(self) -> str:
        """For a process that is gone: with which signal or code."""
        self.process.join(5)
        code = self.process.exitcode
        return (
            f"was ended by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"ended with code {code}"
        )

    def close(self) -> None:
        """End the process, also one that hangs or was stopped; the system takes back
        all that it held.
        """
        if self._closed:
            return
        self._closed = True
        self._views, self._beats = {}, None
        self.process.kill()
        self.process.join()
        self.process.close()
        if self._sender is not None:
            self._sender.join()
        self.connection.close()


# The process's side.


def _serve(
    connection: Connection, make_env: Callable[[], TaskEnv], n_obs_steps: int, viewer: bool
) -> None:
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)
            env = make_env()
        # once by the parent, not by every process
        told = tuple(str(w.message) for w in caught if w.category is UserWarning)
        try:
            _run(connection, env, n_obs_steps, told, Viewer(env).show if viewer else lambda: None)
        finally:
            env.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent needs no more
    except UserError as error:
        _tell(connection, Failed(True, str(error)))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = (
            f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}, line"
            f" {where.lineno})"
        )
        _tell(connection, Failed(False, " ".join(reason.split())[:500]))


def _tell(connection: Connection, reply: Failed) -> None:
    with contextlib.suppress(OSError):
        connection.send(reply)


def _run(
    connection: Connection,
    env: TaskEnv,
    n_obs_steps: int,
    told: tuple[str, ...],
    view: Callable[[], None],
) -> None:
    spaces: Any = env.observation_space
    layout = {key: (tuple(space.shape), np.dtype(space.dtype)) for key, space in spaces.items()}
    memory = _offer(connection, env, layout, n_obs_steps, told)
    beats, views = _arrays(memory, layout, n_obs_steps)
    model = ""
    episode: LiveEpisode | None = None

    def beat() -> None:
        beats[0] += 1

    def show(window: Iterable[Observation]) -> None:
        for t, obs in enumerate(window):
            for key, view in views.items():
                view[t] = obs[key]

    while True:
        message = connection.recv()
        if message[0] == "start":
            _, changed, state, film = message
            model = model if changed is None else changed
            obs = env.set_state(SimState(model, state))
            beat()
            episode = LiveEpisode(env, obs, n_obs_steps, film=film, beat=beat, show=view)
            view()
            show(episode.window)
            connection.send(Ready(camera_hashes(obs)))
        else:
            assert episode is not None
            episode.execute(message[1])
            if episode.done:
                connection.send(
                    Ended(
                        episode.success, episode.steps, episode.total_reward, tuple(episode.frames)
                    )
                )
                episode = None
            else:
                show(episode.window)
                connection.send(Ready())


def _offer(
    connection: Connection, env: TaskEnv, layout: Layout, n_obs_steps: int, told: tuple[str, ...]
) -> mmap.mmap:
    """Introduce the environment, and hand over memory for what it observes."""
    info = TaskInfo(
        env.task_id,
        env.env_args,
        env.horizon,
        env.quality,
        env.control_hz,
        env.proprioception,
        layout,
        picture_versions(),
        told,
    )
    size = _size(layout, n_obs_steps)
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    handle = _shared(size)
    try:
        memory = mmap.mmap(handle, size)
        connection.send(info)
        reduction.send_handle(connection, handle, parent.pid)
    finally:
        os.close(handle)
    return memory


def _shared(size: int) -> int:
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
            # fails here; a write to memory that is not there would be a SIGBUS
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        os.close(handle)
        raise UserError(
            f"a simulator needs {size} bytes of memory to share with its parent, which the system"
            f" refuses ({error.strerror}): use fewer workers or raise the memory limit"
        ) from error
    return handle


def _size(layout: Layout, n_obs_steps: int) -> int:
    return ALIGNED + sum(_room(n_obs_steps, *entry) for entry in layout.values())


def _room(n_obs_steps: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return -(-n_obs_steps * int(np.prod(shape)) * dtype.itemsize // ALIGNED) * ALIGNED


def _arrays(
    memory: mmap.mmap, layout: Layout, n_obs_steps: int
) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """The counter and the observations `(T_o, ...)` in shared memory."""
    views, offset = {}, ALIGNED
    for key, (shape, dtype) in layout.items():
        count = n_obs_steps * int(np.prod(shape))
        views[key] = np.frombuffer(memory, dtype, count, offset).reshape(n_obs_steps, *shape)
        offset += _room(n_obs_steps, shape, dtype)
    return np.frombuffer(memory, np.int64, 1, 0), views
