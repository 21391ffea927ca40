"""Demonstrations split into subtasks, and the segments followed again in new scenes.

The method is MimicGen's (Mandlekar et al., 2023): relative to an object, the end
effector (eef) does the same wherever the object lies. So a recorded approach and grasp
is moved with the object, turned by the object's symmetry such that the eef turns least
among all ways that the arm can follow, reached by interpolation, and followed
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
from fibopolicy.envs.robosuite.subtasks import EndEffector, Pose, Subtask
from fibopolicy.errors import UserError

Array = NDArray[np.float64]

# Splitting a demonstration.
#: An object is held when a closed gripper raises it by this much, metres.
RISE = 0.02
#: Picking up ends at this share of the highest rise: clear of the table and its
#: objects.
LIFTED = 0.8
#: An approach begins where the eef last was this far from the object, metres.
NEAR = 0.15
#: The eef pauses where its goal moves by no more than this, metres and radians; fingers
#: need this many steps to close.
PAUSE, PAUSE_TURN, FINGER_STEPS = 0.003, 0.03, 12

# Following its segments.
#: Interpolation moves the eef's goal by this much per control step: metres, radians.
STEP, STEP_TURN = 0.02, 0.1
#: It has arrived when the eef is this near its end, metres and radians, and waits for
#: that for this many steps.
ARRIVED, ARRIVED_TURN, ARRIVE_STEPS = 0.01, 0.1, 10
#: Planning looks at every n-th recorded pose; an error below this counts as reached
#: (metres, see `EndEffector.follow`); starts that differ by less than this turn are
#: one, radians.
PLAN_EVERY, REACHED, ALIKE = 4, 0.02, 0.5
#: An object was not grasped if its place in the gripper differs by this from the
#: recorded one, metres.
LOST = 0.03
#: Steps after the last recorded one, for objects to come to rest.
SETTLE_STEPS = 10


def _turns(symmetry: int) -> list[Pose]:
    """The turns about an upright axis that leave an object of this symmetry unchanged."""
    angles = np.arange(symmetry)[:, None] * 2 * np.pi / symmetry
    turns = np.tile(np.eye(4), (symmetry, 1, 1))
    turns[:, :3, :3] = Rotation.from_euler("z", angles).as_matrix()
    return list(turns)


#: The fingers are alike: the gripper may be turned by half a turn.
FLIPS = _turns(2)


@dataclass(frozen=True)
class Segment:
    """The movement of the end effector in one subtask of a demonstration.

    Args:
        subtask: the subtask.
        poses: `(N, 4, 4)` of the eef.
        goals: `(N, 4, 4)`, the poses that the recorded actions command.
        gripper: `(N,)`, the recorded gripper commands.
        reference: pose of the subtask's reference object.
        held: pose of the carried object in the eef's frame; `None` where nothing is
            carried.
    """

    subtask: Subtask
    poses: Array
    goals: Array
    gripper: Array
    reference: Pose
    held: Pose | None

    @property
    def start(self) -> Pose:
        """The eef's pose at the first step."""
        first: Pose = self.poses[0]
        return first


# Splitting


