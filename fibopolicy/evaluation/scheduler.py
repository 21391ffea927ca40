"""Run many episodes at once: one process per simulator, one policy for all of them.

A simulator that has finished an episode gets the next one at once. A policy call waits
for more episodes only while that costs less than half a call. Which episodes share a
call decides the speed, never the outcome (see `policy_runner`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Self

from fibopolicy.envs import TaskEnv
from fibopolicy.envs.perturbations import Perturbation
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import Episode
from fibopolicy.evaluation.init_states import InitStates
from fibopolicy.evaluation.policy_runner import PolicyRunner
from fibopolicy.evaluation.simulator import Simulator, TaskInfo, check_display
from fibopolicy.utils.processes import check_importable

_log = logging.getLogger(__name__)

#: Retries of an episode before it becomes an error.
MAX_RETRIES = 2
#: Seconds without a heartbeat: while stepping or rendering, and while an environment is
#: made or an initial state restored.
STEP_TIMEOUT, START_LIMIT = 60.0, 600.0
#: Longest sleep of the loop, seconds. A pause of this process, for example by Ctrl-Z,
#: counts as no more than twice that.
POLL_INTERVAL = 0.5

#: Called with an episode's index and the digest of each camera's first frame.
FrameCheck = Callable[[int, Mapping[str, str]], None]


@dataclass
class SimulationThroughput:
    """Totals: seconds, seconds in the policy, its calls and rows, control steps."""

    wall_s: float = 0.0
    policy_s: float = 0.0
    calls: int = 0
    rows: int = 0
    steps: int = 0

    @property
    def steps_per_s(self) -> float:
        """Control steps per second of all simulators together."""
        return self.steps / max(self.wall_s, 1e-9)

    def __str__(self) -> str:
        busy = 100 * self.policy_s / max(self.wall_s, 1e-9)
        return (
            f"{self.steps_per_s:.0f} control steps/s; policy busy {busy:.0f} %, idle"
            f" {100 - busy:.0f} % of {self.wall_s:.1f} s; {self.rows / max(self.calls, 1):.1f}"
            " episodes per call"
        )


@dataclass
class _Slot:
    """A simulator and its episode.

    Args:
        began: when the episode was sent to the simulator.
        ready_since: time since which the episode waits for actions, or `None`.
        limit: seconds without a heartbeat after which the simulator counts as hung.
        silent_s: seconds since the last heartbeat.
    """

    simulator: Simulator
    episode: Episode | None = None
    began: float = 0.0
    ready_since: float | None = None
    limit: float = START_LIMIT
    silent_s: float = 0.0
    heartbeat: int = 0

    @property
    def starting(self) -> bool:
        return self.simulator.info is None

    @property
    def working(self) -> bool:
        return self.starting or (self.episode is not None and self.ready_since is None)

    def expect_heartbeat(self, limit: float) -> None:
        self.silent_s, self.limit = 0.0, limit


class Scheduler:
    """Simulators that stay open for several calls of `run`; a context manager.

    Args:
        make_env: makes one environment; each process calls it and must be able to
            import it.
        n_obs_steps: T_o, observations that the policy reads.
        workers: number of processes.
        step_timeout: seconds that a control step or a frame may take until the process
            counts as hung.
        max_retries: further attempts at an episode whose process dies, hangs or raises
            an error.
        viewer: open MuJoCo's viewer for the only worker.
    """

    def __init__(
        self,
        make_env: Callable[[], TaskEnv],
        n_obs_steps: int,
        workers: int,
        *,
        step_timeout: float = STEP_TIMEOUT,
        max_retries: int = MAX_RETRIES,
        viewer: bool = False,
    ) -> None:
        if workers < 1 or max_retries < 0 or step_timeout <= 0:
            raise UserError(
                "expected workers >= 1, max_retries >= 0 and step_timeout > 0 s, got"
                f" {workers}, {max_retries} and {step_timeout}"
            )
        if viewer:
            check_display()
            if workers > 1:
                raise UserError(f"the viewer shows one simulator, got {workers} workers")
        check_importable("the function that makes the environment", make_env)
        self.throughput = SimulationThroughput()
        self._open_simulator = functools.partial(Simulator, make_env, n_obs_steps, viewer)
        self._step_timeout, self._max_retries = step_timeout, max_retries
        self._failed_starts, self._warned = 0, False
        self._call_s = 0.0
        self._policy_idle_since = self._checked_at = time.perf_counter()
        self._slots: list[_Slot] = []
        try:
            for _ in range(workers):
                self._slots.append(_Slot(self._open_simulator()))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        while self._slots:
            self._slots.pop().simulator.close()

    def info(self) -> TaskInfo:
        """The description of the task; waits until one simulator is ready.

        Raises:
            UserError: no simulator can be started.
        """
        while True:
            for slot in self._slots:
                if slot.simulator.info is not None:
                    return slot.simulator.info
            self._receive(POLL_INTERVAL)

    def run(
        self,
        runner: PolicyRunner,
        init_states: InitStates,
        indices: Sequence[int],
        *,
        keep_states: bool = False,
        perturbation: Perturbation | None = None,
        check: FrameCheck = lambda index, hashes: None,
    ) -> Iterator[Episode]:
        """Run episodes by index; yields them in the order in which they end.

        Args:
            keep_states: keep the state after every step.
            perturbation: applied to every episode.
            check: called with each episode's index and the digests of its first frames,
                as they are without the perturbation.
        """
        queue = deque(Episode(index, perturbation=perturbation) for index in indices)
        began, before = time.perf_counter(), self.throughput.wall_s
        while queue or any(slot.episode for slot in self._slots):
            for slot in self._slots:
                if queue and slot.episode is None and not slot.starting:
                    self._begin(slot, queue.popleft(), init_states, keep_states)
            due = self._due(runner.batch_size)
            if due:
                self._act(runner, due)
            for episode in self._receive(0.0 if due else self._poll_time(), check):
                if episode.error and episode.attempt <= self._max_retries:
                    attempt = episode.attempt + 1
                    queue.appendleft(
                        Episode(episode.index, attempt=attempt, perturbation=perturbation)
                    )
                else:
                    self.throughput.steps += episode.steps
                    yield episode
            self.throughput.wall_s = before + time.perf_counter() - began

    def _begin(
        self, slot: _Slot, episode: Episode, init_states: InitStates, keep_states: bool
    ) -> None:
        # Shared memory, which the simulator fills before each action that it asks for.
        episode.window = slot.simulator.window()
        slot.episode, slot.began = episode, time.perf_counter()
        slot.expect_heartbeat(START_LIMIT)
        with contextlib.suppress(OSError):  # `_receive` handles a process that is gone
            state = init_states.states[episode.index]
            slot.simulator.start(state, keep_states, episode.perturbation, episode.index)

    def _due(self, batch_size: int) -> list[_Slot]:
        """The slots to act for now, longest waiting first; none if more should join."""
        ready = [slot for slot in self._slots if slot.ready_since is not None]
        ready.sort(key=lambda slot: slot.ready_since or 0.0)
        running = sum(slot.episode is not None for slot in self._slots)
        full = len(ready) >= min(batch_size, running)
        return ready[:batch_size] if ready and (full or self._max_wait(ready[0]) <= 0) else []

    def _max_wait(self, slot: _Slot) -> float:
        """How much longer a ready episode may wait for others, seconds: until half a
        call after the policy could have served it.
        """
        possible_since = max(slot.ready_since or 0.0, self._policy_idle_since)
        return possible_since + self._call_s / 2 - time.perf_counter()

    def _poll_time(self) -> float:
        waits = [self._max_wait(slot) for slot in self._slots if slot.ready_since is not None]
        return max(0.0, min([POLL_INTERVAL, *waits]))

    def _act(self, runner: PolicyRunner, due: list[_Slot]) -> None:
        began = time.perf_counter()
        actions = runner.act_batch([slot.episode for slot in due if slot.episode is not None])
        self._policy_idle_since = time.perf_counter()
        self._call_s = self._policy_idle_since - began
        self.throughput.policy_s += self._call_s
        self.throughput.calls += 1
        self.throughput.rows += len(due)
        for slot, action in zip(due, actions, strict=True):
            slot.ready_since = None
            slot.expect_heartbeat(self._step_timeout)
            with contextlib.suppress(OSError):
                slot.simulator.execute(action)

    def _receive(
        self, timeout: float, check: FrameCheck = lambda index, hashes: None
    ) -> list[Episode]:
        """Handle the messages that arrive within `timeout` seconds, and replace hung
        simulators.

        Returns:
            episodes that have ended; those whose simulator failed have an `error`.
        """
        ended: list[Episode | None] = []
        slots = {slot.simulator.connection: slot for slot in self._slots}
        for connection in wait(list(slots), timeout):
            slot = slots[connection]  # type: ignore[index]
            try:
                message = slot.simulator.receive()
            except (EOFError, OSError):
                reason = f"its process {slot.simulator.exit_reason()}"
                ended.append(self._replace(slot, reason))
                continue
            match message:
                case TaskInfo():
                    self._failed_starts = 0
                    for warning in () if self._warned else message.warnings:
                        warnings.warn(warning, stacklevel=2)
                    self._warned = True
                case ("ready", hashes):
                    assert slot.episode is not None
                    if hashes is not None:
                        check(slot.episode.index, hashes)
                    slot.ready_since = time.perf_counter()
                case ("ended", success, steps, total_reward, states):
                    assert slot.episode is not None
                    episode, slot.episode = slot.episode, None
                    episode.success, episode.steps = success, steps
                    episode.total_reward, episode.states = total_reward, states
                    episode.wall_s = time.perf_counter() - slot.began
                    ended.append(episode)
                case ("user_error", reason):
                    raise UserError(reason)
                case ("failed", reason):
                    ended.append(self._replace(slot, reason))
        ended += self._replace_hung()
        return [episode for episode in ended if episode is not None]

    def _replace_hung(self) -> list[Episode | None]:
        """Replace the simulators without a heartbeat; returns their failed episodes."""
        ended = []
        now = time.perf_counter()
        passed, self._checked_at = min(now - self._checked_at, 2 * POLL_INTERVAL), now
        for slot in self._slots:
            if slot.working:
                heartbeat = slot.simulator.heartbeat()
                slot.silent_s = slot.silent_s + passed if heartbeat == slot.heartbeat else 0.0
                slot.heartbeat = heartbeat
                if slot.silent_s > slot.limit:
                    reason = f"its process gave no heartbeat for {slot.limit:.0f} s"
                    ended.append(self._replace(slot, reason))
        return ended

    def _replace(self, slot: _Slot, reason: str) -> Episode | None:
        """Open a new process in a slot; returns the failed episode with its error.

        Raises:
            UserError: `max_retries` + 1 simulators in a row could not be started.
        """
        if slot.starting:
            _log.warning("a simulator did not start: %s", reason)
            self._failed_starts += 1
        slot.simulator.close()
        if self._failed_starts > self._max_retries:
            raise UserError(
                f"no simulator can be started: {reason}; tried {self._failed_starts} times"
            )
        slot.simulator = self._open_simulator()
        slot.heartbeat = 0
        slot.expect_heartbeat(START_LIMIT)
        episode, slot.episode, slot.ready_since = slot.episode, None, None
        if episode is not None:
            episode.error, episode.wall_s = reason, time.perf_counter() - slot.began
            attempts = f"attempt {episode.attempt} of {1 + self._max_retries}"
            _log.warning("episode %d: %s (%s)", episode.index, reason, attempts)
        return episode
