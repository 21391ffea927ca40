"""What only robomimic 0.5 has: Diffusion Policy, several datasets, 6-D rotations.

robomimic 0.5 lies in a folder of its own, since one environment holds one version. The
first test runs the tests of this package with that folder on the path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from robomimic_rollout import is_0_5, needs_0_5, observed, rollout_policy

from fibopolicy.datasets import DemoFile
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.evaluate import evaluate_run
from fibopolicy.policies.base import Shapes
from fibopolicy.policies.rng import EpisodeRng
from fibopolicy.policies.run_directory import resolve_run
from fibopolicy.robomimic.checkpoint import read_checkpoint
from fibopolicy.robomimic.imported import ImportedPolicy
from fibopolicy.robomimic.train import train_robomimic

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "robomimic-0.5"  # where scripts/setup installs it
#: Tests of robomimic's interfaces; slow ones run with 0.3 only.
TESTS = ("tests/robomimic_package", "tests/datasets/test_robomimic_reads_ours.py")
IMAGES = ("workspace_image",)


@pytest.mark.slow
@pytest.mark.skipif(is_0_5(), reason="the tests run with robomimic 0.5 already")
def test_the_tests_of_this_package_pass_with_robomimic_0_5() -> None:
    if not FOLDER.is_dir():
        pytest.skip(f"robomimic 0.5 is not installed in {FOLDER}; ./scripts/setup installs it")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-m", "not slow", *TESTS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.skipif(is_0_5(), reason="robomimic 0.5 is installed")
def test_diffusion_policy_asks_for_0_5(save: Callable[..., Path]) -> None:
    path = save()
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, "algo_name": "diffusion_policy"}, path)
    with pytest.raises(UserError, match=r"diffusion_policy needs robomimic 0\.5, 0\.3\.0 is"):
        ImportedPolicy(read_checkpoint(path))


@pytest.fixture(scope="module")
def unet() -> Any:
    """A small network: 0.5 ignores the sizes in its configuration."""
    import robomimic.models.diffusion_policy_nets as nets

    with pytest.MonkeyPatch.context() as patch:
        sizes = {"down_dims": [8, 16], "diffusion_step_embed_dim": 8, "n_groups": 4}
        patch.setattr(nets, "ConditionalUnet1D", partial(nets.ConditionalUnet1D, **sizes))
        yield


@pytest.fixture(scope="module")
def diffusion(unet: None, lift_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an image Diffusion Policy, trained by robomimic for three steps."""
    folder = tmp_path_factory.mktemp("diffusion")
    with DemoFile(lift_file) as file:
        vectors = list(file.vector_keys)
    core = {"feature_dimension": 8, "backbone_class": "ShallowConv", "pool_class": "SpatialSoftmax"}
    document = {
        "algo_name": "diffusion_policy",
        "experiment": {
            "name": "diffusion",
            "epoch_every_n_steps": 3,
            "save": {"every_n_epochs": 1},
            "rollout": {"enabled": False, "horizon": 100},
        },
        "train": {
            "batch_size": 2,
            "num_epochs": 1,
            "cuda": False,
            "seq_length": 8,
            "hdf5_cache_mode": "low_dim",
            "action_config": {"actions": {"normalization": "min_max"}},
        },
        "algo": {
            "horizon": {"action_horizon": 4, "prediction_horizon": 8},
            "ddpm": {"num_inference_timesteps": 4},
            "ddim": {"num_inference_timesteps": 3},
        },
        "observation": {
            "modalities": {"obs": {"low_dim": vectors, "rgb": list(IMAGES)}},
            "encoder": {
                "rgb": {
                    "core_kwargs": core,
                    "obs_randomizer_class": "CropRandomizer",
                    "obs_randomizer_kwargs": {"crop_height": 20, "crop_width": 20, "num_crops": 1},
                }
            },
        },
    }
    config = folder / "config.json"
    config.write_text(json.dumps(document))
    done = train_robomimic(config, dataset=lift_file, out=folder / "runs")
    return done.checkpoints[-1]


@needs_0_5
@pytest.mark.parametrize("process", ["ddpm", "ddim"])
def test_a_diffusion_policy_denoises_the_same_noise_to_robomimic_s_actions(
    process: str, diffusion: Path, tmp_path: Path
) -> None:
    contents = torch.load(diffusion, weights_only=False)
    config = json.loads(contents["config"])
    for name in ("ddpm", "ddim"):
        config["algo"][name]["enabled"] = name == process
    ema = contents["model"]["ema"]
    for tensor in ema.values():  # far from the last weights, which must not be used
        tensor.mul_(1.5)
    path = tmp_path / "edited.pth"
    torch.save({**contents, "config": json.dumps(config)}, path)

    policy, theirs = ImportedPolicy(read_checkpoint(path)), rollout_policy(path)
    theirs.policy.ema_nets.eval()  # else this version crops at random
    assert (policy.config.n_obs_steps, policy.config.horizon) == (2, 8)
    shapes, generator = policy.shapes, torch.Generator().manual_seed(0)
    state = rng = None
    for _ in range(2):
        window = {
            key: torch.randint(0, 256, (3, 2, *size, 3), dtype=torch.uint8, generator=generator)
            for key, size in shapes.images.items()
        } | {
            key: torch.randn(3, 2, size, generator=generator)
            for key, size in shapes.vectors.items()
        }
        rng = rng.advance() if rng else EpisodeRng.init(window, shapes.keys)
        chunk, state = policy.act(window, state)
        assert chunk.shape == (3, 4, shapes.action_dim)
        for row, seed in enumerate(rng.seeds()):
            theirs.start_episode()
            torch.manual_seed(seed)
            for t in range(4):
                obs = observed(window, row, shapes.images, stacked=True)
                np.testing.assert_allclose(chunk[row, t].numpy(), theirs(obs), atol=1e-5)


@needs_0_5
def test_a_diffusion_policy_is_evaluated(diffusion: Path) -> None:
    run = resolve_run(diffusion)
    settings = EvaluateConfig(run=run, episodes=2, video=0, max_steps=6, workers=1)
    assert [row.steps for row in evaluate_run(settings).rows] == [6, 6]


@needs_0_5
@pytest.mark.parametrize("kind", ["rot_axis_angle", "rot_euler"])
def test_6d_rotations_are_converted_as_in_robomimic_s_rollout(
    kind: str, save: Callable[..., Path]
) -> None:
    def edit(config: Any) -> None:
        config.train.action_keys = ["pos", "rot", "gripper"]
        rotation = {"format": "rot_6d", "convert_at_runtime": kind}
        config.train.action_config = {"pos": {}, "rot": rotation, "gripper": {}}

    path = save(edit, Shapes({}, {"hand": 3}, 10))
    contents = torch.load(path, weights_only=True)
    contents["action_normalization_stats"] = {
        key: {"offset": [[0.1] * size], "scale": [[2.0] * size]}
        for key, size in (("gripper", 1), ("pos", 3), ("rot", 6))
    }
    torch.save(contents, path)
    policy, theirs = ImportedPolicy(read_checkpoint(path)), rollout_policy(path)
    assert policy.shapes.action_dim == 7
    obs = {"hand": torch.randn(4, 1, 3)}
    actions, _ = policy.act(obs)
    for row in range(4):
        expected = theirs(observed(obs, row, (), stacked=False))
        np.testing.assert_allclose(actions[row, 0].numpy(), expected, atol=1e-5)