def split_subtasks(
    env: RobosuiteEnv,
    eef: EndEffector,
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
    objects = {o for subtask in subtasks for o in (subtask.reference, subtask.carried) if o}
    tracks = {o: np.empty((len(states), 4, 4)) for o in objects}
    for t, state in enumerate(states):
        eef.show(state)
        poses[t], success[t] = eef.pose, env.success()
        for o, track in tracks.items():
            track[t] = eef.body(o.body)
    env.set_state(SimState(model, states[-1]))
    # No state follows the last action, and a restored controller restarts, so it may
    # take a step or two longer.
    if not success.any() and not any(env.advance(actions[-1])[1] for _ in range(5)):
        raise UserError(
            f"its states do not meet the goal of {env.task_id} when they are restored: it does"
            " not demonstrate this task"
        )

    picked = subtasks[0].reference
    assert picked is not None
    closed = actions[:, 6] > 0
    close, release, lifted = _last_grasp(closed, tracks[picked][:, 2, 3])
    start = _approach_start(poses[:, :3, 3], tracks[picked][:, :3, 3], close)
    met = np.flatnonzero(success[release:])
    end = release + int(met[0]) + 1 if len(met) else len(states)
    bounds = [start, end] if len(subtasks) == 1 else [start, lifted, end]
    goals = eef.goals(poses, actions)
    segments = []
    for subtask, first, last in zip(subtasks, bounds[:-1], bounds[1:], strict=True):
        carried, reference, held = subtask.carried, np.eye(4), None
        if subtask.reference is not None:
            # An object may still fall into place or be nudged before it is grasped: its
            # pose counts at the instant when the fingers close on it.
            reference = tracks[subtask.reference][close if carried is None else first]
        if carried is not None:
            held = np.linalg.inv(poses[first]) @ tracks[carried][first]
        kept = first + _moving_steps(goals[first:last], closed[first:last])
        segment = Segment(subtask, poses[kept], goals[kept], actions[kept, 6], reference, held)
        segments.append(segment)
    return tuple(segments)


def _last_grasp(closed: NDArray[np.bool_], height: Array) -> tuple[int, int, int]:
    """The steps of the last lift: the gripper closes, it opens again, the object is lifted."""
    edges = np.flatnonzero(np.diff(closed.astype(int), prepend=0, append=0))
    for close, release in reversed(edges.reshape(-1, 2)):
        rise = height[close:release] - height[close]
        if rise.max() >= RISE:
            return int(close), int(release), int(close + np.argmax(rise >= LIFTED * rise.max()))
    raise UserError(
        f"no closed gripper raises the object by {100 * RISE:.0f} cm: there is no grasp to follow"
    )


def _approach_start(eef: Array, target: Array, close: int) -> int:
    """The step at which the approach to a grasp begins, from positions `(N, 3)`."""
    away = np.linalg.norm(eef[:close] - target[:close], axis=1) > NEAR
    return close - int(np.argmax(away[::-1])) - 1 if away.any() else 0


def _moving_steps(goals: Array, closed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The steps at which the eef's goal or the fingers move; the rest are pauses."""
    kept, switched = [0], 0
    for t in range(1, len(goals)):
        switched = t if closed[t] != closed[t - 1] else switched
        distance, turn = _difference(goals[kept[-1]], goals[t])
        moves = distance > PAUSE or turn > PAUSE_TURN
        if moves or t - switched < FINGER_STEPS or t == len(goals) - 1:
            kept.append(t)
    return np.array(kept)


# Following


def follow_segments(
    eef: EndEffector, segments: Sequence[Segment], act: Callable[[NDArray[np.float32]], bool]
) -> bool:
    """Follow a demonstration's segments in the present scene.

    Args:
        act: executes an action `(7,)` in [-1, 1] and returns whether the goal is met.

    Returns:
        Whether the goal was met.
    """

    def follow(goals: Iterable[tuple[Pose, float]]) -> bool:
        return any(
            act(np.append(eef.action_toward(goal), command).astype(np.float32))
            for goal, command in goals
        )

    starts = _plan(eef, segments, eef.pose, eef.joints) or [segment.start for segment in segments]
    to_scene: Callable[[Pose], Pose] | None = None
    for segment, start in zip(segments, starts, strict=True):
        to_scene = _to_scene(eef, segment, start)
        if to_scene is None:
            return False
        command = float(segment.gripper[0])
        if follow((goal, command) for goal in _interpolate_to(eef, to_scene(segment.start))):
            return True
        # Objects may have come to rest since then; where their symmetry leaves a
        # choice, it stays.
        to_scene = _to_scene(eef, segment, to_scene(segment.start)) or to_scene
        if follow(
            (to_scene(goal), float(command))
            for goal, command in zip(segment.goals, segment.gripper, strict=True)
        ):
            return True
    assert to_scene is not None  # there is a segment
    last = to_scene(segments[-1].goals[-1]), float(segments[-1].gripper[-1])
    return follow([last] * SETTLE_STEPS)


def _plan(
    eef: EndEffector,
    segments: Sequence[Segment],
    pose: Pose,
    joints: Array,
    grip: Pose | None = None,
) -> list[Pose] | None:
    """A start for each segment such that the arm can follow them all; `None` if there
    is none.

    Symmetries leave several ways. This is the one with the smallest turn that stays
    within the arm's reach and joint limits.

    Args:
        pose, joints: pose of the eef and joints of the arm at the beginning.
        grip: how the eef was turned, relative to the recording, when it picked up what
            it carries.
    """
    if not segments:
        return []
    segment, tried = segments[0], list[Pose]()
    held = None if segment.held is None or grip is None else np.linalg.inv(grip) @ segment.held
    recorded = (*segment.poses[::PLAN_EVERY], segment.poses[-1])
    for move, turn in _ways(eef, segment, held, segment.start):
        start, *others = (move @ recorded_pose @ turn for recorded_pose in recorded)
        if any(_difference(start, other)[1] < ALIKE for other in tried):
            continue
        tried.append(start)
        goals = np.stack([*_interpolated(pose, start), start, *others])
        reached, error = eef.follow(joints, goals)
        if error < REACHED:
            rest = _plan(eef, segments[1:], others[-1], reached, turn)
            if rest is not None:
                return [start, *rest]
    return None


def _to_scene(eef: EndEffector, segment: Segment, near: Pose) -> Callable[[Pose], Pose] | None:
    """A function from recorded poses of the eef to poses in the present scene.

    Symmetries leave several ways. This is the one that takes the segment's start
    nearest to the orientation of `near`; `None` if the carried object is not in the
    gripper.
    """
    carried, held = segment.subtask.carried, None
    if carried is not None:
        assert segment.held is not None
        held = np.linalg.inv(eef.pose) @ eef.body(carried.body)
        offsets = [(turn @ held)[:3, 3] - segment.held[:3, 3] for turn in FLIPS]
        if min(map(np.linalg.norm, offsets)) > LOST:
            return None
    move, turn = _ways(eef, segment, held, near)[0]
    return lambda pose: move @ pose @ turn


def _ways(
    eef: EndEffector, segment: Segment, held: Pose | None, near: Pose
) -> list[tuple[Pose, Pose]]:
    """The ways to take recorded poses to the present scene, as factors before and after
    a pose.

    They are sorted by the turn between the segment's start and `near`.

    Args:
        held: pose of the carried object in the eef's frame now.
    """
    reference, carried = segment.subtask.reference, segment.subtask.carried
    now = np.eye(4) if reference is None else eef.body(reference.body)
    symmetry = 1 if reference is None else reference.symmetry
    moves = [_upright_move(segment.reference, now @ turn) for turn in _turns(symmetry)]
    turns = FLIPS
    if carried is not None and segment.held is not None and held is not None:
        # The carried object has to arrive at its place: the eef corrects for how the
        # object lies in the gripper now.
        turns = [segment.held @ turn @ np.linalg.inv(held) for turn in _turns(carried.symmetry)]

    def turn_needed(way: tuple[Pose, Pose]) -> float:
        return _difference(way[0] @ segment.start @ way[1], near)[1]

    return sorted(product(moves, turns), key=turn_needed)


def _upright_move(then: Pose, now: Pose) -> Pose:
    """The move that takes an object from `then` to the place of `now`, turned about the
    vertical only.
    """
    turn = now[:3, :3] @ then[:3, :3].T
    yaw = np.arctan2(turn[1, 0] - turn[0, 1], turn[0, 0] + turn[1, 1])
    move = np.eye(4)
    move[:3, :3] = Rotation.from_euler("z", yaw).as_matrix()
    move[:3, 3] = now[:3, 3] - move[:3, :3] @ then[:3, 3]
    return move


def _interpolate_to(eef: EndEffector, end: Pose) -> Iterator[Pose]:
    """Goals on the straight way from the eef to `end`, then `end` until the eef is there."""
    yield from _interpolated(eef.pose, end)
    for _ in range(ARRIVE_STEPS):
        distance, turn = _difference(eef.pose, end)
        if distance < ARRIVED and turn < ARRIVED_TURN:
            return
        yield end


def _interpolated(start: Pose, end: Pose) -> Iterator[Pose]:
    """Goals on the straight way between two poses, without these two."""
    distance, turn = _difference(start, end)
    steps = max(int(np.ceil(distance / STEP)), int(np.ceil(turn / STEP_TURN)))
    rotations = Slerp([0, 1], Rotation.from_matrix([start[:3, :3], end[:3, :3]]))
    for share in np.arange(1, steps) / steps:
        goal = np.eye(4)
        goal[:3, 3] = (1 - share) * start[:3, 3] + share * end[:3, 3]
        goal[:3, :3] = rotations(share).as_matrix()
        yield goal


def _difference(a: Pose, b: Pose) -> tuple[float, float]:
    """Distance in metres and angle in radians between two poses."""
    cosine = (np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2
    return float(np.linalg.norm(a[:3, 3] - b[:3, 3])), float(np.arccos(np.clip(cosine, -1, 1)))
