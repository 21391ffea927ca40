"""Many episodes at once: one process per simulator, one policy for all of them.

Episodes are handed out by index, and a simulator that has finished one gets the next at
once. A policy's call waits for more episodes only while that costs less than half a
call; which episodes share a call decides the speed and never the outcome (see
`acting`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs import TaskEnv
from fibopolicy.errors import UserError
from fibopolicy.evaluation.init_states import Starts
from fibopolicy.evaluation.policy_runner import Actor, Request
from fibopolicy.evaluation.simulator import Failed, Ready, Simulator, TaskInfo
from fibopolicy.evaluation.viewer import check_display
from fibopolicy.utils.processes import check_importable

_log = logging.getLogger(__name__)

#: How often an episode is begun before it is given up as an error.
TRIES = 3
#: Seconds without a sign of life: while stepping or rendering, and while an environment
#: is made or a start state restored.
STEP_LIMIT, START_LIMIT = 60.0, 600.0
#: How long the loop sleeps at most, seconds. A pause of this process, as by Ctrl-Z,
#: counts for no more than that.
NAP = 0.5


@dataclass(frozen=True)
class Outcome:
    """How an episode ended.

    Args:
        error: empty, or why it could not be run to its end in `tries` attempts; then
            nothing else means anything.
        wall_s: seconds from its last attempt's start to its end, waiting for others
            included.
        frames: those of the filmed camera, uint8 `(H, W, 3)`.
    """

    index: int
    success: bool
    steps: int
    total_reward: float
    wall_s: float
    tries: int
    error: str = ""
    frames: tuple[NDArray[np.uint8], ...] = ()


@dataclass
class Load:
    """Where the time went: seconds in all, seconds in the policy, its calls, the
    requests they answered, control steps.
    """

    wall_s: float = 0.0
    policy_s: float = 0.0
    calls: int = 0
    requests: int = 0
    steps: int = 0

    @property
    def steps_per_s(self) -> float:
        """Control steps a second, of all simulators together."""
        return self.steps / max(self.wall_s, 1e-9)

    def __str__(self) -> str:
        wall = max(self.wall_s, 1e-9)
        return (
            f"{self.steps_per_s:.0f} control steps/s; policy busy {100 * self.policy_s / wall:.0f}"
            f" %, idle {100 - 100 * self.policy_s / wall:.0f} % of {self.wall_s:.1f} s;"
            f" {self.requests / max(self.calls, 1):.1f} episodes per call"
        )


@dataclass
class _Slot:
    """A simulator and what it is at."""

    simulator: Simulator
    request: Request | None = None
    ready: bool = False
    ready_at: float = 0.0
    began: float = 0.0
    starting: bool = True
    beats: int = 0
    silent_s: float = 0.0
    limit: float = field(default=START_LIMIT)

    @property
    def working(self) -> bool:
        return self.starting or (self.request is not None and not self.ready)

    def expect(self, limit: float) -> None:
        self.silent_s, self.limit = 0.0, limit


class VectorRollout:
    """Simulators that stay open for several calls of `run`; a context manager.

    Args:
        make_env: makes one environment; called in each process, which must be able to
            import it.
        n_obs_steps: T_o, observations that the policy reads.
        workers: processes.
        step_limit: seconds that a control step or a picture may take before the process
            counts as hung.
        tries: attempts for an episode whose process dies, hangs or raises.
        viewer: open MuJoCo's viewer beside the only worker.
    """

    def __init__(
        self,
        make_env: Callable[[], TaskEnv],
        n_obs_steps: int,
        workers: int,
        *,
        step_limit: float = STEP_LIMIT,
        tries: int = TRIES,
        viewer: bool = False,
    ) -> None:
        if workers < 1 or tries < 1 or step_limit <= 0:
            raise UserError(
                f"expected workers and tries >= 1 and a step limit > 0 s, got {workers}, {tries}"
                f" and {step_limit}"
            )
        if viewer:
            check_display()
            if workers > 1:
                raise UserError(
                    f"the viewer shows one simulator, and {workers} workers were asked for"
                )
        check_importable("the function that makes the environment", make_env)
        self._simulator = functools.partial(Simulator, make_env, n_obs_steps, viewer)
        self._step_limit, self._tries = step_limit, tries
        self._stillborn, self._told = 0, False
        self._call_s = 0.0
        self._idle_since = self._heard_at = time.perf_counter()
        self.load = Load()
        self._slots: list[_Slot] = []
        try:
            for _ in range(workers):
                self._slots.append(_Slot(self._simulator()))
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
        """What the environments are, as soon as one of them stands."""
        while True:
            for slot in self._slots:
                if slot.simulator.info is not None:
                    return slot.simulator.info
            for _ in self._hear(NAP, Counter()):
                raise AssertionError("no episode is under way")

    def run(
        self,
        actor: Actor,
        starts: Starts,
        indices: Sequence[int],
        *,
        film: str | None = None,
        check: Callable[[int, Mapping[str, str]], None] = lambda index, hashes: None,
    ) -> Iterator[Outcome]:
        """Episodes by index, in the order in which they end.

        Args:
            film: observation key of a camera whose every frame comes back.
            check: called with an index and the digest of each camera's first frame.
        """
        queue, tries = deque(indices), Counter[int]()
        began, before = time.perf_counter(), self.load.wall_s
        while queue or any(slot.request for slot in self._slots):
            for slot in self._slots:
                if queue and slot.request is None and not slot.starting:
                    self._begin(slot, queue.popleft(), starts, tries, film)
            due = self._due(actor.batch)
            if due:
                self._act(actor, due)
            waiting = [slot for slot in self._slots if slot.ready]
            patience = 0.0 if due else max(0.0, min([NAP, *map(self._linger, waiting)]))
            for outcome in self._hear(patience, tries, check):
                if isinstance(outcome, int):
                    queue.appendleft(outcome)
                else:
                    self.load.steps += outcome.steps
                    yield outcome
            self.load.wall_s = before + time.perf_counter() - began

    def _begin(
        self, slot: _Slot, index: int, starts: Starts, tries: Counter[int], film: str | None
    ) -> None:
        tries[index] += 1
        slot.request = Request(index, slot.simulator.window())
        slot.began = time.perf_counter()
        slot.expect(START_LIMIT)
        with contextlib.suppress(OSError):  # a process that has gone shows itself to `_hear`
            slot.simulator.start(starts.states[index], film)

    def _due(self, batch: int) -> list[_Slot]:
        """The episodes to act for now, those that waited longest first; none if it is
        better to wait for more.
        """
        ready = sorted((slot for slot in self._slots if slot.ready), key=lambda slot: slot.ready_at)
        live = sum(slot.request is not None for slot in self._slots)
        if ready and (len(ready) >= min(batch, live) or self._linger(ready[0]) <= 0):
            return ready[:batch]
        return []

    def _linger(self, oldest: _Slot) -> float:
        """How much longer an episode may wait for company, seconds: half a call after
        the policy could have had it.
        """
        return max(oldest.ready_at, self._idle_since) + self._call_s / 2 - time.perf_counter()

    def _act(self, actor: Actor, due: list[_Slot]) -> None:
        began = time.perf_counter()
        actions = actor.act([slot.request for slot in due if slot.request is not None])
        self._idle_since = time.perf_counter()
        self._call_s = self._idle_since - began
        self.load.policy_s += self._call_s
        self.load.calls += 1
        self.load.requests += len(due)
        for slot, action in zip(due, actions, strict=True):
            slot.ready = False
            slot.expect(self._step_limit)
            with contextlib.suppress(OSError):
                slot.simulator.execute(action)

    def _hear(
        self,
        patience: float,
        tries: Counter[int],
        check: Callable[[int, Mapping[str, str]], None] = lambda index, hashes: None,
    ) -> Iterator[Outcome | int]:
        """What the processes say within `patience` seconds: outcomes, and indices of
        episodes that must run again.
        """
        slots = {slot.simulator.connection: slot for slot in self._slots}
        for connection in wait(list(slots), patience):
            slot = slots[connection]  # type: ignore[index]
            try:
                reply = slot.simulator.receive()
            except (EOFError, OSError):
                yield from self._replace(
                    slot, f"its process {slot.simulator.how_it_ended()}", tries
                )
                continue
            if isinstance(reply, Failed) and reply.user:
                raise UserError(reply.reason)
            if isinstance(reply, Failed):
                yield from self._replace(slot, reply.reason, tries)
            elif isinstance(reply, TaskInfo):
                slot.starting, self._stillborn = False, 0
                if not self._told:
                    self._told = True
                    for warning in reply.warnings:
                        warnings.warn(warning, stacklevel=2)
            elif isinstance(reply, Ready):
                assert slot.request is not None
                if reply.hashes is not None:
                    check(slot.request.index, reply.hashes)
                slot.ready, slot.ready_at = True, time.perf_counter()
            else:
                assert slot.request is not None
                index, wall = slot.request.index, time.perf_counter() - slot.began
                slot.request = None
                yield Outcome(
                    index,
                    reply.success,
                    reply.steps,
                    reply.total_reward,
                    wall,
                    tries[index],
                    frames=reply.frames,
                )
        yield from self._find_hung(tries)

    def _find_hung(self, tries: Counter[int]) -> Iterator[Outcome | int]:
        now = time.perf_counter()
        passed, self._heard_at = min(now - self._heard_at, 2 * NAP), now
        for slot in self._slots:
            if not slot.working:
                continue
            beats = slot.simulator.beats()
            slot.silent_s = slot.silent_s + passed if beats == slot.beats else 0.0
            slot.beats = beats
            if slot.silent_s > slot.limit:
                yield from self._replace(
                    slot, f"its process gave no sign of life for {slot.limit:.0f} s", tries
                )

    def _replace(self, slot: _Slot, reason: str, tries: Counter[int]) -> Iterator[Outcome | int]:
        """Put a fresh process in the place of one that is no good; its episode runs
        again, or ends as an error.
        """
        slot.simulator.close()
        if slot.starting:
            _log.warning("a simulator did not start: %s", reason)
            self._stillborn += 1
            if self._stillborn >= self._tries:
                raise UserError(
                    f"no simulator can be started: {reason}; tried {self._stillborn} times"
                )
        request = slot.request
        slot.simulator = self._simulator()
        slot.request, slot.ready, slot.starting, slot.beats = None, False, True, 0
        slot.expect(START_LIMIT)
        if request is None:
            return
        _log.warning(
            "episode %d: %s (attempt %d of %d)",
            request.index,
            reason,
            tries[request.index],
            self._tries,
        )
        if tries[request.index] < self._tries:
            yield request.index
        else:
            yield Outcome(
                request.index,
                False,
                0,
                0.0,
                time.perf_counter() - slot.began,
                tries[request.index],
                reason,
            )
