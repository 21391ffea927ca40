"""Demonstrations taken apart at object interactions, and their parts put together again
in new scenes.

The method is MimicGen's (Mandlekar et al., 2023): what a hand does to an object is,
relative to the object, the same wherever the object lies. A recorded approach and grasp
is therefore moved with the object, turned by its symmetry so that the hand turns least
of all ways that the arm can follow, reached over a straight bridge, and followed
closed-loop in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation, Slerp

from fibopolicy.envs.base import SimState
from fibopolicy.envs.robosuite.environment import RobosuiteEnv
from fibopolicy.envs.robosuite.subtasks import Hand, Pose, Subtask
from fibopolicy.errors import UserError

Array = NDArray[np.float64]

#: Bridges move the hand's goal by so much each control step: metres, radians.
BRIDGE_STEP, BRIDGE_TURN = 0.02, 0.1
#: A bridge has arrived when the hand is so near its end, metres and radians; the hand
#: gets so many more steps for it.
ARRIVED, ARRIVED_TURN, ARRIVE_STEPS = 0.01, 0.1, 10
#: An object is held when a closed gripper raises it by so much, metres.
RISE = 0.02
#: Picking up ends at this share of the highest rise: clear of the table and of what
#: stands there.
LIFTED = 0.8
#: An approach begins where the hand last was so far from the thing, metres: a bridge
#: leads there.
NEAR = 0.15
#: When the way is planned: every so many recorded poses are looked at; what the arm
#: stays within of is reached (metres, see `Hand.follow`); and starts that differ by
#: less than this turn are one, radians.
PLAN_EVERY, REACHED, ALIKE = 4, 0.02, 0.5
#: The hand pauses where its goal moves by no more than this, metres and radians;
#: fingers need so many steps to close.
PAUSE, PAUSE_TURN, FINGER_STEPS = 0.003, 0.03, 12
#: What lies otherwise in the hand than recorded by more than this was not grasped,
#: metres.
LOST = 0.03
#: After the last recorded step, steps for things to come to rest.
SETTLE_STEPS = 10


def _turns(symmetry: int) -> list[Pose]:
    """The turns about an upright axis that leave a thing of this symmetry as it was."""
    turns = np.tile(np.eye(4), (symmetry, 1, 1))
    turns[:, :3, :3] = Rotation.from_euler(
        "z", np.arange(symmetry)[:, None] * 2 * np.pi / symmetry
    ).as_matrix()
    return list(turns)


#: The fingers are alike: the hand may be turned by half a turn.
FLIPS = _turns(2)


@dataclass(frozen=True)
class Segment:
    """What the hand did in one subtask of a demonstration.

    Args:
        subtask: which.
        poses: `(N, 4, 4)`, where the hand was.
        goals: `(N, 4, 4)`, the poses that the recorded actions were commands toward.
        gripper: `(N,)`, the recorded gripper commands.
        about: where the thing that the subtask is about was.
        held: where the carried thing was, in the hand's frame; `None` where nothing is
            carried.
    """

    subtask: Subtask
    poses: Array
    goals: Array
    gripper: Array
    about: Pose
    held: Pose | None

    @property
    def start(self) -> Pose:
        """Where the hand was at the first step."""
        first: Pose = self.poses[0]
        return first


def take_apart(
    env: RobosuiteEnv,
    hand: Hand,
    subtasks: Sequence[Subtask],
    model: str,
    states: Array,
    actions: Array,
) -> tuple[Segment, ...]:
    """The segments of a demonstration, one for each subtask.

    Args:
        states: `(N, S)`, before each action.
        actions: `(N, 7)`.

    Raises:
        UserError: the states do not fit the task; they never meet its goal; no object
            is grasped and lifted.
    """
    env.set_state(SimState(model, states[0]))
    poses, success = np.empty((len(states), 4, 4)), np.zeros(len(states), dtype=bool)
    bodies = {
        thing.body
        for subtask in subtasks
        for thing in (subtask.about, subtask.carried)
        if thing is not None
    }
    tracks = {body: np.empty((len(states), 4, 4)) for body in bodies}
    for t, state in enumerate(states):
        hand.show(state)
        poses[t], success[t] = hand.pose, env.success()
        for body, track in tracks.items():
            track[t] = hand.body(body)
    env.set_state(SimState(model, states[-1]))
    # No state follows the last action, and a restored controller starts anew, so that
    # it may take a step or two longer.
    if not success.any() and not any(env.advance(actions[-1])[1] for _ in range(5)):
        raise UserError(
            f"its states do not meet the goal of {env.task_id} when they are restored: it is no"
            " demonstration of it"
        )

    picked = subtasks[0].about
    assert picked is not None
    closed = actions[:, 6] > 0
    close, release, lifted = _hold(closed, tracks[picked.body][:, 2, 3])
    start = _begin(poses[:, :3, 3], tracks[picked.body][:, :3, 3], close)
    met = np.flatnonzero(success[release:])
    end = release + int(met[0]) + 1 if len(met) else len(states)
    goals = hand.goals(poses, actions)
    parts = (
        [slice(start, end)] if len(subtasks) == 1 else [slice(start, lifted), slice(lifted, end)]
    )
    segments = []
    for subtask, part in zip(subtasks, parts, strict=True):
        # A thing may still fall into place at first, or be nudged: what counts is where
        # it is when the fingers close on it.
        when = close if subtask.carried is None else part.start
        about = np.eye(4) if subtask.about is None else tracks[subtask.about.body][when]
        held = (
            None
            if subtask.carried is None
            else np.linalg.inv(poses[part.start]) @ tracks[subtask.carried.body][part.start]
        )
        moving = part.start + _moving(goals[part], closed[part])
        segments.append(
            Segment(subtask, poses[moving], goals[moving], actions[moving, 6], about, held)
        )
    return tuple(segments)


def _hold(closed: NDArray[np.bool_], height: Array) -> tuple[int, int, int]:
    """When the gripper closes on an object, when it opens again, and when the object is
    well up; of the last lift.
    """
    edges = np.flatnonzero(np.diff(closed.astype(int), prepend=0, append=0))
    for close, release in reversed(edges.reshape(-1, 2)):
        rise = height[close:release] - height[close]
        if rise.max() >= RISE:
            return int(close), int(release), int(close + np.argmax(rise >= LIFTED * rise.max()))
    raise UserError(
        f"no closed gripper raises the object by {100 * RISE:.0f} cm: there is no grasp to take"
        " over"
    )


def _begin(hand: Array, thing: Array, close: int) -> int:
    """The step at which the approach to a grasp begins: what lies before is idle, or
    about other things.
    """
    away = np.linalg.norm(hand[:close] - thing[:close], axis=1) > NEAR
    return close - int(np.argmax(away[::-1])) - 1 if away.any() else 0


def _moving(goals: Array, closed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The steps at which the hand's goal moves on or the fingers do: the rest are a
    person's pauses.
    """
    kept, switched = [0], 0
    for t in range(1, len(goals)):
        switched = t if closed[t] != closed[t - 1] else switched
        distance, turn = _apart(goals[kept[-1]], goals[t])
        if (
            distance > PAUSE
            or turn > PAUSE_TURN
            or t - switched < FINGER_STEPS
            or t == len(goals) - 1
        ):
            kept.append(t)
    return np.array(kept)


