"""Checks the content of a demonstration file before training on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fibopolicy.datasets.conventions import is_unit
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.errors import UserError, unknown

ACTION_TOLERANCE = 1e-6  # for float32 rounding of a bound
#: Share of steps outside the bounds above which actions are absolute poses. Recordings
#: of input devices hold only single commands outside.
MAX_OUTSIDE = 0.5

_PER_STEP = ("states", "rewards", "dones")

Floats = np.ndarray[Any, np.dtype[Any]]


def validate(
    file: DemoFile,
    cameras: Sequence[str],
    vectors: Sequence[str],
    demos: Sequence[str] | None = None,
) -> None:
    """Check the content that training reads.

    Actions and vectors are read in full; of images only shape and dtype are checked, so
    that a large file takes seconds. States, rewards and dones must be as long as the
    actions, where present. Other arrays may be of any length.

    Args:
        file: the open file.
        cameras: image observations, read as uint8 `(N, H, W, 3)`, of one shape over all
            demos.
        vectors: vector observations, read as float `(N, D)`, finite, of one width over
            all demos.
        demos: which demos; `None` means all.

    Raises:
        UserError: the first fault found, with its demo, step and value.
    """
    for _ in read_valid(file, cameras, vectors, file.demos if demos is None else demos):
        pass


def read_valid(
    file: DemoFile, cameras: Sequence[str], vectors: Sequence[str], demos: Sequence[str]
) -> Iterator[dict[str, Floats]]:
    """Yield what `validate` reads of each demo: "actions" `(N, A)` and vectors `(N, D)`."""
    for key in cameras:
        _check_key(file, "camera", key, file.camera_keys, "uint8 (N, H, W, 3)")
    for key in vectors:
        _check_key(file, "vector observation", key, file.vector_keys, "float (N, D)")
    wanted = {f"obs/{key}": file.obs[key] for key in (*cameras, *vectors)}
    for demo in demos:
        for key in _PER_STEP:
            if file.has(demo, key):
                _check_length(file, demo, key)
        for key, (shape, dtype) in wanted.items():
            found, found_dtype = file.layout(demo, key)
            if found[1:] != shape or found_dtype != dtype:
                first = f"{dtype} {_steps(shape)} in {file.demos[0]}"
                raise file.error(
                    f"{demo}: {key} is {found_dtype} {_steps(found[1:])}, but {first}; keep one"
                    " shape per file"
                )
            _check_length(file, demo, key)
        actions = file.read(demo, "actions")
        if (fault := next(_action_faults(file, demo, actions), None)) is not None:
            raise file.error(
                f"{fault}; actions must be finite floats of one width: correct or drop the demo"
            )
        yield {
            "actions": actions,
            **{key: _read_finite(file, demo, f"obs/{key}") for key in vectors},
        }


def _action_faults(file: DemoFile, demo: str, actions: Floats) -> Iterator[str]:
    if actions.ndim != 2 or not np.issubdtype(actions.dtype, np.floating):
        yield f"{demo}: actions are {actions.dtype} {actions.shape}, expected floats (N, A)"
    elif not actions.shape[1]:
        yield f"{demo}: actions have no dimensions"
    elif actions.shape[1] != file.action_dim:
        yield (
            f"{demo}: actions have {actions.shape[1]} dimensions, those of {file.demos[0]} have"
            f" {file.action_dim}"
        )
    else:
        finite = _finite(actions)
        for step, dim in () if finite.all() else np.argwhere(~finite):
            yield f"{demo}: action {actions[step, dim]:g} at step {step}, dimension {dim}"


def clipped(actions: Floats, env_args: Mapping[str, Any]) -> tuple[Floats, str | None]:
    """Actions `(n, A)` as the task's simulator executes them, and a warning where that
    changes any.

    Raises:
        UserError: most steps lie outside [-1, 1]: the actions are not what `env_args`
            say.
    """
    if not is_unit(env_args):
        return actions, None
    outside = (np.abs(actions) > 1 + ACTION_TOLERANCE).any(axis=1)  # (n,)
    if not outside.any():
        return actions, None
    outside_text = (
        f"{outside.sum()} of {len(actions)} steps hold actions outside [-1, 1], up to"
        f" {np.abs(actions).max():.3g}"
    )
    if outside.mean() > MAX_OUTSIDE:
        advice = (
            'write control_delta false (robosuite 1.5: input_type "absolute") into'
            " controller_configs of the attribute env_args if they are absolute poses or joint"
            " angles; otherwise rescale them"
            if env_args.get("type") == 1
            else "rescale them"
        )
        raise UserError(f"{outside_text}, where {env_args.get('env_name')} takes -1 to 1; {advice}")
    return np.clip(actions, -1, 1), f"{outside_text}; they are clipped, as the simulator does"


def _check_key(file: DemoFile, kind: str, key: str, known: Sequence[str], expected: str) -> None:
    if not file.obs:
        raise file.error(
            f"only states and actions are stored, no observations; {file.frames_advice}"
        )
    if key in file.obs and key not in known:
        shape, dtype = file.stored[key]
        found = file.unreadable.get(key, f"{dtype} {_steps(shape)}, expected {expected}")
        raise file.error(f"{kind} {key!r} is {found}")
    if key not in known:
        raise file.error(str(unknown(kind, key, known)))


def _check_length(file: DemoFile, demo: str, key: str) -> None:
    shape, _ = file.layout(demo, key)
    if shape[:1] != (file.length(demo),):
        steps, found = file.length(demo), shape[0] if shape else "no"
        raise file.error(
            f"{demo}: num_samples says {steps}, {key} holds {found} steps; fix the attribute or the"
            " arrays"
        )


def _read_finite(file: DemoFile, demo: str, key: str) -> Floats:
    values = file.read(demo, key)  # (N, D)
    finite = _finite(values)
    for step, dim in () if finite.all() else np.argwhere(~finite)[:1]:
        raise file.error(
            f"{demo}: {key} is {values[step, dim]:g} at step {step}, dimension {dim}; must be"
            " finite in float32"
        )
    return values


def _finite(values: Floats) -> np.ndarray[Any, np.dtype[np.bool_]]:
    # training reads float32; NaN compares false
    return np.asarray(np.abs(values) <= np.finfo(np.float32).max)


def _steps(shape: tuple[int, ...]) -> str:
    return f"({', '.join(['N', *map(str, shape)])})"
