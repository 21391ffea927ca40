"""Published training runs by name: what an option on the command line or a line of
Python asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fibopolicy.errors import unknown
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.training.config import OptimizerConfig, TrainConfig


def released_robot(dataset: Path, out: Path) -> TrainConfig:
    """What Fibottention's authors ran for robots: their encoder in Diffusion Policy's
    hands.

    Each camera has a ViT-B over 8 x 8 patches of a crop of 76 x 76 with their
    Fibottention (encoder `released_robot`); the head is Diffusion Policy's, a U-Net of
    256, 512 and 1024 channels, DDPM with 100 steps, 2 observations, a horizon of 16 and
    8 actions; batches of 64, AdamW with rate 1e-4, an EMA. They trained for about 500
    epochs of the dataset, so `steps` is to be set for it: 500 * windows / 64, 75,000
    for robomimic's 200 Lift demonstrations. That takes a GPU.

    Theirs visits all 100 steps to act, here DDIM visits 10; weight decay and warm-up
    are Diffusion Policy's.
    """
    return TrainConfig(
        dataset,
        out,
        policy=PolicyConfig(
            head="diffusion",
            encoder="released_robot",
            crop=76,
            hidden=256,
            layers=3,
            head_options={"draws": 1},
        ),
        optimizer=OptimizerConfig(
            steps=75_000,
            batch_size=64,
            learning_rate=1e-4,
            warmup=500,
            weight_decay=1e-6,
            betas=(0.95, 0.999),
            ema=0.9999,
        ),
        checkpoint_every=1000,
    )


PRESETS: dict[str, Callable[[Path, Path], TrainConfig]] = {"released_robot": released_robot}


def preset(name: str, dataset: Path, out: Path) -> TrainConfig:
    """The training run of a name.

    Raises:
        UserError: no such preset, with the nearest match suggested.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name](dataset, out)