def attempt(
    hand: Hand, segments: Sequence[Segment], act: Callable[[NDArray[np.float32]], bool]
) -> bool:
    """Follow a demonstration's segments in the scene at hand; returns whether the goal
    was met.

    Args:
        act: executes an action `(7,)` in [-1, 1] and says whether the goal is met.
    """

    def follow(goals: Iterable[tuple[Pose, float]]) -> bool:
        return any(
            act(np.append(hand.action_toward(goal), command).astype(np.float32))
            for goal, command in goals
        )

    starts = _plan(hand, segments, hand.pose, hand.joints) or [
        segment.start for segment in segments
    ]
    moved: Callable[[Pose], Pose] | None = None
    for segment, start in zip(segments, starts, strict=True):
        moved = _moved(hand, segment, start)
        if moved is None:
            return False
        command = float(segment.gripper[0])
        if follow((goal, command) for goal in _bridge(hand, moved(segment.start))):
            return True
        # Things may have come to rest since; where their symmetry leaves a choice, it
        # stays.
        moved = _moved(hand, segment, moved(segment.start)) or moved
        if follow(
            (moved(goal), float(command))
            for goal, command in zip(segment.goals, segment.gripper, strict=True)
        ):
            return True
    assert moved is not None  # there is a segment
    last = moved(segments[-1].goals[-1]), float(segments[-1].gripper[-1])
    return follow([last] * SETTLE_STEPS)


