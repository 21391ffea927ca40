"""How good each demonstration of a file is, in numbers that a person can check.

Every demonstration is measured, and each measure becomes a fault from 0 to 1:

    fault(x; a, b) = clip((x - a) / (b - a), 0, 1)

| fault      | x                                                      | a   | b   | weight |
|------------|--------------------------------------------------------|-----|-----|--------|
| failed     | 1 if its reward never reaches 1, though another's does | 0   | 1   | 0.8    |
| teleports  | largest step of any dimension over the file's median   | 3   | 10  | 0.8    |
| long       | length over the file's median                          | 1.5 | 3   | 0.5    |
| short      | the file's median length over its length               | 1.5 | 3   | 0.3    |
| still      | share of still steps less the file's median            | 0.1 | 0.5 | 0.5    |
| jerky      | jerk over the file's median                            | 1.5 | 4   | 0.5    |
| saturated  | share of saturated steps less the file's median        | 0.1 | 0.5 | 0.4    |

    score = product over the faults of (1 - weight * fault)

A score is 1 without a fault. It compares demonstrations within a file, so a fault that
all of them share is not found.

Steps, jerk and stillness come from positions `p` `(N, P)`: proprioception, or where a
file has none, the running sum of the actions. A dimension's unit is its root mean
square step in the median demonstration. A step is still if the root mean square of
`p[t+1] - p[t]` over the dimensions is below 0.1 units and the action does not change by
more than 1 % of its range. Jerk is the root mean square of the third difference of `p`.
A step is saturated if a dimension of its action is within 1 % of the file's smallest or
largest value of that dimension. An end less than half as far from 0 as the other does
not count, since 0 means rest; nor does a dimension that is at its ends in over 80 % of
all steps, such as an open or closed gripper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.conventions import proprioception
from fibopolicy.errors import UserError

if TYPE_CHECKING:
    from fibopolicy.datasets.hdf5 import DemoFile

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Fault(NamedTuple):
    """A measure and the range in which it becomes a fault.

    Args:
        measure: what x is.
        begin, end: a and b.
        weight: share of the score that a complete fault takes.
        reason: the fault in words, with `x` or `share`.
    """

    measure: str
    begin: float
    end: float
    weight: float
    reason: str


FAULTS: dict[str, Fault] = {
    "failed": Fault(
        "1 if its reward never reaches 1, though another's does", 0, 1, 0.8, "never succeeds"
    ),
    "teleports": Fault(
        "largest step of any dimension over the file's median",
        3,
        10,
        0.8,
        "its largest step is {x:.1f} times the usual one",
    ),
    "long": Fault("length over the file's median", 1.5, 3, 0.5, "{x:.1f} times the usual length"),
    "short": Fault(
        "the file's median length over its length",
        1.5,
        3,
        0.3,
        "the usual length is {x:.1f} times its own",
    ),
    "still": Fault(
        "share of still steps less the file's median",
        0.1,
        0.5,
        0.5,
        "stands still in {share:.0%} of its steps",
    ),
    "jerky": Fault("jerk over the file's median", 1.5, 4, 0.5, "{x:.1f} times the usual jerk"),
    "saturated": Fault(
        "share of saturated steps less the file's median",
        0.1,
        0.5,
        0.4,
        "saturates in {share:.0%} of its steps",
    ),
}
#: Units of motion below which a step is still; share of a dimension's range that counts
#: as its end; share of steps at the ends from which a dimension counts as a switch.
STILL, END, SWITCH = 0.1, 0.01, 0.8


@dataclass(frozen=True)
class DemoMotion:
    """What the score of a demonstration depends on.

    Args:
        demo: its name.
        actions: `(N, A)`.
        positions: `(N, P)`, P >= 1: where the robot was before each action.
        success: whether it reached its goal; `None` if that is unknown.
    """

    demo: str
    actions: Array
    positions: Array
    success: bool | None = None


@dataclass(frozen=True)
class DemoQuality:
    """A demonstration's score and what it comes from.

    Args:
        demo: its name.
        score: from 0 to 1.
        faults: from 0 to 1, those that take more than 0.01 of the score; the one that
            takes most first.
        reasons: the faults in words.
        success: see `DemoMotion`.
        still, saturated: `(N,)`, whether each step is.
        jerk, largest_step: over the file's medians.
    """

    demo: str
    score: float
    faults: dict[str, float]
    reasons: tuple[str, ...]
    success: bool | None
    still: Mask
    saturated: Mask
    jerk: float
    largest_step: float

    @property
    def steps(self) -> int:
        return len(self.still)


def score_demos(motions: Sequence[DemoMotion]) -> list[DemoQuality]:
    """The qualities of a file's demonstrations, in the given order.

    Args:
        motions: at least one, of one A and P, all finite.
    """
    steps = [np.diff(motion.positions, axis=0) for motion in motions]
    unit = np.median([_rms(step, axis=0) for step in steps], axis=0)
    moving = unit > 1e-9
    unit = unit[moving]
    steps = [step[:, moving] / unit for step in steps]
    jerks = np.array([_rms(np.diff(step, n=2, axis=0)) for step in steps])
    largest = np.array([np.abs(step).max(initial=0.0) for step in steps])
    still = [_still(*pair) for pair in zip(steps, _action_changes(motions), strict=True)]
    saturated = _saturated([motion.actions for motion in motions])
    lengths = np.array([len(motion.actions) for motion in motions], dtype=float)
    shares_still = np.array([mask.mean() for mask in still])
    shares_saturated = np.array([mask.mean() for mask in saturated])
    known = any(motion.success for motion in motions)
    measures = {
        "failed": np.array([float(known and motion.success is False) for motion in motions]),
        "teleports": _over_median(largest),
        "long": _over_median(lengths),
        "short": np.median(lengths) / lengths,
        "still": shares_still - np.median(shares_still),
        "jerky": _over_median(jerks),
        "saturated": shares_saturated - np.median(shares_saturated),
    }
    qualities = []
    for i, motion in enumerate(motions):
        shares = {"still": shares_still[i], "saturated": shares_saturated[i]}
        score, found = 1.0, []
        for name, (_, begin, end, weight, reason) in FAULTS.items():
            x = measures[name][i]
            fault = float(np.clip((x - begin) / (end - begin), 0, 1))
            score *= 1 - weight * fault
            if weight * fault > 0.01:
                text = reason.format(x=x, share=shares.get(name, 0.0))
                found.append((weight * fault, name, fault, text))
        found.sort(reverse=True)
        qualities.append(
            DemoQuality(
                motion.demo,
                score,
                {name: fault for _, name, fault, _ in found},
                tuple(text for *_, text in found),
                motion.success,
                still[i],
                saturated[i],
                float(measures["jerky"][i]),
                float(measures["teleports"][i]),
            )
        )
    return qualities


def worst_first(qualities: Iterable[DemoQuality]) -> list[DemoQuality]:
    """Sorted by score; equal ones keep their order."""
    return sorted(qualities, key=lambda quality: quality.score)


def _rms(values: Array, axis: int | None = None) -> Array:
    """The root mean square; 0 of nothing."""
    if values.size == 0:
        return np.zeros(values.shape[1] if axis == 0 else ())
    squares: Array = np.sqrt(np.mean(np.square(values), axis=axis))
    return squares


def _over_median(values: Array) -> Array:
    """Values over their median; 1 where that is 0, since nothing stands out."""
    median = np.median(values)
    return values / median if median > 0 else np.ones_like(values)


def _action_changes(motions: Sequence[DemoMotion]) -> list[Array]:
    """How much the action of each step differs from the one before, `(N - 1,)`: the
    largest change over the dimensions, as a share of their range.
    """
    actions = [motion.actions for motion in motions]
    span = np.ptp(np.concatenate(actions), axis=0)
    span = np.where(span > 0, span, np.inf)
    return [np.abs(np.diff(one, axis=0) / span).max(axis=1, initial=0.0) for one in actions]


def _still(steps: Array, action_changes: Array) -> Mask:
    """Whether each of N steps is still; the last, which leads nowhere, as the one before."""
    if len(steps) == 0:
        return np.zeros(1, dtype=bool)
    speed = np.sqrt(np.mean(np.square(steps), axis=1)) if steps.shape[1] else np.zeros(len(steps))
    still = (speed < STILL) & (action_changes < END)
    return np.append(still, still[-1])


def _saturated(actions: Sequence[Array]) -> list[Mask]:
    """Whether each action is at an end of the range of a dimension, except a switch."""
    pooled = np.concatenate(actions)
    low, high = pooled.min(axis=0), pooled.max(axis=0)
    margin = END * (high - low)
    far = np.maximum(np.abs(low), np.abs(high)) / 2
    low_limit = np.where(np.abs(low) >= far, low + margin, -np.inf)
    high_limit = np.where(np.abs(high) >= far, high - margin, np.inf)

    def at_ends(values: Array) -> Mask:
        ends: Mask = (values <= low_limit) | (values >= high_limit)
        return ends

    counts = (at_ends(pooled).mean(axis=0) <= SWITCH) & (margin > 0)
    return [at_ends(one)[:, counts].any(axis=1) for one in actions]


# Of a file


def read_motions(
    file: DemoFile, demos: Sequence[str], skipped: dict[str, str] | None = None
) -> list[DemoMotion]:
    """What `score_demos` needs of a file's demonstrations. It reads actions,
    proprioception and rewards, not images.

    Args:
        skipped: gets the demos that cannot be scored, with the reason; without it they
            raise an error.

    Raises:
        UserError: actions or proprioception are missing, not finite or of another width
            than in the first demo; or no demo can be scored.
    """
    motions: list[DemoMotion] = []
    for demo in demos:
        try:
            motion = _read_motion(file, demo)
            for part in ("actions", "positions"):
                width, usual = (getattr(m, part).shape[1] for m in (motion, [*motions, motion][0]))
                if width != usual:
                    raise file.error(f"{demo}: its {part} have width {width}, others {usual}")
        except UserError as error:
            if skipped is None:
                raise
            skipped[demo] = str(error).removeprefix(f"{file.path}: {demo}: ")
        else:
            motions.append(motion)
    if not motions:
        raise file.error(f"no demo can be scored: {next(iter((skipped or {}).values()))}")
    if not any(motion.success for motion in motions):  # its rewards may have another scale
        return [replace(motion, success=None) for motion in motions]
    return motions


def position_names(file: DemoFile) -> list[str]:
    """The names of the P dimensions of `DemoMotion.positions`."""
    keys = _position_keys(file)
    named = [f"{key} {i}" for key in keys for i in range(file.vector_dim(key))]
    return named or [f"sum of action {i}" for i in range(file.action_dim)]


def _position_keys(file: DemoFile) -> list[str]:
    """Proprioception without angles about an axis, which jump at half a turn."""
    return [k for k in proprioception(file.vector_keys) if not k.endswith(("ee_ori", "ee_states"))]


def _read_motion(file: DemoFile, demo: str) -> DemoMotion:
    actions = _matrix(file, demo, "actions")
    parts = []
    for key in _position_keys(file):
        values = _matrix(file, demo, f"obs/{key}")
        parts.append(_continuous(values) if key.endswith("quat") else values)
    positions = np.concatenate(parts, axis=1) if parts else np.cumsum(actions, axis=0)
    rewards = file.read(demo, "rewards") if file.has(demo, "rewards") else None
    success = None if rewards is None else bool(np.max(rewards, initial=0) >= 1)
    return DemoMotion(demo, actions, positions, success)


def _matrix(file: DemoFile, demo: str, key: str) -> Array:
    values = file.read(demo, key)
    if values.ndim != 2 or len(values) != file.length(demo) or values.dtype.kind not in "fiu":
        raise file.error(
            f"{demo}: expected {key} of shape ({file.length(demo)}, width), found {values.dtype}"
            f" {values.shape}"
        )
    if not np.isfinite(values).all():
        raise file.error(f"{demo}: {key} hold values that are not finite")
    return values.astype(np.float64)


def _continuous(quaternions: Array) -> Array:
    """Quaternions `(N, 4)` without changes of sign, which mean no motion."""
    turned = (quaternions[1:] * quaternions[:-1]).sum(axis=1) < 0
    signs = np.where(np.cumsum(turned) % 2, -1.0, 1.0)
    continuous: Array = quaternions * np.concatenate([[1.0], signs])[:, None]
    return continuous
