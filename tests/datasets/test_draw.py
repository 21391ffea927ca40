from __future__ import annotations

from pathlib import Path

import numpy as np

from fibopolicy.datasets import draw
from fibopolicy.datasets.restore import Trajectory
from fibopolicy.envs import make
from fibopolicy.envs.perturbations import Perturbation


def test_a_clip_is_free_of_the_perturbation_of_the_clip_before(tmp_path: Path) -> None:
    with make("Lift-v0", cameras=("workspace",), image_size=24) as env:
        env.reset(seed=0)
        state, env_args = env.get_state(), env.env_args
    draw._start_worker(env_args, {})
    clips = []
    for perturbation in (None, Perturbation("camera-position", 3), None):
        clip = Trajectory("", state.model, state.state[None], np.empty((0, 0)), perturbation)
        draw._draw(clip, tmp_path / "clip.npy", None)
        clips.append(np.load(tmp_path / "clip.npy"))
    assert not np.array_equal(clips[0], clips[1])
    assert np.array_equal(clips[0], clips[2])
