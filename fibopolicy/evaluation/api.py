"""Measure any policy in a few lines of Python."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fibopolicy.envs import TaskEnv, from_env_args, make, resolve
from fibopolicy.envs.registry import task_id_of
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import EpisodeResult
from fibopolicy.evaluation.init_states import Starts, default_starts, load_starts
from fibopolicy.evaluation.measure import (
    Identity,
    check_view,
    default_workers,
    make_actor,
    measure,
    view_options,
    weights_digest,
)
from fibopolicy.evaluation.policy_runner import Actor
from fibopolicy.evaluation.scheduler import STEP_LIMIT, TRIES, VectorRollout


def evaluate(
    policy: Any,
    task: str | Mapping[str, Any] | Callable[[], TaskEnv],
    starts: Starts | str | Path | int = 50,
    *,
    workers: int | None = None,
    batch: int | None = None,
    threads: int = 1,
    step_limit: float = STEP_LIMIT,
    tries: int = TRIES,
    allow_mismatch: bool = False,
    on_row: Callable[[EpisodeResult], None] | None = None,
    **options: Any,
) -> list[EpisodeResult]:
    """Roll a policy out from stored start states, one row each, in the order of their
    indices.

    The rows are the same whatever the number of `workers`.

    Args:
        policy: an object with `act(obs, state) -> (actions, state)`: `obs` holds
            tensors of all cameras, uint8 `(B, T_o, H, W, 3)`, and vectors, float32 `(B,
            T_o, D)`; actions `(B, T_a, A)` in [-1, 1] are executed one after the other
            before the next call; `state` is `None` at an episode's start and then what
            the call before returned. `T_o` is its attribute `n_obs_steps`, or 1. B is
            `batch`; see `acting.Actor` for states in batches. Or a function of one
            episode's newest observation, a dict of arrays without B and T_o, that
            returns an action `(A,)` or a chunk `(T_a, A)`.
        task: a task's id, or "module:class" of your own; a dataset's `env_args`; or a
            function without arguments that makes the environment, importable by name,
            since it is called in each process.
        starts: a file of start states, its contents, or a number of them: the first of
            the set with seed 0.
        workers: simulators, one process each; by default as many as cores, or five
            times as many, up to 20, for the light built-in tasks.
        batch, threads: rows in each call of the policy, and torch's threads meanwhile:
            with other numbers the policy's last bits, and so the rows, may differ. By
            default 4 rows for a policy of this library and 1 for others.
        step_limit: seconds that a control step or a frame may take until its process
            counts as hung.
        tries: attempts for an episode whose simulator dies, hangs or fails; then its
            row is an error, not a failure.
        allow_mismatch: go on where start states do not look as they did when they were
            stored.
        on_row: called with each row as soon as its episode has ended, in that order.
        options: of the environment, e.g. `cameras`, `image_size`, `quality`, `horizon`.
            Cameras, sizes and quality are by default those that the policy was trained
            on, where it has an attribute `shapes` as this library's have.

    Raises:
        UserError: an unknown task or option; unusable start states; an environment that
            does not show what the policy reads; actions that are not what is described
            above.

    Example:
        >>> import numpy as np
        >>> from fibopolicy.evaluation import evaluate
        >>> def down(obs):
        ...     return np.array([0, 0, -1, 1], dtype=np.float32)
        >>> rows = evaluate(down, "Lift-v0", 2, workers=1, cameras=(), horizon=5)
        >>> [(row.index, row.success, row.steps) for row in rows]
        [(0, False, 5), (1, False, 5)]
    """
    if isinstance(starts, str | Path):
        starts = load_starts(Path(starts))
    if not isinstance(starts, Starts):
        try:
            starts = operator.index(starts)  # also numpy's integers
        except TypeError as error:
            raise UserError(
                "starts must be start states, a file of them or a whole number of them, got"
                f" {starts!r}"
            ) from error
    episodes = starts if isinstance(starts, int) else len(starts)
    if episodes < 1:
        raise UserError(f"starts must be at least 1, got {episodes}")
    make_env, name = _maker(task, {**({} if callable(task) else view_options(policy)), **options})
    n_obs_steps = Actor(policy).n_obs_steps
    with VectorRollout(
        make_env,
        n_obs_steps,
        workers or default_workers(name, episodes),
        step_limit=step_limit,
        tries=tries,
    ) as rollouts:
        info = rollouts.info()
        check_view(policy, info, "the policy")
        if isinstance(starts, Starts):
            stored = starts
        else:
            with make_env() as env:
                stored = default_starts(env, episodes, 0)
        if stored.env_args["env_name"] != info.env_args["env_name"]:
            raise UserError(
                f"start states of {stored.env_args['env_name']}, but the task is {info.task_id}"
            )
        actor = make_actor(policy, batch, threads, info)
        identity = Identity(policy=weights_digest(policy))
        rows = []
        for row in measure(
            rollouts, actor, stored, range(episodes), identity, allow_mismatch=allow_mismatch
        ):
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return sorted(rows, key=lambda row: row.index)


def _maker(
    task: str | Mapping[str, Any] | Callable[[], TaskEnv], options: dict[str, Any]
) -> tuple[Callable[[], TaskEnv], str]:
    """What makes the environment in any process, and the task's id as far as it is known before."""
    if isinstance(task, str):
        return functools.partial(make, resolve(task), **options), resolve(task)
    if isinstance(task, Mapping):
        return functools.partial(from_env_args, dict(task), **options), task_id_of(task)
    if not callable(task):
        raise UserError(
            f"task must be a task's id, a dataset's env_args or a function that makes it, got {task!r}"[  # noqa: E501
                :300
            ]
        )
    if options:
        raise UserError(
            f"{', '.join(options)}: a function that makes the environment takes no options; set"
            " them there"
        )
    return task, "robosuite/"  # as heavy as a simulator may be
