"""Rows seen once more, with every frame."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from fibopolicy.evaluation.episodes import EpisodeResult
from fibopolicy.evaluation.init_states import Starts
from fibopolicy.evaluation.policy_runner import Actor, own_randomness
from fibopolicy.evaluation.scheduler import VectorRollout
from fibopolicy.evaluation.video import Frame

Clip = tuple[Sequence[Frame], bool]


def film(
    rollouts: VectorRollout,
    actor: Actor,
    starts: Starts,
    rows: Sequence[EpisodeResult],
    camera: str,
) -> dict[int, Clip]:
    """Frames and success by index of the episodes of these rows, in their order,
    without those that a simulator fails in.
    """
    wanted = {row.index: row for row in rows}
    clips: dict[int, Clip] = {}
    with own_randomness():
        outcomes = rollouts.run(actor, starts, list(wanted), film=camera)
        for outcome in tqdm(outcomes, total=len(wanted), desc="film", unit="episode", disable=None):
            row = wanted[outcome.index]
            if not outcome.error and (outcome.success, outcome.steps) != (row.success, row.steps):
                raise RuntimeError(
                    f"episode {row.index} did not repeat: {outcome.steps} steps, its row says"
                    f" {row.steps}"
                )
            if outcome.frames:
                clips[outcome.index] = (outcome.frames, outcome.success)
    return {index: clips[index] for index in wanted if index in clips}
