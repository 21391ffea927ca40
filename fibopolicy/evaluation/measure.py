"""Rows from episodes: what an evaluation of any policy has in common."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fibopolicy.envs.registry import is_heavy
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import EpisodeResult, success_rate
from fibopolicy.evaluation.init_states import Starts
from fibopolicy.evaluation.policy_runner import Actor, own_randomness, trained_shapes
from fibopolicy.evaluation.scheduler import VectorRollout
from fibopolicy.evaluation.simulator import TaskInfo
from fibopolicy.policies import Policy
from fibopolicy.policies.run_directory import render_quality
from fibopolicy.utils.system import usable_cores

_log = logging.getLogger(__name__)

#: Rows in a policy's call unless told otherwise: little dearer than one, and enough to
#: share what a call costs.
BATCH = 4


@dataclass(frozen=True)
class Identity:
    """What was measured: gradient steps behind the weights, which weights, their digest."""

    checkpoint_step: int = 0
    weights: str = ""
    policy: str = ""


def weights_digest(policy: Any) -> str:
    """A digest of a module's parameters and buffers; empty for what is no module."""
    if not isinstance(policy, nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, tensor in policy.state_dict().items():
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def make_actor(policy: Any, batch: int | None, threads: int, info: TaskInfo) -> Actor:
    """The policy behind calls of `batch` rows.

    `None` takes `BATCH` for a policy of this library whose rows do not depend on each
    other, else 1: another's may draw random numbers or mix its rows, and nothing but a
    batch of one is then repeatable.

    Raises:
        UserError: the rows of a larger batch depend on each other.
    """
    if batch == 1 or (batch is None and not isinstance(policy, Policy)):
        return Actor(policy, batch=1, threads=threads)
    actor = Actor(policy, batch=batch or BATCH, threads=threads)
    with own_randomness():
        if actor.independent(info.layout):
            return actor
    if batch is None:
        return Actor(policy, batch=1, threads=threads)
    raise UserError(
        f"in a batch of {batch}, this policy's actions for an episode depend on the episodes beside"
        " it, or on chance: rows would depend on the number of workers; use a batch of 1"
    )


def view_options(policy: Any) -> dict[str, Any]:
    """The options with which an environment shows what a policy was trained on:
    `cameras`, `image_size`, `quality`.

    None for a policy that does not say, with an attribute `shapes` of type
    `fibopolicy.policies.Shapes`.
    """
    if (shapes := trained_shapes(policy)) is None:
        return {}
    sizes = {camera.removesuffix("_image"): tuple(size) for camera, size in shapes.images.items()}
    options: dict[str, Any] = {"cameras": tuple(sizes)}
    if sizes:
        height, width = one = next(iter(sizes.values()))
        alike = set(sizes.values()) == {one}
        options["image_size"] = (height if height == width else one) if alike else sizes
    if quality := getattr(policy, "render_quality", None):
        options["quality"] = quality
    return options


def check_view(policy: Any, info: TaskInfo, source: str) -> None:
    """Check that an environment shows what a policy reads, before its first step.

    Args:
        source: names the policy in errors.

    Raises:
        UserError: it lacks a camera or a vector, or gives it in another shape.
    """
    if (shapes := trained_shapes(policy)) is None:
        return
    read = {key: (*size, 3) for key, size in shapes.images.items()} | {
        key: (dim,) for key, dim in shapes.vectors.items()
    }
    for key, shape in read.items():
        if key not in info.layout:
            known = (
                ", ".join(k for k, (found, _) in info.layout.items() if len(found) == len(shape))
                or "none of its kind"
            )
            raise UserError(
                f"{source} was trained on {key}, which {info.task_id} does not give; it gives"
                f" {known}"
            )
        if (found := tuple(info.layout[key][0])) != shape:
            raise UserError(
                f"{source} was trained on {key} of shape {shape}, which {info.task_id} gives as"
                f" {found}"
            )
    trained = getattr(policy, "render_quality", None)
    if shapes.images and trained and info.quality != trained:
        warnings.warn(
            f"{source} was trained on frames of render quality {trained} and sees {info.quality},"
            " which look different",
            stacklevel=2,
        )


def default_workers(task_id: str, episodes: int) -> int:
    """Processes for a task: as many as cores where a simulator fills a core, five times
    as many where it is light.

    Light ones are at most 20 unless there are more cores: one policy has no answers for
    more.
    """
    cores = usable_cores()
    return max(1, min(cores if is_heavy(task_id) else max(cores, min(5 * cores, 20)), episodes))


def measure(
    rollouts: VectorRollout,
    actor: Actor,
    starts: Starts,
    indices: Sequence[int],
    identity: Identity,
    *,
    kept: Sequence[EpisodeResult] = (),
    allow_mismatch: bool = False,
    source: object = "start states",
) -> Iterator[EpisodeResult]:
    """A row for each index, in the order in which episodes end, with a live view; at
    the end tells where the time went.

    Args:
        kept: rows that are there already, for the live view.
        source: where the start states come from, for errors.

    Raises:
        UserError: a start state does not look as it did when it was stored, and
            `allow_mismatch` is not given.
    """
    info, rows = rollouts.info(), list(kept)
    differing: dict[int, str] = {}

    def check(index: int, hashes: Mapping[str, str]) -> None:
        if cameras := _differing(starts, index, hashes):
            if not allow_mismatch:
                raise UserError(f"{source}: {mismatch(starts, index, cameras, info)}")
            differing[index] = ", ".join(cameras)

    with (
        own_randomness(),
        tqdm(
            total=len(rows) + len(indices),
            initial=len(rows),
            desc="evaluate",
            unit="episode",
            disable=None,
        ) as bar,
    ):
        for outcome in rollouts.run(actor, starts, indices, check=check):
            row = EpisodeResult(
                task=info.task_id,
                index=outcome.index,
                seed=starts.seeds[outcome.index],
                success=outcome.success,
                steps=outcome.steps,
                total_reward=outcome.total_reward,
                wall_s=round(outcome.wall_s, 4),
                checkpoint_step=identity.checkpoint_step,
                weights=identity.weights,
                starts_seed=starts.seed,
                horizon=info.horizon,
                quality=info.quality,
                start=starts.identity(outcome.index),
                policy=identity.policy,
                batch=actor.batch,
                threads=actor.threads,
                error=outcome.error,
                tries=outcome.tries,
                mismatch=differing.get(outcome.index, ""),
            )
            rows.append(row)
            if any(not row.error for row in rows):
                bar.set_postfix_str(
                    f"{success_rate(rows)}, {rollouts.load.steps_per_s:.0f} steps/s", refresh=False
                )
            bar.update()
            yield row
    if indices:
        _log.info("%s", rollouts.load)
    if differing:
        _log.warning(
            "%d of %d start states did not look as they did when they were stored",
            len(differing),
            len(indices),
        )


def _differing(starts: Starts, index: int, hashes: Mapping[str, str]) -> list[str]:
    """The cameras whose first frame is not the stored one."""
    return [
        camera for camera, digest in hashes.items() if starts.hashes[index].get(camera) != digest
    ]


def mismatch(starts: Starts, index: int, differing: Sequence[str], info: TaskInfo) -> str:
    """In which way a restored start state does not look as it did when it was stored,
    and why that may be.
    """
    then, now = _settings(starts.env_args, starts.versions), _settings(info.env_args, info.versions)
    changed = [
        f"{key} {then.get(key) or 'none'} then, {now[key] or 'none'} now"
        for key in now
        if then.get(key) != now[key]
    ]
    return (
        f"start state {index} of {info.task_id} does not look as it did when it was stored"
        f" ({', '.join(differing)});"
        f" {'; '.join(changed) or 'settings and versions are the same, so OpenGL draws otherwise here'};"  # noqa: E501
        " make them anew, or pass --allow-mismatch"
    )


def _settings(env_args: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, str]:
    kwargs = env_args.get("env_kwargs") or {}
    settings = {**kwargs, "render quality": render_quality(env_args)}
    left_out = ("horizon", "quality")
    return {**{k: json.dumps(v) for k, v in settings.items() if k not in left_out}, **versions}