def _plan(
    hand: Hand, segments: Sequence[Segment], pose: Pose, joints: Array, grip: Pose | None = None
) -> list[Pose] | None:
    """Where each segment is to start so that the arm can follow them all from `pose`;
    `None` when it cannot.

    Of the ways that symmetries leave open, the first that lies within the joints' reach
    and stops, by the turn they ask for.

    Args:
        grip: how the hand was turned, against the recording, when it picked up what it
            carries.
    """
    if not segments:
        return []
    segment, tried = segments[0], list[Pose]()
    held = None if segment.held is None or grip is None else np.linalg.inv(grip) @ segment.held
    for move, turn in _ways(hand, segment, held, segment.start):
        start, *others = (
            move @ recorded @ turn for recorded in (*segment.poses[::PLAN_EVERY], segment.poses[-1])
        )
        if any(_apart(start, other)[1] < ALIKE for other in tried):
            continue
        tried.append(start)
        reached, missed = hand.follow(joints, np.stack([*_way(pose, start), start, *others]))
        if (
            missed < REACHED
            and (rest := _plan(hand, segments[1:], others[-1], reached, turn)) is not None
        ):
            return [start, *rest]
    return None


def _moved(hand: Hand, segment: Segment, near: Pose) -> Callable[[Pose], Pose] | None:
    """Takes recorded poses of the hand to the present scene; `None` when what should be
    in the hand is not.

    Of the ways that symmetries leave open, the one that takes the segment's start
    nearest to the orientation of `near`.
    """
    carried, held = segment.subtask.carried, None
    if carried is not None:
        assert segment.held is not None
        held = np.linalg.inv(hand.pose) @ hand.body(carried.body)
        if min(np.linalg.norm((turn @ held)[:3, 3] - segment.held[:3, 3]) for turn in FLIPS) > LOST:
            return None
    move, grip = _ways(hand, segment, held, near)[0]
    return lambda pose: move @ pose @ grip


def _ways(hand: Hand, segment: Segment, held: Pose | None, near: Pose) -> list[tuple[Pose, Pose]]:
    """The ways to take recorded poses of the hand to the present scene, as factors
    before and after a pose.

    Those first that take the segment's start nearer to the orientation of `near`.

    Args:
        held: where what is carried lies in the hand now.
    """
    about, carried = segment.subtask.about, segment.subtask.carried
    now = np.eye(4) if about is None else hand.body(about.body)
    moves = [
        _carry(segment.about, now @ turn) for turn in _turns(1 if about is None else about.symmetry)
    ]
    if carried is None or segment.held is None or held is None:
        grips = FLIPS
    else:
        # What counts is where the thing goes: however it lies in the hand now, the hand
        # makes up for it.
        grips = [segment.held @ turn @ np.linalg.inv(held) for turn in _turns(carried.symmetry)]
    return sorted(
        product(moves, grips), key=lambda way: _apart(way[0] @ segment.start @ way[1], near)[1]
    )


def _carry(then: Pose, now: Pose) -> Pose:
    """The move that shifts a thing from where it was to where it is, and turns it about
    the vertical only.
    """
    turn = now[:3, :3] @ then[:3, :3].T
    yaw = np.arctan2(turn[1, 0] - turn[0, 1], turn[0, 0] + turn[1, 1])
    move = np.eye(4)
    move[:3, :3] = Rotation.from_euler("z", yaw).as_matrix()
    move[:3, 3] = now[:3, 3] - move[:3, :3] @ then[:3, 3]
    return move


def _bridge(hand: Hand, end: Pose) -> Iterator[Pose]:
    """Goals on the straight way from where the hand is to `end`, and that one again
    until it is there.
    """
    yield from _way(hand.pose, end)
    for _ in range(ARRIVE_STEPS):
        distance, turn = _apart(hand.pose, end)
        if distance < ARRIVED and turn < ARRIVED_TURN:
            return
        yield end


def _way(start: Pose, end: Pose) -> Iterator[Pose]:
    """Goals on the straight way between two poses, without these."""
    distance, turn = _apart(start, end)
    steps = max(int(np.ceil(distance / BRIDGE_STEP)), int(np.ceil(turn / BRIDGE_TURN)))
    rotations = Slerp([0, 1], Rotation.from_matrix([start[:3, :3], end[:3, :3]]))
    for share in np.arange(1, steps) / steps:
        goal = np.eye(4)
        goal[:3, 3] = (1 - share) * start[:3, 3] + share * end[:3, 3]
        goal[:3, :3] = rotations(share).as_matrix()
        yield goal


def _apart(a: Pose, b: Pose) -> tuple[float, float]:
    """Distance in metres and angle in radians between two poses."""
    cosine = (np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2
    return float(np.linalg.norm(a[:3, 3] - b[:3, 3])), float(np.arccos(np.clip(cosine, -1, 1)))
